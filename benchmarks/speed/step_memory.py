"""What a step of a wide network spends on asking for memory, and what avoids it.

A step of MLHF has temporaries of a dozen vectors. On Linux the usual allocator gives large blocks back to the
system after every step, and gets them anew in the next, page by page and filled with zeros. Three ways to
train are measured, each in a fresh process, turn by turn, on a deep autoencoder and random images:

- ``called``: one call of a jitted step after the other, its state donated;
- ``kept``: the same, and the allocator keeps what it has (the variables in ``KEPT``, glibc);
- ``scan``: all steps in one ``lax.scan``, which asks once.

Times are process time per step, on one core; page faults are counted per step.

    python benchmarks/speed/step_memory.py --json step_memory.json --figure step_memory.png

``--quick``: a narrow network and few steps.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from contenders import training_step
from jax import lax

from mlhf_optax import SigmoidCrossEntropy, load_pretrained
from mlhf_optax.experiments.scripts import (
    BenchmarkOptions,
    Table,
    command_line,
    in_fresh_process,
    parse_options,
    saved,
)
from mlhf_optax.support.checks import FROM_ONE, check_fields
from mlhf_optax.tasks import MLP, Dataset, image_task

OPTIMIZERS = ("adam", "general")
WAYS = {"called": "one call per step", "kept": "memory kept", "scan": "in a scan"}
"""The ways to train, and what tables call them."""
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
KEPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
PIXELS = 784


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    repeats: int = 3
    """Rounds, each with fresh processes."""
    widths: tuple[int, ...] = (1000, 500, 250, 30)
    """Widths of the encoder; the decoder mirrors them."""
    batch: int = 128
    """Examples per mini-batch."""
    steps: int = 20
    """Steps that are timed; as many come first."""
    worker: str = ""
    """A process as JSON; used by the script itself."""

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, FROM_ONE, "steps", "batch")


class Worker(NamedTuple):
    """What one process does."""

    optimizer: str
    way: str
    widths: tuple[int, ...]
    batch: int
    steps: int


def training(worker: Worker) -> tuple[Callable[[Any], Any], Any]:
    """Returns a function that takes all steps, from a state to the next, and the first state."""
    model = MLP((*worker.widths, *worker.widths[-2::-1]), PIXELS, "tanh")
    no_data = lambda: Dataset({}, {}, {})
    task = image_task("autoencoder", "", model, (PIXELS,), load_data=no_data, num_classes=10)
    task = dataclasses.replace(task, loss_fn=SigmoidCrossEntropy(targets="target"), num_classes=None)
    if worker.optimizer == "adam":
        tx = optax.adam(1e-3)
    else:
        tx = load_pretrained(worker.optimizer).optimizer(task.predict_fn, task.loss_fn)
    images = jax.random.uniform(jax.random.key(0), (worker.batch, PIXELS))
    batch = {"image": images, "target": images}
    step, state = training_step(task, jax.jit(task.init_fn)(jax.random.key(1)), tx)
    if worker.way == "scan":
        scanned = lambda state, batch: lax.scan(
            lambda state, _: (step(state, batch), None), state, length=worker.steps
        )
        run = jax.jit(scanned, donate_argnums=0)
        return lambda state: jax.block_until_ready(run(state, batch)[0]), state
    run_one = jax.jit(step, donate_argnums=0)

    def run_all(state):
        for _ in range(worker.steps):
            state = run_one(state, batch)
        return jax.block_until_ready(state)

    return run_all, state


def work(worker: Worker) -> tuple[float, float]:
    """Returns process time in seconds and page faults, both per step."""
    import resource  # there is none on Windows

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run, state = training(worker)
    state = run(state)
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    run(state)
    seconds = time.process_time() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return seconds / worker.steps, faults / worker.steps


def measure(worker: Worker) -> tuple[float, float]:
    """Returns what :func:`work` does, in a process of its own: an allocator reads its variables once."""
    environment = {name: value for name, value in os.environ.items() if name not in KEPT}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_THREAD}
    return in_fresh_process(__file__, worker, environment | (KEPT if worker.way == "kept" else {}))


def table(content: dict[str, Any]) -> Table:
    """Returns a row per optimizer: milliseconds of a step for every way to train, and page faults."""
    found = {(row["optimizer"], row["way"]): row for row in content["rows"]}
    rows = [["ms per step (over Adam's)", *WAYS.values(), "page faults per step, one call"]]
    for name in dict.fromkeys(optimizer for optimizer, _ in found):
        cells = [f"{1e3 * found[name, w]['seconds']:.3g} ({found[name, w]['over_adam']:.1f})" for w in WAYS]
        rows.append([name, *cells, f"{found[name, 'called']['page_faults']:,.0f}"])
    sizes = content["sizes"]
    widths = "-".join(map(str, (PIXELS, *sizes["widths"])))
    note = (
        f"A deep autoencoder, {widths} mirrored, batch {sizes['batch']}; medians of "
        f"{len(content['rows'][0]['rounds'])} rounds, each in fresh processes. Memory kept: by the variables "
        "in the README's limits."
    )
    return Table(rows, note, content)


TABLES = {"step_memory": lambda folder: table(*saved(folder, "step_memory"))}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the milliseconds of a step for every optimizer and way."""
    axes = figure.subplots()
    rows = content["rows"]
    for number, optimizer in enumerate(OPTIMIZERS):
        own = [row for row in rows if row["optimizer"] == optimizer]
        places = [place + 0.4 * (number - 0.5) for place in range(len(own))]
        bars = axes.bar(places, [1e3 * row["seconds"] for row in own], 0.38, label=optimizer)
        axes.bar_label(bars, fmt="%.3g")
    axes.set_xticks(range(len(WAYS)), WAYS.values())
    axes.set(ylabel="ms of process time per step")
    axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all, prints the table, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.worker:
        print(json.dumps(work(Worker(*json.loads(options.worker)))))
        return
    if not sys.platform.startswith("linux"):
        raise SystemExit(f"the variables of glibc are for Linux; this is {sys.platform}")
    if options.quick:
        options = dataclasses.replace(options, widths=(32, 8), batch=16, steps=2, repeats=1)
    sizes = {name: getattr(options, name) for name in ("widths", "batch", "steps")}
    cases = [Worker(optimizer, way, **sizes) for optimizer in OPTIMIZERS for way in WAYS]
    rounds = [{case: measure(case) for case in cases} for _ in range(options.repeats)]
    rows = []
    for case in cases:
        adam = case._replace(optimizer="adam")
        rows.append(
            {
                "optimizer": case.optimizer,
                "way": case.way,
                "seconds": statistics.median(one[case][0] for one in rounds),
                "page_faults": statistics.median(one[case][1] for one in rounds),
                "over_adam": statistics.median(one[case][0] / one[adam][0] for one in rounds),
                "rounds": [one[case] for one in rounds],
            }
        )
    options.report(command_line(__file__, arguments), table, draw, rows=rows, sizes=sizes)


if __name__ == "__main__":
    main()
