"""Trainings to the end: the problems, and one training with its average of weights, kept as it goes."""

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tasks import AUTOENCODERS, TASKS, Folders, Transformer, flax_task, read_shakespeare, text_rows

from mlhf_optax import SoftmaxCrossEntropy
from mlhf_optax.experiments.origin import write_json
from mlhf_optax.experiments.runs import (
    RunState,
    accuracy,
    augmentation_key,
    draw_batch,
    draw_order,
    evaluation_state,
    mean_loss,
    run_step,
    start_params,
)
from mlhf_optax.experiments.scripts import finite_or_none
from mlhf_optax.meta_training.checkpoints import load_last_checkpoint, save_checkpoint
from mlhf_optax.tasks import Dataset, Examples, Task, cifar10_resnet9, digits_mlp, num_examples
from mlhf_optax.tasks.data import freeze

PARTS = ("train", "validation", "test")
_CHUNK = 2048  # examples per forward pass of an evaluation
_VALIDATION = 5000  # images for validation
_AVERAGED = 0.05  # share of a training over which weights are averaged


class Problem(NamedTuple):
    """What is trained to the end.

    Attributes:
      task: its part ``train`` is trained on; its part ``test`` is judged by.
      validation: examples by which settings and the best moment are chosen.
      length: steps.
    """

    task: Task
    validation: Examples
    length: int


def _part(examples: Examples, chosen: slice) -> Examples:
    return {name: array[chosen] for name, array in examples.items()}


def cifar10(folders: Folders, epochs: int, channels: int, whole: bool) -> Problem:
    """Returns the mini ResNet with batch normalisation on CIFAR-10, with crops and mirrored images.

    Validation are 5,000 images of the part for meta-training, which the general meta-parameters have not
    met. With ``whole`` the other 25,000 of it are trained on too.
    """
    task = cifar10_resnet9(channels, data_dir=folders[0], cache_dir=folders[1])
    data = task.data
    validation, rest = (_part(data.meta_train, s) for s in (np.s_[:_VALIDATION], np.s_[_VALIDATION:]))
    train = data.train
    if whole:
        train = freeze(**{name: np.concatenate([rest[name], train[name]]) for name in train})
    task = _with_data(task, train, data.test)
    return Problem(task, validation, epochs * (num_examples(train) // task.batch_size))


def shakespeare(folders: Folders) -> Problem:
    """Returns a transformer of width 64 on a tenth of the text, which it learns by heart in time."""
    texts = read_shakespeare(folders[0])
    rows = {name: text_rows(text) for name, text in texts.items()}
    train = _part(rows["train"], np.s_[: num_examples(rows["train"]) // 10])
    example = jnp.zeros((1, rows["train"]["image"].shape[1]), jnp.int32)
    model, loss_fn = Transformer(64, 65), SoftmaxCrossEntropy()
    task = flax_task("shakespeare", model, example, loss_fn, lambda: Dataset({}), 64)
    return Problem(_with_data(task, train, rows["test"]), rows["validation"], 3000)


def autoencoder(folders: Folders) -> Problem:
    """Returns the deep autoencoder of MNIST; 5,000 images of the part for training are for validation."""
    task = TASKS[next(iter(AUTOENCODERS))](folders)
    train, data = task.data.train, task.data
    return Problem(
        _with_data(task, _part(train, np.s_[_VALIDATION:]), data.test),
        _part(train, np.s_[:_VALIDATION]),
        5000,
    )


def digits() -> Problem:
    """Returns a small network for digits, to show that the script runs."""
    task = digits_mlp(hidden=(16,))
    return Problem(task, task.data.meta_train, 60)


def _with_data(task: Task, train: Examples, test: Examples) -> Task:
    return dataclasses.replace(task, load_data=lambda: Dataset({}, train, test))


class Judge:
    """Losses and accuracies of the parts of a problem, of parameters and of their average."""

    def __init__(self, problem: Problem):
        task = self.task = problem.task
        most = min(_CHUNK, num_examples(task.data.train))
        parts = (_part(task.data.train, np.s_[:most]), problem.validation, task.data.test)
        self.parts = {name: jax.tree.map(jnp.asarray, part) for name, part in zip(PARTS, parts, strict=True)}
        self._state = jax.jit(functools.partial(evaluation_state, task))
        self._one = jax.jit(
            lambda params, part, state: (
                mean_loss(task, params, part, state),
                accuracy(task, params, part, state),
            )
        )

    def __call__(self, params: Any) -> dict[str, float]:
        """Returns numbers by names such as ``"test_loss"`` and ``"validation_accuracy"``."""
        state, found = self._state(params, self.parts["train"]), {}
        for name, part in self.parts.items():
            total, sums = num_examples(part), np.zeros(2)
            for start in range(0, total, _CHUNK):
                chunk = _part(part, np.s_[start : start + _CHUNK])
                sums += np.array(jax.device_get(self._one(params, chunk, state))) * num_examples(chunk)
            found |= dict(zip((f"{name}_loss", f"{name}_accuracy"), (sums / total).tolist(), strict=True))
        return found


class Training(NamedTuple):
    """One optimizer with one setting; ``eval_params`` as in :class:`mlhf_optax.experiments.Contender`."""

    setting: dict[str, Any]
    make: Callable[[], optax.GradientTransformation]
    eval_params: Callable[[Any, Any], Any] | None = None


def train(
    problem: Problem,
    judge: Judge,
    training: Training,
    steps: Sequence[int],
    seed: int,
    path: Path,
    resume: bool,
) -> dict[str, Any]:
    """Trains from a seed to the last of the recorded steps.

    Returns:
      The steps, by ``"raw"`` and ``"average"`` a list of what the judge said, and the seconds per step,
      evaluations left out. It is written to ``path``, and taken from there with ``resume``; until then there
      are checkpoints beside it.
    """
    checkpoints = path.with_suffix("")
    about = {"setting": training.setting, "steps": list(steps), "seed": seed}
    if path.exists() and resume:
        found = json.loads(path.read_text())
        if found["about"] != json.loads(json.dumps(about)):
            raise ValueError(f"{path} has results of other settings; use another folder")
        return found
    if not resume and (path.exists() or checkpoints.exists()):
        raise ValueError(f"{path.parent} already has results; set --resume, or use another folder")
    task, key = problem.task, jax.random.key(seed)
    examples = jax.tree.map(jnp.asarray, task.data.train)
    order, decay = draw_order(task, key, steps[-1]), 1 - 1 / max(1.0, _AVERAGED * steps[-1])
    judged = training.eval_params or (lambda state, params: params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, indices: jax.Array, number: jax.Array, examples: Any) -> Any:
        run, average = carry
        batch = draw_batch(task, examples, indices, augmentation_key(key, number))
        run = run_step(task, training.make, {}, batch, run)
        mix = lambda old, new: decay * old + (1 - decay) * new
        return run, jax.tree.map(mix, average, judged(run.opt_state, run.params))

    def start() -> Any:
        params = start_params(task, key)
        return RunState(params, training.make().init(params)), jax.tree.map(jnp.zeros_like, params)

    carry, records, done, seconds = jax.jit(start)(), {"raw": [], "average": []}, 0, []
    template = {"carry": jax.eval_shape(lambda: carry)}
    kept = checkpoints / "records.json"
    if resume and (last := load_last_checkpoint(checkpoints, template, about)) is not None:
        done, carry = last[0], last[1]["carry"]
        so_far = json.loads(kept.read_text())
        count = steps.index(done) + 1
        records = {name: so_far[name][:count] for name in records}
        seconds = so_far["seconds"][:count]
    for until in steps[steps.index(done) + 1 if done else 0 :]:
        began = time.perf_counter()
        for number in range(done, until):
            carry = step(carry, order[number], np.int32(number), examples)
            if number % 10 == 0:
                jax.block_until_ready(carry)
        jax.block_until_ready(carry)
        seconds.append((time.perf_counter() - began) / (until - done))
        done = until
        run, average = carry
        unbiased = jax.tree.map(lambda leaf: leaf / (1 - decay**done), average)  # noqa: B023
        raw = judge(judged(run.opt_state, run.params))
        for name, found in (("raw", raw), ("average", judge(unbiased))):
            records[name].append({key: finite_or_none(value) for key, value in found.items()})
        write_json(kept, records | {"seconds": seconds})  # first, so that none is missing later
        save_checkpoint(checkpoints, done, {"carry": carry}, about)
        if not math.isfinite(raw["train_loss"]):
            break
    # The first stretch holds the compilation.
    result = {"about": about, "setting": training.setting, "seed": seed, "steps": list(steps)}
    result |= records | {"seconds_per_step": float(np.median(seconds[1:] or seconds))}
    write_json(path, result)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result
