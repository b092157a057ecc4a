"""LODO, which is not meta-trained, on two tasks of its paper, beside Adam and momentum.

    python benchmarks/held_out/lodo_tasks.py --task bowl --steps 100000
    python benchmarks/held_out/lodo_tasks.py --task pixels --steps 5000 --data-dir DIR

``bowl``: the minimum of a quadratic of 100 numbers moves at random before every step. The floor is 7.41, the
loss of Newton's method; the best of Adam and momentum is published, and was found, between 14 and 16, that of
LODO at 9.0.

``pixels``: images by autoregression, the grey value of a pixel of MNIST from those above it and to its left.
The paper has a convolutional network of 94,696 parameters and 300,000 steps, where LODO is level with tuned
rivals. Here a dense network of 23,552 sees the 40 nearest of these pixels. LODO has the meta-learning rate
and momentum of its authors, with their learning rate and larger ones.

The loss that counts is the mean over the last tenth of the steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rivals import LODO

from mlhf_optax import SoftmaxCrossEntropy, lodo
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.scripts import Table, command_line, parse_options, saved
from mlhf_optax.support.checks import FROM_ONE, check_choice, check_fields
from mlhf_optax.tasks.mnist import load_mnist
from mlhf_optax.tasks.models import MLP

_REACH = 4  # rows above, and columns to both sides, that are seen
_WINDOWS = 10
_BATCH = 256

Train = Callable[[optax.GradientTransformation], Callable[[jax.Array], jax.Array]]
"""From an optimizer to a function from keys, one per step, to the losses before each step."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    task: str = "bowl"
    """``bowl`` or ``pixels``."""
    steps: int = 100_000
    """Of every training."""
    data_dir: Path | None = None
    """Where MNIST lies; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    output: Path = Path("runs/lodo_tasks")
    """Folder for the results."""

    def __post_init__(self):
        check_choice("task", self.task, ("bowl", "pixels"))
        check_fields(self, FROM_ONE, "steps")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with every optimizer, prints a table and writes ``<task>.json``."""
    options = parse_options(Options, __doc__, arguments)
    if options.task == "bowl":
        train, about = noisy_bowl()
    else:
        images = load_mnist(options.data_dir, options.cache_dir).train["image"][..., 0]
        train, about = pixels(images), {}
    rows = []
    for name, tx in OPTIMIZERS[options.task].items():
        losses = np.asarray(train(tx)(jax.random.split(jax.random.key(2), options.steps)), np.float64)
        windows = np.array_split(losses, min(_WINDOWS, options.steps))
        means = [float(window.mean()) if np.isfinite(window).all() else None for window in windows]
        rows.append({"optimizer": name, "losses": means, **about})
        print(f"{name}: done", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    content = with_origin(command_line(__file__, arguments), steps=options.steps, rows=rows)
    write_json(options.output / f"{options.task}.json", content)
    print(*{"bowl": bowl_table, "pixels": pixels_table}[options.task](content).markdown(), sep="\n")


def bowl_table(content: dict[str, Any]) -> Table:
    """Returns what each optimizer reaches on the noisy bowl of LODO's paper."""
    note = (
        f"The noisy quadratic bowl, {content['steps']:,} steps. The floor is "
        f"{content['rows'][0]['floor']:.2f}; published for LODO is about 9.0."
    )
    return Table(_last_tenth(content, 2), note, content)


def pixels_table(content: dict[str, Any]) -> Table:
    """Returns what each optimizer reaches on the autoregression of pixels."""
    note = (
        f"The grey value of a pixel of MNIST from the 40 nearest above and to the left, {content['steps']:,} "
        "steps of batch 256; nats. 0.08459 is the learning rate that LODO's authors use for a ResNet."
    )
    return Table(_last_tenth(content, 3), note, content)


def _last_tenth(content: dict[str, Any], digits: int) -> list[list[str]]:
    shown = lambda loss: "diverged" if loss is None else f"{loss:.{digits}f}"
    rows = [[row["optimizer"], shown(row["losses"][-1])] for row in content["rows"]]
    return [["", "mean loss of the last tenth"], *rows]


TABLES = {
    "lodo_bowl": lambda folder: bowl_table(*saved(folder, "lodo_bowl")),
    "lodo_pixels": lambda folder: pixels_table(*saved(folder, "lodo_pixels")),
}


_SETTING = LODO.settings[0]
OPTIMIZERS: dict[str, dict[str, optax.GradientTransformation]] = {
    # Adam and heavy ball with the best settings of a coarse grid.
    "bowl": {
        "adam": optax.adam(1.1, b1=0.4),
        "momentum": optax.sgd(1.8, momentum=0.5),
        "lodo": lodo(1.0, 3e-4, momentum=0.0),
    },
    "pixels": {
        **{f"adam, rate {rate:g}": optax.adam(rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)},
        **{f"momentum, rate {rate:g}": optax.sgd(rate, momentum=0.9) for rate in (0.01, 0.03, 0.1, 0.3)},
        **{
            f"lodo, rate {rate:g}": lodo(**{**_SETTING, "learning_rate": rate})
            for rate in (_SETTING["learning_rate"], 0.3, 1.0)
        },
    },
}


def noisy_bowl(size: int = 100) -> tuple[Train, dict[str, float]]:
    """Returns trainings on the noisy bowl, and its floor."""
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (size, size)))[0]
    hessian = (basis * jnp.exp(jnp.linspace(jnp.log(1e-3), 0.0, size))) @ basis.T

    def train(tx):
        def step(carry, key):
            x, state, centre = carry
            centre += jax.random.normal(key, (size,))
            gradient = hessian @ (x - centre)
            updates, state = tx.update(gradient, state, x)
            return (x + updates, state, centre), 0.5 * jnp.vdot(x - centre, gradient)

        zeros = jnp.zeros(size)
        return jax.jit(lambda keys: jax.lax.scan(step, (zeros, tx.init(zeros), zeros), keys)[1])

    return train, {"floor": float(jnp.trace(hessian) / 2)}


def pixels(images: np.ndarray) -> Train:
    """Returns trainings that predict random pixels of images (N, 28, 28) in [0, 1]."""
    network = MLP((64, 64), 256, "tanh")
    padded = jnp.asarray(np.pad(images, ((0, 0), (_REACH, 0), (_REACH, _REACH))))
    loss_fn = SoftmaxCrossEntropy()

    def train(tx):
        params = network.init(jax.random.key(0), context(padded, jnp.zeros((1, 3), jnp.int32))[0])["params"]

        def step(padded, carry, key):
            params, state = carry
            places = jax.random.randint(key, (_BATCH, 3), 0, jnp.array(images.shape))
            inputs, label = context(padded, places)
            predict = lambda p: loss_fn(network.apply({"params": p}, inputs), {"label": label})
            loss, gradient = jax.value_and_grad(predict)(params)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        # The images are an argument: as a constant they would be in the program, all 270 MB of them.
        @jax.jit
        def run(padded, keys):
            return jax.lax.scan(functools.partial(step, padded), (params, tx.init(params)), keys)[1]

        return functools.partial(run, padded)

    return train


def context(padded: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what is seen of pixels, and their grey values.

    Args:
      padded: images with zeros above and to both sides.
      places: image, row and column of every pixel, shape (B, 3).

    Returns:
      The pixels above and to the left and the place in the image, (B, 42), and values from 0 to 255, (B,).
    """
    width = 2 * _REACH + 1

    def one(place):
        window = jax.lax.dynamic_slice(padded, place, (1, _REACH + 1, width)).ravel()
        seen = window[: _REACH * width + _REACH]  # the last row ends at the pixel itself
        return jnp.concatenate([seen, place[1:] / 28]), window[_REACH * width + _REACH]

    inputs, values = jax.vmap(one)(places)
    return inputs, jnp.round(255 * values).astype(jnp.int32)


if __name__ == "__main__":
    main()
