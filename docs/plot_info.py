"""Draws the figures of `reading-info.md`: a good training and one that blows up, on digits.

python docs/plot_info.py             writes docs/figures/info-good.png and info-bad.png
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from mlhf_optax import SoftmaxCrossEntropy, gauss_newton, load_pretrained, plot_info

LOSS_FN = SoftmaxCrossEntropy()


def predict_fn(params, batch):
    """A dense network, 64-32-10."""
    hidden = jax.nn.relu(batch["image"] @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def train(tx, steps: int, batch_size: int):
    """Trains on mini-batches of digits and returns the info of all steps."""
    images, labels = load_digits(return_X_y=True)
    data = {"image": jnp.asarray(images / 16.0, jnp.float32), "label": jnp.asarray(labels)}
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (64, 32)) / 8, "bias": jnp.zeros(32)},
        "last": {"kernel": jax.random.normal(keys[1], (32, 10)) / 6, "bias": jnp.zeros(10)},
    }

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, len(labels), (batch_size,), replace=False)
        batch = jax.tree.map(lambda x: x[chosen], data)
        grads = jax.grad(lambda p: LOSS_FN(predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "info")

    training = jax.jit(lambda keys: jax.lax.scan(step, (params, tx.init(params)), keys)[1])
    return training(jax.random.split(jax.random.key(1), steps))


def main(folder: Path, steps: int) -> None:
    """Draws both."""
    good = load_pretrained().optimizer(predict_fn, LOSS_FN)
    title = "load_pretrained(), batch 128"
    plot_info(train(good, steps, 128), title=title).savefig(folder / "info-good.png", dpi=100)
    # Damping a hundred times too small for batches of 16, and no bound on the update.
    bad = gauss_newton(1.0, predict_fn, LOSS_FN, damping=0.01, max_update_ratio=None)
    title = "gauss_newton(1.0, damping=0.01, max_update_ratio=None), batch 16"
    plot_info(train(bad, steps, 16), title=title).savefig(folder / "info-bad.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.steps)
