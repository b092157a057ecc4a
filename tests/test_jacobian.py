"""Jacobians by rows: right for every way to write a model, and refused where examples mix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from mlhf_optax import SoftmaxCrossEntropy
from mlhf_optax.curvature import ggn_matvec
from mlhf_optax.dense import cheaper_space
from mlhf_optax.jacobian import MixedError, is_elementwise, rows_per_example

pytestmark = pytest.mark.usefixtures("x64")

KEYS = jax.random.split(jax.random.key(0), 8)


@pytest.fixture
def params():
    shapes = {"first": (2, 3), "bias": (3,), "second": (3, 2), "scale": ()}
    return {
        name: jax.random.normal(key, shapes[name], "float64") for key, name in zip(KEYS, shapes, strict=False)
    }


@pytest.fixture
def x():
    return jax.random.normal(KEYS[5], (7, 2), "float64")


def network(p, x):
    return p["scale"] * jnp.tanh(x @ p["first"] + p["bias"]) @ p["second"]


def laplacian(p, x):
    return jnp.trace(jax.hessian(lambda y: network(p, y)[0])(x))


# How a model is written, and whether its rows are found one example at a time.
MODELS = {
    "batched": (network, True),
    "mapped": (lambda p, x: jax.vmap(lambda one: network(p, one))(x), True),
    "a Laplacian": (lambda p, x: jax.vmap(lambda one: laplacian(p, one))(x), True),
    "two sets of points in one vector": (
        lambda p, x: jnp.concatenate([MODELS["a Laplacian"][0](p, x) / 7**0.5, network(p, x[:4])[:, 1]]),
        True,
    ),
    "of a jitted function": (lambda p, x: jax.jit(network)(p, x)[..., None], True),
    "layer norm": (lambda p, x: (lambda z: z - z.mean(-1, keepdims=True))(network(p, x)), True),
    "a column": (lambda p, x: network(p, x)[:, 0], True),
    "examples last": (lambda p, x: network(p, x).T, False),
    "normalised over examples": (lambda p, x: network(p, x) - network(p, x).mean(0), False),
    "a scan over examples": (lambda p, x: lax.scan(lambda c, one: (c, network(p, one)), 0, x)[1], False),
    "one number": (lambda p, x: jnp.sum(network(p, x)), False),
    "a parameter per example": (lambda p, x: x * p["scale"] + jnp.pad(p["bias"], (0, 4))[:, None], None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_those_of_the_jacobian(name, params, x):
    model, _ = MODELS[name]
    flat, unravel = ravel_pytree(params)
    want = jax.jacobian(lambda v: model(unravel(v), x).ravel())(flat).reshape(-1, flat.size)
    rows = jax.jit(lambda p: ggn_matvec(model, lambda z, b: jnp.sum(z**2), p, x).rows)(params)
    np.testing.assert_allclose(rows.jacobian, want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(rows.curved, 2 * want, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(rows.weights, 2.0)


@pytest.mark.parametrize("name", [name for name, (_, found) in MODELS.items() if found is not None])
def test_examples_are_told_apart_where_they_do_not_mix(name, params, x):
    model, is_found = MODELS[name]
    output, push_forward = jax.linearize(lambda p: model(p, x), params)
    transposed = jax.linear_transpose(push_forward, params)
    find = lambda: jax.eval_shape(
        rows_per_example(lambda u: transposed(u)[0], jax.ShapeDtypeStruct(output.shape, output.dtype)),
        jax.ShapeDtypeStruct(output.shape[1:], output.dtype),
    )
    if is_found:
        assert jax.tree.leaves(find())[0].shape[0] == output.shape[0]
    else:
        with pytest.raises(MixedError):
            find()


def test_a_loss_that_couples_the_outputs_of_an_example_has_no_weights(params, x):
    batch = {"x": x, "label": jnp.zeros(7, jnp.int32)}
    model = lambda p, batch: network(p, batch["x"])
    ggn = ggn_matvec(model, SoftmaxCrossEntropy(), params, batch)
    assert ggn.rows.weights is None
    vector = jnp.arange(1.0, 1 + ravel_pytree(params)[0].size)
    product = ravel_pytree(ggn(ravel_pytree(params)[1](vector)))[0]
    np.testing.assert_allclose((ggn.rows.curved @ vector) @ ggn.rows.jacobian, product, rtol=1e-9, atol=1e-12)
    gradient = jax.grad(lambda p: SoftmaxCrossEntropy()(model(p, batch), batch))(params)
    np.testing.assert_allclose(
        ggn.slope @ ggn.rows.jacobian, ravel_pytree(gradient)[0], rtol=1e-9, atol=1e-12
    )


def test_two_outputs_that_change_places_are_not_elementwise():
    shapes = [jnp.ones(3), jnp.ones(3)]
    assert is_elementwise(lambda z: [2 * z[0], 3 * z[1]], shapes)
    assert not is_elementwise(lambda z: [z[1], z[0]], shapes)
    assert not is_elementwise(lambda z: [z[0][::-1], z[1]], shapes)


def test_the_bend_is_the_second_derivative_along_a_direction(params, x):
    ggn = ggn_matvec(network, lambda z, b: jnp.sum(z**2), params, x)
    direction = jax.tree.map(jnp.ones_like, params)
    moved = lambda t: network(jax.tree.map(lambda p, d: p + t * d, params, direction), x).ravel()
    want, bend = jax.jacfwd(jax.jacfwd(moved))(0.0), ggn.bend(direction)
    assert bend is not None
    np.testing.assert_allclose(bend, want, rtol=1e-9, atol=1e-12)


def test_a_matrix_that_would_take_too_long_is_not_chosen():
    assert cheaper_space(129, 1016) == "parameters"
    assert cheaper_space(10_065, 3_500) == "outputs"
    assert cheaper_space(10_065, 100_000) is None
    assert cheaper_space(129, None) == "parameters"
    assert cheaper_space(5_000, None) is None
