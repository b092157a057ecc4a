"""Rows of a Jacobian, all examples at once: reverse mode that does not sum over examples.

Of a model whose i-th output depends on the i-th example alone, the derivative of one output is a pass over
one example. A product ``J^T u`` is such passes for all examples, summed. Here the program of the product is
run for
a u of ones, and wherever it sums over examples, it keeps them apart: one pass over the batch gives one row
for every example. Columns by forward mode take as many passes as there are parameters.

Nothing is assumed of the model. A value that depends on u is known as ``Piece``: either the parts that belong
to different examples lie side by side along one axis, or each has a copy of its own. A program that mixes
examples in another way, or that loops, raises :class:`MixedError`, and the caller takes another road.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class MixedError(ValueError):
    """Examples cannot be told apart in the program of a model."""


class Piece(NamedTuple):
    """Values that depend on some of the examples.

    Attributes:
      start: the first of the examples.
      length: how many there are.
      axis: the axis of the value along which they lie; None if they have a leading axis of their own.
      value: the array.
    """

    start: int
    length: int
    axis: int | None
    value: jax.Array


Pieces = list[Piece]  # a value, the sum of what its pieces stand for; an empty list is zero


def rows_per_example(pull_back: Callable[[jax.Array], Any], outputs: jax.ShapeDtypeStruct) -> Any:
    """Returns the rows of a Jacobian, those of one output of every example at a time.

    Args:
      pull_back: ``u -> J^T u``, linear, from an array like ``outputs`` to a tree of parameters.
      outputs: shape and dtype of the outputs, with the examples along the first axis.

    Returns:
      A function of a tensor of the shape of one example's output. Ones at one place of it give the rows of
      that
      output: a tree like the parameters with a leading axis of examples.

    Raises:
      MixedError: where examples cannot be told apart.

    Example:
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> rows = rows_per_example(lambda u: u @ x, jax.ShapeDtypeStruct((2,), x.dtype))
      >>> rows(jnp.ones(()))
      Array([[1., 2.],
             [3., 4.]], dtype=float32)
    """
    if not outputs.shape:
        raise MixedError("the output is one number, of no example")
    program, shapes = jax.make_jaxpr(pull_back, return_shape=True)(outputs)
    size = outputs.shape[0]
    most = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    def rows(seed: jax.Array) -> Any:
        u = jnp.broadcast_to(seed.astype(outputs.dtype), outputs.shape)
        found = _run(program.jaxpr, program.consts, [[Piece(0, size, 0, u)]], most)
        leaves, treedef = jax.tree.flatten(shapes)
        return treedef.unflatten([_assembled(v, size, s) for v, s in zip(found, leaves, strict=True)])

    return rows


def _assembled(value: Any, size: int, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a result with a leading axis of all examples."""
    parts, at = [], 0
    zeros = lambda count: jnp.zeros((count, *shape.shape), shape.dtype)
    for piece in sorted(value if isinstance(value, list) else [], key=lambda p: p.start):
        if piece.axis is not None:
            raise MixedError("a parameter has one entry per example")
        parts += [zeros(piece.start - at), piece.value]
        at = piece.start + piece.length
    return jnp.concatenate([*parts, zeros(size - at)])


def _run(jaxpr: Any, consts: Any, arguments: list[Any], most: int) -> list[Any]:
    """Evaluates a program in which some values are :class:`Piece` lists, the others arrays.

    ``most`` is how large the copy of one example may be: all parameters together. What is larger is of the
    size of the batch, and copies of that would be as many passes over the batch, all at once.
    """
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda atom: atom.val if hasattr(atom, "val") else known[atom]
    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        if any(isinstance(value, list) for value in values):
            results = _equation(equation, values, most)
        else:
            results = _bind(equation, values)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(equation: Any, values: list[Any]) -> list[Any]:
    params: Any = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before jax 0.10
    result = equation.primitive.bind(*functions, *values, **params)
    return list(result) if equation.primitive.multiple_results else [result]


_SUMS = ("add_any", "add", "sub")
_ELEMENTWISE = ("neg", "mul", "div", "select_n", "convert_element_type", "copy", "real", "imag")


def _equation(equation: Any, values: list[Any], most: int) -> list[Any]:
    """Returns what an equation gives, one entry per output."""
    name, inner = equation.primitive.name, equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    if name in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint") and inner is not None:
        closed = hasattr(inner, "consts")
        return _run(inner.jaxpr if closed else inner, inner.consts if closed else [], values, most)
    if name in _SUMS:
        # In a linear program, what does not depend on u and is added to what does is zero.
        first, second = (value if isinstance(value, list) else [] for value in values)
        if name == "sub":
            second = [piece._replace(value=-piece.value) for piece in second]
        return [_added(first, second)]
    dependent = [at for at, value in enumerate(values) if isinstance(value, list)]
    if name == "split":
        return _split(equation, values[0])
    if len(dependent) > 1 and name not in ("select_n", "concatenate"):
        raise MixedError(f"`{name}` of two values that depend on the outputs")
    total: Pieces = []
    for at in dependent:  # a sum of the same with all but one operand zero
        alone = [_array(v, atom) for v, atom in zip(values, equation.invars, strict=True)]
        pieces = [_piece(equation, alone, at, piece) for piece in values[at]]
        if any(piece.axis is None for piece in pieces) and equation.outvars[0].aval.size > most:
            raise MixedError(f"`{name}` of a copy for every example")
        total = _added(total, pieces)
    return [total]


def _array(value: Any, atom: Any) -> Any:
    return jnp.zeros(atom.aval.shape, atom.aval.dtype) if isinstance(value, list) else value


def _added(first: Pieces, second: Pieces) -> Pieces:
    result = list(first)
    for piece in second:
        for at, other in enumerate(result):
            if other[:2] == piece[:2]:
                if other.axis != piece.axis:
                    raise MixedError("a sum of values in which examples lie along different axes")
                result[at] = other._replace(value=other.value + piece.value)
                break
            if other.start < piece.start + piece.length and piece.start < other.start + other.length:
                raise MixedError("a sum of values of different examples")
        else:
            result.append(piece)
    return result


def _split(equation: Any, pieces: Any) -> list[Any]:
    results: list[Pieces] = [[] for _ in equation.outvars]
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    for piece in pieces:
        split = lambda x: jax.lax.split(x, sizes, axis)
        parts = jax.vmap(split)(piece.value) if piece.axis is None else split(piece.value)
        start = piece.start
        for result, part, size in zip(results, parts, sizes, strict=True):
            if piece.axis == axis:
                result.append(Piece(start, size, axis, part))
                start += size
            else:
                result.append(piece._replace(value=part))
    return results


def _piece(equation: Any, values: list[Any], at: int, piece: Piece) -> Piece:
    """Returns what an equation with one dependent operand, the one at ``at``, makes of a piece of it."""
    bind = lambda *operands: _bind(equation, list(operands))[0]
    if piece.axis is None:
        each = lambda part: bind(*[part if i == at else value for i, value in enumerate(values)])
        return piece._replace(value=jax.vmap(each)(piece.value))
    value, axis = piece.value, piece.axis
    name, params, shape = equation.primitive.name, equation.params, value.shape
    new: int | None = -1
    start, length = piece.start, piece.length
    if name in _ELEMENTWISE:
        new = axis if equation.outvars[0].aval.shape == shape else -1
    elif name == "transpose":
        new = list(params["permutation"]).index(axis)
    elif name == "broadcast_in_dim":
        new = int(params["broadcast_dimensions"][axis])
        new = new if params["shape"][new] == shape[axis] else -1
    elif name == "reshape":
        new = _reshaped(shape, params["new_sizes"], axis) if params["dimensions"] is None else -1
    elif name == "squeeze":
        gone = [d % len(shape) for d in params["dimensions"]]
        new = -1 if axis in gone else axis - sum(d < axis for d in gone)
    elif name == "reduce_sum":
        axes = params["axes"]
        if axis in axes:
            kept = jnp.moveaxis(value, axis, 0)
            order = [a for a in range(len(shape)) if a != axis]
            return piece._replace(axis=None, value=kept.sum([order.index(a) + 1 for a in axes if a != axis]))
        new = axis - sum(a < axis for a in axes)
    elif name == "dot_general":
        return _dot(equation, values, at, piece)
    elif name == "slice":
        strides = params["strides"]
        low, high = params["start_indices"][axis], params["limit_indices"][axis]
        if strides is None or strides[axis] == 1:
            new, start, length = axis, piece.start + low, high - low
    elif name == "pad":
        new = axis if tuple(params["padding_config"][axis]) == (0, 0, 0) else -1
    elif name in ("concatenate", "rev", "cumsum"):
        along = params["dimension"] if name == "concatenate" else params.get("axis", params.get("dimensions"))
        new = -1 if axis in np.atleast_1d(along) else axis
    elif name == "reduce_precision":
        new = axis
    if new == -1:
        raise MixedError(f"`{name}`, which may mix examples")
    operands = [value if i == at else operand for i, operand in enumerate(values)]
    return Piece(start, length, new, bind(*operands))


def _reshaped(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int:
    """Returns where an axis lies after a reshape that leaves it as it is; -1 if it does not."""
    before = math.prod(old[:axis])
    for at, size in enumerate(new):
        if size == old[axis] and math.prod(new[:at]) == before:
            return at
    return -1


def _dot(equation: Any, values: list[Any], at: int, piece: Piece) -> Piece:
    """Returns a product of arrays; one that sums over examples keeps them apart."""
    contracting, batching = equation.params["dimension_numbers"]
    axis: Any = piece.axis
    contracted, batched = list(contracting[at]), list(batching[at])
    operands = [piece.value if i == at else value for i, value in enumerate(values)]
    bind = lambda *both: _bind(equation, list(both))[0]
    if axis in contracted:
        along: list[Any] = [0, 0]
        along[at], along[1 - at] = axis, contracting[1 - at][contracted.index(axis)]
        each = lambda a, b: bind(jnp.expand_dims(a, along[0]), jnp.expand_dims(b, along[1]))
        return piece._replace(axis=None, value=jax.vmap(each, in_axes=tuple(along))(*operands))
    if axis in batched:
        return piece._replace(axis=batched.index(axis), value=bind(*operands))
    is_free = lambda i, d: d not in contracting[i] and d not in batching[i]
    free = [d for d in range(operands[at].ndim) if is_free(at, d)].index(axis)
    if at == 1:
        free += sum(is_free(0, d) for d in range(operands[0].ndim))
    return piece._replace(axis=len(batched) + free, value=bind(*operands))


_EACH_NUMBER = (
    "add",
    "add_any",
    "sub",
    "mul",
    "div",
    "neg",
    "copy",
    "convert_element_type",
    "select_n",
    "integer_pow",
)


def is_elementwise(function: Callable[[Any], Any], shapes: Any) -> bool:
    """Whether a linear function multiplies each number by one of its own, as far as its program tells.

    Example:
      >>> is_elementwise(lambda x: 2 * x, jnp.ones(3)), is_elementwise(lambda x: x - x.mean(), jnp.ones(3))
      (True, False)
    """
    program = jax.make_jaxpr(function)(shapes)

    def holds(jaxpr: Any, depends: list[bool]) -> tuple[bool, list[bool]]:
        known = {var for var, is_one in zip(jaxpr.invars, depends, strict=True) if is_one}
        for equation in jaxpr.eqns:
            used = [not hasattr(atom, "val") and atom in known for atom in equation.invars]
            if not any(used):
                continue
            inner = equation.params.get("jaxpr")
            if equation.primitive.name in ("jit", "pjit") and inner is not None:
                fine, results = holds(inner.jaxpr, used)
                if not fine:
                    return False, []
            else:
                shapes = {
                    atom.aval.shape for atom, is_one in zip(equation.invars, used, strict=True) if is_one
                }
                shapes |= {out.aval.shape for out in equation.outvars}
                if equation.primitive.name not in _EACH_NUMBER or len(shapes) > 1:
                    return False, []
                results = [True] * len(equation.outvars)
            known |= {out for out, is_one in zip(equation.outvars, results, strict=True) if is_one}
        return True, [not hasattr(atom, "val") and atom in known for atom in jaxpr.outvars]

    # With several outputs a number could move from one to another of the same shape; each has to keep its
    # place.
    leaves = jax.tree.leaves(shapes)
    if not holds(program.jaxpr, [True] * len(leaves))[0]:
        return False
    for at in range(len(leaves)):
        found = holds(program.jaxpr, [i == at for i in range(len(leaves))])[1]
        if any(is_one for i, is_one in enumerate(found) if i != at):
            return False
    return True
