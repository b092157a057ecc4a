"""MLHF for any network on the shelf of learned optimizers: one small LSTM for every tensor."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from mlhf_optax.controllers.tensor_network import TensorLSTM, init_tensor_lstm
from mlhf_optax.curvature_batch import check_curvature_batch
from mlhf_optax.full_batch import full_batch
from mlhf_optax.learned.family import LearnedFamily, number_problem
from mlhf_optax.mlhf import mlhf

if TYPE_CHECKING:
    from mlhf_optax.meta_training.interface import LearnedOptimizer

_MAX_UNITS = 4096
_MAX_GROWTH = 1.0  # in meta-training, and so in the record


@dataclasses.dataclass(frozen=True)
class MLHFGeneralOptions:
    """How it is meta-trained.

    Raises:
      ValueError: for a value out of range.
    """

    units: int = 8
    """Units of the LSTM."""
    num_cg_steps: int = 2
    """CG steps per step."""
    curvature_batch_size: int | float | None = 0.25
    """Examples of the batch for curvature, or a share of it; None for all of it. Tasks may have their own."""

    def __post_init__(self):
        if not 1 <= self.units <= _MAX_UNITS:
            raise ValueError(f"`units` must lie between 1 and {_MAX_UNITS}, got {self.units}")
        check_curvature_batch(self.curvature_batch_size)


def _learned(options: MLHFGeneralOptions, start: Any = None) -> "LearnedOptimizer":
    # Here, since whoever only uses the optimizer needs no meta-training.
    from mlhf_optax.meta_training.interface import META_LOSSES, unrolled_optimizer

    def init(key, task) -> TensorLSTM:
        del task
        return init_tensor_lstm(key, options.units) if start is None else start.meta_params

    def build(meta_params, task):
        own = getattr(task, "curvature_batch_size", None)
        return mlhf(
            meta_params,
            task.predict_fn,
            task.loss_fn,
            num_cg_steps=options.num_cg_steps,
            max_growth=_MAX_GROWTH,
            curvature_batch_size=options.curvature_batch_size if own is None else own,
            per_example=getattr(task, "per_example", None),
        )

    # For those who want back-propagation; over long horizons only `build` is used.
    return unrolled_optimizer(build, META_LOSSES["log"], init=init)


def _resolve(options: MLHFGeneralOptions, start: Any) -> MLHFGeneralOptions:
    units = options.units if start is None else start.meta_params.bias.shape[0] // 4
    return dataclasses.replace(options, units=units)


def _record(options: MLHFGeneralOptions) -> dict[str, Any]:
    return {
        "learning_rate": 1.0,
        "num_cg_steps": options.num_cg_steps,
        "max_growth": _MAX_GROWTH,
        "curvature_batch_size": options.curvature_batch_size,
    }


def _check_record(record: Mapping[str, Any]) -> str | None:
    for name, kind in (("learning_rate", float), ("num_cg_steps", int), ("max_growth", float)):
        if problem := number_problem(name, record.get(name, 1), kind):
            return problem
    try:
        check_curvature_batch(record.get("curvature_batch_size"))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _structure(meta_params: TensorLSTM) -> dict[str, Any]:
    if not isinstance(meta_params, TensorLSTM):
        raise TypeError(f"`meta_params` must be a TensorLSTM, got {type(meta_params).__name__}")
    return {"units": meta_params.bias.shape[0] // 4}


def _template(structure: Mapping[str, Any]) -> TensorLSTM:
    units = structure["units"]
    if not isinstance(units, int) or not 1 <= units <= _MAX_UNITS:
        raise ValueError(f"'units' must lie between 1 and {_MAX_UNITS}, got {units!r}")
    return jax.eval_shape(lambda: init_tensor_lstm(jax.random.key(0), units))


MLHF_GENERAL = LearnedFamily(
    name="mlhf_general",
    label="MLHF general",
    description="one small LSTM for every tensor of any network chooses damping, metric and rate",
    options=MLHFGeneralOptions,
    learned=_learned,
    optimizer=mlhf,
    arguments=("learning_rate", "num_cg_steps", "max_growth", "curvature_batch_size"),
    record=_record,
    structure=_structure,
    resolve=_resolve,
    template=_template,
    check_record=_check_record,
    fits_any=True,
    full_batch=full_batch,
)
