"""Flowjax: a normalising flow, trained by its log-probabilities."""

import jax
import jax.numpy as jnp
import pytest
from race import STEPS, assert_ahead_of_adamw

from mlhf_optax import NegativeLogLikelihood, load_pretrained

pytest.importorskip("flowjax")
eqx = pytest.importorskip("equinox")
paramax = pytest.importorskip("paramax")

from flowjax.bijections import RationalQuadraticSpline  # noqa: E402
from flowjax.distributions import Normal  # noqa: E402
from flowjax.flows import coupling_flow  # noqa: E402

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_a_spline_flow_with_its_base_distribution_frozen():
    keys = jax.random.split(jax.random.key(0), 3)
    angle = jax.random.uniform(keys[0], (128,), maxval=jnp.pi)
    arc = jnp.stack([jnp.cos(angle), 2 * jnp.sin(angle) - 1], axis=-1)
    batch = {"x": arc + 0.1 * jax.random.normal(keys[1], (128, 2))}
    flow = coupling_flow(
        keys[2],
        base_dist=Normal(jnp.zeros(2)),
        transformer=RationalQuadraticSpline(knots=5, interval=4),
        flow_layers=2,
        nn_width=12,
        nn_depth=1,
    )
    is_leaf = lambda node: isinstance(node, paramax.NonTrainable)
    start, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_leaf)

    def predict_fn(params, batch):
        flow = paramax.unwrap(eqx.combine(params, static, is_leaf=is_leaf))
        return flow.log_prob(batch["x"])

    loss_fn = NegativeLogLikelihood()

    def train(tx):
        @eqx.filter_jit
        def train_step(params, opt_state, batch):
            loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
            updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
            return eqx.apply_updates(params, updates), opt_state, loss

        params, losses = start, []
        opt_state = tx.init(params)
        for _ in range(STEPS + 1):
            params, opt_state, loss = train_step(params, opt_state, batch)
            losses.append(float(loss))
        return losses

    assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))
