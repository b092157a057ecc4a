"""The controller of the paper: two LSTMs on every coordinate choose damping and preconditioner.

Both look at the gradient g, the previous direction d0 and the previous residual r0 of a coordinate. LSTM_s
gives it a damping s, LSTM_p a preconditioner P (paper, Algorithm 1). All parameters of a layer type share
weights. The settings, which give the numbers their meaning, travel with the weights, so that neither is used
with the wrong counterpart.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.controllers import lstm
from mlhf_optax.controllers.lstm_settings import Inputs, Settings
from mlhf_optax.controllers.protocol import Control, Controller, Operators, Scale, View
from mlhf_optax.support.checks import require
from mlhf_optax.support.layer_types import PAPER_LAYER_TYPES, LayerTypesFn, layer_types

Carry = tuple[lstm.LayerCarry, ...]
DEFAULT_SETTINGS = Settings()


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

    damping: dict[str, lstm.LSTMWeights]
    preconditioner: dict[str, lstm.LSTMWeights]
    settings: Settings = DEFAULT_SETTINGS

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
    settings: Settings = DEFAULT_SETTINGS,
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
    is_distinct = names and len(set(names)) == len(names)
    require(is_distinct, "layer_types", "distinct names, at least one", names)

    def network(network_key: chex.PRNGKey) -> dict[str, lstm.LSTMWeights]:
        keys = jax.random.split(network_key, len(names))
        return {
            name: lstm.init_weights(k, settings.features.count, units)
            for name, k in zip(names, keys, strict=True)
        }

    damping_key, preconditioner_key = jax.random.split(key)
    return MetaParams(network(damping_key), network(preconditioner_key), settings)


def extend_meta_params(key: chex.PRNGKey, meta_params: MetaParams, layer_types: Sequence[str]) -> MetaParams:
    """Returns meta-parameters with untrained LSTMs for further layer types.

    So meta-training can go on from what was learned on other networks.

    Args:
      key: random key.
      meta_params: the meta-parameters; what they know stays as it is.
      layer_types: names of the layer types needed, known ones among them or not.

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


class Outputs(NamedTuple):
    """Outputs of both LSTMs before they are mapped to positive values, trees shaped like the parameters.

    Attributes:
      damping: output of LSTM_s.
      preconditioner: output of LSTM_p.
    """

    damping: chex.ArrayTree
    preconditioner: chex.ArrayTree


class Carries(NamedTuple):
    """State of both LSTMs, leaves ``(H, *param.shape)``.

    Attributes:
      damping_carry: of LSTM_s.
      preconditioner_carry: of LSTM_p.
    """

    damping_carry: Carry
    preconditioner_carry: Carry


def coordinate_lstm(
    meta_params: MetaParams, *, layer_types_fn: LayerTypesFn | None = None, carry_dtype: Any = "float32"
) -> Controller:
    """Returns the controller of the paper.

    Args:
      meta_params: the LSTMs and their settings.
      layer_types_fn: maps the parameters to a tree of layer type names;
        :func:`mlhf_optax.layer_types` if None.
      carry_dtype: dtype in which the LSTM states are stored.

    Returns:
      The controller. Its signal is the :class:`Outputs` of both LSTMs; ``seen`` is what each has seen.

    Raises:
      TypeError: if ``meta_params`` is not a :class:`MetaParams`.
      ValueError: from its functions, for parameters of a layer type without an LSTM.

    Example:
      >>> import jax
      >>> controller = coordinate_lstm(init_meta_params(jax.random.key(0)))
      >>> controller.init({"kernel": jnp.ones((3, 2))}).damping_carry[0].cell["kernel"].shape
      (4, 3, 2)
    """
    if not isinstance(meta_params, MetaParams):
        raise TypeError(
            f"`meta_params` must be a MetaParams, got {type(meta_params).__name__}; get one from "
            "`load_pretrained(name).meta_params` or `init_meta_params(key)`"
        )
    settings, types_of = meta_params.settings, layer_types_fn or layer_types

    def init(params: chex.ArrayTree) -> Carries:
        _check_types(meta_params, types_of(params))
        carry = lambda: lstm.init_carry(params, meta_params.units, carry_dtype)
        return Carries(carry(), carry())

    def control(view: View, state: Carries) -> Control:
        types = types_of(view.params)
        _check_types(meta_params, types)
        inputs = Inputs(view.direction, view.residual, view.gradient)
        s_out, s_carry = run_network(meta_params.damping, settings, types, state.damping_carry, inputs)
        p_inputs = _with_current_residual(settings, view, s_out) if settings.sees_current_residual else inputs
        p_out, p_carry = run_network(
            meta_params.preconditioner, settings, types, state.preconditioner_carry, p_inputs
        )
        return Control(Outputs(s_out, p_out), Carries(s_carry, p_carry), (inputs, p_inputs))

    def operators(view: View, signal: Outputs) -> Operators:
        unit = settings.unit(view.gradient, view.initial_rms)
        damping = _damping(settings, signal.damping, unit)
        values = jax.tree.map(
            lambda p: unit * settings.output(p, settings.initial_preconditioner), signal.preconditioner
        )
        return Operators(damping, settings.preconditioner(values, damping.values))

    return Controller(init, control, operators, keeps_residual=True)


def run_network(
    network: dict[str, lstm.LSTMWeights],
    settings: Settings,
    types: chex.ArrayTree,
    carry: Carry,
    inputs: Inputs,
) -> tuple[chex.ArrayTree, Carry]:
    """Runs one LSTM on every coordinate of every parameter.

    Args:
      network: weights by layer type.
      settings: which features are made of the inputs.
      types: tree of layer type names, shaped like the parameters.
      carry: carries of trees, one per layer.
      inputs: d0, r0 and g.

    Returns:
      The outputs, at least float32 and shaped like the parameters, and the next carry.
    """
    # Features shared by all coordinates stay apart: stacked to the others they would be as large as these.
    features, shared = settings.features.own(inputs), settings.features.shared(inputs)

    def one(name: str, feature: jax.Array, *columns: jax.Array):
        own_carry = tuple(map(lstm.LayerCarry, columns[::2], columns[1::2]))
        return lstm.apply(network[name], own_carry, feature, shared)

    results = jax.tree.map(one, types, features, *(tree for layer in carry for tree in layer))
    of_one = jax.tree.structure((0, tuple(lstm.LayerCarry(0, 0) for _ in carry)))
    return jax.tree.transpose(jax.tree.structure(types), of_one, results)


def _damping(settings: Settings, outputs: chex.ArrayTree, unit: jax.Array) -> Scale:
    value = lambda s: unit * settings.output(s, settings.initial_damping) + settings.damping_floor
    return Scale(jax.tree.map(value, outputs))


def _with_current_residual(settings: Settings, view: View, s_out: chex.ArrayTree) -> Inputs:
    """Returns what LSTM_p sees in the authors' code: the residual from which this step's CG starts."""
    damping = _damping(settings, s_out, settings.unit(view.gradient, view.initial_rms))
    a_d0 = jax.tree.map(jnp.add, view.ggn(view.direction), damping(view.direction))
    start = jax.tree.map(jnp.subtract, view.gradient, a_d0)
    # This residual depends on s, but what an LSTM sees carries no meta-gradient (section 3.1).
    return Inputs(view.direction, jax.lax.stop_gradient(start), view.gradient)


def _check_types(meta_params: MetaParams, types: chex.ArrayTree) -> None:
    missing = sorted(set(jax.tree.leaves(types)) - set(meta_params.damping))
    if missing:
        raise ValueError(
            f"the model has parameters of layer types {missing}, but these meta-parameters were trained for "
            f"{list(meta_params.layer_types)}; use meta-parameters that know them, or map the parameters to "
            "a known type with `layer_types_fn=functools.partial(layer_types, "
            "rules={r'regex of the path': type})`"
        )
