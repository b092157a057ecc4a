"""Keras 3 on the JAX backend: `stateless_call` makes a function of the variables' values."""

import os

import jax
import jax.numpy as jnp
import optax
import pytest
from race import STEPS, assert_ahead_of_adamw

from mlhf_optax import SoftmaxCrossEntropy, load_pretrained

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend here", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("unoptimised")


def functional_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(16, activation="gelu")(inputs)
    hidden = keras.layers.LayerNormalization()(hidden)
    hidden = keras.layers.Dropout(0.1)(hidden)
    return keras.Model(inputs, keras.layers.Dense(4)(hidden))


def test_a_functional_model_with_dropout():
    model = functional_model()
    x = jax.random.normal(jax.random.key(0), (64, 6))
    data = {"x": x, "label": jnp.argmax(jnp.abs(x[:, :4]), axis=-1)}

    def call(params, state, x):
        return model.stateless_call(params, state, x, training=True)

    def predict_fn(params, batch):
        return call(params, batch["state"], batch["x"])[0]

    loss_fn = SoftmaxCrossEntropy()

    def train(tx):
        params = [variable.value for variable in model.trainable_variables]
        state = [variable.value for variable in model.non_trainable_variables]
        opt_state = tx.init(params)

        @jax.jit
        def train_step(params, state, opt_state, data):
            def loss(params):
                outputs, new = call(params, state, data["x"])
                return loss_fn(outputs, data), new

            (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params, batch={**data, "state": state})
            return optax.apply_updates(params, updates), new, opt_state, value

        losses = []
        for _ in range(STEPS + 1):
            params, state, opt_state, value = train_step(params, state, opt_state, data)
            losses.append(float(value))
        return losses

    with pytest.warns(UserWarning, match="whole batch"):
        assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))


def test_variables_in_the_place_of_their_values_are_an_error_that_says_so():
    tx = load_pretrained().optimizer(lambda params, batch: batch["x"] @ params[0], SoftmaxCrossEntropy())
    with pytest.raises(
        TypeError, match=r"'0': it is a \w*Variable.*`params = \[variable.value for variable in"
    ):
        tx.init(functional_model().trainable_variables)
