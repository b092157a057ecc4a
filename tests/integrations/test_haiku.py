"""Haiku: `transform_with_state` keeps parameters and state apart; the state rides in the batch."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from race import STEPS, assert_ahead_of_adamw

from mlhf_optax import SquaredError, load_pretrained

hk = pytest.importorskip("haiku")

pytestmark = pytest.mark.usefixtures("unoptimised")


@hk.transform_with_state
def network(x):
    x = hk.Linear(16)(x)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
    return hk.Linear(1)(jnp.tanh(x))


def predict_fn(params, batch):
    return network.apply(params, batch["state"], None, batch["x"])[0]


LOSS = SquaredError(targets="y")
X = jax.random.normal(jax.random.key(0), (64, 4))
DATA = {"x": X, "y": jnp.sin(2 * X[:, :1]) * X[:, 1:2]}


def train(tx):
    params, state = network.init(jax.random.key(1), DATA["x"])
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, state, opt_state, data):
        def loss(params):
            outputs, new = network.apply(params, state, None, data["x"])
            return LOSS(outputs, data), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, batch={**data, "state": state})
        return optax.apply_updates(params, updates), new, opt_state, value

    losses = []
    for _ in range(STEPS + 1):
        params, state, opt_state, value = train_step(params, state, opt_state, DATA)
        losses.append(float(value))
    return losses


def test_batch_statistics_ride_in_the_batch_and_curvature_is_taken_on_all_of_it():
    with pytest.warns(UserWarning, match="whole batch.*per_example"):
        assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, LOSS))


def test_naming_what_has_one_entry_per_example_silences_the_warning():
    params, state = network.init(jax.random.key(1), DATA["x"])
    tx = load_pretrained().optimizer(predict_fn, LOSS, per_example=("x", "y"))
    opt_state, batch = tx.init(params), {**DATA, "state": state}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, _ = jax.eval_shape(functools.partial(tx.update, batch=batch), params, opt_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
