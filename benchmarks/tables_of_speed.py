"""Tables of what a step costs, and of what more devices and processes bring."""

from typing import Any

from step_memory import PIXELS, WAYS
from step_time import OVER_PARTS, first_call
from table_cells import with_note

from mlhf_optax.experiments.origin import origin_line

STEP_COLUMNS = (
    "adam",
    "muon",
    "general",
    "gauss-newton-diagonal",
    "mlhf",
    "mlhf-quarter",
    "somax-ggn-cg4",
    "hessian-free-20",
)
FLOORS = {"evaluations": "evaluating 80 tanh and what else is elementary", "copies": "copying the states"}


def step_time(content: dict[str, Any]) -> list[str]:
    """Returns a row per task: SGD's time, those of others as multiples of it, and what MLHF's is made of."""
    firsts = ("adam", *OVER_PARTS)
    ends = [f"`{name}` / (gradient + products)" for name in OVER_PARTS]
    ends += [f"first call of `{name}`, s" for name in firsts]
    rows = [["time per step / that of SGD", "SGD, ms", *STEP_COLUMNS, *ends]]
    for part in content["parts"]:
        where = part["task"], part["batch"]
        own = {row["optimizer"]: row for row in content["rows"] if (row["task"], row["batch"]) == where}
        ratios = [f"{own[name]['ratio_to_sgd']:.2g}" if name in own else "-" for name in STEP_COLUMNS]
        over = [f"{part[f'{name}_over_parts']:.2f}" for name in OVER_PARTS]
        first = [f"{first_call(own[name]):.1f}" for name in firsts]
        start = f"{part['task']}, batch {part['batch']}", f"{1e3 * own['sgd']['seconds']:.3g}"
        rows.append([*start, *ratios, *over, *first])
    missed = [one for one in content["targets"] if not one["met"]]
    values = "; ".join(f"{one['target']} {one['value']:.3g} (at most {one['limit']:g})" for one in missed)
    note = f"Targets that are missed: {values}." if missed else "All targets are met."
    return with_note(rows, note, content)


def ggn_in_loops(content: dict[str, Any]) -> list[str]:
    """Says how much slower GGN products of convolutions are in loops, with the library's and with lax's."""
    rows = [row for row in content["rows"] if row["layer"].startswith("conv")]
    own, rivals = ([row["ratio"] for row in rows if row["is_rival"] == wanted] for wanted in (False, True))
    missed = sum(value > content["target"] for value in own)
    verdict = f"{missed} of {len(own)} above" if missed else "all within"
    return [
        "A GGN product of a convolution inside `fori_loop` or `scan` takes "
        f"{min(own):.2f} to {max(own):.2f} times as long as outside ({verdict} the target of "
        f"{content['target']:g}); with `lax.conv_general_dilated` it takes {min(rivals):.1f} to "
        f"{max(rivals):.0f} times as long. {origin_line(content)}"
    ]


def step_memory(content: dict[str, Any]) -> list[str]:
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
    return with_note(rows, note, content)


def lstm_throughput(content: dict[str, Any]) -> list[str]:
    """Returns nanoseconds per coordinate by number of coordinates, and the floor."""
    rows = [["both LSTMs, ns per coordinate", "forward", "with gradient", "floor", "forward / floor"]]
    for row in (one for one in content["rows"] if one["features"] == "log-global"):
        size = f"{row['coordinates']:.0e}".replace("e+0", "e")
        times = [row[f"{name}_ns"] for name in ("forward", "gradient", "floor")]
        cells = [f"{time:.0f}" if time else "-" for time in times]
        name = f"{size} coordinates, {row['carry_dtype']} states"
        rows.append([name, *cells, f"{row['forward_ratio']:.1f}"])
    return with_note(
        rows, f"The floor is the time of {FLOORS[content['floor']]}, on the same arrays.", content
    )


def meta_step_time(content: dict[str, Any]) -> list[str]:
    """Returns a row per configuration of meta-training."""
    head = ["ms per inner step", "/ step of SGD", "temporaries, MB", "compiling, s"]
    rows = [["meta-training: T, K, tasks", *head]]
    for row in content["rows"]:
        setting = f"{row['unroll_length']}, {row['num_cg_steps']}, {row['num_tasks']}"
        cells = [f"{1e3 * row['seconds_per_inner_step']:.3g}", f"{row['ratio']:.1f}"]
        cells += [f"{row['temp_bytes'] / 1e6:.0f}", f"{row['compile_seconds']:.0f}"]
        rows.append([f"{row['task']}, batch {row['batch']}: {setting}", *cells])
    return with_note(rows, "", content)


def scaling(content: dict[str, Any]) -> list[str]:
    """Returns what a step sends on the most devices, and the efficiency predicted for them."""
    most = max(row["devices"] for row in content["rows"])
    found = {
        (row["optimizer"], row["placement"], row["scaling"]): row
        for row in content["rows"]
        if row["devices"] == most
    }
    rows = [["optimizer", "parameters", "collectives per step", "MB per step", "weak", "strong"]]
    for optimizer, placement in dict.fromkeys(key[:2] for key in found):
        weak, strong = (found[optimizer, placement, kind] for kind in ("weak", "strong"))
        sent = ", ".join(f"{count} {kind}" for kind, count in weak["collectives"].items())
        efficiencies = [f"{row['efficiency']:.2f}" for row in (weak, strong)]
        rows.append([optimizer, placement, sent, f"{weak['bytes'] / 1e6:.0f}", *efficiencies])
    each = {kind: next(r["batch"] for k, r in found.items() if k[2] == kind) for kind in ("weak", "strong")}
    note = (
        f"A dense network 256-1024-1024-128 on {most} devices; {each['weak']:,} examples in weak scaling, "
        f"{each['strong']:,} in strong. The efficiencies are predicted by the model that the script writes "
        f"out: links of {content['model']['bandwidth'] / 1e9:.0f} GB/s, nothing overlaps. No devices were at "
        "hand to measure them on."
    )
    return with_note(rows, note, content)


def meta_training_processes(content: dict[str, Any]) -> list[str]:
    """Returns a row per trainer: seconds of a meta-iteration, and how much faster two processes are."""
    sizes = content["sizes"]
    rows = [["trainer", "one process, s", "two, s", "speed-up", "two that exchange nothing"]]
    for row in content["rows"]:
        name = {"long horizons": "`make_long_horizon_step`", "meta_step": "`make_meta_step`"}[row["trainer"]]
        seconds = [f"{row[way]:.2f}" for way in ("one", "two")]
        rows.append([name, *seconds, *(f"{row[f'{way}_speed_up']:.2f}" for way in ("two", "apart"))])
    note = (
        f"A meta-iteration of {sizes['trainings']} inner trainings (pairs with long horizons) of "
        f"{sizes['steps']} steps, `{sizes['task']}`, batch {sizes['batch']}; medians of "
        f"{len(content['rows'][0]['rounds'])} rounds, of the ratios within a round."
    )
    return with_note(rows, note, content)
