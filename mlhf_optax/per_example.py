"""What of a batch is per example: found out with shapes, and with made-up examples for the loss."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.curvature import Batch, LossFn, Outputs
from mlhf_optax.support import trees
from mlhf_optax.support.layer_types import path_text


class NoListOfExamplesError(ValueError):
    """A fraction was asked of a batch that cannot be cut by examples."""


NAMES = '("image", "label")'
REMEDY = (
    f"name what has one entry per example, as in `per_example={NAMES}`, pass a function `batch -> smaller "
    "batch` as `curvature_batch_size`, or None for the whole batch"
)
Run = Callable[[Any, Batch], tuple[Outputs, Any]]  # the outputs, and the loss if it is known


def find_per_example(batch: Batch, per_example: Sequence[Hashable] | None) -> Any:
    """Returns a tree of booleans shaped like the batch: which leaves are said to be per example."""
    with_none = jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda leaf: leaf is None)
    has = {path_text(path[:1]) for path, _ in with_none}
    names = has if per_example is None else set(map(str, per_example))
    if not names <= has:
        unknown = ", ".join(sorted(names - has))
        raise ValueError(f"`per_example` names {unknown}, but the batch has {', '.join(sorted(has))}")
    return jax.tree_util.tree_map_with_path(lambda path, _: path_text(path[:1]) in names, batch)


def num_examples(batch: Batch, is_cut: Any, output_shapes: list[tuple[int, ...]] | None) -> int:
    """Returns the length that all per-example leaves share, and the outputs where they are given."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    cut = [leaf for leaf, is_one in zip(leaves, jax.tree.leaves(is_cut), strict=True) if is_one]
    source, shapes = "other per-example arrays", [np.shape(leaf) for _, leaf in cut]
    size = max((shape[0] for shape in shapes if shape), default=0)
    if output_shapes is not None:
        source, size = "the outputs", output_shapes[0][0] if output_shapes and output_shapes[0] else 0
        if size == 0 or {shape[:1] for shape in output_shapes} != {(size,)}:
            raise NoListOfExamplesError(
                "`curvature_batch_size` needs outputs that share one leading batch dimension, got shapes "
                f"{output_shapes}; {REMEDY}"
            )
    for (path, _), shape in zip(cut, shapes, strict=True):
        if shape[:1] != (size,):
            raise NoListOfExamplesError(
                f"`curvature_batch_size` cuts per-example arrays, but '{path_text(path)}' of shape {shape} "
                f"does not begin with the {size} examples of {source}; {REMEDY}"
            )
    return size


def output_shapes(run: Run, params: chex.ArrayTree, batch: Batch, repeats: Any) -> list[tuple[int, ...]]:
    """Returns the shapes of the outputs on a batch of repeated leaves."""
    repeat = lambda leaf, times: leaf if times == 1 else jnp.concatenate([leaf] * times)
    longer = lambda params, batch: run(params, jax.tree.map(repeat, batch, repeats))
    outputs, _ = trees.shapes_of(longer, params, batch)
    return [leaf.shape for leaf in jax.tree.leaves(outputs)]


def check_longer_batch(
    run: Run, params: chex.ArrayTree, batch: Batch, is_cut: Any, shapes: list[tuple[int, ...]], times: int
) -> None:
    """Checks that a batch with more examples, all else unchanged, gives as many more outputs."""
    message = (
        f"`curvature_batch_size` cuts per-example arrays, but with {times} times as many entries in them the "
        "model or the loss does not work, or gives other than as many more outputs: some array is no "
        "per-example one, but model state that happens to be as long as the batch, or a per-example array "
        f"is not named; {REMEDY}"
    )
    try:
        longer = output_shapes(run, params, batch, jax.tree.map(lambda cut: times if cut else 1, is_cut))
    except Exception as error:  # whatever the model raises
        raise NoListOfExamplesError(message) from error
    if longer != [tuple(times * n if axis == 0 else n for axis, n in enumerate(shape)) for shape in shapes]:
        raise NoListOfExamplesError(message)


def check_every_length_counts(
    run: Run, params: chex.ArrayTree, batch: Batch, shapes: list[tuple[int, ...]], times: int
) -> None:
    """Checks that no leaf can be longer by itself, as a table of class weights or a pool of vectors can."""
    leaves, treedef = jax.tree.flatten(batch)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(batch)]
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        alone = treedef.unflatten([times if j == i else 1 for j in range(len(leaves))])
        unread = treedef.unflatten([object() if j == i else other for j, other in enumerate(leaves)])
        is_free = trees.attempt(output_shapes, run, params, batch, alone) == shapes
        if is_free and trees.attempt(trees.shapes_of, run, params, unread) is None:
            raise NoListOfExamplesError(
                f"'{path_text(path)}' of shape {np.shape(leaf)} is as long as the batch, but model and loss "
                "do not need it to be: it may be no per-example array, and `curvature_batch_size` would cut "
                f"it unnoticed; {REMEDY}"
            )


def check_mean(loss_fn: LossFn, outputs: Any, batch: Batch, is_cut: Any, size: int) -> None:
    """Checks that a loss of twice as many examples, each of them twice, is not twice as large.

    Args:
      loss_fn: the loss.
      outputs: the shapes of the outputs on the batch.
      batch: the batch.
      is_cut: which of its leaves are per example.
      size: number of examples.
    """
    if _is_sum(loss_fn, outputs, batch, is_cut, size):
        raise NoListOfExamplesError(
            "`loss_fn` adds up over the examples, and a part of the batch has a part of the sum's curvature; "
            "take the mean over the examples, or pass `curvature_batch_size=None` for the whole batch"
        )


def _is_sum(loss_fn: LossFn, outputs: Any, batch: Batch, is_cut: Any, size: int) -> bool:
    """Says whether the loss is a sum over examples, told from its values on made-up ones."""
    # An output without a first axis is one for the whole batch.
    is_long = jax.tree.map(lambda leaf: leaf.ndim > 0, outputs)
    lengths = _made_up_lengths([*jax.tree.leaves(outputs), *jax.tree.leaves(batch)])

    def ratio(integer: int, draw: Callable[[tuple[int, ...]], np.ndarray]) -> float:
        def repeated(leaf: Any, cut: bool, times: int, draw: Callable[[tuple[int, ...]], np.ndarray]) -> Any:
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                return leaf
            shape: Any = [lengths.get(n, n) for n in leaf.shape]
            if cut:
                each: int = leaf.shape[0] // size
                shape[0] = _EXAMPLES * lengths.get(each, each)
            one = _made_up(leaf.dtype, tuple(shape), integer, draw)
            return jnp.concatenate([one] * times) if cut else one

        def value(times: int) -> float:
            given = jax.tree.map(lambda leaf, cut: repeated(leaf, cut, times, np.ones), batch, is_cut)
            predicted = jax.tree.map(lambda leaf, cut: repeated(leaf, cut, times, draw), outputs, is_long)
            if jax.make_jaxpr(lambda: loss_fn(predicted, given))().effects:
                raise TypeError("a loss that prints would print what was made up")
            return float(jax.jit(loss_fn)(predicted, given))  # compiled once, as the function is the same

        one = value(1)
        return value(2) / one if one else math.nan

    for integer, draw in ((0, _normal), (1, _shares)):
        try:
            with jax.ensure_compile_time_eval():
                found = ratio(integer, draw)
        except Exception:  # a loss that cannot be called on made-up examples tells nothing
            continue
        if math.isfinite(found):
            return abs(found - 2) < 1e-3
    return False


_EXAMPLES = 2
_MOST_NUMBERS = 2**18


def _made_up_lengths(leaves: list[Any]) -> dict[int, int]:
    """Returns shorter lengths of axes in place of long ones, where a few examples are large themselves."""
    shapes = [np.shape(leaf) for leaf in leaves]
    if sum(math.prod(shape[1:]) for shape in shapes) <= _MOST_NUMBERS:
        return {}
    lengths = sorted({n for shape in shapes for n in shape if n > _SHORT})
    return {n: _SHORT + 1 + i for i, n in enumerate(lengths)}  # different ones stay different


_SHORT = 8


def _made_up(dtype: Any, shape: tuple[int, ...], integer: int, draw: Callable[..., np.ndarray]) -> Any:
    """Returns an array of a dtype: drawn numbers, masks that count, integers, or keys."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(jnp.empty((), dtype))), shape)
    if jnp.issubdtype(dtype, jnp.inexact):
        return draw(shape).astype(dtype)
    return np.full(shape, True if dtype == jnp.bool_ else integer, dtype)


def _normal(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _shares(shape: tuple[int, ...]) -> np.ndarray:
    """Returns numbers between 0 and 1, for losses that take logarithms of outputs."""
    return np.random.default_rng(0).uniform(0.1, 0.9, shape)
