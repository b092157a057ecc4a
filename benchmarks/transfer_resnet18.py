"""Section 4.4 of the paper: meta-trained on a mini ResNet and CIFAR-10, used on ResNet-18 and ImageNet.

Trains ResNet-18 v2 at batch 64 with MLHF, whose meta-parameters come from the mini ResNet of 9 blocks on
CIFAR-10 (batch 128), and with every entry of the paper's grid of first-order optimizers, whose learning
rates count for batch 256 here. Training loss and test accuracy by epochs and by time (figure 5).

    python benchmarks/transfer_resnet18.py --data-dir DIR --output runs/transfer_resnet18

Where ImageNet is out of reach, Tiny-ImageNet stands in for it: ``--task tiny-imagenet-resnet18``, the
default. ``--task imagenet-resnet18`` streams ImageNet as tensorflow-datasets prepares it.

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
``--channels 8 --stem imagenet --examples 8000`` is a small network on part of the images.
"""

from collections.abc import Sequence

from mlhf_optax.comparison.comparison import grid_contenders
from mlhf_optax.comparison.experiment import run_experiment
from mlhf_optax.comparison.experiment_options import apply_quick, experiment_parser, limit_data
from mlhf_optax.comparison.mlhf_contenders import mlhf_contenders
from mlhf_optax.tasks import Task, get_task, num_examples, part_size

BASELINE_BATCH_SIZE = 256  # that of which the grid's learning rates are (Table 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    parser = experiment_parser(__doc__, "transfer_resnet18", batch_size=64)
    names = ("tiny-imagenet-resnet18", "imagenet-resnet18")
    parser.add_argument("--task", choices=names, default=names[0])
    parser.add_argument("--channels", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--stem", choices=("small", "imagenet"), help="by default that of the task")
    parser.add_argument("--examples", type=int, help="train on the first of them only, of Tiny-ImageNet")
    options = parser.parse_args(arguments)
    apply_quick(options)
    if options.quick:
        options.task, options.channels, options.stem = names[0], 4, "imagenet"
    chosen = {"stem": options.stem} if options.stem else {}
    task = get_task(
        options.task,
        channels=options.channels,
        batch_size=options.batch_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        **chosen,
    )
    if options.quick:
        task = limit_data(task, 640, 640, 200)
    elif options.examples is not None:
        task = shortened(task, options.examples)
    grid = grid_contenders(task.batch_size, baseline_batch_size=BASELINE_BATCH_SIZE)
    contenders = [*mlhf_contenders(task, options), *grid]
    run_experiment(task, contenders, options, "ResNet-18", "transfer_resnet18.py")


def shortened(task: Task, num_train: int) -> Task:
    """Returns the task with the first examples of its training part, in which classes take turns.

    Raises:
      ValueError: if the part is streamed, or smaller.
    """
    data = task.data
    if not isinstance(data.train, dict):
        raise ValueError("`--examples` is for data in memory; for less of ImageNet take fewer `--epochs`")
    if not task.batch_size <= num_train <= part_size(data.train):
        raise ValueError(
            f"`--examples` must be between the batch size, {task.batch_size}, and {part_size(data.train)}, "
            f"the number of images, got {num_train}"
        )
    return limit_data(task, num_examples(data.meta_train), num_train, num_examples(data.test))


if __name__ == "__main__":
    main()
