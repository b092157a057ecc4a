"""The meta-parameters: two LSTMs a layer type, and what their inputs and outputs mean.

From the gradient g, the previous direction d0 and the previous residual r0, LSTM_s gives every
coordinate a damping s and LSTM_p a preconditioner P (paper, Algorithm 1). The settings that give
the numbers their meaning travel with the arrays, so that neither can be used with the wrong other.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import chex
import jax

from mlhf_optax import coordinate_lstm
from mlhf_optax.layer_types import PAPER_LAYER_TYPES

InputFeatures = Literal["tanh", "log", "log-global"]
OutputMap = Literal["softplus", "exp"]
ControlForm = Literal["divide", "multiply", "jacobi"]
PreconditionerResidual = Literal["previous", "current"]

_FEATURE_COUNT = {"tanh": 3, "log": 6, "log-global": 9}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the LSTMs see and what their outputs mean.

    The defaults are what measurement chose on handwritten digits: with tanh inputs, softplus and an
    absolute scale (:data:`PAPER_SETTINGS`) the LSTMs cannot tell late training from early, keep the
    damping that was right early, and late losses stay orders of magnitude higher.

    Args:
      input_features: ``"tanh"`` of d0, r0 and g (paper); ``"log"``, two features a quantity, the
        clipped log magnitude and the clipped scaled value, which still tell 1e-3 from 1e-6 late in
        training; ``"log-global"``, also the log of each quantity's root mean square over all
        parameters.
      output_map: ``"softplus"`` (paper) or ``"exp"``, which reaches several decades.
      output_scale: factor on the LSTM's output before the map.
      initial_damping: s of a freshly initialised LSTM_s, > 0.
      initial_preconditioner: the same for LSTM_p; what it means depends on ``preconditioner_form``.
      damping_floor: constant added to s (paper: 0, the authors' code: 2e-5).
      preconditioner_form: ``"divide"`` solves ``P y = r`` with P from LSTM_p (paper), ``"multiply"``
        takes ``y = P r`` (the authors' code), ``"jacobi"`` divides by ``s + P``: LSTM_p then
        estimates the diagonal of the GGN alone, as the damping is known.
      preconditioner_residual: LSTM_p sees the residual of the ``"previous"`` step (paper) or the
        starting residual ``g - A d0`` of the ``"current"`` one (the authors' code).
      log_range: the log features resolve magnitudes from ``exp(-log_range)`` to 1.
      gradient_power: s and P are multiplied by the root mean square of the gradient over all
        parameters to this power (paper: 0). Near a minimum of a cross-entropy the GGN shrinks with the
        loss, and a damping that shrinks with the gradient, as in regularised Newton methods (Fan
        and Yuan 2005), keeps its size relative to it; the LSTMs then only have to learn the ratio.
      parameter_power: s and P are divided by the root mean square that the parameters had when the
        optimizer was initialised, to this power (paper: 0). With both powers 1 they have the dimension
        of curvature, loss over parameter squared, and ``1 / s`` bounds the length of the step relative to
        that of the parameters: the LSTMs' outputs then mean the same on wide networks, whose parameters
        are smaller, as on narrow ones. The size stays that of the start: parameters grow while they
        are trained, and a damping that sinks as they do lets the noise of mini-batches in.
      parameter_floor: root mean square below which the parameters count as this large there.
      gradient_floor: root mean square below which the gradient counts as this large there. Without
        it the steps of a training whose gradient is rounding noise stay long, and it jumps away.

    Raises:
      ValueError: for an unknown name or a value out of range.

    Example:
      >>> Settings(input_features="tanh").num_inputs
      3
    """

    input_features: InputFeatures = "log-global"
    output_map: OutputMap = "exp"
    output_scale: float = 3.0
    initial_damping: float = 30.0
    initial_preconditioner: float = 30.0
    damping_floor: float = 0.0
    preconditioner_form: ControlForm = "jacobi"
    preconditioner_residual: PreconditionerResidual = "previous"
    log_range: float = 16.0
    gradient_power: float = 1.0
    gradient_floor: float = 1e-5
    parameter_power: float = 0.0
    parameter_floor: float = 1e-3

    def __post_init__(self):
        choices = {
            "input_features": InputFeatures,
            "output_map": OutputMap,
            "preconditioner_form": ControlForm,
            "preconditioner_residual": PreconditionerResidual,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {get_args(allowed)}, got {value!r}")
        positive = (
            "output_scale",
            "initial_damping",
            "initial_preconditioner",
            "log_range",
            "gradient_floor",
            "parameter_floor",
        )
        for name in positive:
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"`{name}` must be a positive number, got {value!r}")
        for name in ("damping_floor", "gradient_power", "parameter_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a number >= 0, got {getattr(self, name)!r}")

    @property
    def num_inputs(self) -> int:
        """Number of input features of each LSTM."""
        return _FEATURE_COUNT[self.input_features]


PAPER_SETTINGS = Settings(
    preconditioner_form="divide",
    gradient_power=0.0,
    input_features="tanh",
    output_map="softplus",
    output_scale=1.0,
    initial_damping=math.log(2.0),  # softplus(0)
    initial_preconditioner=math.log(2.0),
)
"""The method as the paper states it."""

AUTHORS_SETTINGS = dataclasses.replace(
    PAPER_SETTINGS, damping_floor=2e-5, preconditioner_form="multiply", preconditioner_residual="current"
)
"""The method as the authors' code has it."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["damping", "preconditioner"],
    meta_fields=["settings"],
)
@dataclasses.dataclass(frozen=True)
class MetaParams:
    """Weights of both LSTMs by layer type; a pytree whose settings are static.

    Attributes:
      damping: LSTM_s by layer type.
      preconditioner: LSTM_p by layer type.
      settings: what inputs and outputs mean.
    """

    damping: dict[str, coordinate_lstm.LSTMWeights]
    preconditioner: dict[str, coordinate_lstm.LSTMWeights]
    settings: Settings = Settings()

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The layer types that have weights."""
        return tuple(sorted(self.damping))

    @property
    def units(self) -> tuple[int, ...]:
        """Width of every LSTM layer."""
        first = next(iter(self.damping.values()))
        return tuple(layer.bias.shape[-1] // 4 for layer in first.layers)


def init_meta_params(
    key: chex.PRNGKey,
    settings: Settings = Settings(),
    *,
    layer_types: Sequence[str] = PAPER_LAYER_TYPES,
    units: Sequence[int] = (4, 4),
) -> MetaParams:
    """Returns untrained meta-parameters, ready for meta-training.

    Args:
      key: random key.
      settings: what inputs and outputs mean; :data:`PAPER_SETTINGS` for the faithful ones.
      layer_types: names of the layer types that get LSTMs of their own.
      units: width of every LSTM layer.

    Returns:
      The meta-parameters, float32.

    Raises:
      ValueError: if ``layer_types`` is empty or repeats a name, or a size is below one.

    Example:
      >>> import jax
      >>> meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel", "dense_bias"])
      >>> sum(x.size for x in jax.tree.leaves(meta_params))
      1492
    """
    names = list(layer_types)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`layer_types` must be distinct names, at least one, got {names}")

    def network(network_key: chex.PRNGKey) -> dict[str, coordinate_lstm.LSTMWeights]:
        keys = jax.random.split(network_key, len(names))
        return {
            name: coordinate_lstm.init_weights(k, settings.num_inputs, units)
            for name, k in zip(names, keys, strict=True)
        }

    damping_key, preconditioner_key = jax.random.split(key)
    return MetaParams(network(damping_key), network(preconditioner_key), settings)


def extend_meta_params(key: chex.PRNGKey, meta_params: MetaParams, layer_types: Sequence[str]) -> MetaParams:
    """Returns meta-parameters that also know other layer types, with untrained LSTMs for these.

    With them meta-training can go on from what it learned on other networks.

    Args:
      key: random key.
      meta_params: the meta-parameters; what they know stays as it is.
      layer_types: names of the layer types that are needed.

    Returns:
      The meta-parameters.

    Raises:
      ValueError: if ``layer_types`` repeats a name.

    Example:
      >>> import jax
      >>> from mlhf_optax import load_pretrained
      >>> digits = load_pretrained("digits").meta_params
      >>> extend_meta_params(jax.random.key(0), digits, ["dense_kernel", "norm_scale"]).layer_types
      ('dense_bias', 'dense_kernel', 'norm_scale')
    """
    missing = [name for name in layer_types if name not in meta_params.damping]
    if not missing:
        return meta_params
    fresh = init_meta_params(key, meta_params.settings, layer_types=missing, units=meta_params.units)
    return MetaParams(
        meta_params.damping | fresh.damping,
        meta_params.preconditioner | fresh.preconditioner,
        meta_params.settings,
    )


__all__ = [
    "AUTHORS_SETTINGS",
    "PAPER_SETTINGS",
    "MetaParams",
    "Settings",
    "extend_meta_params",
    "init_meta_params",
]
