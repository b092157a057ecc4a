"""The speed section of the README, from the results of the speed benchmarks."""

import json
from pathlib import Path
from typing import Any

from readme_markdown import origin, table

STEP_COLUMNS = (
    "sgd",
    "adam",
    "mlhf",
    "mlhf-half",
    "mlhf-quarter",
    "somax-ggn-cg4",
    "hessian-free-20",
)


def speed_section(results: Path) -> list[str]:
    """Returns the Markdown lines for a folder of results."""
    names = ("step_time", "ggn_in_loops", "lstm_throughput", "meta_step_time")
    step, loops, lstms, meta = (json.loads((results / f"{name}.json").read_text()) for name in names)
    lines = [*step_table(step), "", *loops_lines(loops), "", *lstm_lines(lstms), "", *meta_table(meta)]
    return lines


def step_table(report: dict[str, Any]) -> list[str]:
    """Returns a row a task: SGD's time, those of the others as multiples of it, and MLHF's over its parts."""
    parts_column, first_column = "`mlhf` / (gradient + 5 products)", "first call of `mlhf`, s"
    rows = [["a step / that of SGD", "SGD, ms", *STEP_COLUMNS[1:], parts_column, first_column]]
    for part in report["parts"]:
        where = part["task"], part["batch"]
        own = {row["optimizer"]: row for row in report["rows"] if (row["task"], row["batch"]) == where}
        ratios = [f"{own[name]['ratio_to_sgd']:.2g}" if name in own else "-" for name in STEP_COLUMNS[1:]]
        first = own["mlhf"]["compile_seconds"] + own["mlhf"]["seconds"]
        start = f"{part['task']}, batch {part['batch']}", f"{1e3 * own['sgd']['seconds']:.3g}"
        rows.append([*start, *ratios, f"{part['mlhf_over_parts']:.2f}", f"{first:.1f}"])
    return [*table(rows), "", origin(report)]


def loops_lines(report: dict[str, Any]) -> list[str]:
    """Says how much slower GGN products of convolutions are in loops, with the library's and with lax's."""
    of_convolutions = [row for row in report["rows"] if row["layer"].startswith("conv")]
    own = [row["ratio"] for row in of_convolutions if not row["is_rival"]]
    rivals = [row["ratio"] for row in of_convolutions if row["is_rival"]]
    missed = sum(value > report["target"] for value in own)
    verdict = f"{missed} of {len(own)} above" if missed else "all within"
    return [
        "A GGN product of a convolution inside `fori_loop` or `scan` takes "
        f"{min(own):.2f} to {max(own):.2f} times as long as outside ({verdict} the target of "
        f"{report['target']:g}); with `lax.conv_general_dilated` it takes {min(rivals):.1f} to "
        f"{max(rivals):.0f} times as long. {origin(report)}"
    ]


def lstm_lines(report: dict[str, Any]) -> list[str]:
    """Returns nanoseconds a coordinate by number of coordinates, and the floor."""
    rows = [["both LSTMs, ns a coordinate", "forward", "with gradient", "floor", "forward / floor"]]
    for row in report["rows"]:
        if row["features"] != "log-global":
            continue
        size = f"{row['coordinates']:.0e}".replace("e+0", "e")
        times = [row[f"{name}_ns"] for name in ("forward", "gradient", "floor")]
        cells = [f"{time:.0f}" if time else "-" for time in times]
        states = f"{size} coordinates, {row['carry_dtype']} states"
        rows.append([states, *cells, f"{row['forward_ratio']:.1f}"])
    floors = {"evaluations": "evaluating 80 tanh and what else is elementary", "copies": "copying the states"}
    note = f"The floor is the time of {floors[report['floor']]}, on the same arrays. {origin(report)}"
    return [*table(rows), "", note]


def meta_table(report: dict[str, Any]) -> list[str]:
    """Returns a row a configuration of meta-training."""
    rows = [
        [
            "meta-training: T, K, tasks",
            "ms an inner step",
            "/ step of SGD",
            "temporaries, MB",
            "compiling, s",
        ]
    ]
    for row in report["rows"]:
        setting = f"{row['unroll_length']}, {row['num_cg_steps']}, {row['num_tasks']}"
        cells = [f"{1e3 * row['seconds_per_inner_step']:.3g}", f"{row['ratio']:.1f}"]
        cells += [f"{row['temp_bytes'] / 1e6:.0f}", f"{row['compile_seconds']:.0f}"]
        rows.append([f"{row['task']}, batch {row['batch']}: {setting}", *cells])
    return [*table(rows), "", origin(report)]
