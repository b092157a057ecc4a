"""MLHF and its rivals on the held-out tasks."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from mlhf_optax import load_pretrained, lodo, mlhf
from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.experiments import (
    Contender,
    constant_contender,
    default_adam,
    grid_contenders,
    learned_contender,
    rates_per_decade,
)
from mlhf_optax.learned import LEARNED
from mlhf_optax.tasks import Task

STEP_OPTIONS = {"max_growth": 1.0, "num_cg_steps": 2, "curvature_batch_size": 0.25}
BEST_CONSTANT = {"metric": "kronecker", "gradient_decay": 0.86, "unit_decay": 0.98, **STEP_OPTIONS}
RATES = {
    "adam": rates_per_decade(1e-4, 1e-1),
    "sgd": rates_per_decade(1e-3, 1.0),
    "muon": rates_per_decade(1e-3, 1e-1),
}
_LODO_SETTING = {"learning_rate": 0.08459, "meta_learning_rate": 7.946e-6, "momentum": 0.9343}
LODO = Contender("lodo", ("lodo",), (_LODO_SETTING,), lambda: lodo(**_LODO_SETTING), labels=("LODO",))
FAITHFUL = "cifar10"
"""MLHF as in the paper, with an LSTM per coordinate and layer type: of convolutions and dense layers."""
LEARNED_RIVALS = (
    *("l2l", "rnnprop", "hyperadam", "variational_hyperadam", "hierarchical"),
    *(LODO.family, FAITHFUL),
)
ON_THE_SHELF = {*LEARNED, LODO.family}
"""Families of all learned optimizers, MLHF among them."""


def contenders_for(task: Task, options: Any, length: int) -> list[Contender]:
    """Returns MLHF and its rivals for trainings of so many steps, by the options of ``held_out.py``."""
    pretrained = load_pretrained(options.meta_params)
    changes: dict[str, Any] = {} if options.num_cg_steps is None else {"num_cg_steps": options.num_cg_steps}
    rivals = [
        learned_contender(task, pretrained, source=options.meta_params, **changes),
        constant_contender(task, options.dampings[:1], **BEST_CONSTANT),
        untrained_contender(task),
        default_adam(),
        *(grid_contenders([family], rates=rates)[0] for family, rates in RATES.items()),
    ]
    if options.dampings[1:]:
        rivals.append(constant_contender(task, options.dampings[1:], **BEST_CONSTANT))
    if options.cosine:
        own, *others = (with_cosine(contender, length) for contender in rivals)
        # A schedule bounds the learned rate of MLHF; what is multiplied by it would fall twice.
        changes["learning_rate"] = optax.cosine_decay_schedule(1.0, length)
        bounded = functools.partial(pretrained.optimizer, task.predict_fn, task.loss_fn, **changes)
        return [dataclasses.replace(own, make_optimizer=bounded), *others]
    return [*rivals, *(rival_contender(task, name) for name in options.learned if knows_layers(name, task))]


def with_cosine(contender: Contender, length: int) -> Contender:
    """Returns optimizers whose updates fall along a cosine to zero after so many steps."""
    schedule = optax.cosine_decay_schedule(1.0, length)

    def make(**setting: Any) -> optax.GradientTransformation:
        return optax.chain(contender.make_optimizer(**setting), optax.scale_by_schedule(schedule))

    settings = tuple({**setting, "cosine_steps": length} for setting in contender.settings)
    return dataclasses.replace(contender, make_optimizer=make, settings=settings)


def rival_contender(task: Task, name: str) -> Contender:
    """Returns a learned optimizer of the literature."""
    if name == LODO.family:
        return LODO
    return learned_contender(task, load_pretrained(name), name=name * (name == FAITHFUL), source=name)


def knows_layers(name: str, task: Task) -> bool:
    """Returns whether a task has only layers for which an optimizer was meta-trained."""
    if name != FAITHFUL:
        return True
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    try:
        jax.eval_shape(rival_contender(task, name).make_optimizer().init, params)
    except ValueError as error:
        if "layer type" in str(error):
            return False
        raise
    return True


def name_and_label(name: str) -> tuple[str, str]:
    """Returns what results and what tables call a learned optimizer."""
    if name == LODO.family:
        return LODO.names[0], LODO.labels[0]
    if name == FAITHFUL:
        return f"mlhf {name}", f"{LEARNED['mlhf'].label} {name}"
    return name, LEARNED[name].label


def untrained_contender(task: Task) -> Contender:
    """Returns MLHF before meta-training, which is a constant with a unit of damping for every tensor."""
    meta_params = init_tensor_lstm(jax.random.key(0))
    optimizer = mlhf(meta_params, task.predict_fn, task.loss_fn, **STEP_OPTIONS)
    return Contender("untrained", ("untrained",), (STEP_OPTIONS,), lambda: optimizer)
