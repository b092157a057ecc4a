"""Section 4.4 of the paper: meta-trained on a mini ResNet and CIFAR-10, used on ResNet-18.

Tiny-ImageNet stands in for the paper's ImageNet.

Trains ResNet-18 v2 at batch 64 with MLHF, whose meta-parameters come from the mini ResNet of 9 blocks on
CIFAR-10 (batch 128), and with every entry of the paper's grid of first-order optimizers, whose learning
rates count for batch 256 here. Records loss and accuracy by epochs and by time (figure 5).

    python benchmarks/transfer_resnet18.py --data-dir DIR --output runs/transfer_resnet18

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
``--channels 8 --stem imagenet --examples 8000`` is a small network on part of the images.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experiment import (
    ExperimentOptions,
    command_line,
    learned_contenders,
    limit_data,
    parse_options,
    run_experiment,
)

from mlhf_optax.experiments import grid_contenders
from mlhf_optax.tasks import Task, get_task, num_examples

BASELINE_BATCH_SIZE = 256  # that of which the grid's learning rates are (Table 1)


@dataclasses.dataclass(frozen=True)
class Options(ExperimentOptions):
    """Options of this script."""

    batch_size: int = 64
    """Examples per mini-batch."""
    channels: int = 64
    """Channels of the first stage."""
    stem: Literal["small", "imagenet"] = "small"
    """First layers."""
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
        stem=options.stem,
        batch_size=options.batch_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
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
    available = num_examples(data.train)
    if not task.batch_size <= num_train <= available:
        raise ValueError(
            f"`--examples` must be between the batch size, {task.batch_size}, and {available}, the number of "
            f"images, got {num_train}"
        )
    return limit_data(task, num_examples(data.meta_train), num_train, num_examples(data.test))


if __name__ == "__main__":
    main()
