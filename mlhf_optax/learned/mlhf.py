"""MLHF on the shelf of learned optimizers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax

from mlhf_optax.controllers.coordinate_lstm import MetaParams, extend_meta_params, init_meta_params
from mlhf_optax.controllers.lstm_settings import AUTHORS_SETTINGS, PAPER_SETTINGS, Settings, Unit
from mlhf_optax.curvature_batch import check_curvature_batch
from mlhf_optax.learned.family import LearnedFamily, number_problem
from mlhf_optax.mlhf import mlhf
from mlhf_optax.support.layer_types import distinct_layer_types

if TYPE_CHECKING:
    from mlhf_optax.meta_training.interface import LearnedOptimizer

SettingsName = Literal["default", "relative", "paper", "authors"]

SETTINGS: dict[str, Settings] = {
    "default": Settings(),
    # Keeps its meaning across widths; starts where convolutional networks neither jump nor crawl.
    "relative": Settings(unit=Unit(parameter_power=1.0), initial_damping=10.0, initial_preconditioner=10.0),
    "paper": PAPER_SETTINGS,
    "authors": AUTHORS_SETTINGS,
}
"""What the LSTMs see and what their outputs mean, by name."""

_FAITHFUL: dict[str, dict[str, Any]] = {
    "paper": {
        "max_update_ratio": None,
        "update_noise": 0.0,
        "step_loss": "difference",
        "damping_loss_scale": 1.0,
    },
    "authors": {"step_loss": "difference"},
}
"""Arguments of meta-training that belong to settings."""


@dataclasses.dataclass(frozen=True)
class MLHFOptions:
    """How MLHF is meta-trained.

    Raises:
      ValueError: for a value out of range.

    Example:
      >>> MLHFOptions(settings="paper").max_update_ratio is None
      True
    """

    settings: SettingsName | None = None
    """What the LSTMs see and mean: ours ("default"), ours with damping relative to the size of the
    parameters, which carries over to wider networks ("relative"), the paper's, or its authors' code's.
    Those of the start where there is one."""
    initial_damping: float | None = None
    """Damping of untrained LSTMs, in units of the gradient's root mean square (30 by default), with
    "relative" also over that of the parameters (10). It has to train the task before any meta-training:
    raise it where the inner loss stays at chance."""
    initial_preconditioner: float | None = None
    """The same for the preconditioner."""
    learning_rate: float = 1.0
    """Learning rate of the networks in training, kept in the record. Values below 1 limit the harm of noisy
    curvature better than damping does."""
    num_cg_steps: int = 4
    """CG steps per step."""
    same_batch_weight: float = 1.0
    """Weight in l_s of the gain on the step's own mini-batch; 0 counts the gain on the next one alone,
    which is right where mini-batches are far from telling the whole loss."""
    curvature_batch_size: int | float | None = None
    """Examples of the batch for curvature, or a share of it, like 0.25; all of it by default."""

    def __post_init__(self):
        if self.settings is not None and self.settings not in SETTINGS:
            known = ", ".join(map(repr, SETTINGS))
            raise ValueError(f"`settings` must be one of {known}, got {self.settings!r}")
        for name in ("learning_rate", "initial_damping", "initial_preconditioner"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a positive number, got {value}")
        if not 0 <= self.same_batch_weight < math.inf:
            raise ValueError(f"`same_batch_weight` must be a number >= 0, got {self.same_batch_weight}")
        check_curvature_batch(self.curvature_batch_size)

    @property
    def max_update_ratio(self) -> float | None:
        """Bound on the update, in meta-training and in the record."""
        from mlhf_optax.meta_training.unrolled.mlhf_unroll import UnrollOptions

        return _FAITHFUL.get(self.settings or "default", {}).get(
            "max_update_ratio", UnrollOptions.max_update_ratio
        )


def _learned(options: MLHFOptions, start: Any = None) -> "LearnedOptimizer":
    """Returns MLHF for meta-training.

    Raises:
      ValueError: for settings that contradict those of ``start``, or a start whose record names unknown ones.
    """
    # Here, since whoever only uses the optimizer needs no meta-training.
    from mlhf_optax.meta_training.unrolled.mlhf_gradient import mlhf_optimizer

    name, settings = _settings(options, start)
    learned = mlhf_optimizer(
        options.learning_rate,
        num_cg_steps=options.num_cg_steps,
        curvature_batch_size=options.curvature_batch_size,
        same_batch_weight=options.same_batch_weight,
        **_FAITHFUL.get(name, {}),
    )

    def init(key, task) -> MetaParams:
        types = distinct_layer_types(jax.eval_shape(task.init_fn, jax.random.key(0)))
        if start is None:
            return init_meta_params(key, settings, layer_types=types)
        return extend_meta_params(key, start.meta_params, types)

    return learned._replace(init=init)


def _settings(options: MLHFOptions, start: Any) -> tuple[str, Settings]:
    """Returns the settings of a meta-training and their name."""
    asked = {"initial_damping": options.initial_damping}
    asked |= {"initial_preconditioner": options.initial_preconditioner}
    initial = {name: value for name, value in asked.items() if value is not None}
    if start is None:
        name = options.settings or "default"
        return name, dataclasses.replace(SETTINGS[name], **initial)
    made = start.record.get("meta_training")
    own = made.get("settings", "default") if isinstance(made, Mapping) else "default"
    if own not in SETTINGS:
        known = ", ".join(map(repr, SETTINGS))
        raise ValueError(f"the record of `start` names settings {own!r}; it should be one of {known}")
    contradicting = [*initial, *([] if options.settings in (None, own) else ["settings"])]
    if contradicting:
        raise ValueError(
            f"`start` brings settings of its own, {own!r}; leave out {', '.join(contradicting)}, or start "
            "untrained"
        )
    return own, start.meta_params.settings


def _resolve(options: MLHFOptions, start: Any) -> MLHFOptions:
    return dataclasses.replace(options, settings=_settings(options, start)[0])


def _record(options: MLHFOptions) -> dict[str, Any]:
    return {
        "learning_rate": options.learning_rate,
        "num_cg_steps": options.num_cg_steps,
        "max_update_ratio": options.max_update_ratio,
        "curvature_batch_size": options.curvature_batch_size,
    }


def _check_record(record: Mapping[str, Any]) -> str | None:
    for key in ("learning_rate", "num_cg_steps", "max_update_ratio"):
        if key not in record:
            return f"it lacks {key!r}, which a user of the meta-parameters has to know"
        value = record[key]
        if value is None and key == "max_update_ratio":
            continue
        if problem := number_problem(key, value):
            return problem
    if not isinstance(record["num_cg_steps"], int):
        return f"'num_cg_steps' must be an int, got {record['num_cg_steps']!r}"
    momentum = record.get("momentum") or 0.0
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        return f"'momentum' must be a number in [0, 1), got {momentum!r}"
    try:
        check_curvature_batch(record.get("curvature_batch_size"))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _structure(meta_params: MetaParams) -> dict[str, Any]:
    if not isinstance(meta_params, MetaParams):
        raise TypeError(f"`meta_params` must be a MetaParams, got {type(meta_params).__name__}")
    return {
        "settings": meta_params.settings.to_json(),
        "layer_types": list(meta_params.layer_types),
        "units": list(meta_params.units),
    }


def _template(structure: Mapping[str, Any]) -> MetaParams:
    settings = Settings.from_json(structure["settings"])
    names, units = structure["layer_types"], structure["units"]
    # All layer types have networks of the same shapes, so it is enough to trace those of one.
    one: MetaParams = jax.eval_shape(
        lambda: init_meta_params(jax.random.key(0), settings, layer_types=names[:1], units=units)
    )
    damping, preconditioner = one.damping[names[0]], one.preconditioner[names[0]]
    return MetaParams(dict.fromkeys(names, damping), dict.fromkeys(names, preconditioner), settings)


MLHF = LearnedFamily(
    name="mlhf",
    label="MLHF",
    description="two LSTMs on every coordinate choose damping and preconditioner of a Gauss-Newton step",
    options=MLHFOptions,
    learned=_learned,
    optimizer=mlhf,
    arguments=("learning_rate", "num_cg_steps", "max_update_ratio", "curvature_batch_size", "momentum"),
    record=_record,
    structure=_structure,
    resolve=_resolve,
    template=_template,
    check_record=_check_record,
)
