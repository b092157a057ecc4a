"""The record by which a learned optimizer joins everything around it: command line, files, comparisons."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import optax

from mlhf_optax.meta_training.interface import LearnedOptimizer


def _no_structure(meta_params: Any) -> dict[str, Any]:
    """The structure of meta-parameters whose shapes are always the same."""
    del meta_params
    return {}


def _unchanged(options: Any, start: Any) -> Any:
    """Options of a learned optimizer whose start decides nothing."""
    del start
    return options


def _no_problem(record: Mapping[str, Any]) -> str | None:
    """Finds nothing wrong with a record."""
    del record
    return None


def number_problem(name: str, value: Any, kind: type = float) -> str | None:
    """Returns what is wrong with a number that a record recommends and that must be positive."""
    if isinstance(value, bool) or not isinstance(value, kind | int) or not 0 < value < math.inf:
        return f"{name!r} must be a positive number, got {value!r}"
    return None


@dataclasses.dataclass(frozen=True)
class LearnedFamily:
    """A learned optimizer under its name. No module but its own names it; all others read this record.

    Attributes:
      name: what the command line, files and results call it.
      label: what tables and figures call it.
      description: one line for people.
      options: frozen dataclass with a default for every field: how it is meta-trained.
      learned: ``learned(options, start=None) ->`` :class:`mlhf_optax.meta_training.LearnedOptimizer`;
        ``start`` is a :class:`mlhf_optax.Pretrained` to go on from.
      optimizer: ``optimizer(meta_params, predict_fn, loss_fn, **arguments)``, the optax transformation as
        it is used; all arguments have defaults.
      arguments: names of those that a record may recommend.
      fits_any: meta-parameters fit networks of any kind, whatever they were meta-trained on.
      record: ``record(options)``, what the record of a meta-training with these options recommends; JSON.
      structure: ``structure(meta_params)``, the JSON that ``template`` needs.
      template: ``template(structure)``, a tree of shapes (anything with ``shape`` and ``dtype``) with the
        structure of the meta-parameters; ValueError, TypeError or KeyError for one that makes no sense.
      resolve: ``resolve(options, start)``, the options with what the start (or its absence) decides filled
        in, as a record has to name them; ValueError for options that contradict the start.
      check_record: ``check_record(record)``, what is wrong with its recommendations, None for nothing.
    """

    name: str
    label: str
    description: str
    options: type
    learned: Callable[..., LearnedOptimizer]
    optimizer: Callable[..., optax.GradientTransformationExtraArgs]
    arguments: tuple[str, ...]
    record: Callable[[Any], dict[str, Any]]
    template: Callable[[Mapping[str, Any]], Any]
    structure: Callable[[Any], dict[str, Any]] = _no_structure
    resolve: Callable[[Any, Any], Any] = _unchanged
    check_record: Callable[[Mapping[str, Any]], str | None] = _no_problem
    fits_any: bool = False
