"""Checks of both kinds of mesh on eight devices, which `test_sharding.py` runs in a process that has them.

On a mesh with explicit axes, the default of `jax.make_mesh`, the type of an array says where it lies, and JAX
refuses what leaves that open.
"""

import contextlib
import functools
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import find_examples
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from many_devices import (
    COMPILATIONS,
    LOSS,
    STEPS,
    assert_close,
    check_follows,
    collectives,
    examples,
    predict,
    spec,
    start,
)

from mlhf_optax import gauss_newton, hessian_free
from mlhf_optax.curvature_batch import curvature_subset
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.support import placement
from mlhf_optax.support.packing import packing_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "many-devices.md"
WHOLE, ROWS, COLUMNS = P(), P("data"), P(None, "model")
gauss = lambda metric: functools.partial(gauss_newton, 1.0, metric=metric, num_cg_steps=STEPS)
OPTIMIZERS = {
    "general": load_pretrained().optimizer,
    "digits": load_pretrained("digits").optimizer,
    "identity": gauss("identity"),
    "diagonal": gauss("diagonal"),
    "kronecker": gauss("kronecker"),
    "hessian_free": functools.partial(hessian_free, 1.0, num_cg_steps=STEPS),
}


class Layout(NamedTuple):
    """A mesh, and where things lie on it.

    Attributes:
      kind: of the axes.
      shape: of the mesh, with axes "data" and perhaps "model".
      axes: of the mesh, along which kernels are cut.
      is_context: whether the code runs under `jax.set_mesh`.
    """

    kind: AxisType = AxisType.Explicit
    shape: tuple[int, ...] = (8,)
    axes: P = WHOLE
    is_context: bool = False

    @property
    def mesh(self):
        return jax.make_mesh(self.shape, ("data", "model")[: len(self.shape)], (self.kind,) * len(self.shape))

    def put(self, tree, axes):
        return jax.device_put(tree, jax.NamedSharding(self.mesh, axes))

    def start(self, is_weak=False):
        """Parameters that are cut, vectors along their only axis."""
        vector = P(*filter(None, self.axes))
        zeros = lambda p: jnp.full(p.shape, 0.0) if is_weak and p.ndim == 1 else p
        place = lambda p: self.put(zeros(p), self.axes if p.ndim > 1 else vector)
        return jax.tree.map(place, start())

    def examples(self, size=32):
        return self.put(examples(size), ROWS)

    def context(self):
        return jax.set_mesh(self.mesh) if self.is_context else contextlib.nullcontext()

    def predict(self, params, batch):
        # With explicit axes a model says itself where cut parameters are gathered.
        if self.kind == AxisType.Explicit and self.axes != WHOLE:
            params = jax.reshard(params, jax.NamedSharding(self.mesh, WHOLE))
        return predict(params, batch)


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
LAYOUTS = {
    "explicit, whole": Layout(),
    "explicit, rows": Layout(axes=ROWS),
    "explicit, rows, in its context": Layout(axes=ROWS, is_context=True),
    "explicit, columns, in its context": Layout(shape=(4, 2), axes=COLUMNS, is_context=True),
    "auto, columns": Layout(AUTO, (4, 2), COLUMNS),
    "auto, rows, in its context": Layout(AUTO, axes=ROWS, is_context=True),
}
named = lambda layouts: pytest.mark.parametrize("layout", layouts.values(), ids=layouts.keys())
some = lambda *names: named({name: LAYOUTS[name] for name in names})


def make_step(tx, predict_fn, kept=None):
    """A step; with a batch that is kept it closes over that."""

    def step(params, state, batch=None):
        batch = kept if batch is None else batch
        grads = jax.grad(lambda p: LOSS(predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def on_one_device(name, size=32, **kwargs):
    """Parameters after two steps."""
    tx, params = OPTIMIZERS[name](predict, LOSS, **kwargs), start()
    state, step = tx.init(params), jax.jit(make_step(tx, predict))
    for _ in range(2):
        params, state = step(params, state, examples(size))
    return params


def lies(tree):
    return [spec(leaf) for leaf in jax.tree.leaves(tree)]


def take_two_steps(layout, name, is_closed=False, size=32, **kwargs):
    """Returns parameters and state after two steps, and what the second step compiled."""
    with layout.context():
        tx, batch = OPTIMIZERS[name](layout.predict, LOSS, **kwargs), layout.examples(size)
        params = layout.start()
        state = jax.jit(tx.init)(params)
        before = lies((params, state))
        step = jax.jit(make_step(tx, layout.predict, batch if is_closed else None))
        batches = () if is_closed else (batch,)
        params, state = step(params, state, *batches)
        count = COMPILATIONS.count
        params, state = step(params, state, *batches)
    assert lies((params, state)) == before
    assert COMPILATIONS.count == count
    return params, state


@named(LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_of_one_device_and_leave_the_state_where_it_lies(name, layout):
    params, state = take_two_steps(layout, name)
    check_follows(state, params)
    assert_close(params, on_one_device(name))


@some("explicit, whole", "explicit, rows, in its context", "auto, columns")
@pytest.mark.parametrize("name", ["general", "kronecker", "hessian_free"])
def test_a_step_may_close_over_its_batch(name, layout):
    assert_close(take_two_steps(layout, name, is_closed=True)[0], on_one_device(name))


@some("explicit, rows", "explicit, rows, in its context", "auto, rows, in its context")
@pytest.mark.parametrize("init", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ["general", "kronecker"])
def test_state_of_weakly_typed_parameters_follows_them(name, init, layout):
    with layout.context():
        tx, batch, params = OPTIMIZERS[name](layout.predict, LOSS), layout.examples(), layout.start(True)
        assert any(leaf.weak_type for leaf in jax.tree.leaves(params))
        state = init(tx.init)(params)
        assert check_follows(state, params)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
        step = jax.jit(make_step(tx, layout.predict))
        params, state = step(params, state, batch)
        params, state = step(
            params, state, batch
        )  # compiled again: `optax.apply_updates` types them strongly
        count = COMPILATIONS.count
        _, state = step(params, state, batch)
    assert COMPILATIONS.count == count
    assert check_follows(state, params)
    assert_close(params, on_one_device(name))


@some("explicit, rows", "explicit, columns, in its context", "auto, columns")
@pytest.mark.parametrize("part", [0.25, 0.375, 16, 12, None])
def test_curvature_on_any_part_of_a_batch_that_is_cut(part, layout):
    kwargs = {"curvature_batch_size": part, "size": 64}
    assert_close(take_two_steps(layout, "identity", **kwargs)[0], on_one_device("identity", **kwargs))


@some("explicit, whole", "explicit, columns, in its context")
def test_a_share_takes_as_many_examples_of_every_shard_and_an_uneven_one_is_refused(layout):
    shards, batch = layout.shape[0], layout.examples(64)

    def subset(part):
        with layout.context():
            return jax.jit(lambda b: curvature_subset(predict, start(), b, part, ("image", "label")))(batch)

    small = subset(0.375)["label"]
    own = np.asarray(batch["label"]).reshape(8, 8)[:, [0, 2, 5]].ravel()
    np.testing.assert_array_equal(small, own)
    assert {shard.data.shape for shard in small.addressable_shards} == {(24 // shards,)}
    # A number that is no multiple of the shards cannot be cut: all devices have those examples.
    assert subset(12)["label"].sharding.is_fully_replicated is (shards == 8)
    with pytest.raises(ValueError, match=rf"`curvature_batch_size`=0.3 of 64 examples on {shards} shards is"):
        subset(0.3)


@pytest.mark.parametrize("name", ["identity", "hessian_free"])
def test_both_kinds_of_mesh_have_as_many_collectives(name):
    def counted(layout):
        tx, params = OPTIMIZERS[name](layout.predict, LOSS), layout.start()
        state, step = jax.jit(tx.init)(params), jax.jit(make_step(tx, layout.predict))
        return collectives(step.lower(params, state, layout.examples()).compile())

    explicit, auto = counted(Layout()), counted(Layout(AUTO))
    assert set(explicit) == {"all-reduce"}
    assert explicit == auto


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((16, 8), ("data", "model")),
        ((300, 8), ("data",)),  # blocks of 100 rows, shards of 75
        ((3, 3, 16, 300), (None, None, "model", "data")),  # an axis that is cut, behind one that is not
    ],
)
@pytest.mark.parametrize("is_context", [False, True])
@pytest.mark.parametrize("run", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_kronecker_products_lie_as_the_tensor_wherever_that_is_cut(shape, axes, is_context, run):
    layout = Layout(shape=(4, 2), is_context=is_context)
    tensor = jax.random.normal(jax.random.key(0), shape)
    outer = lambda x: packing_of(x, 128).outer(packing_of(x, 128).pack(x))
    sandwich = lambda f, x: packing_of(x, 128).unpack(
        packing_of(x, 128).sandwich(f, packing_of(x, 128).pack(x))
    )
    with layout.context():
        placed = layout.put(tensor, P(*axes))
        factors = layout.put(run(outer)(placed), WHOLE)
        product = run(sandwich)(factors, placed)
    of_one = outer(tensor)
    assert_close(factors, of_one)
    of_one = sandwich(of_one, tensor)
    np.testing.assert_allclose(product, of_one, rtol=1e-3, atol=1e-3 * float(jnp.abs(of_one).max()))
    assert spec(product) == spec(placed)


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_zeros_lie_as_the_array_also_behind_other_axes(kind):
    array = Layout(kind).put(jnp.full((16, 4), 2.0), ROWS)
    for zeros_like in (placement.zeros_like, jax.jit(placement.zeros_like, static_argnums=(1, 2))):
        assert spec(zeros_like(array)) == ("data",)
        assert spec(zeros_like(array, jnp.float16, (3,))) == (None, "data")


@pytest.mark.parametrize("is_context", [False, True])
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_the_example_of_the_page_trains_on_both_kinds_of_mesh(
    kind, is_context, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = find_examples(PAGE)[0].code
    assert "jax.make_mesh(" in code
    make_mesh = functools.partial(jax.make_mesh, axis_types=(kind,))
    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    Path("example.py").write_text(code, encoding="utf-8")
    with jax.set_mesh(make_mesh((8,), ("data",))) if is_context else contextlib.nullcontext():
        runpy.run_path("example.py")
    losses = [float(loss) for loss in re.findall(r"loss (\d\S*)", capsys.readouterr().out)]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
