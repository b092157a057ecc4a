"""Data for the ready tasks, split into parts for meta-training, training and test.

A batch is a dict ``{"image": float32 (B, height, width, channels), "label": int32 (B,)}``, and a
whole part of a dataset is one such batch. Meta-training, training and test never share an example:
the paper meta-trains on 3/5 of CIFAR-10 and trains on the rest (section 4.1).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

Examples = dict[str, Any]

DIGITS_FRACTIONS = (0.4, 0.4, 0.2)
DIGITS_SPLIT_SEED = 0


class ExampleStream(Protocol):
    """A part that does not fit in memory, such as :class:`mlhf_optax.tasks.streaming.Stream`."""

    @property
    def sample(self) -> Examples:
        """Some of the examples, in memory."""
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batches(self, seed: int, batch_size: int, start: int = 0) -> Iterator[Examples]:
        """Returns mini-batches by shuffled epochs, without end, from the one with number ``start`` on."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint parts of one dataset, each a dict of arrays with the examples first.

    Attributes:
      meta_train: what optimizers are meta-trained on.
      train: what networks are trained on to compare optimizers; a stream if it does not fit in memory.
      test: what is only ever looked at.
    """

    meta_train: Examples
    train: Examples | ExampleStream
    test: Examples


def in_memory(part: Examples | ExampleStream) -> Examples:
    """Returns a part itself, or of a stream the sample of it that is held in memory.

    Example:
      >>> in_memory({"label": np.zeros(3)})
      {'label': array([0., 0., 0.])}
    """
    return part if isinstance(part, dict) else part.sample


def part_size(part: Examples | ExampleStream) -> int:
    """Returns the number of examples of a part, in memory or not.

    Example:
      >>> part_size({"label": np.zeros(3)})
      3
    """
    return num_examples(part) if isinstance(part, dict) else len(part)


@functools.cache
def digits() -> Dataset:
    """Returns scikit-learn's 1797 handwritten digits, 8x8 pixels, 10 classes.

    The parts hold 40 % (meta-training), 40 % (training) and 20 % (test) of every class. They are
    drawn from a fixed seed through raw bits, whose stream NumPy guarantees, so they are the same
    examples in every version and on every machine. Loaded once, then cached; read-only.

    Returns:
      A :class:`Dataset`; images are float32 of shape (N, 8, 8, 1) in [0, 1], labels int32 (N,).

    Raises:
      ImportError: if scikit-learn is missing.

    Example:
      >>> data = digits()
      >>> data.meta_train["image"].shape, len(data.train["label"]), len(data.test["label"])
      ((719, 8, 8, 1), 719, 359)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; run "
            "`pip install 'mlhf-optax[experiments]'`"
        ) from error
    pixels, targets = load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = np.asarray(targets, np.int32)
    parts = stratified_split(labels, DIGITS_FRACTIONS, DIGITS_SPLIT_SEED)
    return Dataset(*(freeze({"image": images[part], "label": labels[part]}) for part in parts))


def stratified_split(labels: np.ndarray, fractions: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Splits example numbers into disjoint parts with the same share of every class.

    Args:
      labels: shape (N,), integers.
      fractions: share of each part; positive, summing to one.
      seed: another seed is another split.

    Returns:
      One int array of example numbers a part, shuffled; together they hold every example once.

    Raises:
      ValueError: if ``fractions`` are not positive or do not sum to one.

    Example:
      >>> first, second = stratified_split(np.array([0, 0, 1, 1]), (0.5, 0.5), seed=0)
      >>> sorted(int(i) // 2 for i in first), sorted(int(i) // 2 for i in second)
      ([0, 1], [0, 1])
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1.0) > 1e-6:
        raise ValueError(f"`fractions` must be positive and sum to one, got {fractions}")
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    bounds = np.cumsum(fractions)[:-1]
    part_of = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        cuts = np.round(bounds * len(members)).astype(int)
        for number, chunk in enumerate(np.split(members, cuts)):
            part_of[chunk] = number
    return [order[part_of[order] == number] for number in range(len(fractions))]


def epoch_indices(key: chex.PRNGKey, num_examples: int, batch_size: int, num_steps: int) -> jax.Array:
    """Returns which examples make up each mini-batch of a training by shuffled epochs.

    Every epoch is a fresh shuffle cut into whole batches; what is left over at its end (fewer than
    ``batch_size`` examples, other ones each time) is dropped. Can be used under ``jit`` and ``vmap``.

    Args:
      key: random key.
      num_examples: number of examples N.
      batch_size: examples a batch B, at most N.
      num_steps: number of batches.

    Returns:
      Shape (num_steps, B), int32 in [0, N); no example repeats within an epoch.

    Raises:
      ValueError: if ``batch_size`` is not in [1, N] or ``num_steps`` is negative.

    Example:
      >>> import jax
      >>> epoch_indices(jax.random.key(0), num_examples=10, batch_size=4, num_steps=3).shape
      (3, 4)
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"`batch_size` must lie between 1 and the number of examples, {num_examples}, got {batch_size}; "
            "take smaller batches or more data"
        )
    if num_steps < 0:
        raise ValueError(f"`num_steps` must be at least 0, got {num_steps}")
    steps_per_epoch = num_examples // batch_size
    num_epochs = -(-num_steps // steps_per_epoch)
    keys = jax.random.split(key, max(num_epochs, 1))
    shuffled = jax.vmap(lambda k: jax.random.permutation(k, num_examples))(keys)
    batches = shuffled[:, : steps_per_epoch * batch_size].reshape(-1, batch_size)
    return batches[:num_steps].astype(jnp.int32)


def sample_batches(data: chex.ArrayTree, key: chex.PRNGKey, shape: tuple[int, ...]) -> chex.ArrayTree:
    """Draws examples uniformly, with replacement, into batches of any leading shape.

    Args:
      data: pytree of arrays of one leading size N, the examples.
      key: random key.
      shape: leading shape of the result, such as (T + 1, B) for the batches of an unroll.

    Returns:
      A pytree like ``data`` with leaves of shape ``(*shape, ...)``; can be used under ``jit``.

    Raises:
      ValueError: if the arrays differ in their leading size, or there are none.

    Example:
      >>> import jax
      >>> batches = sample_batches({"x": np.arange(6)}, jax.random.key(0), (3, 2))
      >>> batches["x"].shape
      (3, 2)
    """
    indices = jax.random.randint(key, shape, 0, num_examples(data))
    return take(data, indices)


def take(data: chex.ArrayTree, indices: jax.Array) -> chex.ArrayTree:
    """Returns the examples with the given numbers.

    Args:
      data: pytree of arrays with the examples first.
      indices: integers of any shape.

    Returns:
      A pytree like ``data`` with leaves of shape ``(*indices.shape, ...)``.

    Example:
      >>> take({"x": np.array([10, 20, 30])}, jnp.array([2, 0]))
      {'x': Array([30, 10], dtype=int32)}
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], data)


def num_examples(data: chex.ArrayTree) -> int:
    """Returns the common leading size of the arrays.

    Args:
      data: pytree of arrays with the examples first.

    Returns:
      The number of examples.

    Raises:
      ValueError: if the arrays differ in their leading size, or there are none.

    Example:
      >>> num_examples({"image": np.zeros((5, 8, 8, 1)), "label": np.zeros(5)})
      5
    """
    sizes = {leaf.shape[0] if leaf.shape else None for leaf in jax.tree.leaves(data)}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    if size is None:
        raise ValueError(
            "`data` must be arrays with the examples first, all of one leading size, got leading sizes "
            f"{sorted(map(str, sizes))}"
        )
    return size


def freeze(examples: Examples) -> Examples:
    """Makes arrays read-only: they are shared, and writing into them would change every later training."""
    for array in examples.values():
        array.setflags(write=False)
    return examples


__all__ = [
    "DIGITS_FRACTIONS",
    "DIGITS_SPLIT_SEED",
    "Dataset",
    "ExampleStream",
    "Examples",
    "digits",
    "epoch_indices",
    "freeze",
    "in_memory",
    "num_examples",
    "part_size",
    "sample_batches",
    "stratified_split",
    "take",
]
