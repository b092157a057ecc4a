"""Distrax: heteroscedastic regression, by the log-probabilities of normal distributions."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from race import assert_ahead_of_adamw, plain_training

from mlhf_optax import NegativeLogLikelihood, load_pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its import uses what JAX deprecates
    distrax = pytest.importorskip("distrax")

pytestmark = pytest.mark.usefixtures("unoptimised")


def distribution(params, x):
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    mean, spread = jnp.split(hidden @ params["out"], 2, axis=-1)
    return distrax.Normal(mean[:, 0], jax.nn.softplus(spread[:, 0]) + 1e-3)


def predict_fn(params, batch):
    """One log-probability for each observation.

    Minus its mean is not convex in mean and spread together, which the curvature of a loss has to be; the
    empirical Fisher matrix of the log-probabilities is positive semidefinite for any distribution.
    """
    return distribution(params, batch["x"]).log_prob(batch["y"])


def test_mean_and_spread_by_log_probabilities():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (128, 1), minval=-2, maxval=2)
    noise = jax.random.normal(keys[1], (128,)) * (0.05 + 0.2 * jnp.abs(x[:, 0]))
    batch, loss_fn = {"x": x, "y": jnp.sin(2 * x[:, 0]) + noise}, NegativeLogLikelihood()
    start = {
        "in": jax.random.normal(keys[2], (1, 16)),
        "bias": jnp.linspace(-1.0, 1.0, 16),
        "out": jax.random.normal(keys[3], (16, 2)) / 8,
    }

    train = plain_training(predict_fn, loss_fn, start, batch)
    assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))
