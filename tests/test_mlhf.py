"""The transformation against Algorithm 1 in NumPy, and what it does when something goes wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

from mlhf_optax import (
    AUTHORS_SETTINGS,
    PAPER_SETTINGS,
    Settings,
    SquaredError,
    init_meta_params,
    layer_types,
    mlhf,
    scale_by_mlhf,
)

# Together they cover every value of every setting.
SETTINGS = {
    "paper": PAPER_SETTINGS,
    "authors": AUTHORS_SETTINGS,
    "log-exp-jacobi": Settings(preconditioner_form="jacobi", damping_floor=1e-2, output_scale=2.0),
    "global-exp-multiply": Settings(
        input_features="log-global",
        preconditioner_form="multiply",
        initial_preconditioner=0.1,
        log_range=7.0,
        gradient_power=0.5,
        parameter_power=0.7,
    ),
    "tanh-exp-current": Settings(
        input_features="tanh", initial_damping=10.0, output_scale=1.0, preconditioner_residual="current"
    ),
}


@pytest.mark.parametrize(("name", "max_update_ratio"), [*((n, None) for n in SETTINGS), ("paper", 0.05)])
def test_ten_steps_agree_with_algorithm_1_in_numpy(x64, name, max_update_ratio):
    meta_params = problems.random_meta_params(SETTINGS[name])
    meta_params = jax.tree.map(lambda x: x.astype(jnp.float64), meta_params)
    params = problems.mlp_params()
    batches = problems.batches(10)
    expected = references.naive_mlhf(
        meta_params,
        references.Model(),
        problems.flat(params),
        batches,
        learning_rate=0.7,
        max_update_ratio=max_update_ratio,
    )
    tx = mlhf(
        0.7,
        meta_params,
        problems.mlp,
        problems.LOSS,
        max_update_ratio=max_update_ratio,
        carry_dtype=jnp.float64,
    )

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(problems.mlp_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for batch, reference in zip(batches, expected, strict=True):
        params, state, loss = step(params, state, batch)
        own = state[0]
        close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
        close(loss, reference.loss)
        close(problems.flat(own.direction), reference.direction)
        close(problems.flat(own.residual), reference.residual)
        close(problems.flat(params), reference.w_next)
        info = own.info
        damping, preconditioner = reference.damping, reference.preconditioner
        # The statistics are float32.
        near = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5)
        near(info.damping_min, damping.min())
        near(info.damping_mean, damping.mean())
        near(info.damping_max, damping.max())
        near(info.preconditioner_min, preconditioner.min())
        near(info.preconditioner_mean, preconditioner.mean())
        near(info.preconditioner_max, preconditioner.max())
        near(info.descent, reference.direction @ reference.gradient)
        near(info.cg_residual_norm, np.linalg.norm(reference.residual))
    assert int(state[0].count) == 10
    assert int(state[0].info.skipped_steps) == 0


# Steps that must not be taken.


def make(learning_rate=1.0, **kwargs):
    return mlhf(learning_rate, problems.random_meta_params(), problems.linear, problems.LOSS, **kwargs)


@pytest.fixture(scope="module")
def training():
    """A jitted update of two steps on the small network, and all that the second step needs."""
    tx, params, batch = make(num_cg_steps=2), problems.linear_params(dtype=jnp.float32), problems.batch()
    # Inputs of this size make the problem so stiff that two steps are far from a solution.
    batch = {**batch, "image": 30 * batch["image"]}
    update = jax.jit(tx.update)
    grads = jax.grad(problems.linear_loss)(params, batch)
    _, state = update(grads, tx.init(params), params, batch=batch)
    return update, params, state, grads, batch


def spoil(what, params, grads, batch):
    """Arguments of an update that must be skipped."""
    nan_at_one = lambda tree: jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), tree)
    if what == "gradient":
        grads = nan_at_one(grads)
    elif what == "infinite gradient":
        grads = jax.tree.map(lambda g: g.at[0].set(jnp.inf), grads)
    elif what == "loss":  # overflows in the forward pass
        batch = {**batch, "image": batch["image"].at[0, 0].set(jnp.inf)}
        grads = jax.grad(problems.linear_loss)(params, batch)
    elif what == "direction":  # only the GGN product is not finite
        batch = {**batch, "image": batch["image"].at[0, 0].set(jnp.inf)}
    elif what == "parameters":
        params = nan_at_one(params)
    elif what == "zero gradient":
        grads = jax.tree.map(jnp.zeros_like, grads)
    return params, grads, batch


def assert_only_the_counter_moved(before, after):
    old, new = before[0], after[0]
    assert int(new.info.skipped_steps) == int(old.info.skipped_steps) + 1
    jax.tree.map(np.testing.assert_array_equal, new._replace(info=old.info), old)
    jax.tree.map(np.testing.assert_array_equal, before[1:], after[1:])


@pytest.mark.parametrize(
    "what", ["gradient", "infinite gradient", "loss", "direction", "parameters", "zero gradient"]
)
def test_an_unsound_step_changes_nothing_but_a_counter_and_training_goes_on(training, what):
    update, params, state, grads, batch = training
    bad_params, bad_grads, bad_batch = spoil(what, params, grads, batch)
    updates, skipped = update(bad_grads, state, bad_params, batch=bad_batch)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert_only_the_counter_moved(state, skipped)
    # The next step is the one that would have been without the bad one.
    got, want = (update(grads, s, params, batch=batch) for s in (skipped, state))
    jax.tree.map(np.testing.assert_array_equal, got[0], want[0])
    assert int(got[1][0].info.skipped_steps) == 1
    assert int(got[1][0].count) == 2


def test_a_direction_that_is_not_one_of_descent_is_skipped(training):
    update, params, state, grads, batch = training
    # A far start vector on the wrong side, which two steps do not bring back.
    far = jax.tree.map(lambda g: -1e4 * g, grads)
    state = (state[0]._replace(direction=far), *state[1:])
    updates, skipped = update(grads, state, params, batch=batch)
    assert float(skipped[0].info.descent) < 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert_only_the_counter_moved(state, skipped)
    # The next step starts from zero, so that the same batch does not fail for ever.
    updates, taken = update(grads, skipped, params, batch=batch)
    assert optax.tree.vdot(updates, grads) < 0
    assert int(taken[0].info.skipped_steps) == 1


def test_a_carry_that_is_not_finite_is_not_kept(training):
    update, params, state, grads, batch = training
    carry = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state[0].damping_carry)
    broken = (state[0]._replace(damping_carry=carry), *state[1:])
    updates, skipped = update(grads, broken, params, batch=batch)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert int(skipped[0].info.skipped_steps) == 1


# Options.


def run(tx, num_steps=6, batch=None):
    """Parameters, last state and the losses of a training on one batch."""
    params, batch = problems.linear_params(dtype=jnp.float32), problems.batch() if batch is None else batch

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(problems.linear_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(num_steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return params["kernel"], state, losses


def test_curvature_on_part_of_the_batch_is_that_of_the_part():
    batch = problems.batch()
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)  # same gradient, same curvature
    whole, _, _ = run(make(), 3, batch)
    for part in (0.5, 8, lambda b: jax.tree.map(lambda x: x[8:], b)):
        half, _, _ = run(make(curvature_batch_size=part), 3, doubled)
        np.testing.assert_allclose(half, whole, rtol=1e-3)
    other, _, _ = run(make(curvature_batch_size=2), 3, doubled)
    assert not np.allclose(other, whole, rtol=1e-2)


def test_low_precision_carries_change_the_state_and_hardly_the_training():
    _, state, losses = run(make(carry_dtype=jnp.bfloat16))
    carries = state[0].damping_carry, state[0].preconditioner_carry
    assert {leaf.dtype for leaf in jax.tree.leaves(carries)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(losses, run(make())[2], rtol=0.05)


def test_the_learning_rate_may_be_a_schedule():
    constant, _, _ = run(make(optax.constant_schedule(0.5)), 3)
    np.testing.assert_array_equal(constant, run(make(0.5), 3)[0])
    stopped, _, _ = run(make(optax.piecewise_constant_schedule(0.5, {1: 0.0})), 3)
    np.testing.assert_array_equal(stopped, run(make(0.5), 1)[0])


def test_weight_decay_is_added_to_the_direction():
    before = problems.linear_params(dtype=jnp.float32)["kernel"]
    plain, decayed = (run(make(0.5, weight_decay=x, max_update_ratio=None), 1)[0] for x in (0.0, 0.1))
    np.testing.assert_allclose(decayed, plain - 0.5 * 0.1 * before, rtol=1e-5)


def test_a_training_on_one_stiff_batch_is_not_stuck_after_a_skipped_step():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 20)) * np.geomspace(1.0, 100.0, 20)
    batch = {"x": jnp.asarray(features), "label": jnp.asarray(features @ rng.normal(size=(20, 1)))}
    predict_fn, loss_fn = lambda p, b: b["x"] @ p["kernel"], SquaredError()
    tx = mlhf(1.0, problems.random_meta_params(seed=1), predict_fn, loss_fn, max_update_ratio=None)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    params = {"kernel": jnp.zeros((20, 1))}
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=200))
    (_, state), losses = train((params, tx.init(params)))
    assert 0 < int(state[0].info.skipped_steps) < 100
    assert losses[-1] < 1e-3 * losses[20] < 1e-3 * losses[0]


def test_a_skipped_step_does_not_decay_the_weights_either():
    tx = make(weight_decay=0.1)
    params, batch = problems.linear_params(dtype=jnp.float32), problems.batch()
    grads = {"kernel": jnp.full((3, 2), jnp.nan)}
    updates, _ = tx.update(grads, tx.init(params), params, batch=batch)
    assert not updates["kernel"].any()


def test_more_cg_steps_leave_less_of_the_residual():
    norms = [float(run(make(num_cg_steps=k), 1)[1][0].info.cg_residual_norm) for k in (1, 2, 4)]
    assert norms[0] > 2 * norms[1] > 4 * norms[2]


def test_the_layer_types_may_be_given():
    params = {"table": jnp.full((3, 2), 0.1)}
    predict_fn = lambda p, batch: batch["image"] @ p["table"]
    meta_params, batch = problems.random_meta_params(), problems.batch()
    with pytest.raises(ValueError, match=r"parameter 'table' of shape \(3, 2\).*`layer_types_fn="):
        scale_by_mlhf(meta_params, predict_fn, problems.LOSS).init(params)
    rules = functools.partial(layer_types, rules={"table": "dense_kernel"})
    tx = scale_by_mlhf(meta_params, predict_fn, problems.LOSS, layer_types_fn=rules)
    named = scale_by_mlhf(meta_params, lambda p, b: b["image"] @ p["kernel"], problems.LOSS)
    grads = jax.grad(lambda p: problems.LOSS(predict_fn(p, batch), batch))(params)
    direction, _ = tx.update(grads, tx.init(params), params, batch=batch)
    renamed = lambda tree: {"kernel": tree["table"]}
    want, _ = named.update(renamed(grads), named.init(renamed(params)), renamed(params), batch=batch)
    np.testing.assert_allclose(direction["table"], want["kernel"], rtol=1e-5)


def test_damping_of_the_dimension_of_curvature_does_not_depend_on_the_scale_of_the_parameters(x64):
    # Untrained LSTMs see nothing, so all that is left is the unit of s and P.
    settings = Settings(gradient_power=1.0, parameter_power=1.0, initial_damping=4.0)
    meta_params = init_meta_params(jax.random.key(0), settings)
    params, batch = problems.mlp_params(dtype=jnp.float64), problems.batch()

    def direction(scale):
        predict_fn = lambda p, b: problems.mlp(jax.tree.map(lambda x: scale * x, p), b)
        scaled = jax.tree.map(lambda x: x / scale, params)
        grads = jax.grad(lambda p: problems.LOSS(predict_fn(p, batch), batch))(scaled)
        tx = scale_by_mlhf(meta_params, predict_fn, problems.LOSS)
        found, _ = tx.update(grads, tx.init(scaled), scaled, batch=batch)
        return problems.flat(jax.tree.map(lambda x: scale * x, found))

    np.testing.assert_allclose(direction(0.1), direction(1.0), rtol=1e-9)


# Errors.


def test_meta_parameters_that_do_not_know_a_layer_type_are_an_error():
    meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel", "conv_kernel"])
    message = r"layer types \['dense_bias'\].*trained for \['conv_kernel', 'dense_kernel'\].*`layer_types_fn="
    with pytest.raises(ValueError, match=message):
        scale_by_mlhf(meta_params, problems.mlp, problems.LOSS).init(problems.mlp_params())


def test_arguments_of_a_wrong_type_or_range_are_errors_that_name_them():
    meta_params = problems.random_meta_params()
    build = lambda *args, **kwargs: scale_by_mlhf(
        *(args or (meta_params, problems.mlp, problems.LOSS)), **kwargs
    )
    with pytest.raises(TypeError, match=r"`meta_params` must be a MetaParams, got dict.*load_pretrained"):
        build({}, problems.mlp, problems.LOSS)
    with pytest.raises(TypeError, match="`predict_fn` must be a function, got str"):
        build(meta_params, "mlp", problems.LOSS)
    with pytest.raises(TypeError, match="`loss_fn` must be a function, got NoneType"):
        build(meta_params, problems.mlp, None)
    with pytest.raises(TypeError, match="`num_cg_steps` must be a Python int"):
        build(num_cg_steps=4.0)
    with pytest.raises(ValueError, match="`num_cg_steps` must be at least 1"):
        build(num_cg_steps=0)
    with pytest.raises(ValueError, match="`curvature_batch_size` as a fraction"):
        build(curvature_batch_size=1.5)
    with pytest.raises(ValueError, match="`max_update_ratio` must be positive"):
        mlhf(1.0, meta_params, problems.mlp, problems.LOSS, max_update_ratio=0.0)


def test_the_meta_losses_of_the_reference_meet_their_definitions():
    """Solved exactly, l_p is minus the mean of |g| in the norm of the inverse of H: its least value."""
    batches = problems.batches(4)
    w = problems.flat(problems.mlp_params())
    run = functools.partial(
        references.naive_mlhf,
        problems.random_meta_params(),
        references.Model(),
        w,
        batches,
        learning_rate=0.5,
    )
    steps = run(num_cg_steps=20, num_steps=3)
    norms = [np.sqrt(s.gradient @ np.linalg.solve(s.matrix, s.gradient)) for s in steps]
    np.testing.assert_allclose(references.preconditioner_loss(steps), -np.mean(norms), rtol=1e-6)
    assert references.preconditioner_loss(run(num_cg_steps=1, num_steps=3)) > -np.mean(norms)
    terms = references.damping_losses(steps)
    model, first = references.Model(), steps[0]
    before, after = model.loss(first.w, batches[0]), model.loss(first.w_next, batches[0])
    np.testing.assert_allclose(terms[0], model.loss(first.w_next, batches[1]) + after - 2 * before)
    assert terms.mean() < references.damping_loss(steps) < terms.max()
