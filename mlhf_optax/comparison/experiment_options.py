"""Options that the comparisons on image tasks share, and parts of their data."""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from mlhf_optax.tasks import Dataset, Examples, Task

UNTRAINED = "untrained"


def experiment_parser(description: str | None, name: str, batch_size: int) -> argparse.ArgumentParser:
    """Returns a parser with the options that all comparisons for epochs have.

    Args:
      description: what the experiment is about.
      name: name of the experiment; results go to ``runs/NAME`` by default.
      batch_size: default batch size.

    Returns:
      The parser; more options can be added.

    Example:
      >>> experiment_parser("About.", "first_order", 128).parse_args(["--epochs", "3"]).epochs
      3
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    add = parser.add_argument
    add("--epochs", type=int, default=250, help="length of every training; the paper's is 250")
    add("--seeds", type=int, default=3, help="trainings of every optimizer")
    add("--batch-size", type=int, default=batch_size)
    add("--data-dir", type=Path, help="where the data lie; by default $TFDS_DATA_DIR")
    add("--cache-dir", type=Path, help="where decoded data are kept")
    add("--meta-params", help=f"shipped name or path, or {UNTRAINED!r}; by default those for the task")
    add("--learning-rate", type=float, help="of MLHF; by default what its record says")
    add("--momentum", type=float, help="of MLHF; by default what its record says")
    add(
        "--curvature-share",
        type=float,
        default=0.25,
        help="also train MLHF with this share of the batch for its curvature; 0 for not",
    )
    add(
        "--cg-steps",
        type=_count,
        nargs="+",
        metavar="K",
        help="CG steps of MLHF with that share, one training each; by default what its record says",
    )
    add("--only", nargs="+", metavar="FAMILY", help="families of optimizers to train, such as mlhf adam")
    add("--group-size", type=int, help="settings that advance together; chosen by the device by default")
    add("--output", type=Path, default=Path("runs") / name, help="folder for all that is written")
    add("--resume", action="store_true", help="go on from what lies in --output, also with more --seeds")
    add("--quick", action="store_true", help="a narrow network, few examples, 2 epochs and 1 seed")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def apply_quick(options: argparse.Namespace) -> None:
    """Shortens the experiment to minutes on two cores, on a narrow network, if ``--quick`` is given."""
    if options.quick:
        options.epochs, options.seeds = 2, 1
        if "hidden" in options:
            narrow(options)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--channels`` and ``--hidden``, the widths of CUDA-convnet; narrow nets are the cheap road.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> add_network_options(parser)
      >>> network_options(parser.parse_args(["--channels", "8", "16", "--hidden", "16"]))
      {'channels': (8, 16), 'hidden': (16,)}
    """
    add = parser.add_argument
    add("--channels", type=int, nargs="+", default=[32, 64], help="of the convolutions; 8 16 is narrow")
    add("--hidden", type=int, nargs="+", default=[32], help="widths of the dense layers")


def narrow(options: argparse.Namespace) -> None:
    """Makes the CUDA-convnet of the options the narrow one, that of the cheap road."""
    options.channels, options.hidden = [8, 16], [16]


def network_options(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Returns the arguments of :func:`mlhf_optax.tasks.cifar10_convnet` for the options."""
    return {"channels": tuple(options.channels), "hidden": tuple(options.hidden)}


def limit_data(task: Task, num_meta_train: int, num_train: int, num_test: int) -> Task:
    """Returns the task with the first examples of every part of its data only.

    Example:
      >>> from mlhf_optax.tasks import part_size
      >>> from mlhf_optax.tasks import get_task
      >>> part_size(limit_data(get_task("digits-mlp"), 10, 20, 30).data.train)
      20
    """

    def load() -> Dataset:
        first = lambda part, count: jax.tree.map(lambda leaf: leaf[:count], part)
        data = task.data
        return Dataset(
            first(data.meta_train, num_meta_train), first(data.train, num_train), first(data.test, num_test)
        )

    return dataclasses.replace(task, load_data=load)


def join_examples(*parts: Examples) -> Examples:
    """Joins parts of a dataset.

    Example:
      >>> join_examples({"label": np.array([1])}, {"label": np.array([2, 3])})
      {'label': array([1, 2, 3])}
    """
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


__all__ = [
    "UNTRAINED",
    "add_network_options",
    "apply_quick",
    "experiment_parser",
    "join_examples",
    "limit_data",
    "narrow",
    "network_options",
]
