"""Solvers of the damped system ``(G + S) d = b``, as objects: an optimizer is given one.

A solver is anything with ``solve(system) -> Solution``. All of them take S and P from the controller.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from mlhf_optax.controllers.protocol import Operators
from mlhf_optax.curvature import GGN, Matvec
from mlhf_optax.pcg import check_num_steps, pcg
from mlhf_optax.support import trees
from mlhf_optax.support.checks import FROM_ONE, check_number


class System(NamedTuple):
    """The system of one step.

    Attributes:
      ggn: product with G, and its matrix if asked for.
      operators: damping S and preconditioner P.
      right_hand_side: b, shaped like the parameters; the gradient for most controllers.
      start: where an iterative solver starts; None is zero.
    """

    ggn: GGN
    operators: Operators
    right_hand_side: chex.ArrayTree
    start: chex.ArrayTree | None = None


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
      direction: d, shaped like the parameters.
      residual: r = b - (G + S) d, shaped like the parameters.
      num_steps: steps that changed the direction, shape ().
      residual_norm: norm of r, shape ().
      damped: S d if the operators have ``damping_after_preconditioner``; else empty.
    """

    direction: chex.ArrayTree
    residual: chex.ArrayTree
    num_steps: jax.Array
    residual_norm: jax.Array
    damped: Any = ()


class Solver(Protocol):
    """From a system to its solution."""

    def solve(self, system: System, /) -> Solution:
        """Returns the solution, or the best that was found."""
        ...


@dataclasses.dataclass(frozen=True)
class PCG:
    """So many steps of preconditioned conjugate gradient, differentiable in reverse mode.

    Args:
      num_steps: CG steps K >= 1, a Python int. A warm start costs one GGN product more.
      unroll: as in :func:`mlhf_optax.pcg.pcg`.

    Raises:
      TypeError: if ``num_steps`` is not an int.
      ValueError: if it is below 1.

    Example:
      >>> PCG(num_steps=2)
      PCG(num_steps=2, unroll=True)
    """

    num_steps: int = 4
    unroll: bool | int = True

    def __post_init__(self):
        _check_some_steps(self.num_steps)

    def solve(self, system: System, /) -> Solution:
        """Returns the direction after ``num_steps`` steps."""
        return _pcg_solution(system, num_steps=self.num_steps, unroll=self.unroll)


@dataclasses.dataclass(frozen=True)
class TolerancePCG:
    """Preconditioned conjugate gradient until the residual is small.

    Args:
      num_steps: largest number of CG steps, a Python int >= 1.
      tolerance: absolute norm of the residual at which CG stops, >= 0.
      early_exit: leave the loop there. It then has no reverse-mode derivative. Otherwise the loop is unrolled
        and idles to its end, which can be differentiated, takes longer to compile, and is faster for
        convolutional networks on CPUs.

    Raises:
      TypeError: if ``num_steps`` is not an int.
      ValueError: for values out of range.

    Example:
      >>> TolerancePCG(num_steps=20, tolerance=1e-5).early_exit
      True
    """

    num_steps: int = 20
    tolerance: chex.Numeric = 1e-5
    early_exit: bool = True

    def __post_init__(self):
        _check_some_steps(self.num_steps)
        if isinstance(self.tolerance, int | float) and not self.tolerance >= 0:
            raise ValueError(f"`tolerance` must be a number >= 0, got {self.tolerance}")

    def solve(self, system: System, /) -> Solution:
        """Returns the direction where the residual is as small as asked for, or after ``num_steps`` steps."""
        return _pcg_solution(
            system, num_steps=self.num_steps, tolerance=self.tolerance, early_exit=self.early_exit
        )


@dataclasses.dataclass(frozen=True)
class Exact:
    """Cholesky factorization of the whole matrix, for small networks and fits to measurements.

    For N parameters it takes N derivatives of the model in forward mode and about ``N^3 / 3`` operations.
    Rows and columns are scaled to a diagonal of ones first, and one step of iterative refinement follows.
    Where the matrix is singular to rounding, the direction is not finite and the step is skipped; damping has
    to grow then, as with :meth:`mlhf_optax.LevenbergMarquardt.without_noise`.

    Args:
      max_parameters: largest N, as the matrix has ``N^2`` numbers.

    Raises:
      ValueError: for a number below 1, and from ``solve`` for more parameters.

    Example:
      >>> from mlhf_optax import Model, SquaredError, scale_by_damped_step
      >>> from mlhf_optax.controllers import scheduled
      >>> model = Model(lambda w, batch: batch["x"] @ w, SquaredError())
      >>> batch = {"x": jnp.array([[2.0, 1.0], [0.0, 1.0]]), "label": jnp.ones(2)}
      >>> tx = scale_by_damped_step(scheduled(0.0), model, solver=Exact())
      >>> params = jnp.zeros(2)
      >>> tx.update(jax.grad(model.loss)(params, batch), tx.init(params), params, batch=batch)[0]
      Array([ 0., -1.], dtype=float32)
    """

    max_parameters: int = 4096

    def __post_init__(self):
        check_number("max_parameters", self.max_parameters, FROM_ONE)

    def solve(self, system: System, /) -> Solution:
        """Returns the solution; ``num_steps`` is 1."""
        b, unravel = ravel_pytree(system.right_hand_side)
        if b.size > self.max_parameters:
            raise ValueError(
                f"`Exact()` would form a matrix of {b.size:,} x {b.size:,} numbers, "
                f"{b.size**2 * b.dtype.itemsize / 2**30:.1f} GiB; use `PCG`, or raise `max_parameters` from "
                f"{self.max_parameters:,}"
            )
        of_unit = lambda unit: ravel_pytree(system.operators.damping(unravel(unit)))[0]
        damping = trees.at_least_f32(jax.vmap(of_unit)(jnp.eye(b.size, dtype=b.dtype)))
        matrix = system.ggn.matrix + damping
        wide = b.astype(matrix.dtype)  # no library factorizes matrices in low precision
        diagonal = jnp.diag(matrix)
        scale = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1.0))
        factor = jax.scipy.linalg.cho_factor(scale[:, None] * matrix * scale[None, :], lower=True)
        invert = lambda r: scale * jax.scipy.linalg.cho_solve(factor, scale * r)
        direction = invert(wide)
        direction = direction + invert(wide - matrix @ direction)
        residual = wide - matrix @ direction
        tree = lambda vector: unravel(vector.astype(b.dtype))
        return Solution(
            tree(direction),
            tree(residual),
            jnp.ones((), jnp.int32),
            jnp.linalg.norm(residual).astype(jnp.float32),
            tree(damping @ direction) if system.operators.damping_after_preconditioner else (),
        )


def damped_ggn(ggn: Matvec, damping: Matvec) -> Matvec:
    """Returns ``v -> G v + S v``."""
    return lambda vector: jax.tree.map(jnp.add, ggn(vector), damping(vector))


def _pcg_solution(system: System, **options: Any) -> Solution:
    operators, after = system.operators, system.operators.damping_after_preconditioner
    # Where S P^-1 is cheap, CG keeps S d beside d, and no step needs a product with S.
    keeps_damped = after is not None
    direction, residual, info = pcg(
        system.ggn if keeps_damped else damped_ggn(system.ggn, operators.damping),
        system.right_hand_side,
        system.start,
        shift=operators.damping if keeps_damped else None,
        shift_after_preconditioner=after,
        shifted_x0=operators.damped_start,
        preconditioner=operators.preconditioner,
        **options,
    )
    return Solution(direction, residual, info.steps, info.residual_norm, info.shifted)


def _check_some_steps(num_steps: Any) -> None:
    check_num_steps(num_steps, "num_cg_steps")
    if num_steps < 1:
        raise ValueError("`num_cg_steps` must be at least 1: without a step there is no direction")
