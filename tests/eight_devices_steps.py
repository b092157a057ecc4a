"""Checks of steps on eight devices, which `test_sharding.py` runs in a process that has them."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from many_devices import (
    COMPILATIONS,
    LOSS,
    MESH,
    PLACED,
    STEPS,
    assert_close,
    check_follows,
    collectives,
    coordinate,
    cut,
    diagonal,
    examples,
    expected,
    loss_of,
    make_step,
    on_mesh,
    plain,
    predict,
    start,
    tensor,
    two_steps,
)

from mlhf_optax import lodo
from mlhf_optax.controllers.kronecker_factors import KroneckerRule
from mlhf_optax.curvature_batch import curvature_subset
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.support import placement
from mlhf_optax.support.packing import Packing, Unpacked, packing_of


@pytest.mark.parametrize("kwargs", [{}, {"curvature_batch_size": 0.25}], ids=["whole", "quarter"])
@pytest.mark.parametrize("make", [coordinate, plain])
def test_a_sharded_batch_equals_one_device_with_one_all_reduce_per_product(make, kwargs):
    tx = make(**kwargs)
    placed = on_mesh(tx)
    step = jax.jit(make_step(tx)).lower(*placed).compile()
    products = STEPS + (make is coordinate)  # the first is that of the start
    counts = collectives(step)
    assert set(counts) == {"all-reduce"}
    assert counts["all-reduce"] <= products + 1 + ("curvature_batch_size" in kwargs)  # gradient, and its loss
    assert_close(two_steps(step, *placed), expected(make, **kwargs))


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


@pytest.mark.parametrize("init", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(("make", "followers"), [(coordinate, 44), (diagonal, 8), (tensor, 12)])
def test_state_follows_sharded_parameters_and_no_step_is_compiled_twice(make, followers, init):
    tx = make()
    params, state, batch = on_mesh(tx, cut(start()), init)
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

    tx = make()
    params = two_steps(jax.jit(make_step(tx)), *on_mesh(tx, cut(start())))
    assert_close(params, expected(make))
    moves = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start())
    assert max(jax.tree.leaves(moves)) > 1e-3


@pytest.mark.parametrize(("make", "products"), [(plain, 2), (coordinate, 3), (diagonal, 3)])
def test_sharded_kernels_are_gathered_once_for_all_products(make, products):
    """Beside a kernel, each vector that a product is taken with is gathered once."""
    tx = make()
    params, state, batch = on_mesh(tx, cut(start()))
    step = jax.jit(make_step(tx)).lower(params, state, batch).compile()
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


@pytest.mark.parametrize("shardings", [PLACED(P()), cut(start())], ids=["data parallel", "sharded"])
def test_kronecker_factors_are_decomposed_once_not_on_every_device(shardings):
    tx = tensor()
    placed = on_mesh(tx, shardings)
    step = jax.jit(make_step(tx)).lower(*placed).compile()
    # Of the two factors of 24 rows, two devices have one each; of the others one device has the only one.
    assert decomposed(step) == {8: 1, 16: 1, 24: 1}
    assert_close(two_steps(step, *placed), expected(tensor))


def test_parameters_on_a_mesh_stay_as_they_are_and_are_not_packed(monkeypatch):
    """In one array, each of them would be gathered, and each part of a product sent for by itself."""
    params = {"w": jax.random.normal(jax.random.key(0), (256, 1024)), "b": jnp.ones(8)}
    placed = jax.device_put(params, {"w": PLACED(P(None, "data")), "b": PLACED(P())})
    assert isinstance(packing_of(placed, 128), Unpacked)
    assert isinstance(packing_of(params, 128), Packing)
    factors = jax.device_put(KroneckerRule().init(params).power, PLACED(P()))

    def compiled():  # a new function each time, as jit would find what it has traced before
        def product(factors, tree):
            packing = packing_of(tree, 128)
            return packing.unpack(packing.sandwich(factors, packing.pack(tree)))

        return jax.jit(product).lower(factors, placed).compile()

    here = compiled()
    assert_close(here(factors, placed), params)  # the first factors are identities
    monkeypatch.setattr(placement, "is_on_mesh", lambda array: False)
    assert "all-gather" not in collectives(here)
    assert "all-gather" in collectives(compiled())


def mapped(step, **options):
    """The step as each device takes it on its own part of the batch."""
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    return jax.shard_map(step, mesh=MESH, **specs, **options)


def test_kronecker_factors_are_decomposed_once_in_shard_map():
    tx, params = tensor(axis_name="data"), start()
    step = jax.jit(mapped(make_step(tx, "data")))
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
        params = two_steps(jax.jit(make_step(tx)), params, jax.jit(tx.init)(params), batch)
    assert_close(params, expected(make))


def test_map_params_gives_shardings_that_jit_init_gives():
    tx, params = coordinate(), jax.device_put(start(), cut(start()))
    shapes = jax.eval_shape(tx.init, params)
    behind = lambda leaf, param, s: PLACED(P(*[None] * (leaf.ndim - param.ndim), *s.spec))
    wanted = optax.tree.map_params(
        tx, behind, shapes, params, cut(params), transform_non_params=lambda _: PLACED(P())
    )
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    assert check_follows(state, params) == 44


@pytest.mark.parametrize(("make", "check_vma"), [(coordinate, True), (coordinate, False), (tensor, True)])
def test_shard_map_with_axis_name_equals_one_device(make, check_vma):
    tx, params = make(axis_name="data"), start()
    step = jax.jit(mapped(make_step(tx, "data"), check_vma=check_vma))
    assert_close(two_steps(step, params, tx.init(params), examples()), expected(make))


@pytest.mark.parametrize("make", [plain, tensor])
def test_pmap_with_axis_name_equals_one_device(make):
    tx, params = make(axis_name="devices"), start()
    copies = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)
    shards = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), examples())
    step = jax.pmap(make_step(tx, "devices"), axis_name="devices")
    params = two_steps(step, copies(params), copies(tx.init(params)), shards)
    assert_close(jax.tree.map(lambda x: x[5], params), expected(make))


def test_an_axis_that_is_not_bound_and_gradients_that_are_not_averaged_are_errors():
    tx, params = plain(axis_name="data"), start()
    with pytest.raises(ValueError, match="`axis_name`='data' is no axis that this code is mapped over"):
        jax.eval_shape(make_step(tx), params, tx.init(params), examples())

    def step(params, state, batch):
        grads = jax.tree.map(lambda w: w * jnp.mean(batch["image"]), params)
        return tx.update(grads, state, params, batch=batch)

    with pytest.raises(ValueError, match=r"the gradients differ along `axis_name`='data'; average them"):
        jax.eval_shape(mapped(step), params, tx.init(params), examples())


def test_parameters_on_meshes_of_other_devices_are_an_error():
    halves = [jax.sharding.Mesh(np.array(jax.devices()[i : i + 4]), ("data",)) for i in (0, 4)]
    params = [jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, P())) for mesh in halves]
    with pytest.raises(ValueError, match="`params` lie on meshes of different devices"):
        plain().init(params)
