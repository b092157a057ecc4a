"""Meta-trains a learned optimizer on a ready task, and records how it was made."""

import dataclasses
import datetime
import functools
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mlhf_optax import meta_training as mt
from mlhf_optax.experiments.origin import machine_info, versions
from mlhf_optax.learned import LearnedFamily
from mlhf_optax.pretrained import Pretrained, load_pretrained, save_meta_params
from mlhf_optax.tasks import Task, check_batch_size, epoch_indices, num_examples, sample_batches, take

_VALIDATION_EXAMPLES = 4096  # on which the loss is taken; all at once, so their number is bounded
_NUM_CURVE_POINTS = 50

# Metrics of every meta-training that say how the work goes, not how good the meta-parameters are.
_HEALTH = {"seconds", "meta_gradient_norm", "healthy"}
_HEALTH |= {"diverged", "stuck", "replayed", "fresh", "dropped_gradients"}


def meta_train_task(
    task: Task,
    family: LearnedFamily,
    options: Any,
    output: Path,
    schedule: mt.Schedule,
    config: mt.MetaTrainingConfig,
    *,
    start: str | None = None,
    validation_steps: tuple[int, ...] = (10, 30, 100, 300),
    seed: int = 0,
    resume: bool = False,
    command: str = "",
    on_progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Path:
    """Meta-trains a learned optimizer on a task and writes the best meta-parameters by validation.

    Args:
      task: the task; only its part for meta-training is used, in batches of ``task.meta_batch_size``.
      family: the learned optimizer.
      options: how it is meta-trained, an instance of ``family.options``.
      output: folder for metrics, checkpoints and the result, ``meta_params.safetensors``.
      schedule: how long and how often.
      config: how inner trainings are run.
      start: shipped name or path of meta-parameters to go on from; None to start untrained.
      validation_steps: steps after which a validation records the loss.
      seed: decides everything that is random.
      resume: go on from the last checkpoint in ``output``.
      command: the command line, for the record.
      on_progress: see :func:`mlhf_optax.meta_training.meta_train`.

    Returns:
      The path of the result.

    Raises:
      ValueError: for options that contradict the start, a start of another optimizer, a batch larger than
        the data, or what :func:`mlhf_optax.meta_training.meta_train` refuses.
      OSError: if ``start`` is not there, or ``output`` is in use or cannot be written to.

    Example:
      ``mlhf-optax meta-train digits-mlp --iterations 1000 --output runs/digits``
    """
    check_batch_size(task, "meta_train")
    known = load_start(family, start)
    options = family.resolve(options, known)
    learned = family.learned(options, known)
    assert learned.init is not None  # every family has one
    # Options are not nested, so that a later start finds its own where they are looked up.
    made = {**dataclasses.asdict(options), "start": start, "iterations": schedule.iterations}
    made |= {"validation_steps": list(validation_steps)}
    examples = jax.tree.map(jnp.asarray, task.data.meta_train)
    shape = (config.num_tasks, config.unroll_length + 1, task.meta_batch_size)
    done = mt.meta_train(
        task,
        learned,
        learned.init(jax.random.key(seed), task),
        functools.partial(draw_batches, task, examples, shape),
        _validator(task, learned, examples, validation_steps),
        output,
        schedule,
        config,
        seed=seed,
        resume=resume,
        about={"optimizer": family.name, "task": task.name, "batch_size": task.meta_batch_size, **made},
        progress=on_progress,
    )
    made |= {"stopped_after": schedule.last, "seed": seed, "config": dataclasses.asdict(config)}
    about = {
        "task": task.name,
        "trained_on": f"{task.description}; the part for meta-training only",
        "batch_size": task.meta_batch_size,
    }
    record = make_record(about, family, options, output, done, made, command)
    return save_meta_params(output / "meta_params", done.best_meta_params, record)


def draw_batches(task: Task, examples: Any, shape: tuple[int, ...], key: chex.PRNGKey) -> Any:
    """Returns random mini-batches of a part, augmented, with leading axes such as (num_tasks, T + 1, B)."""
    draw_key, augment_key = jax.random.split(key)
    return task.augment_fn(augment_key, sample_batches(examples, draw_key, shape))


def make_record(
    about: Mapping[str, Any],
    family: LearnedFamily,
    options: Any,
    output: Path,
    done: mt.Progressed,
    made: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """Returns the record of a meta-training, ``made`` with these settings, and how to use what came of it."""
    texts = ((output / f"{name}.jsonl").read_text() for name in ("metrics", "validation"))
    metrics, validation = ([json.loads(line) for line in text.splitlines()] for text in texts)
    every = max(1, len(metrics) // _NUM_CURVE_POINTS)
    curve = lambda line: {name: value for name, value in line.items() if name not in _HEALTH}
    return {
        "optimizer": family.name,
        **about,
        **family.record(options),
        "meta_training": dict(made),
        "best_iteration": int(done.best_iteration),
        "seconds": round(sum(line["seconds"] for line in metrics), 1),
        "totals": {name: int(value) for name, value in done.state.counts.items()},
        "validation": validation,
        "curves": [curve(line) for line in metrics[::every]],
        "command": command,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine_info(),
        "versions": versions(),
    }


def shown_losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the meta-losses among metrics, whichever there are, and the loss of the inner trainings."""
    hidden = _HEALTH | {"iteration", "log_inner_loss", "inner_loss", "age"}
    losses = {name: value for name, value in metrics.items() if name not in hidden}
    return losses | ({"inner_loss": metrics["inner_loss"]} if "inner_loss" in metrics else {})


def load_start(family: LearnedFamily, start: str | None) -> Pretrained | None:
    """Returns the meta-parameters to go on from, which must be of the family; None for none."""
    if start is None:
        return None
    known = load_pretrained(start)
    if known.family.name != family.name:
        own = known.family.name
        raise ValueError(f"`start` {start!r} holds meta-parameters of {own!r}, not of {family.name!r}")
    return known


def _validator(task: Task, learned: mt.LearnedOptimizer, examples: Any, steps: tuple[int, ...]) -> Callable:
    """Returns ``validate(meta_params)``: the same fresh starts on the part for meta-training every time."""
    size = min(task.batch_size, num_examples(examples))
    indices = epoch_indices(jax.random.key(1), num_examples(examples), size, steps[-1])
    batches = task.augment_fn(jax.random.key(3), take(examples, indices))
    judged = jax.tree.map(lambda leaf: leaf[:_VALIDATION_EXAMPLES], examples)
    validate = mt.make_validation(task, learned, steps)
    return lambda meta_params: validate(meta_params, batches, judged, jax.random.key(2))


def _commit() -> str | None:
    """The commit of the source tree, or None where the package is not in one."""
    try:
        where = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.check_output(where, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
