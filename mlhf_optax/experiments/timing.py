"""Times functions and steps of optimizers against each other in one process."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.experiments.runs import (
    Hyperparameters,
    MakeOptimizer,
    RunState,
    augmentation_key,
    draw_batch,
    draw_order,
    run_step,
    start_params,
)
from mlhf_optax.meta_training import runs_in_sequence
from mlhf_optax.tasks import Task

Thunk = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one call took.

    Attributes:
      rounds: seconds per call, one number per round; round n of one contender is comparable with round n of
        another, as they were measured one after the other.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds per call in the middle round."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """The 10th percentile of the rounds; of few rounds the nearest one."""
        return sorted(self.rounds)[round(0.1 * (len(self.rounds) - 1))]

    @property
    def high(self) -> float:
        """The 90th percentile of the rounds."""
        return sorted(self.rounds)[round(0.9 * (len(self.rounds) - 1))]

    def over(self, other: "Timing") -> float:
        """Returns how many times as long as ``other`` this took: the median of the ratios of the rounds.

        Raises:
          ValueError: if the numbers of rounds differ, so that rounds cannot be paired.
        """
        if len(self.rounds) != len(other.rounds):
            raise ValueError(
                f"rounds are compared in pairs, got {len(self.rounds)} and {len(other.rounds)} of them; time "
                "both contenders in one call of `interleaved`"
            )
        return statistics.median(own / its for own, its in zip(self.rounds, other.rounds, strict=True))


def interleaved(
    thunks: Mapping[str, Thunk],
    *,
    repeats: int = 9,
    calls: int | None = None,
    stretch_seconds: float = 0.02,
) -> dict[str, Timing]:
    """Times functions in turns, so that a busy moment of the machine meets all of them.

    One call of each comes first, to compile and warm up. Then every round times a stretch of calls of
    each, in an order that moves on by one from round to round, and waits for what the last call
    returned. Let a function wait for its own result (``jax.block_until_ready``) where calls do not
    depend on each other: a machine may otherwise work on several at once.

    Args:
      thunks: functions without arguments by name; what they return may be any pytree of arrays.
      repeats: rounds.
      calls: calls per stretch; None takes as many as last ``stretch_seconds``.
      stretch_seconds: least length of a stretch where ``calls`` is None.

    Raises:
      ValueError: if there is nothing to time or a number is below one.

    Example:
      >>> times = interleaved({"short": lambda: sum(range(10)), "long": lambda: sum(range(1000))}, repeats=2)
      >>> times["long"].over(times["short"]) > 1
      True
    """
    if not thunks or repeats < 1 or (calls is not None and calls < 1):
        raise ValueError(
            "`interleaved` needs a function to time, `repeats` >= 1 and `calls` >= 1, got "
            f"{list(thunks)}, {repeats} and {calls}"
        )
    for thunk in thunks.values():
        jax.block_until_ready(thunk())
    names = list(thunks)
    counts = {name: calls or _calls_that_last(thunks[name], stretch_seconds) for name in names}
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(repeats):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            rounds[name].append(_seconds(thunks[name], counts[name]) / counts[name])
    return {name: Timing(tuple(values)) for name, values in rounds.items()}


def seconds_per_step(
    task: Task,
    optimizers: Mapping[str, tuple[MakeOptimizer, Hyperparameters]],
    *,
    num_steps: int | None = None,
    repeats: int | None = None,
) -> dict[str, float]:
    """Measures how long one compiled step of a single run takes, the same way for every optimizer.

    A step gathers and augments the mini-batch, takes the gradient and updates, in one call of a jitted
    function. Stretches of ``num_steps`` steps of all optimizers take turns; the result is the median.

    Args:
      task: what to train.
      optimizers: by name, a function that makes the optimizer and its hyperparameters (numbers).
      num_steps: steps per stretch; by default 25, or 5 where steps are long.
      repeats: stretches per optimizer; by default 9, or 5 where steps are long.

    Raises:
      ValueError: if there are no optimizers, or ``num_steps`` or ``repeats`` is below one.

    Example:
      ``seconds_per_step(task, {"adam": (optax.adam, {"learning_rate": 1e-2})})["adam"]``
    """
    is_slow = runs_in_sequence(task)
    num_steps = (5 if is_slow else 25) if num_steps is None else num_steps
    repeats = (5 if is_slow else 9) if repeats is None else repeats
    if num_steps < 1 or repeats < 1:
        raise ValueError(
            f"`num_steps` and `repeats` must be at least 1, got num_steps={num_steps}, repeats={repeats}"
        )
    start = jax.jit(lambda key: start_params(task, key))  # compiled once for all of them
    pairs = {name: _stretch(task, start, *given, num_steps) for name, given in optimizers.items()}
    # XLA does not hold Python's lock, so that several programs are compiled at once, before any is timed.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: pair[1].compile(), pairs.values()))
    stretches = {name: run for name, (run, _) in pairs.items()}
    times = interleaved(stretches, repeats=repeats, calls=1)
    return {name: timing.median / num_steps for name, timing in times.items()}


def _stretch(
    task: Task,
    start: Callable[[chex.PRNGKey], Any],
    make_optimizer: MakeOptimizer,
    hyperparameters: Hyperparameters,
    num_steps: int,
) -> tuple[Thunk, jax.stages.Lowered]:
    """Returns a function that takes ``num_steps`` steps of one run and waits for them, and its program.

    The function runs what the program's ``compile`` made.
    """
    examples = jax.tree.map(jnp.asarray, task.data.train)
    key = jax.random.key(0)
    # Traced as in a training over many settings: constants could be folded into a faster program.
    hyperparameters = {name: jnp.asarray(value, jnp.float32) for name, value in hyperparameters.items()}
    batches = list(draw_order(task, key, num_steps))

    def take_step(hyper, examples, indices, state):
        # Another key at every step, as in a training: a constant one could be computed in advance.
        batch = draw_batch(task, examples, indices, augmentation_key(key, indices[0]))
        return run_step(task, make_optimizer, hyper, batch, state)

    step = jax.jit(take_step, donate_argnums=3)
    params = start(key)
    opt_state = jax.jit(lambda hyper, params: make_optimizer(**hyper).init(params))(hyperparameters, params)
    state = RunState(params, opt_state)

    def run() -> None:
        nonlocal state
        for indices in batches:
            state = step(hyperparameters, examples, indices, state)
        jax.block_until_ready(state)

    return run, step.lower(hyperparameters, examples, batches[0], state)


def _calls_that_last(thunk: Thunk, seconds: float) -> int:
    """Returns a number of calls that take at least ``seconds``."""
    count = 1
    while (elapsed := _seconds(thunk, count)) < seconds:
        # A tenfold step at most, as the first calls say little about the length of many.
        wanted = math.ceil(1.2 * count * seconds / max(elapsed, 1e-9))
        count = min(max(wanted, count + 1), 10 * count)
    return count


def _seconds(thunk: Thunk, count: int) -> float:
    start, result = time.perf_counter(), None
    for _ in range(count):
        result = thunk()
    jax.block_until_ready(result)
    return time.perf_counter() - start
