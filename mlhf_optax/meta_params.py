"""The meta-parameters: two LSTMs a layer type, and what their inputs and outputs mean.

From the gradient g, the previous direction d0 and the previous residual r0, LSTM_s gives every
coordinate a damping s and LSTM_p a preconditioner P (paper, Algorithm 1). The settings that give
the numbers their meaning travel with the arrays, so that neither can be used with the wrong other.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

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
        )
        for name in positive:
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"`{name}` must be a positive number, got {value!r}")
        for name in ("damping_floor", "gradient_power"):
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


class Inputs(NamedTuple):
    """What the LSTMs look at, trees shaped like the parameters.

    Attributes:
      direction: d0, the previous direction.
      residual: r0, the previous residual, or the current starting residual for LSTM_p.
      gradient: g.
    """

    direction: chex.ArrayTree
    residual: chex.ArrayTree
    gradient: chex.ArrayTree


def run_network(
    network: dict[str, coordinate_lstm.LSTMWeights],
    settings: Settings,
    types: chex.ArrayTree,
    carry: tuple[coordinate_lstm.LayerCarry, ...],
    inputs: Inputs,
) -> tuple[chex.ArrayTree, tuple[coordinate_lstm.LayerCarry, ...]]:
    """Runs one LSTM on every coordinate of every parameter.

    Args:
      network: weights by layer type.
      settings: which features are made of the inputs.
      types: tree of layer type names, shaped like the parameters.
      carry: carries of trees, one a layer.
      inputs: d0, r0 and g.

    Returns:
      The outputs before the output map, at least float32 and shaped like the parameters, and the carry.

    Example:
      See :func:`mlhf_optax.scale_by_mlhf`, which calls it twice a step.
    """
    features, shared = _features(settings, inputs), _shared_features(settings, inputs)
    names, treedef = jax.tree.flatten(types)
    columns = [treedef.flatten_up_to(tree) for layer in carry for tree in layer]
    outputs, carries = [], []
    for index, (name, feature) in enumerate(zip(names, treedef.flatten_up_to(features), strict=True)):
        leaf_carry = tuple(
            coordinate_lstm.LayerCarry(columns[2 * n][index], columns[2 * n + 1][index])
            for n in range(len(carry))
        )
        output, leaf_carry = coordinate_lstm.apply(network[name], leaf_carry, feature, shared)
        outputs.append(output)
        carries.append(leaf_carry)
    next_carry = tuple(
        coordinate_lstm.LayerCarry(*(treedef.unflatten(column) for column in zip(*layer, strict=True)))
        for layer in zip(*carries, strict=True)
    )
    return treedef.unflatten(outputs), next_carry


def damping_values(settings: Settings, outputs: chex.ArrayTree, gradient: chex.ArrayTree) -> chex.ArrayTree:
    """Returns s, the damping that the outputs of LSTM_s stand for."""
    values = _output_to_value(settings, outputs, gradient, settings.initial_damping)
    return jax.tree.map(lambda s: s + settings.damping_floor, values)


def preconditioner_values(
    settings: Settings, outputs: chex.ArrayTree, gradient: chex.ArrayTree, damping: chex.ArrayTree
) -> chex.ArrayTree:
    """Returns P, the preconditioner that the outputs of LSTM_p stand for."""
    values = _output_to_value(settings, outputs, gradient, settings.initial_preconditioner)
    if settings.preconditioner_form == "jacobi":
        return jax.tree.map(jnp.add, damping, values)
    return values


def _output_to_value(
    settings: Settings, outputs: chex.ArrayTree, gradient: chex.ArrayTree, initial: float
) -> chex.ArrayTree:
    """Maps LSTM outputs to positive values in units of the gradient's magnitude."""
    values = output_to_value(settings, outputs, initial)
    if not settings.gradient_power:
        return values
    unit = jnp.maximum(_root_mean_square(gradient), settings.gradient_floor) ** settings.gradient_power
    return jax.tree.map(lambda x: unit * x, values)


def output_to_value(settings: Settings, outputs: chex.ArrayTree, initial: float) -> chex.ArrayTree:
    """Maps LSTM outputs to positive values that are ``initial`` where the output is zero."""
    if settings.output_map == "exp":
        # exp(+-30) keeps every later product of such values inside float32.
        bound = lambda x: jnp.clip(x, -30.0, 30.0)
        return jax.tree.map(lambda x: jnp.exp(bound(settings.output_scale * x + math.log(initial))), outputs)
    offset = initial + math.log(-math.expm1(-initial))  # softplus^-1
    return jax.tree.map(lambda x: jax.nn.softplus(settings.output_scale * x + offset), outputs)


def _features(settings: Settings, inputs: Inputs) -> chex.ArrayTree:
    """Stacks each parameter's own features to shape (F, *shape), in at least float32."""
    if settings.input_features == "tanh":
        return jax.tree.map(lambda *q: jnp.stack([jnp.tanh(_at_least_f32(x)) for x in q]), *inputs)

    def stack(*quantities):
        features = []
        for quantity in quantities:
            x = _at_least_f32(quantity)
            features += [_log_magnitude(jnp.abs(x), settings.log_range)]
            features += [jnp.clip(x * math.exp(settings.log_range), -1.0, 1.0)]
        return jnp.stack(features)

    return jax.tree.map(stack, *inputs)


def _shared_features(settings: Settings, inputs: Inputs) -> jax.Array | None:
    """Returns the features that are the same for all coordinates, shape (G,), if there are any."""
    if settings.input_features != "log-global":
        return None
    return jnp.stack([_log_magnitude(_root_mean_square(tree), settings.log_range) for tree in inputs])


def _log_magnitude(magnitude: jax.Array, log_range: float) -> jax.Array:
    """-1 at and below exp(-log_range), 0 at 1, at most 1 (Andrychowicz et al. 2016, appendix A)."""
    return jnp.clip(jnp.log(jnp.maximum(magnitude, math.exp(-log_range))) / log_range, -1.0, 1.0)


def _root_mean_square(tree: chex.ArrayTree) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(jnp.square(_at_least_f32(leaf))) for leaf in leaves)
    return jnp.sqrt(total / sum(leaf.size for leaf in leaves))


def _at_least_f32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


__all__ = [
    "AUTHORS_SETTINGS",
    "PAPER_SETTINGS",
    "Inputs",
    "MetaParams",
    "Settings",
    "damping_values",
    "init_meta_params",
    "output_to_value",
    "preconditioner_values",
    "run_network",
]
