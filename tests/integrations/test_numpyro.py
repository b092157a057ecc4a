"""NumPyro: the most probable parameters (MAP) of a small Bayesian classification, and of an ELBO."""

import functools

import jax
import jax.numpy as jnp
import pytest
from race import STEPS, assert_ahead_of_adamw, plain_training, trained

from mlhf_optax import SigmoidCrossEntropy, load_pretrained

numpyro = pytest.importorskip("numpyro")

import numpyro.distributions as dist  # noqa: E402
from numpyro import handlers  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

pytestmark = pytest.mark.usefixtures("unoptimised")

NUM = 64


def model(x, y=None):
    hidden = numpyro.sample("hidden", dist.Normal(0.0, 1.0).expand((3, 8)).to_event(2))
    out = numpyro.sample("out", dist.Normal(0.0, 1.0).expand((8,)).to_event(1))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=jnp.tanh(x @ hidden) @ out), obs=y)


def data():
    x = jax.random.normal(jax.random.key(0), (NUM, 3))
    return {"x": x, "y": (x[:, 0] * x[:, 1] > 0).astype(jnp.float32)}


def logits_at(latents, batch):
    traced = handlers.trace(handlers.substitute(handlers.seed(model, 0), latents)).get_trace(batch["x"])
    return traced["y"]["fn"].logits


cross_entropy = SigmoidCrossEntropy(targets="y")


def test_the_most_probable_parameters():
    """Minus the log-density over the number of examples: convex in the logits and in the parameters."""
    predict_fn = lambda params, batch: {"logits": logits_at(params, batch), "latents": params}

    def loss_fn(outputs, batch):
        squares = sum(jnp.sum(z**2) for z in jax.tree.leaves(outputs["latents"]))
        return cross_entropy(outputs["logits"], batch) + 0.5 * squares / NUM

    batch, keys = data(), jax.random.split(jax.random.key(1))
    start = {"hidden": jax.random.normal(keys[0], (3, 8)) / 2, "out": jax.random.normal(keys[1], (8,)) / 2}
    density, _ = log_density(model, (batch["x"], batch["y"]), {}, start)
    constant = 0.5 * 32 * jnp.log(2 * jnp.pi) / NUM  # of the normal prior
    assert float(loss_fn(predict_fn(start, batch), batch) + constant) == pytest.approx(
        float(-density) / NUM, rel=1e-5
    )

    train = plain_training(predict_fn, loss_fn, start, batch)
    with pytest.warns(UserWarning, match="whole batch"):
        assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))


def test_an_elbo_whose_draws_come_from_a_key_in_the_batch():
    """The divergence from the prior is convex in means and log-spreads, which are outputs as well."""
    size = 32

    def predict_fn(params, batch):
        noise = jax.random.normal(batch["key"], (size,))
        flat = params["mean"] + jnp.exp(params["log_sd"]) * noise
        latents = {"hidden": flat[:24].reshape(3, 8), "out": flat[24:]}
        return {"logits": logits_at(latents, batch), "guide": params}

    def loss_fn(outputs, batch):
        guide, prior = outputs["guide"], dist.Normal(jnp.zeros(size), jnp.ones(size))
        posterior = dist.Normal(guide["mean"], jnp.exp(guide["log_sd"]))
        return cross_entropy(outputs["logits"], batch) + jnp.sum(dist.kl_divergence(posterior, prior)) / NUM

    batch = data()
    keys = jax.random.split(jax.random.key(2), STEPS)
    # The same key before and after, so that the two losses are of one draw.
    batches = [{**batch, "key": key} for key in [*keys, keys[0]]]
    start = {"mean": jax.random.normal(jax.random.key(3), (size,)) / 2, "log_sd": jnp.full(size, -2.0)}
    train = lambda tx: trained(tx, predict_fn, loss_fn, start, batches)
    with pytest.warns(UserWarning, match="whole batch"):
        assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))


def test_log_probabilities_of_sites_as_outputs_are_an_error_that_names_the_loss():
    def predict_fn(params, batch):
        substituted = handlers.substitute(handlers.seed(model, 0), params)
        traced = handlers.trace(substituted).get_trace(batch["x"], batch["y"])
        return traced["y"]["fn"].log_prob(batch["y"])

    params, batch = {"hidden": jnp.ones((3, 8)), "out": jnp.ones(8)}, data()
    tx = load_pretrained().optimizer(predict_fn, lambda log_probs, batch: -jnp.mean(log_probs))
    with pytest.raises(ValueError, match=r"linear in the outputs.*NegativeLogLikelihood"):
        jax.eval_shape(functools.partial(tx.update, batch=batch), params, tx.init(params), params)
