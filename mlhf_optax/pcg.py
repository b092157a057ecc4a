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
from mlhf_optax.trees import vdot


class Info(NamedTuple):
    """What one solve did.

    Attributes:
      steps: number of steps that changed the solution, at most ``num_steps``.
      residual_norm: Euclidean norm of the residual at the end.
    """

    steps: jax.Array  # shape=(), dtype=int32
    residual_norm: jax.Array  # shape=(), dtype=float32


class _Loop(NamedTuple):
    """x, r and p as in the paper's Algorithm 1; `rho` is <r, y>."""

    x: Any
    r: Any
    p: Any
    shifted: Any  # S p
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
      shift: S, the inverse of ``preconditioner``, if the matrix of the system is ``A + S``. As p is made of
        ``y = S^-1 r``, ``S p`` is known from r, and no step needs a product with S.
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
    if x0 is None:
        x0 = jax.tree.map(jnp.zeros_like, b)
        initial_residual = b
    elif initial_residual is None:
        a_x0 = matvec(x0) if shift is None else jax.tree.map(jnp.add, matvec(x0), shift(x0))
        initial_residual = jax.tree.map(jnp.subtract, b, a_x0)
    r0: Any = initial_residual
    y0 = invert(r0)
    rho0 = vdot(r0, y0)
    # <r, y> below this share of where it comes from is rounding noise: dividing by it gives noise,
    # and dividing by an exact zero gives NaN gradients.
    limits = jnp.finfo(rho0.dtype)
    noise = (10 * limits.eps) ** 2 * jnp.maximum(rho0, vdot(b, invert(b)))
    noise = jnp.maximum(lax.stop_gradient(noise), limits.tiny)

    def is_active(state: _Loop) -> jax.Array:
        active = state.rho > noise
        if isinstance(tolerance, int | float) and tolerance == 0:
            return active  # a norm would only cost time
        return active & (vdot(state.r, state.r) >= tolerance**2)

    def step(state: _Loop) -> _Loop:
        active = is_active(state)
        a_p = matvec(state.p)
        if shift is not None:
            a_p = jax.tree.map(jnp.add, a_p, state.shifted)
        curvature = vdot(state.p, a_p)
        active &= curvature > limits.tiny
        alpha = _where_divide(active, state.rho, curvature)
        x = _add_scaled(state.x, alpha, state.p)
        r = _add_scaled(state.r, -alpha, a_p)
        y = invert(r)
        rho = vdot(r, y)
        beta = _where_divide(active, rho, state.rho)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(active, n, o), new, old)
        p = _add_scaled(y, beta, state.p)
        shifted = () if shift is None else keep(_add_scaled(r, beta, state.shifted), state.shifted)
        # alpha is 0 for an inactive step, so x and r are unchanged already.
        return _Loop(x, r, keep(p, state.p), shifted, keep(rho, state.rho), state.steps + active)

    state = _Loop(x0, r0, y0, () if shift is None else r0, rho0, jnp.zeros((), jnp.int32))
    if early_exit:
        indexed = (jnp.zeros((), jnp.int32), state)
        go_on = lambda c: (c[0] < num_steps) & is_active(c[1])
        state = lax.while_loop(go_on, lambda c: (c[0] + 1, step(c[1])), indexed)[1]
    elif num_steps:
        state = lax.fori_loop(0, num_steps, lambda _, s: step(s), state, unroll=unroll)
    norm = jnp.sqrt(lax.stop_gradient(vdot(state.r, state.r))).astype(jnp.float32)
    return state.x, state.r, Info(state.steps, norm)


def check_num_steps(num_steps: Any, name: str = "num_steps") -> None:
    """Raises an error that says what is wanted unless ``num_steps`` is a Python int >= 0."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int):
        raise TypeError(
            f"`{name}` must be a Python int, got {type(num_steps).__name__}; it is the static length of a "
            "loop, so under `optax.inject_hyperparams` name it in `static_args`"
        )
    if num_steps < 0:
        raise ValueError(f"`{name}` must be at least 0, got {num_steps}")


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
