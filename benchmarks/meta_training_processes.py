"""Meta-training in two processes with a core each, against one process with one core.

Both trainers spread the same inner trainings over the devices of all processes: the long-horizon trainer of
the general meta-parameters (``make_long_horizon_step``) its pairs, and ``make_meta_step`` its unrolls of the
LSTM per coordinate. Three ways are measured, each in fresh processes, turn by turn:

- ``one``: one process does all of the work;
- ``two``: two processes, joined by ``jax.distributed``, share it;
- ``apart``: two processes do half of it each, and nothing is exchanged. This is as fast as the machine can
  be: cores share their caches and memory.

Where nothing is exchanged each process is bound to a core of its own. The two that share are not: threads
that exchange would wait for the one that computes. The speed-up is the time of ``one`` over that of ``two``,
each per meta-iteration.

    python benchmarks/meta_training_processes.py --json processes.json --figure processes.png

``--quick``: a small network and few iterations.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from experiment import ONE_THREAD, BenchmarkOptions, command_line, parse_options
from jax.experimental import multihost_utils
from step_contenders import draw_batch, make_task

from mlhf_optax import init_meta_params
from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.learned import LEARNED
from mlhf_optax.meta_training import (
    LongHorizonConfig,
    MetaTrainingConfig,
    make_long_horizon_step,
    make_meta_step,
    mlhf_optimizer,
)

TRAINERS = ("long horizons", "meta_step")
WAYS = {"one": 1, "two": 2, "apart": 2}
"""The ways to run them, and how many processes each has."""


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    repeats: int = 3
    """Rounds, each with fresh processes."""
    task: str = "digits-mlp"
    """Network."""
    batch: int = 512
    """Examples per mini-batch."""
    trainings: int = 16
    """Inner trainings: pairs with long horizons, unrolls with `meta_step`."""
    steps: int = 20
    """Steps of each of them per meta-iteration."""
    iterations: int = 10
    """Meta-iterations that are timed; three more come first."""
    worker: str = ""
    """A process as JSON; used by the script itself."""

    def sizes(self) -> dict[str, Any]:
        """Returns what a process needs to know of them."""
        return {name: getattr(self, name) for name in ("task", "batch", "trainings", "steps", "iterations")}


class Worker(NamedTuple):
    """What one process does."""

    trainer: str
    way: str
    own: int
    """Its number."""
    port: int
    task: str
    batch: int
    trainings: int
    steps: int
    iterations: int


def algorithm(worker: Worker) -> tuple[Any, Any, Any]:
    """Returns ``step``, its first state and the batches for this process."""
    is_joined = worker.way == "two"
    mesh = jax.make_mesh((WAYS[worker.way],), ("trainings",)) if is_joined else None
    count = worker.trainings // 2 if worker.way == "apart" else worker.trainings
    task, key = make_task(worker.task), jax.random.key(0)
    if worker.trainer == "long horizons":
        family = LEARNED["mlhf_general"]
        # Long ones: how often a training begins anew would otherwise depend on chance.
        config = LongHorizonConfig(num_pairs=count, truncation=worker.steps, horizons=(10**6, 10**6))
        init, step = make_long_horizon_step([task], family.learned(family.options()), config, mesh=mesh)
        batches = [draw_batch(worker.task, count, worker.steps, worker.batch)]
        return step, init(key, init_tensor_lstm(key)), batches
    config = MetaTrainingConfig(num_tasks=count, unroll_length=worker.steps)
    init, step = make_meta_step(task, mlhf_optimizer(num_cg_steps=4), config, mesh=mesh)
    batches = draw_batch(worker.task, count, worker.steps + 1, worker.batch)
    return step, init(key, init_meta_params(key)), batches


def work(worker: Worker) -> float:
    """Returns the seconds of a meta-iteration in this process."""
    if worker.way != "two" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[worker.own % len(cores)]})
    # A program that only one of two finds in a cache leaves it waiting for the other's compiler.
    jax.config.update("jax_enable_compilation_cache", False)
    if WAYS[worker.way] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{worker.port}", WAYS[worker.way], worker.own)
    step, state, batches = algorithm(worker)
    for _ in range(3):
        state, metrics = step(state, batches)
    jax.block_until_ready((state, metrics))
    multihost_utils.sync_global_devices("warm")
    start = time.perf_counter()
    for _ in range(worker.iterations):
        state, metrics = step(state, batches)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - start) / worker.iterations


def measure(trainer: str, way: str, options: Options) -> float:
    """Returns the seconds of a meta-iteration, of several processes the mean."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [Worker(trainer, way, own, port, **options.sizes()) for own in range(WAYS[way])]
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(worker)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_THREAD, "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for worker in workers
    ]
    outputs = [run.communicate() for run in runs]
    if any(run.returncode for run in runs):
        errors = "\n".join(errors[-2000:] for _, errors in outputs)
        raise RuntimeError(f"a process of {trainer!r}, {way!r}, failed:\n{errors}")
    return statistics.mean(float(text.split()[-1]) for text, _ in outputs)


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the speed-up over one process of both ways to have two."""
    axes = figure.subplots()
    rows = content["rows"]
    labels = {"two": "two processes that share the work", "apart": "two that exchange nothing"}
    for offset, (way, label) in zip((-0.2, 0.2), labels.items(), strict=True):
        heights = [row[f"{way}_speed_up"] for row in rows]
        bars = axes.bar([i + offset for i in range(len(rows))], heights, 0.4, label=label)
        axes.bar_label(bars, fmt="%.2f")
    axes.set_xticks(range(len(rows)), [row["trainer"] for row in rows])
    axes.set(ylabel="speed-up over one process on one core", ylim=(0, 2.4))
    axes.axhline(2, color="grey", linestyle=":")
    axes.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both trainers, prints the table, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.worker:
        print(work(Worker(*json.loads(options.worker))))
        return
    if options.trainings % 2:
        raise SystemExit(f"--trainings must be even, as two processes share them, got {options.trainings}")
    if (cores := os.cpu_count() or 1) < 2:
        raise SystemExit(f"two processes with a core each need two cores, this machine has {cores}")
    if options.quick:
        options = dataclasses.replace(options, batch=8, trainings=2, steps=2, iterations=2, repeats=1)
    print(f"{'trainer':16s}{'one, s':>10s}{'two, s':>10s}{'apart, s':>10s}{'speed-up':>10s}{'at best':>10s}")
    rows = []
    for trainer in TRAINERS:
        rounds = [{way: measure(trainer, way, options) for way in WAYS} for _ in range(options.repeats)]
        row: dict[str, Any] = {"trainer": trainer, "rounds": rounds}
        row |= {way: statistics.median(one[way] for one in rounds) for way in WAYS}
        for way in ("two", "apart"):
            row[f"{way}_speed_up"] = statistics.median(one["one"] / one[way] for one in rounds)
        rows.append(row)
        times = "".join(f"{row[way]:10.3f}" for way in WAYS)
        print(f"{trainer:16s}{times}{row['two_speed_up']:10.2f}{row['apart_speed_up']:10.2f}", flush=True)
    options.save(command_line(__file__, arguments), draw, rows=rows, sizes=options.sizes())


if __name__ == "__main__":
    main()
