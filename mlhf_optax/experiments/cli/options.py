"""The options of ``mlhf-optax``, each declared once: its type, its default and its help."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Union, get_type_hints

import docstring_parser
import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand
from tyro.constructors import PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from mlhf_optax.experiments.contenders import CONSTANT, FAMILIES, PAPER_FAMILIES
from mlhf_optax.experiments.meta_train_long import RECIPE
from mlhf_optax.learned import LEARNED, LearnedFamily, get_learned
from mlhf_optax.tasks import ACTIVATIONS, TASKS

_DEFAULT_TASK = next(iter(TASKS))
_DEFAULT_OPTIMIZER = next(iter(LEARNED))
_DEFAULT_GENERAL = next(name for name, family in LEARNED.items() if family.fits_any)


def _separated(metavar: str, parse: Callable[[list[str]], Any]) -> PrimitiveConstructorSpec:
    """Returns how an option with values separated by commas is parsed."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: parse([part.strip() for part in texts[0].split(",")]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [_joined(values or ())],
    )


def _numbers(parts: list[str]) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"must be whole numbers separated by commas, like 32 or 32,32, got {_joined(parts)!r}"
        )
    return tuple(map(int, parts))


def _names(parts: list[str]) -> tuple[str, ...]:
    known = [*LEARNED, *FAMILIES, CONSTANT]
    if not set(parts) <= set(known):
        raise ValueError(f"must be among {_joined(known)}, separated by commas, got {_joined(parts)!r}")
    return tuple(dict.fromkeys(parts))


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


Numbers = Annotated[tuple[int, ...], _separated("N,N", _numbers)]
OptionalNumbers = Annotated[tuple[int, ...] | None, _separated("N,N", _numbers)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is trained."""

    task: Annotated[Positional[str], arg(metavar="[TASK]")] = _DEFAULT_TASK
    """What to train; `mlhf-optax list` shows the tasks."""
    batch_size: int | None = None
    """Examples per mini-batch; by default the task's own number."""
    data_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where the data of image tasks lie; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    channels: OptionalNumbers = None
    """Channels of convolutions: two numbers for cifar10-convnet, like 8,16, and one for ResNets."""
    hidden: OptionalNumbers = None
    """Widths of the hidden dense layers of digits-mlp and cifar10-convnet, like 16 or 32,32."""
    activation: Annotated[str | None, arg(metavar="|".join(ACTIVATIONS))] = None
    """Activation of digits-mlp."""

    def task_options(self, batch_size: str = "batch_size") -> dict[str, Any]:
        """Returns the arguments of the function that makes the task; ``batch_size`` is the name of one."""
        channels = self.channels[0] if self.channels and len(self.channels) == 1 else self.channels
        values = {batch_size: self.batch_size, "data_dir": self.data_dir, "channels": channels}
        values |= {"hidden": self.hidden, "activation": self.activation}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(TaskOptions):
    """Train a task with learned and with first-order optimizers, and compare them.

    Prints a table and draws a figure. SGD with momentum, RMSprop and Adam are trained with the grid of the
    MLHF paper: three learning rates and three values of every decay, 45 settings in all.
    """

    seeds: int = 5
    """Trainings of each optimizer; the table and the figure show their mean."""
    steps: int = 500
    """Length of each training, in mini-batches."""
    optimizers: Annotated[tuple[str, ...], _separated("NAMES", _names)] = (
        _DEFAULT_GENERAL,
        _DEFAULT_OPTIMIZER,
        *PAPER_FAMILIES,
    )
    """Which optimizers to train, separated by commas; `mlhf-optax list` shows their names. gauss_newton is
    the control that learned ones have to beat: the same step, damped by the constants 1, 3 and 10."""
    meta_params: Annotated[tuple[str, ...], _separated("NAME|FILE|OPTIMIZER=FILE", tuple)] = ()
    """Meta-parameters of learned optimizers, separated by commas: shipped names or files. By default those
    that ship for the task."""
    learning_rate: float | None = None
    """Learning rate of learned optimizers that take one; by default what the meta-parameters recommend."""
    num_cg_steps: Annotated[int | None, arg(aliases=("--cg-steps",))] = None
    """CG steps per step of learned optimizers that take them; by default as meta-trained."""
    curvature_batch_size: int | float | None = None
    """Examples of the batch for curvature, or a share of it, like 0.25; by default as meta-trained."""
    all: bool = False
    """Show every setting, not only the best."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write all results to this file."""
    figure: Annotated[Path | None, arg(metavar="FILE")] = None
    """Where the figure goes; by default ./mlhf-optax-TASK.png."""

    def __post_init__(self):
        _require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        _require(self.steps >= 1, "steps", "at least 1", self.steps)
        _require_positive(self, "learning_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTrain(TaskOptions):
    """Meta-train a learned optimizer on the part of a task's data that `mlhf-optax train` never uses.

    It can be stopped at any time and continued with --resume. The result is a file that
    --meta-params of `mlhf-optax train` takes.
    """

    optimizer: Annotated[str, arg(metavar="|".join(LEARNED))] = _DEFAULT_OPTIMIZER
    """The learned optimizer; each has options of its own, which --help shows below."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for checkpoints, metrics and the result; by default runs/TASK."""
    iterations: int = 1000
    """Meta-iterations, each one unroll of every task."""
    stop_after: int | None = None
    """Write the result after so many meta-iterations; --resume with a larger number goes on."""
    num_tasks: int = 8
    """Networks in training side by side."""
    unroll_length: int = 10
    """Steps per unroll."""
    meta_learning_rate: float = 1e-2
    """Peak learning rate of the meta-optimizer; it falls along a cosine to a hundredth."""
    seed: int = 0
    """Decides everything that is random."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    checkpoint_every: int = 50
    """Meta-iterations between checkpoints."""
    validate_every: int = 100
    """Meta-iterations between validations."""
    validation_steps: Numbers = (10, 30, 100, 300)
    """Steps after which a validation records the loss of its three trainings. Up to 300 it costs as much as 4
    meta-iterations with 8 networks, or 30 with one."""
    start: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Meta-parameters to go on from, which may bring settings of their own."""
    keep_probability: float = 0.95
    """Chance that a healthy inner training goes on after an unroll."""
    fresh_probability: float = 0.5
    """Chance that a training which does not go on is replaced by a fresh network, not by a replayed one."""
    max_age: int | None = None
    """Steps after which an inner training ends; by default it goes on until chance ends it."""
    random_scaling: float = 0.0
    """Multiply every parameter by a random factor between exp(-X) and exp(X), another for every training: the
    optimizer must then not depend on the scale of parameters and gradients. 3 in the literature."""
    companion_size: int = 0
    """Train a convex function of so many numbers beside every network. 20 in the literature."""
    optimizer_options: Any
    # An instance of the learned optimizer's own class of options, whose fields become options beside these.

    def __post_init__(self):
        _require_ascending(self.validation_steps)
        _require_positive(self, "meta_learning_rate")
        _require_seed(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTrainLong:
    """Meta-train a learned optimizer over long horizons, on tiny tasks of many kinds.

    Needs CIFAR-10, of which only the part for meta-training is used. It can be stopped at any time and
    continued with --resume. The result is a file that --meta-params of `mlhf-optax train` takes.
    """

    optimizer: Annotated[str, arg(metavar="|".join(LEARNED))] = _DEFAULT_GENERAL
    """The learned optimizer; each has options of its own, which --help shows below."""
    data_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where CIFAR-10 lies; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    only: Annotated[tuple[str, ...], _separated("NAMES", tuple)] = ()
    """Names of the tiny tasks to train on, separated by commas; all by default."""
    output: Annotated[Path, arg(metavar="DIR")] = Path("runs/long")
    """Folder for checkpoints, metrics and the result."""
    iterations: int = 2000
    """Meta-iterations, each one truncation of every pair of trainings."""
    stop_after: int | None = None
    """Write the result after so many meta-iterations; --resume with a larger number goes on."""
    num_pairs: int = RECIPE.num_pairs
    """Pairs of trainings per task."""
    devices: int = 1
    """Devices over which the pairs of a task are spread; must divide their number."""
    truncation: int = RECIPE.truncation
    """Steps of every training per meta-iteration."""
    horizons: Numbers = RECIPE.horizons
    """Length of the shortest and of the longest training."""
    sigma: float = RECIPE.sigma
    """Standard deviation of the noise on the meta-parameters."""
    meta_learning_rate: float = RECIPE.meta_learning_rate
    """Peak learning rate of the meta-optimizer; it falls along a cosine."""
    average_decay: float = RECIPE.average_decay
    """Decay per meta-iteration of the running mean that is validated and kept."""
    seed: int = 0
    """Decides everything that is random."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    checkpoint_every: int = 50
    """Meta-iterations between checkpoints."""
    validate_every: int = 250
    """Meta-iterations between validations on larger networks."""
    validation_steps: Numbers = (10, 30, 100, 300, 1000)
    """Steps after which a validation records the loss."""
    start: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Meta-parameters to go on from."""
    optimizer_options: Any
    # As in MetaTrain.

    def __post_init__(self):
        _require(len(self.horizons) == 2, "horizons", "two numbers, like 20,3000", _joined(self.horizons))
        _require_ascending(self.validation_steps)
        _require_positive(self, "meta_learning_rate", "sigma")
        _require_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class List:
    """List the tasks, the optimizers, and the meta-parameters that come with the package."""


COMMANDS = {"train": Train, "meta-train": MetaTrain, "meta-train-long": MetaTrainLong, "list": List}


def parse(arguments: Sequence[str]) -> Train | MetaTrain | MetaTrainLong | List:
    """Returns the command in what follows ``mlhf-optax``.

    Raises:
      SystemExit: if help was asked for (status 0), or for arguments that are wrong (2).
      ValueError: for a learned optimizer that does not exist.

    Example:
      >>> parse(["train", "--hidden", "16,16"]).hidden
      (16, 16)
      >>> parse(["meta-train", "--optimizer", "adam_rates", "--learning-rate", "0.1"]).optimizer_options
      AdamRatesOptions(learning_rate=0.1, ...)
    """
    settings: dict[str, Any] = {
        "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        "registry": _registry(_family(arguments)),
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
    name = _DEFAULT_GENERAL if is_long else _DEFAULT_OPTIMIZER
    for argument, following in pairwise([*arguments, name]):
        flag, equals, value = argument.partition("=")
        if flag == "--optimizer":
            name = value if equals else following
    return get_learned(name)


def _registry(family: LearnedFamily) -> tyro.constructors.ConstructorRegistry:
    """Returns how our dataclasses become options."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type not in (*COMMANDS.values(), family.options):
            return None
        hints = get_type_hints(info.type, include_extras=True)
        hints["optimizer_options"] = Annotated[OmitArgPrefixes[family.options], arg(name=family.name)]
        fields = [
            _option(field, hints[field.name], _help(info.type)) for field in dataclasses.fields(info.type)
        ]
        return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))

    return registry


def _option(field: dataclasses.Field, hint: Any, texts: dict[str, str]) -> StructFieldSpec:
    """Returns the option of a field, which says nothing of a default that is no value."""
    if field.default is None or field.default is False or field.default == ():
        hint = Annotated[hint, arg(help_behavior_hint="")]
    default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
    return StructFieldSpec(name=field.name, type=hint, default=default, helptext=texts.get(field.name))


def _help(cls: type) -> dict[str, str]:
    """Returns the docstrings of fields, each on one line: tyro would keep their line breaks."""
    texts = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        params = docstring_parser.parse_from_object(base).params
        texts |= {one.arg_name: " ".join((one.description or "").split()) for one in params}
    return texts


def _require_ascending(steps: tuple[int, ...]) -> None:
    is_ascending = steps[0] >= 1 and steps == tuple(sorted(set(steps)))
    _require(is_ascending, "validation_steps", "ascending numbers, like 10,30,100", _joined(steps))


def _require_positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        _require(value is None or 0 < value < math.inf, name, "a positive number", value)


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 2**32, "seed", "from 0 to 2**32 - 1", seed)


def _require(is_met: bool, name: str, wanted: str, value: Any) -> None:
    if not is_met:
        raise ValueError(f"`{name}` must be {wanted}, got {value}")
