"""A replay buffer of training states, so that meta-training sees early and late stages alike.

The paper (section 3.1) stores and replays initial parameters w0 as in Mnih et al. 2015. The buffer is a
pytree of fixed size and its functions are pure, because it lives inside a jitted meta-step.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.support import checks


class Replay(NamedTuple):
    """A ring of the last ``capacity`` stored entries.

    Attributes:
      entries: pytree of leaves (capacity, ...).
      stored: number of entries stored so far, shape ().
    """

    entries: chex.ArrayTree
    stored: jax.Array

    @property
    def capacity(self) -> int:
        """Number of entries that are kept."""
        return jax.tree.leaves(self.entries)[0].shape[0]

    @property
    def is_filled(self) -> jax.Array:
        """Which slots hold an entry, shape (capacity,)."""
        return jnp.arange(self.capacity) < self.stored


def init_replay(example: chex.ArrayTree, capacity: int) -> Replay:
    """Returns an empty buffer for entries shaped like ``example``.

    Args:
      example: one entry, a pytree of arrays or shapes.
      capacity: number of entries kept, at least one.

    Returns:
      The buffer.

    Raises:
      ValueError: if ``capacity`` is below one.

    Example:
      >>> import jax.numpy as jnp
      >>> init_replay({"w": jnp.ones(3)}, capacity=5).entries["w"].shape
      (5, 3)
    """
    checks.check_number("capacity", capacity, checks.FROM_ONE)
    entries = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example)
    return Replay(entries, jnp.zeros((), jnp.int32))


def store(replay: Replay, entries: chex.ArrayTree, mask: jax.Array) -> Replay:
    """Stores some of ``M`` entries, each in place of the oldest one.

    Args:
      replay: the buffer.
      entries: leaves (M, ...), M at most the capacity.
      mask: shape (M,), which entries to store.

    Returns:
      The buffer with them.

    Example:
      >>> import jax.numpy as jnp
      >>> replay = init_replay(jnp.zeros(()), capacity=2)
      >>> replay = store(replay, jnp.array([7.0, 8.0]), jnp.array([False, True]))
      >>> replay.entries, int(replay.stored)
      (Array([8., 0.], dtype=float32), 1)
    """
    capacity = replay.capacity
    order = jnp.cumsum(mask) - 1
    # An index past the end is dropped by the scatter: that is how an entry is left out.
    slots = jnp.where(mask, (replay.stored + order) % capacity, capacity)
    put = lambda buffer, new: buffer.at[slots].set(new.astype(buffer.dtype), mode="drop")
    return Replay(jax.tree.map(put, replay.entries, entries), replay.stored + jnp.sum(mask).astype(jnp.int32))


def sample(replay: Replay, key: chex.PRNGKey, count: int) -> tuple[Any, jax.Array]:
    """Draws ``count`` entries, each with the same chance, with replacement.

    Args:
      replay: the buffer.
      key: random key.
      count: number of draws.

    Returns:
      Leaves (count, ...), and whether the buffer had anything to draw, shape ().

    Example:
      >>> import jax, jax.numpy as jnp
      >>> replay = store(init_replay(jnp.zeros(()), 2), jnp.array([7.0]), jnp.array([True]))
      >>> entries, found = sample(replay, jax.random.key(0), count=3)
      >>> entries, bool(found)
      (Array([7., 7., 7.], dtype=float32), True)
    """
    found = replay.stored > 0
    logits = jnp.where(replay.is_filled | ~found, 0.0, -jnp.inf)
    index = jax.random.categorical(key, logits, shape=(count,))
    return jax.tree.map(lambda buffer: buffer[index], replay.entries), found
