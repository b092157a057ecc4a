"""Solvers of the damped system ``(G + S) d = b``, as objects: an optimizer is given one.

A solver is anything with ``solve(system) -> Solution``. All of them take S and P from the controller.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from mlhf_optax.controllers.protocol import Operators, Product, Scale
from mlhf_optax.dense import GGN, Matvec, PackedGGN, Space, cheaper_space
from mlhf_optax.pcg import check_num_steps, pcg, pcg_from_direction
from mlhf_optax.support import trees
from mlhf_optax.support.checks import FROM_ONE, POSITIVE, check_choice, check_fields


class System(NamedTuple):
    """The system of one step, on trees like the parameters or on vectors of a packing.

    Attributes:
      ggn: product with G: a :class:`mlhf_optax.dense.GGN`, which also has the matrix, or a ``PackedGGN``.
      operators: damping S and preconditioner P.
      right_hand_side: b, shaped like the parameters; the gradient for most controllers.
      start: where an iterative solver starts; None is zero.
    """

    ggn: Any
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
      unroll: as in :func:`mlhf_optax.pcg.pcg`; None to unroll for models with convolutions alone. A loop that
        is not unrolled compiles in a third of the time, but XLA on CPUs runs convolutions in it far slower.

    Raises:
      TypeError: if ``num_steps`` is not an int.
      ValueError: if it is below 1.

    Example:
      >>> PCG(num_steps=2)
      PCG(num_steps=2, unroll=True)
    """

    num_steps: int = 4
    unroll: bool | int | None = True

    def __post_init__(self):
        _check_some_steps(self.num_steps)

    def solve(self, system: System, /) -> Solution:
        """Returns the direction after ``num_steps`` steps."""
        unroll = system.ggn.has_convolutions if self.unroll is None else self.unroll
        operators = system.operators
        if operators.longest is None or system.start is None:
            return _pcg_solution(system, num_steps=self.num_steps, unroll=unroll)
        if operators.preconditioner is None or operators.damping_after_preconditioner is None:
            raise ValueError(
                "operators with `longest` need a `preconditioner` and `damping_after_preconditioner`, as "
                "those of `metric_operators` have"
            )
        direction, residual, info = pcg_from_direction(
            system.ggn,
            system.right_hand_side,
            system.start,
            longest=operators.longest,
            num_steps=self.num_steps,
            preconditioner=operators.preconditioner,
            shift=operators.damping,
            shift_after_preconditioner=operators.damping_after_preconditioner,
            unroll=unroll,
        )
        return Solution(direction, residual, info.steps, info.residual_norm, info.shifted)


@dataclasses.dataclass(frozen=True)
class TolerancePCG:
    """Preconditioned conjugate gradient until the residual is small.

    Args:
      num_steps: largest number of CG steps, a Python int >= 1.
      tolerance: absolute norm of the residual at which CG stops, >= 0.
      is_relative: the tolerance is that share of the norm of the right-hand side.
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
    is_relative: bool = False

    def __post_init__(self):
        _check_some_steps(self.num_steps)
        if isinstance(self.tolerance, int | float) and not self.tolerance >= 0:
            raise ValueError(f"`tolerance` must be a number >= 0, got {self.tolerance}")

    def solve(self, system: System, /) -> Solution:
        """Returns the direction where the residual is as small as asked for, or after ``num_steps`` steps."""
        b, tolerance = system.right_hand_side, self.tolerance
        if self.is_relative:
            tolerance = tolerance * trees.norm(b)
        return _pcg_solution(
            system, num_steps=self.num_steps, tolerance=tolerance, early_exit=self.early_exit
        )


@dataclasses.dataclass(frozen=True)
class Exact:
    """Cholesky factorization of a matrix, for small networks, fits to measurements, and few outputs.

    For N parameters and M outputs, of all examples, it forms the Jacobian: in one pass per output of an
    example where examples can be told apart (:mod:`mlhf_optax.jacobian`), else in as many passes as the
    smaller of N and M. Then it factorizes ``G + S``, of N x N numbers, or where M is smaller the matrix of
    Woodbury's identity, ``1 + H^(1/2) J S^-1 J^T H^(1/2)``, of M x M: this takes about ``2 N M min(N, M)``
    operations. One step of iterative refinement follows. Where the matrix is singular to rounding, the
    direction is not finite and the step is skipped; damping has to grow then, as with
    :meth:`mlhf_optax.LevenbergMarquardt.without_noise`.

    Outputs have a space of their own if they are real, S is diagonal and positive, and the batch does not
    differ from device to device.

    Args:
      max_parameters: largest N in the space of parameters.
      space: ``"parameters"``, ``"outputs"``, or None for the smaller of both.
      max_outputs: largest M in the space of outputs.
      acceleration: add the geodesic acceleration, what the curvature of the model bends the direction by, if
        it
        is at most half this number times as long as the direction: at most 1 is safe. It takes the second
        derivative along the direction, and a second solve with the same factors. None for none.

    Raises:
      ValueError: for values out of range, and from ``solve`` for more parameters or outputs.

    Example:
      >>> from mlhf_optax import Model, SquaredError, scale_by_damped_step
      >>> from mlhf_optax.controllers import scheduled
      >>> model = Model(lambda w, batch: batch["x"] @ w, SquaredError())
      >>> batch = {"x": jnp.array([[2.0, 1.0], [0.0, 1.0]]), "label": jnp.ones(2)}
      >>> tx = scale_by_damped_step(scheduled(0.0), model, solver=Exact())
      >>> params = jnp.zeros(2)
      >>> tx.update(jax.grad(model.loss)(params, batch), tx.init(params), params, batch=batch)[0]
      Array([ 0., -1.], dtype=float32)

    References:
      Transtrum, Sethna, `Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares
      minimization <https://arxiv.org/abs/1201.5885>`_, 2012, for the acceleration.
    """

    max_parameters: int = 4096
    space: Space | None = None
    max_outputs: int = 4096
    acceleration: float | None = None

    def __post_init__(self):
        check_fields(self, FROM_ONE, "max_parameters", "max_outputs")
        check_choice("space", self.space, (None, "parameters", "outputs"))
        check_fields(self, POSITIVE, "acceleration", or_none=True)

    def solve(self, system: System, /) -> Solution:
        """Returns the solution; ``num_steps`` is 1."""
        if isinstance(system.ggn, PackedGGN):
            return _on_trees(self, system, system.ggn)
        b, unravel = ravel_pytree(system.right_hand_side)
        wide = trees.at_least_f32(b)  # no library factorizes matrices in low precision
        space = self._space(system, b)
        done = _in_outputs(system, wide) if space == "outputs" else _in_parameters(system, wide, unravel)
        direction = done.solve(wide)
        if self.acceleration is not None and system.ggn.num_outputs is not None:
            direction = self._accelerated(system.ggn, unravel(direction.astype(b.dtype)), direction, done)
        residual = wide - done.times(direction)
        tree = lambda vector: unravel(vector.astype(b.dtype))
        return Solution(
            tree(direction),
            tree(residual),
            jnp.ones((), jnp.int32),
            jnp.linalg.norm(residual).astype(jnp.float32),
            tree(done.damping(direction)) if system.operators.damping_after_preconditioner else (),
        )

    def _space(self, system: System, b: jax.Array) -> Space:
        """Returns where the matrix is formed.

        Raises:
          ValueError: if it would be too large, with its size.
        """
        num_outputs = system.ggn.num_outputs
        has_outputs = num_outputs is not None and isinstance(system.operators.damping, Scale)
        if self.space == "outputs" and not has_outputs:
            raise ValueError(
                '`Exact(space="outputs")` needs damping that is a number per tensor or per parameter, real '
                "outputs, and one batch for all devices; leave `space` out, or use `PCG`"
            )
        count = num_outputs if has_outputs and num_outputs is not None else b.size
        smaller: Space = "outputs" if has_outputs and count < b.size else "parameters"
        space = self.space or smaller
        limit = self.max_outputs if space == "outputs" else self.max_parameters
        size = count if space == "outputs" else b.size
        if size > limit:
            raise ValueError(
                f"`Exact()` would form a matrix of {size:,} x {size:,} numbers, "
                f"{size**2 * b.dtype.itemsize / 2**30:.1f} GiB, for {b.size:,} parameters and "
                f"{'complex' if num_outputs is None else f'{num_outputs:,}'} outputs; use `PCG`, or raise "
                f"`max_{space}` from {limit:,}"
            )
        return space

    def _accelerated(self, ggn: GGN, tree: Any, direction: jax.Array, done: "_Factorized") -> jax.Array:
        """Returns the direction and half of what the bend of the model adds to it."""
        bend = ggn.bend(tree)
        if bend is None:  # the model has no second derivative
            return direction
        bent = done.of_outputs(ggn.curved(bend)).astype(direction.dtype)
        limit: Any = self.acceleration
        is_small = 2 * jnp.linalg.norm(bent) <= limit * jnp.linalg.norm(direction)  # NaN is not
        return direction + jnp.where(is_small, bent / 2, 0.0)


@dataclasses.dataclass(frozen=True)
class BySize:
    """The solver that the sizes of a problem call for: exact where that is cheap, else CG to a tolerance.

    Exact is a Cholesky factorization in the space of parameters or of outputs, whichever is smaller
    (:class:`Exact`), if the Jacobian fits into 1 GiB and the factorization takes at most some ten seconds of
    one core (:func:`mlhf_optax.dense.cheaper_space`). Sizes are those of shapes, so nothing is chosen at run
    time.

    Args:
      num_steps: most CG steps.
      tolerance: relative tolerance of CG.
      acceleration: as that of :class:`Exact`; CG has none.

    Example:
      >>> BySize(num_steps=50).tolerance
      0.01
    """

    num_steps: int = 200
    tolerance: float = 1e-2
    acceleration: float | None = 0.75

    def __post_init__(self):
        TolerancePCG(self.num_steps, self.tolerance)  # checks both
        check_fields(self, POSITIVE, "acceleration", or_none=True)

    def solve(self, system: System, /) -> Solution:
        """Returns the solution of the solver that the sizes call for."""
        if isinstance(system.ggn, PackedGGN):
            return _on_trees(self, system, system.ggn)
        size = system.ggn.num_params
        space = cheaper_space(size, system.ggn.num_outputs)
        if space is None:
            return TolerancePCG(self.num_steps, self.tolerance, is_relative=True).solve(system)
        limit = max(size, system.ggn.num_outputs or 0)
        return Exact(limit, space, limit, self.acceleration).solve(system)


class _Factorized(NamedTuple):
    """A matrix ``G + S`` that has been factorized; four functions of vectors.

    Attributes:
      solve: ``(G + S)^-1 b`` for the right-hand side b.
      of_outputs: ``(G + S)^-1 J^T u`` for u of shape (M,).
      times: the product with ``G + S``.
      damping: the product with S.
    """

    solve: Callable[[jax.Array], jax.Array]
    of_outputs: Callable[[jax.Array], jax.Array]
    times: Callable[[jax.Array], jax.Array]
    damping: Callable[[jax.Array], jax.Array]


def _in_parameters(system: System, b: jax.Array, unravel: Any) -> _Factorized:
    """Factorizes ``G + S``; rows and columns are scaled to a diagonal of ones first."""
    operator = system.operators.damping
    if isinstance(operator, Scale):
        own = _vector(operator, system.right_hand_side)
        damping, matrix = (lambda v: own * v), system.ggn.matrix + jnp.diag(own)
    else:
        of_unit = lambda unit: ravel_pytree(operator(unravel(unit)))[0]
        units = jnp.eye(b.size, dtype=ravel_pytree(system.right_hand_side)[0].dtype)
        dense = trees.at_least_f32(jax.vmap(of_unit)(units))
        damping, matrix = (lambda v: dense @ v), system.ggn.matrix + dense
    diagonal = jnp.diag(matrix)
    scale = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1.0))
    factor = jax.scipy.linalg.cho_factor(scale[:, None] * matrix * scale[None, :], lower=True)
    once = lambda r: scale * jax.scipy.linalg.cho_solve(factor, scale * r)
    times = lambda v: matrix @ v

    def solve(r: jax.Array) -> jax.Array:
        first = once(r)
        return first + once(r - times(first))

    return _Factorized(solve, lambda u: solve(u @ system.ggn.rows.jacobian), times, damping)


def _in_outputs(system: System, b: jax.Array) -> _Factorized:
    """Factorizes the matrix of Woodbury's identity.

    ``(S + J^T H J)^-1 J^T u = S^-1 J^T (1 + H K)^-1 u`` with ``K = J S^-1 J^T`` loses nothing where damping
    is small, unlike the identity for a vector that is no ``J^T u``. So what b is beside the gradient, mostly
    nothing but rounding, is left to the second form.
    """
    ggn, rows = system.ggn, system.ggn.rows
    own = _vector(system.operators.damping, system.right_hand_side)
    spread = rows.jacobian / own[None]
    kernel, one = spread @ rows.jacobian.T, jnp.eye(rows.jacobian.shape[0], dtype=b.dtype)
    if rows.weights is not None:
        root = jnp.sqrt(jnp.maximum(rows.weights, 0.0))  # of a loss that is convex in the outputs
        factor = jax.scipy.linalg.cho_factor(one + root[:, None] * kernel * root[None], lower=True)
        # (1 + H K)^-1 u = u - root (1 + root K root)^-1 root K u, and without a difference where u is root w.
        safe = jnp.where(root > 0, root, 1.0)
        inner = lambda u: jnp.where(root > 0, root * jax.scipy.linalg.cho_solve(factor, u / safe), 0.0)
        flat = lambda u: u - jnp.where(root > 0, u, 0.0)  # outputs without curvature
        outer = lambda u: inner(u - root**2 * (kernel @ flat(u))) + flat(u)
    else:
        lu = jax.scipy.linalg.lu_factor(one + jax.vmap(ggn.curved, in_axes=1, out_axes=1)(kernel))
        outer = lambda u: jax.scipy.linalg.lu_solve(lu, u)
    times = lambda v: (rows.curved @ v) @ rows.jacobian + own * v
    of_outputs = lambda u: outer(u) @ spread
    other = lambda r: (r - of_outputs(rows.curved @ (r / own)) * own) / own

    def invert(r: jax.Array) -> jax.Array:
        first = other(r)
        return first + other(r - times(first))

    def solve(r: jax.Array) -> jax.Array:
        first = of_outputs(ggn.slope)
        return first + invert(r - times(first))

    return _Factorized(solve, of_outputs, times, lambda v: own * v)


def _vector(operator: Any, like: Any) -> jax.Array:
    """Returns the diagonal of an operator, a number per parameter."""
    wide = lambda s, leaf: jnp.broadcast_to(s, leaf.shape).ravel().astype(trees.wide_dtype(leaf))
    return jnp.concatenate(jax.tree.leaves(jax.tree.map(wide, operator.values, like)))


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
        preconditioner=operators.preconditioner,
        **options,
    )
    return Solution(direction, residual, info.steps, info.residual_norm, info.shifted)


def _on_trees(solver: Solver, system: System, ggn: PackedGGN) -> Solution:
    """Returns the solution of a solver that writes matrices out, for a system on vectors."""
    pack, unpack = ggn.packing.pack, ggn.packing.unpack
    operators = system.operators
    damping = Product(operators.damping.values, lambda tree: unpack(operators.damping(pack(tree))))
    of_trees = System(
        ggn.of_trees,
        Operators(damping, damping_after_preconditioner=operators.damping_after_preconditioner),
        unpack(system.right_hand_side),
    )
    found = solver.solve(of_trees)
    damped = pack(found.damped) if operators.damping_after_preconditioner is not None else ()
    return found._replace(direction=pack(found.direction), residual=pack(found.residual), damped=damped)


def _check_some_steps(num_steps: Any) -> None:
    check_num_steps(num_steps, "num_cg_steps")
    if num_steps < 1:
        raise ValueError("`num_cg_steps` must be at least 1: without a step there is no direction")
