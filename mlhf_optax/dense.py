"""The generalized Gauss-Newton matrix as a product, and written out where that is asked for."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from mlhf_optax.jacobian import is_elementwise, rows_per_example
from mlhf_optax.support import loops, placement, trees
from mlhf_optax.support.packing import AnyPacking, Vector

Matvec = Callable[[chex.ArrayTree], chex.ArrayTree]
Space = Literal["parameters", "outputs"]

AT_ONCE = 256  # derivatives of a model that are taken at the same time
MAX_NUMBERS = 2**27
"""Most numbers of a Jacobian that an optimizer forms by itself: 1 GiB in double precision."""
MAX_OPERATIONS = 4e11
"""Most multiplications of a solve that an optimizer chooses by itself: some ten seconds of one core."""


def cheaper_space(num_params: int, num_outputs: int | None) -> Space | None:
    """Returns where the system of a step is written out: the smaller of two spaces.

    Args:
      num_params: N.
      num_outputs: M, or None where outputs have no space of their own.

    Returns:
      The space, or None where a matrix would be too large and CG takes its place.

    Example:
      >>> cheaper_space(129, 1016), cheaper_space(10_000, 2_000), cheaper_space(10**6, 10**6)
      ('parameters', 'outputs', None)
    """
    if num_outputs is None:
        return "parameters" if num_params <= 2048 else None
    small = min(num_params, num_outputs)
    too_much = 2 * num_params * num_outputs * small > MAX_OPERATIONS
    if num_params * num_outputs > MAX_NUMBERS or too_much or small**2 > MAX_NUMBERS:
        return None
    return "parameters" if num_params <= num_outputs else "outputs"


class Linearization(NamedTuple):
    """A model at one point, as :mod:`mlhf_optax.curvature` makes it.

    Attributes:
      params: the point.
      outputs: shapes and dtypes of the outputs, those that are floating-point.
      push_forward: ``v -> J v``.
      curvature: the product with ``H_l``, on such outputs.
      slope: returns the gradient of the loss by the outputs.
      bend: ``v -> d^2 outputs(params + t v) / dt^2`` at t = 0.
      axis_name: axis along which batches differ.
      has_convolutions: whether the model has any.
    """

    params: chex.ArrayTree
    outputs: list[Any]
    push_forward: Callable[[Any], list[jax.Array]]
    curvature: Callable[[list[jax.Array]], list[jax.Array]]
    slope: Callable[[], list[jax.Array]]
    bend: Callable[[Any], list[jax.Array]]
    axis_name: placement.AxisName = None
    has_convolutions: bool = False


class Rows(NamedTuple):
    """The Jacobian written out.

    Attributes:
      jacobian: J, shape (M, N), parameters in the order of ``ravel_pytree``.
      curved: ``H_l J``, shape (M, N).
      weights: the diagonal of ``H_l``, shape (M,), where it has no more than that; else None.
    """

    jacobian: jax.Array
    curved: jax.Array
    weights: jax.Array | None


class GGN:
    """A product with the GGN, which can also be asked for the whole matrix.

    Args:
      matvec: the product.
      at: the model at the point where the matrix is taken.

    Example:
      >>> from mlhf_optax import ggn_matvec
      >>> ggn = ggn_matvec(lambda w, b: b * w, lambda z, b: jnp.sum(z**2), jnp.ones(2), jnp.array([1.0, 2.0]))
      >>> ggn(jnp.ones(2)), ggn.matrix
      (Array([2., 8.], dtype=float32), Array([[2., 0.],
             [0., 8.]], dtype=float32))
    """

    def __init__(self, matvec: Matvec, at: Linearization):
        self._matvec, self._at = matvec, at

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """Returns the product with a vector."""
        return self._matvec(vector)

    @property
    def num_params(self) -> int:
        """N, how many parameters there are."""
        return trees.size(self._at.params)

    @property
    def has_convolutions(self) -> bool:
        """Whether the model has any, also in loops and functions that it calls."""
        return self._at.has_convolutions

    @property
    def num_outputs(self) -> int | None:
        """M, how many outputs there are; None where they are complex, or differ from device to device."""
        is_complex = any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in self._at.outputs)
        return None if is_complex or self._at.axis_name is not None else sum(map(_count, self._at.outputs))

    @functools.cached_property
    def rows(self) -> Rows:
        """The Jacobian, worked out once: an example a row where they can be told apart."""
        if self.num_outputs is None:
            raise ValueError(
                "outputs that are complex, or that differ from device to device, have no Jacobian of their "
                "own; take the matrix in the space of parameters"
            )
        at, (flat, unravel) = self._at, ravel_pytree(self._at.params)
        jacobian = jnp.concatenate([_rows_of(at, i, flat.size, unravel) for i in range(len(at.outputs))])
        if is_elementwise(at.curvature, at.outputs):
            weights = self.joined(at.curvature([jnp.ones(leaf.shape, leaf.dtype) for leaf in at.outputs]))
            return Rows(jacobian, weights[:, None] * jacobian, weights)
        return Rows(jacobian, jax.vmap(self.curved, in_axes=1, out_axes=1)(jacobian), None)

    @functools.cached_property
    def matrix(self) -> jax.Array:
        """The matrix, shape (N, N), in the order of ``ravel_pytree``; worked out once."""
        if self.num_outputs is not None:
            return self.rows.jacobian.T @ self.rows.curved
        at, (flat, unravel) = self._at, ravel_pytree(self._at.params)
        of_unit = lambda unit: at.push_forward(placement.mark_varying(unravel(unit), at.axis_name))
        jacobian = loops.in_batches(of_unit, jnp.eye(flat.size, dtype=flat.dtype), batch_size=AT_ONCE)
        curved = jax.vmap(at.curvature)(jacobian)
        rows = lambda tree: jnp.concatenate(
            [trees.at_least_f32(leaf.reshape(flat.size, -1)) for leaf in tree], axis=1
        )
        # Of complex outputs J^T u is the real part, as the parameters are real.
        return placement.mean_over(jnp.real(rows(jacobian) @ rows(curved).T), at.axis_name)

    @functools.cached_property
    def diagonal(self) -> jax.Array:
        """The diagonal of the matrix, shape (N,)."""
        if self.num_outputs is None or "matrix" in self.__dict__:
            return jnp.diag(self.matrix)
        return jnp.sum(self.rows.jacobian * self.rows.curved, axis=0)

    @functools.cached_property
    def mean_diagonal(self) -> jax.Array:
        """An estimate of the mean of the diagonal from one product, with a vector of random signs."""
        flat, unravel = ravel_pytree(self._at.params)
        signs = unravel(jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], flat.size), flat.dtype))
        return trees.vdot(signs, self(signs)) / flat.size

    @functools.cached_property
    def slope(self) -> jax.Array:
        """The gradient of the loss by the outputs, shape (M,): ``J^T slope`` is that by the parameters."""
        return self.joined(self._at.slope())

    def bend(self, direction: chex.ArrayTree) -> jax.Array | None:
        """Returns the second derivative of the outputs along a direction, shape (M,), if there is one."""
        if trees.attempt(jax.eval_shape, self._at.bend, direction) is None:
            return None
        return self.joined(self._at.bend(direction))

    def curved(self, vector: jax.Array) -> jax.Array:
        """Returns ``H_l`` times a vector of shape (M,)."""
        ends = list(itertools.accumulate(map(_count, self._at.outputs)))
        parts = zip(jnp.split(vector, ends[:-1]), self._at.outputs, strict=True)
        return self.joined(self._at.curvature([x.reshape(s.shape).astype(s.dtype) for x, s in parts]))

    def joined(self, leaves: list[jax.Array]) -> jax.Array:
        """Returns outputs as one vector."""
        return jnp.concatenate([trees.at_least_f32(leaf).ravel() for leaf in leaves])


class PackedGGN(NamedTuple):
    """The product of a GGN on vectors of a packing.

    Attributes:
      of_trees: the GGN on trees like the parameters.
      packing: how these are packed.
    """

    of_trees: GGN
    packing: AnyPacking

    def __call__(self, vector: Vector) -> Vector:
        """Returns the product with a vector."""
        return self.packing.pack(self.of_trees(self.packing.unpack(vector)))

    @property
    def has_convolutions(self) -> bool:
        """Whether the model has any."""
        return self.of_trees.has_convolutions


def _count(leaf: Any) -> int:
    return math.prod(leaf.shape)


def _rows_of(at: Linearization, which: int, num_params: int, unravel: Callable) -> jax.Array:
    """Returns the rows of one of the outputs, shape (M, N)."""
    output = at.outputs[which]
    forward = lambda v: at.push_forward(v)[which]
    transposed = jax.linear_transpose(forward, at.params)
    pull_back = lambda u: transposed(u)[0]
    flat = lambda leaf, count: trees.at_least_f32(leaf.reshape(count, -1))
    size, others = (output.shape[0], output.shape[1:]) if output.shape else (1, ())
    each = math.prod(others)
    if each <= num_params:
        rows = trees.attempt(rows_per_example, pull_back, output)
        seed = jax.ShapeDtypeStruct(others, output.dtype)
        if rows is not None and trees.attempt(jax.eval_shape, rows, seed) is not None:
            of_unit = lambda seed: jnp.concatenate(
                [flat(leaf, size) for leaf in jax.tree.leaves(rows(seed.reshape(others)))], axis=1
            )
            units = jnp.eye(each, dtype=output.dtype)
            found = of_unit(units[0])[None] if each == 1 else loops.in_batches(of_unit, units, batch_size=16)
            return jnp.moveaxis(found, 0, 1).reshape(size * each, num_params)
    count = size * each
    if count < num_params:
        row = lambda unit: jnp.concatenate(
            [flat(leaf, 1)[0] for leaf in jax.tree.leaves(pull_back(unit.reshape(output.shape)))]
        )
        return loops.in_batches(row, jnp.eye(count, dtype=output.dtype), batch_size=AT_ONCE)
    column = lambda unit: flat(forward(unravel(unit)), 1)[0]
    dtype = jnp.result_type(*jax.tree.leaves(at.params))
    return loops.in_batches(column, jnp.eye(num_params, dtype=dtype), batch_size=AT_ONCE).T
