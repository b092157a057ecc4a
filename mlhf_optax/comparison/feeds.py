"""Where the mini-batches of trainings come from: arrays on the device, or a stream."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.comparison.inner_training import draw_order
from mlhf_optax.tasks import Examples, ExampleStream, Task, take


class MemoryFeed:
    """Mini-batches of arrays that lie on the device; only their numbers are handed over.

    Args:
      task: its training part is in memory.
      seeds: S seeds, an order each.
      num_steps: number of mini-batches.

    Attributes:
      examples: the training part on the device.

    Raises:
      ValueError: if the batch is larger than the training part.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> feed = MemoryFeed(get_task("digits-mlp"), seeds=[0, 1], num_steps=3)
      >>> feed(2).shape
      (2, 128)
    """

    def __init__(self, task: Task, seeds: Sequence[int], num_steps: int):
        self._orders = np.stack([draw_order(task, jax.random.key(seed), num_steps) for seed in seeds])
        self.examples: Examples | None = jax.tree.map(jnp.asarray, task.data.train)

    def __call__(self, step: int) -> np.ndarray:
        """Returns the example numbers of the mini-batches of a step, shape (S, B)."""
        return self._orders[:, step]


class StreamFeed:
    """Mini-batches that are read while they are needed.

    Args:
      stream: where they come from.
      seeds: S seeds, an order each.
      batch_size: examples a mini-batch.

    Attributes:
      examples: None, as nothing lies on the device.

    Raises:
      ValueError: if the batch is larger than the stream.

    Example:
      >>> from mlhf_optax.tasks import Stream
      >>> numbers = [{"x": number} for number in range(5)]
      >>> stream = Stream(numbers, lambda example, rng: {"x": np.int32(example["x"])}, sample={})
      >>> StreamFeed(stream, seeds=[0, 1], batch_size=4)(0)["x"].shape
      (2, 4)
    """

    def __init__(self, stream: ExampleStream, seeds: Sequence[int], batch_size: int):
        self._stream, self._seeds, self._batch_size = stream, seeds, batch_size
        self.examples: Examples | None = None
        self._open(0)

    def __call__(self, step: int) -> Any:
        """Returns the mini-batches of a step, leaves (S, B, ...)."""
        if step != self._next_step:  # a training that was restored
            self._open(step)
        self._next_step += 1
        batches = [next(iterator) for iterator in self._iterators]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def _open(self, step: int) -> None:
        self._iterators = [self._stream.batches(seed, self._batch_size, step) for seed in self._seeds]
        self._next_step = step


def draw(examples: Examples | None, fed: Any) -> Any:
    """Returns the mini-batch that one seed was fed with: numbers of ``examples``, or itself if None."""
    return fed if examples is None else take(examples, fed)


def make_feed(task: Task, seeds: Sequence[int], num_steps: int) -> MemoryFeed | StreamFeed:
    """Returns the feed of a task's training part."""
    train = task.data.train
    if isinstance(train, dict):
        return MemoryFeed(task, seeds, num_steps)
    return StreamFeed(train, seeds, task.batch_size)


__all__ = ["MemoryFeed", "StreamFeed", "draw", "make_feed"]
