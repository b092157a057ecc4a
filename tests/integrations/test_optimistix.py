"""Optimistix: an equilibrium model, whose layer is the root of an equation, differentiated implicitly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from race import assert_ahead_of_adamw, plain_training

from mlhf_optax import SquaredError, ggn_matvec, load_pretrained

optx = pytest.importorskip("optimistix")

pytestmark = pytest.mark.usefixtures("unoptimised")

LOSS = SquaredError(targets="y")


def equation(y, args):
    params, x = args
    # Of norm below one, so that there is one root, whatever the weights.
    inner = params["inner"] / (1 + jnp.linalg.norm(params["inner"]))
    return y - jnp.tanh(inner @ y + params["in"] @ x)


def equilibrium(params, x, adjoint=None):
    solver = optx.Newton(rtol=1e-5, atol=1e-5)
    adjoint = optx.ImplicitAdjoint() if adjoint is None else adjoint
    args = (params, x)
    return optx.root_find(equation, solver, jnp.zeros(6), args=args, max_steps=16, adjoint=adjoint).value


def unrolled(params, x):
    y = jnp.zeros(6)
    for _ in range(60):
        y = y - equation(y, (params, x))
    return y


def predict_fn(params, batch, layer=equilibrium):
    hidden = jax.vmap(layer, in_axes=(None, 0))(params, batch["x"])
    return hidden @ params["out"]


def initial():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "inner": 0.2 * jax.random.normal(keys[0], (6, 6)),
        "in": jax.random.normal(keys[1], (6, 3)),
        "out": jax.random.normal(keys[2], (6, 1)) / 3,
    }


def data():
    x = jax.random.normal(jax.random.key(1), (48, 3))
    return {"x": x, "y": jnp.sin(x[:, :1] + x[:, 1:2])}


def test_an_equilibrium_model_is_ahead_of_adamw():
    batch = data()

    train = plain_training(predict_fn, LOSS, initial(), batch)
    assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, LOSS))


def test_the_product_through_the_solve_is_that_of_the_unrolled_iteration():
    params, batch = initial(), data()
    vector = jax.tree.map(jnp.ones_like, params)
    implicit = ggn_matvec(predict_fn, LOSS, params, batch)(vector)
    explicit = ggn_matvec(lambda p, b: predict_fn(p, b, unrolled), LOSS, params, batch)(vector)
    for name in params:
        np.testing.assert_allclose(implicit[name], explicit[name], rtol=2e-3, atol=2e-4)


def test_the_checkpointed_adjoint_is_an_error_that_names_the_implicit_one():
    layer = lambda params, x: equilibrium(params, x, optx.RecursiveCheckpointAdjoint())
    with pytest.raises(ValueError, match=r"`jax.custom_vjp`.*of `optimistix`, `ImplicitAdjoint\(\)`"):
        ggn_matvec(lambda p, b: predict_fn(p, b, layer), LOSS, initial(), data())
