"""What the two LSTMs look at, how they run on every coordinate, and what their outputs stand for."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax import coordinate_lstm
from mlhf_optax.meta_params import Settings


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


def control_unit(settings: Settings, gradient: chex.ArrayTree, parameter_size: jax.Array) -> jax.Array:
    """Returns the unit in which s and P are given, ``rms(g)^gradient_power / rms(w0)^parameter_power``.

    Args:
      settings: powers and floors.
      gradient: g.
      parameter_size: rms(w0), of the parameters at the start of the training.

    Returns:
      A positive scalar; 1 where both powers are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> float(control_unit(Settings(parameter_power=1.0), jnp.array([0.5, -0.5]), jnp.array(0.25)))
      2.0
    """
    unit = jnp.ones(())
    if settings.gradient_power:
        size = jnp.maximum(root_mean_square(gradient), settings.gradient_floor)
        unit = size**settings.gradient_power
    if settings.parameter_power:
        size = jnp.maximum(parameter_size, settings.parameter_floor)
        unit = unit / size**settings.parameter_power
    return unit


def damping_values(settings: Settings, outputs: chex.ArrayTree, unit: jax.Array) -> chex.ArrayTree:
    """Returns s, the damping that the outputs of LSTM_s stand for, given :func:`control_unit`."""
    values = output_to_value(settings, outputs, settings.initial_damping)
    return jax.tree.map(lambda s: unit * s + settings.damping_floor, values)


def preconditioner_values(
    settings: Settings, outputs: chex.ArrayTree, unit: jax.Array, damping: chex.ArrayTree
) -> chex.ArrayTree:
    """Returns P, the preconditioner that the outputs of LSTM_p stand for, given :func:`control_unit`."""
    values = output_to_value(settings, outputs, settings.initial_preconditioner)
    values = jax.tree.map(lambda p: unit * p, values)
    return jax.tree.map(jnp.add, damping, values) if settings.preconditioner_form == "jacobi" else values


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
    return jnp.stack([_log_magnitude(root_mean_square(tree), settings.log_range) for tree in inputs])


def _log_magnitude(magnitude: jax.Array, log_range: float) -> jax.Array:
    """-1 at and below exp(-log_range), 0 at 1, at most 1 (Andrychowicz et al. 2016, appendix A)."""
    return jnp.clip(jnp.log(jnp.maximum(magnitude, math.exp(-log_range))) / log_range, -1.0, 1.0)


def root_mean_square(tree: chex.ArrayTree) -> jax.Array:
    """Returns the root mean square of all numbers in a tree, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> float(root_mean_square({"kernel": jnp.array([3.0, 5.0]), "bias": jnp.array([-4.0, 0.0])}))
      3.535533905029297
    """
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(jnp.square(_at_least_f32(leaf))) for leaf in leaves)
    # A tree without leaves is what optax.tree.map_params initialises an optimizer with.
    return jnp.sqrt(total / max(1, sum(leaf.size for leaf in leaves)))


def _at_least_f32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


__all__ = [
    "Inputs",
    "control_unit",
    "damping_values",
    "output_to_value",
    "preconditioner_values",
    "root_mean_square",
    "run_network",
]
