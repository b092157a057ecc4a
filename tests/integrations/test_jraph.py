"""Jraph: one graph is the batch; it is no list of examples, so curvature is taken on all of it."""

import jax
import jax.numpy as jnp
import pytest
from race import assert_ahead_of_adamw, plain_training

from mlhf_optax import SoftmaxCrossEntropy, load_pretrained

jraph = pytest.importorskip("jraph")

pytestmark = pytest.mark.usefixtures("unoptimised")


def two_communities():
    keys = jax.random.split(jax.random.key(0), 4)
    group = jnp.arange(32) % 2
    senders, receivers = jax.random.randint(keys[0], (2, 128), 0, 32)
    # Most edges stay in a community: the other end is moved by one where it does not.
    crosses = (group[senders] != group[receivers]) & (jax.random.uniform(keys[1], (128,)) < 0.8)
    receivers = (receivers + crosses) % 32
    graph = jraph.GraphsTuple(
        nodes=jax.random.normal(keys[2], (32, 4)) + 0.5 * group[:, None],
        edges=None,
        senders=senders,
        receivers=receivers,
        globals=None,
        n_node=jnp.array([32]),
        n_edge=jnp.array([128]),
    )
    return {"graph": graph, "label": group}


def predict_fn(params, batch):
    graph = batch["graph"]
    for weights in params:
        layer = jraph.GraphConvolution(lambda nodes, w=weights: nodes @ w, add_self_edges=True)
        graph = layer(graph._replace(nodes=jnp.tanh(graph.nodes)))
    return graph.nodes


def test_a_graph_network_on_one_graph():
    batch, loss_fn = two_communities(), SoftmaxCrossEntropy()
    keys = jax.random.split(jax.random.key(1))
    start = [jax.random.normal(keys[0], (4, 8)) / 2, jax.random.normal(keys[1], (8, 2)) / 3]

    train = plain_training(predict_fn, loss_fn, start, batch)
    with pytest.warns(UserWarning, match="whole batch.*`curvature_batch_size=None`"):
        assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, loss_fn))
