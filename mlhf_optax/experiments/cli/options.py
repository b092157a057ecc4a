"""How dataclasses become the options of ``mlhf-optax``, with the defaults and docstrings of their fields."""

import dataclasses
import re
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from mlhf_optax.learned import LEARNED, LearnedFamily
from mlhf_optax.tasks import ACTIVATIONS, TASKS

DEFAULT_TASK = next(iter(TASKS))
DEFAULT_OPTIMIZER = next(iter(LEARNED))
DEFAULT_GENERAL = next(name for name, family in LEARNED.items() if family.fits_any)

# Decided by other options: the learning rate falls over all meta-iterations.
_NO_OPTIONS = ("decay_iterations",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is trained."""

    task: Annotated[Positional[str], arg(metavar="[TASK]")] = DEFAULT_TASK
    """What to train; `mlhf-optax list` shows the tasks."""
    batch_size: int | None = None
    """Examples per mini-batch; by default the task's own number."""
    data_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where the data of image tasks lie; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    channels: tuple[int, ...] | None = None
    """Channels of convolutions: two numbers for cifar10-convnet, like 8,16, and one for ResNets."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden dense layers of digits-mlp and cifar10-convnet, like 16 or 32,32."""
    activation: Annotated[str | None, arg(metavar="|".join(ACTIVATIONS))] = None
    """Activation of digits-mlp."""

    def task_options(self, batch_size: str = "batch_size") -> dict[str, Any]:
        """Returns the arguments of the function that makes the task; ``batch_size`` is the name of one."""
        channels = self.channels[0] if self.channels and len(self.channels) == 1 else self.channels
        values = {batch_size: self.batch_size, "data_dir": self.data_dir, "channels": channels}
        values |= {"hidden": self.hidden, "activation": self.activation}
        return {name: value for name, value in values.items() if value is not None}


def registry(family: LearnedFamily) -> ConstructorRegistry:
    """Returns our rules for tyro; ``optimizer_options`` of a command are those of the learned optimizer."""
    rules = ConstructorRegistry()
    rules.primitive_rule(_separated_by_commas)

    @rules.struct_rule
    def fields_as_options(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (dataclasses.is_dataclass(info.type) and info.type.__module__.startswith("mlhf_optax")):
            return None
        hints: dict[str, Any] = get_type_hints(info.type, include_extras=True)
        texts = _help(info.type)
        hints["optimizer_options"] = Annotated[OmitArgPrefixes[family.options], arg(name=family.name)]
        fields = []
        for field in dataclasses.fields(info.type):
            if field.name in _NO_OPTIONS:
                continue
            hint: Any = hints[field.name]
            default = field.default
            if dataclasses.is_dataclass(info.default):
                default = getattr(info.default, field.name)
            # A default that is no value is best not shown.
            if default is None or default is False or default == ():
                hint = Annotated[hint, arg(help_behavior_hint="")]
            default = tyro.MISSING if default is dataclasses.MISSING else default
            fields.append(StructFieldSpec(field.name, hint, default, texts.get(field.name)))
        return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))

    return rules


def _separated_by_commas(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Parses tuples, optional ones too, in the way that people type them: ``--hidden 32,32``."""
    kind: Any = info.type
    if get_origin(kind) in (Union, types.UnionType):
        kind = next((one for one in get_args(kind) if one is not type(None)), kind)
    if get_origin(kind) is not tuple:
        return None
    element, *rest = get_args(kind)
    is_of_numbers = element is int

    def parse(texts: list[str]) -> tuple[Any, ...]:
        parts = [part.strip() for part in texts[0].split(",")]
        count = None if rest == [...] else 1 + len(rest)
        return _numbers(parts, count) if is_of_numbers else tuple(dict.fromkeys(parts))

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,N" if is_of_numbers else "NAMES",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [joined(values or ())],
    )


def _numbers(parts: list[str], count: int | None) -> tuple[int, ...]:
    """Returns whole numbers, so many of them unless ``count`` is None."""
    wanted, like = ("whole", "32 or 32,32") if count is None else (f"{count} whole", "20,3000")
    if not all(part.isdecimal() for part in parts) or count not in (None, len(parts)):
        raise ValueError(f"must be {wanted} numbers separated by commas, like {like}, got {joined(parts)!r}")
    return tuple(map(int, parts))


def joined(values: Any) -> str:
    """Returns values as they are typed, separated by commas."""
    return ",".join(map(str, values))


def _help(cls: type) -> dict[str, str]:
    """Returns what the docstring says of each field, as a terminal shows it: one line, without mark-up."""
    texts = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        for one in docstring_parser.parse_from_object(base).params:
            text = " ".join((one.description or "").split())
            text = re.sub(r"[;.] None [^.;]*", "", text)  # None cannot be typed
            text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "")
            texts[one.arg_name] = text[:1].upper() + text[1:]
    return texts
