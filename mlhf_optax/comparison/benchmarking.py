"""Times functions against each other in one process."""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

Thunk = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one call took.

    Attributes:
      rounds: seconds a call, one number a round; round n of one contender is comparable with round n of
        another, as they were measured one after the other.

    Example:
      >>> timing = Timing((4.0, 1.0, 2.0))
      >>> timing.median, timing.low, timing.high
      (2.0, 1.0, 4.0)
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds a call in the middle round."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """Seconds a call in the fastest round but a tenth."""
        return _quantile(self.rounds, 0.1)

    @property
    def high(self) -> float:
        """Seconds a call in the slowest round but a tenth."""
        return _quantile(self.rounds, 0.9)

    def over(self, other: "Timing") -> float:
        """Returns how many times as long as ``other`` this took: the median of the ratios of the rounds.

        Args:
          other: a contender of the same call of :func:`interleaved`.

        Returns:
          The ratio.

        Raises:
          ValueError: if the numbers of rounds differ, so that rounds cannot be paired.

        Example:
          >>> Timing((4.0, 1.0, 2.0)).over(Timing((2.0, 0.5, 0.5)))
          2.0
        """
        if len(self.rounds) != len(other.rounds):
            raise ValueError(
                f"rounds are compared in pairs, got {len(self.rounds)} and {len(other.rounds)} of them; time "
                "both contenders in one call of `interleaved`"
            )
        return statistics.median(own / its for own, its in zip(self.rounds, other.rounds, strict=True))

    def to_json(self) -> dict[str, float]:
        """Returns median and spread as plain JSON values, in seconds."""
        return {"median": self.median, "low": self.low, "high": self.high}


def interleaved(
    thunks: Mapping[str, Thunk],
    *,
    repeats: int = 9,
    inner: Mapping[str, int] | int | None = None,
    stretch_seconds: float = 0.02,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Times functions in turns, so that a busy moment of the machine meets all of them.

    One call of each comes first, to compile and warm up. Then every round times a stretch of calls of
    each, in an order that moves on by one from round to round, and waits for what the last call
    returned. Let a function wait for its own result (``jax.block_until_ready``) where calls do not
    depend on each other: a machine may otherwise work on several at once.

    Args:
      thunks: functions without arguments by name; what they return may be any pytree of arrays.
      repeats: rounds.
      inner: calls a stretch, for all or by name; None takes as many as last ``stretch_seconds``.
      stretch_seconds: least length of a stretch where ``inner`` is None.
      on_round: called after every round with the number of rounds done.

    Returns:
      A :class:`Timing` of each, in the order of ``thunks``.

    Raises:
      ValueError: if there is nothing to time, a number is below one, or ``inner`` lacks a name.

    Example:
      >>> times = interleaved({"short": lambda: sum(range(10)), "long": lambda: sum(range(1000))}, repeats=2)
      >>> times["long"].over(times["short"]) > 1
      True
    """
    if not thunks or repeats < 1:
        raise ValueError(
            f"`interleaved` needs a function to time and repeats >= 1, got {list(thunks)} and {repeats}"
        )
    counts = _counts(thunks, inner)
    for thunk in thunks.values():
        jax.block_until_ready(thunk())
    if counts is None:
        counts = {name: _calls_that_last(thunk, stretch_seconds) for name, thunk in thunks.items()}
    names = list(thunks)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(repeats):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            rounds[name].append(_seconds(thunks[name], counts[name]) / counts[name])
        if on_round is not None:
            on_round(done + 1)
    return {name: Timing(tuple(values)) for name, values in rounds.items()}


def timing_parser(description: str | None, *, repeats: int, quick: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks of speed have.

    Args:
      description: what the benchmark is about.
      repeats: rounds by default.
      quick: what ``--quick`` does.

    Returns:
      The parser; more options can be added.

    Example:
      >>> timing_parser("About.", repeats=9, quick="3 rounds").parse_args(["--repeats", "2"]).repeats
      2
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--repeats", type=_rounds, default=repeats, help="rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def _rounds(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"--repeats must be at least 1, got {text}")
    return int(text)


def _counts(thunks: Mapping[str, Thunk], inner: Mapping[str, int] | int | None) -> dict[str, int] | None:
    if inner is None:
        return None
    counts = {name: inner if isinstance(inner, int) else inner.get(name, 0) for name in thunks}
    if min(counts.values()) < 1:
        raise ValueError(f"`inner` must give every function at least one call a stretch, got {counts}")
    return counts


def _calls_that_last(thunk: Thunk, seconds: float) -> int:
    """Returns a number of calls that take at least ``seconds``."""
    count = 1
    while (elapsed := _seconds(thunk, count)) < seconds:
        # A tenfold step at most, as the first calls say little about the length of many.
        wanted = math.ceil(1.2 * count * seconds / max(elapsed, 1e-9))
        count = min(max(wanted, count + 1), 10 * count)
    return count


def _seconds(thunk: Thunk, count: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(count):
        result = thunk()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def _quantile(values: Sequence[float], fraction: float) -> float:
    """Returns the value at a rank; of few values the nearest one, without interpolation."""
    ordered = sorted(values)
    return ordered[round(fraction * (len(ordered) - 1))]


__all__ = ["Timing", "interleaved", "timing_parser"]
