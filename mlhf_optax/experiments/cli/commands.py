"""The commands of ``mlhf-optax``: which there are, and which was typed."""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Union

import tyro
from tyro.conf import subcommand

import mlhf_optax
from mlhf_optax.experiments.cli.console import STOPPED, errors_explained
from mlhf_optax.experiments.cli.list_command import List, list_all
from mlhf_optax.experiments.cli.meta_train_command import (
    DEFAULT_GENERAL,
    DEFAULT_OPTIMIZER,
    MetaTrain,
    MetaTrainLong,
    meta_train,
    meta_train_long,
)
from mlhf_optax.experiments.cli.options import registry
from mlhf_optax.experiments.cli.train_command import Train, train
from mlhf_optax.learned import LearnedFamily, get_learned


def run(arguments: Sequence[str]) -> int:
    """Runs the command in what follows ``mlhf-optax``; returns the exit status, 130 after Ctrl-C.

    Raises:
      SystemExit: with status 2 after an error, which was explained.
    """
    if list(arguments[:1]) == ["--version"]:
        print(mlhf_optax.__version__)
        return 0
    command = shlex.join(["mlhf-optax", *arguments])
    try:
        with errors_explained():
            options = parse(arguments)
        if isinstance(options, Train):
            return train(options, command)
        if isinstance(options, MetaTrain):
            return meta_train(options, command)
        return meta_train_long(options, command) if isinstance(options, MetaTrainLong) else list_all()
    except KeyboardInterrupt:
        return STOPPED


COMMANDS = {"train": Train, "meta-train": MetaTrain, "meta-train-long": MetaTrainLong, "list": List}


def parse(arguments: Sequence[str]) -> Train | MetaTrain | MetaTrainLong | List:
    """Returns the command in what follows ``mlhf-optax``.

    Raises:
      SystemExit: if help was asked for (status 0), or for arguments that are wrong (2).
      ValueError: for a learned optimizer that does not exist.

    Example:
      >>> parse(["train", "--hidden", "16,16"]).hidden
      (16, 16)
      >>> parse(["meta-train", "--optimizer", "adam_rates", "--num-tasks", "3"]).config.num_tasks
      3
    """
    settings: dict[str, Any] = {
        "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        "registry": registry(_family(arguments)),
    }
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        return tyro.cli(COMMANDS[name], prog=f"mlhf-optax {name}", args=list(arguments[1:]), **settings)
    commands = [Annotated[command, subcommand(name)] for name, command in COMMANDS.items()]
    return tyro.cli(
        Union[*commands],  # type: ignore[arg-type]
        prog="mlhf-optax",
        description="Train networks with learned optimizers, and see how they compare with SGD, RMSprop and "
        "Adam. Start with `mlhf-optax train`; `mlhf-optax --version` prints the version.",
        args=list(arguments) or ["--help"],
        **settings,
    )


def _family(arguments: Sequence[str]) -> LearnedFamily:
    """Finds ``--optimizer`` before anything else is parsed, since it decides what options there are."""
    is_long = bool(arguments) and COMMANDS.get(arguments[0]) is MetaTrainLong
    name = DEFAULT_GENERAL if is_long else DEFAULT_OPTIMIZER
    for argument, following in pairwise([*arguments, name]):
        flag, equals, value = argument.partition("=")
        if flag == "--optimizer":
            name = value if equals else following
    return get_learned(name)
