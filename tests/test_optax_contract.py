"""What optax and its users expect of a transformation, asked of every optimizer of the package."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import problems
import pytest

from mlhf_optax import (
    LevenbergMarquardt,
    SquaredError,
    hessian_free,
    mlhf,
    scale_by_hessian_free,
    scale_by_mlhf,
)

META_PARAMS = problems.random_meta_params(units=(2,))
LM = LevenbergMarquardt(0.5, min_damping=1e-6)


def scaled(direction, learning_rate):
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def build(name, learning_rate=0.5, predict_fn=problems.linear, loss_fn=problems.LOSS, **kwargs):
    functions = (predict_fn, loss_fn)
    kwargs = {"num_cg_steps": 2, **kwargs}
    match name:
        case "mlhf":
            return mlhf(learning_rate, META_PARAMS, *functions, **kwargs)
        case "mlhf momentum":
            return mlhf(learning_rate, META_PARAMS, *functions, momentum=0.5, **kwargs)
        case "scale_by_mlhf":
            return scaled(scale_by_mlhf(META_PARAMS, *functions, **kwargs), learning_rate)
        case "hessian_free":
            return hessian_free(learning_rate, *functions, **{"damping": 0.1, **kwargs})
        case "hessian_free LM":
            return hessian_free(learning_rate, *functions, **{"damping": LM, **kwargs})


@pytest.fixture(params=["mlhf", "mlhf momentum", "scale_by_mlhf", "hessian_free", "hessian_free LM"])
def name(request):
    return request.param


@pytest.fixture
def tx(name):
    return built(name)


# `scale_by_mlhf` is a part of `mlhf`; where compiling takes long, the whole stands for it.
ALIASES = pytest.mark.parametrize("name", ["mlhf", "hessian_free", "hessian_free LM"])


@functools.cache
def built(name):
    return build(name)


@functools.cache
def update_of(name):
    """The jitted update, compiled once for all tests."""
    return jax.jit(built(name).update)


def start(dtype=jnp.float32):
    """Parameters, a batch and the gradients."""
    params, batch = problems.linear_params(dtype=dtype), problems.batch()
    return params, batch, jax.grad(problems.linear_loss)(params, batch)


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


@pytest.mark.parametrize(
    "direction",
    [
        scale_by_mlhf(META_PARAMS, problems.linear, problems.LOSS),
        scale_by_hessian_free(problems.linear, problems.LOSS),
    ],
    ids=["scale_by_mlhf", "scale_by_hessian_free"],
)
def test_the_building_block_has_the_sign_of_the_gradient(direction):
    params, batch, grads = start()
    updates, _ = direction.update(grads, direction.init(params), params, batch=batch)
    assert optax.tree.vdot(updates, grads) > 0


def test_the_update_goes_downhill_and_unexpected_arguments_are_ignored(name, tx):
    params, batch, grads = start()
    state = tx.init(params)
    want = update_of(name)(grads, state, params, batch=batch)
    assert optax.tree.vdot(want[0], grads) < 0
    others = {"value": 1.0, "grad": grads, "value_fn": problems.linear_loss, "unheard_of": None}
    close(tx.update(grads, state, params, batch=batch, **others), want)


def test_a_missing_batch_or_parameters_are_errors(tx):
    params, batch, grads = start()
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"needs the batch.*`tx.update\(grads, state, params, batch=batch\)`"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx.update(grads, state, batch=batch)
    with pytest.raises(TypeError):
        tx.update(grads, state, params, batch)


def test_it_converges_on_a_quadratic(name):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
    batch = {"x": inputs, "label": inputs @ jnp.asarray(rng.normal(size=(4, 1)), jnp.float32)}
    predict_fn, loss_fn = lambda p, b: b["x"] @ p["kernel"], SquaredError()
    tx = build(name, 1.0, predict_fn, loss_fn)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    params = {"kernel": jnp.full((4, 1), 0.5)}
    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, None, length=60))((params, tx.init(params)))
    assert losses[-1] < 1e-4 * losses[0]


# The state.


def test_the_state_is_a_fixed_point_without_weak_types_and_nothing_compiles_twice(tx):
    params, batch, _ = start()
    compilations = []

    @jax.jit
    def step(*args):
        compilations.append(1)
        return step_of(tx)(*args)

    state = tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    new_params, new_state, _ = step(params, state, batch)
    assert kinds(new_state) == kinds(state)
    assert not any(is_weak for _, _, is_weak in kinds(state)[1])
    step(new_params, new_state, batch)
    assert len(compilations) == 1
    close(jax.jit(tx.init)(params), state)  # the size of the parameters is rounded differently


def test_the_state_may_be_donated(name, tx):
    params, batch, grads = start()
    want = update_of(name)(grads, tx.init(params), params, batch=batch)
    donating = jax.jit(tx.update, donate_argnums=(0, 1), keep_unused=True)
    close(donating(jax.tree.map(jnp.copy, grads), tx.init(params), params, batch=batch), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_dtype_of_the_parameters_is_kept(name, tx, dtype):
    params, batch, grads = start(dtype)
    batch = {**batch, "image": batch["image"].astype(dtype)}
    state = tx.init(params)
    for _ in range(2):
        updates, new_state = update_of(name)(grads, state, params, batch=batch)
        assert updates["kernel"].dtype == dtype
        assert kinds(new_state) == kinds(state)
        assert optax.tree.vdot(updates, grads) < 0
        state = new_state
    for leaf in jax.tree.leaves(optax.tree.get(state, "info")):
        assert leaf.dtype in (jnp.float32, jnp.int32)


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
    field = "damping_value" if "hessian_free" in name else "cg_residual_norm"
    changed = optax.tree.set(state, **{field: jnp.float32(7.0)})
    assert float(optax.tree.get(changed, field)) == 7.0
    assert optax.tree.get(state, "no_such_field") is None
    shapes = []
    mapped = optax.tree.map_params(tx, lambda x: shapes.append(x.shape) or 0 * x, state)
    assert kinds(mapped) == kinds(state)
    if "mlhf" in name:
        # Direction, residual, perhaps their average, and two carries with a cell and a hidden state of
        # two units each.
        assert sorted(shapes) == [(2, 3, 2)] * 4 + [(3, 2)] * (3 if "momentum" in name else 2)
        assert not optax.tree.get(mapped, "direction")["kernel"].any()
        assert int(optax.tree.get(mapped, "skipped_steps")) == 0
    else:
        assert shapes == []


# Transformations of JAX.


@ALIASES
def test_jit_vmap_and_scan_agree_with_single_calls(name):
    tx = built(name)
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
        close(got, (params, state, loss), rtol=1e-4, atol=1e-5)


@ALIASES
def test_the_gradient_through_two_updates_agrees_with_finite_differences(name, x64):
    kwargs = {"carry_dtype": jnp.float64} if "mlhf" in name else {"early_exit": False}
    if name == "hessian_free LM":
        # A rule that changes the damping makes jumps; within its band it does not.
        kwargs["damping"] = LevenbergMarquardt(0.5, low=-1e3, high=1e3)
    tx = build(name, **kwargs)
    params, batch = problems.linear_params(), problems.batch()
    direction = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2)))

    @jax.jit
    def outcome(shift):
        moved = {"kernel": params["kernel"] + shift * direction}
        first, state, _ = step_of(tx)(moved, tx.init(moved), batch)
        second, _, loss = step_of(tx)(first, state, batch)
        return loss + jnp.sum(jnp.sin(second["kernel"]))

    want = (outcome(1e-5) - outcome(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(outcome))(0.0), want, rtol=1e-6)


# Other transformations around and behind it.


def test_chain_and_named_chain_hand_the_batch_on(name, tx):
    params, batch, grads = start()
    want, _ = update_of(name)(grads, tx.init(params), params, batch=batch)
    chained = optax.chain(tx, optax.scale(0.5))
    named = optax.named_chain(("solve", tx), ("halve", optax.scale(0.5)))
    for outer in (chained, named):
        got, _ = outer.update(grads, outer.init(params), params, batch=batch)
        close(got, optax.tree.scale(0.5, want))
    clipped = optax.chain(tx, optax.clip_by_global_norm(1e-3))
    got, _ = clipped.update(grads, clipped.init(params), params, batch=batch)
    np.testing.assert_allclose(optax.tree.norm(got), 1e-3, rtol=1e-5)


def test_the_learning_rate_may_be_a_schedule(name):
    params, batch, grads = start()
    tx = build(name, optax.piecewise_constant_schedule(0.5, {1: 0.0}))
    update = jax.jit(tx.update)
    first, state = update(grads, tx.init(params), params, batch=batch)
    close(first, update_of(name)(grads, built(name).init(params), params, batch=batch)[0])
    second, _ = update(grads, state, params, batch=batch)
    assert not second["kernel"].any()


FUNCTIONS = {"predict_fn": problems.linear, "loss_fn": problems.LOSS}
STATIC = ("predict_fn", "loss_fn", "num_cg_steps")
INJECTED = {
    "mlhf": (mlhf, {"meta_params": META_PARAMS}),
    "hessian_free": (hessian_free, {"damping": 0.1}),
    "hessian_free LM": (hessian_free, {"damping": LM}),
}


@pytest.mark.parametrize("injected", INJECTED)
def test_hyperparameters_may_be_injected(injected):
    factory, kwargs = INJECTED[injected]
    kwargs = {**FUNCTIONS, **kwargs, "num_cg_steps": 2}
    tx = optax.inject_hyperparams(factory, static_args=STATIC)(0.1, **kwargs)
    plain = factory(0.1, **kwargs)
    params, batch, grads = start()
    update = jax.jit(tx.update)
    state = tx.init(params)
    updates, new_state = update(grads, state, params, batch=batch)
    want, _ = jax.jit(plain.update)(grads, plain.init(params), params, batch=batch)
    close(updates, want)
    assert kinds(new_state) == kinds(state)
    np.testing.assert_allclose(optax.tree.get(state, "learning_rate"), 0.1, rtol=1e-6)
    if injected == "hessian_free":
        np.testing.assert_allclose(optax.tree.get(state, "damping"), 0.1, rtol=1e-6)
    halved = optax.tree.set(state, learning_rate=jnp.float32(0.05))
    close(update(grads, halved, params, batch=batch)[0], optax.tree.scale(0.5, want))


def test_injected_damping_may_follow_a_schedule():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    kwargs = {**FUNCTIONS, "num_cg_steps": 2}
    tx = optax.inject_hyperparams(hessian_free, static_args=STATIC)(0.5, **kwargs, damping=schedule)
    params, batch, grads = start()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for damping in (1.0, 0.5):
        plain = hessian_free(0.5, **kwargs, damping=damping)
        updates, state = update(grads, state, params, batch=batch)
        close(updates, jax.jit(plain.update)(grads, plain.init(params), params, batch=batch)[0])


@pytest.mark.parametrize("injected", ["mlhf", "hessian_free"])
def test_a_loop_length_that_is_not_static_is_an_error_that_says_so(injected):
    factory, kwargs = INJECTED[injected]
    tx = optax.inject_hyperparams(factory, static_args=STATIC[:2])(0.5, **FUNCTIONS, **kwargs, num_cg_steps=2)
    params, batch, grads = start()
    with pytest.raises(TypeError, match=r"`num_cg_steps` must be a Python int.*`static_args`"):
        tx.update(grads, tx.init(params), params, batch=batch)


def test_multi_steps_takes_the_mean_gradient_and_the_last_curvature(name, tx):
    params, _, _ = start()
    batches = [problems.batch(seed) for seed in (1, 2)]
    grads = [jax.grad(problems.linear_loss)(params, batch) for batch in batches]
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    update, state = jax.jit(steps.update), steps.init(params)
    first, state = update(grads[0], state, params, batch=batches[0])
    assert not first["kernel"].any()
    second, state = update(grads[1], state, params, batch=batches[1])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    close(second, update_of(name)(mean, tx.init(params), params, batch=batches[1])[0])


def test_apply_if_finite_leaves_the_state_alone_when_a_gradient_is_not(name, tx):
    params, batch, grads = start()
    outer = optax.apply_if_finite(tx, max_consecutive_errors=3)
    update = jax.jit(outer.update)
    good, state = update(grads, outer.init(params), params, batch=batch)
    close(good, update_of(name)(grads, tx.init(params), params, batch=batch)[0])
    bad, after = update(jax.tree.map(lambda g: g * jnp.nan, grads), state, params, batch=batch)
    assert not bad["kernel"].any()
    equal(after.inner_state, state.inner_state)


@ALIASES
@pytest.mark.parametrize("search", ["backtracking", "zoom"])
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


@ALIASES
def test_frozen_parameters_are_frozen_behind_it(name):
    params, batch = problems.mlp_params(dtype=jnp.float32), problems.batch()
    tx = optax.chain(build(name, predict_fn=problems.mlp), optax.freeze({"Dense_0": True, "Dense_1": False}))
    grads = jax.grad(problems.mlp_loss)(params, batch)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["Dense_0"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(updates["Dense_1"]))


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


@pytest.mark.parametrize("name", ["mlhf", "scale_by_mlhf"])
def test_a_flattened_tree_has_no_names_and_fails(name):
    params, _, _ = start()
    with pytest.raises(
        ValueError, match=r"a bare array without a name.*A flattened tree \(`optax.flatten`\)"
    ):
        optax.flatten(build(name)).init(params)


def test_wrappers_that_drop_the_batch_fail_and_are_named(tx):
    params, batch, grads = start()
    dropping = optax.chain(optax.MultiSteps(tx, 2).gradient_transformation())
    with pytest.raises(
        TypeError, match=r"needs the batch.*`MultiSteps.gradient_transformation\(\)`.*drop it"
    ):
        dropping.update(grads, dropping.init(params), params, batch=batch)
