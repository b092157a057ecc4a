"""Seconds and memory of meta-training per inner step, against a plain SGD step of the same task and batch.

A meta-iteration (``meta_step`` of ``make_meta_step`` with ``mlhf_optimizer``: unroll, meta-gradient,
meta-update, replay) takes ``num_tasks`` x ``unroll_length`` inner steps; its time is divided by that
number. Unroll length T, CG steps K and the number of tasks grow one at a time from T = 10, K = 4 and one
task. Every configuration has a process of its own, so that its peak of memory is its own:

- ``peak_bytes``: on a GPU the peak of what jax had allocated, on a CPU the peak of the whole process, in
  which Python, jax and the compiler are a large and constant part;
- ``temp_bytes``: what the compiled meta-step needs beside its arguments and results, as XLA says;
- ``state_bytes``: its arguments: the state of meta-training, mostly the replay buffer, and the batches;
- ``compile_seconds``: tracing and compiling the meta-step.

    python benchmarks/speed/meta_step_time.py --json meta_step_time.json --figure meta_step_time.png

``--quick``: two small configurations, few rounds.

What did not pay, on a CPU: ``vmap`` over tasks with convolutions (gradients of four take 2.8 times as long as
one after the other). Rematerialisation has nothing to save: no pass over the model is kept for a later one.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from contenders import Runner, draw_batch, make_task, training_step
from step_time import judged

from mlhf_optax import init_meta_params
from mlhf_optax.experiments.scripts import (
    BenchmarkOptions,
    Table,
    command_line,
    in_fresh_process,
    parse_options,
    saved,
)
from mlhf_optax.experiments.timing import interleaved
from mlhf_optax.meta_training import MetaTrainingConfig, make_meta_step, mlhf_optimizer
from mlhf_optax.support.checks import check_choice

BATCH_SIZES = {"digits-mlp": 128, "cuda-convnet": 64}
GROWING = {"unroll_length": (5, 20), "num_cg_steps": (2, 8), "num_tasks": (2, 4)}
RATIO_LIMIT = 22.0


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    repeats: int = 7
    """Rounds."""
    tasks: tuple[str, ...] = tuple(BATCH_SIZES)
    """Networks."""
    worker: str = ""
    """A configuration as JSON, to be measured in this process; used by the script itself."""

    def __post_init__(self):
        super().__post_init__()
        for name in self.tasks:
            check_choice("tasks", name, BATCH_SIZES)


class Configuration(NamedTuple):
    """What is measured in one process."""

    task: str
    batch: int
    unroll_length: int = 10
    num_cg_steps: int = 4
    num_tasks: int = 1


def configurations(task: str) -> list[Configuration]:
    """Returns what all else is compared with, then the configurations that differ in one number."""
    base = Configuration(task, BATCH_SIZES[task])
    grown = (base._replace(**{name: value}) for name, values in GROWING.items() for value in values)
    return [base, *grown]


def measure(configuration: Configuration, repeats: int) -> dict[str, Any]:
    """Returns seconds and bytes; the peak of memory is that of this process so far."""
    name, batch_size, unroll_length, num_cg_steps, num_tasks = configuration
    task = make_task(name)
    sgd = training_step(task, jax.jit(task.init_fn)(jax.random.key(0)), optax.sgd(0.01, momentum=0.9))
    config = MetaTrainingConfig(num_tasks=num_tasks, unroll_length=unroll_length)
    init, meta_step = make_meta_step(task, mlhf_optimizer(num_cg_steps=num_cg_steps), config)
    state = init(jax.random.key(0), init_meta_params(jax.random.key(1)))
    batches = draw_batch(name, num_tasks, unroll_length + 1, batch_size)
    start = time.perf_counter()
    # A jit of its own around the one inside, as only the outermost one says what it needs.
    compiled = jax.jit(meta_step, donate_argnums=0).lower(state, batches).compile()
    compile_seconds = time.perf_counter() - start

    def meta_iteration():
        nonlocal state
        state, metrics = compiled(state, batches)
        return state, metrics

    thunks = {"sgd": Runner(sgd, draw_batch(name, batch_size)), "meta": meta_iteration}
    # A single step of SGD would find the memory that a meta-iteration left cold, and take twice its time.
    times = interleaved(thunks, repeats=repeats, stretch_seconds=1.0)
    inner_steps = num_tasks * unroll_length
    memory = compiled.memory_analysis()  # None where the backend does not tell
    return configuration._asdict() | {
        "seconds_per_inner_step": times["meta"].median / inner_steps,
        "low": times["meta"].low / inner_steps,
        "high": times["meta"].high / inner_steps,
        "sgd_seconds": times["sgd"].median,
        "ratio": times["meta"].over(times["sgd"]) / inner_steps,
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_bytes(),
        "temp_bytes": memory and memory.temp_size_in_bytes,
        "state_bytes": memory and memory.argument_size_in_bytes,
    }


def peak_bytes() -> int:
    """Returns the most memory that jax had allocated on a GPU or, on a CPU, that this process had."""
    statistics = jax.devices()[0].memory_stats()
    if statistics:
        return statistics["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux counts for `ru_maxrss` also what the process that started this one had by then.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the target for the convolutional network, if it was measured."""
    base = Configuration("cuda-convnet", BATCH_SIZES["cuda-convnet"])._asdict()
    text = f"an inner step / sgd, cuda-convnet, batch {base['batch']}"
    return [judged(text, RATIO_LIMIT, row["ratio"]) for row in rows if base.items() <= row.items()]


def table(content: dict[str, Any]) -> Table:
    """Returns a row per configuration of meta-training."""
    head = ["ms per inner step", "/ step of SGD", "temporaries, MB", "compiling, s"]
    rows = [["meta-training: T, K, tasks", *head]]
    for row in content["rows"]:
        cells = [f"{1e3 * row['seconds_per_inner_step']:.3g}", f"{row['ratio']:.1f}"]
        cells += ["-" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 1e6:.0f}"]
        cells += [f"{row['compile_seconds']:.0f}"]
        setting = ", ".join(str(row[name]) for name in GROWING)
        rows.append([f"{row['task']}, batch {row['batch']}: {setting}", *cells])
    verdicts = {True: "met", False: "missed"}
    found = (
        f"{one['target']} is {one['value']:.3g}, at most {one['limit']:g}: {verdicts[one['met']]}"
        for one in content["targets"]
    )
    return Table(rows, "".join(f"Target: {text}." for text in found), content)


TABLES = {"meta_step_time": lambda folder: table(*saved(folder, "meta_step_time"))}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the ratio to SGD and the memory of the compiled meta-step as each number grows."""
    figure.set_size_inches(11, 6)
    rows = content["rows"]
    all_axes = figure.subplots(2, len(GROWING), sharex="col", sharey="row", squeeze=False)
    for column, name in enumerate(GROWING):
        for task in dict.fromkeys(row["task"] for row in rows):
            own = [row for row in rows if row["task"] == task]
            # The first one is what the others are compared with.
            others = [key for key in GROWING if key != name]
            line = [row for row in own if all(row[key] == own[0][key] for key in others)]
            line.sort(key=lambda row: row[name])
            values = [row[name] for row in line]
            label = f"{task}, batch {own[0]['batch']}"
            all_axes[0][column].plot(values, [row["ratio"] for row in line], marker="o", label=label)
            if all(row["temp_bytes"] for row in line):
                memory = [row["temp_bytes"] / 2**20 for row in line]
                all_axes[1][column].plot(values, memory, marker="o", label=label)
        all_axes[1][column].set(xlabel=name.replace("_", " "), yscale="log")
    all_axes[0][0].set_ylabel("inner step / step of SGD")
    all_axes[1][0].set_ylabel("MiB of temporaries")
    all_axes[0][0].legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every configuration, prints the table, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    # A program found in a cache would not show how long it takes to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.worker:
        *configuration, repeats = json.loads(options.worker)
        print(json.dumps(measure(Configuration(*configuration), repeats)))
        return
    todo, repeats = [item for task in options.tasks for item in configurations(task)], options.repeats
    if options.quick:
        todo, repeats = [Configuration("digits-mlp", 128, length, 2, 1) for length in (2, 4)], 2
    rows = []
    for number, configuration in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {configuration}", flush=True)
        rows.append(in_fresh_process(__file__, [*configuration, repeats]))
    options.report(command_line(__file__, arguments), table, draw, rows=rows, targets=targets(rows))


if __name__ == "__main__":
    main()
