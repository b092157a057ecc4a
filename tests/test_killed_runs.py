"""A meta-training of MLHF that is killed again and again ends bit for bit as one that was left alone.

Run as a script, this file is that meta-training: `python test_killed_runs.py FOLDER [ITERATION]`. With
an iteration it kills itself soon after it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import problems

from mlhf_optax import Settings, init_meta_params
from mlhf_optax.meta_training import MetaTrainingConfig, Schedule, Validation, meta_train, mlhf_optimizer
from mlhf_optax.meta_training.checkpoints import list_checkpoints

ITERATIONS = 200
KILL_AFTER = (50, 130)


def kill_soon_after(iteration):
    """Sends SIGKILL a dozen iterations later, from a thread: in the middle of whatever is being done."""

    def kill():
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(now, metrics):
        if now == iteration:
            threading.Thread(target=kill).start()

    return progress


def meta_train_tiny(folder, kill_after=None):
    task = SimpleNamespace(
        init_fn=lambda key: {"kernel": 0.5 * jax.random.normal(key, (3, 2))},
        predict_fn=problems.linear,
        loss_fn=problems.LOSS,
    )

    def sample(key):
        image = jax.random.normal(key, (2, 3, 8, 3))
        return {"image": image, "label": (image[..., 0] > 0.2).astype(jnp.int32)}

    @jax.jit
    def validate(meta_params):
        """Not a training, but a number that depends on every bit and does not fall for ever."""
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(meta_params))
        return Validation(jnp.sin(30 * total), jnp.stack([total]), total)

    meta_train(
        task,
        mlhf_optimizer(num_cg_steps=1, unroll=1),
        init_meta_params(jax.random.key(0), Settings(), layer_types=["dense_kernel"], units=(2,)),
        sample,
        validate,
        folder,
        Schedule(ITERATIONS, checkpoint_every=20, validate_every=30, report_every=1),
        MetaTrainingConfig(num_tasks=2, unroll_length=2, replay_capacity=5),
        resume=True,
        progress=kill_soon_after(kill_after),
    )


def run(folder, *arguments):
    """The run as a process of its own; returns how it ended. All of them share what they compile."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, __file__, str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def lines(folder, name, ending=".jsonl"):
    found = [json.loads(line) for line in (folder / f"{name}{ending}").read_text().splitlines()]
    for line in found:
        line.pop("seconds", None)
    return found


def test_kill_minus_nine_changes_nothing(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert run(alone) == 0
    for iteration in KILL_AFTER:
        assert run(killed, iteration) == -signal.SIGKILL
    assert run(killed) == 0
    for name in ("metrics", "validation"):
        assert lines(killed, name) == lines(alone, name)
    assert len(lines(alone, "metrics")) == ITERATIONS
    # The state as a whole: meta-parameters, the best ones, trainings, replay, random keys.
    last = [list_checkpoints(folder / "checkpoints")[0] for folder in (alone, killed)]
    assert last[0].name == last[1].name == f"checkpoint-{ITERATIONS:08d}.safetensors"
    assert last[0].read_bytes() == last[1].read_bytes()
    assert not list((killed / "checkpoints").glob(".*"))
    # What was done again is kept beside what counts.
    again = lines(killed, "metrics", ".jsonl.old")
    assert again
    assert all(line in lines(alone, "metrics") for line in again)


if __name__ == "__main__":
    meta_train_tiny(Path(sys.argv[1]), *map(int, sys.argv[2:]))
