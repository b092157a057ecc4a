"""Checks of arguments: an error names the argument, what is wanted and what came."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Range(NamedTuple):
    """Numbers that an argument may be.

    Attributes:
      wanted: the words of the error.
      holds: whether a number is one of them.
    """

    wanted: str
    holds: Callable[[Any], bool]


POSITIVE = Range("a positive number", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("a number >= 0", lambda x: 0 <= x < math.inf)
FROM_ONE = Range("at least 1", lambda x: 1 <= x < math.inf)
SHARE = Range("in [0, 1]", lambda x: 0 <= x <= 1)
DECAY = Range("in [0, 1)", lambda x: 0 <= x < 1)
INSIDE_0_1 = Range("strictly between 0 and 1", lambda x: 0 < x < 1)
POSITIVE_SHARE = Range("in (0, 1]", lambda x: 0 < x <= 1)
SEED = Range("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)


def require(is_met: Any, name: str, wanted: str, got: Any, remedy: str = "") -> None:
    """Raises ValueError unless the condition is met.

    Args:
      is_met: the condition.
      name: of the argument.
      wanted: the words after "must be".
      got: the value of the argument.
      remedy: what to do about it, where that does not follow from what is wanted.

    Example:
      >>> require(False, "steps", "ascending numbers", (3, 2))
      Traceback (most recent call last):
      ValueError: `steps` must be ascending numbers, got (3, 2)
    """
    if not is_met:
        raise ValueError(f"`{name}` must be {wanted}, got {got!r}" + (f"; {remedy}" if remedy else ""))


def check_number(name: str, value: Any, allowed: Range, *, or_none: bool = False) -> None:
    """Raises ValueError for a Python number out of range.

    Args:
      name: of the argument.
      value: its value. An array passes, as its value may not be known while tracing.
      allowed: the range.
      or_none: None passes, too, and the error says so.

    Example:
      >>> check_number("decay", 1.5, DECAY, or_none=True)
      Traceback (most recent call last):
      ValueError: `decay` must be in [0, 1), or None, got 1.5
    """
    if value is None and or_none:
        return
    wanted = f"{allowed.wanted}, or None" if or_none else allowed.wanted
    if value is None or isinstance(value, bool | str):
        require(False, name, wanted, value)
    if isinstance(value, int | float):
        require(allowed.holds(value), name, wanted, value)


def check_each(name: str, values: Iterable[Any], allowed: Range) -> None:
    """Raises ValueError unless every one of several numbers is in range.

    Example:
      >>> check_each("hidden", (16, 0), FROM_ONE)
      Traceback (most recent call last):
      ValueError: `hidden` must be at least 1 throughout, got (16, 0)
    """
    require(all(map(allowed.holds, values)), name, f"{allowed.wanted} throughout", values)


def check_fields(options: Any, allowed: Range, *names: str, or_none: bool = False) -> None:
    """Checks some fields of a dataclass with :func:`check_number`."""
    for name in names:
        check_number(name, getattr(options, name), allowed, or_none=or_none)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError unless the value is one of the choices, which the error lists.

    Example:
      >>> check_choice("metric", "full", ("identity", "diagonal"))
      Traceback (most recent call last):
      ValueError: `metric` must be one of 'identity', 'diagonal', got 'full'
    """
    require(value in choices, name, f"one of {', '.join(map(repr, choices))}", value)


def require_function(name: str, value: Any) -> None:
    """Raises TypeError for what cannot be called; of an array, that ``optax.inject_hyperparams`` made it.

    Example:
      >>> require_function("loss_fn", "mse")
      Traceback (most recent call last):
      TypeError: `loss_fn` must be a function, got str
    """
    if callable(value):
        return
    remedy = ""
    if hasattr(value, "dtype"):
        remedy = (
            "; `optax.inject_hyperparams` takes functions for schedules and calls them, so name all that are "
            'no numbers: `static_args=("predict_fn", "loss_fn", "num_cg_steps", ...)`'
        )
    raise TypeError(f"`{name}` must be a function, got {type(value).__name__}{remedy}")


def check_known(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for a name that is no argument, with the argument that is probably meant.

    Args:
      function: its name, for the error.
      given: names of the arguments that came.
      known: names of the arguments there are.

    Example:
      >>> check_known("mlhf", ["lr"], ["momentum", "learning_rate"])
      Traceback (most recent call last):
      TypeError: `mlhf` has no argument `lr`; did you mean `learning_rate`? It has momentum, learning_rate
    """
    known = list(known)
    for name in given:
        if name in known:
            continue
        short = [one for one in known if "".join(word[0] for word in one.split("_")) == name]
        near = [*short, *difflib.get_close_matches(name, known)]
        guess = f"; did you mean `{near[0]}`? It has" if near else "; it has"
        raise TypeError(f"`{function}` has no argument `{name}`{guess} {', '.join(known)}")


def suggests_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function so that a wrong keyword gets the error of :func:`check_known`.

    Example:
      >>> suggests_arguments(lambda weight_decay=0.0: weight_decay)(wd=0.1)
      Traceback (most recent call last):
      TypeError: `<lambda>` has no argument `wd`; did you mean `weight_decay`? It has weight_decay
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        check_known(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return checked
