"""Trains one task with many optimizers and records curves; what is done is kept and never done again.

Settings that advance together leave a file when they are finished, and a checkpoint at every step at which
they are judged. A comparison that was stopped goes on there, with the same numbers as if it had not been.
Asked for more seeds than a file has, it trains those that are missing.
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mlhf_optax.experiments.contenders import Contender
from mlhf_optax.experiments.origin import machine_info, with_origin, write_json
from mlhf_optax.experiments.results import MEASURES, Comparison, finite_or_none, frame_of
from mlhf_optax.experiments.runs import Program, RunGrid
from mlhf_optax.experiments.timing import seconds_per_step
from mlhf_optax.meta_training.checkpoints import load_last_checkpoint, save_checkpoint
from mlhf_optax.support.checks import FROM_ONE, check_number
from mlhf_optax.support.files import locked_folder
from mlhf_optax.tasks import Task, num_examples

TABLE_STEPS = (10, 30, 100, 200, 500)
_WAIT_EVERY = 10  # steps


class Progress(NamedTuple):
    """How far a comparison is.

    Attributes:
      optimizer: name of the first optimizer of those in training; empty while steps are timed.
      done: steps taken so far, of all runs together.
      total: steps of the whole comparison.
      loss: lowest mean over seeds, just recorded; None between recorded steps.
    """

    optimizer: str
    done: int
    total: int
    loss: float | None = None


OnProgress = Callable[[Progress], None]


def log_steps(num_steps: int, count: int = 25) -> tuple[int, ...]:
    """Returns steps to record at: those of the table, and ``count`` up to the last, evenly in the logarithm.

    Raises:
      ValueError: if ``num_steps`` is below one.

    Example:
      >>> log_steps(30, count=4)
      (1, 3, 10, 30)
    """
    in_table = (step for step in TABLE_STEPS if step <= num_steps)
    return tuple(sorted({*_spaced("num_steps", num_steps, count), *in_table}))


def epoch_steps(task: Task, num_epochs: int, count: int = 30) -> tuple[int, ...]:
    """Returns the ends of the first ten epochs, and of ``count`` up to the last, evenly in the logarithm.

    Raises:
      ValueError: if ``num_epochs`` is below one.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> epoch_steps(get_task("digits-mlp"), 40, count=5)
      (5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 80, 200)
    """
    epochs = {*_spaced("num_epochs", num_epochs, count), *range(1, min(10, num_epochs) + 1)}
    return tuple(epoch * steps_per_epoch(task) for epoch in sorted(epochs))


def _spaced(name: str, last: int, count: int) -> set[int]:
    check_number(name, last, FROM_ONE)
    return {*np.geomspace(1, last, count).round().astype(int).tolist(), last}


def steps_per_epoch(task: Task) -> int:
    """Returns how many whole mini-batches the training part of a task has."""
    return num_examples(task.data.train) // task.batch_size


def compare(
    task: Task,
    contenders: Sequence[Contender],
    steps: Sequence[int] | None = None,
    *,
    seeds: Sequence[int] = range(5),
    folder: str | Path | None = None,
    resume: bool = False,
    group_size: int | None = None,
    timed: bool = True,
    command: str = "",
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Trains a task with every optimizer of every contender, from every seed.

    A group of settings of which every run has diverged ends early; its losses are infinite from then on.

    Args:
      task: what to train; mini-batches have its ``batch_size``.
      contenders: from :func:`learned_contender`, :func:`grid_contenders`, or your own.
      steps: ascending numbers of steps after which to take losses and accuracy. The last one is the
        length of the trainings. ``log_steps(500)`` if None; see also :func:`epoch_steps`.
      seeds: seeds of the initial parameters, the order of the batches and their augmentation.
      folder: where to keep what is done; nothing is kept if None.
      resume: go on from what lies in the folder.
      group_size: settings that advance together. By default all of a contender, or one where runs go one
        after the other.
      timed: measure the seconds per step, in turns, before the trainings.
      command: the command line, to be kept with the results.
      on_progress: called after every step.

    Returns:
      The :class:`Comparison`. After Ctrl-C it holds what was finished, and ``is_complete`` is False.

    Raises:
      ValueError: for arguments out of range, names that are not unique, a batch larger than the training
        part, or a folder that has results and ``resume`` is not set, or results of other settings.
      OSError: if another run writes to the folder.

    Example:
      >>> from mlhf_optax.experiments import grid_contenders
      >>> from mlhf_optax.tasks import get_task
      >>> sgd = grid_contenders(["sgd"])
      >>> comparison = compare(get_task("digits-mlp"), sgd, [1, 2], seeds=[0], timed=False)
      >>> comparison.frame.columns[5:8], comparison.frame["step"].max()
      (['step', 'epoch', 'train_loss'], 2)
    """
    steps = tuple(log_steps(500) if steps is None else steps)
    if not steps or steps[0] < 1 or not all(a < b for a, b in pairwise(steps)):
        raise ValueError(f"`steps` must ascend from 1 or more, got {steps}")
    seeds = list(seeds)
    if not seeds:
        raise ValueError("`seeds` is empty; give at least one seed")
    names = [name for contender in contenders for name in contender.names]
    if len(set(names)) < len(names):
        raise ValueError(f"names of optimizers must be unique, got {names}")
    counter = _Counter(steps[-1] * len(seeds) * len(names), on_progress)
    entries, is_complete = [], False
    with contextlib.nullcontext() if folder is None else locked_folder(folder) as where:
        try:
            seconds = _measure_time(task, contenders, where, counter) if timed else {}
            program = None
            for contender in contenders:
                make = contender.program
                how: dict[str, Any] = {"like": program, "eval_params": contender.eval_params}
                program = make(task) if make else Program(task, contender.make_optimizer, **how)
                count = len(contender.names)
                size = group_size or (1 if program.is_sequential else count)
                its_time = {"seconds_per_step": seconds.get(contender.names[0])}
                for first in range(0, count, size):
                    part = slice(first, first + size)
                    group = _Group(program, contender, part, steps, seeds, where, resume)
                    of_group = group.finished() or group.train(counter)
                    counter.finish(group.num_steps)
                    entries += [entry | its_time for entry in of_group]
            is_complete = True
        except KeyboardInterrupt:
            pass  # what is finished is returned
    about = with_origin(command, **_sizes(task), steps_per_epoch=steps_per_epoch(task), seeds=seeds)
    return Comparison(frame_of(entries, steps_per_epoch(task)), about, is_complete)


def _sizes(task: Task) -> dict[str, Any]:
    shapes = jax.eval_shape(task.init_fn, jax.random.key(0))
    return {
        "task": task.name,
        "batch_size": task.batch_size,
        "num_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        "num_train": num_examples(task.data.train),
    }


class _Counter:
    """Counts steps of all runs, and tells the callback."""

    def __init__(self, total: int, on_progress: OnProgress | None):
        self.done, self.total, self._tell = 0, total, on_progress or (lambda progress: None)
        self._finished = 0

    def advance(self, optimizer: str, steps: int, loss: float | None = None) -> None:
        self.done += steps
        self._tell(Progress(optimizer, self.done, self.total, loss))

    def finish(self, steps: int) -> None:
        """Counts all steps of a group, also those that nobody had to take."""
        self._finished += steps
        self.done = self._finished


def _measure_time(
    task: Task, contenders: Sequence[Contender], folder: Path | None, counter: _Counter
) -> dict[str, float]:
    """Measures the first optimizer of each contender; with a folder, only once on a machine."""
    counter.advance("", 0)
    path, machine = folder and folder / "seconds_per_step.json", machine_info()
    known = json.loads(path.read_text()) if path and path.exists() else {}
    seconds = known["seconds"] if known.get("machine") == machine else {}
    if {contender.names[0] for contender in contenders} <= set(seconds):
        return seconds
    first = {
        contender.names[0]: (contender.make_optimizer, {k: v[0] for k, v in contender.stacked.items()})
        for contender in contenders
        if contender.clock is None
    }
    seconds |= seconds_per_step(task, first) if first else {}
    seconds |= {one.names[0]: one.clock(task) for one in contenders if one.clock is not None}
    if path:
        write_json(path, {"machine": machine, "seconds": seconds})
    return seconds


class _Group:
    """Settings that advance together, and their files: entries when finished, checkpoints until then."""

    def __init__(
        self,
        program: Program,
        contender: Contender,
        part: slice,
        steps: tuple[int, ...],
        seeds: list[int],
        folder: Path | None,
        resume: bool,
    ):
        self.program, self.contender, self.part, self.resume = program, contender, part, resume
        self.steps, self.seeds, self.all_seeds, self.kept = steps, seeds, seeds, []
        self.names = contender.names[part]
        self.num_steps = steps[-1] * len(seeds) * len(self.names)
        about = _sizes(program.task) | {"record_steps": steps, "names": self.names}
        about["settings"] = contender.settings[part]
        self.about: dict[str, Any] = json.loads(json.dumps(about))
        stem = re.sub(r"[^a-z0-9.]+", "-", self.names[0].lower())
        self.path, self.checkpoints = (folder and folder / name for name in (f"{stem}.json", stem))

    def finished(self) -> list[dict[str, Any]]:
        """Returns the entries if they are there; an empty list if seeds are missing, or all of them."""
        if self.path is None or self.checkpoints is None:
            return []
        if not self.resume and (self.path.exists() or self.checkpoints.exists()):
            raise ValueError(
                f"{self.path.parent} already has results of {self.names[0]}; set `resume` (--resume) to go "
                "on from them, or use another folder"
            )
        if not self.path.exists():
            return []
        found = json.loads(self.path.read_text())
        there, trained = found.get("about"), found.get("seeds", [])
        if there != self.about or trained != self.all_seeds[: len(trained)]:
            raise ValueError(
                f"{self.path} has results of other settings ({there}, seeds {trained} there; {self.about}, "
                f"seeds {self.all_seeds} now); use another folder"
            )
        if trained == self.all_seeds:
            return found["entries"]
        self.kept, self.seeds = found["entries"], self.all_seeds[len(trained) :]
        return []

    def train(self, counter: _Counter) -> list[dict[str, Any]]:
        """Trains from the last checkpoint on; writes the entries."""
        stacked = {name: np.asarray(values)[self.part] for name, values in self.contender.stacked.items()}
        grid = RunGrid(self.program, stacked, self.seeds, self.steps[-1])
        # Measures by recorded step, setting and seed. What has diverged has no accuracy.
        curves = np.full((len(MEASURES), len(self.steps), grid.num_settings, grid.num_seeds), np.inf)
        curves[MEASURES.index("test_accuracy")] = 0.0
        runs = grid.num_settings * grid.num_seeds
        for index in range(self._restore(grid, curves), len(self.steps)):
            while grid.steps_done < self.steps[index]:
                grid.step()
                if grid.steps_done % _WAIT_EVERY == 0:
                    grid.wait()  # else steps would be queued up, and progress would be of the queue
                counter.advance(self.names[0], runs)
            curves[:, index] = grid.train_loss(), grid.test_loss(), grid.test_accuracy()
            curves[:2, index] = np.where(np.isfinite(curves[:2, index]), curves[:2, index], np.inf)
            counter.advance(self.names[0], 0, float(curves[0, index].mean(axis=-1).min()))
            if self.checkpoints:
                # As integers, since jax would round them to float32.
                tree = {"state": grid.state, "curves": curves.view(np.uint32)}
                save_checkpoint(self.checkpoints, index + 1, tree, self.about | {"seeds": self.seeds})
            if not np.isfinite(curves[0, index]).any():
                break
        return self._finish(curves)

    def _restore(self, grid: RunGrid, curves: np.ndarray) -> int:
        """Sets runs and curves to the last checkpoint; returns how many recorded steps it has."""
        if not self.checkpoints or not self.resume:
            return 0
        template = {"state": jax.eval_shape(lambda: grid.state), "curves": curves.view(np.uint32)}
        found = load_last_checkpoint(self.checkpoints, template, self.about | {"seeds": self.seeds})
        if found is None:
            return 0
        count, tree = found
        grid.state, grid.steps_done = tree["state"], self.steps[count - 1]
        curves[...] = np.asarray(tree["curves"]).view(np.float64)
        return count

    def _finish(self, curves: np.ndarray) -> list[dict[str, Any]]:
        entries = []
        for index, name in enumerate(self.names):
            about = {"optimizer": name, "family": self.contender.family, "steps": list(self.steps)}
            about["label"] = self.contender.labels[self.part][index]
            about["setting"] = self.about["settings"][index]
            new = [
                {"seed": seed} | dict(zip(MEASURES, map(finite_or_none, values), strict=True))
                for seed, values in zip(self.seeds, curves[:, :, index].transpose(2, 0, 1), strict=True)
            ]
            old = self.kept[index]["curves"] if self.kept else []
            entries.append(about | {"curves": [*old, *new]})
        if self.path and self.checkpoints:
            write_json(self.path, {"about": self.about, "seeds": self.all_seeds, "entries": entries})
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return entries
