"""Checks on eight devices, which `test_sharding.py` runs in a process that has them."""

import collections
import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mlhf_optax import SoftmaxCrossEntropy, gauss_newton, hessian_free, init_meta_params, lodo, mlhf
from mlhf_optax.controllers import kronecker_factors
from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.curvature_batch import curvature_subset
from mlhf_optax.experiments.meta_train_long import meta_train_on_tiny_tasks
from mlhf_optax.learned import LEARNED
from mlhf_optax.meta_training import (
    LongHorizonConfig,
    MetaTrainingConfig,
    Schedule,
    make_long_horizon_step,
    make_meta_step,
    unrolled_optimizer,
)
from mlhf_optax.meta_training.long_horizon.step import _compile as compile_programs
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.support import placement
from mlhf_optax.support.spread import make_spread
from mlhf_optax.tasks import tiny

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
    """Every leaf that is shaped like a parameter lies as it does, also behind an axis of units.

    Kronecker factors lie in trees like the parameters, and are on all devices.
    """
    owners = {path[-2:]: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    followers = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf.sharding, jax.NamedSharding), path
        owner = owners.get(path[-2:])
        if owner is None or jax.tree_util.GetAttrKey("factors") in path:
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
@pytest.mark.parametrize(("make", "followers"), [(coordinate, 44), (diagonal, 8), (tensor, 16)])
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


@pytest.mark.parametrize(
    "name", ["rnnprop", "l2l", "hyperadam", "variational_hyperadam", "hierarchical", "lodo"]
)
def test_those_of_the_literature_take_the_same_steps_with_sharded_parameters(name):
    def make():
        found = lodo(0.5, 0.01) if name == "lodo" else load_pretrained(name).optimizer(predict, LOSS)
        return optax.with_extra_args_support(found)

    tx, params = make(), jax.device_put(start(), shardings(start()))
    batch, state = jax.device_put(examples(), PLACED(P("data"))), jax.jit(tx.init)(params)
    step = jax.jit(make_step(tx))
    for _ in range(2):
        params, state = step(params, state, batch)
    assert_close(params, expected(make))
    assert (
        max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (params, start())), strict=True)) > 1e-3
    )


@pytest.mark.parametrize(("make", "products"), [(plain, 2), (coordinate, 3), (diagonal, 3)])
def test_sharded_kernels_are_gathered_once_for_all_products(make, products):
    """Beside a kernel, each vector that a product is taken with is gathered once."""
    tx, params = make(), jax.device_put(start(), shardings(start()))
    batch = jax.device_put(examples(), PLACED(P("data")))
    step = jax.jit(make_step(tx)).lower(params, jax.jit(tx.init)(params), batch).compile()
    gradient = jax.jit(jax.grad(loss_of)).lower(params, batch).compile()
    gathered, once = shapes_of_gathers(step), shapes_of_gathers(gradient)
    assert once == {"16,24": 1, "24": 1, "24,8": 1, "8": 1}
    for shape in ("16,24", "24,8"):
        assert 1 < gathered[shape] <= once[shape] + products
    # Biases may be gathered with the gradient once more.
    assert set(gathered) == set(once)
    assert gathered.total() <= 4 * (1 + products) + 2
    assert set(collectives(step)) <= {"all-gather", "all-reduce", "reduce-scatter"}


def shapes_of_gathers(compiled):
    """How many arrays of every shape a program gathers."""
    found = re.findall(r" = (\S.*?) all-gather(?:-start)?\(", compiled.as_text())
    return collections.Counter(shape for kinds in found for shape in re.findall(r"\[([\d,]*)\]", kinds))


def decomposed(compiled):
    """How many matrices one device decomposes, by their size."""
    found = re.findall(r" = \(f32\[(\d+),(\d+),\d+\]\S*, .*syevd", compiled.as_text())
    return {int(size): int(count) for count, size in found}


@pytest.mark.parametrize("place", [lambda p: PLACED(P()), shardings], ids=["data parallel", "sharded"])
def test_kronecker_factors_are_decomposed_once_not_on_every_device(place):
    tx, params = tensor(), jax.device_put(start(), place(start()))
    batch = jax.device_put(examples(), PLACED(P("data")))
    state = jax.jit(tx.init)(params)
    step = jax.jit(make_step(tx)).lower(params, state, batch).compile()
    # Of the two factors of 24 rows, two devices have one each; of the others one device has the only one.
    assert decomposed(step) == {8: 1, 16: 1, 24: 1}
    for _ in range(2):
        params, state = step(params, state, batch)
    assert_close(params, expected(tensor))


def test_large_kronecker_factors_move_a_sharded_matrix_as_often_as_small_ones(monkeypatch):
    """Taken apart as on one device, each of the eight parts would be sent for by itself."""
    shape = (256, 1024)
    assert math.prod(shape) >= kronecker_factors._LARGE
    sides = jax.device_put(kronecker_factors.init_sides(shape, 128), PLACED(P()))
    matrix = jax.device_put(jax.random.normal(jax.random.key(0), shape), PLACED(P(None, "data")))

    def compiled():  # a new function each time, as jit would find what it has traced before
        return jax.jit(lambda s, v: kronecker_factors.times_sides(s, v)).lower(sides, matrix).compile()

    here = compiled()
    counts = collectives(here)
    np.testing.assert_allclose(here(sides, matrix), matrix, rtol=1e-5)  # the first factors are identities
    monkeypatch.setattr(kronecker_factors, "_LARGE", 2 * math.prod(shape))
    assert counts == collectives(compiled())
    monkeypatch.undo()
    monkeypatch.setattr(placement, "is_on_mesh", lambda array: False)
    assert counts.total() < collectives(compiled()).total()


def test_kronecker_factors_are_decomposed_once_in_shard_map():
    tx, params = tensor(axis_name="data"), start()
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P())}
    step = jax.jit(jax.shard_map(make_step(tx, "data"), mesh=MESH, **specs))
    assert decomposed(step.lower(params, tx.init(params), examples()).compile()) == {8: 1, 16: 1, 24: 1}
    one = jax.jit(make_step(tensor())).lower(params, tensor().init(params), examples()).compile()
    assert decomposed(one) == {8: 1, 16: 1, 24: 2}


@pytest.mark.parametrize("count", [1, 8, 11])
def test_pieces_of_work_are_shared_out_and_come_back_in_order(count):
    pieces = np.random.default_rng(0).normal(size=(count, 3, 3)).astype(np.float32)
    calls = []

    def work(part):
        calls.append(part.shape[0])
        return 2 * part, part.sum((1, 2))

    shared = jax.jit(functools.partial(placement.split_over_devices, work))
    twice, total = shared(jax.device_put(pieces, PLACED(P())))
    assert set(calls) == {-(-count // 8)}
    np.testing.assert_allclose(twice, 2 * pieces)
    np.testing.assert_allclose(total, pieces.sum((1, 2)), rtol=1e-5, atol=1e-5)
    assert twice.sharding.is_fully_replicated


@pytest.mark.parametrize("make", [plain, coordinate, tensor])
def test_a_mesh_with_explicit_axes_equals_one_device(make):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    put = lambda tree, axes: jax.device_put(tree, jax.NamedSharding(mesh, axes))
    tx, params, batch = make(), put(start(), P()), put(examples(), P("data"))
    with jax.set_mesh(mesh):
        state, step = jax.jit(tx.init)(params), jax.jit(make_step(tx))
        for _ in range(2):
            params, state = step(params, state, batch)
    assert_close(params, expected(make))


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


@pytest.mark.parametrize("make", [plain, tensor])
def test_pmap_with_axis_name_equals_one_device(make):
    tx, params = make(axis_name="devices"), start()
    copies = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)
    shards = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), examples())
    step = jax.pmap(make_step(tx, "devices"), axis_name="devices")
    params, state = copies(params), copies(tx.init(params))
    for _ in range(2):
        params, state = step(params, state, shards)
    assert_close(jax.tree.map(lambda x: x[5], params), expected(make))


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


@pytest.mark.parametrize(
    ("changes", "axes", "axis_name"),
    [
        ({"task_axis": "sequential"}, (8,), None),
        ({"num_pairs": 4, "average_decay": 0.9}, (4, 2), "pairs"),
        ({}, (4, 2), ("pairs", "other")),
    ],
    ids=["in sequence", "one axis of two", "both axes"],
)
def test_long_horizon_meta_training_on_a_mesh_equals_one_device(changes, axes, axis_name):
    config = dataclasses.replace(LONG, **changes)
    mesh = jax.make_mesh(axes, ("pairs", "other")[: len(axes)])
    spread, seen = run_long(config, LEARNED_MOMENTUM, CENTRE, mesh=mesh, axis_name=axis_name)
    one, seen_by_one = run_long(config, LEARNED_MOMENTUM, CENTRE)
    assert int(one.counts["fresh"]) > 0
    for name in ("fresh", "diverged", "dropped_gradients"):
        assert int(spread.counts[name]) == int(one.counts[name])
    np.testing.assert_array_equal(spread.pairs[0].horizon, one.pairs[0].horizon)
    np.testing.assert_array_equal(spread.key, one.key)
    assert_close(
        (spread.meta_params, spread.pairs[0].params, seen),
        (one.meta_params, one.pairs[0].params, seen_by_one),
    )
    own = config.num_pairs // (math.prod(axes) if axis_name != "pairs" else axes[0])
    for leaf in jax.tree.leaves(spread.pairs):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(own, *leaf.shape[1:])}


def test_long_horizon_meta_training_of_the_general_optimizer_equals_one_device():
    family = LEARNED["mlhf_general"]
    learned = family.learned(family.options())
    config, meta_params = dataclasses.replace(LONG, num_pairs=8), init_tensor_lstm(jax.random.key(0))
    task = SimpleNamespace(
        init_fn=lambda key: {"kernel": jax.random.normal(key, (16, 8))},
        predict_fn=lambda params, batch: batch["image"] @ params["kernel"],
        loss_fn=LOSS,
    )
    spread, seen = run_long(config, learned, meta_params, 2, task=task, mesh=MESH)
    one, seen_by_one = run_long(config, learned, meta_params, 2, task=task)
    assert_close((spread.centre, seen), (one.centre, seen_by_one), 1e-3)


def test_a_meta_step_on_a_mesh_equals_one_device():
    config = MetaTrainingConfig(num_tasks=8, unroll_length=2, replay_capacity=8, keep_probability=0.5)
    unrolls = dataclasses.replace(LONG, num_pairs=8)  # batches of as many steps as an unroll has
    states, seen = [], []
    for mesh in (MESH, None):
        init, step = make_meta_step(TASK, LEARNED_MOMENTUM, config, optax.sgd(0.05), mesh=mesh)
        state = init(jax.random.key(0), CENTRE)
        for number in range(3):
            state, metrics = step(state, pairs_of_batches(unrolls, number))
        states.append(state)
        seen.append(metrics)
    spread, one = states
    assert int(one.counts["replayed"]) > 0
    np.testing.assert_array_equal(spread.trainings.age, one.trainings.age)
    assert_close((spread._replace(key=()), seen[0]), (one._replace(key=()), seen[1]))
    for leaf in jax.tree.leaves(spread.trainings):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(1, *leaf.shape[1:])}
    with pytest.raises(ValueError, match=r"`num_tasks`=4 must be a multiple of the 8 devices"):
        make_meta_step(TASK, LEARNED_MOMENTUM, MetaTrainingConfig(num_tasks=4), mesh=MESH)


def sizes_of_collectives(compiled):
    """How many numbers each collective hands on."""
    found = re.findall(rf" = (\S.*?) (?:{COLLECTIVES})(?:-start)?\(", compiled.as_text())
    shapes = [re.findall(r"\[([\d,]*)\]", kinds) for kinds in found]
    return [sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in one) for one in shapes]


def test_no_training_leaves_its_device():
    spread = make_spread(MESH, None, LONG.num_pairs, "num_pairs")
    programs = compile_programs(TASK, LEARNED_MOMENTUM, LONG, spread)
    keys, over = jax.random.split(jax.random.key(0), LONG.num_pairs), np.arange(LONG.num_pairs) < 3
    pairs = programs.start(keys, CENTRE)
    batches = spread.put(pairs_of_batches(LONG, 0), spread.cut)
    advance = programs.advance.lower(CENTRE, pairs, batches).compile()
    assert set(collectives(advance)) == {"all-reduce"}
    # One array: the gradient of two meta-parameters, the meta-loss, the age, and two counts.
    assert sizes_of_collectives(advance) == [6]
    assert not collectives(programs.replace.lower(pairs, pairs, over).compile())
    assert not collectives(programs.start.lower(keys, CENTRE).compile())


def test_long_horizon_meta_training_goes_on_on_other_devices_and_compiles_nothing_after_its_first_steps():
    whole, _ = run_long(LONG, LEARNED_MOMENTUM, CENTRE, 2, mesh=MESH)
    half = jax.device_get(run_long(LONG, LEARNED_MOMENTUM, CENTRE, 1)[0])
    init, step = make_long_horizon_step([TASK], LEARNED_MOMENTUM, LONG, optax.sgd(0.05), mesh=MESH)
    del init
    state, _ = step(half, [pairs_of_batches(LONG, 1)])
    assert_close(state.meta_params, whole.meta_params)
    for number in range(2, 6):  # until fresh pairs have begun, too
        state, _ = step(state, [pairs_of_batches(LONG, number)])
    before = COMPILATIONS.count
    for number in range(6, 10):
        state, _ = step(state, [pairs_of_batches(LONG, number)])
    assert COMPILATIONS.count == before


def test_meta_training_on_tiny_tasks_goes_on_on_more_devices(tmp_path):
    family, tasks = LEARNED["adam_rates"], [tiny._regression("regression")]
    config = LongHorizonConfig(num_pairs=4, truncation=2, horizons=(2, 4))

    def run(folder, count, **schedule):
        schedule = Schedule(2, validate_every=2, **schedule)
        mesh = jax.make_mesh((count,), ("pairs",), devices=jax.devices()[:count]) if count > 1 else None
        arguments = (tasks, tasks, family, family.options(), tmp_path / folder, schedule, config)
        path = meta_train_on_tiny_tasks(*arguments, validation_steps=(1, 2), resume=True, mesh=mesh)
        return load_pretrained(path).meta_params

    run("parts", 1, stop_after=1)
    assert_close(run("parts", 4), run("whole", 1), 1e-6)


def test_pairs_that_cannot_be_spread_evenly_and_axes_that_are_not_there_are_errors():
    make = functools.partial(make_long_horizon_step, [TASK], LEARNED_MOMENTUM)
    with pytest.raises(ValueError, match=r"`num_pairs`=12 must be a multiple of the 8 devices.*; 16 fits"):
        make(dataclasses.replace(LONG, num_pairs=12), mesh=MESH)
    with pytest.raises(
        ValueError, match=r"`axis_name` must be among the axes of `mesh`, \('data',\), got 'x'"
    ):
        make(LONG, mesh=MESH, axis_name="x")
    with pytest.raises(ValueError, match=r"`axis_name`='x' is an axis of a mesh; pass `mesh`, too"):
        make(LONG, axis_name="x")
    with pytest.raises(TypeError, match=r"`mesh` must be a `jax.sharding.Mesh` of devices, got int"):
        make(LONG, mesh=8)
