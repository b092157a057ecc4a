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

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from experiment import BenchmarkOptions, command_line, parse_options

from mlhf_optax.controllers.coordinate_lstm import Carries, MetaParams, coordinate_lstm, init_meta_params
from mlhf_optax.controllers.lstm import LayerCarry, init_carry
from mlhf_optax.controllers.lstm_settings import Inputs, Settings, TanhFeatures
from mlhf_optax.experiments.timing import Timing, interleaved

TARGET = 2.0
SIZES = (10**4, 10**5, 10**6, 10**7)
TIMED = ("forward", "gradient", "floor")
SETTINGS = {"log-global": Settings(), "tanh": Settings(features=TanhFeatures())}
TYPES: Any = {"kernel": "dense_kernel"}


Step = Callable[[MetaParams, Carries, Inputs], tuple[Any, Carries]]


def forward(meta_params: MetaParams, carries: Carries, inputs: Inputs) -> tuple[Any, Carries]:
    """Runs both LSTMs one step; returns damping and preconditioner, and the next carries."""
    controller = coordinate_lstm(meta_params, layer_types_fn=lambda params: TYPES)
    view: Any = SimpleNamespace(**inputs._asdict(), params=inputs.gradient, initial_rms=jnp.ones(()))
    control = controller.control(view, carries)
    damping, preconditioner, *_ = controller.operators(view, control.signal)
    return (damping.values, preconditioner.values), control.state


def gradient(meta_params: MetaParams, carries: Carries, inputs: Inputs) -> tuple[Any, Carries]:
    """Runs both LSTMs one step and returns gradients of their weights, and the next carries."""

    def loss(weights):
        (damping, preconditioner), new = forward(weights, carries, inputs)
        # Any two cotangents of the size of the parameters will do.
        of_damping = optax.tree.vdot(damping, inputs.residual)
        return of_damping + optax.tree.vdot(preconditioner, inputs.direction), new

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

    is_tanh = isinstance(meta_params.settings.features, TanhFeatures)
    function = jnp.tanh if is_tanh else lambda x: jnp.log(jnp.abs(x))
    first, second, third = (jax.tree.map(function, quantity) for quantity in inputs)
    outputs = jax.tree.map(lambda a, b, c: (jnp.exp(a + c), jnp.exp(b + c)), first, second, third)
    return outputs, Carries(*(tuple(layer(carry) for carry in network) for network in carries))


def copies(meta_params: MetaParams, carries: Carries, inputs: Inputs) -> tuple[Any, Carries]:
    """Reads and writes the carries."""
    del meta_params, inputs
    return (), jax.tree.map(lambda x: x + 1, carries)


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    coordinates: tuple[int, ...] = SIZES
    """Numbers of coordinates."""
    carry_dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types of the LSTMs' states."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every number of coordinates, prints the table, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        small = tuple(size for size in options.coordinates if size <= 10**6)
        options = dataclasses.replace(options, coordinates=small, repeats=3)
    floor = evaluations if jax.default_backend() == "cpu" else copies
    rows = []
    for size, dtype, features in itertools.product(options.coordinates, options.carry_dtypes, SETTINGS):
        row = measure(size, dtype, features, floor, options.repeats)
        if row is not None:
            rows.append(row)
            times = ", ".join(f"{name} {row[f'{name}_ns'] or math.nan:.0f} ns" for name in TIMED)
            ratio = f"forward / floor {row['forward_ratio']:.2f}"
            print(f"{size} coordinates, {dtype}, {features}: {times}, {ratio}", flush=True)
    print(verdict(rows))
    content = {"target": TARGET, "floor": floor.__name__, "repeats": options.repeats, "rows": rows}
    options.save(command_line(__file__, arguments), draw, **content)


def measure(size: int, dtype: str, features: str, floor: Step, repeats: int) -> dict[str, Any] | None:
    """Times forward step, gradient and floor against each other; what has no room in memory is left out."""
    layer_types = list(TYPES.values())
    meta_params = init_meta_params(jax.random.key(0), SETTINGS[features], layer_types=layer_types)
    make_arrays = functools.partial(_arrays, size, dtype)
    shapes, room = jax.eval_shape(make_arrays), free_memory()
    programs = {}
    for name, step in zip(TIMED, (forward, gradient, floor), strict=True):
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
    for name in TIMED:
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


def needed_memory(program: Any) -> int:
    """Returns the bytes that a compiled program takes: arguments, results and what lies between."""
    sizes = program.memory_analysis()
    arrays = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return arrays + sizes.temp_size_in_bytes


def free_memory() -> float:
    """Returns the bytes that may be used on the device that computes, infinite where they cannot be told."""
    statistics, meminfo = jax.devices()[0].memory_stats(), Path("/proc/meminfo")
    if statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    if not meminfo.is_file():
        return math.inf
    sizes = dict(line.split(":") for line in meminfo.read_text().splitlines())
    # A system that runs out of memory ends the process, and with it the measurement.
    return 0.8 * 1024 * int(sizes["MemAvailable"].split()[0])


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Says where a forward step is within the target."""
    met = sum(row["forward_ratio"] <= TARGET for row in rows)
    return f"A forward step is within {TARGET:g} times the floor in {met} of {len(rows)} cases."


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws nanoseconds per coordinate by their number, one panel for each kind of features."""
    figure.set_size_inches(9, 4)
    rows = content["rows"]
    panels = figure.subplots(1, len(SETTINGS), sharey=True, squeeze=False)[0]
    colours = dict(zip(TIMED, ("tab:blue", "tab:orange", "0.4"), strict=True))
    for axes, features in zip(panels, SETTINGS, strict=True):
        for dtype, dash in (("float32", "-"), ("bfloat16", "--")):
            chosen = [row for row in rows if (row["features"], row["carry_dtype"]) == (features, dtype)]
            for name, colour in colours.items():
                known = [row for row in chosen if row[f"{name}_ns"]]
                points = [row["coordinates"] for row in known], [row[f"{name}_ns"] for row in known]
                axes.plot(*points, dash, color=colour, marker="o", markersize=3, label=f"{name}, {dtype}")
        axes.set(xscale="log", yscale="log", xlabel="coordinates", title=f"{features} features")
    panels[0].set_ylabel("ns per coordinate")
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    main()
