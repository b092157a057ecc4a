"""Section 4.4 of the paper: meta-trained on a mini ResNet and CIFAR-10, used on ResNet-18 and ImageNet.

Trains ResNet-18 v2 at batch 64 with MLHF, whose meta-parameters come from the mini ResNet of 9 blocks on
CIFAR-10 (batch 128), and with every entry of the paper's grid of first-order optimizers, whose learning
rates count for batch 256 here. Records loss and accuracy by epochs and by time (figure 5).

    python benchmarks/paper/transfer_resnet18.py --data-dir DIR --output runs/transfer_resnet18

Tiny-ImageNet, with images of 64 x 64 pixels, stands in for ImageNet.

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
``--channels 8 --stem imagenet --examples 8000`` is a small network on part of the images.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experiment import ExperimentOptions, by_epoch, learned_contenders, limit_data, run_experiment

from mlhf_optax.experiments import Comparison, grid_contenders
from mlhf_optax.experiments.scripts import command_line, parse_options
from mlhf_optax.support.checks import require
from mlhf_optax.tasks import Task, get_task, num_examples

BASELINE_BATCH_SIZE = 256  # that of which the grid's learning rates are (Table 1)


@dataclasses.dataclass(frozen=True)
class Options(ExperimentOptions):
    """Options of this script."""

    batch_size: int = 64
    """Examples per mini-batch."""
    channels: int = 64
    """Channels of the first stage."""
    stem: Literal["small", "imagenet"] | None = None
    """First layers; by default those of the task."""
    examples: int | None = None
    """Train on the first of them only."""
    output: Path = Path("runs/transfer_resnet18")
    """Folder for all that is written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    options = parse_options(Options, __doc__, arguments)
    options = options.shortened(channels=4, stem="imagenet")
    task = get_task(
        "tiny-imagenet-resnet18",
        channels=options.channels,
        batch_size=options.batch_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        **({"stem": options.stem} if options.stem else {}),
    )
    if options.quick:
        task = limit_data(task, 640, 640, 200)
    elif options.examples is not None:
        task = shortened(task, options.examples)
    grid = grid_contenders(batch_size=task.batch_size, baseline_batch_size=BASELINE_BATCH_SIZE)
    contenders = [*learned_contenders(task, options), *grid]
    run_experiment(task, contenders, options, "ResNet-18", command_line(__file__, arguments))


def shortened(task: Task, num_train: int) -> Task:
    """Returns the task with the first examples of its training part, in which classes take turns."""
    data = task.data
    wanted = f"from the batch size, {task.batch_size}, to {num_examples(data.train)}, the number of images"
    require(task.batch_size <= num_train <= num_examples(data.train), "examples", wanted, num_train)
    return limit_data(task, num_examples(data.meta_train), num_train, num_examples(data.test))


TABLES = {"transfer_resnet18": lambda folder: by_epoch(Comparison.load(folder / "transfer_resnet18.json"))}

if __name__ == "__main__":
    main()
