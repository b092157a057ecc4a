"""A learned controller for any network: one small LSTM for every tensor, its weights shared by all.

The system of a step is ``(G + S) d = m``, where m is a running mean of gradients and
``S = damping * unit * M``. M is the metric of the tensor, between Adam's diagonal and Kronecker factors, and
the unit ``rms(g) / rms(w0)`` of the tensor has the dimension of curvature. The network sees statistics of
every tensor that have no scale: multiplying the loss, or measuring all parameters in another unit, changes
none of them. It says by how much the numbers of the step differ from those of the best constant,
:data:`CONSTANTS`. Its output weights start at zero, so before meta-training it *is* that constant, but for
the first steps, in which damping grows to it from a share.
"""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlhf_optax.controllers.kronecker_factors import (
    average_sides,
    from_trees,
    init_sides,
    is_refresh_due,
    matrix_shape,
    refresh_sides,
    times_sides,
    to_trees,
)
from mlhf_optax.controllers.protocol import (
    Control,
    Controller,
    Observed,
    Operators,
    Outcome,
    Product,
    Scale,
    View,
    accept,
)
from mlhf_optax.controllers.units import initial_sizes, size_of, tensor_shares, without_jump
from mlhf_optax.support import placement, trees


class Constants(NamedTuple):
    """What the outputs are when the output weights are zero, and what is never learned.

    Attributes:
      damping: of every tensor, in its unit ``rms(g) / rms(w0)``.
      power: exponent of the Kronecker factors.
      diagonal: share of Adam's diagonal ``v^(1/2)`` in the metric of matrices, as an exponent.
      rate: factor on the direction.
      memory: steps over which the gradient is averaged.
      warm_start_share: CG starts from so much of the previous direction.
      floor: added to the eigenvalues of a factor, in units of their mean.
      factor_decay: of the running means in the factors.
      square_decay: of the running mean of squared gradients.
      block: longest side of a factor.
      refresh_every: steps between two eigendecompositions.
      max_rate: largest factor on the direction.
      update_ratio: the network is told when an update exceeds so much of the norm of the parameters.
      largest_share: share of the largest gradient so far in the unit of damping, as an exponent.
      start_share: share of its damping with which a training starts.
      start_steps: steps after which damping is half-way to its full value.
    """

    damping: float = 10.0
    power: float = 0.7
    diagonal: float = 0.05
    rate: float = 1.0
    memory: float = 7.0
    warm_start_share: float = 0.95
    floor: float = 5e-2
    factor_decay: float = 0.95
    square_decay: float = 0.98
    block: int = 128
    refresh_every: int = 10
    max_rate: float = 1.5
    update_ratio: float = 0.25
    largest_share: float = 0.4
    start_share: float = 0.2
    start_steps: float = 10.0


CONSTANTS = Constants()

TENSOR_FEATURES, SHARED_FEATURES = 12, 10
FEATURES = TENSOR_FEATURES + SHARED_FEATURES
OUTPUTS = 7
_TINY = 1e-30
_SMALLEST = 1e-15  # gradient that damping is measured by, so that damping is never zero


class TensorLSTM(NamedTuple):
    """Meta-parameters, for any network; float32.

    Attributes:
      kernel: shape (features + units, 4 * units), of the gates i, f, g, o of the LSTM.
      bias: shape (4 * units,).
      readout: shape (units, outputs), from half of the LSTM's hidden state to the outputs.
      linear: shape (features, outputs), past the LSTM.
      offset: shape (outputs,).
    """

    kernel: jax.Array
    bias: jax.Array
    readout: jax.Array
    linear: jax.Array
    offset: jax.Array


def init_tensor_lstm(key: chex.PRNGKey, units: int = 8) -> TensorLSTM:
    """Returns a random LSTM with output weights of zero, so that it is the constant controller.

    Args:
      key: random key.
      units: units of the LSTM.

    Raises:
      ValueError: if ``units`` is below one.

    Example:
      >>> sum(leaf.size for leaf in init_tensor_lstm(jax.random.key(0)))
      1209
    """
    if units < 1:
        raise ValueError(f"`units` must be at least 1, got {units}")
    fan_in = FEATURES + units
    # Gates that remember at the start learn long time scales sooner.
    bias = jnp.zeros((4, units)).at[1].set(1.0).reshape(-1)
    return TensorLSTM(
        jax.random.normal(key, (fan_in, 4 * units)) * fan_in**-0.5,
        bias,
        jnp.zeros((units, OUTPUTS)),
        jnp.zeros((FEATURES, OUTPUTS)),
        jnp.zeros(OUTPUTS),
    )


class Controls(NamedTuple):
    """What the network says; the first four have shape (tensors,), the others are scalars.

    Attributes:
      damping: in the unit of damping.
      trust: the preconditioner is ``trust * S^-1``, so a tensor's share of a CG step grows with it.
      power: exponent of the Kronecker factors.
      diagonal: exponent share of Adam's diagonal.
      rate: factor on the direction.
      memory: steps over which the gradient is averaged.
      warm_start_share: share of the previous direction from which CG starts.
    """

    damping: jax.Array
    trust: jax.Array
    power: jax.Array
    diagonal: jax.Array
    rate: jax.Array
    memory: jax.Array
    warm_start_share: jax.Array


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
      said: what the network says.
      state: with this step's gradient.
      grown: shape (n,), damping over that of the step before.
      is_fresh: whether powers of factors were taken in this step, shape ().
    """

    said: Controls
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
        The learned rate falls late in a training, and times a factor that falls, too, it would fall twice.
        So it makes room: the product is the smaller of the learned rate and ``max_rate`` times the factor.

    Returns:
      The controller. Its state is two floats per parameter, and for a matrix side of n rows about
      ``3 * n * min(n, 128)`` more.

    Example:
      >>> controller = tensor_lstm(init_tensor_lstm(jax.random.key(0)))
      >>> controller.init({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}).hidden.shape
      (2, 8)
    """
    units = meta_params.bias.shape[0] // 4
    return Controller(
        init=functools.partial(_init, units, constants),
        control=functools.partial(_control, meta_params, constants, schedule),
        operators=functools.partial(_operators, constants),
        observe=_observe,
        keeps_damped=True,
    )


def _init(units: int, constants: Constants, params: chex.ArrayTree) -> TensorLSTMState:
    zeros = lambda: jax.tree.map(lambda p: placement.zeros_like(p, trees.wide_dtype(p)), params)
    scalar = lambda value=0.0: jnp.full((), value, jnp.float32)
    leaves, treedef = jax.tree.flatten(params)
    each = lambda value: jnp.full(len(leaves), value, jnp.float32)
    return TensorLSTMState(
        count=jnp.zeros((), jnp.int32),
        mean=zeros(),
        mean_weight=scalar(),
        square=zeros(),
        square_weight=scalar(),
        factors=to_trees(treedef, [init_sides(leaf.shape, constants.block) for leaf in leaves]),
        initial_rms=initial_sizes(params),
        largest=scalar(),
        damping=each(1.0),
        losses=jnp.zeros(4),
        residual=each(1.0),
        damped_share=each(1.0),
        rate=scalar(constants.rate),
        power=each(constants.power),
        hidden=jnp.zeros((len(leaves), units)),
        cell=jnp.zeros((len(leaves), units)),
    )


def _control(
    meta_params: TensorLSTM,
    constants: Constants,
    schedule: optax.Schedule | None,
    view: View,
    state: TensorLSTMState,
) -> Control:
    decay = constants.square_decay
    before = jnp.sqrt(_mean_square(state.square) / jnp.maximum(state.square_weight, _TINY))
    view = view._replace(gradient=without_jump(view.gradient, before))
    mix = lambda v, g: decay * v + (1 - decay) * jnp.square(trees.at_least_f32(g))
    state = state._replace(
        losses=_averaged_losses(state, view.loss),
        square=jax.tree.map(mix, state.square, view.gradient),
        square_weight=decay * state.square_weight + (1 - decay),
    )
    state = state._replace(largest=jnp.maximum(state.largest, _running_size(state)))
    outputs, hidden, cell = _network(meta_params, _features(view, state, constants), state)
    said = bounded_controls(outputs, constants)
    # Far from any optimum curvature is a better guide than later, among noise.
    time = state.count / constants.start_steps
    said = said._replace(damping=said.damping * (constants.start_share + time) / (1 + time))
    factor = 1.0 if schedule is None else jnp.asarray(schedule(state.count), jnp.float32)
    if schedule is not None:
        said = said._replace(rate=jnp.minimum(said.rate / jnp.maximum(factor, _TINY), constants.max_rate))
    share = 1 / said.memory
    count = jnp.asarray(optax.safe_increment(state.count))
    is_due = is_refresh_due(count, constants.refresh_every)
    damping = _damping_units(constants, view, state) * said.damping
    grown = damping / state.damping
    state = state._replace(
        count=count,
        mean=jax.tree.map(
            lambda m, g: (1 - share) * m + share * g.astype(m.dtype), state.mean, view.gradient
        ),
        mean_weight=(1 - share) * state.mean_weight + share,
        factors=_new_factors(view, state, is_due, constants),
        damping=damping,
        rate=factor * said.rate,
        power=said.power,
        hidden=hidden,
        cell=cell,
    )
    # Means and factors are finite where these are.
    small = state._replace(mean=(), square=(), factors=())
    return Control(
        _Signal(said, state, grown, is_due),
        state,
        finite_witness=(small, _inner(view.gradient, view.gradient)),
    )


def _new_factors(view: View, state: TensorLSTMState, is_due: jax.Array, constants: Constants) -> Any:
    """Returns the factors with this gradient, their powers taken anew if that is due."""
    decay = constants.factor_decay
    gradients, treedef = jax.tree.flatten(view.gradient)
    factors = from_trees(treedef, state.factors)
    pairs = enumerate(zip(factors, gradients, strict=True))
    averaged = {i: average_sides(sides, g, decay) for i, (sides, g) in pairs if sides is not None}
    # The exponents of the step before: those of this one would have the network wait for the factors.
    powers = [state.power[i] for i in averaged]
    fresh = refresh_sides(is_due, list(averaged.values()), powers, constants.floor, view.axis_name)
    by_tensor = dict(zip(averaged, fresh, strict=True))
    return to_trees(treedef, [by_tensor.get(i) for i in range(len(factors))])


def _operators(constants: Constants, view: View, signal: _Signal) -> Operators:
    said, state = signal.said, signal.state
    treedef = jax.tree.structure(view.gradient)
    damping = treedef.unflatten(list(state.damping))
    trust = treedef.unflatten(list(said.trust))
    factors = from_trees(treedef, state.factors)
    entries = zip(jax.tree.leaves(state.square), factors, said.diagonal, strict=True)
    metric = [(_diagonal_root(v, sides, share), sides) for v, sides, share in entries]

    def times(vector, scales, inverse=False):
        pairs = zip(jax.tree.leaves(vector), metric, strict=True)
        return Scale(scales)(treedef.unflatten([_times_metric(x, *of, inverse) for x, of in pairs]))

    inverted = jax.tree.map(lambda t, s: t / s, trust, damping)
    return Operators(
        Product(damping, lambda v: times(v, damping)),
        Product(inverted, lambda v: times(v, inverted, inverse=True)),
        right_hand_side=jax.tree.map(
            lambda m, g: (m / state.mean_weight).astype(g.dtype), state.mean, view.gradient
        ),
        start=jax.tree.map(lambda d: (said.warm_start_share * d).astype(d.dtype), view.direction),
        step_scale=said.rate,
        damping_after_preconditioner=Scale(trust),
        damped_start=treedef.unflatten(_damped_start(view, signal, metric)),
    )


def _damped_start(view: View, signal: _Signal, metric: list[tuple[jax.Array, Any]]) -> list[jax.Array]:
    """Returns S times the start of CG for every tensor, of which ``metric`` has diagonal root and factors.

    Between two refreshes the metric of a matrix moves by Adam's part of it, which is little, so what the step
    before found serves: one of four products with large factors less.
    """
    said, state, before = signal.said, signal.state, jax.tree.leaves(view.damped)
    matrices = [i for i, (_, sides) in enumerate(metric) if sides is not None]
    direction = jax.tree.leaves(view.direction)
    product = lambda i: _times_metric(direction[i], *metric[i], inverse=False)
    of_matrices = lax.cond(
        signal.is_fresh, lambda: [product(i) for i in matrices], lambda: [before[i] for i in matrices]
    )
    known = dict(zip(matrices, of_matrices, strict=True))
    scales = jnp.where(signal.is_fresh, state.damping, signal.grown)
    scaled = lambda scale, x: (said.warm_start_share * scale * x).astype(x.dtype)
    return [
        scaled(scales[i], known[i]) if i in known else scaled(state.damping[i], product(i))
        for i in range(len(direction))
    ]


def _damping_units(constants: Constants, view: View, state: TensorLSTMState) -> jax.Array:
    """Returns the size of the gradient over that of the parameters for every tensor, shape (tensors,)."""
    running = _running_size(state)
    # A training that is nearly done has steps with a tiny gradient; with damping as small they jump away.
    size = jnp.maximum(trees.root_mean_square(view.gradient), running)
    # Even the running mean falls without end where every example is solved, and curvature with it. Damping
    # falls more slowly, so that such a training comes to rest.
    size = size * (jnp.maximum(state.largest, size) / jnp.maximum(size, _TINY)) ** constants.largest_share
    # Layers may be in units of their own, such as inputs that are not standardised give to the first one.
    of_tensors = jnp.sqrt(_mean_squares(state) / state.square_weight)
    return tensor_shares(of_tensors, running) * jnp.maximum(size, _SMALLEST) / state.initial_rms


def _observe(view: View, outcome: Outcome, state: TensorLSTMState) -> Observed:
    d, r, b = outcome.direction, outcome.residual, outcome.right_hand_side
    curvature = _inner(d, b) - _inner(d, r)  # <d, (G + S) d>
    share = jnp.clip(_inner(d, outcome.damped) / jnp.where(curvature > 0, curvature, 1e30), 0.0, 1.0)
    residual = jnp.sqrt(_inner(r, r) / (_inner(b, b) + _TINY))
    keep = lambda new, old: jnp.where(outcome.is_sound, new, old)
    state = state._replace(
        residual=keep(residual, state.residual), damped_share=keep(share, state.damped_share)
    )
    return accept(view, outcome, state)


# The metric of one tensor.


def _diagonal_root(square: jax.Array, sides: Any, share: jax.Array) -> jax.Array:
    """Returns ``h^(1/2)`` for Adam's part h of a metric, with mean 1: ``v^(share / 2)`` for matrices.

    For vectors, of which it is the whole metric, h is ``v^(1/2)``.
    """
    exponent = 0.25 * (1.0 if sides is None else share)
    # On CPUs a power takes three times as long as a logarithm and an exponential.
    root = jnp.exp(exponent * jnp.log(square / (jnp.mean(square) + _TINY) + 1e-6))
    return root * lax.rsqrt(jnp.mean(jnp.square(root)))


def _times_metric(x: jax.Array, root: jax.Array, sides: Any, inverse: bool) -> jax.Array:
    """Returns M x or its inverse; ``M = h^(1/2) (L^p (h^(1/2) .) R^p)`` for matrices, h for vectors."""
    half = 1 / root if inverse else root
    inner = half * x if sides is None else times_sides(sides, half * x, inverse)
    return (half * inner).astype(x.dtype)


def _mean_squares(state: TensorLSTMState) -> jax.Array:
    return jnp.stack([jnp.mean(v) for v in jax.tree.leaves(state.square)]).astype(jnp.float32)


def _running_size(state: TensorLSTMState) -> jax.Array:
    return jnp.sqrt(_mean_square(state.square) / state.square_weight)


# What the network sees.


def _features(view: View, state: TensorLSTMState, constants: Constants) -> jax.Array:
    """Returns statistics without scale within [-1, 1], shape (tensors, FEATURES)."""
    leaves = jax.tree.leaves(view.gradient)
    sizes = jnp.array([leaf.size for leaf in leaves], jnp.float32)
    w, g, d, old = view.params, view.gradient, view.direction, state.mean
    g_g, d_d, old_old, g_old, g_d = _inner(g, g), _inner(d, d), _inner(old, old), _inner(g, old), _inner(g, d)
    old_share, new_share = 0.9 / jnp.maximum(state.mean_weight, 1e-3), 0.1  # of the mean with this gradient
    m_m = old_share**2 * old_old + new_share**2 * g_g
    m_m = jnp.maximum(m_m + 2 * old_share * new_share * g_old, 0.0)
    m_d = old_share * _inner(old, d) + new_share * g_d
    rms = lambda squares: jnp.sqrt(squares / sizes + _TINY)
    total = lambda each: jnp.sqrt(jnp.sum(sizes * jnp.square(each)) / jnp.sum(sizes) + _TINY)
    cosine = lambda x_y, x_x, y_y: x_y / (jnp.sqrt(x_x * y_y) + _TINY)
    rms_w, rms_g, rms_d, rms_m = map(rms, (_inner(w, w), g_g, d_d, m_m))
    rms_v = jnp.sqrt(_mean_squares(state) / state.square_weight + _TINY)
    all_w, all_d, all_m, all_v = map(total, (rms_w, rms_d, rms_m, rms_v))
    is_started = (state.count > 0).astype(jnp.float32)
    is_vector = jnp.array([1.0 if matrix_shape(leaf.shape) is None else -1.0 for leaf in leaves])
    of_tensors = [
        _bounded(_log(rms_m / all_m), 3.0),
        _bounded(_log(rms_v / all_v), 3.0),
        _bounded(_log(rms_m / rms_v) + 1, 1.0),
        _bounded(_log(rms_w / all_w), 3.0),
        is_started * _bounded(_log(rms_d / (rms_w + 0.1 * all_w)) + 4, 3.0),
        is_started * _bounded(_log(rms_d / all_d), 3.0),
        cosine(g_d, g_g, d_d),
        cosine(g_old, g_g, old_old),
        cosine(m_d, m_m, d_d),
        is_started * _bounded(_log(state.residual), 2.0),
        is_started * (2 * state.damped_share - 1),
        is_vector,
    ]
    age = state.count.astype(jnp.float32)
    now, fast, slow, first = state.losses
    ratio = state.rate * all_d / jnp.maximum(all_w, _TINY)
    of_all = [
        2 * age / (age + 10) - 1,
        2 * age / (age + 100) - 1,
        2 * age / (age + 1000) - 1,
        _bounded(first - fast, 2.0),
        _bounded(fast - slow, 0.3),
        _bounded(now - fast, 0.5),
        _bounded(_log(total(rms_g) / all_v), 0.5),
        _bounded(_log(all_m / all_v) + 1, 1.0),
        _bounded(_log(all_w / size_of(view.initial_rms)), 1.0),
        _bounded(_log(jnp.minimum(1.0, constants.update_ratio / jnp.maximum(ratio, _TINY))), 1.0),
    ]
    shared = jnp.broadcast_to(jnp.stack(of_all), (len(leaves), SHARED_FEATURES))
    return jnp.concatenate([jnp.stack(of_tensors, 1), shared], 1).astype(jnp.float32)


def _averaged_losses(state: TensorLSTMState, loss: jax.Array) -> jax.Array:
    now = jnp.nan_to_num(jnp.log(jnp.maximum(loss.astype(jnp.float32), _TINY)), nan=30.0)
    keep = jnp.array([0.0, 0.9, 0.99, 1.0])
    return jnp.where(state.count == 0, now, keep * state.losses + (1 - keep) * now)


def _bounded(x: jax.Array, scale: float) -> jax.Array:
    """Features are bounded, so that the network meets nothing far beyond what it was trained on."""
    return jnp.tanh(jnp.nan_to_num(x) / scale)


def _log(x: jax.Array) -> jax.Array:
    return jnp.log(x + _TINY)


# What the network says.


def _network(
    meta_params: TensorLSTM, features: jax.Array, state: TensorLSTMState
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes one step of every LSTM; returns outputs (tensors, OUTPUTS), hidden states and cells."""
    gates = jnp.concatenate([features, state.hidden], 1) @ meta_params.kernel + meta_params.bias
    i, f, g, o = jnp.split(gates, 4, axis=1)
    cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    # Twice, so that equal noise on all meta-parameters moves the outputs about as much by each.
    outputs = 2 * hidden @ meta_params.readout + features @ meta_params.linear + meta_params.offset
    return outputs, hidden, cell


def bounded_controls(outputs: jax.Array, constants: Constants = CONSTANTS) -> Controls:
    """Turns outputs of the network, shape (tensors, OUTPUTS), into bounded controls around the constants.

    Example:
      >>> said = bounded_controls(jnp.zeros((3, OUTPUTS)))
      >>> said.damping, said.rate
      (Array([10., 10., 10.], dtype=float32), Array(1., dtype=float32))
    """
    within = lambda x, factor: jnp.exp(math.log(factor) * jnp.tanh(x / math.log(factor)))
    share = lambda x, at: jax.nn.sigmoid(x + math.log(at / (1 - at)))
    each, shared = outputs.T, jnp.mean(outputs, axis=0)
    return Controls(
        damping=constants.damping * within(2 * each[0], 30.0),
        trust=within(-each[1], 10.0),
        power=share(each[2], constants.power),
        diagonal=share(each[3], constants.diagonal),
        rate=constants.max_rate * share(shared[4], constants.rate / constants.max_rate),
        memory=jnp.maximum(constants.memory * within(shared[5], 10.0), 1.0),
        warm_start_share=share(shared[6], constants.warm_start_share),
    )


def _inner(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    """Returns the inner product of each of n tensors with its counterpart, shape (n,), float32."""
    each = map(trees.vdot, jax.tree.leaves(a), jax.tree.leaves(b))
    return jnp.stack([product.astype(jnp.float32) for product in each])


def _mean_square(tree: chex.ArrayTree) -> Any:
    return trees.total([jnp.sum(leaf) for leaf in jax.tree.leaves(tree)]) / trees.size(tree)
