"""Runs a whole meta-training: metrics as they come, validation, checkpoints, resume.

All randomness follows from the seed and the number of the iteration. A run that was killed and resumed thus
ends with the same meta-parameters, bit for bit on a CPU, as one that was left alone.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.meta_training import processes
from mlhf_optax.meta_training.checkpoints import list_checkpoints, load_last_checkpoint, save_checkpoint
from mlhf_optax.meta_training.interface import LearnedOptimizer, TaskLike
from mlhf_optax.meta_training.json_log import append_json_line, rewind_json_lines
from mlhf_optax.meta_training.unrolled.config import MetaTrainingConfig
from mlhf_optax.meta_training.unrolled.step import make_meta_step
from mlhf_optax.meta_training.validation import Validation
from mlhf_optax.support.checks import FROM_ONE, check_fields
from mlhf_optax.support.files import locked_folder

SampleFn = Callable[[chex.PRNGKey], Any]
ValidateFn = Callable[[Any], Validation]
Algorithm = tuple[Callable[[chex.PRNGKey, Any], Any], Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]]
Progress = Callable[[int, dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen in a meta-training.

    Args:
      iterations: meta-iterations in all.
      checkpoint_every: meta-iterations between checkpoints.
      validate_every: meta-iterations between validations; one more is done at the end.
      report_every: meta-iterations between two looks at the metrics; each look waits for the device.
      stop_after: end after so many of the iterations, as if there were no more; None to do all.

    Raises:
      ValueError: if one of them is below 1.

    Example:
      >>> Schedule(iterations=100).validate_every
      100
    """

    iterations: int
    checkpoint_every: int = 50
    validate_every: int = 100
    report_every: int = 5
    stop_after: int | None = None

    def __post_init__(self):
        check_fields(self, FROM_ONE, "iterations", "checkpoint_every", "validate_every", "report_every")
        check_fields(self, FROM_ONE, "stop_after", or_none=True)

    @property
    def last(self) -> int:
        """The last meta-iteration."""
        return self.iterations if self.stop_after is None else min(self.stop_after, self.iterations)

    def is_due(self, iteration: int, every: int) -> bool:
        """Returns whether something is due after this many iterations."""
        return iteration % every == 0 or iteration == self.last


class Progressed(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: the meta-training, any pytree of arrays with ``meta_params``, such as a :class:`MetaState`.
      best_meta_params: the best meta-parameters so far, by validation.
      best_score: their score; infinity before the first validation.
      best_iteration: the meta-iteration after which they were found.
    """

    state: Any
    best_meta_params: Any
    best_score: jax.Array
    best_iteration: jax.Array


def meta_train(
    task: TaskLike | None,
    learned: LearnedOptimizer | None,
    meta_params: Any,
    sample_fn: SampleFn,
    validate_fn: ValidateFn,
    output: str | Path,
    schedule: Schedule,
    config: MetaTrainingConfig = MetaTrainingConfig(),
    *,
    seed: int = 0,
    resume: bool = False,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    algorithm: Algorithm | None = None,
) -> Progressed:
    """Meta-trains a learned optimizer and keeps the best meta-parameters by validation.

    Writes ``metrics.jsonl`` (one line per meta-iteration), ``validation.jsonl`` (one line per validation)
    and ``checkpoints/`` to ``output`` as it goes; null stands for a number that is not finite. Where
    iterations are done again after a stop, their old lines move to ``metrics.jsonl.old`` and
    ``validation.jsonl.old``.

    In several processes (``jax.distributed.initialize``) all of them call this function, with an
    ``algorithm`` over a mesh of all devices. The first process reads and writes ``output``, which the others
    need not see, and calls ``progress``. A run may go on in another number of processes.

    Args:
      task: the task; not used with an ``algorithm``.
      learned: the learned optimizer; not used with an ``algorithm``.
      meta_params: where to start.
      sample_fn: ``sample_fn(key) -> batches`` with leaves (num_tasks, unroll_length + 1, B, ...).
      validate_fn: ``validate_fn(meta_params) ->`` :class:`Validation`, with a lower score for better.
      output: folder for everything that is written; no other run may write there meanwhile.
      schedule: how long and how often.
      config: how inner trainings are run.
      seed: decides all random numbers.
      resume: go on from the last whole checkpoint in ``output``; start anew if there are no checkpoints.
      about: settings that must be equal when a run is resumed, beside ``config`` and ``seed``.
      progress: called as ``progress(iteration, metrics)`` every ``schedule.report_every`` iterations.
      algorithm: ``(init, step)`` in the place of what :func:`make_meta_step` returns for the task, the
        optimizer and the config, for example from :func:`mlhf_optax.meta_training.make_long_horizon_step`.
        ``init(key, meta_params) -> state`` and ``step(state, batches) -> (state, metrics)``, where a state is
        any pytree of arrays with an attribute ``meta_params``.

    Returns:
      The last state and the best meta-parameters.

    Raises:
      ValueError: if ``output`` has checkpoints and ``resume`` is not set, or they belong to a run
        with other settings, are of later meta-iterations than the last one asked for, or cannot be read.
      OSError: if another run writes to ``output``, or it cannot be written to. What is there stays.
      FloatingPointError: if the meta-parameters are no longer finite.
      RuntimeError: in the other processes, if the first one cannot start.

    Example:
      See ``mlhf-optax meta-train``, which is this function with a task of the package.
    """
    if algorithm is None:
        if task is None or learned is None:
            raise ValueError("`task` and `learned` are needed without an `algorithm`")
        algorithm = make_meta_step(task, learned, config)
    about = {"seed": seed, "config": dataclasses.asdict(config), **(about or {})}
    data_key, init_key = jax.random.split(jax.random.key(seed))
    sample, folder = jax.jit(sample_fn), Path(output)
    now = processes.whole(_fresh(algorithm[0](init_key, meta_params)))
    with contextlib.ExitStack() as lock:

        def open_folder() -> tuple[int, Progressed]:
            lock.enter_context(locked_folder(folder))
            return _start(now, folder, schedule, about, resume)

        start, now = processes.from_first(open_folder, (0, now))
        start, metrics = int(start), _Metrics(folder / "metrics.jsonl")
        for iteration in range(start + 1, schedule.last + 1):
            state, values = algorithm[1](now.state, sample(jax.random.fold_in(data_key, iteration)))
            now = now._replace(state=state)
            metrics.add(iteration, values)
            must_validate = schedule.is_due(iteration, schedule.validate_every)
            must_save = schedule.is_due(iteration, schedule.checkpoint_every)
            if must_validate or must_save or schedule.is_due(iteration, schedule.report_every):
                last_line = metrics.write()
                if progress is not None and processes.is_first():
                    progress(iteration, last_line)
            if must_validate:
                now = _validated(now, iteration, validate_fn, folder)
                metrics.restart_clock()
            if must_save:
                _require_finite(now.state.meta_params, iteration, folder)
                _save(folder, iteration, now, about)
        # A run that was killed, and is now to end where its last checkpoint is, has not been judged there.
        if start == schedule.last and not processes.from_first(lambda: _is_validated(folder, start), True):
            now = _validated(now, start, validate_fn, folder)
            _save(folder, start, now, about)
    return now


def _fresh(state: Any) -> Progressed:
    best = jax.tree.map(jnp.array, state.meta_params)  # a copy: the state is donated at every step
    return Progressed(state, best, jnp.asarray(jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))


def _start(
    now: Progressed, folder: Path, schedule: Schedule, about: dict, resume: bool
) -> tuple[int, Progressed]:
    """Returns the iteration and the state to go on from; the logs then end at that iteration."""
    start = 0
    if list_checkpoints(folder / "checkpoints") and not resume:
        raise ValueError(
            f"`output` {folder} already has checkpoints; set `resume` (--resume) to go on from them, "
            "or use another folder"
        )
    if resume and (found := load_last_checkpoint(folder / "checkpoints", now, about)):
        start, now = found
    if start > schedule.last:
        raise ValueError(
            f"the last checkpoint in {folder} is of meta-iteration {start}, and the run is to end at "
            f"{schedule.last}; let it end at {start} or later (--stop-after, --iterations), or use another "
            "folder"
        )
    for name in ("metrics", "validation"):
        rewind_json_lines(folder / f"{name}.jsonl", start)
    return start, now


class _Metrics:
    """Metrics that stay on the device until something has to wait for it anyway."""

    def __init__(self, path: Path):
        self._path, self._pending, self._clock = path, [], time.perf_counter()

    def add(self, iteration: int, values: dict[str, jax.Array]) -> None:
        self._pending.append((iteration, values))

    def write(self) -> dict[str, float]:
        """Writes a line for each iteration that waits and returns the last one."""
        pending, self._pending, line = jax.device_get(self._pending), [], {}
        seconds = round((time.perf_counter() - self._clock) / len(pending), 4)
        for iteration, values in pending:
            line = {"iteration": iteration, "seconds": seconds}
            line |= {name: float(value) for name, value in values.items()}
            if processes.is_first():
                append_json_line(self._path, line)
        self.restart_clock()
        return line

    def restart_clock(self) -> None:
        self._clock = time.perf_counter()


def _validated(now: Progressed, iteration: int, validate_fn: ValidateFn, folder: Path) -> Progressed:
    # Every process validates, on its own devices, and comes to the same result.
    result = jax.device_get(validate_fn(processes.whole(now.state.meta_params)))
    score = float(result.score)
    line = {"iteration": iteration, "score": score, "losses": np.asarray(result.losses).tolist()}
    if processes.is_first():
        append_json_line(folder / "validation.jsonl", line | {"worst_loss": float(result.worst_loss)})
    if not score < float(now.best_score):
        return now
    copy = jax.tree.map(jnp.array, now.state.meta_params)
    return Progressed(now.state, copy, jnp.asarray(score, jnp.float32), jnp.asarray(iteration, jnp.int32))


def _save(folder: Path, iteration: int, now: Progressed, about: dict) -> None:
    now = processes.whole(now)
    if processes.is_first():
        save_checkpoint(folder / "checkpoints", iteration, now, about)


def _is_validated(folder: Path, iteration: int) -> bool:
    lines = (folder / "validation.jsonl").read_text().splitlines()
    return any(json.loads(line)["iteration"] == iteration for line in lines)


def _require_finite(meta_params: chex.ArrayTree, iteration: int, folder: Path) -> None:
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(meta_params)):
        raise FloatingPointError(
            f"the meta-parameters are no longer finite at meta-iteration {iteration}; lower "
            "`meta_learning_rate` or set `meta_gradient_clip`, and resume from the last checkpoint in "
            f"{folder / 'checkpoints'}"
        )
