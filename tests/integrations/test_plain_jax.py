"""Losses that need no library, yet are no list of examples with one loss each."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from race import assert_ahead_of_adamw, plain_training

from mlhf_optax import SoftmaxCrossEntropy, load_pretrained

pytestmark = pytest.mark.usefixtures("unoptimised")


def dense(key, num_in, num_out):
    return {"w": jax.random.normal(key, (num_in, num_out)) / num_in**0.5, "b": jnp.zeros(num_out)}


def apply(layer, x):
    return x @ layer["w"] + layer["b"]


def differential_equation():
    """u'' = -sin(x) on [0, pi], with u = 0 at both ends: two sets of points."""
    keys = jax.random.split(jax.random.key(0))
    params = [dense(keys[0], 1, 16), dense(keys[1], 16, 1)]

    def u(params, x):
        return apply(params[1], jnp.tanh(apply(params[0], x[None])))[0]

    def predict_fn(params, batch):
        second = jax.vmap(jax.grad(jax.grad(u, argnums=1), argnums=1), in_axes=(None, 0))
        residual = second(params, batch["inside"]) + jnp.sin(batch["inside"])
        return residual, jax.vmap(u, in_axes=(None, 0))(params, batch["ends"])

    def loss_fn(outputs, batch):
        residual, ends = outputs
        return jnp.mean(residual**2) + jnp.mean(ends**2)

    batch = {"inside": jnp.linspace(0.1, 3.0, 37), "ends": jnp.array([0.0, jnp.pi])}
    return predict_fn, loss_fn, params, batch


def contrastive_logits():
    keys = jax.random.split(jax.random.key(0), 5)
    things = jax.random.normal(keys[0], (40, 4))
    batch = {
        "left": jnp.tanh(things @ jax.random.normal(keys[1], (4, 9))),
        "right": jnp.tanh(things @ jax.random.normal(keys[2], (4, 9))),
    }
    params = {"left": dense(keys[3], 9, 6), "right": dense(keys[4], 9, 6)}
    predict_fn = lambda p, b: apply(p["left"], b["left"]) @ apply(p["right"], b["right"]).T
    return predict_fn, SoftmaxCrossEntropy(labels=lambda b: jnp.arange(len(b["left"]))), params, batch


def classification():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (60, 5))
    batch = {"x": x, "label": jnp.argmax(x[:, :3] ** 2, axis=-1)}
    return [dense(keys[1], 5, 16), dense(keys[2], 16, 3)], batch


def squares_of_parameters_in_the_loss():
    params, batch = classification()
    cross_entropy = SoftmaxCrossEntropy()

    def predict_fn(params, batch):
        return apply(params[1], jnp.tanh(apply(params[0], batch["x"]))), params

    def loss_fn(outputs, batch):
        logits, weights = outputs
        return cross_entropy(logits, batch) + 1e-3 * sum(jnp.sum(w**2) for w in jax.tree.leaves(weights))

    return predict_fn, loss_fn, params, batch


def low_rank_beside_a_frozen_base():
    base, batch = classification()
    keys = jax.random.split(jax.random.key(1), 2)
    rank_two = lambda key, w: {"a": jax.random.normal(key, (len(w), 2)) / 2, "b": jnp.zeros((2, w.shape[1]))}
    params = [rank_two(key, layer["w"]) for key, layer in zip(keys, base, strict=True)]

    def predict_fn(params, batch):
        hidden = batch["x"]
        for index, (layer, low) in enumerate(zip(base, params, strict=True)):
            hidden = apply(layer, jnp.tanh(hidden) if index else hidden) + hidden @ low["a"] @ low["b"]
        return hidden

    return predict_fn, SoftmaxCrossEntropy(), params, batch


def variational_autoencoder():
    """The divergence is convex in mean and log-variance; the key of the draws has no axis of examples."""
    keys = jax.random.split(jax.random.key(0), 5)
    code = jax.random.normal(keys[0], (64, 2))
    pixels = jnp.tanh(code @ jax.random.normal(keys[1], (2, 12))) > 0
    params = {"encode": dense(keys[2], 12, 4), "decode": dense(keys[3], 2, 12)}

    def predict_fn(params, batch):
        mean, log_var = jnp.split(apply(params["encode"], batch["pixels"]), 2, axis=-1)
        z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(batch["key"], mean.shape)
        return {"logits": apply(params["decode"], z), "mean": mean, "log_var": log_var}

    def loss_fn(outputs, batch):
        nats = optax.sigmoid_binary_cross_entropy(outputs["logits"], batch["pixels"]).sum(axis=-1)
        mean, log_var = outputs["mean"], outputs["log_var"]
        divergence = 0.5 * jnp.sum(jnp.exp(log_var) + mean**2 - 1 - log_var, axis=-1)
        return jnp.mean(nats + divergence)

    return predict_fn, loss_fn, params, {"pixels": pixels.astype(jnp.float32), "key": keys[4]}


@pytest.mark.parametrize(
    ("case", "is_cut"),
    [
        (differential_equation, False),
        (contrastive_logits, False),
        (squares_of_parameters_in_the_loss, False),
        (low_rank_beside_a_frozen_base, True),
        (variational_autoencoder, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_with_the_defaults_it_is_ahead_of_adamw(case, is_cut):
    predict_fn, loss_fn, start, batch = case()

    train = plain_training(predict_fn, loss_fn, start, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))
    assert [str(w.message) for w in caught if "whole batch" not in str(w.message)] == []
    assert bool(caught) == (not is_cut), "a batch that cannot be cut is taken whole, and it is said"
