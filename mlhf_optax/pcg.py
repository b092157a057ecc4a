"""Preconditioned conjugate gradient with a fixed number of steps, differentiable in reverse mode.

Differences from a textbook routine (paper, supplement, Algorithm 1), and why:

1. The number of steps is fixed and small. The meta-gradient needs the derivative of what these few
   steps return, not the implicit derivative of a converged solution that solvers such as
   ``jax.scipy.sparse.linalg.cg`` give.
2. A step past convergence leaves everything as it is. Both branches of every guarded division are
   finite, so neither values nor gradients become NaN, also for a zero right-hand side.
3. All scalars are kept in at least float32, whatever the dtype of the vectors.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mlhf_optax.curvature import Matvec
from mlhf_optax.support import loops
from mlhf_optax.support.trees import once, vdot


class Info(NamedTuple):
    """What one solve did.

    Attributes:
      steps: number of steps that changed the solution, at most ``num_steps``.
      residual_norm: Euclidean norm of the residual at the end.
      shifted: S x, shaped like x, if there is a shift; else empty.
    """

    steps: jax.Array  # shape=(), dtype=int32
    residual_norm: jax.Array  # shape=(), dtype=float32
    shifted: Any = ()


class _Loop(NamedTuple):
    """x, r and p as in the paper's Algorithm 1; `rho` is <r, y>; s_x is S x."""

    x: Any
    r: Any
    p: Any
    s_x: Any
    s_p: Any
    rho: jax.Array
    steps: jax.Array


def pcg(
    matvec: Matvec,
    b: chex.ArrayTree,
    x0: chex.ArrayTree | None = None,
    *,
    num_steps: int,
    preconditioner: Matvec | None = None,
    shift: Matvec | None = None,
    shift_after_preconditioner: Matvec | None = None,
    initial_residual: chex.ArrayTree | None = None,
    tolerance: chex.Numeric = 0.0,
    early_exit: bool = False,
    unroll: bool | int = True,
) -> tuple[chex.ArrayTree, chex.ArrayTree, Info]:
    """Takes ``num_steps`` steps of preconditioned conjugate gradient on ``A x = b``.

    Args:
      matvec: product with ``A``, symmetric positive definite, on pytrees shaped like ``b``.
      b: right-hand side, a pytree of arrays.
      x0: start vector, shaped like ``b``; zeros if None (which saves one product).
      num_steps: number of steps K >= 0, a Python int.
      preconditioner: maps a residual r to ``y = P^-1 r``, linear, symmetric positive definite, on pytrees
        shaped like ``b``; None is the identity.
      shift: S, if the matrix of the system is ``A + S`` and ``S P^-1`` is cheap. As p is made of
        ``y = P^-1 r``, ``S p`` is known from r, and no step needs a product with S.
      shift_after_preconditioner: the product with ``S P^-1``; None if ``preconditioner`` is ``S^-1``.
      initial_residual: ``b - A x0`` if it is known already, which saves one product.
      tolerance: absolute norm of the residual below which no further step is taken.
      early_exit: leave the loop at convergence instead of idling to the end. Saves time where the
        tolerance is reached early, but has no reverse-mode derivative.
      unroll: unroll the loop (True), or so many steps of it at a time. XLA on CPUs runs backward
        convolutions in rolled loops 30 to 100 times slower.

    Returns:
      The solution x, the residual ``b - A x`` as the recurrence keeps it, and an :class:`Info`.

    Raises:
      TypeError: if ``num_steps`` is not an int (traced values have no reverse-mode derivative).
      ValueError: if ``num_steps`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> x, r, info = pcg(lambda v: a @ v, jnp.array([1.0, 2.0]), num_steps=2)
      >>> x.round(4), int(info.steps)
      (Array([0.0909, 0.6364], dtype=float32), 2)
    """
    check_num_steps(num_steps)
    invert = preconditioner or (lambda r: r)
    shifted = shift_after_preconditioner or (lambda r: r)
    start: Any = x0
    r0: Any = initial_residual
    s_x0: Any = ()
    if x0 is None:
        start = jax.tree.map(jnp.zeros_like, b)
        r0 = b
        s_x0 = () if shift is None else jax.tree.map(jnp.zeros_like, b)
    elif shift is not None:
        s_x0 = shift(start)
    if r0 is None:
        a_x0 = matvec(start) if shift is None else jax.tree.map(jnp.add, matvec(start), s_x0)
        r0 = jax.tree.map(jnp.subtract, b, a_x0)
    y0 = invert(r0)
    rho0 = vdot(r0, y0)
    # <r, y> below this share of where it comes from is rounding noise: dividing by it gives noise,
    # and dividing by an exact zero gives NaN gradients. Where it comes from is <b, P^-1 b>, told from <r, y>
    # by the sizes of b and r, since the product would cost as much as that of a step.
    limits = jnp.finfo(rho0.dtype)
    r0_size = lax.stop_gradient(vdot(r0, r0))
    ratio = jnp.maximum(1.0, lax.stop_gradient(vdot(b, b)) / jnp.where(r0_size > 0, r0_size, 1.0))
    noise = (10 * limits.eps) ** 2 * jnp.minimum(ratio, 1 / limits.eps**3) * lax.stop_gradient(rho0)
    noise = jnp.maximum(noise, limits.tiny)

    def is_active(state: _Loop) -> jax.Array:
        active = state.rho > noise
        if isinstance(tolerance, int | float) and tolerance == 0:
            return active  # a norm would only cost time
        return active & (vdot(state.r, state.r) >= tolerance**2)

    def step(state: _Loop) -> _Loop:
        active = is_active(state)
        a_p = matvec(state.p)
        if shift is not None:
            a_p = jax.tree.map(jnp.add, a_p, state.s_p)
        curvature = vdot(state.p, a_p)
        active &= curvature > limits.tiny
        alpha = _where_divide(active, state.rho, curvature)
        x = _add_scaled(state.x, alpha, state.p)
        r = _add_scaled(state.r, -alpha, a_p)
        y = invert(r)
        rho = vdot(r, y)
        beta = _where_divide(active, rho, state.rho)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(active, n, o), new, old)
        p = keep(_add_scaled(y, beta, state.p), state.p)
        s_x, s_p = state.s_x, state.s_p
        if shift is not None:
            s_x = _add_scaled(s_x, alpha, s_p)
            s_p = keep(_add_scaled(shifted(r), beta, s_p), s_p)
        # alpha is 0 for an inactive step, so x, r and S x are unchanged already.
        return _Loop(x, r, p, s_x, s_p, keep(rho, state.rho), state.steps + active.astype(jnp.int32))

    s_y0 = () if shift is None else shifted(r0)
    state = _Loop(start, r0, y0, s_x0, s_y0, rho0, jnp.zeros((), jnp.int32))
    if early_exit:
        indexed = (jnp.zeros((), jnp.int32), state)
        go_on = lambda c: (c[0] < num_steps) & is_active(c[1])
        state = loops.while_loop(go_on, lambda c: (c[0] + 1, step(c[1])), indexed)[1]
    elif num_steps:
        state = loops.repeat(num_steps, step, state, unroll)
    norm = jnp.sqrt(lax.stop_gradient(vdot(state.r, state.r))).astype(jnp.float32)
    return state.x, state.r, Info(state.steps, norm, state.s_x)


def pcg_from_direction(
    matvec: Matvec,
    b: chex.ArrayTree,
    first: chex.ArrayTree,
    *,
    longest: jax.Array | float,
    num_steps: int,
    preconditioner: Matvec,
    shift: Matvec,
    shift_after_preconditioner: Matvec,
    unroll: bool | int = True,
) -> tuple[chex.ArrayTree, chex.ArrayTree, Info]:
    """Takes a step along a given direction, then ``num_steps`` steps of preconditioned conjugate gradient.

    CG starts from zero, and each step has the length that is exact in the quadratic model, so what is found
    leads down, however bad the given direction is. A start that is taken as it is can lead up, if the matrix
    has changed since: a few steps do not mend it. The steps after the first are not conjugate to it, as then
    a first direction that is no longer a good one would hold them back.

    Args:
      matvec: product with ``A``, on pytrees shaped like ``b``; the matrix of the system is ``A + S``.
      b: right-hand side, a pytree of arrays.
      first: the first direction, shaped like ``b``, such as the solution of the step before; zero for none.
      longest: its largest multiple, > 0; the smallest is zero.
      num_steps: number of steps K >= 1 after it, a Python int.
      preconditioner: P^-1, as for :func:`pcg`.
      shift: S, used once.
      shift_after_preconditioner: the product with ``S P^-1``.
      unroll: unroll the loop, as for :func:`pcg`. If False, it holds one product and one preconditioner,
        which compile once.

    Returns:
      As :func:`pcg`; ``info.steps`` counts the step along ``first``, too.

    Raises:
      TypeError: if ``num_steps`` is not an int.
      ValueError: if ``num_steps`` is negative.

    Example:
      >>> a = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> same = lambda v: v
      >>> how = dict(preconditioner=same, shift=same, shift_after_preconditioner=same)
      >>> x, r, info = pcg_from_direction(
      ...     lambda v: a @ v, jnp.array([1.0, 2.0]), jnp.ones(2), longest=1.0, num_steps=2, **how
      ... )
      >>> [round(float(number), 3) for number in x]
      [0.105, 0.474]
    """
    check_num_steps(num_steps)
    b_b = lax.stop_gradient(vdot(b, b))
    limits = jnp.finfo(b_b.dtype)
    noise = jnp.maximum((10 * limits.eps) ** 2 * b_b, limits.tiny)  # of <r, r>
    zeros_like = lambda tree: jax.tree.map(jnp.zeros_like, tree)

    def step(state: _FromDirection) -> _FromDirection:
        is_first, is_last = state.index == 0, state.index == num_steps
        a_p = jax.tree.map(jnp.add, matvec(state.p), state.s_p)
        curvature = vdot(state.p, a_p)
        active = (curvature > limits.tiny) & (state.rho > limits.tiny)
        alpha = _where_divide(active, state.rho, curvature)
        alpha = once(jnp.where(is_first, jnp.minimum(alpha, longest), alpha))
        x, r = _add_scaled(state.x, alpha, state.p), _add_scaled(state.r, -alpha, a_p)
        s_x = _add_scaled(state.s_x, alpha, state.s_p)
        # The last residual needs no direction.
        y = loops.cond(is_last, zeros_like, lambda r: preconditioner(r), r)
        rho = vdot(r, y)
        beta = once(_where_divide(active & ~is_first, rho, state.rho))
        p = _add_scaled(y, beta, state.p)
        s_p = _add_scaled(shift_after_preconditioner(r), beta, state.s_p)
        is_left = lax.stop_gradient(vdot(r, r)) > noise
        return _FromDirection(
            x,
            r,
            p,
            s_x,
            s_p,
            jnp.where(is_left, rho, 0.0),
            steps=state.steps + active.astype(jnp.int32),
            index=state.index + 1,
        )

    zero = zeros_like(b)
    count = jnp.zeros((), jnp.int32)
    state = _FromDirection(zero, b, first, zero, shift(first), vdot(first, b), count, count)
    state = loops.repeat(num_steps + 1, step, state, unroll)
    norm = jnp.sqrt(lax.stop_gradient(vdot(state.r, state.r))).astype(jnp.float32)
    return state.x, state.r, Info(state.steps, norm, state.s_x)


class _FromDirection(NamedTuple):
    """The loop of :func:`pcg_from_direction`; `rho` is <p, r>, later <r, y>, and 0 when done."""

    x: Any
    r: Any
    p: Any
    s_x: Any
    s_p: Any
    rho: jax.Array
    steps: jax.Array
    index: jax.Array


def check_num_steps(num_steps: Any, name: str = "num_steps") -> None:
    """Raises an error that says what is wanted unless ``num_steps`` is a Python int >= 0."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int):
        raise TypeError(
            f"`{name}` must be a Python int, got {type(num_steps).__name__}; it is the static length of a "
            "loop, so under `optax.inject_hyperparams` name it in `static_args`"
        )
    if not 0 <= num_steps < 2**31:
        raise ValueError(f"`{name}` must be from 0 to 2**31 - 1, got {num_steps}")


def _add_scaled(a: chex.ArrayTree, scale: jax.Array, b: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda x, y: x + (scale * y).astype(x.dtype), a, b)


@jax.custom_jvp
def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """A quotient whose derivative does not square the denominator, which would underflow first."""
    return numerator / denominator


@_divide.defjvp
def _divide_jvp(primals, tangents):
    quotient = primals[0] / primals[1]
    return quotient, (tangents[0] - quotient * tangents[1]) / primals[1]


def _where_divide(condition: jax.Array, numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    safe = jnp.where(condition, denominator, 1.0)
    return jnp.where(condition, _divide(numerator, safe), 0.0)
