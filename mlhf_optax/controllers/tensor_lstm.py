"""A learned controller for any network: one small LSTM for every tensor, its weights shared by all.

The system of a step is ``(G + S) d = m``, where m is a running mean of gradients and
``S = damping * unit * M``. M is the metric of the tensor, between Adam's diagonal and Kronecker factors, and
the unit ``rms(g) / rms(w0)`` of the tensor has the dimension of curvature. The network sees statistics
without scale (:mod:`mlhf_optax.controllers.tensor_features`) and chooses by how much the controls of the step
differ from those of the best constant (:mod:`mlhf_optax.controllers.tensor_network`). Before meta-training
its output weights are zero, and it *is* that constant, but for the first steps, in which damping grows to it
from a share.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlhf_optax.controllers.kronecker_factors import Factors, KroneckerRule
from mlhf_optax.controllers.metrics import metric_operators
from mlhf_optax.controllers.protocol import (
    Control,
    Controller,
    Observed,
    Operators,
    Outcome,
    PerTensor,
    View,
    accept,
)
from mlhf_optax.controllers.tensor_features import (
    Products,
    averaged_losses,
    features,
    products,
    with_scaled_gradient,
)
from mlhf_optax.controllers.tensor_network import (
    CONSTANTS,
    Constants,
    Controls,
    TensorLSTM,
    bounded_controls,
    run_network,
)
from mlhf_optax.controllers.units import initial_sizes, jump_scale, tensor_units
from mlhf_optax.support import placement, trees
from mlhf_optax.support.packing import AnyPacking, Vector

_TINY = 1e-30


class TensorLSTMState(NamedTuple):
    """State of :func:`tensor_lstm` for n tensors, all of at least float32.

    Attributes:
      count: steps so far.
      mean: running mean of gradients, shaped like the parameters.
      mean_weight: sum of the weights in it, a scalar.
      square: running mean of squared gradients, shaped like the parameters.
      square_weight: sum of the weights in it.
      mean_squares: mean of ``square`` over every tensor, shape (n,).
      factors: the Kronecker factors of all matrices.
      initial_rms: shape (n,), root mean square of the parameters at the start, and not below that of all.
      largest: largest root mean square of gradients so far, a running mean.
      damping: shape (n,), of the last step.
      losses: shape (4,): log of the loss, its running means over 10 and 100 steps, and its first value.
      residual: shape (n,), norm of the residual over that of the right-hand side in the last solve.
      damped_share: shape (n,), share of damping in the curvature along the last direction.
      rate: the last one, times that of the schedule.
      power: shape (n,), the last exponents.
      hidden: shape (n, units), of the LSTM.
      cell: likewise.
    """

    count: jax.Array  # shape=(), dtype=int32
    mean: chex.ArrayTree
    mean_weight: jax.Array
    square: chex.ArrayTree
    square_weight: jax.Array
    mean_squares: jax.Array
    factors: Factors
    initial_rms: jax.Array
    largest: jax.Array
    damping: jax.Array
    losses: jax.Array
    residual: jax.Array
    damped_share: jax.Array
    rate: jax.Array
    power: jax.Array
    hidden: jax.Array
    cell: jax.Array


class _Signal(NamedTuple):
    """What operators are made of.

    Attributes:
      controls: what the network chose.
      mean: running mean of gradients with this one, a vector.
      square: that of their squares, a vector.
      state: with this step's gradient.
    """

    controls: Controls
    mean: Vector
    square: Vector
    state: TensorLSTMState


def tensor_lstm(
    meta_params: TensorLSTM,
    constants: Constants = CONSTANTS,
    *,
    schedule: optax.Schedule | None = None,
) -> Controller:
    """Returns the learned controller for any network.

    Args:
      meta_params: what was learned.
      constants: what the outputs are bounded around. Meta-parameters belong to the constants that they were
        trained with.
      schedule: factor by which the direction is multiplied after a step, by the number of steps; None for 1.
        The learned rate falls late in a training; times a factor that falls, too, it would fall twice. So
        the product is the smaller of the learned rate and ``max_rate`` times the factor.

    Returns:
      The controller. Its state is two floats per parameter, and for a matrix side of n rows about
      ``3 * n * min(n, 128)`` more.

    Example:
      >>> from mlhf_optax.controllers.tensor_network import init_tensor_lstm
      >>> controller = tensor_lstm(init_tensor_lstm(jax.random.key(0)))
      >>> controller.init({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}).hidden.shape
      (2, 8)
    """
    units = meta_params.bias.shape[0] // 4
    return Controller(
        init=functools.partial(_init, units, constants),
        control=functools.partial(_control, meta_params, constants, schedule),
        operators=_operators,
        observe=_observe,
        packing=_kronecker_rule(constants).packing,
    )


def _kronecker_rule(constants: Constants) -> KroneckerRule:
    return KroneckerRule(constants.factor_decay, constants.floor, constants.block, constants.refresh_every)


def _init(units: int, constants: Constants, params: chex.ArrayTree) -> TensorLSTMState:
    zeros = lambda: jax.tree.map(lambda p: placement.zeros_like(p, trees.wide_dtype(p)), params)
    scalar = lambda value=0.0: jnp.full((), value, jnp.float32)
    tensors = len(jax.tree.leaves(params))
    each = lambda value: jnp.full(tensors, value, jnp.float32)
    return TensorLSTMState(
        count=jnp.zeros((), jnp.int32),
        mean=zeros(),
        mean_weight=scalar(),
        square=zeros(),
        square_weight=scalar(),
        mean_squares=each(0.0),
        factors=_kronecker_rule(constants).init(params),
        initial_rms=initial_sizes(params),
        largest=scalar(),
        damping=each(1.0),
        losses=jnp.zeros(4, jnp.float32),
        residual=each(1.0),
        damped_share=each(1.0),
        rate=scalar(constants.rate),
        power=each(constants.power),
        hidden=jnp.zeros((tensors, units), jnp.float32),
        cell=jnp.zeros((tensors, units), jnp.float32),
    )


def _control(
    meta_params: TensorLSTM,
    constants: Constants,
    schedule: optax.Schedule | None,
    view: View,
    state: TensorLSTMState,
) -> Control:
    packing: AnyPacking = view.packing
    # What is seen of this step.
    old_mean = packing.pack(state.mean)
    inner = products(packing, view.params, view.gradient, view.direction, old_mean)
    scale = jump_scale(_rms(packing, inner.g_g), _running_size(packing, state))
    inner = with_scaled_gradient(inner, scale)
    gradient = trees.scaled(trees.once(scale), view.gradient)
    state = _with_this_step(constants, packing, inner, view.loss, state)

    # What the network chooses.
    seen = features(packing, inner, state, view.initial_rms, constants.update_ratio)
    outputs, hidden, cell = run_network(meta_params, seen, state.hidden, state.cell)
    controls = bounded_controls(outputs, constants)
    # Far from any optimum curvature is a better guide than later, among noise: damping starts at a share.
    time = state.count.astype(jnp.float32) / constants.start_steps
    controls = controls._replace(damping=controls.damping * (constants.start_share + time) / (1 + time))
    factor = 1.0 if schedule is None else jnp.asarray(schedule(state.count), jnp.float32)
    if schedule is not None:
        room = jnp.minimum(controls.rate / jnp.maximum(factor, _TINY), constants.max_rate)
        controls = controls._replace(rate=room)

    # What becomes of it: damping in its unit, means and factors.
    damping = _units(constants, packing, inner, state) * controls.damping
    squares = jax.tree.map(jnp.square, gradient)
    square = trees.running_mean(packing.pack(state.square), squares, 1 - constants.square_decay)
    mean, mean_weight = trees.running_mean(
        (old_mean, state.mean_weight), (gradient, 1.0), trees.once(1 / controls.memory)
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    rule = _kronecker_rule(constants)
    is_due = rule.is_refresh_due(count)
    state = state._replace(
        count=count,
        mean=packing.unpack(mean, is_wide=True),
        mean_weight=mean_weight,
        square=packing.unpack(square, is_wide=True),
        # With the exponents of the step before, else the factors would have to wait for the network.
        factors=rule.update(state.factors, packing, gradient, is_due, state.power, view.axis_name),
        damping=damping,
        rate=factor * controls.rate,
        power=controls.power,
        hidden=hidden,
        cell=cell,
    )

    # Means and factors are finite where the squares of the gradient and all that is small are.
    witness = (state._replace(mean=(), square=(), factors=()), inner.g_g)
    return Control(_Signal(controls, mean, square, state), state, finite_witness=witness)


def _with_this_step(
    constants: Constants, packing: AnyPacking, inner: Products, loss: jax.Array, state: TensorLSTMState
) -> TensorLSTMState:
    """Takes the sizes of the gradient and the loss into the statistics."""
    of_tensors = inner.g_g / jnp.maximum(jnp.asarray(packing.sizes), 1.0)
    mean_squares, square_weight = trees.running_mean(
        (state.mean_squares, state.square_weight), (of_tensors, 1.0), 1 - constants.square_decay
    )
    state = state._replace(
        losses=averaged_losses(state.losses, state.count, loss),
        mean_squares=mean_squares,
        square_weight=square_weight,
    )
    return state._replace(largest=jnp.maximum(state.largest, _running_size(packing, state)))


def _units(constants: Constants, packing: AnyPacking, inner: Products, state: TensorLSTMState) -> jax.Array:
    """Returns the unit of damping of every tensor, shape (tensors,)."""
    running = _running_size(packing, state)
    # A training that is nearly done has steps with a tiny gradient; with damping as small they jump away.
    size = jnp.maximum(_rms(packing, inner.g_g), running)
    # Where every example is solved even the running mean falls without end, and curvature with it. Damping
    # falls more slowly, so that such a training comes to rest.
    size = size * (jnp.maximum(state.largest, size) / jnp.maximum(size, _TINY)) ** constants.largest_share
    of_tensors = jnp.sqrt(state.mean_squares / state.square_weight)
    return tensor_units(size, of_tensors, running, state.initial_rms)


def _rms(packing: AnyPacking, sums: jax.Array) -> jax.Array:
    """Returns the root mean square of all, from sums of squares over every tensor."""
    return trees.safe_sqrt(jnp.sum(sums) / max(1.0, float(packing.sizes.sum())))


def _running_size(packing: AnyPacking, state: TensorLSTMState) -> jax.Array:
    """Returns the running root mean square of gradients, zero before the first step."""
    sums = jnp.asarray(packing.sizes) * state.mean_squares
    return _rms(packing, sums / jnp.maximum(state.square_weight, _TINY))


def _root_of_diagonal(signal: _Signal, packing: AnyPacking) -> Vector:
    """Returns the root of Adam's part of the metric, h, which has mean 1 over every tensor.

    For matrices h is ``v^(share / 2)``; for vectors, of which it is the whole metric, ``v^(1/2)``.
    """
    state = signal.state
    exponents = 0.25 * jnp.where(jnp.asarray(packing.is_matrix), signal.controls.diagonal, 1.0)
    # On CPUs a power takes three times as long as a logarithm and an exponential.
    root = jax.tree.map(
        lambda v, size, exponent: jnp.exp(exponent * jnp.log(v / size + 1e-6)),
        signal.square,
        *packing.spread(trees.once(state.mean_squares + _TINY), trees.once(exponents)),
    )
    counted = jax.tree.map(lambda x, own: own * jnp.square(x), root, packing.filling)
    means = packing.sums(counted)[0].astype(jnp.float32) / jnp.maximum(jnp.asarray(packing.sizes), 1.0)
    (scale,) = packing.spread(trees.once(lax.rsqrt(jnp.where(means > 0, means, 1.0))))
    return jax.tree.map(jnp.multiply, root, scale)


def _operators(view: View, signal: _Signal) -> Operators:
    """Returns S, of every tensor its damping times ``M = h^(1/2) (L^p (h^(1/2) .) R^p)``, and P."""
    packing: AnyPacking = view.packing
    controls, state = signal.controls, signal.state
    factors, root = state.factors, _root_of_diagonal(signal, packing)
    scales, trust = packing.spread(trees.once(state.damping), trees.once(controls.trust))

    def times(v: Vector, inverse: bool = False) -> Vector:
        half = functools.partial(jax.tree.map, jnp.divide if inverse else jnp.multiply)
        middle = packing.sandwich(factors.inverse if inverse else factors.power, half(v, root))
        return half(middle, root)

    shown = lambda numbers: PerTensor(numbers, jnp.asarray(packing.sizes))
    made = metric_operators(times, scales, shown(state.damping), trust, shown(controls.trust / state.damping))
    return made._replace(
        right_hand_side=trees.scaled(trees.once(1 / state.mean_weight), signal.mean),
        step_scale=controls.rate,
        longest=controls.warm_start_share,
    )


def _observe(view: View, outcome: Outcome, state: TensorLSTMState) -> Observed:
    """Keeps how well the system was solved, and how much of the curvature was damping, for the network."""
    d, r, b = outcome.direction, outcome.residual, outcome.right_hand_side
    times = lambda x, y: jax.tree.map(jnp.multiply, x, y)
    # <d, b - r> is <d, (G + S) d>.
    pairs = ((d, jax.tree.map(jnp.subtract, b, r)), (d, outcome.damped), (r, r), (b, b))
    found = view.packing.sums(*(times(x, y) for x, y in pairs))
    curvature, damped, r_r, b_b = found.astype(jnp.float32)
    share = jnp.clip(damped / jnp.where(curvature > 0, curvature, 1e30), 0.0, 1.0)
    residual = jnp.sqrt(r_r / (b_b + _TINY))
    keep = lambda new, old: jnp.where(outcome.is_sound, new, old)
    state = state._replace(
        residual=keep(residual, state.residual), damped_share=keep(share, state.damped_share)
    )
    return accept(view, outcome, state)
