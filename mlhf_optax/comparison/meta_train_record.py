"""The record of a meta-training, which ships with its meta-parameters."""

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlhf_optax.comparison.record import machine_info, versions
from mlhf_optax.meta_training import Progressed
from mlhf_optax.tasks import Task

TOLD = (
    "settings",
    "start",
    "iterations",
    "stopped_after",
    "seed",
    "validation_steps",
    "same_batch_weight",
    "curvature_batch_size",
    "config",
)


def make_record(
    problem: Task, output: Path, done: Progressed, about: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the record of a meta-training: how it was made, and how to use what came of it.

    Args:
      problem: the task.
      output: folder of the meta-training, with its metrics and validations.
      done: what it returned.
      about: the settings that it was run with; of these, ``TOLD`` are told.
      options: ``num_cg_steps``, ``max_update_ratio`` and ``step_loss``, as the optimizer has them.

    Returns:
      The record, JSON values.

    Example:
      See ``meta_params.json`` of any meta-training, or ``list_pretrained()["digits"]``.
    """
    validation = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    every = max(1, len(metrics) // 50)
    names = ("iteration", "l_p", "l_s", "inner_loss", "log_inner_loss", "age")
    return {
        "optimizer": "mlhf",
        "task": problem.name,
        "trained_on": f"{problem.description}; the part for meta-training only",
        "learning_rate": about["learning_rate"],
        "batch_size": about["batch_size"],
        "num_cg_steps": options["num_cg_steps"],
        "max_update_ratio": options["max_update_ratio"],
        "curvature_batch_size": about["curvature_batch_size"],
        "step_loss": options["step_loss"],
        "meta_training": {key: about[key] for key in TOLD},
        "best_iteration": int(done.best_iteration),
        "seconds": round(float(np.sum([line["seconds"] for line in metrics])), 1),
        "totals": {name: int(value) for name, value in done.state.counts.items()},
        "validation": validation,
        "curves": [{name: line[name] for name in names} for line in metrics[::every]],
        "command": shlex.join(["mlhf-optax", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine_info(),
        "versions": versions(),
    }


def _commit() -> str | None:
    """The commit of the source tree, or None where the package is not in one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


__all__ = ["TOLD", "make_record"]
