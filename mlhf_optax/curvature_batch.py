"""The part of a batch on which curvature is taken."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence, Set
from typing import Any

import chex
import jax
import numpy as np

from mlhf_optax.curvature import Batch, LossFn, Outputs, PredictFn
from mlhf_optax.per_example import (
    NAMES,
    REMEDY,
    NoListOfExamplesError,
    check_every_length_counts,
    check_longer_batch,
    check_mean,
    find_per_example,
    num_examples,
)
from mlhf_optax.support import placement, trees
from mlhf_optax.support.checks import POSITIVE_SHARE, check_number


@dataclasses.dataclass(frozen=True)
class ShareOrAll:
    """A fraction of the batch, or all of it where the batch is no list of examples.

    The default of meta-parameters that were trained on a fraction: the points of a differential equation, a
    graph, or a contrastive loss have curvature on the whole batch alone, and a warning says so.

    Args:
      fraction: in (0, 1].

    Raises:
      ValueError: for a fraction out of range.

    Example:
      >>> ShareOrAll(0.25).fraction
      0.25
    """

    fraction: float

    def __post_init__(self):
        check_number("fraction", self.fraction, POSITIVE_SHARE)


CurvatureBatch = int | float | ShareOrAll | Callable[[Batch], Batch] | None
PerExample = Sequence[Hashable] | None


def curvature_subset(
    predict_fn: PredictFn,
    params: chex.ArrayTree,
    batch: Batch,
    part: CurvatureBatch,
    per_example: PerExample = None,
    *,
    loss_fn: LossFn | None = None,
) -> Batch:
    """Returns the part of ``batch`` on which curvature is taken.

    A number of examples takes the first ones; a fraction takes examples at even distances. Of a batch sharded
    over devices that is the same share on each, and no example moves. Mini-batches are drawn at random, so
    either is a random sample.

    Which arrays have one entry per example is not guessed from their lengths: it is every array of the batch,
    or those that ``per_example`` names. The claim is tested, with shapes alone, whenever this is traced: with
    more entries in all per-example arrays, the model and the loss must still work and give as many more
    outputs. Without ``per_example``, no array may take more entries by itself: an array that does, such as a
    table of class weights as long as the batch, may be cut without any error. The loss must be a mean: a sum
    over a quarter of the examples has a quarter of the curvature.

    Args:
      predict_fn: ``predict_fn(params, batch) -> outputs``.
      params: parameters for ``predict_fn``.
      batch: pytree of arrays.
      part: ``None`` (whole batch), a number of examples (``int`` >= 1), a fraction (``float`` in (0, 1],
        rounded to at least one example, and to as many on every shard where the sharding is known: outside
        ``jit`` and on meshes with explicit axes), a :class:`ShareOrAll`, or a function ``batch -> smaller
        batch``.
      per_example: names at the top level of the batch (keys of a dict, fields of a dataclass or NamedTuple,
        positions of a tuple) below which every array has one entry per example along its first axis; all
        else, such as model state and keys, is kept whole. ``None``: every array of the batch has.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``; with it, what only the loss reads is tested too.

    Returns:
      The smaller batch.

    Raises:
      TypeError: if ``part`` or ``per_example`` is of another type.
      ValueError: if ``part`` is out of range, or the batch is not as ``per_example`` says; the message names
        the array and the remedy.

    Example:
      >>> import jax.numpy as jnp
      >>> predict = lambda w, batch: (batch["x"] - batch["mean"]) @ w
      >>> batch = {"x": jnp.ones((8, 2)), "mean": jnp.ones(2)}
      >>> small = curvature_subset(predict, jnp.ones(2), batch, 0.25, per_example=("x",))
      >>> small["x"].shape, small["mean"].shape
      ((2, 2), (2,))
    """
    check_curvature_batch(part, per_example)
    if part is None or (part == 1.0 and isinstance(part, float)):
        return batch
    if callable(part):
        return part(batch)
    if not isinstance(part, ShareOrAll):
        return _cut(predict_fn, params, batch, part, per_example, loss_fn)
    try:
        return _cut(predict_fn, params, batch, part.fraction, per_example, loss_fn)
    except NoListOfExamplesError as error:
        reason = str(error).split(f"; {REMEDY}")[0]
        warnings.warn(
            "curvature is taken on the whole batch, not on the default "
            f"`curvature_batch_size`={part.fraction}: "
            f"{reason}. Pass `curvature_batch_size=None` to say so, or, if the batch is a list of examples, "
            f"name what has one entry per example, as in `per_example={NAMES}`",
            stacklevel=2,
        )
        return batch


def _cut(
    predict_fn: PredictFn,
    params: chex.ArrayTree,
    batch: Batch,
    part: int | float,
    per_example: PerExample,
    loss_fn: LossFn | None,
) -> Batch:
    def run(params: chex.ArrayTree, some: Batch) -> tuple[Outputs, Any]:
        outputs = predict_fn(params, some)
        return outputs, None if loss_fn is None else loss_fn(outputs, some)

    is_cut = find_per_example(batch, per_example)
    outputs, _ = trees.shapes_of(run, params, batch)
    shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
    size = num_examples(batch, is_cut, shapes if per_example is None else None)
    if not isinstance(size, int):  # under `jax.export`
        return _symbolic_cut(batch, is_cut, part)
    count = part if isinstance(part, int) else max(1, round(part * size))
    if count > size:
        raise ValueError(
            f"`curvature_batch_size`={part} is larger than the batch of {size} examples; use a "
            "smaller number, a fraction such as 0.25, or None for the whole batch"
        )
    if isinstance(part, float):
        _check_even_share(part, count, size, batch, is_cut)
    if count == size:
        return batch
    # A multiple, as a model may work on groups of examples or shards of a mesh; no length of another axis.
    taken = {
        length for tree in (params, batch) for leaf in jax.tree.leaves(tree) for length in np.shape(leaf)
    }
    times = next(times for times in itertools.count(2) if times * size not in taken)
    check_longer_batch(run, params, batch, is_cut, shapes, times)
    if per_example is None:
        check_every_length_counts(run, params, batch, shapes, times)
    if loss_fn is not None:
        check_mean(loss_fn, outputs, batch, is_cut, size)
    take = placement.first_entries if isinstance(part, int) else _evenly
    return jax.tree.map(lambda leaf, cut: take(leaf, count) if cut else leaf, batch, is_cut)


def _evenly(leaf: Any, count: int) -> Any:
    """Returns so many examples at even distances, the first one among them."""
    size, rest = leaf.shape[0], leaf.shape[1:]
    # The compiler leaves groups where they are, if every device has whole ones; a slice with a stride moves.
    groups = math.gcd(count, size)
    each = count // groups
    at = slice(1) if each == 1 else np.arange(each) * (size // groups) // each
    return leaf.reshape(groups, size // groups, *rest)[:, at].reshape(count, *rest)


def _symbolic_cut(batch: Batch, is_cut: Any, part: int | float) -> Batch:
    """Returns the part of a batch whose size is a symbol, which shapes cannot test."""
    if isinstance(part, int):
        return jax.tree.map(lambda leaf, cut: leaf[:part] if cut else leaf, batch, is_cut)
    every = round(1 / part)
    if abs(every * part - 1) > 1e-6:
        raise ValueError(
            f"`curvature_batch_size`={part} of a batch whose size is not known must be one over an integer, "
            f"such as {1 / every:g}, or None for the whole batch"
        )
    return jax.tree.map(lambda leaf, cut: leaf[::every] if cut else leaf, batch, is_cut)


def _check_even_share(part: float, count: int, size: int, batch: Batch, is_cut: Any) -> None:
    """Checks that a fraction of the batch is as many examples on every shard, where shards are known."""
    leaves = zip(jax.tree.leaves(batch), jax.tree.leaves(is_cut), strict=True)
    shards = max((placement.num_shards(leaf) for leaf, cut in leaves if cut), default=1)
    if count % shards:
        each = size // shards
        nearest = min(range(1, each + 1), key=lambda n: abs(n / each - part))
        raise NoListOfExamplesError(
            f"`curvature_batch_size`={part} of {size} examples on {shards} shards is {count} examples, which "
            f"is not as many on each; {nearest / each:g} fits, {nearest} of the {each} on every shard"
        )


def check_curvature_batch(part: CurvatureBatch, per_example: Sequence[Hashable] | None = None) -> None:
    """Raises an error that says what is wanted if the arguments cannot name a part of a batch.

    Args:
      part: the argument ``curvature_batch_size`` of an optimizer.
      per_example: its argument ``per_example``; see :func:`curvature_subset` for both.

    Raises:
      TypeError: for values of another type.
      ValueError: for values out of range, or names beside a function, which cuts the batch itself.
    """
    if per_example is not None:
        if isinstance(per_example, str) or not isinstance(per_example, Sequence | Set):
            raise TypeError(f"`per_example` must be names such as `{NAMES}`, got {per_example!r}")
        if not per_example:
            raise ValueError(f"`per_example` names nothing; pass names such as `{NAMES}`, or None for all")
        if callable(part):
            raise ValueError(
                "`per_example` has no effect if `curvature_batch_size` is a function, which cuts the batch "
                "itself; pass one of them"
            )
    if part is None or callable(part) or isinstance(part, ShareOrAll):
        return
    if isinstance(part, bool) or not isinstance(part, int | float):
        raise TypeError(
            "`curvature_batch_size` must be None, an int (examples), a float (fraction) or a function "
            f"`batch -> smaller batch`, got {type(part).__name__}"
        )
    if isinstance(part, int) and part < 1:
        raise ValueError(f"`curvature_batch_size` must be at least 1 example, got {part}")
    if isinstance(part, float) and not 0.0 < part <= 1.0:
        raise ValueError(
            f"`curvature_batch_size` as a fraction must lie in (0, 1], got {part}; a number of examples is "
            "an int"
        )
