"""Seconds of a training step: MLHF, SGD, Adam, Muon, Hessian-free and python-somax, in turns in one process.

A step is the gradient, the update and its application: one call of a jitted function with donated state,
on a batch that lies on the device already (random numbers: no data set is needed, and no time depends on
them). ``general`` are the meta-parameters for any network, with 2 CG steps and a quarter of the batch for
curvature as shipped, and ``gauss-newton-diagonal`` is a constant with as many. ``mlhf`` has an LSTM per
coordinate, 4 CG steps and the whole batch, ``mlhf-quarter`` a quarter of it.

Besides whole steps parts are timed in the same rounds:

- ``gradient``: the gradient of the loss alone;
- ``products``: linearizing the model, then the K + 1 = 5 GGN products of a step of ``mlhf``, each of the one
  before;
- ``general_products``: the same for ``general``, 3 on a quarter of the batch;
- ``ggn_product``: one of these alone: ``products`` less the same with one product, divided by K = 4;
- ``lstm``: both LSTMs on all coordinates.

``compile_seconds`` is the first call (tracing, compiling, one step) less the median of later ones.

    python benchmarks/speed/step_time.py --json step_time.json --figure step_time.png

``--quick``: two small networks, few rounds. python-somax is left out where it is not installed
(``pip install python-somax``).

What was tried and did not pay, on a CPU: rolling the CG loop (the first call takes as long, a step up to 5 %
longer); ``lax.cond`` in the place of selecting between the old and the new state; leaving the check for
finite numbers to one reduction (its chain of ``and`` is fused into every pass: 377 s for the first call on
the ResNet; sorted flags, as the library has them, take 35 s).
"""

import dataclasses
import gc
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from contenders import (
    NETWORKS,
    NUM_CG_STEPS,
    Runner,
    draw_batch,
    make_task,
    part_contenders,
    step_contenders,
)

from mlhf_optax.experiments.scripts import BenchmarkOptions, Table, command_line, parse_options, saved
from mlhf_optax.experiments.timing import Timing, interleaved
from mlhf_optax.support.checks import check_choice, require

# Optimizer, what it is measured by, network, batch size, and the largest ratio that is wanted.
RATIOS = (
    ("gauss-newton-diagonal", "sgd", "mlp-784-512x3-10", 128, 4.0),
    ("general", "adam", "mlp-784-512x3-10", 1024, 2.5),
    ("mlhf", "sgd", "cuda-convnet", 128, 6.0),
    ("mlhf-quarter", "sgd", "cuda-convnet", 128, 2.5),
)
# A step over gradient and products.
OVER_PARTS = {
    "general": {"mlp-784-512x3-10": 1.3, "cuda-convnet": 1.1, "resnet9": 1.1},
    "mlhf": {"cuda-convnet": 1.1, "resnet9": 1.1},
}
FIRST_CALL_SECONDS = {
    ("mlhf", "digits-mlp"): 5.0,
    ("mlhf", "mlp-784-512x3-10"): 5.0,
    ("mlhf", "cuda-convnet"): 10.0,
    ("general", "resnet9"): 15.0,
}
COLUMNS = (
    *("adam", "muon", "general", "gauss-newton-diagonal", "mlhf", "mlhf-quarter"),
    *("somax-ggn-cg4", "hessian-free-20"),
)
FIRST_CALL_OVER_ADAM = {("general", "transformer"): 5.0}


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    tasks: tuple[str, ...] = tuple(name for name in NETWORKS if name != "tiny-convnet")
    """Networks."""
    batches: tuple[int, ...] = ()
    """Batch sizes; those of each network by default."""

    def __post_init__(self):
        super().__post_init__()
        for name in self.tasks:
            check_choice("tasks", name, NETWORKS)
        is_met = all(size >= 1 for size in self.batches)
        require(is_met, "batches", "numbers of examples such as 64 128", self.batches)


def measure(task: str, batch_size: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Times all optimizers and parts in turns; returns a row per optimizer, and seconds of the parts."""
    made, batch = make_task(task), draw_batch(task, batch_size)
    params = jax.jit(made.init_fn)(jax.random.key(0))
    steps, parts = step_contenders(made, params), part_contenders(made, params)
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
    medians = {name: times[name].median for name in ("gradient", "products", "general_products", "lstm")}
    found = medians | {"ggn_product": product}
    for name, products in (("mlhf", "products"), ("general", "general_products")):
        both = zip(times["gradient"].rounds, times[products].rounds, strict=True)
        found[f"{name}_over_parts"] = times[name].over(Timing(tuple(map(sum, both))))
    return found


def targets(rows: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the targets that were measured, each with its limit and its value."""
    found = []
    by_name = {(row["optimizer"], row["task"], row["batch"]): row for row in rows}
    for name, other, task, batch, limit in RATIOS:
        if row := by_name.get((name, task, batch)):
            ratio = row["ratio_to_sgd"] / by_name[other, task, batch]["ratio_to_sgd"]
            found.append(judged(f"{name} / {other}, {task}, batch {batch}", limit, ratio))
    for (name, task, batch), row in by_name.items():
        where = f"{name}, {task}, batch {batch}"
        if limit := FIRST_CALL_SECONDS.get((name, task)):
            found.append(judged(f"seconds of the first call of {where}", limit, first_call(row)))
        if limit := FIRST_CALL_OVER_ADAM.get((name, task)):
            ratio = first_call(row) / first_call(by_name["adam", task, batch])
            found.append(judged(f"first call over that of adam, {where}", limit, ratio))
    for part in parts:
        for name, limits in OVER_PARTS.items():
            if limit := limits.get(part["task"]):
                text = f"{name} / (gradient + products), {part['task']}, batch {part['batch']}"
                found.append(judged(text, limit, part[f"{name}_over_parts"]))
    return found


def first_call(row: dict[str, Any]) -> float:
    """Returns the seconds of a first call, which compiles."""
    return row["compile_seconds"] + row["seconds"]


def judged(text: str, limit: float, value: float) -> dict[str, Any]:
    """Returns a target, its limit, what was measured, and whether that is within the limit."""
    return {"target": text, "limit": limit, "value": value, "met": value <= limit}


def targets_table(content: dict[str, Any]) -> Table:
    """Returns a row per target that was measured."""
    rows = [["target", "at most", "measured", ""]]
    for one in content["targets"]:
        verdict = "met" if one["met"] else "**missed**"
        rows.append([one["target"], f"{one['limit']:g}", f"{one['value']:.3g}", verdict])
    return Table(rows, "", content)


def print_warnings(rows: Sequence[dict[str, Any]]) -> None:
    """Says which times may not be those of a sound step."""
    for row in rows:
        if row["compilations"] != 1:
            print(f"{row['optimizer']}, {row['task']}: compiled more than once")
        if not row["finite"]:
            print(f"{row['optimizer']}, {row['task']}: diverged")


def table(content: dict[str, Any]) -> Table:
    """Returns a row per task: SGD's time, those of others as multiples of it, and what MLHF's is made of."""
    firsts = ("adam", *OVER_PARTS)
    ends = [f"`{name}` / (gradient + products)" for name in OVER_PARTS]
    ends += [f"first call of `{name}`, s" for name in firsts]
    rows = [["time per step / that of SGD", "SGD, ms", *COLUMNS, *ends]]
    for part in content["parts"]:
        where = part["task"], part["batch"]
        own = {row["optimizer"]: row for row in content["rows"] if (row["task"], row["batch"]) == where}
        ratios = [f"{own[name]['ratio_to_sgd']:.2g}" if name in own else "-" for name in COLUMNS]
        over = [f"{part[f'{name}_over_parts']:.2f}" for name in OVER_PARTS]
        first = [f"{first_call(own[name]):.1f}" for name in firsts]
        start = f"{part['task']}, batch {part['batch']}", f"{1e3 * own['sgd']['seconds']:.3g}"
        rows.append([*start, *ratios, *over, *first])
    return Table(rows, "", content)


TABLES = {
    "step_time": lambda folder: table(*saved(folder, "step_time")),
    "step_time_targets": lambda folder: targets_table(*saved(folder, "step_time")),
}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the ratio of every optimizer to SGD, and gradient and products as shares of a step."""
    figure.set_size_inches(13, 4.8)
    rows, parts = content["rows"], content["parts"]
    ratios, shares = figure.subplots(1, 2, width_ratios=(2, 1))
    labels = [f"{part['task']}\nbatch {part['batch']}" for part in parts]
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    for index, name in enumerate(names):
        own = [row for row in rows if row["optimizer"] == name]
        places = [labels.index(f"{row['task']}\nbatch {row['batch']}") for row in own]
        offsets = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place in places]
        ratios.bar(offsets, [row["ratio_to_sgd"] for row in own], 0.8 / len(names), label=name)
    ratios.set(yscale="log", ylabel="time of a step / that of SGD")
    for offset, name, products in ((-0.2, "general", "general_products"), (0.2, "mlhf", "products")):
        whole = [row["seconds"] for row in rows if row["optimizer"] == name]
        places, bottom = [place + offset for place in range(len(parts))], [0.0] * len(parts)
        for color, key in enumerate(("gradient", products, *(["lstm"] if name == "mlhf" else []))):
            heights = [part[key] / seconds for part, seconds in zip(parts, whole, strict=True)]
            label = key if name == "mlhf" else None
            shares.bar(places, heights, 0.36, bottom, color=f"C{color}", label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    shares.axhline(1.0, color="black", linewidth=0.8)
    shares.set(ylim=(0, 1.4), ylabel="parts timed alone / whole step; left general, right mlhf")
    ratios.set_ylim(top=3 * max(row["ratio_to_sgd"] for row in rows))
    for axes in (ratios, shares):
        axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=30)
        axes.legend(fontsize=7, ncols=3, loc="upper center")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every task, prints tables and targets, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, tasks=("digits-mlp", "tiny-convnet"), batches=(), repeats=3)
    # A program found in a cache would not show how long it takes to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    rows, parts = [], []
    for task in options.tasks:
        for batch_size in options.batches or NETWORKS[task][2]:
            new_rows, part = measure(task, batch_size, options.repeats)
            print(f"{task}, batch {batch_size}: measured", flush=True)
            print_warnings(new_rows)
            rows, parts = [*rows, *new_rows], [*parts, part]
            jax.clear_caches()
            gc.collect()
    notes = [] if any("somax" in row["optimizer"] for row in rows) else ["python-somax is not installed"]
    print(*notes)
    content = {"rows": rows, "parts": parts, "targets": targets(rows, parts), "notes": notes}
    options.report(command_line(__file__, arguments), table, draw, **content)


if __name__ == "__main__":
    main()
