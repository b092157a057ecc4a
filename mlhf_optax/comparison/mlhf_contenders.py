"""MLHF as a contender of the comparisons on image tasks: whose meta-parameters, and which variants."""

import argparse
import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from mlhf_optax.comparison.comparison import Contender, mlhf_contender
from mlhf_optax.comparison.experiment_options import UNTRAINED
from mlhf_optax.layer_types import layer_types
from mlhf_optax.meta_params import init_meta_params
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.pretrained.files import Pretrained
from mlhf_optax.tasks.task import Task

_UNTRAINED_RECORD = {
    "optimizer": "mlhf",
    "learning_rate": 1.0,
    "num_cg_steps": 4,
    "max_update_ratio": 0.25,
    "batch_size": 128,
}


def find_meta_params(task: Task, name_or_path: str | None) -> tuple[str, Pretrained]:
    """Returns meta-parameters for a task, and where they came from.

    Args:
      task: the task.
      name_or_path: a shipped name, a path, ``"untrained"``, or None for those recommended for the task.

    Returns:
      Name or path, and the meta-parameters with their record.

    Raises:
      FileNotFoundError: if there are no such meta-parameters.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> source, found = find_meta_params(get_task("digits-mlp"), "untrained")
      >>> source, found.learning_rate
      ('untrained', 1.0)
    """
    source = name_or_path or task.pretrained
    if source != UNTRAINED:
        return source, load_pretrained(source)
    types = jax.tree.leaves(layer_types(jax.eval_shape(task.init_fn, jax.random.key(0))))
    fresh = init_meta_params(jax.random.key(0), layer_types=sorted(set(types)))
    return source, Pretrained(fresh, _UNTRAINED_RECORD)


def mlhf_contenders(task: Task, options: argparse.Namespace) -> list[Contender]:
    """Returns MLHF as ``"mlhf"`` and, if wanted, with part of the batch for its curvature.

    Args:
      task: the task.
      options: parsed by :func:`mlhf_optax.comparison.experiment_options.experiment_parser`.

    Returns:
      ``"mlhf"``, and one contender for each of ``options.cg_steps`` with ``options.curvature_share`` of
      the batch; none if ``options.only`` leaves MLHF out.

    Raises:
      FileNotFoundError: if there are no such meta-parameters.

    Example:
      >>> from mlhf_optax.comparison.experiment_options import experiment_parser
      >>> from mlhf_optax.tasks import get_task
      >>> given = ["--meta-params", "untrained", "--cg-steps", "4", "2"]
      >>> options = experiment_parser(None, "x", 128).parse_args(given)
      >>> [contender.names[0] for contender in mlhf_contenders(get_task("digits-mlp"), options)]
      ['mlhf', 'mlhf curvature 0.25', 'mlhf curvature 0.25 CG 2']
    """
    if options.only and "mlhf" not in options.only:
        return []
    source, learned = find_meta_params(task, options.meta_params)
    settings = learned.recommended
    chosen = {"learning_rate": options.learning_rate, "momentum": options.momentum}
    settings |= {name: value for name, value in chosen.items() if value is not None}
    leaves = jax.tree.leaves(learned.meta_params)
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()

    def contender(name: str, **changes: Any) -> Contender:
        made = mlhf_contender(task, learned.meta_params, source=source, **(settings | changes))
        # Two files of one name may hold other numbers: what is kept must tell them apart.
        about = made.hyperparameters[0] | {"meta_params_digest": digest[:12]}
        return dataclasses.replace(made, names=(name,), hyperparameters=(about,))

    contenders, share = [contender("mlhf", curvature_batch_size=None)], options.curvature_share
    usual = settings["num_cg_steps"]
    for count in dict.fromkeys(options.cg_steps or [usual]) if share else ():
        name = f"mlhf curvature {share:g}" + (f" CG {count}" if count != usual else "")
        contenders.append(contender(name, curvature_batch_size=share, num_cg_steps=count))
    return contenders


__all__ = ["find_meta_params", "mlhf_contenders"]
