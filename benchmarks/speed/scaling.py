"""What a training step of MLHF sends between devices, and the efficiency that follows.

Compiles one step for meshes of 1, 2, 4 and 8 devices, with parameters whole on every device (data parallel)
or cut as the batch is (sharded), and counts the collectives in the compiled program. Steps are timed only
where devices are real: eight devices of one CPU share its cores. The prediction for GPUs is this model:

    compute time   = floating-point operations of one device / (peak * utilization)
    all-reduce     = latency + 2 (n - 1) / n * bytes / bandwidth     (ring)
    all-gather and others likewise, with (n - 1) / n
    efficiency     = compute time of the ideal / (compute time + sum over collectives)

Nothing overlaps in it, so it is pessimistic. The ideal of weak scaling is the time of one device with the
same batch per device, that of strong scaling the time of one device divided by n.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python benchmarks/speed/scaling.py
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from mlhf_optax import SoftmaxCrossEntropy, gauss_newton, init_meta_params, load_pretrained, mlhf
from mlhf_optax.experiments.scripts import BenchmarkOptions, Table, command_line, parse_options, saved
from mlhf_optax.experiments.timing import interleaved

PLACEMENTS = {"data parallel": P(), "sharded": P("data")}
"""How the parameters lie, by name."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "f64": 8, "s64": 8}
_LOSS = SoftmaxCrossEntropy()


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this benchmark."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Sizes of the mesh."""
    batch: int = 4096
    """Examples: per device in weak scaling, in all in strong scaling."""
    width: int = 1024
    """Units of each of the two hidden layers."""
    cg_steps: int = 4
    """CG steps per step."""
    bandwidth: float = 900e9
    """Bytes per second that one device sends."""
    latency: float = 10e-6
    """Seconds that a collective takes however small it is."""
    peak: float = 67e12
    """Floating-point operations per second of one device: float32 of an H100 without tensor cores."""
    utilization: float = 0.4
    """Share of the peak that is reached."""
    timed: bool = False
    """Time the steps on a CPU, too; on other devices they always are timed."""


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns, by kind, how many collectives a compiled program has, and the bytes of what they return.

    Example:
      >>> collectives("%a = (f32[4,2]{1,0}, f32[]) all-reduce(%b, %c), channel_id=1")
      {'all-reduce': (1, 36)}
    """
    counts, sizes = collections.Counter(), collections.Counter()
    for shapes, kind in re.findall(rf" = (\S.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text):
        counts[kind] += 1
        for dtype, dimensions in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            sizes[kind] += _SIZES[dtype] * math.prod(int(n) for n in dimensions.split(",") if n)
    return {kind: (counts[kind], sizes[kind]) for kind in counts}


def predicted_efficiency(
    devices: int, flops: float, ideal_flops: float, found: dict[str, tuple[int, int]], options: Options
) -> float:
    """Returns the efficiency by the model of this module.

    Example:
      >>> predicted_efficiency(1, 1e9, 1e9, {}, Options())
      1.0
    """
    speed = options.peak * options.utilization
    seconds = flops / speed
    for kind, (count, size) in found.items():
        rounds = (2 if kind == "all-reduce" else 1) * (devices - 1) / devices
        seconds += count * options.latency + rounds * size / options.bandwidth
    return ideal_flops / speed / seconds


def _layers(sizes: Sequence[int]) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    return {
        f"Dense_{i}": {"kernel": jax.random.normal(key, (m, n)) / m**0.5, "bias": jnp.zeros(n)}
        for i, (key, m, n) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }


def _predict(params: Any, batch: Any) -> jax.Array:
    x, last = batch["image"], len(params) - 1
    for i, layer in enumerate(params.values()):
        x = x @ layer["kernel"] + layer["bias"]
        x = x if i == last else jax.nn.relu(x)
    return x


def optimizers(cg_steps: int) -> dict[str, Any]:
    """Returns the optimizers by name."""
    coordinate = init_meta_params(jax.random.key(0), layer_types=["dense_kernel", "dense_bias"])
    return {
        "general": load_pretrained().optimizer(_predict, _LOSS),
        "mlhf, LSTM per coordinate": mlhf(coordinate, _predict, _LOSS, num_cg_steps=cg_steps),
        "gauss_newton": gauss_newton(1.0, _predict, _LOSS, num_cg_steps=cg_steps),
        "adam": optax.with_extra_args_support(optax.adam(1e-3)),
    }


def make_step(tx: Any) -> Any:
    """Returns ``step(params, state, batch)``, jitted."""

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: _LOSS(_predict(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def start(tx: Any, devices: int, batch_size: int, width: int, placement: jax.P) -> tuple[Any, Any, Any]:
    """Returns parameters, state and batch on a mesh of so many devices."""
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    put = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    image = jax.random.normal(jax.random.key(1), (batch_size, 256))
    params = put(_layers((256, width, width, 128)), placement)
    batch = put({"image": image, "label": jnp.arange(batch_size) % 128}, P("data"))
    return params, jax.jit(tx.init)(params), batch


def measured_seconds(step: Any, arguments: tuple[Any, Any, Any], repeats: int) -> float:
    """Returns the median over rounds of the time of one step, the state of one going into the next."""
    params, state, batch = arguments

    def run() -> Any:
        nonlocal params, state
        params, state = step(params, state, batch)
        return params

    return interleaved({"step": run}, repeats=repeats)["step"].median


def measure(name: str, tx: Any, options: Options) -> list[dict[str, Any]]:
    """Returns one row per placement, way of scaling and size of the mesh."""
    rows = []
    for (placement, spec), scaling in itertools.product(PLACEMENTS.items(), ("weak", "strong")):
        single = single_seconds = 0.0
        for devices in options.devices:
            batch = options.batch * devices if scaling == "weak" else options.batch
            arguments = start(tx, devices, batch, options.width, spec)
            compiled = make_step(tx).lower(*arguments).compile()
            found, flops = collectives(compiled.as_text()), compiled.cost_analysis()["flops"]
            single = single or flops
            share = 1 if scaling == "weak" else 1 / devices
            row = {
                "optimizer": name,
                "placement": placement,
                "scaling": scaling,
                "devices": devices,
                "batch": batch,
                "flops": flops,
                "collectives": {kind: count for kind, (count, _) in found.items()},
                "bytes": sum(size for _, size in found.values()),
                "efficiency": predicted_efficiency(devices, flops, single * share, found, options),
            }
            if options.timed:
                row["seconds"] = measured_seconds(compiled, arguments, options.repeats)
                single_seconds = single_seconds or row["seconds"]
                row["measured_efficiency"] = single_seconds * share / row["seconds"]
            rows.append(row)
    return rows


def table(content: dict[str, Any]) -> Table:
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
        efficiencies = [_efficiency(row) for row in (weak, strong)]
        rows.append([optimizer, placement, sent, f"{weak['bytes'] / 1e6:.0f}", *efficiencies])
    each = {kind: next(r["batch"] for k, r in found.items() if k[2] == kind) for kind in ("weak", "strong")}
    is_measured = any("measured_efficiency" in row for row in found.values())
    note = (
        f"A dense network 256-1024-1024-128 on {most} devices; {each['weak']:,} examples in weak scaling, "
        f"{each['strong']:,} in strong. Efficiencies are predicted, for links of "
        f"{content['model']['bandwidth'] / 1e9:.0f} GB/s where nothing overlaps"
        + ("; in brackets as measured." if is_measured else ", not measured.")
    )
    return Table(rows, note, content)


def _efficiency(row: dict[str, Any]) -> str:
    measured = row.get("measured_efficiency")
    return f"{row['efficiency']:.2f}" + ("" if measured is None else f" ({measured:.2f})")


TABLES = {"scaling": lambda folder: table(*saved(folder, "scaling"))}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the efficiency over the devices: predicted as lines, measured as crosses."""
    figure.set_size_inches(9, 7)
    grid = figure.subplots(len(PLACEMENTS), 2, sharex=True, sharey=True)
    for placement, row_of_axes in zip(PLACEMENTS, grid, strict=True):
        for axes, scaling in zip(row_of_axes, ("weak", "strong"), strict=True):
            kind = (placement, scaling)
            rows = [row for row in content["rows"] if (row["placement"], row["scaling"]) == kind]
            for name in dict.fromkeys(row["optimizer"] for row in rows):
                own = [row for row in rows if row["optimizer"] == name]
                sizes, values = [r["devices"] for r in own], [r["efficiency"] for r in own]
                (line,) = axes.plot(sizes, values, marker="o", label=name)
                measured = [r.get("measured_efficiency", math.nan) for r in own]
                axes.plot(sizes, measured, linestyle="", marker="x", color=line.get_color())
            axes.set(title=f"{placement}, {scaling} scaling", ylim=(0, 1.05))
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    for axes in grid[:, 0]:
        axes.set_ylabel("efficiency")
    grid[0][0].legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles every step, prints the table, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, devices=(1, 2), batch=16, width=8, cg_steps=1)
    if len(jax.devices()) < max(options.devices):
        raise SystemExit(
            f"there are {len(jax.devices())} devices, --devices asks for {max(options.devices)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={max(options.devices)} and JAX_PLATFORMS=cpu"
        )
    options = dataclasses.replace(options, timed=options.timed or jax.default_backend() != "cpu")
    rows: list[dict[str, Any]] = []
    for name, tx in optimizers(options.cg_steps).items():
        rows += measure(name, tx, options)
        print(f"{name}: done", flush=True)
    model = {key: getattr(options, key) for key in ("bandwidth", "latency", "peak", "utilization")}
    command = command_line(__file__, arguments)
    if jax.default_backend() == "cpu":  # where devices are made by a flag
        flag = f"--xla_force_host_platform_device_count={max(options.devices)}"
        command = f"XLA_FLAGS={flag} JAX_PLATFORMS=cpu {command}"
    options.report(command, table, draw, rows=rows, model=model)


if __name__ == "__main__":
    main()
