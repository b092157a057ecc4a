"""Checks on eight devices, which `test_sharding.py` runs in a process that has them."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mlhf_optax import SoftmaxCrossEntropy, gauss_newton, hessian_free, init_meta_params, mlhf
from mlhf_optax.controllers.tensor_lstm import init_tensor_lstm
from mlhf_optax.curvature import curvature_subset

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
    return mlhf(1.0, meta_params, predict, LOSS, num_cg_steps=STEPS, momentum=0.5, **kwargs)


def tensor(**kwargs):
    return mlhf(1.0, init_tensor_lstm(jax.random.key(0)), predict, LOSS, num_cg_steps=STEPS, **kwargs)


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


@functools.cache
def expected(make, **kwargs):
    """Parameters after two steps on one device."""
    tx, params = make(**kwargs), start()
    state, step = tx.init(params), jax.jit(make_step(tx))
    for _ in range(2):
        params, state = step(params, state, examples())
    return params


def assert_close(params, other, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), params, other)


def collectives(compiled):
    """How many collectives of every kind a program has."""
    return collections.Counter(re.findall(rf" = \S.*? ({COLLECTIVES})(?:-start)?\(", compiled.as_text()))


@pytest.mark.parametrize("kwargs", [{}, {"curvature_batch_size": 0.25}], ids=["whole", "quarter"])
@pytest.mark.parametrize("make", [coordinate, plain])
def test_a_sharded_batch_equals_one_device_with_one_all_reduce_per_product(make, kwargs):
    tx, params = make(**kwargs), jax.device_put(start(), PLACED(P()))
    batch = jax.device_put(examples(), PLACED(P("data")))
    state = jax.jit(tx.init)(params)
    step = jax.jit(make_step(tx)).lower(params, state, batch).compile()
    products = STEPS + (make is coordinate)  # the first is that of the start
    counts = collectives(step)
    assert set(counts) == {"all-reduce"}
    assert counts["all-reduce"] <= products + 1 + ("curvature_batch_size" in kwargs)  # gradient, and its loss
    for _ in range(2):
        params, state = step(params, state, batch)
    assert_close(params, expected(make, **kwargs))


def test_a_fraction_takes_its_share_of_every_device_and_an_uneven_one_says_what_fits():
    batch = jax.device_put(examples(), PLACED(P("data")))
    subset = functools.partial(curvature_subset, predict, start(), per_example=("image", "label"))
    small = subset(batch, 0.25)
    own = np.asarray(batch["label"]).reshape(8, 4)[:, 0]
    np.testing.assert_array_equal(small["label"], own)
    assert {shard.data.shape for shard in small["label"].addressable_shards} == {(1,)}
    with pytest.raises(
        ValueError, match=r"`curvature_batch_size`=0.3 of 32 examples on 8 shards is 10 examples, which is"
    ) as error:
        subset(batch, 0.3)
    assert str(error.value).endswith("; 0.25 fits, 1 of the 4 on every shard")


def shardings(params):
    return jax.tree.map(lambda p: PLACED(P(*["data"] + [None] * (p.ndim - 1))), params)


def spec(leaf):
    """The axes of a sharding, without those at the end that are on every device."""
    axes = list(leaf.sharding.spec)
    while axes and axes[-1] is None:
        axes.pop()
    return tuple(axes)


def check_follows(state, params):
    """Every leaf that is shaped like a parameter lies as it does, also behind an axis of units."""
    owners = {path[-2:]: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    followers = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf.sharding, jax.NamedSharding), path
        owner = owners.get(path[-2:])
        if owner is None:
            assert spec(leaf) == (), path
        else:
            assert spec(leaf) == (None,) * (leaf.ndim - owner.ndim) + spec(owner), path
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


@pytest.mark.parametrize("init", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(("make", "followers"), [(coordinate, 44), (diagonal, 12), (tensor, 16)])
def test_state_follows_sharded_parameters_and_no_step_is_compiled_twice(make, followers, init):
    tx, params = make(), jax.device_put(start(), shardings(start()))
    batch = jax.device_put(examples(), PLACED(P("data")))
    state = init(tx.init)(params)
    assert check_follows(state, params) == followers
    step = jax.jit(make_step(tx))
    params, state = step(params, state, batch)
    before = COMPILATIONS.count
    params, state = step(params, state, batch)
    assert COMPILATIONS.count == before
    assert check_follows(state, params) == followers
    assert_close(params, expected(make))
    if make is not tensor:
        counts = collectives(step.lower(params, state, batch).compile())
        # For the model once, for the start of CG once, and once per step of CG, of two layers; biases may
        # be gathered with the gradient once more.
        assert counts["all-gather"] <= 4 * (2 + STEPS) + 2
        assert set(counts) <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_map_params_gives_shardings_that_jit_init_gives():
    tx, params = coordinate(), jax.device_put(start(), shardings(start()))
    shapes = jax.eval_shape(tx.init, params)
    behind = lambda leaf, param, s: PLACED(P(*[None] * (leaf.ndim - param.ndim), *s.spec))
    wanted = optax.tree.map_params(
        tx, behind, shapes, params, shardings(params), transform_non_params=lambda _: PLACED(P())
    )
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    assert check_follows(state, params) == 44


@pytest.mark.parametrize(("make", "check_vma"), [(coordinate, True), (coordinate, False), (tensor, True)])
def test_shard_map_with_axis_name_equals_one_device(make, check_vma):
    tx, params = make(axis_name="data"), start()
    state = tx.init(params)
    step = jax.shard_map(
        make_step(tx, "data"),
        mesh=MESH,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    step = jax.jit(step)
    for _ in range(2):
        params, state = step(params, state, examples())
    assert_close(params, expected(make))


def test_pmap_with_axis_name_equals_one_device():
    tx, params = plain(axis_name="devices"), start()
    copies = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)
    shards = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), examples())
    step = jax.pmap(make_step(tx, "devices"), axis_name="devices")
    params, state = copies(params), copies(tx.init(params))
    for _ in range(2):
        params, state = step(params, state, shards)
    assert_close(jax.tree.map(lambda x: x[5], params), expected(plain))


def test_an_axis_that_is_not_bound_and_gradients_that_are_not_averaged_are_errors():
    tx, params = plain(axis_name="data"), start()
    with pytest.raises(ValueError, match="`axis_name`='data' is no axis that this code is mapped over"):
        jax.eval_shape(make_step(tx), params, tx.init(params), examples())

    def step(params, state, batch):
        grads = jax.tree.map(lambda w: w * jnp.mean(batch["image"]), params)
        return tx.update(grads, state, params, batch=batch)

    mapped = jax.shard_map(step, mesh=MESH, in_specs=(P(), P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"the gradients differ along `axis_name`='data'; average them"):
        jax.eval_shape(mapped, params, tx.init(params), examples())


def test_parameters_on_meshes_of_other_devices_are_an_error():
    halves = [jax.sharding.Mesh(np.array(jax.devices()[i : i + 4]), ("data",)) for i in (0, 4)]
    params = {
        name: jax.device_put(jnp.ones(4), jax.NamedSharding(m, P()))
        for name, m in zip("ab", halves, strict=True)
    }
    with pytest.raises(ValueError, match="`params` lie on meshes of different devices"):
        plain().init(params)
