"""The record by which a learned optimizer joins everything around it: command line, files, comparisons."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import optax

if TYPE_CHECKING:  # whoever only uses a learned optimizer does not load meta-training
    from mlhf_optax.meta_training.interface import LearnedOptimizer


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Options of a learned optimizer that has none."""


def _nothing(of: Any) -> dict[str, Any]:
    del of
    return {}


def _unchanged(options: Any, start: Any) -> Any:
    del start
    return options


def _no_problem(record: Mapping[str, Any]) -> str | None:
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

    A new one gives ``init`` and ``build`` to :func:`mlhf_optax.learned.backpropagation.backpropagated`,
    which fills in the rest; :mod:`mlhf_optax.learned.adam_rates` shows how.

    Attributes:
      name: what the command line, files and results call it.
      learned: ``learned(options, start=None) ->`` :class:`mlhf_optax.meta_training.LearnedOptimizer`, the
        triple ``init``, ``build``, ``meta_gradient`` that meta-training needs; ``start`` is a
        :class:`mlhf_optax.Pretrained` to go on from.
      optimizer: ``optimizer(meta_params, predict_fn, loss_fn, **arguments)``, the optax transformation as
        it is used. All arguments have defaults, and so have ``predict_fn`` and ``loss_fn`` if gradients are
        enough. Its docstring explains them under ``Args``.
      template: ``template(structure)``, a tree of shapes (anything with ``shape`` and ``dtype``) with the
        structure of the meta-parameters; ValueError, TypeError or KeyError for one that makes no sense.
      label: what tables and figures call it; its name by default.
      description: one line for people.
      options: how it is meta-trained, a frozen dataclass with a default for every field.
      record: ``record(options)``, what the record of a meta-training with these options recommends; JSON.
      arguments: names of the arguments that a record may recommend.
      check_record: ``check_record(record)``, what is wrong with its recommendations, None for nothing.
      resolve: ``resolve(options, start)``, the options with what the start (or its absence) decides filled
        in, as a record has to name them; ValueError for options that contradict the start.
      structure: ``structure(meta_params)``, the JSON that ``template`` needs; none if their shapes are
        always the same.
      fits_any: meta-parameters fit networks of any kind, whatever they were meta-trained on.
      full_batch: ``full_batch(predict_fn, loss_fn, **few)``, what takes the place of the optimizer where
        every batch is all of the data; None if there is no such thing. The optimizer then has an argument
        ``full_batch``.
    """

    name: str
    learned: "Callable[..., LearnedOptimizer]"
    optimizer: Callable[..., optax.GradientTransformationExtraArgs]
    template: Callable[[Mapping[str, Any]], Any]
    label: str = ""
    description: str = ""
    options: type = NoOptions
    record: Callable[[Any], dict[str, Any]] = _nothing
    arguments: tuple[str, ...] = ()
    check_record: Callable[[Mapping[str, Any]], str | None] = _no_problem
    resolve: Callable[[Any, Any], Any] = _unchanged
    structure: Callable[[Any], dict[str, Any]] = _nothing
    fits_any: bool = False
    full_batch: Callable[..., optax.GradientTransformationExtraArgs] | None = None

    def __post_init__(self):
        if not self.label:
            object.__setattr__(self, "label", self.name)
