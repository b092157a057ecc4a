"""Section 4.1 of the paper: MLHF against tuned first-order optimizers, CUDA-convnet on CIFAR-10.

Trains the network on the last 2/5 of the training set of CIFAR-10 with MLHF, and with every entry of
the paper's grid of SGD with momentum, RMSprop and Adam (Table 1: 45 settings). Records the loss on the
training part and loss and accuracy on the test set, by epochs and by time (figure 2). MLHF runs twice, with
the whole batch and with a quarter of it for its curvature.

    python benchmarks/paper/first_order_cifar10.py --data-dir DIR --output runs/first_order_cifar10

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiment import ConvnetOptions, by_epoch, learned_contenders, run_experiment

from mlhf_optax.experiments import Comparison, grid_contenders
from mlhf_optax.experiments.scripts import command_line, parse_options


@dataclasses.dataclass(frozen=True)
class Options(ConvnetOptions):
    """Options of this script."""

    output: Path = Path("runs/first_order_cifar10")
    """Folder for all that is written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    options = parse_options(Options, __doc__, arguments)
    task = options.make_task((2000, 2000, 500))
    contenders = [*learned_contenders(task, options), *grid_contenders(batch_size=task.batch_size)]
    command = command_line(__file__, arguments)
    run_experiment(task, contenders, options.shortened(), "First-order optimizers", command)


TABLES = {
    "first_order_cifar10": lambda folder: by_epoch(Comparison.load(folder / "first_order_cifar10.json")),
    "first_order_cifar10_narrow": lambda folder: by_epoch(
        Comparison.load(folder / "first_order_cifar10_narrow.json")
    ),
}

if __name__ == "__main__":
    main()
