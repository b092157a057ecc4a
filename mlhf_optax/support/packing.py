"""All tensors of a tree in one array, for arithmetic that treats them alike.

A network has dozens of tensors, and a step does the same with each: products, means, factors. Written tensor
by tensor, a program grows with their number, and so does the time to compile it. Here a *vector* is all of
them at once, and the methods say what is done tensor by tensor. Where parameters lie cut over a mesh, one
array would gather them: there a vector is the list of tensors, with the same methods.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.support import placement, trees

LANES = 32  # a tensor begins at a multiple of so many numbers
_MOST_PRODUCTS = 16  # of one side, one after the other: programs must not grow with the width of layers

Vector = Any  # an array of shape (rows, LANES), or a list of tensors; `jax.tree.map` works on both


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the split of a shape into rows and columns that is nearest to a square; None for vectors.

    Example:
      >>> matrix_shape((3, 3, 16, 32)), matrix_shape((10,)), matrix_shape((1, 7))
      ((144, 32), None, None)
    """
    splits = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    best = min(splits, key=sum, default=None)
    return best if best is not None and min(best) > 1 else None


class Side(NamedTuple):
    """One side of the matrices of a group, in blocks along its diagonal.

    Attributes:
      parts: blocks of one matrix.
      size: rows of a block.
      which: the array of blocks in which they lie, all of that size.
      start: the first of them there; those of the next matrices follow.
    """

    parts: int
    size: int
    which: int
    start: int


class Group(NamedTuple):
    """Matrices of one shape.

    Attributes:
      tensors: their places among the leaves of the tree.
      shape: rows and columns.
      left: the side of the rows.
      right: the side of the columns.
    """

    tensors: tuple[int, ...]
    shape: tuple[int, int]
    left: Side
    right: Side


class Blocks(NamedTuple):
    """All blocks of one size.

    Attributes:
      size: their rows.
      tensors: the tensor that each belongs to, shape (blocks,).
      sides: ones where a block belongs to a side, shape (sides, blocks).
    """

    size: int
    tensors: np.ndarray
    sides: np.ndarray


class _Tensors:
    """What both packings know of the tensors.

    Attributes:
      sizes: numbers of each tensor, shape (tensors,).
      is_matrix: which of them are matrices, shape (tensors,).
      groups: the matrices, by shape.
      blocks: the blocks of their sides, one entry for every size.
    """

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], treedef: Any, block: int):
        self._shapes, self._treedef = shapes, treedef
        # Whole numbers, as float32 is exact up to 16 million alone.
        self._counts = np.array([math.prod(leaf.shape) for leaf in shapes], np.int64)
        self.sizes = self._counts.astype(np.float32)
        self.groups, self.blocks = _grouped([leaf.shape for leaf in shapes], block)
        self._in_groups = [tensor for group in self.groups for tensor in group.tensors]
        self.is_matrix = np.isin(np.arange(len(shapes)), self._in_groups)

    def _outer_by(self, products: Callable[[Group], tuple[jax.Array, jax.Array]]) -> jax.Array:
        """Returns the blocks of both sides of every group, flat."""
        pieces: list[list[jax.Array]] = [[] for _ in self.blocks]
        for group in self.groups:
            for side, blocks in zip((group.left, group.right), products(group), strict=True):
                pieces[side.which].append(blocks)
        return join(jnp.concatenate(own) for own in pieces)


class Packing(_Tensors):
    """Tensors one after the other in one array (:func:`packing_of`).

    Example:
      >>> packing = packing_of({"bias": jnp.ones(3), "kernel": jnp.full((2, 3), 2.0)}, block=128)
      >>> vector = packing.pack({"bias": jnp.ones(3), "kernel": jnp.full((2, 3), 2.0)})
      >>> vector.shape, packing.sums(vector, vector * vector).tolist()
      ((2, 32), [[3.0, 12.0], [3.0, 24.0]])
      >>> packing.unpack(vector)["bias"]
      Array([1., 1., 1.], dtype=float32)
    """

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], treedef: Any, block: int):
        super().__init__(shapes, treedef, block)
        self._dtype = trees.common_dtype(jnp.float32, *(leaf.dtype for leaf in shapes))
        # Matrices of one shape lie side by side, so that a product of all of them begins with a slice.
        self._order = [*self._in_groups, *np.flatnonzero(~self.is_matrix).tolist()]
        self._rows = -(-self._counts // LANES)
        rows = self._rows[self._order]
        self._starts = np.empty(len(shapes), np.int64)
        self._starts[self._order] = np.cumsum([0, *rows])[:-1]
        self._owner = np.repeat(np.array(self._order), rows).astype(np.int32)
        left = self._counts[self._owner] - LANES * (np.arange(rows.sum()) - self._starts[self._owner])
        self._filled = np.minimum(left, LANES).astype(np.int32)

    @property
    def filling(self) -> Vector:
        """One for each number that belongs to a tensor, zero for those that fill its last row."""
        lanes = jax.lax.broadcasted_iota(jnp.int32, (len(self._owner), LANES), 1)
        return (lanes < jnp.asarray(self._filled)[:, None]).astype(self._dtype)

    def pack(self, tree: chex.ArrayTree) -> Vector:
        """Returns a tree like the parameters as a vector, of at least float32."""
        leaves, parts = jax.tree.leaves(tree), []
        for tensor in self._order:
            parts.append(leaves[tensor].astype(self._dtype).ravel())
            if missing := -parts[-1].size % LANES:
                parts.append(jnp.zeros(missing, self._dtype))
        return jnp.concatenate(parts).reshape(-1, LANES)

    def unpack(self, vector: Vector, is_wide: bool = False) -> chex.ArrayTree:
        """Returns a vector as a tree like the parameters, in their dtypes or in at least float32."""
        flat, leaves = vector.ravel(), []
        for leaf, start in zip(self._shapes, self._starts.tolist(), strict=True):
            own = flat[start * LANES : start * LANES + math.prod(leaf.shape)].reshape(leaf.shape)
            leaves.append(own.astype(trees.wide_dtype(leaf) if is_wide else leaf.dtype))
        return self._treedef.unflatten(leaves)

    def sums(self, *vectors: Vector) -> jax.Array:
        """Returns the sum over every tensor of each vector, shape (vectors, tensors)."""
        of_rows = jnp.stack([jnp.sum(vector, axis=1) for vector in vectors], axis=1)
        return jax.ops.segment_sum(of_rows, self._owner, len(self._shapes)).T

    def spread(self, *values: jax.Array) -> tuple[Vector, ...]:
        """Returns numbers of tensors, each of shape (tensors,), as factors on vectors."""
        of_rows = jnp.stack([value.astype(self._dtype) for value in values], axis=1)[self._owner]
        return tuple(of_rows[:, i : i + 1] for i in range(len(values)))

    def outer(self, vector: Vector) -> jax.Array:
        """Returns the blocks of ``X X^T`` and ``X^T X`` of every matrix X, flat (:func:`split`)."""
        return self._outer_by(lambda group: _outer(self._matrices(group, vector), group))

    def sandwich(self, factors: jax.Array, vector: Vector) -> Vector:
        """Returns ``L X R`` for every matrix X; what is no matrix stays as it is.

        Args:
          factors: symmetric blocks, flat.
          vector: the vector.
        """
        split_factors, parts = split(self.blocks, factors), []
        for group in self.groups:
            left, right = _of_group(split_factors, group)
            product = _sandwich(left, right, self._matrices(group, vector), group)
            product = product.reshape(len(group.tensors), -1).astype(vector.dtype)
            if missing := -product.shape[1] % LANES:
                product = jnp.pad(product, ((0, 0), (0, missing)))
            parts.append(product.reshape(-1, LANES))
        end = sum(len(part) for part in parts)
        return jnp.concatenate([*parts, vector[end:]]) if parts else vector

    def _matrices(self, group: Group, vector: Vector) -> jax.Array:
        """Returns the matrices of a group, shape (tensors, rows, columns), float32."""
        first, count = group.tensors[0], len(group.tensors)
        start, rows = self._starts[first], self._rows[first]
        own = vector[start : start + count * rows].reshape(count, -1)
        own = own[:, : math.prod(group.shape)].astype(jnp.float32)
        return own.reshape(count, *group.shape)


class Unpacked(_Tensors):
    """The interface of :class:`Packing` for tensors that stay as they are, such as those cut over a mesh."""

    @property
    def filling(self) -> Vector:
        """Ones: no tensor is filled up."""
        return [jnp.ones((), trees.wide_dtype(leaf)) for leaf in self._shapes]

    def pack(self, tree: chex.ArrayTree) -> Vector:
        """Returns the tensors in a list, each in at least float32."""
        return [trees.at_least_f32(leaf) for leaf in jax.tree.leaves(tree)]

    def unpack(self, vector: Vector, is_wide: bool = False) -> chex.ArrayTree:
        """Returns a vector as a tree like the parameters, in their dtypes or in at least float32."""
        if not is_wide:
            vector = [x.astype(leaf.dtype) for x, leaf in zip(vector, self._shapes, strict=True)]
        return self._treedef.unflatten(vector)

    def sums(self, *vectors: Vector) -> jax.Array:
        """Returns the sum over every tensor of each vector, shape (vectors, tensors)."""
        return jnp.stack([jnp.stack([jnp.sum(tensor) for tensor in vector]) for vector in vectors])

    def spread(self, *values: jax.Array) -> tuple[Vector, ...]:
        """Returns numbers of tensors as factors on vectors."""
        numbers = lambda value: [
            value[i].astype(trees.wide_dtype(leaf)) for i, leaf in enumerate(self._shapes)
        ]
        return tuple(map(numbers, values))

    def outer(self, vector: Vector) -> jax.Array:
        """Returns the blocks of ``X X^T`` and ``X^T X`` of every matrix X, flat (:func:`split`)."""

        def products(group: Group) -> tuple[jax.Array, jax.Array]:
            own = functools.partial(self._outer_of, group)
            found = [placement.placed_by_compiler(own, vector[tensor]) for tensor in group.tensors]
            left, right = zip(*found, strict=True)
            return jnp.concatenate(left), jnp.concatenate(right)

        return self._outer_by(products)

    def sandwich(self, factors: jax.Array, vector: Vector) -> Vector:
        """Returns ``L X R`` for every matrix X; what is no matrix stays as it is."""
        split_factors, products = split(self.blocks, factors), list(vector)
        for group in self.groups:
            sides = [jnp.split(side, len(group.tensors)) for side in _of_group(split_factors, group)]
            own = functools.partial(self._sandwich_of, group)
            for tensor, left, right in zip(group.tensors, *sides, strict=True):
                x = vector[tensor]
                products[tensor] = placement.placed_by_compiler(own, left, right, x, like=x)
        return products

    @staticmethod
    def _outer_of(group: Group, tensor: jax.Array) -> tuple[jax.Array, jax.Array]:
        matrix = tensor.astype(jnp.float32).reshape(1, *group.shape)
        if group.left.parts == group.right.parts == 1:
            matrix = placement.replicated(matrix)  # no larger than the factors; else it is gathered twice
        return _outer(matrix, group, is_on_mesh=True)

    @staticmethod
    def _sandwich_of(group: Group, left: jax.Array, right: jax.Array, tensor: jax.Array) -> jax.Array:
        matrix = tensor.astype(jnp.float32).reshape(1, *group.shape)
        product = _sandwich(left, right, matrix, group, is_on_mesh=True)
        return product.reshape(tensor.shape).astype(tensor.dtype)


AnyPacking = Packing | Unpacked


def split(blocks: Sequence[Blocks], flat: jax.Array) -> list[jax.Array]:
    """Returns all blocks as arrays of shape (blocks, size, size), one for every size.

    A state holds them flat: its structure then does not depend on the parameters, which is what
    ``optax.tree.map_params`` asks for.
    """
    arrays, start = [], 0
    for own in blocks:
        end = start + len(own.tensors) * own.size**2
        arrays.append(flat[start:end].reshape(-1, own.size, own.size))
        start = end
    return arrays


def join(arrays: Iterable[jax.Array]) -> jax.Array:
    """Returns such arrays as one flat array, float32; the inverse of :func:`split`."""
    parts = [array.ravel() for array in arrays]
    return jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.float32)


def packing_of(params: chex.ArrayTree, block: int) -> AnyPacking:
    """Returns how a tree is packed: in one array, or not at all where a leaf lies on several devices.

    Args:
      params: tree of arrays.
      block: longest side of a block; a longer one is cut into parts of equal size.
    """
    leaves, treedef = jax.tree.flatten(params)
    kind = Unpacked if any(map(placement.is_on_mesh, leaves)) else Packing
    return _packing(kind, tuple((jnp.shape(leaf), leaf.dtype) for leaf in leaves), treedef, block)


@functools.lru_cache(maxsize=32)
def _packing(kind: type, shapes: tuple, treedef: Any, block: int) -> AnyPacking:
    return kind([jax.ShapeDtypeStruct(*leaf) for leaf in shapes], treedef, block)


def _parts(length: int, block: int) -> int:
    """Returns into how many blocks a side is cut: evenly, if a quarter more than the fewest is enough."""
    fewest = -(-length // block)
    even = (parts for parts in range(fewest, fewest + fewest // 4 + 1) if length % parts == 0)
    return next(even, fewest)


def _grouped(shapes: Sequence[tuple[int, ...]], block: int) -> tuple[list[Group], list[Blocks]]:
    """Returns the matrices by shape, and the blocks of their sides by size."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for tensor, shape in enumerate(shapes):
        if (matrix := matrix_shape(shape)) is not None:
            by_shape.setdefault(matrix, []).append(tensor)
    sizes: dict[int, int] = {}  # the place of every size
    ends: collections.Counter[int] = collections.Counter()
    owners: list[list[int]] = []
    sides: list[list[int]] = []

    def side(length: int, tensors: list[int]) -> Side:
        parts = _parts(length, block)
        size = -(-length // parts)
        which = sizes.setdefault(size, len(sizes))
        if which == len(owners):
            owners.append([])
            sides.append([])
        start = len(owners[which])
        for tensor in tensors:
            owners[which].extend([tensor] * parts)
            sides[which].extend([ends[which]] * parts)
            ends[which] += 1
        return Side(parts, size, which, start)

    groups = [
        Group(tuple(tensors), shape, side(shape[0], tensors), side(shape[1], tensors))
        for shape, tensors in by_shape.items()
    ]
    blocks = [
        Blocks(size, np.array(owners[i], np.int32), np.eye(ends[i], dtype=np.float32)[:, sides[i]])
        for size, i in sizes.items()
    ]
    return groups, blocks


def _of_group(factors: Sequence[jax.Array], group: Group) -> tuple[jax.Array, jax.Array]:
    """Returns the blocks of both sides of a group, shape (tensors * parts, size, size)."""

    def of_side(side: Side) -> jax.Array:
        all_of_size, count = factors[side.which], len(group.tensors) * side.parts
        whole = len(all_of_size) == count
        return all_of_size if whole else all_of_size[side.start : side.start + count]

    return of_side(group.left), of_side(group.right)


def _outer(x: jax.Array, group: Group, is_on_mesh: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the outer products of both sides of matrices (tensors, rows, columns)."""
    rows = _row_blocks(x, group.left)
    left = _product("bin,bjn->bij", rows, rows)
    if _is_by_rows(group.right, is_on_mesh):
        columns = _row_blocks(x.swapaxes(1, 2), group.right)
        return left, _product("bin,bjn->bij", columns, columns)
    parts = _column_parts(x, group.right)
    products = [_product("bni,bnj->bij", part, part) for part in parts]
    right = products[0] if len(products) == 1 else jnp.stack(products, axis=1)
    return left, right.reshape(-1, group.right.size, group.right.size)


def _sandwich(
    left: jax.Array, right: jax.Array, x: jax.Array, group: Group, is_on_mesh: bool = False
) -> jax.Array:
    """Returns ``L X R`` for matrices X (tensors, rows, columns)."""
    x = _times_row_blocks(left, x, group.left)
    if _is_by_rows(group.right, is_on_mesh):
        return _times_row_blocks(right, x.swapaxes(1, 2), group.right).swapaxes(1, 2)
    # One product per part: on CPUs a large matrix takes longer to transpose, and a transpose to compile.
    blocks = right.reshape(x.shape[0], group.right.parts, *right.shape[1:])
    parts = _column_parts(x, group.right)
    products = [_product("bni,bij->bnj", part, blocks[:, i]) for i, part in enumerate(parts)]
    return (products[0] if len(products) == 1 else jnp.concatenate(products, axis=2))[..., : x.shape[2]]


def _is_by_rows(side: Side, is_on_mesh: bool) -> bool:
    """Returns whether columns are turned into rows. On a mesh each part would be gathered by itself."""
    return side.parts > 1 and (is_on_mesh or side.parts > _MOST_PRODUCTS)


def _row_blocks(x: jax.Array, side: Side) -> jax.Array:
    """Cuts rows into blocks: from (tensors, rows, columns) to (tensors * parts, size, columns)."""
    missing = side.parts * side.size - x.shape[1]
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    return x.reshape(-1, side.size, x.shape[2])


def _times_row_blocks(blocks: jax.Array, x: jax.Array, side: Side) -> jax.Array:
    product = _product("bij,bjn->bin", blocks, _row_blocks(x, side))
    return product.reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]


def _column_parts(x: jax.Array, side: Side) -> list[jax.Array]:
    """Cuts columns into parts of equal size, the last one filled with zeros."""
    missing = side.parts * side.size - x.shape[2]
    if missing:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, missing)))
    return [x[:, :, i * side.size : (i + 1) * side.size] for i in range(side.parts)]


def _product(which: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum`` over a first axis b; of a single matrix without it, which is faster on CPUs."""
    if len(a) == len(b) == 1:
        return jnp.einsum(which.replace("b", ""), a[0], b[0])[None]
    return jnp.einsum(which, a, b)
