"""What both LSTMs cost for every coordinate, against the least that the machine could need.

LSTM_s and LSTM_p run one step as in the optimizer, from features to damping and preconditioner ("forward");
then the same with the gradient of their weights, as in meta-training ("gradient"). The floor is measured
beside them: on a CPU reading and writing the carries with as many evaluations of tanh, log and exp as the
two LSTMs need (a sigmoid counts as a tanh), and none of their products; on a GPU, where memory is the
bound, reading and writing the carries alone.

    python benchmarks/lstm_throughput.py --json lstm_throughput.json --figure lstm_throughput.png

Target: a forward step within twice the floor. ``--quick``: up to a million coordinates, 3 rounds.

What was tried and did not pay, on a CPU: gates as sums of scaled rows, which fuse with what follows (as fast
forward up to 10^4 coordinates, twice as slow at 10^5, and 5 times with gradient); two matrix products a
layer, for inputs and hidden states, instead of joining these (1.2 to 2.8 times as slow); ``lax.map`` over
chunks that fit the cache (1.4 to 2.8 times as slow); bfloat16 states, which halve the memory but are
converted by passes of their own.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from mlhf_optax.comparison.benchmarking import Timing, interleaved, timing_parser
from mlhf_optax.comparison.machine import free_memory, needed_memory
from mlhf_optax.comparison.reporting import command_line, report, write_json
from mlhf_optax.controls import Inputs, control_unit, damping_values, preconditioner_values, run_network
from mlhf_optax.coordinate_lstm import LayerCarry, init_carry
from mlhf_optax.meta_params import MetaParams, Settings, init_meta_params

TARGET = 2.0
SIZES = (10**4, 10**5, 10**6, 10**7)
DTYPES = ("float32", "bfloat16")
SETTINGS = {"log-global": Settings(), "tanh": dataclasses.replace(Settings(), input_features="tanh")}
TYPES: Any = {"kernel": "dense_kernel"}


class Carries(NamedTuple):
    """Carries of LSTM_s and LSTM_p."""

    damping: tuple[LayerCarry, ...]
    preconditioner: tuple[LayerCarry, ...]


Step = Callable[[MetaParams, Carries, Inputs], tuple[Any, Carries]]


def forward(meta_params: MetaParams, carries: Carries, inputs: Inputs) -> tuple[Any, Carries]:
    """Runs both LSTMs one step; returns damping and preconditioner, and the next carries."""
    settings = meta_params.settings
    s_out, s_carry = run_network(meta_params.damping, settings, TYPES, carries.damping, inputs)
    p_out, p_carry = run_network(meta_params.preconditioner, settings, TYPES, carries.preconditioner, inputs)
    unit = control_unit(settings, inputs.gradient, jnp.ones(()))
    damping = damping_values(settings, s_out, unit)
    preconditioner = preconditioner_values(settings, p_out, unit, damping)
    return (damping, preconditioner), Carries(s_carry, p_carry)


def gradient(meta_params: MetaParams, carries: Carries, inputs: Inputs) -> tuple[Any, Carries]:
    """Runs both LSTMs one step and returns gradients of their weights, and the next carries."""

    def loss(weights):
        (damping, preconditioner), new = forward(weights, carries, inputs)
        # Any two cotangents of the size of the parameters will do.
        return optax.tree.vdot(damping, inputs.residual) + optax.tree.vdot(
            preconditioner, inputs.direction
        ), new

    return jax.grad(loss, has_aux=True)(meta_params)


def evaluations(meta_params: MetaParams, carries: Carries, inputs: Inputs) -> tuple[Any, Carries]:
    """Evaluates as many elementary functions on the same arrays as a step does, and little else.

    A layer has 3 sigmoids and 2 tanh a unit: here 3 go to the cells and 2 to the hidden states. Added up
    they stay independent of each other, so that the processor may overlap them.
    """

    def some(array: jax.Array, count: int) -> jax.Array:
        wide = array.astype(jnp.float32)
        return functools.reduce(jnp.add, [jnp.tanh(wide + i) for i in range(count)]).astype(array.dtype)

    def layer(carry: LayerCarry) -> LayerCarry:
        cell = jax.tree.map(lambda x: some(x, 3), carry.cell)
        return LayerCarry(cell, jax.tree.map(lambda x: some(x, 2), carry.hidden))

    function = jnp.tanh if meta_params.settings.input_features == "tanh" else lambda x: jnp.log(jnp.abs(x))
    first, second, third = (jax.tree.map(function, quantity) for quantity in inputs)
    outputs = jax.tree.map(lambda a, b, c: (jnp.exp(a + c), jnp.exp(b + c)), first, second, third)
    return outputs, Carries(*(tuple(layer(carry) for carry in network) for network in carries))


def copies(meta_params: MetaParams, carries: Carries, inputs: Inputs) -> tuple[Any, Carries]:
    """Reads and writes the carries."""
    del meta_params, inputs
    return (), jax.tree.map(lambda x: x + 1, carries)


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every number of coordinates, prints the table, writes JSON and figure."""
    options = _parse(arguments)
    floor = evaluations if jax.default_backend() == "cpu" else copies
    rows = []
    for size, dtype, features in itertools.product(options.coordinates, options.carry_dtypes, SETTINGS):
        row = measure(size, dtype, features, floor, options.repeats)
        if row is not None:
            rows.append(row)
            print(f"{size} coordinates, {dtype}, {features}: {row['forward_ns']:.1f} ns", flush=True)
    Console().print(make_table(rows))
    print(verdict(rows))
    command = command_line(Path(__file__).name, arguments)
    if options.json:
        content = {"target": TARGET, "floor": floor.__name__, "repeats": options.repeats, "rows": rows}
        write_json(options.json, report(command, **content))
    if options.figure:
        save_figure(rows, options.figure)


def measure(size: int, dtype: str, features: str, floor: Step, repeats: int) -> dict[str, Any] | None:
    """Times forward step, gradient and floor against each other; what has no room in memory is left out."""
    layer_types = list(TYPES.values())
    meta_params = init_meta_params(jax.random.key(0), SETTINGS[features], layer_types=layer_types)
    make_arrays = functools.partial(_arrays, size, dtype)
    shapes, room = jax.eval_shape(make_arrays), free_memory()
    programs = {}
    for name, step in (("forward", forward), ("gradient", gradient), ("floor", floor)):
        # The carries are donated, as those of a training are.
        program = jax.jit(step, donate_argnums=1, keep_unused=True).lower(meta_params, *shapes).compile()
        needed = needed_memory(program)
        if needed <= room:
            programs[name] = program
        else:
            sizes = f"needs {needed / 1e9:.1f} GB of {room / 1e9:.1f} GB"
            print(f"{size} coordinates, {dtype}, {features}: {name} {sizes} and is skipped")
    if not {"forward", "floor"} <= programs.keys():
        return None
    times = _time(programs, meta_params, *make_arrays(), repeats)
    row: dict[str, Any] = {"coordinates": size, "carry_dtype": dtype, "features": features}
    for name in ("forward", "gradient", "floor"):
        timing = times.get(name)
        row[f"{name}_ns"] = timing and 1e9 * timing.median / size
        row[f"{name}_spread_ns"] = timing and [1e9 * timing.low / size, 1e9 * timing.high / size]
    return row | {"forward_ratio": times["forward"].over(times["floor"])}


def _arrays(size: int, dtype: str) -> tuple[Carries, Inputs]:
    keys = jax.random.split(jax.random.key(1), 3)
    quantities = [{"kernel": 1e-3 * jax.random.normal(keys[i], (size,))} for i in range(3)]
    return Carries(*(init_carry(quantities[0], dtype=dtype) for _ in range(2))), Inputs(*quantities)


def _time(programs, meta_params, carries: Carries, inputs: Inputs, repeats: int) -> dict[str, Timing]:
    """Times programs that hand the carries on to each other, so that memory holds them once."""

    def thunk(program):
        def call():
            nonlocal carries
            result, carries = program(meta_params, carries, inputs)
            return jax.block_until_ready((result, carries))

        return call

    return interleaved({name: thunk(program) for name, program in programs.items()}, repeats=repeats)


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns nanoseconds a coordinate, with the 10th and 90th percentile of the rounds."""
    # Narrow enough for a terminal of 80 columns, which is also what rich assumes for a file.
    title = "ns a coordinate, both LSTMs (10-90 %)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in ("size", "carry", "features", "forward", "gradient", "floor", "ratio"):
        justify = "left" if column in ("carry", "features") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        cells = []
        for name in ("forward", "gradient", "floor"):
            low, high = row[f"{name}_spread_ns"] or (0, 0)
            cells.append(f"{row[f'{name}_ns']:.0f} ({low:.0f}-{high:.0f})" if high else "-")
        start = (f"{row['coordinates']:.0e}", row["carry_dtype"], row["features"])
        table.add_row(*start, *cells, f"{row['forward_ratio']:.2f}")
    return table


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Says where a forward step is within the target."""
    met = sum(row["forward_ratio"] <= TARGET for row in rows)
    return f"A forward step is within {TARGET:g} times the floor in {met} of {len(rows)} cases."


def save_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws nanoseconds a coordinate by their number, one panel for each kind of features."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SETTINGS), figsize=(9, 4), sharey=True, layout="constrained")
    colours = {"forward": "tab:blue", "gradient": "tab:orange", "floor": "0.4"}
    dashes = dict(zip(DTYPES, ("-", "--"), strict=True))
    for axes, features in zip(panels, SETTINGS, strict=True):
        for dtype, dash in dashes.items():
            chosen = [row for row in rows if (row["features"], row["carry_dtype"]) == (features, dtype)]
            for name, colour in colours.items():
                points = [(row["coordinates"], row[f"{name}_ns"]) for row in chosen if row[f"{name}_ns"]]
                style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3}
                axes.plot(*zip(*points, strict=True), label=f"{name}, {dtype}", **style)
        axes.set(xscale="log", yscale="log", xlabel="coordinates", title=f"{features} features")
    panels[0].set_ylabel("ns a coordinate")
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = timing_parser(__doc__, repeats=9, quick="no more than a million coordinates, 3 rounds")
    parser.add_argument("--coordinates", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--carry-dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args(arguments)
    if options.quick:
        options.coordinates = [size for size in options.coordinates if size <= 10**6]
        options.repeats = 3
    return options


if __name__ == "__main__":
    main()
