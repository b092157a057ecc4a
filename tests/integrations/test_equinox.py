"""Equinox: the model is a tree of arrays and other things; its arrays are the parameters."""

import jax
import jax.numpy as jnp
import pytest
from race import STEPS, assert_ahead_of_adamw

from mlhf_optax import SoftmaxCrossEntropy, load_pretrained

eqx = pytest.importorskip("equinox")

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_a_network_is_cut_into_arrays_and_the_rest():
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (64, 5))
    batch = {"x": x, "label": jnp.argmax(jnp.sin(3 * x[:, :3]), axis=-1)}
    model = eqx.nn.MLP(in_size=5, out_size=3, width_size=16, depth=2, key=keys[1])
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def predict_fn(params, batch):
        return jax.vmap(eqx.combine(params, static))(batch["x"])

    loss_fn = SoftmaxCrossEntropy()

    def train(tx):
        @eqx.filter_jit
        def train_step(model, opt_state, batch):
            loss, grads = eqx.filter_value_and_grad(
                lambda m: loss_fn(jax.vmap(m)(batch["x"]), batch),
            )(model)
            arrays = eqx.filter(model, eqx.is_inexact_array)
            updates, opt_state = tx.update(grads, opt_state, arrays, batch=batch)
            return eqx.apply_updates(model, updates), opt_state, loss

        trained, opt_state, losses = model, tx.init(params), []
        for _ in range(STEPS + 1):
            trained, opt_state, loss = train_step(trained, opt_state, batch)
            losses.append(float(loss))
        return losses

    assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))
