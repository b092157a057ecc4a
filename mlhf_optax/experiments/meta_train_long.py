"""Meta-trains a learned optimizer over long horizons on several tasks, and records how it was made."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax import meta_training as mt
from mlhf_optax.experiments.meta_train import load_start, make_record
from mlhf_optax.learned import LearnedFamily
from mlhf_optax.meta_training.interface import task_loss
from mlhf_optax.pretrained import save_meta_params
from mlhf_optax.support.spread import make_spread
from mlhf_optax.tasks import Task

RECIPE = mt.LongHorizonConfig(
    num_pairs=4,
    sigma=0.05,
    horizons=(20, 3000),
    horizon_exponent=0.5,
    init_spread=0.5,
    loss_floor=3e-3,
    loss_ceiling=3.0,
    early_steps=30.0,
    difference_bound=0.4,
    meta_learning_rate=3e-3,
    final_rate_share=0.05,
    meta_gradient_clip=3.0,
    average_decay=0.99,
    task_axis="vmap",
)
"""How the shipped general meta-parameters were made."""

_JUDGED = 2000  # examples on which validation takes the loss
_STARTS = 2  # trainings of every validation task
_WORST = 10.0  # a spike, which may have passed a step later, counts as so many times the constant's loss


def meta_train_on_tiny_tasks(
    tasks: Sequence[Task],
    validation_tasks: Sequence[Task],
    family: LearnedFamily,
    options: Any,
    output: Path,
    schedule: mt.Schedule,
    config: mt.LongHorizonConfig,
    *,
    start: str | None = None,
    validation_steps: tuple[int, ...] = (10, 30, 100, 300, 1000),
    seed: int = 0,
    resume: bool = False,
    command: str = "",
    on_progress: Callable[[int, dict[str, float]], None] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Path:
    """Meta-trains over long horizons and writes the best meta-parameters by validation.

    Args:
      tasks: what is trained, such as :func:`mlhf_optax.tasks.tiny_tasks`.
      validation_tasks: networks by which meta-parameters are chosen.
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
      mesh: devices of this process, over which the pairs of a task are spread
        (:func:`mlhf_optax.meta_training.make_long_horizon_step`); None for one device.

    Returns:
      The path of the result.

    Raises:
      ValueError: for options that contradict the start, a start of another optimizer, or what
        :func:`mlhf_optax.meta_training.meta_train` refuses.
      OSError: if ``start`` is not there, or ``output`` is in use or cannot be written to.

    Example:
      ``mlhf-optax meta-train-long --iterations 2000 --output runs/general``
    """
    known = load_start(family, start)
    options = family.resolve(options, known)
    learned = family.learned(options, known)

    def initial(optimizer: mt.LearnedOptimizer) -> Any:
        assert optimizer.init is not None  # every family has one
        return optimizer.init(jax.random.key(seed), tasks[0])

    # Scores are over the untrained optimizer also where others are gone on from, so that they compare.
    untrained = initial(family.learned(options, None))
    names = [task.name for task in tasks]
    made = {**dataclasses.asdict(options), "start": start, "iterations": schedule.iterations}
    made |= {"tasks": names, "validation_tasks": [task.name for task in validation_tasks]}
    made |= {"validation_steps": list(validation_steps), "config": dataclasses.asdict(config)}
    made["config"]["horizons"] = list(config.horizons)
    done = mt.meta_train(
        None,
        None,
        initial(learned),
        _sampler(tasks, config, mesh),
        _Validator(validation_tasks, learned, untrained, validation_steps, config.loss_floor),
        output,
        schedule,
        seed=seed,
        resume=resume,
        about={"optimizer": family.name, **made},
        progress=on_progress,
        algorithm=mt.make_long_horizon_step(tasks, learned, config, mesh=mesh),
    )
    made |= {"stopped_after": schedule.last, "seed": seed}
    about = {"task": "tiny tasks", "trained_on": ", ".join(names), "batch_size": tasks[0].batch_size}
    record = make_record(about, family, options, output, done, made, command)
    return save_meta_params(output / "meta_params", done.best_meta_params, record)


def _sampler(
    tasks: Sequence[Task], config: mt.LongHorizonConfig, mesh: jax.sharding.Mesh | None
) -> Callable[[chex.PRNGKey], Any]:
    """Returns ``sample(key)``: for every task the mini-batches of all its pairs."""
    spread = make_spread(mesh, None, config.num_pairs, "num_pairs")
    shape = (config.num_pairs, config.truncation)

    def sample(key):
        keys = jax.random.split(key, len(tasks))
        batches = tuple(task.draw(own, shape) for task, own in zip(tasks, keys, strict=True))
        # Every device draws what its own pairs see.
        return batches if spread is None else jax.lax.with_sharding_constraint(batches, spread.cut)

    return sample


class _Validator:
    """Whole trainings of each task; the score is the mean log of the loss over that of the untrained.

    Both losses have a floor, a share of the loss before the first step: how small the loss of a solved
    problem is would otherwise outweigh everything else.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        learned: mt.LearnedOptimizer,
        untrained: Any,
        steps: tuple[int, ...],
        loss_floor: float,
    ):
        self._untrained, self._reference = untrained, None
        self._runs, floors = [], []
        for task in tasks:
            judged = jax.tree.map(lambda leaf: jnp.asarray(leaf[:_JUDGED]), task.data.meta_train)
            losses = jax.jit(mt.training_losses(task, learned, steps))
            for start in range(_STARTS):
                batches = task.draw(jax.random.key(2 * start + 1), (steps[-1],))
                key = jax.random.key(2 * start + 2)
                self._runs.append((losses, batches, judged, key))
                floors.append(loss_floor * float(task_loss(task, task.init_fn(key), judged)))
        self._floors = np.array(floors)[:, None]

    def __call__(self, meta_params: Any) -> mt.Validation:
        if self._reference is None:
            self._reference = self._losses(self._untrained)
        losses = self._losses(meta_params)
        relative = np.log((losses + self._floors) / (self._reference + self._floors))
        return mt.Validation(
            score=jnp.asarray(np.minimum(relative, np.log(_WORST)).mean()),
            losses=jnp.asarray(np.exp(relative.mean(axis=0))),
            worst_loss=jnp.asarray(np.exp(relative.max())),
        )

    def _losses(self, meta_params: Any) -> np.ndarray:
        """Losses of shape (trainings, steps); what is not finite counts as 1000."""
        losses = [np.asarray(run(meta_params, *data), float) for run, *data in self._runs]
        return np.nan_to_num(np.stack(losses), nan=1e3, posinf=1e3)
