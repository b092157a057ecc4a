"""Trains a task for epochs with many optimizers; what is done is kept and never done again.

Every group of settings that advance together leaves a file when it is finished, and a checkpoint at
every epoch at which it is judged. A run that was stopped goes on there, with the same numbers as if it
had not been. Asked for more seeds than the file has, a group trains those that are missing.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mlhf_optax.comparison.comparison import Contender
from mlhf_optax.comparison.epoch_results import EpochResult
from mlhf_optax.comparison.reporting import write_json
from mlhf_optax.comparison.trainings import Program, Trainings
from mlhf_optax.meta_training.checkpoints import load_last_checkpoint, save_checkpoint
from mlhf_optax.tasks import Task, part_size

_WAIT_EVERY = 10  # steps

# on_step(steps taken by one training in this call, mean loss over seeds where it was taken, else None)
OnStep = Callable[[int, float | None], None]


class Plan(NamedTuple):
    """How long to train, and where to keep what is done.

    Attributes:
      num_epochs: length of every training.
      seeds: seeds of the trainings of an optimizer.
      folder: where finished groups and checkpoints lie.
      resume: go on from what lies there.
      group_size: settings that advance together; if None, one where trainings run one after the other,
        else all of a family.
      judge_at: ascending epochs after which loss and accuracy are taken, the last one included;
        :func:`default_judge_at` if None.
    """

    num_epochs: int
    seeds: Sequence[int]
    folder: Path
    resume: bool = False
    group_size: int | None = None
    judge_at: Sequence[int] | None = None


def default_judge_at(num_epochs: int, count: int = 30) -> tuple[int, ...]:
    """Returns epochs to judge at: the first ten, and ``count`` evenly spaced in the logarithm.

    Raises:
      ValueError: if ``num_epochs`` is below one.

    Example:
      >>> default_judge_at(40, count=5)
      (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 40)
    """
    if num_epochs < 1:
        raise ValueError(f"`num_epochs` must be at least 1, got {num_epochs}")
    spaced = np.geomspace(1, num_epochs, count).round().astype(int).tolist()
    return tuple(sorted({*spaced, num_epochs, *range(1, min(10, num_epochs) + 1)}))


def train_epochs(
    task: Task,
    contender: Contender,
    plan: Plan,
    on_step: OnStep | None = None,
    program: Program | None = None,
) -> list[EpochResult]:
    """Trains a task with every setting of a contender.

    Args:
      task: what to train.
      contender: the optimizers.
      plan: how long, and where to keep what is done.
      on_step: called after every step of a group with the number of trainings' steps it took.
      program: how steps are taken; made of task and contender if None.

    Returns:
      A result a setting, with ``seconds_per_step`` 0, as that is measured elsewhere. The curve of a group
      of which every training has diverged ends early, padded with infinity.

    Raises:
      ValueError: if the plan's folder has results and ``resume`` is not set, or they are of other
        settings, or the plan makes no sense.

    Example:
      >>> import tempfile
      >>> from mlhf_optax.comparison.comparison import grid_contenders
      >>> from mlhf_optax.tasks import get_task
      >>> sgd, = grid_contenders(128, ["sgd"])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     results = train_epochs(get_task("digits-mlp"), sgd, Plan(2, [0], Path(folder)))
      >>> results[0].steps, results[0].steps_per_epoch
      ((5, 10), 5)
    """
    judge_at = tuple(plan.judge_at or default_judge_at(plan.num_epochs))
    if list(judge_at) != sorted(set(judge_at)) or judge_at[0] < 1 or judge_at[-1] != plan.num_epochs:
        raise ValueError(
            f"`judge_at` must ascend from 1 or more to the last epoch, {plan.num_epochs}, got {judge_at}"
        )
    program = Program(task, contender.make_optimizer) if program is None else program
    count = len(contender.names)
    size = plan.group_size or (1 if program.is_sequential else count)
    results = []
    for first in range(0, count, size):
        group = _Group(task, contender, slice(first, first + size), plan, judge_at)
        results += group.finished() or group.train(program, on_step or (lambda steps, loss: None))
    return results


def num_parameters(task: Task) -> int:
    """Returns how many parameters the network of a task has.

    Example:
      >>> from mlhf_optax.tasks import digits_mlp
      >>> num_parameters(digits_mlp(hidden=(32,)))
      2410
    """
    shapes = jax.eval_shape(task.init_fn, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


class _Group:
    """Settings that advance together, and their files."""

    def __init__(self, task: Task, contender: Contender, part: slice, plan: Plan, judge_at: tuple[int, ...]):
        self.contender, self.plan, self.judge_at = contender, plan, judge_at
        self.names, self.settings = contender.names[part], contender.hyperparameters[part]
        self.seeds, self.kept = list(plan.seeds), []  # seeds to train, results of those before them
        self.stacked = {name: np.asarray(values)[part] for name, values in contender.stacked.items()}
        self.steps_per_epoch = part_size(task.data.train) // task.batch_size
        self.about = {
            "task": task.name,
            "num_parameters": num_parameters(task),
            "batch_size": task.batch_size,
            "num_train": part_size(task.data.train),
            "num_epochs": plan.num_epochs,
            "judge_at": list(judge_at),
            "seeds": self.seeds,
            "names": list(self.names),
            "hyperparameters": list(self.settings),
        }
        stem = re.sub(r"[^a-z0-9.]+", "-", self.names[0].lower())
        self.file, self.checkpoints = plan.folder / f"{stem}.json", plan.folder / stem

    def finished(self) -> list[EpochResult]:
        """Returns the results if they are there, an empty list if seeds are missing, or all of them."""
        if not self.plan.resume and (self.file.exists() or self.checkpoints.exists()):
            raise ValueError(
                f"{self.plan.folder} already has results of {self.names[0]}; set `resume` (--resume) to go "
                "on from them, or use another folder"
            )
        if not self.file.exists():
            return []
        found = json.loads(self.file.read_text())
        trained = found["about"]["seeds"]
        expected = self.about | {"seeds": self.seeds[: len(trained)]}
        if not trained or found["about"] != json.loads(json.dumps(expected)):
            raise ValueError(
                f"{self.file} has results of other settings ({found['about']} there, {self.about} now); use "
                "another folder"
            )
        results = [EpochResult.from_json(entry, self.contender.family) for entry in found["results"]]
        if trained == self.seeds:
            return results
        self.kept, self.seeds = results, self.seeds[len(trained) :]
        self.about["seeds"] = self.seeds
        return []

    def train(self, program: Program, on_step: OnStep) -> list[EpochResult]:
        """Trains from the last checkpoint on; writes the results."""
        num_steps = self.plan.num_epochs * self.steps_per_epoch
        runs = Trainings(program, self.stacked, self.seeds, num_steps)
        curves = np.full((2, len(self.judge_at), runs.num_settings, runs.num_seeds), np.inf, np.float32)
        curves[1] = 0.0  # accuracy of what has diverged
        start = self._restore(runs, curves)
        for epoch in range(start + 1, self.plan.num_epochs + 1):
            for step in range(self.steps_per_epoch):
                runs.step()
                if step % _WAIT_EVERY == 0:
                    runs.wait()  # else steps would be queued up, and progress would be of the queue
                on_step(runs.num_settings * runs.num_seeds, None)
            if epoch in self.judge_at:
                index = self.judge_at.index(epoch)
                losses = runs.train_loss()
                curves[:, index] = np.where(np.isfinite(losses), losses, np.inf), runs.test_accuracy()
                on_step(0, float(np.min(curves[0, index].mean(axis=-1))))
                tree = {"state": runs.state, "curves": curves}
                save_checkpoint(self.checkpoints, epoch, tree, self.about)
                if not np.isfinite(curves[0, index]).any():
                    break
        return self._write(curves)

    def _restore(self, runs: Trainings, curves: np.ndarray) -> int:
        template = {"state": jax.eval_shape(lambda: runs.state), "curves": curves}
        found = load_last_checkpoint(self.checkpoints, template, self.about) if self.plan.resume else None
        if found is None:
            return 0
        epoch, tree = found
        runs.state, runs.steps_done = tree["state"], epoch * self.steps_per_epoch
        curves[...] = tree["curves"]
        return epoch

    def _write(self, curves: np.ndarray) -> list[EpochResult]:
        losses, accuracies = curves.mean(axis=-1)
        results = [
            EpochResult(
                name=name,
                family=self.contender.family,
                hyperparameters=self.settings[index],
                seeds=len(self.seeds),
                steps=tuple(epoch * self.steps_per_epoch for epoch in self.judge_at),
                train_loss=tuple(losses[:, index].tolist()),
                test_accuracy=float(accuracies[-1, index]),
                seconds_per_step=0.0,
                steps_per_epoch=self.steps_per_epoch,
                test_curve=tuple(accuracies[:, index].tolist()),
                final_losses=tuple(curves[0, -1, index].tolist()),
            )
            for index, name in enumerate(self.names)
        ]
        if self.kept:
            results = [kept.joined(new) for kept, new in zip(self.kept, results, strict=True)]
        about = self.about | {"seeds": list(self.plan.seeds)}
        content = {"about": about, "results": [result.to_json() for result in results]}
        write_json(self.file, content)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        return results


__all__ = ["Plan", "default_judge_at", "train_epochs"]
