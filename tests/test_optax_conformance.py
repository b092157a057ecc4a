"""What optax and its users expect of a transformation, asked of every optimizer of the package.

Add an optimizer to `OPTIMIZERS` and it is asked as well. Optax asks its own in `contrib/_common_test.py`,
which is in its source distribution but not in the wheel; the last test runs that file on the same optimizers
(eight minutes of one core):

    pip download --no-deps --no-binary :all: optax==VERSION && tar xzf optax-VERSION.tar.gz
    export OPTAX_COMMON_TEST=optax-VERSION/optax/contrib/_common_test.py
    python -m pytest tests/test_optax_conformance.py -k its_own
"""

import dataclasses
import functools
import inspect
import itertools
import os
import pathlib
import types
import unittest
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import problems
import pytest
from flax import nnx
from flax.training import train_state

from mlhf_optax import (
    LevenbergMarquardt,
    gauss_newton,
    hessian_free,
    load_pretrained,
    lodo,
    mlhf,
)
from mlhf_optax.learned import LEARNED

META_PARAMS = problems.random_meta_params(units=(2,))
LM = LevenbergMarquardt(0.5, min_damping=1e-6)


pytestmark = pytest.mark.usefixtures("unoptimised")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer under test."""

    factory: Callable  # factory(learning_rate=, predict_fn=, loss_fn=, **arguments)
    arguments: Mapping[str, Any]
    number: str = "cg_residual_norm"  # a scalar of float32 in the state
    static: tuple[str, ...] = ("num_cg_steps",)  # arguments that `inject_hyperparams` must leave alone
    injected: tuple[str, ...] = ()  # numbers that it makes hyperparameters, beside the learning rate
    smooth: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # without jumps, in float64
    by_parameter: tuple[tuple[int, ...], ...] = ()  # shapes in the state by parameter of shape (3, 2), sorted
    by_type: str = ""  # how to say that every parameter is of one layer type
    left_out: str = ""  # test of optax's own file


OPTIMIZERS = {
    "mlhf": Entry(
        mlhf,
        {"meta_params": META_PARAMS, "num_cg_steps": 2, "momentum": 0.5, "unroll": 1},
        static=("num_cg_steps", "unroll"),
        smooth={"carry_dtype": jnp.float64},
        # Two networks with a cell and a hidden state; direction, residual and their average.
        by_parameter=((2, 3, 2),) * 4 + ((3, 2),) * 3,
        by_type="layer_types_fn",
    ),
    "mlhf general": Entry(
        mlhf,
        {
            "meta_params": load_pretrained("general").meta_params,
            "num_cg_steps": 2,
            "max_growth": 1.0,
            "unroll": 1,
        },
        static=("num_cg_steps", "unroll"),
        by_parameter=((3, 2),) * 3,  # direction and two running means; factors are no trees like parameters
        left_out="accept_learning_rate_schedule",  # numbers multiply the rate, schedules bound it
    ),
    "gauss_newton kronecker": Entry(
        gauss_newton,
        {"damping": 0.3, "metric": "kronecker", "gradient_decay": 0.8, "num_cg_steps": 2, "unroll": 1},
        static=("num_cg_steps", "unroll"),
        injected=("damping",),
        by_parameter=((3, 2),) * 2,
    ),
    "gauss_newton": Entry(
        gauss_newton,
        {"damping": 0.3, "metric": "diagonal", "num_cg_steps": 2, "unroll": 1},
        static=("num_cg_steps", "unroll"),
        injected=("damping",),
        by_parameter=((3, 2),) * 2,  # direction and diagonal
    ),
    "hessian_free": Entry(
        hessian_free, {"damping": 0.1, "num_cg_steps": 2}, injected=("damping",), smooth={"early_exit": False}
    ),
    # A rule that changes the damping makes jumps; within its band it does not.
    "hessian_free LM": Entry(
        hessian_free,
        {"damping": LM, "num_cg_steps": 2},
        smooth={"early_exit": False, "damping": LevenbergMarquardt(0.5, low=-1e3, high=1e3)},
    ),
}
# Where compiling takes long, each kind of optimizer is asked once.
KINDS = pytest.mark.parametrize("name", ["mlhf", "gauss_newton", "hessian_free LM"])


def build(name, learning_rate=0.5, predict_fn=problems.linear, loss_fn=problems.LOSS, **changes):
    entry = OPTIMIZERS[name]
    arguments = {"predict_fn": predict_fn, "loss_fn": loss_fn, **entry.arguments, **changes}
    return entry.factory(learning_rate=learning_rate, **arguments)


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    return request.param


@pytest.fixture
def tx(name):
    return built(name)


@functools.cache
def built(name):
    return build(name)


@functools.cache
def update_of(name):
    """The jitted update, compiled once for all tests."""
    return jax.jit(built(name).update)


gradient = jax.jit(jax.grad(problems.linear_loss))


def start(dtype=jnp.float32):
    """Parameters, a batch and the gradients."""
    params, batch = problems.linear_params(dtype=dtype), problems.batch()
    return params, batch, gradient(params, batch)


def step_of(tx):
    """A whole training step."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(problems.linear_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    return step


def close(got, want, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=atol), got, want)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def kinds(tree):
    """Structure, shapes and dtypes, and whether a leaf has the weak type of a Python number."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda: tree))
    return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


# The protocol.


def test_it_is_a_transformation_with_extra_arguments(tx):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(tx) is tx


def test_the_update_goes_downhill_and_unexpected_arguments_are_ignored(name, tx):
    params, batch, grads = start()
    state = tx.init(params)
    want = update_of(name)(grads, state, params, batch=batch)
    assert optax.tree.vdot(want[0], grads) < 0
    others = {"value": 1.0, "grad": grads, "value_fn": problems.linear_loss, "unheard_of": None}
    # A function is no argument of a jitted one; a trace with it gives the same program.
    traced = jax.make_jaxpr(lambda: tx.update(grads, state, params, batch=batch, **others))()
    plain = jax.make_jaxpr(lambda: tx.update(grads, state, params, batch=batch))()
    assert str(traced) == str(plain)


def test_a_missing_batch_or_parameters_are_errors_that_name_the_optimizer(name, tx):
    params, batch, grads = start()
    state, own = tx.init(params), f"`{OPTIMIZERS[name].factory.__name__}`"
    with pytest.raises(TypeError, match=rf"{own} needs the batch.*`tx.update\(grads, state, params, batch="):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match=f"{own} needs the current parameters"):
        tx.update(grads, state, batch=batch)
    with pytest.raises(TypeError, match=rf"{own} takes the batch by name.*`tx.update\(grads, state, "):
        tx.update(grads, state, params, batch)


# Residuals whose squares are optax's objectives, and starts and minima.
OBJECTIVES = {
    "parabola": (lambda p: p["kernel"], [[-1.0], [10.0], [1.0]], [[1.0], [-1.0], [1.0]]),
    "matrix parabola": (lambda p: p["kernel"], np.zeros((2, 2)), [[3.0, -2.0], [1.0, 4.0]]),
    "Rosenbrock": (
        lambda p: jnp.stack([p["kernel"][0] - 1.0, 10.0 * (p["kernel"][1] - p["kernel"][0] ** 2)]),
        np.zeros((2, 1)),
        np.ones((2, 1)),
    ),
    "mixed": (lambda p: p["kernel"] * p["bias"], np.full((2, 2), 2.0), [[1.0, 0.0], [-1.0, 1.0]]),
}


@pytest.mark.parametrize(("name", "objective"), list(zip(OPTIMIZERS, itertools.cycle(reversed(OBJECTIVES)))))
def test_it_reaches_the_minimum(name, objective):
    residuals, start, minimum = OBJECTIVES[objective]
    params = {"kernel": jnp.asarray(start, jnp.float32)}
    if objective == "mixed":
        params["bias"] = jnp.asarray([1.0, -1.0], jnp.float32)
    predict_fn = lambda p, batch: residuals(p) - batch
    batch = jnp.zeros((2, 1)) if objective == "Rosenbrock" else jnp.asarray(minimum, jnp.float32)
    loss_fn = lambda z, batch: jnp.sum(z**2)
    tx = build(name, 0.1, predict_fn, loss_fn)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=3000)[0])
    params, _ = train((params, tx.init(params)))
    got = params["kernel"] * params["bias"] if objective == "mixed" else params["kernel"]
    np.testing.assert_allclose(got, minimum, rtol=3e-2, atol=3e-2)


# The state.


def test_the_state_is_a_fixed_point_without_weak_types_may_be_donated_and_compiles_once(tx):
    params, batch, _ = start()
    compilations = []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(*args):
        compilations.append(1)
        return step_of(tx)(*args)

    state = tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    close(jax.jit(tx.init)(params), state)  # the size of the parameters is rounded differently
    before = kinds(state)
    new_params, new_state, _ = step(params, state, batch)
    assert kinds(new_state) == before
    assert not any(is_weak for _, _, is_weak in before[1])
    step(new_params, new_state, batch)
    assert len(compilations) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtypes_of_parameters_and_state_are_kept(name, tx, dtype):
    """With shapes alone, which tells what a `lax.cond` around the update would, and of `MultiSteps` too."""
    with jax.enable_x64(dtype == "float64"):
        params, batch, grads = start(dtype)
        batch = {**batch, "image": batch["image"].astype(dtype)}
        for outer in (tx, optax.MultiSteps(tx, 4)):
            state = outer.init(params)
            updates, new_state = jax.eval_shape(lambda s: outer.update(grads, s, params, batch=batch), state)  # noqa: B023
            assert kinds(updates) == kinds(params)
            assert kinds(new_state) == kinds(state)
        for leaf in jax.tree.leaves(optax.tree.get(tx.init(params), "info")):
            assert leaf.dtype in (jnp.float32, jnp.int32)


@KINDS
def test_updates_of_low_precision_go_downhill(name):
    params, batch, grads = start(jnp.bfloat16)
    batch = {**batch, "image": batch["image"].astype(jnp.bfloat16)}
    state = built(name).init(params)
    for _ in range(2):
        updates, state = update_of(name)(grads, state, params, batch=batch)
        assert optax.tree.vdot(updates, grads) < 0


def test_a_checkpoint_continues_identically(name, tx, tmp_path):
    params, batch, grads = start()
    _, state = update_of(name)(grads, tx.init(params), params, batch=batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        template = jax.eval_shape(lambda: {"params": params, "state": state})
        restored = checkpointer.restore(tmp_path / "state", template)
    equal(restored, {"params": params, "state": state})
    update = functools.partial(update_of(name), grads, batch=batch)
    equal(update(restored["state"], restored["params"]), update(state, params))


def test_optax_tree_finds_sets_and_maps_what_is_in_the_state(name, tx):
    params, batch, grads = start()
    _, state = update_of(name)(grads, tx.init(params), params, batch=batch)
    assert int(optax.tree.get(state, "skipped_steps")) == 0
    field = OPTIMIZERS[name].number
    changed = optax.tree.set(state, **{field: jnp.float32(7.0)})
    assert float(optax.tree.get(changed, field)) == 7.0
    assert optax.tree.get(state, "no_such_field") is None
    shapes = []
    mapped = optax.tree.map_params(tx, lambda x: shapes.append(x.shape) or 0 * x, state)
    assert kinds(mapped) == kinds(state)
    assert tuple(sorted(shapes)) == OPTIMIZERS[name].by_parameter
    if shapes:
        assert not any(leaf.any() for leaf in jax.tree.leaves(optax.tree.get(mapped, "direction")))
        assert int(optax.tree.get(mapped, "skipped_steps")) == 0


# Transformations of JAX.


def check_that_jit_vmap_and_scan_agree_with_single_calls(tx, rtol, atol):
    step = jax.jit(step_of(tx))
    tasks = [(problems.linear_params(seed, jnp.float32), problems.batch(seed)) for seed in range(2)]

    def train(params, batch):
        body = lambda carry, _: (lambda p, s, loss: ((p, s), loss))(*step_of(tx)(*carry, batch))
        (params, state), losses = jax.lax.scan(body, (params, tx.init(params)), None, length=3)
        return params, state, losses[-1]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    together = jax.jit(jax.vmap(train))(*stacked)
    for i, (params, batch) in enumerate(tasks):
        state = tx.init(params)
        for _ in range(3):
            params, state, loss = step(params, state, batch)
        got = jax.tree.map(lambda x: x[i], together)  # noqa: B023
        close(got, (params, state, loss), rtol=rtol, atol=atol)


@KINDS
def test_jit_vmap_and_scan_agree_with_single_calls(name):
    check_that_jit_vmap_and_scan_agree_with_single_calls(built(name), rtol=1e-4, atol=1e-5)


@KINDS
def test_the_gradient_through_two_updates_agrees_with_finite_differences(name, x64):
    tx = build(name, **OPTIMIZERS[name].smooth)
    params, batch = problems.linear_params(), problems.batch()
    direction = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2)))

    @jax.jit
    @jax.value_and_grad
    def outcome(shift):
        moved = {"kernel": params["kernel"] + shift * direction}
        body = lambda carry, _: (lambda p, s, loss: ((p, s), loss))(*step_of(tx)(*carry, batch))
        (last, _), losses = jax.lax.scan(body, (moved, tx.init(moved)), None, length=2)
        return losses[1] + jnp.sum(jnp.sin(last["kernel"]))

    want = (outcome(1e-5)[0] - outcome(-1e-5)[0]) / 2e-5
    np.testing.assert_allclose(outcome(0.0)[1], want, rtol=1e-6)


# Other transformations around and behind it.


def test_chain_and_named_chain_hand_the_batch_on(name, tx):
    params, batch, grads = start()
    want, _ = update_of(name)(grads, tx.init(params), params, batch=batch)
    named = optax.named_chain(("solve", tx), ("halve", optax.scale(0.5)))
    outer = optax.chain(named, optax.clip_by_global_norm(1e-3))
    got, _ = jax.jit(outer.update)(grads, outer.init(params), params, batch=batch)
    close(got, optax.tree.scale(1e-3 / optax.tree.norm(want), want))


def test_the_learning_rate_may_be_a_schedule():
    name, (params, batch, grads) = "mlhf", start()
    tx = build(name, optax.piecewise_constant_schedule(0.5, {1: 0.0}))
    update = jax.jit(tx.update)
    first, state = update(grads, tx.init(params), params, batch=batch)
    close(first, update_of(name)(grads, built(name).init(params), params, batch=batch)[0])
    second, _ = update(grads, state, params, batch=batch)
    assert not second["kernel"].any()


FUNCTIONS = {"predict_fn": problems.linear, "loss_fn": problems.LOSS}


@KINDS
def test_hyperparameters_may_be_injected(name):
    entry = OPTIMIZERS[name]
    arguments = {**FUNCTIONS, **entry.arguments}
    tx = optax.inject_hyperparams(entry.factory, static_args=(*FUNCTIONS, *entry.static))(
        learning_rate=0.5, **arguments
    )
    params, batch, grads = start()
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    updates, new_state = update(grads, state, params, batch=batch)
    want, plain_state = update_of(name)(grads, built(name).init(params), params, batch=batch)
    close(updates, want)
    close(new_state.inner_state, plain_state)
    assert kinds(new_state) == kinds(state)
    np.testing.assert_allclose(optax.tree.get(state, "learning_rate"), 0.5, rtol=1e-6)
    for argument in entry.injected:
        np.testing.assert_allclose(optax.tree.get(state, argument), entry.arguments[argument], rtol=1e-6)
    # Rates so small that the bound on the update plays no part.
    rates = [optax.tree.set(state, learning_rate=jnp.float32(rate)) for rate in (0.05, 0.1)]
    half, whole = (update(grads, one, params, batch=batch)[0] for one in rates)
    close(half, optax.tree.scale(0.5, whole))


def test_injected_damping_may_follow_a_schedule():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    kwargs = {**FUNCTIONS, "num_cg_steps": 2}
    tx = optax.inject_hyperparams(hessian_free, static_args=tuple(kwargs))(0.5, **kwargs, damping=schedule)
    params, batch, grads = start()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for damping in (1.0, 0.5):
        _, state = update(grads, state, params, batch=batch)
        np.testing.assert_allclose(optax.tree.get(state, "damping_mean"), damping, rtol=1e-6)


@pytest.mark.parametrize("name", ["mlhf", "hessian_free"])
def test_a_loop_length_that_is_not_static_is_an_error_that_says_so(name):
    entry = OPTIMIZERS[name]
    tx = optax.inject_hyperparams(entry.factory, static_args=FUNCTIONS)(
        learning_rate=0.5, **FUNCTIONS, **entry.arguments
    )
    params, batch, grads = start()
    with pytest.raises(TypeError, match=r"`num_cg_steps` must be a Python int.*`static_args`"):
        tx.update(grads, tx.init(params), params, batch=batch)


@KINDS
def test_multi_steps_takes_the_mean_gradient_and_the_last_curvature(name):
    params, tx = problems.linear_params(dtype=jnp.float32), built(name)
    batches = [problems.batch(seed) for seed in (1, 2)]
    grads = [gradient(params, batch) for batch in batches]
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    update, state = jax.jit(steps.update), steps.init(params)
    first, state = update(grads[0], state, params, batch=batches[0])
    assert not first["kernel"].any()
    second, state = update(grads[1], state, params, batch=batches[1])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    close(second, update_of(name)(mean, tx.init(params), params, batch=batches[1])[0])


@pytest.mark.parametrize("name", ["mlhf", "hessian_free LM"])
def test_apply_if_finite_leaves_the_state_alone_when_a_gradient_is_not(name):
    (params, batch, grads), tx = start(), built(name)
    outer = optax.apply_if_finite(tx, max_consecutive_errors=3)
    update = jax.jit(outer.update)
    good, state = update(grads, outer.init(params), params, batch=batch)
    close(good, update_of(name)(grads, tx.init(params), params, batch=batch)[0])
    bad, after = update(jax.tree.map(lambda g: g * jnp.nan, grads), state, params, batch=batch)
    assert not bad["kernel"].any()
    equal(after.inner_state, state.inner_state)


@pytest.mark.parametrize(("name", "search"), [("gauss_newton", "zoom"), ("hessian_free LM", "backtracking")])
def test_a_line_search_behind_it_lowers_the_loss(name, search):
    linesearch = {
        "backtracking": optax.scale_by_backtracking_linesearch(max_backtracking_steps=10),
        "zoom": optax.scale_by_zoom_linesearch(max_linesearch_steps=10),
    }[search]
    tx = optax.chain(build(name, 1.0), linesearch)
    params, batch, _ = start()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(problems.linear_loss)(params, batch)
        extra = {"batch": batch, "value": value, "grad": grads, "value_fn": problems.linear_loss}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(4):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert np.all(np.diff(losses) < 0)


def test_frozen_parameters_are_frozen_behind_it():
    params = {**problems.linear_params(dtype=jnp.float32), "bias": jnp.zeros(2)}
    predict_fn = lambda p, batch: problems.linear(p, batch) + p["bias"][None]
    tx = optax.chain(
        build("gauss_newton", predict_fn=predict_fn), optax.freeze({"kernel": True, "bias": False})
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, batch=problems.batch())
    assert not updates["kernel"].any()
    assert updates["bias"].all()


# Wrappers that cannot work.


def test_wrappers_that_hide_parameters_fail_and_say_what_to_use_instead(tx):
    params, batch = problems.mlp_params(dtype=jnp.float32), problems.batch()
    labels = {"Dense_0": "ours", "Dense_1": "other"}
    masked = optax.masked(tx, {"Dense_0": True, "Dense_1": False})
    partitioned = optax.partition({"ours": tx, "other": optax.sgd(0.1)}, labels)
    for outer in (masked, partitioned):
        with pytest.raises(
            ValueError, match=r"`optax.masked`, `optax.partition`.*`optax.chain\(optimizer, optax.freeze"
        ):
            outer.init(params)
    hidden = {"Dense_0": params["Dense_0"], "Dense_1": optax.MaskedNode()}
    with pytest.raises(ValueError, match="cannot work on part of its parameters"):
        tx.update(hidden, tx.init(params), hidden, batch=batch)


def test_a_flattened_tree_has_no_names_and_fails():
    params, _, _ = start()
    with pytest.raises(
        ValueError, match=r"a bare array without a name.*A flattened tree \(`optax.flatten`\)"
    ):
        optax.flatten(built("mlhf")).init(params)


def test_wrappers_that_drop_the_batch_fail_and_are_named(tx):
    params, batch, grads = start()
    dropping = optax.chain(optax.MultiSteps(tx, 2).gradient_transformation())
    with pytest.raises(
        TypeError, match=r"needs the batch.*`optax.chain` around `MultiSteps\(tx, k\).gradient_transformation"
    ):
        dropping.update(grads, dropping.init(params), params, batch=batch)
    lookahead = optax.chain(optax.lookahead(tx, 5, 0.5))
    pair = optax.LookaheadParams.init_synced(params)
    with pytest.raises(TypeError, match=r"drop it: `optax.lookahead`.*`optax.incremental_update`"):
        lookahead.update(grads, lookahead.init(pair), pair, batch=batch)


def test_gradient_transformation_of_multi_steps_hands_the_batch_on_by_itself():
    name, (params, batch, grads) = "gauss_newton", start()
    outer = optax.MultiSteps(built(name), 1).gradient_transformation()
    got, _ = outer.update(grads, outer.init(params), params, batch=batch)
    close(got, update_of(name)(grads, built(name).init(params), params, batch=batch)[0])


@pytest.mark.parametrize("share", [None, 0.5])
def test_flattened_parameters_are_refused_with_the_reason(share):
    params, batch, grads = start()
    outer = optax.flatten(build("gauss_newton", curvature_batch_size=share))
    with pytest.raises(ValueError, match=r"came as one vector of shape \(6,\). `optax.flatten`.*leave it"):
        outer.update(grads, outer.init(params), params, batch=batch)


# Calls that are nearly right.


@pytest.mark.parametrize("factory", [mlhf, gauss_newton, hessian_free])
def test_a_misspelt_argument_is_told_which_is_meant(factory):
    first = {"meta_params": META_PARAMS} if factory is mlhf else {}
    with pytest.raises(TypeError, match=f"`{factory.__name__}` has no argument `lr`; did you mean `learning"):
        factory(**first, **FUNCTIONS, lr=0.1)
    assert "learning_rate" in inspect.signature(factory).parameters


@pytest.mark.parametrize("name", ["predict_fn", "loss_fn"])
def test_a_function_that_was_taken_for_a_schedule_is_an_error_that_names_static_args(name):
    functions = {**FUNCTIONS, name: lambda *_: jnp.ones(())}
    static = set(FUNCTIONS) - {name} | {"num_cg_steps"}
    tx = optax.inject_hyperparams(gauss_newton, static_args=static)(0.5, **functions)
    params, batch, grads = start()
    with pytest.raises(TypeError, match=rf"`{name}` must be a function.*`static_args=\(.predict_fn"):
        tx.update(grads, tx.init(params), params, batch=batch)


class Box:
    """What a Keras variable is: something with a shape, a dtype, and a value."""

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, value.shape, str(value.dtype)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            Box(jnp.ones(2)),
            r"it is a Box, not an array; take the array that it holds.*\[variable.value for variable in",
        ),
        (
            jax.nn.relu,
            r"it is a custom_jvp, not an array; .*`params, static = eqx.partition\(model",
        ),
        ("same", r"it is a str, not an array; `params` holds arrays alone"),
        (0.1, r"it is a float, not an array; use `jnp.asarray`, or.*`eqx.partition\(model, eqx.is_inexact"),
    ],
)
def test_a_leaf_that_is_no_array_is_an_error_with_what_to_do(leaf, message):
    params = {**problems.linear_params(dtype=jnp.float32), "other": leaf}
    with pytest.raises(TypeError, match=f"cannot train the parameter 'other': {message}"):
        built("gauss_newton").init(params)


def test_trees_of_variables_of_nnx_are_trained():
    params, batch, _ = start()
    boxed = {"kernel": nnx.Param(params["kernel"])}
    predict_fn = lambda p, batch: batch["image"] @ p["kernel"][...]
    tx = build("gauss_newton", predict_fn=predict_fn)
    grads = jax.grad(lambda p: problems.LOSS(predict_fn(p, batch), batch))(boxed)
    updates, _ = tx.update(grads, tx.init(boxed), boxed, batch=batch)
    want, _ = update_of("gauss_newton")(*start()[2:], built("gauss_newton").init(params), params, batch=batch)
    close(updates["kernel"][...], want["kernel"])


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_loss_of_parameters_is_an_error_that_says_what_it_has_to_be(share):
    params, batch, grads = start()
    tx = build("gauss_newton", loss_fn=problems.linear_loss, curvature_batch_size=share)
    with pytest.raises(
        TypeError, match=r"`loss_fn` is a function of `\(params, batch\)`.*`loss_fn\(outputs, b"
    ):
        tx.update(grads, tx.init(params), params, batch=batch)


def test_one_bad_micro_batch_stops_multi_steps_unless_it_is_skipped():
    params, batch, grads = start()
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)

    def run(**options):
        outer = optax.MultiSteps(built("gauss_newton"), 2, **options)
        update, state, moved = jax.jit(outer.update), outer.init(params), []
        for step in range(6):
            updates, state = update(bad if step == 1 else grads, state, params, batch=batch)
            moved.append(bool(updates["kernel"].any()))
        return moved, int(optax.tree.get(state, "skipped_steps"))

    assert run() == ([False] * 6, 3)
    moved, skipped = run(should_skip_update_fn=optax.skip_not_finite)
    assert moved == [False, False, True, False, True, False]
    assert skipped == 0


# Optimizers that need gradients alone: what of the above does not speak of batches and curvature.

GRADIENT_ONLY = {
    name: LEARNED[name].optimizer
    for name in ("adam_rates", "rnnprop", "l2l", "hyperadam", "variational_hyperadam", "hierarchical")
}


def build_gradient_only(name):
    if name == "lodo":
        return optax.with_extra_args_support(lodo(0.5, block_size=2, num_layers=2))
    family = LEARNED[name]
    meta_params = family.learned(family.options()).init(jax.random.key(0), None)
    return family.optimizer(meta_params, problems.linear, problems.LOSS)


@pytest.fixture(params=[*GRADIENT_ONLY, "lodo"])
def plain_name(request):
    return request.param


@pytest.fixture
def plain(plain_name):
    return build_gradient_only(plain_name)


def test_one_that_needs_gradients_alone_ignores_all_other_arguments(plain):
    params, batch, grads = start()
    state = plain.init(params)
    assert isinstance(plain, optax.GradientTransformationExtraArgs)
    others = {"value": 1.0, "grad": grads, "value_fn": problems.linear_loss, "unheard_of": None}
    traced = jax.make_jaxpr(lambda: plain.update(grads, state, params, batch=batch, **others))()
    without = jax.make_jaxpr(lambda: plain.update(grads, state))()
    assert str(traced) == str(without)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_its_dtypes_of_parameters_and_state_are_kept_without_weak_types(plain, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, batch, grads = start(dtype)
        for outer in (plain, optax.MultiSteps(plain, 4)):
            state = outer.init(params)
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
            updates, new_state = jax.eval_shape(lambda s: outer.update(grads, s, params, batch=batch), state)  # noqa: B023
            assert kinds(updates) == kinds(params)
            assert kinds(new_state) == kinds(state)
            assert not any(is_weak for _, _, is_weak in kinds(state)[1])


def test_it_works_in_bfloat16_and_behind_and_before_others(plain):
    params, batch, grads = start(jnp.bfloat16)
    outer = optax.apply_if_finite(optax.chain(plain, optax.clip_by_global_norm(1e-3)), 3)
    update = jax.jit(outer.update)
    updates, state = update(grads, outer.init(params), params, batch=batch)
    updates, state = update(grads, state, params, batch=batch)
    assert 0 < optax.tree.norm(updates["kernel"].astype(jnp.float32)) <= 1.01e-3
    bad, after = update(jax.tree.map(lambda g: g * jnp.nan, grads), state, params, batch=batch)
    assert not bad["kernel"].any()
    equal(after.inner_state, state.inner_state)


def test_its_jit_vmap_and_scan_agree_with_single_calls(plain):
    check_that_jit_vmap_and_scan_agree_with_single_calls(plain, rtol=1e-3, atol=1e-4)


def test_its_checkpoint_continues_identically(plain, tmp_path):
    params, batch, grads = start()
    update = jax.jit(plain.update)
    _, state = update(grads, plain.init(params), params, batch=batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: {"state": state}))["state"]
    equal(update(grads, restored, params), update(grads, state, params))


def test_one_that_keeps_coordinates_apart_may_be_masked_and_its_state_mapped(plain, plain_name):
    params = problems.mlp_params(dtype=jnp.float32)
    grads = jax.tree.map(jnp.ones_like, params)
    masked = optax.masked(plain, {"Dense_0": True, "Dense_1": False})
    updates, _ = jax.jit(masked.update)(grads, masked.init(params), params)
    equal(updates["Dense_1"], grads["Dense_1"])
    if plain_name == "lodo":
        return
    shapes, state = [], plain.init(params)
    mapped = optax.tree.map_params(plain, lambda x: shapes.append(x.shape) or 0 * x, state)
    assert kinds(mapped) == kinds(state)
    assert shapes
    assert not any(leaf.any() for leaf in jax.tree.leaves(mapped) if leaf.ndim > 1)


def test_it_works_in_the_training_states_of_flax(plain):
    params, _, grads = start()
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=plain)
    linen = jax.jit(lambda s: s.apply_gradients(grads=grads))(state).params["kernel"]
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(params["kernel"])
    optimizer = nnx.Optimizer(model, plain, wrt=nnx.Param)
    optimizer.update(model, nnx.State({"kernel": nnx.Param(grads["kernel"])}))
    np.testing.assert_allclose(model.kernel[...], linen, rtol=1e-5, atol=1e-6)
    assert (linen != params["kernel"]).any()


# The conformance file of optax.

COMMON_TEST = os.environ.get("OPTAX_COMMON_TEST", "")


def adapted(learning_rate: optax.ScalarOrSchedule, name: str):
    """An optimizer that takes optax's objectives: parameters are the outputs, the objective is the loss."""
    entry = OPTIMIZERS[name]
    types_fn = lambda params: jax.tree.map(lambda _: "dense_kernel", params)
    changes = {entry.by_type: types_fn} if entry.by_type else {}

    def make(objective):
        return build(name, learning_rate, lambda p, _: p, lambda z, _: objective(z), **changes)

    def update_fn(updates, state, params=None, *, obj_fn, **extra_args):
        return make(obj_fn).update(updates, state, params, batch=(), **extra_args)

    return optax.GradientTransformationExtraArgs(make(None).init, update_fn)


@pytest.mark.skipif(not COMMON_TEST, reason="OPTAX_COMMON_TEST does not name optax's file")
def test_the_file_with_which_optax_tests_its_own(name, monkeypatch):
    # Under the name of the one optimizer that gets the objective from the file.
    monkeypatch.setattr(optax.contrib, "sophia", adapted)
    entry = {"opt_name": "sophia", "opt_kwargs": {"learning_rate": 1e-2, "name": name}}
    module = types.ModuleType("optax_common_test")
    module.OURS = ({**entry, "wrapper_name": None, "wrapper_kwargs": None},)
    before = "class ContribTest("
    first, second = pathlib.Path(COMMON_TEST).read_text().split(before)
    lists = "_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = OURS\n\n\n"
    exec(compile(first + lists + before + second, COMMON_TEST, "exec"), module.__dict__)
    if left_out := OPTIMIZERS[name].left_out:
        delattr(module.ContribTest, next(test for test in dir(module.ContribTest) if left_out in test))
    suite, result = unittest.defaultTestLoader.loadTestsFromModule(module), unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        suite.run(result)
    assert result.testsRun >= 15
    assert not result.skipped
    assert result.wasSuccessful(), "\n".join(text for _, text in result.failures + result.errors)
