"""What all data have in common: parts of examples, and mini-batches of them.

A batch is a dict ``{"image": (B, height, width, channels), "label": int32 (B,)}``, and a whole part of
a dataset is one such batch. Meta-training, training and test share no example: the paper meta-trains on 3/5
of CIFAR-10 and trains on the rest (section 4.1).
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.support.checks import NOT_NEGATIVE, check_number, require

Examples = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint parts of one dataset; empty where a task does without.

    Attributes:
      meta_train: what optimizers are meta-trained on.
      train: what networks are trained on to compare optimizers.
      test: what is only ever evaluated on.
    """

    meta_train: Examples
    train: Examples = dataclasses.field(default_factory=dict)
    test: Examples = dataclasses.field(default_factory=dict)


def num_examples(data: chex.ArrayTree) -> int:
    """Returns the common leading size of a pytree of arrays.

    Raises:
      ValueError: if the arrays differ in their leading size, or there are none.

    Example:
      >>> num_examples({"image": np.zeros((5, 8, 8, 1)), "label": np.zeros(5)})
      5
    """
    sizes: Any = {leaf.shape[0] if leaf.shape else None for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "`data` must be arrays with the examples first, all of one leading size, got leading sizes "
            f"{sorted(map(str, sizes))}"
        )
    return sizes.pop()


def take(data: chex.ArrayTree, indices: jax.Array) -> chex.ArrayTree:
    """Returns the examples numbered by ``indices``, of any shape, as leaves ``(*indices.shape, ...)``.

    Example:
      >>> take({"x": np.array([10, 20, 30])}, jnp.array([2, 0]))
      {'x': Array([30, 10], dtype=int32)}
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], data)


def check_batch_fits(
    batch_size: int, available: int, argument: str = "batch_size", examples: str = "examples"
) -> None:
    """Raises a ValueError unless ``batch_size``, named ``argument``, lies in [1, available]."""
    wanted = f"between 1 and the number of {examples}, {available}"
    remedy = "take smaller batches or more data"
    require(1 <= batch_size <= available, argument, wanted, batch_size, remedy)


def epoch_indices(key: chex.PRNGKey, num_examples: int, batch_size: int, num_steps: int) -> jax.Array:
    """Returns which examples make up each mini-batch when training by shuffled epochs.

    Every epoch is a fresh shuffle, cut into whole batches. What is left over at its end (fewer than
    ``batch_size`` examples, different ones each time) is dropped. Can be used under ``jit`` and ``vmap``.

    Returns:
      Shape (num_steps, batch_size), int32 in [0, num_examples); no example repeats within an epoch.

    Raises:
      ValueError: if ``batch_size`` is not in [1, num_examples] or ``num_steps`` is negative.

    Example:
      >>> epoch_indices(jax.random.key(0), num_examples=10, batch_size=4, num_steps=3).shape
      (3, 4)
    """
    check_batch_fits(batch_size, num_examples)
    check_number("num_steps", num_steps, NOT_NEGATIVE)
    steps_per_epoch = num_examples // batch_size
    num_epochs = -(-num_steps // steps_per_epoch)
    keys = jax.random.split(key, max(num_epochs, 1))
    shuffled = jax.vmap(lambda k: jax.random.permutation(k, num_examples))(keys)
    batches = shuffled[:, : steps_per_epoch * batch_size].reshape(-1, batch_size)
    return batches[:num_steps].astype(jnp.int32)


def sample_batches(data: chex.ArrayTree, key: chex.PRNGKey, shape: tuple[int, ...]) -> chex.ArrayTree:
    """Draws batches of any leading shape: examples at random, with replacement.

    A batch as large as the data is no sample: it holds each example once, in their order. A larger one is
    refused, as it would only repeat examples, and the many batches of a meta-iteration would fill the memory.

    Args:
      data: pytree of arrays with the examples first.
      key: random key.
      shape: leading shape of the leaves of the result, with the batch last, such as (T + 1, B) for an
        unroll.

    Raises:
      ValueError: if the arrays differ in their leading size, there are none, or B is larger than it.

    Example:
      >>> sample_batches({"x": np.arange(6)}, jax.random.key(0), (3, 2))["x"].shape
      (3, 2)
    """
    available = num_examples(data)
    check_batch_fits(shape[-1], available, "shape[-1]")
    if shape[-1] == available:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape[:-1], *leaf.shape)), data)
    return take(data, jax.random.randint(key, shape, 0, available))


def freeze(**arrays: np.ndarray) -> Examples:
    """Returns examples of read-only arrays: writing into shared data would change later trainings."""
    for array in arrays.values():
        array.setflags(write=False)
    return arrays
