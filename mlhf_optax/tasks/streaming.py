"""Training data that do not fit in memory, read by worker processes while the device computes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from mlhf_optax.tasks.data import Examples, require_batch_fits


class Source(Protocol):
    """Examples by number, each with ``"image"``, ``"label"`` and maybe more."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Returns an example."""
        ...


# transform(example, random numbers) -> one example of a batch; all have the same shapes
Transform = Callable[[Mapping[str, Any], np.random.Generator], Examples]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Examples that are read, decoded and transformed when they are needed, in a shuffled order.

    Order and random numbers follow from seed and position alone: a training that is resumed at any step
    sees what it would have seen without a break, however many workers there are.

    Attributes:
      source: gives examples by number; picklable if there are workers.
      transform: makes an example ready, with random numbers of its own.
      sample: some of the examples, ready and in memory, for where the whole would be too many: the
        training loss, statistics and measurements of time.
      num_workers: processes that read ahead; 0 for threads of this one.
      read_ahead: batches that every worker has ready.

    Example:
      >>> source = [{"x": number} for number in range(5)]
      >>> stream = Stream(source, lambda example, rng: {"x": np.int32(example["x"])}, sample={})
      >>> batches = stream.batches(seed=0, batch_size=2)
      >>> len({int(x) for _ in range(2) for x in next(batches)["x"]})
      4
    """

    source: Source
    transform: Transform
    sample: Examples
    num_workers: int = 0
    read_ahead: int = 4

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def batches(self, seed: int, batch_size: int, start: int = 0) -> Iterator[Examples]:
        """Returns mini-batches without end, by epochs that are shuffled anew.

        What is left over at the end of an epoch, fewer than ``batch_size`` examples, is dropped.

        Args:
          seed: decides order and random numbers.
          batch_size: examples per batch B, at most the number of examples.
          start: batches to leave out at the start; costs nothing.

        Returns:
          An iterator of dicts of arrays with leading size B.

        Raises:
          ImportError: if grain is missing.
          ValueError: if ``batch_size`` is out of range or ``start`` negative.
        """
        require_batch_fits(batch_size, len(self))
        if start < 0:
            raise ValueError(f"`start` must be at least 0, got {start}")
        grain = _import_grain()
        dataset = grain.MapDataset.source(self.source).seed(seed).shuffle().random_map(self.transform)
        dataset = dataset.batch(batch_size, drop_remainder=True).repeat()[start:]
        threads = 1 if self.num_workers else self.read_ahead
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self.read_ahead)
        dataset = dataset.to_iter_dataset(options)
        if self.num_workers:
            workers = grain.multiprocessing.MultiprocessingOptions(self.num_workers, self.read_ahead)
            dataset = dataset.mp_prefetch(workers)
        return iter(dataset)


def _import_grain() -> Any:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise ImportError(
            f"data that do not fit in memory are read with grain, but {error.name} is not installed; run "
            "`pip install 'mlhf-optax[data]'`"
        ) from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers look at flags, which only absl's own programs parse
    return grain
