"""Lineax: a linear solve inside the model, a ridge regression on learned features."""

import jax
import jax.numpy as jnp
import pytest
from race import assert_ahead_of_adamw, plain_training

from mlhf_optax import SquaredError, load_pretrained

lx = pytest.importorskip("lineax")

pytestmark = pytest.mark.usefixtures("unoptimised")

LOSS = SquaredError(targets="y")


def features(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


def fit_and_predict(params, task):
    """Fits the last layer to the shots of one task, and applies it to the task's queries."""
    shots = features(params, task["shots"])
    normal = shots.T @ shots + jnp.exp(params["log_ridge"]) * jnp.eye(shots.shape[1])
    operator = lx.MatrixLinearOperator(normal, lx.positive_semidefinite_tag)
    weights = lx.linear_solve(operator, shots.T @ task["values"], solver=lx.Cholesky()).value
    return features(params, task["x"]) @ weights


def predict_fn(params, batch):
    return jax.vmap(fit_and_predict, in_axes=(None, 0))(params, batch)


def test_meta_learned_features_with_a_solve_for_each_task():
    keys = jax.random.split(jax.random.key(0), 4)
    points = jax.random.uniform(keys[0], (24, 20, 1), minval=-2, maxval=2)
    phase = jax.random.uniform(keys[1], (24, 1), maxval=3.0)
    values = jnp.sin(2 * points[..., 0] + phase)
    batch = {"shots": points[:, :8], "values": values[:, :8], "x": points[:, 8:], "y": values[:, 8:]}
    start = {
        "in": jax.random.normal(keys[2], (1, 16)),
        "bias": jnp.linspace(-1.0, 1.0, 16),
        "out": jax.random.normal(keys[3], (16, 5)) / 4,
        "log_ridge": jnp.zeros(()),
    }

    train = plain_training(predict_fn, LOSS, start, batch)
    assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, LOSS))
