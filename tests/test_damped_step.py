"""What every damped step owes, whatever its controller: guards, derivatives, info, a user's controller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

from mlhf_optax import (
    LevenbergMarquardt,
    Model,
    SquaredError,
    gauss_newton,
    hessian_free,
    load_pretrained,
    mlhf,
    scale_by_damped_step,
)
from mlhf_optax.controllers import Control, Controller, Operators, Quotient, Scale, constant
from mlhf_optax.solvers import PCG

pytestmark = pytest.mark.usefixtures("unoptimised")

META_PARAMS = problems.random_meta_params(units=(2,))
ADAPTED = LevenbergMarquardt(0.1)


def make(name, rate=1.0, scale=1.0, loss_fn=problems.LOSS, predict_fn=problems.linear, **kwargs):
    """An optimizer of two CG steps; `scale` multiplies what chooses its damping, where that may be traced."""
    arguments = {"predict_fn": predict_fn, "loss_fn": loss_fn, "num_cg_steps": 2, **kwargs}
    if name in ("fixed", "adapted"):
        damping = 0.1 * scale if name == "fixed" else ADAPTED
        return hessian_free(rate, damping=damping, early_exit=False, **arguments)
    if name == "mlhf":
        meta_params = jax.tree.map(lambda x: scale * x, META_PARAMS)
        return mlhf(meta_params, learning_rate=rate, unroll=1, **arguments)
    return gauss_newton(rate, damping=2.0 * scale, metric=name, unroll=1, **arguments)


WARM = ("mlhf", "diagonal")  # the second is a metric of `gauss_newton`
ALL = (*WARM, "fixed", "adapted")


gradient = jax.jit(jax.grad(problems.linear_loss))


class Trained:
    """A jitted update, the state after its first step, and all that the second one needs."""

    def __init__(self, name):
        self.name = name
        after = {"momentum": 0.9, "weight_decay": 0.1} if name in WARM else {}
        self.tx = make(name, **after)
        self.params, batch = problems.linear_params(dtype=jnp.float32), problems.batch()
        # Inputs of this size make the problem so stiff that two steps are far from a solution.
        self.batch = {**batch, "image": 30 * batch["image"]}
        self.grads = gradient(self.params, self.batch)
        self.jitted = jax.jit(self.tx.update)
        self.updates, self.state = self.update(self.tx.init(self.params))

    def update(self, state, grads=None, batch=None, params=None):
        pick = lambda given, own: own if given is None else given
        grads, params = pick(grads, self.grads), pick(params, self.params)
        return self.jitted(grads, state, params, batch=pick(batch, self.batch))


@functools.cache
def trained(name):
    return Trained(name)


def is_zero(tree):
    return not any(leaf.any() for leaf in jax.tree.leaves(tree))


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def spoil(what, batch, grads, params):
    """Arguments of an update that must be skipped."""
    change = lambda tree, value: {"kernel": tree["kernel"].at[0, 0].set(value)}
    with_image = lambda value: {**batch, "image": batch["image"].at[0, 0].set(value)}
    return {
        "gradient": {"grads": change(grads, jnp.nan)},
        "infinite gradient": {"grads": change(grads, jnp.inf)},
        # Finite, but <g, g> is not: without this guard the old direction would be applied again.
        "huge gradient": {"grads": jax.tree.map(lambda g: jnp.full_like(g, 1e30), grads)},
        "loss": {"batch": with_image(jnp.inf), "grads": gradient(params, with_image(jnp.inf))},
        "GGN product": {"batch": with_image(jnp.inf)},
        "parameters": {"params": change(params, jnp.nan)},
    }[what]


SPOILED = ("gradient", "infinite gradient", "huge gradient", "loss", "GGN product", "parameters")


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize("name", ALL)
def test_an_unsound_step_changes_nothing_but_counters_and_training_goes_on(name, what):
    run = trained(name)
    updates, skipped = run.update(run.state, **spoil(what, run.batch, run.grads, run.params))
    assert is_zero(updates)
    before, after = run.state[0], skipped[0]
    assert (int(after.info.skipped_steps), int(after.count)) == (1, 1)
    if name == "fixed":
        assert int(after.controller) == int(before.controller) + 1
    elif name == "adapted":
        assert int(after.controller["count"]) == int(before.controller["count"]) + 1
        assert after.controller["damping"] == before.controller["damping"]
    else:
        assert_same(after.controller, before.controller)
    assert_same(after._replace(info=before.info, controller=before.controller), before)
    assert_same(skipped[1:], run.state[1:])
    # The next step is the one that would have been without the bad one.
    got, want = run.update(skipped), run.update(run.state)
    assert_same(got[0], want[0])
    assert (int(got[1][0].info.skipped_steps), int(got[1][0].count)) == (1, 2)


@pytest.mark.parametrize("name", ALL)
def test_at_an_optimum_nothing_moves_and_no_step_counts_as_skipped(name):
    run = trained(name)
    updates, state = run.update(run.state, grads=jax.tree.map(jnp.zeros_like, run.grads))
    assert is_zero(updates)
    assert int(state[0].info.skipped_steps) == 0
    updates, state = run.update(state)
    assert not is_zero(updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state[0].controller)))


@pytest.mark.parametrize("name", WARM)
def test_a_direction_that_is_not_one_of_descent_is_skipped_and_the_next_cg_starts_from_zero(name):
    run = trained(name)
    # A far start vector on the wrong side, which two steps do not bring back.
    far = jax.tree.map(lambda g: -1e4 * g, run.grads)
    state = (run.state[0]._replace(direction=far), *run.state[1:])
    updates, skipped = run.update(state)
    assert is_zero(updates)
    assert float(skipped[0].info.descent) < 0
    assert int(skipped[0].info.skipped_steps) == 1
    assert is_zero(skipped[0].direction)
    others = {"info": None, "direction": None}
    assert_same(skipped[0]._replace(**others), state[0]._replace(**others))
    assert_same(skipped[1:], state[1:])
    # So the same batch does not fail for ever, also if one that is not finite comes between.
    _, later = run.update(skipped, **spoil("loss", run.batch, run.grads, run.params))
    for state, num_skipped in ((skipped, 1), (later, 2)):
        updates, taken = run.update(state)
        assert optax.tree.vdot(updates, run.grads) < 0
        assert int(taken[0].info.skipped_steps) == num_skipped
        assert not is_zero(taken[0].direction)


def test_a_controller_state_that_is_not_finite_is_not_kept():
    run = trained("mlhf")
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), run.state[0].controller)
    updates, skipped = run.update((run.state[0]._replace(controller=broken), *run.state[1:]))
    assert is_zero(updates)
    assert int(skipped[0].info.skipped_steps) == 1


# Derivatives through a training.


@pytest.mark.parametrize("name", ALL)
def test_derivatives_through_a_training_are_those_without_its_skipped_step(name):
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(scale, batches, is_taken):
        """The loss after a training and its derivative by a factor on learning rate and damping."""
        tx = make(name, 0.2 * scale, scale)

        def step(carry, given):
            params, (batch, is_taken) = carry[0], given
            grads = jax.lax.stop_gradient(jax.grad(problems.linear_loss)(params, batch))
            updates, state = tx.update(grads, carry[1], params, batch=batch)
            after = optax.apply_updates(params, updates), state
            keep = lambda new, old: jnp.where(is_taken, new, old)
            return jax.tree.map(keep, after, carry), state[0].info.skipped_steps

        params = problems.linear_params(dtype=jnp.float32)
        (params, _), skipped = jax.lax.scan(step, (params, tx.init(params)), (batches, is_taken))
        return problems.linear_loss(params, problems.batch(9)), skipped[-1]

    batches = problems.batches(4)
    all_taken = np.ones(4, bool)
    (want, _), slope = run(1.0, problems.stack(batches), all_taken & (np.arange(4) != 1))
    assert abs(float(slope)) > 1e-4
    for value in (np.nan, np.inf, 1e30):  # with the last the gradient is finite, and its square is not
        batches[1]["image"][:, 0] = value
        (got, skipped), got_slope = run(1.0, problems.stack(batches), all_taken)
        assert int(skipped) == 1
        np.testing.assert_allclose([got, got_slope], [want, slope], rtol=1e-5)


@pytest.mark.parametrize("name", ["general", "kronecker"])
def test_a_gradient_out_of_all_proportion_does_not_stay_in_running_means(name):
    """One of 1e10 times its size stopped trainings for good."""
    tx = {
        "general": lambda: load_pretrained().optimizer(problems.mlp, problems.LOSS),
        "kronecker": lambda: gauss_newton(
            1.0,
            problems.mlp,
            problems.LOSS,
            metric="kronecker",
            damping=10,
            unit_decay=0.98,
            num_cg_steps=2,
            gradient_decay=0.86,
            max_growth=1,
        ),
    }[name]()
    batch = problems.batch(size=32)

    def losses(factor):
        def step(carry, index):
            params, state = carry
            loss, grads = jax.value_and_grad(problems.mlp_loss)(params, batch)
            grads = jax.tree.map(lambda g: jnp.where(index == 20, factor * g, g), grads)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        params = problems.mlp_params(dtype=jnp.float32)
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(200))[1]

    usual, spoilt = jax.jit(jax.vmap(losses))(jnp.array([1.0, 1e10]))
    assert spoilt[21:].max() < 3 * usual[20]
    assert spoilt[-1] < 0.5 * usual[20]
    assert usual[-1] < 0.5 * usual[20]


# Info.


@pytest.mark.parametrize("name", ALL)
def test_nothing_in_the_info_is_used_by_the_next_step(name):
    run = trained(name)
    garbage = jax.tree.map(
        lambda x: jnp.full_like(x, -7 if x.dtype == jnp.int32 else jnp.nan), run.state[0].info
    )
    got, want = run.update((run.state[0]._replace(info=garbage), *run.state[1:])), run.update(run.state)
    without_info = lambda result: (result[0], result[1][0]._replace(info=None), result[1][1:])
    assert_same(without_info(got), without_info(want))


@pytest.mark.parametrize("name", ["identity", "fixed"])
def test_a_training_that_blows_up_finitely_shows_it(name):
    # Three times a good step doubles the distance from the minimum.
    batch, params = {"label": jnp.ones(4)}, jnp.array([2.0, 0.5, 1.5, -1.0])
    predict_fn, loss_fn = lambda w, batch: w, SquaredError()
    bound = {"max_update_ratio": None} if name == "identity" else {}
    tx = make(name, 3.0, 1e-6, loss_fn, predict_fn, **bound)
    smoothed, seen = None, []
    steps = problems.training_steps(tx, params, [batch] * 20, lambda w, b: loss_fn(w, b))
    for _, state, loss in steps:
        smoothed = loss if smoothed is None else 0.9 * smoothed + 0.1 * loss
        seen.append(smoothed)
        info = state[0].info
        np.testing.assert_allclose([info.loss, info.smoothed_loss], [loss, smoothed], rtol=1e-5)
        np.testing.assert_allclose(info.best_loss, min(seen), rtol=1e-5)
    assert int(info.skipped_steps) == 0
    assert info.worst_rise == info.smoothed_loss / info.best_loss > 1e9
    # A loss that is not a number is shown, and is no part of the mean.
    _, state = jax.jit(tx.update)(jnp.full(4, jnp.nan), state, params, batch=batch)
    assert np.isnan(state[0].info.loss)
    assert_same(state[0].info[1:4], info[1:4])


def test_a_rise_is_remembered_and_losses_that_are_not_positive_do_not_count():
    params = jnp.ones(1)
    tx = make(
        "identity",
        loss_fn=lambda outputs, batch: batch["loss"] + 0 * outputs[0] ** 2,
        predict_fn=lambda w, b: w,
    )
    update, state = jax.jit(tx.update), tx.init(params)

    def worst(loss):
        nonlocal state
        _, state = update(jnp.ones(1), state, params, batch={"loss": jnp.float32(loss)})
        return float(state[0].info.worst_rise)

    assert worst(1.0) == 1.0
    assert worst(41.0) == pytest.approx(5.0)
    assert worst(0.1) == pytest.approx(5.0)
    for loss in [0.0] * 60:
        last = worst(loss)
    assert last == pytest.approx(5.0)
    assert worst(-100.0) == worst(100.0) == pytest.approx(5.0)


def test_the_loss_of_the_info_is_that_of_the_curvature_batch():
    params, batch = problems.linear_params(dtype=jnp.float32), problems.batch()
    tx = make("identity", curvature_batch_size=3)
    _, state = jax.jit(tx.update)(gradient(params, batch), tx.init(params), params, batch=batch)
    part = jax.tree.map(lambda x: x[:3], batch)
    np.testing.assert_allclose(state[0].info.loss, problems.linear_loss(params, part), rtol=1e-6)


# A controller of a user's own.


def gradient_sized(scale):
    """Damps each coordinate by the size of its gradient, and counts its steps."""

    def control(view, state):
        return Control(jax.tree.map(jnp.abs, view.gradient), state + 1)

    def operators(view, signal):
        damping = Scale(jax.tree.map(lambda size: scale * size + 0.1, signal))
        return Operators(damping, Quotient(damping.values))

    return Controller(lambda params: jnp.zeros((), jnp.int32), control, operators, is_warm_started=False)


def test_a_controller_of_a_users_own_takes_the_steps_it_asks_for(x64):
    params, batches = problems.mlp_params(), problems.batches(2)
    tx = scale_by_damped_step(
        gradient_sized(5.0), Model(problems.mlp, problems.LOSS), solver=PCG(40, unroll=1)
    )
    model, state, update = references.Model(), tx.init(params), jax.jit(tx.update)
    for number, batch in enumerate(batches, 1):
        w = problems.flat(params)
        g = model.gradient(w, batch)
        damping = 5.0 * np.abs(g) + 0.1
        want = np.linalg.solve(model.ggn(w, batch) + np.diag(damping), g)
        grads = jax.jit(jax.grad(problems.mlp_loss))(params, batch)
        direction, state = update(grads, state, params, batch=batch)
        np.testing.assert_allclose(problems.flat(direction), want, rtol=1e-7, atol=1e-10)
        assert (int(state.controller), int(state.count), int(state.info.skipped_steps)) == (number, number, 0)
        np.testing.assert_allclose(
            [state.info.damping_min, state.info.damping_mean, state.info.damping_max],
            [damping.min(), damping.mean(), damping.max()],
            rtol=1e-5,
        )
        params = jax.tree.map(lambda p, d: p - d, params, direction)
    assert jax.tree.leaves((state.direction, state.residual)) == []


def test_a_bounded_first_direction_without_a_preconditioner_is_an_error():
    controller = gradient_sized(5.0)._replace(is_warm_started=True)
    operators = lambda view, signal: gradient_sized(5.0).operators(view, signal)._replace(longest=1.0)
    tx = scale_by_damped_step(controller._replace(operators=operators), Model(problems.linear, problems.LOSS))
    params, batch = problems.linear_params(dtype=jnp.float32), problems.batch()
    with pytest.raises(ValueError, match="`longest` need a `preconditioner` and `damping_after_precond"):
        tx.update(gradient(params, batch), tx.init(params), params, batch=batch)


def test_a_controller_is_handed_what_it_keeps_of_the_step_before(x64):
    seen = []

    def control(view, state):
        jax.debug.callback(lambda *values: seen.append(values), view.direction, view.residual)
        return Control((), state)

    def operators(view, signal):
        scales = jax.tree.map(lambda p: jnp.full((), 2.0), view.params)
        return Operators(Scale(scales), Quotient(scales), damping_after_preconditioner=lambda r: r)

    controller = Controller(lambda params: (), control, operators, keeps_residual=True)
    params, batches = problems.mlp_params(), problems.batches(3)
    tx = scale_by_damped_step(controller, Model(problems.mlp, problems.LOSS), solver=PCG(2))
    model, state, update = references.Model(), tx.init(params), jax.jit(tx.update)
    for batch in batches:
        grads = jax.jit(jax.grad(problems.mlp_loss))(params, batch)
        before = state
        _, state = update(grads, state, params, batch=batch)
        jax.effects_barrier()
        kept = (before.direction, before.residual)
        # The callback is handed float32.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), seen[-1], kept)
        w, d = problems.flat(params), problems.flat(state.direction)
        residual = model.gradient(w, batch) - model.ggn(w, batch) @ d - 2 * d
        np.testing.assert_allclose(problems.flat(state.residual), residual, rtol=1e-7, atol=1e-10)
    # A bad batch leaves them, and an optimum has no direction.
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    _, kept = update(bad, state, params, batch=batch)
    assert_same((kept.direction, kept.residual), (state.direction, state.residual))
    _, at_rest = update(jax.tree.map(jnp.zeros_like, grads), state, params, batch=batch)
    assert not any(map(np.any, jax.tree.leaves(at_rest.direction)))


@pytest.mark.parametrize(("solver", "got"), [(PCG, "the class PCG"), (4, "int")])
def test_a_solver_that_is_none_is_an_error(solver, got):
    model = Model(problems.mlp, problems.LOSS)
    with pytest.raises(TypeError, match=rf"`solver` must be an object such as .*, got {got}"):
        scale_by_damped_step(constant(0.1), model, solver=solver)
