"""What a product with the generalized Gauss-Newton matrix costs inside a loop, against outside of loops.

For every kind of layer one compiled function linearizes the layer once, as the optimizer does, and takes a
chain of normalised products: in ``lax.fori_loop``, in ``lax.scan``, or written out one after the other
("outside"). Long CG loops are rolled and the steps of meta-training are a scan, so all three should cost
the same. XLA on CPUs has no fast way for most derivatives of convolutions inside loops; the library's own
``mlhf_optax.tasks.convolution.convolve`` has one, and the rows "(lax)" show what it saves. A time is that of
the chain over its number of products, so each carries its share of the one linearization.

    python benchmarks/ggn_in_loops.py --json ggn_in_loops.json --figure ggn_in_loops.png

Target on CPUs: at most 1.2 for every convolution of the library. ``--quick``: few layers, small, few rounds.

What was tried and did not pay, on a CPU: convolutions as sums of shifted matrix products (2 to 5 times
slower), as one matrix product over copies of the images where these leave the cache (3 to 7 times slower; the
library does it for small images), and picking the pixels of a strided 1x1 convolution inside the product
(1.3 to 1.4 in a loop: every product picked them again).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from experiment import BenchmarkOptions, command_line, parse_options
from flax import linen as nn
from jax import lax

from mlhf_optax.curvature import PredictFn, ggn_matvec
from mlhf_optax.experiments.timing import interleaved
from mlhf_optax.losses import SquaredError
from mlhf_optax.tasks.convolution import convolve
from mlhf_optax.tasks.models import max_pool

TARGET = 1.2
LOOPS = ("fori_loop", "scan")
KINDS = ("outside", *LOOPS)
RIVAL_BATCH_SIZE, RIVAL_PRODUCTS = 8, 2


class Layer(NamedTuple):
    """What is timed: a layer, the shape of its inputs without the batch, and two facts about it."""

    module: nn.Module
    inputs: tuple[int, ...]
    is_first: bool = False  # its inputs are data; those of other layers have tangents and cotangents
    is_rival: bool = False  # the library has another; with small batches, as one product may take seconds


def _convolutions(suffix: str, convolution: Callable[..., jax.Array]) -> dict[str, Layer]:
    """Returns layers of CUDA-convnet (5x5), of residual networks (3x3, 1x1) and the same with strides."""

    def layer(window: int, stride: int, channels: int, inputs: tuple[int, ...], **options: Any) -> Layer:
        sides, strides = (window, window), (stride, stride)
        module = nn.Conv(channels, sides, strides, conv_general_dilated=convolution)
        return Layer(module, inputs, is_rival=convolution is not convolve, **options)

    layers = {
        "conv 1x1 stride 1": layer(1, 1, 16, (32, 32, 16)),
        "conv 1x1 stride 2": layer(1, 2, 32, (32, 32, 16)),
        "conv 3x3 stride 1": layer(3, 1, 16, (32, 32, 16)),
        "conv 3x3 stride 2": layer(3, 2, 32, (32, 32, 16)),
        "conv 5x5 stride 1": layer(5, 1, 64, (16, 16, 32)),
        "conv 5x5 stride 2": layer(5, 2, 64, (16, 16, 32)),
        "conv 5x5 of images": layer(5, 1, 32, (32, 32, 3), is_first=True),
    }
    return {f"{name}{suffix}": value for name, value in layers.items()}


LAYERS = {
    "dense": Layer(nn.Dense(32), (4096,)),
    **_convolutions("", convolve),
    "pooling 2x2": Layer(nn.Sequential([max_pool]), (32, 32, 32)),
    "batch norm": Layer(nn.BatchNorm(use_running_average=False), (32, 32, 16)),
    "attention": Layer(nn.MultiHeadDotProductAttention(num_heads=4), (64, 64)),
    **_convolutions(" (lax)", lax.conv_general_dilated),
    "pooling 2x2 (reduce_window)": Layer(
        nn.Sequential([lambda x: nn.max_pool(x, (2, 2), (2, 2))]), (32, 32, 32), is_rival=True
    ),
}
QUICK = ("dense", "conv 3x3 stride 1", "pooling 2x2", "conv 3x3 stride 1 (lax)")


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    repeats: int = 15
    """Rounds."""
    layers: tuple[str, ...] = tuple(LAYERS)
    """Which layers."""
    batch_size: int = 64
    """Examples."""
    products: int = 8
    """Products per chain."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every layer, prints the table, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, layers=QUICK, batch_size=8, repeats=3)
    rows = []
    for name in options.layers:
        rows += measure(name, options)
        for row in rows[-len(LOOPS) :]:
            times = ", ".join(f"{place} {1e3 * row[place]:.3g} ms" for place in ("inside", "outside"))
            print(f"{name}, {row['loop']}: {times} per product, ratio {row['ratio']:.2f}", flush=True)
    print(verdict(rows))
    content = {"target": TARGET, "repeats": options.repeats, "rows": rows}
    options.save(command_line(__file__, arguments), draw, **content)


def measure(name: str, options: Options) -> list[dict[str, Any]]:
    """Times the chains of one layer against each other; returns a row per kind of loop, times in seconds."""
    layer = LAYERS[name]
    batch_size, products = options.batch_size, options.products
    if layer.is_rival:
        batch_size, products = min(batch_size, RIVAL_BATCH_SIZE), min(products, RIVAL_PRODUCTS)
    predict_fn, params, batch = problem(layer, batch_size)
    chains = [jax.jit(make_chain(kind, predict_fn, products)) for kind in KINDS]
    thunks = {
        kind: lambda chain=chain: jax.block_until_ready(chain(params, batch))
        for kind, chain in zip(KINDS, chains, strict=True)
    }
    times = interleaved(thunks, repeats=options.repeats)
    rows = []
    for loop in LOOPS:
        row: dict[str, Any] = {"layer": name, "loop": loop, "is_rival": layer.is_rival}
        row |= {"batch_size": batch_size, "products": products}
        for place, timing in (("inside", times[loop]), ("outside", times["outside"])):
            row[place] = timing.median / products
            row[f"{place}_spread"] = [timing.low / products, timing.high / products]
        rows.append(row | {"ratio": times[loop].over(times["outside"])})
    return rows


def problem(layer: Layer, batch_size: int) -> tuple[PredictFn, dict[str, Any], dict[str, Any]]:
    """Returns ``predict_fn``, parameters and batch of a network that is this layer and little else.

    A gain for every channel of the inputs stands for the layers below: through it the inputs get tangents
    and cotangents, without being a vector of the size of the inputs that the loop would have to carry.
    """
    images = jax.random.normal(jax.random.key(0), (batch_size, *layer.inputs))
    variables = dict(layer.module.init(jax.random.key(1), images))
    params = {"layer": variables.pop("params", {})}
    if not layer.is_first:
        params["gain"] = jnp.ones(layer.inputs[-1])

    def predict_fn(params, batch):
        inputs = batch["image"] if layer.is_first else params["gain"] * batch["image"]
        arguments = {**batch["state"], "params": params["layer"]}
        # Batch norm, asked for statistics of the batch, insists on returning its averages.
        return layer.module.apply(arguments, inputs, mutable=list(variables))[0]

    batch = {"image": images, "state": variables}
    shape = jax.eval_shape(predict_fn, params, batch).shape
    return predict_fn, params, batch | {"target": jnp.zeros(shape)}


def make_chain(kind: str, predict_fn: PredictFn, products: int) -> Callable[[Any, Any], Any]:
    """Returns a function of parameters and batch that takes ``products`` products in a row.

    Each starts from the normalised result of the one before, so that none can be left out or taken out of
    the loop, and its norm keeps neighbours from being fused, as the inner products of CG do.
    """

    def chain(params, batch):
        matvec = ggn_matvec(predict_fn, SquaredError("target"), params, batch)

        def step(vector):
            product = matvec(vector)
            return optax.tree.scale(1.0 / optax.tree.norm(product), product)

        start = jax.tree.map(jnp.ones_like, params)
        if kind == "fori_loop":
            return lax.fori_loop(0, products, lambda _, vector: step(vector), start)
        if kind == "scan":
            return lax.scan(lambda vector, _: (step(vector), None), start, length=products)[0]
        for _ in range(products):
            start = step(start)
        return start

    return chain


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Says whether the convolutions of the library reach the target."""
    own = [row for row in rows if row["layer"].startswith("conv") and not row["is_rival"]]
    if not own:
        return "No convolution of the library was timed."
    above = [f"{row['layer']} in {row['loop']} ({row['ratio']:.2f})" for row in own if row["ratio"] > TARGET]
    if not above:
        return f"All convolutions of the library reach the target of {TARGET}."
    return f"Above the target of {TARGET}: {', '.join(above)}."


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the ratios as bars, a group per layer."""
    rows = content["rows"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure.set_size_inches(7, 1.2 + 0.3 * len(layers))
    axes = figure.subplots()
    for number, loop in enumerate(LOOPS):
        ratios = [row["ratio"] for row in rows if row["loop"] == loop]
        places = [index + 0.4 * (number - 0.5) for index in range(len(layers))]
        # Bars start at 1, where a loop costs nothing.
        axes.barh(places, [ratio - 1 for ratio in ratios], height=0.38, left=1, label=f"lax.{loop}")
    axes.axvline(TARGET, color="0.4", linestyle="--", linewidth=0.8, label=f"target {TARGET}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="seconds of a GGN product inside the loop / outside")
    axes.set_yticks(range(len(layers)), layers)
    axes.invert_yaxis()
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
