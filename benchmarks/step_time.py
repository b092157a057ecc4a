"""Seconds of a training step: MLHF, SGD, Adam, Hessian-free and python-somax, in turns in one process.

A step is the gradient, the update and its application: one call of a jitted function with donated state,
on a batch that lies on the device already (random numbers: no data set is needed, and no time depends on
them). Besides whole steps the parts of MLHF's are timed in the same rounds:

- ``gradient``: the gradient of the loss alone;
- ``products``: linearizing the model, then the K + 1 = 5 GGN products of a step, each of the one before;
- ``ggn_product``: one of these alone: ``products`` less the same with one product, divided by K = 4;
- ``lstm``: both LSTMs on all coordinates.

``compile_seconds`` is the first call (tracing, compiling, one step) less the median of later ones.

    python benchmarks/step_time.py --json step_time.json --figure step_time.png

``--quick``: two small networks, few rounds. python-somax is left out where it is not installed
(``pip install python-somax``).

What was tried and did not pay, on a CPU: rolling the CG loop (the first call takes as long, a step up to 5 %
longer); ``lax.cond`` in the place of selecting between the old and the new state; leaving the check for
finite numbers to one reduction (its chain of ``and`` is fused into every pass: 377 s for the first call on
the ResNet; sorted flags, as the library has them, take 35 s).
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from step_contenders import (
    CURVATURE_BATCH_SIZES,
    NETWORKS,
    NUM_CG_STEPS,
    Runner,
    make_problem,
    part_contenders,
    step_contenders,
)

from mlhf_optax.comparison.benchmarking import Timing, interleaved, timing_parser
from mlhf_optax.comparison.figures import require_matplotlib
from mlhf_optax.comparison.reporting import command_line, report, write_json

TASKS = tuple(name for name in NETWORKS if name != "tiny-convnet")
FIRST_CALL_LIMITS = {"digits-mlp": 5.0, "mlp-784-512x3-10": 5.0, "cuda-convnet": 10.0}


def measure(task: str, batch_size: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Times all optimizers and parts on one task and batch size in turns.

    Args:
      task: a key of :data:`NETWORKS`.
      batch_size: examples a batch.
      repeats: rounds.

    Returns:
      A row an optimizer, and the times of the parts, all in seconds a call.
    """
    problem = make_problem(task)
    params = jax.jit(problem.init_fn)(jax.random.key(0))
    batch = problem.draw_batch(batch_size)
    steps, parts = step_contenders(problem, params), part_contenders(problem, params)
    runners = {name: Runner(contender, batch) for name, contender in {**steps, **parts}.items()}
    times = interleaved(runners, repeats=repeats)
    where = {"task": task, "batch": batch_size}
    rows = [where | {"optimizer": name} | _row(times, name, runners[name]) for name in steps]
    return rows, where | _part_times(times)


def _row(times: Mapping[str, Timing], name: str, runner: Runner) -> dict[str, Any]:
    return {
        "seconds": times[name].median,
        "low": times[name].low,
        "high": times[name].high,
        "ratio_to_sgd": times[name].over(times["sgd"]),
        "compile_seconds": max(0.0, runner.first_seconds - times[name].median),
        "compilations": runner.jitted._cache_size(),
        # Times of a training that diverged would be those of branches and loops that are left early.
        "finite": all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(runner.state[0])),
    }


def _part_times(times: Mapping[str, Timing]) -> dict[str, float]:
    pairs = zip(times["products"].rounds, times["one_product"].rounds, strict=True)
    product = statistics.median((many - one) / NUM_CG_STEPS for many, one in pairs)
    both = zip(times["gradient"].rounds, times["products"].rounds, strict=True)
    floor = Timing(tuple(gradient + products for gradient, products in both))
    medians = {name: times[name].median for name in ("gradient", "products", "lstm")}
    return medians | {"ggn_product": product, "mlhf_over_parts": times["mlhf"].over(floor)}


def targets(rows: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the targets that were measured, each with its limit and its value."""
    found = []
    for row in rows:
        where = f"{row['task']}, batch {row['batch']}"
        name, limit = row["optimizer"], {"mlhf": 6.0, "mlhf-quarter": 2.5}.get(row["optimizer"])
        if limit and (row["task"], row["batch"]) == ("cuda-convnet", 128):
            found.append(judged(f"{name} / sgd, {where}", limit, row["ratio_to_sgd"]))
        if name in CURVATURE_BATCH_SIZES and row["task"] in FIRST_CALL_LIMITS:
            first = row["compile_seconds"] + row["seconds"]
            text = f"seconds of the first call of {name}, {where}"
            found.append(judged(text, FIRST_CALL_LIMITS[row["task"]], first))
    for part in parts:
        if part["task"] in ("cuda-convnet", "resnet9"):
            where = f"{part['task']}, batch {part['batch']}"
            found.append(judged(f"mlhf / (gradient + products), {where}", 1.10, part["mlhf_over_parts"]))
    return found


def judged(text: str, limit: float, value: float) -> dict[str, Any]:
    """Returns a target, its limit, what was measured, and whether that is within the limit."""
    return {"target": text, "limit": limit, "value": value, "met": value <= limit}


def print_measurements(console: Console, rows: Sequence[dict[str, Any]], part: dict[str, Any]) -> None:
    """Prints the table of one task and batch size, what the parts took, and what is wrong."""
    table = Table(title=f"{part['task']}, batch {part['batch']}")
    for column in ("optimizer", "ms a step", "low", "high", "/ sgd", "compile s"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        seconds = (f"{1e3 * row[key]:.3g}" for key in ("seconds", "low", "high"))
        cells = (f"{row['ratio_to_sgd']:.2f}", f"{row['compile_seconds']:.1f}")
        table.add_row(row["optimizer"], *seconds, *cells)
    console.print(table)
    shown = (f"{name} {1e3 * part[name]:.3g} ms" for name in ("gradient", "ggn_product", "products", "lstm"))
    shares = f"mlhf / (gradient + products) {part['mlhf_over_parts']:.2f}"
    console.print(f"{', '.join(shown)}; {shares}", soft_wrap=True)
    again = [row["optimizer"] for row in rows if row["compilations"] != 1]
    console.print(f"compiled more than once: {', '.join(again) or 'none'}")
    for row in rows:
        if not row["finite"]:
            console.print(f"{row['optimizer']} diverged: its time may not be that of a sound step")


def print_targets(console: Console, found: Sequence[dict[str, Any]]) -> None:
    """Prints every target with what was measured."""
    for target in found:
        verdict = "met" if target["met"] else "MISSED"
        text = f"{verdict:6s} {target['target']}: {target['value']:.2f} (at most {target['limit']:g})"
        console.print(text, soft_wrap=True)


def save_figure(rows: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the ratio of every optimizer to SGD, and the parts of MLHF's step as shares of it."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    ratios, shares = figure.subplots(1, 2, width_ratios=(2, 1))
    labels = [f"{part['task']}\nbatch {part['batch']}" for part in parts]
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    for index, name in enumerate(names):
        own = [row for row in rows if row["optimizer"] == name]
        places = [labels.index(f"{row['task']}\nbatch {row['batch']}") for row in own]
        offsets = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place in places]
        ratios.bar(offsets, [row["ratio_to_sgd"] for row in own], 0.8 / len(names), label=name)
    ratios.set(yscale="log", ylabel="time of a step / that of SGD")
    step = [row["seconds"] for row in rows if row["optimizer"] == "mlhf"]
    bottom = [0.0] * len(parts)
    for name in ("gradient", "products", "lstm"):
        heights = [part[name] / seconds for part, seconds in zip(parts, step, strict=True)]
        shares.bar(range(len(parts)), heights, 0.6, bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    shares.axhline(1.0, color="black", linewidth=0.8)
    shares.set(ylabel="parts timed alone / whole step of mlhf")
    for axes in (ratios, shares):
        axes.set_xticks(range(len(labels)), labels, fontsize=7)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every task, prints tables and targets, writes JSON and figure."""
    options = _parse(arguments)
    # A program found in a cache would not show how long it takes to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    console, rows, parts = Console(), [], []
    for task in options.tasks:
        for batch_size in options.batches or NETWORKS[task][2]:
            with console.status(f"{task}, batch {batch_size}"):
                new_rows, part = measure(task, batch_size, options.repeats)
            print_measurements(console, new_rows, part)
            rows, parts = [*rows, *new_rows], [*parts, part]
            jax.clear_caches()
            gc.collect()
    found = targets(rows, parts)
    print_targets(console, found)
    notes = [] if any("somax" in row["optimizer"] for row in rows) else ["python-somax is not installed"]
    console.print(*notes)
    if options.json:
        content = {"rows": rows, "parts": parts, "targets": found, "notes": notes}
        write_json(options.json, report(command_line("step_time.py", arguments), **content))
    if options.figure:
        save_figure(rows, parts, options.figure)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = timing_parser(__doc__, repeats=9, quick="digits-mlp and a tiny convnet, 3 rounds")
    add = parser.add_argument
    add(
        "--tasks",
        type=names_of(NETWORKS),
        default=TASKS,
        help=f"separated by commas, of {', '.join(NETWORKS)}",
    )
    add("--batches", type=_sizes, help="batch sizes, separated by commas; those of each task by default")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tasks, options.batches, options.repeats = ("digits-mlp", "tiny-convnet"), None, 3
    return options


def names_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Returns what reads names separated by commas from a command line, each of which must be known."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no task {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return read


def _sizes(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"wanted numbers of examples such as 64,128, got {text!r}")
    return tuple(map(int, sizes))


if __name__ == "__main__":
    sys.exit(main())
