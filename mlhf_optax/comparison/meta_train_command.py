"""What ``mlhf-optax meta-train`` does once its arguments are parsed."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlhf_optax import meta_training as mt
from mlhf_optax.comparison.meta_train_record import make_record
from mlhf_optax.comparison.meta_train_start import learned_options, starting_point
from mlhf_optax.curvature import CurvatureBatch
from mlhf_optax.layer_types import layer_types
from mlhf_optax.pretrained.files import save_meta_params
from mlhf_optax.tasks import (
    Task,
    check_batch_size,
    epoch_indices,
    get_task,
    num_examples,
    sample_batches,
    take,
)

_VALIDATION_EXAMPLES = 4096  # on which the loss is taken; all at once, so their number is bounded
_NUM_CG_STEPS = 4


def run_meta_training(
    *,
    task: str,
    output: Path,
    iterations: int,
    num_tasks: int,
    unroll_length: int,
    batch_size: int | None,
    meta_learning_rate: float,
    seed: int,
    resume: bool,
    checkpoint_every: int,
    validate_every: int,
    validation_steps: tuple[int, ...],
    settings: str | None = None,
    start: str | None = None,
    initial: Mapping[str, float] | None = None,
    task_options: Mapping[str, Any] | None = None,
    learning_rate: float = 1.0,
    keep_probability: float = 0.95,
    age_scale: float | None = None,
    replay_opt_state: bool = False,
    same_batch_weight: float = 1.0,
    curvature_batch_size: CurvatureBatch = None,
    stop_after: int | None = None,
    console: Console | None = None,
) -> Path:
    """Meta-trains MLHF on a ready task and writes the best meta-parameters by validation.

    Args:
      task: name of a ready task; only its part for meta-training is used.
      output: folder for metrics, checkpoints and the result, ``meta_params.safetensors``.
      iterations: meta-iterations.
      num_tasks: inner trainings side by side.
      unroll_length: steps of an unroll.
      batch_size: examples a mini-batch; the task's own for meta-training if None.
      meta_learning_rate: peak rate of Adam; it falls along a cosine to a hundredth.
      seed: decides everything that is random.
      resume: go on from the last checkpoint.
      checkpoint_every: meta-iterations between checkpoints.
      validate_every: meta-iterations between validations.
      validation_steps: when the loss is recorded in a validation run.
      settings: ``"default"``, ``"relative"`` (damping in the dimension of curvature), ``"paper"`` or
        ``"authors"``: what the LSTMs see and mean, and the losses and stabilisers that go with it;
        those of ``start``, or ``"default"``, if None.
      start: name or path of meta-parameters to go on from; layer types that they lack start untrained.
      initial: ``initial_damping`` and ``initial_preconditioner``, where they are not those of ``settings``.
      task_options: arguments of the function that makes the task, such as ``data_dir``.
      learning_rate: inner learning rate.
      keep_probability: chance that an inner training goes on after an unroll.
      age_scale: makes that chance grow with age; see :class:`mlhf_optax.meta_training.MetaTrainingConfig`.
      replay_opt_state: replay trainings with their LSTM states.
      same_batch_weight: weight in ``l_s`` of the gain on the step's own mini-batch.
      curvature_batch_size: part of a mini-batch for GGN products, while meta-training and in the record.
      stop_after: write the result after so many meta-iterations of the schedule; None for all of them.
      console: where to print.

    Returns:
      The path of the result.

    Raises:
      ValueError: for an unknown task or setting, a folder with checkpoints without ``resume``, or
        checkpoints of other settings.

    Example:
      ``mlhf-optax meta-train digits-mlp --iterations 1000 --output runs/digits``
    """
    console = Console() if console is None else console
    problem = get_task(task, **(task_options or {}))
    types = sorted(set(jax.tree.leaves(layer_types(jax.eval_shape(problem.init_fn, jax.random.key(0))))))
    point = starting_point(settings, start, initial)
    meta_params, options = point.meta_params(jax.random.key(seed), types), learned_options(point.name)
    batch_size = problem.meta_batch_size if batch_size is None else batch_size
    check_batch_size(dataclasses.replace(problem, meta_batch_size=batch_size), "meta_train")
    config = mt.MetaTrainingConfig(
        num_tasks=num_tasks,
        unroll_length=unroll_length,
        meta_learning_rate=meta_learning_rate,
        decay_iterations=iterations,
        keep_probability=keep_probability,
        age_scale=age_scale,
        replay_opt_state=replay_opt_state,
    )
    learned = mt.mlhf_optimizer(
        learning_rate,
        num_cg_steps=_NUM_CG_STEPS,
        curvature_batch_size=curvature_batch_size,
        same_batch_weight=same_batch_weight,
        **options,
    )
    about = {"task": problem.name, "iterations": iterations, "batch_size": batch_size}
    about |= {"settings": point.name, "start": start, "learning_rate": learning_rate}
    about |= {"validation_steps": list(validation_steps)}
    about |= {"same_batch_weight": same_batch_weight, "curvature_batch_size": curvature_batch_size}
    about |= {"lstm_settings": meta_params.settings.to_json()}
    examples = jax.tree.map(jnp.asarray, problem.data.meta_train)
    shape = (num_tasks, unroll_length + 1, batch_size)
    schedule = mt.Schedule(iterations, checkpoint_every, validate_every, stop_after=stop_after)
    with _progress_bar(console) as bar:
        done = mt.meta_train(
            problem,
            learned,
            meta_params,
            functools.partial(draw_batches, problem, examples, shape),
            _validator(problem, learned, examples, validation_steps),
            output,
            schedule,
            config,
            seed=seed,
            resume=resume,
            about=about,
            progress=_reporter(bar, schedule.last),
        )
    about |= {"seed": seed, "stopped_after": schedule.last, "config": dataclasses.asdict(config)}
    record = make_record(problem, output, done, about, {"num_cg_steps": _NUM_CG_STEPS, **options})
    path = save_meta_params(output / "meta_params.safetensors", done.best_meta_params, record)
    best = int(done.best_iteration)
    console.print(f"best meta-parameters by validation: iteration {best} of {schedule.last}, in {path}")
    console.print(f"try them: mlhf-optax train {task} --meta-params {path}", soft_wrap=True)
    return path


def draw_batches(task: Task, examples: Any, shape: tuple[int, ...], key: jax.Array) -> Any:
    """Returns random mini-batches, augmented as those that networks are trained on.

    Args:
      task: the task.
      examples: a part of its data, on the device.
      shape: leading shape of the result, such as (num_tasks, T + 1, B).
      key: random key.

    Returns:
      A pytree like ``examples`` with leaves of shape ``(*shape, ...)``; can be used under ``jit``.

    Example:
      >>> task = get_task("digits-mlp")
      >>> draw_batches(task, task.data.meta_train, (3, 2), jax.random.key(0))["label"].shape
      (3, 2)
    """
    draw_key, augment_key = jax.random.split(key)
    return task.augment_fn(augment_key, sample_batches(examples, draw_key, shape))


def _validator(problem: Task, learned, examples, steps: tuple[int, ...]):
    """Returns ``validate(meta_params)``: fixed fresh starts on the part for meta-training."""
    size = min(problem.batch_size, num_examples(examples))
    indices = epoch_indices(jax.random.key(1), num_examples(examples), size, steps[-1])
    batches = problem.augment_fn(jax.random.key(3), take(examples, indices))
    examples = jax.tree.map(lambda leaf: leaf[:_VALIDATION_EXAMPLES], examples)
    validate = mt.make_validation(problem, learned, steps)
    return functools.partial(_call_validation, validate, batches, examples)


def _call_validation(validate, batches, examples, meta_params):
    return validate(meta_params, batches, examples, jax.random.key(2))


def _progress_bar(console: Console) -> Progress:
    columns = (
        TextColumn("meta-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _reporter(bar: Progress, iterations: int):
    line = bar.add_task("meta-training", total=iterations, losses="compiling")

    def report(iteration: int, metrics: dict[str, float]) -> None:
        losses = f"l_p {metrics['l_p']:.3g}  l_s {metrics['l_s']:.3g}  inner loss {metrics['inner_loss']:.3g}"
        bar.update(line, completed=iteration, losses=losses)

    return report


__all__ = ["draw_batches", "run_meta_training"]
