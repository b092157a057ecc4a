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
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlhf_optax.controllers.kronecker_factors import KroneckerRule, Sides, sides_of_tensors, times_sides
from mlhf_optax.controllers.metrics import metric_operators
from mlhf_optax.controllers.protocol import Control, Controller, Observed, Operators, Outcome, View, accept
from mlhf_optax.controllers.tensor_features import averaged_losses, features, inner, mean_squares
from mlhf_optax.controllers.tensor_network import (
    CONSTANTS,
    Constants,
    Controls,
    TensorLSTM,
    bounded_controls,
    run_network,
)
from mlhf_optax.controllers.units import initial_sizes, tensor_units, without_jump
from mlhf_optax.support import loops, placement, trees

_TINY = 1e-30


class TensorLSTMState(NamedTuple):
    """State of :func:`tensor_lstm` for n tensors, all of at least float32.

    Attributes:
      count: steps so far.
      mean: running mean of gradients, shaped like the parameters.
      mean_weight: sum of the weights in it, a scalar.
      square: running mean of squared gradients, shaped like the parameters.
      square_weight: sum of the weights in it.
      factors: the Kronecker factors of all matrices, left and right sides, each field of which is a tree like
        the parameters; None for other tensors.
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
    factors: Any
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
      state: with this step's gradient.
      grown: shape (n,), damping over that of the step before.
      is_fresh: whether powers of factors were taken in this step, shape ().
    """

    controls: Controls
    state: TensorLSTMState
    grown: jax.Array
    is_fresh: jax.Array


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
        keeps_damped=True,
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
    # What is seen of this step.
    view, state = _with_this_step(constants, view, state)

    # What the network chooses.
    seen = features(view, state, constants.update_ratio)
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
    damping = _units(constants, view, state) * controls.damping
    grown = damping / state.damping
    mean, mean_weight = trees.running_mean(
        (state.mean, state.mean_weight), (view.gradient, 1.0), 1 / controls.memory
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    rule = _kronecker_rule(constants)
    is_due = rule.is_refresh_due(count)
    state = state._replace(
        count=count,
        mean=mean,
        mean_weight=mean_weight,
        # With the exponents of the step before, else the factors would have to wait for the network.
        factors=rule.update(state.factors, view.gradient, is_due, state.power, view.axis_name),
        damping=damping,
        rate=factor * controls.rate,
        power=controls.power,
        hidden=hidden,
        cell=cell,
    )

    # Means and factors are finite where the squares of the gradient and all that is small are.
    small = state._replace(mean=(), square=(), factors=())
    witness = (small, inner(view.gradient, view.gradient))
    return Control(_Signal(controls, state, grown, is_due), state, finite_witness=witness)


def _with_this_step(constants: Constants, view: View, state: TensorLSTMState) -> tuple[View, TensorLSTMState]:
    """Bounds the gradient by those before it, and takes it and the loss into the statistics."""
    gradient = without_jump(view.gradient, _running_size(state))
    squares = jax.tree.map(lambda g: jnp.square(trees.at_least_f32(g)), gradient)
    square, square_weight = trees.running_mean(
        (state.square, state.square_weight), (squares, 1.0), 1 - constants.square_decay
    )
    state = state._replace(
        losses=averaged_losses(state.losses, state.count, view.loss),
        square=square,
        square_weight=square_weight,
    )
    state = state._replace(largest=jnp.maximum(state.largest, _running_size(state)))
    return view._replace(gradient=gradient), state


def _units(constants: Constants, view: View, state: TensorLSTMState) -> jax.Array:
    """Returns the unit of damping of every tensor, shape (tensors,)."""
    running = _running_size(state)
    # A training that is nearly done has steps with a tiny gradient; with damping as small they jump away.
    size = jnp.maximum(trees.root_mean_square(view.gradient), running)
    # Where every example is solved even the running mean falls without end, and curvature with it. Damping
    # falls more slowly, so that such a training comes to rest.
    size = size * (jnp.maximum(state.largest, size) / jnp.maximum(size, _TINY)) ** constants.largest_share
    of_tensors = jnp.sqrt(mean_squares(state.square) / state.square_weight)
    return tensor_units(size, of_tensors, running, state.initial_rms)


def _running_size(state: TensorLSTMState) -> jax.Array:
    """Returns the running root mean square of gradients, zero before the first step."""
    squares = state.square
    mean = trees.total([jnp.sum(leaf) for leaf in jax.tree.leaves(squares)]) / trees.size(squares)
    return jnp.sqrt(mean / jnp.maximum(state.square_weight, _TINY))


class _Metric(NamedTuple):
    """The metric of one tensor: ``M = h^(1/2) (L^p (h^(1/2) .) R^p)`` for matrices, h for vectors.

    Attributes:
      root: ``h^(1/2)``, of the tensor's shape.
      sides: powers of the Kronecker factors; None for vectors.
    """

    root: jax.Array
    sides: Sides | None

    def times(self, x: jax.Array, inverse: bool = False) -> jax.Array:
        """Returns M x, or the product with its inverse."""
        half = 1 / self.root if inverse else self.root
        middle = half * x if self.sides is None else times_sides(self.sides, half * x, inverse)
        return (half * middle).astype(x.dtype)


def _metric(square: jax.Array, sides: Sides | None, share: jax.Array) -> _Metric:
    """Returns the metric of a tensor, with Adam's part h of mean 1.

    For matrices h is ``v^(share / 2)``; for vectors, of which it is the whole metric, ``v^(1/2)``.
    """
    exponent = 0.25 * (1.0 if sides is None else share)
    # On CPUs a power takes three times as long as a logarithm and an exponential.
    root = jnp.exp(exponent * jnp.log(square / (jnp.mean(square) + _TINY) + 1e-6))
    return _Metric(root * lax.rsqrt(jnp.mean(jnp.square(root))), sides)


def _operators(view: View, signal: _Signal) -> Operators:
    controls, state = signal.controls, signal.state
    treedef = jax.tree.structure(view.gradient)
    per_tensor = lambda numbers: treedef.unflatten(list(numbers))
    sides = sides_of_tensors(state.factors, view.gradient)
    entries = zip(jax.tree.leaves(state.square), sides, controls.diagonal, strict=True)
    metric = [_metric(*entry) for entry in entries]

    def times(vector, inverse=False):
        pairs = zip(metric, jax.tree.leaves(vector), strict=True)
        return treedef.unflatten([own.times(x, inverse) for own, x in pairs])

    made = metric_operators(times, per_tensor(state.damping), trust=per_tensor(controls.trust))
    return made._replace(
        right_hand_side=jax.tree.map(
            lambda m, g: (m / state.mean_weight).astype(g.dtype), state.mean, view.gradient
        ),
        start=jax.tree.map(lambda d: (controls.warm_start_share * d).astype(d.dtype), view.direction),
        step_scale=controls.rate,
        damped_start=treedef.unflatten(_damped_start(view, signal, metric)),
    )


def _damped_start(view: View, signal: _Signal, metric: list[_Metric]) -> list[jax.Array]:
    """Returns S times the start of CG for every tensor.

    Between refreshes the metric of a matrix moves by Adam's part alone, which is little. So its S d of the
    step before is used again, scaled: one of four products with large factors saved.
    """
    controls, state, before = signal.controls, signal.state, jax.tree.leaves(view.damped)
    matrices = [i for i, own in enumerate(metric) if own.sides is not None]
    direction = jax.tree.leaves(view.direction)
    product = lambda i: metric[i].times(direction[i])
    of_matrices = loops.cond(
        signal.is_fresh, lambda: [product(i) for i in matrices], lambda: [before[i] for i in matrices]
    )
    known = dict(zip(matrices, of_matrices, strict=True))
    # What is kept has the damping of the step before in it already.
    scales = jnp.where(signal.is_fresh, state.damping, signal.grown)
    scaled = lambda scale, x: (controls.warm_start_share * scale * x).astype(x.dtype)
    return [
        scaled(scales[i], known[i]) if i in known else scaled(state.damping[i], product(i))
        for i in range(len(direction))
    ]


def _observe(view: View, outcome: Outcome, state: TensorLSTMState) -> Observed:
    """Keeps how well the system was solved, and how much of the curvature was damping, for the network."""
    d, r, b = outcome.direction, outcome.residual, outcome.right_hand_side
    curvature = inner(d, b) - inner(d, r)  # <d, (G + S) d>
    share = jnp.clip(inner(d, outcome.damped) / jnp.where(curvature > 0, curvature, 1e30), 0.0, 1.0)
    residual = jnp.sqrt(inner(r, r) / (inner(b, b) + _TINY))
    keep = lambda new, old: jnp.where(outcome.is_sound, new, old)
    state = state._replace(
        residual=keep(residual, state.residual), damped_share=keep(share, state.damped_share)
    )
    return accept(view, outcome, state)
