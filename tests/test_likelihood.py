"""Densities trained by their log-probability: the empirical Fisher matrix, and trainings beside Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import training_steps

from mlhf_optax import NegativeLogLikelihood, gauss_newton, ggn_matvec, load_pretrained

pytestmark = pytest.mark.usefixtures("unoptimised")


def mixture(params, batch):
    """Log-densities of a mixture of normal distributions with diagonal covariances, in two dimensions."""
    scaled = (batch["x"][:, None] - params["mean"]) * jnp.exp(-params["log_sd"])
    normal = -0.5 * jnp.sum(scaled**2, -1) - jnp.sum(params["log_sd"], -1) - jnp.log(2 * jnp.pi)
    return jax.nn.logsumexp(normal + jax.nn.log_softmax(params["logits"]), -1)


def mixture_params(components=3, dtype=None):
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal(size=(components, 2)), dtype)
    return {"mean": mean, "log_sd": jnp.zeros_like(mean), "logits": jnp.zeros(components, mean.dtype)}


def coupling_flow(params, batch):
    """Log-densities of affine couplings, each of which scales and moves one coordinate by the other."""
    x, log_det = batch["x"], 0.0
    for layer in params:
        hidden = jnp.tanh(x[:, :1] @ layer["in"] + layer["bias"])
        shift, log_scale = jnp.split(hidden @ layer["out"], 2, -1)
        log_scale = jnp.tanh(log_scale)
        x = jnp.concatenate([x[:, 1:] * jnp.exp(log_scale) + shift, x[:, :1]], -1)
        log_det += log_scale[:, 0]
    return -0.5 * jnp.sum(x**2, -1) - jnp.log(2 * jnp.pi) + log_det


def flow_params(num_layers=4, width=16):
    rng = np.random.default_rng(1)
    layer = lambda: {
        "in": jnp.asarray(rng.normal(size=(1, width)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=width), jnp.float32),
        "out": jnp.asarray(0.1 * rng.normal(size=(width, 2)), jnp.float32),
    }
    return [layer() for _ in range(num_layers)]


def moons(count, seed=0):
    """Two half circles, each beside the other's middle."""
    rng = np.random.default_rng(seed)
    angle, is_lower = np.pi * rng.random(count), rng.random(count) < 0.5
    points = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = np.where(is_lower[:, None], [1.0, 0.5] - points, points) + 0.1 * rng.normal(size=(count, 2))
    return {"x": jnp.asarray((points - [0.5, 0.25]) / 0.7, jnp.float32)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", [None, "mask"])
def test_the_matrix_is_the_empirical_fisher_matrix(mask):
    params, rng = mixture_params(dtype=float), np.random.default_rng(2)
    batch = {"x": jnp.asarray(rng.normal(size=(7, 2))), "mask": jnp.asarray(rng.random(7))}
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    matvec = ggn_matvec(mixture, NegativeLogLikelihood(mask=mask), params, batch)
    found = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(matvec(unravel(v)))[0])(jnp.eye(vector.size))
    gradients = np.asarray(jax.jacobian(lambda v: mixture(unravel(v), batch))(vector))
    weights = np.asarray(batch["mask"] / batch["mask"].sum()) if mask else np.full(7, 1 / 7)
    wanted = sum(w * np.outer(g, g) for w, g in zip(weights, gradients, strict=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", [None, "mask"])
def test_a_tree_of_log_probabilities_counts_as_one_array_of_them(mask):
    rng = np.random.default_rng(3)
    split = lambda array: {"a": array[:3], "b": (array[3:].reshape(2, 2),)}
    outputs, weights, vector = (jnp.asarray(rng.random(7)) for _ in range(3))
    loss = NegativeLogLikelihood(mask=mask)
    whole, parts = (outputs, {"mask": weights}), (split(outputs), {"mask": split(weights)})
    np.testing.assert_allclose(loss(*parts), loss(*whole), rtol=1e-12)
    product, wanted = loss.curvature(*parts)(split(vector)), split(loss.curvature(*whole)(vector))
    jax.tree.map(lambda p, w: np.testing.assert_allclose(p, w, rtol=1e-12), product, wanted)
    with pytest.raises(ValueError, match="the mask must be a tree of arrays like the outputs"):
        NegativeLogLikelihood(mask="mask")(split(outputs), {"mask": [weights]})


MODELS = {"mixture": (mixture, mixture_params(8)), "flow": (coupling_flow, flow_params())}


@pytest.mark.parametrize("model", MODELS)
def test_densities_fall_below_adam(model):
    """Sixty steps on mini-batches, nothing tuned; Adam has its customary rate."""
    log_prob, params = MODELS[model]
    loss_fn, data = NegativeLogLikelihood(), moons(1000)

    def trained(tx):
        batches = [{"x": data["x"][start : start + 200]} for start in range(0, 1000, 200)] * 12
        loss = lambda p, batch: loss_fn(log_prob(p, batch), batch)
        *_, (last, _, _) = training_steps(tx, params, batches, loss)
        return float(loss(last, data))

    adam = trained(optax.with_extra_args_support(optax.adam(1e-3)))
    assert trained(gauss_newton(1.0, log_prob, loss_fn)) < adam - 0.05
    assert trained(load_pretrained().optimizer(log_prob, loss_fn)) < adam - 0.05
