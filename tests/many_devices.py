"""A network on a mesh of all devices, its trainings and meta-trainings, and what of programs is counted.

Used by the checks on eight devices and by the processes of `test_sharding.py`.
"""

import collections
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from mlhf_optax import SoftmaxCrossEntropy, gauss_newton, hessian_free, init_meta_params, mlhf
from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.meta_training import LongHorizonConfig, make_long_horizon_step, unrolled_optimizer

LOSS = SoftmaxCrossEntropy()
STEPS = 2  # of CG
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def predict(params, batch):
    hidden = jnp.tanh(batch["image"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def loss_of(params, batch):
    return LOSS(predict(params, batch), batch)


def start():
    rng = np.random.default_rng(0)
    layer = lambda m, n: {
        "kernel": jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(m), jnp.float32),
        "bias": jnp.zeros(n),
    }
    return {"Dense_0": layer(16, 24), "Dense_1": layer(24, 8)}


def examples(size=32):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(size, 16)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, 8, size))}


def coordinate(**kwargs):
    meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel", "dense_bias"])
    return mlhf(meta_params, predict, LOSS, num_cg_steps=STEPS, momentum=0.5, **kwargs)


def tensor(**kwargs):
    return mlhf(init_tensor_lstm(jax.random.key(0)), predict, LOSS, num_cg_steps=STEPS, **kwargs)


def diagonal(**kwargs):
    return gauss_newton(1.0, predict, LOSS, metric="diagonal", num_cg_steps=STEPS, **kwargs)


def plain(**kwargs):
    return hessian_free(1.0, predict, LOSS, num_cg_steps=STEPS, early_exit=False, **kwargs)


def make_step(tx, axis_name=None):
    def step(params, state, batch):
        if axis_name is None:
            grads = jax.grad(loss_of)(params, batch)
        else:
            # `shard_map` sums gradients over devices by itself unless the loss is a mean over them already.
            mean_loss = lambda p: jax.lax.pmean(loss_of(p, batch), axis_name)
            grads = jax.lax.pmean(jax.grad(mean_loss)(params), axis_name)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


MESH = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
PLACED = functools.partial(jax.NamedSharding, MESH)


def on_mesh(tx, shardings=PLACED(P()), init=jax.jit):
    """Parameters (by default whole on all devices), the state of the optimizer, and a batch that is cut."""
    params = jax.device_put(start(), shardings)
    return params, init(tx.init)(params), jax.device_put(examples(), PLACED(P("data")))


def two_steps(step, params, state, batch):
    """Parameters after two steps."""
    for _ in range(2):
        params, state = step(params, state, batch)
    return params


@functools.cache
def expected(make, **kwargs):
    """Parameters after two steps on one device."""
    tx, params = make(**kwargs), start()
    return two_steps(jax.jit(make_step(tx)), params, tx.init(params), examples())


def assert_close(params, other, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), params, other)


def collectives(compiled):
    """How many collectives of every kind a program has."""
    return collections.Counter(re.findall(rf" = \S.*? ({COLLECTIVES})(?:-start)?\(", compiled.as_text()))


def sizes_of_collectives(compiled):
    """How many numbers each collective hands on."""
    found = re.findall(rf" = (\S.*?) (?:{COLLECTIVES})(?:-start)?\(", compiled.as_text())
    shapes = [re.findall(r"\[([\d,]*)\]", kinds) for kinds in found]
    return [sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in one) for one in shapes]


def cut(params):
    """Shardings that cut every parameter along its first axis."""
    return jax.tree.map(lambda p: PLACED(P(*["data"] + [None] * (p.ndim - 1))), params)


def spec(leaf):
    """The axes of a sharding, without those at the end that are on every device."""
    axes = list(leaf.sharding.spec)
    while axes and axes[-1] is None:
        axes.pop()
    return tuple(axes)


def path_has(path, field):
    """Whether a path in a tree leads through a field of that name."""
    return jax.tree_util.GetAttrKey(field) in path


def check_follows(state, params):
    """Every leaf that is shaped like a parameter lies as it does, also behind an axis of units.

    Kronecker factors lie in trees like the parameters, and are on all devices.
    """
    owners = {path[-2:]: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    followers = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf.sharding, jax.NamedSharding), path
        owner = owners.get(path[-2:])
        if owner is None or path_has(path, "factors") or path_has(path, "sides"):
            assert spec(leaf) == (), path
        else:
            behind = (None,) * (leaf.ndim - owner.ndim) if spec(owner) else ()
            assert spec(leaf) == behind + spec(owner), path
            followers += 1
    return followers


class Compilations:
    """Counts what is compiled."""

    count = 0

    def __call__(self, event, duration, **kwargs):
        del duration, kwargs
        self.count += "backend_compile" in event


COMPILATIONS = Compilations()
jax.monitoring.register_event_duration_secs_listener(COMPILATIONS)


# Meta-training.

TASK = SimpleNamespace(init_fn=lambda key: jax.tree.map(jnp.copy, start()), predict_fn=predict, loss_fn=LOSS)
# Compiles fast, and has state.
LEARNED_MOMENTUM = unrolled_optimizer(
    lambda m, task: optax.chain(optax.trace(0.5), optax.scale(-jnp.exp(m["rate"])), optax.scale(m["sign"])),
    lambda trajectory: jnp.mean(trajectory.losses[1:]),
)
CENTRE = {"rate": jnp.array(-1.0), "sign": jnp.array(1.0)}
LONG = LongHorizonConfig(num_pairs=16, truncation=3, horizons=(4, 9), sigma=0.1)


def pairs_of_batches(config, number):
    rng = np.random.default_rng(number)
    shape = (config.num_pairs, config.truncation, 4)
    image = rng.normal(size=(*shape, 16)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 8, shape)}


def run_long(config, learned, meta_params, iterations=3, task=TASK, **kwargs):
    """The state and all metrics after some meta-iterations."""
    # A plain meta-optimizer: the first step of Adam is the sign of the gradient.
    init, step = make_long_horizon_step([task], learned, config, optax.sgd(0.05), **kwargs)
    state, seen = init(jax.random.key(0), meta_params), []
    for number in range(iterations):
        state, metrics = step(state, [pairs_of_batches(config, number)])
        seen.append(metrics)
    return state, seen
