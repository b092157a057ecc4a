"""Hessian-free directions against dense solves, and its damping against a second implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

from mlhf_optax import LevenbergMarquardt, Model, SquaredError, hessian_free, scale_by_hessian_free
from mlhf_optax.controllers import Outcome, Scale, View
from mlhf_optax.controllers.levenberg_marquardt import reduction_ratio

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks", "unoptimised")


def direction_of(tx, params, batch):
    grads = jax.jit(jax.grad(problems.mlp_loss))(params, batch)
    direction, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
    return problems.flat(direction), state, problems.flat(grads)


@pytest.mark.parametrize("early_exit", [True, False])
def test_the_direction_solves_the_damped_system(early_exit):
    params, batch = problems.mlp_params(), problems.batch()
    tx = scale_by_hessian_free(
        Model(problems.mlp, problems.LOSS),
        damping=0.25,
        num_cg_steps=60,
        tolerance=1e-10,
        early_exit=early_exit,
    )
    direction, state, gradient = direction_of(tx, params, batch)
    model, w = references.Model(), problems.flat(params)
    matrix = model.ggn(w, jax.tree.map(np.asarray, batch)) + 0.25 * np.eye(w.size)
    np.testing.assert_allclose(direction, np.linalg.solve(matrix, gradient), rtol=1e-7, atol=1e-10)
    assert float(state.info.cg_residual_norm) < 1e-10
    assert 5 < int(state.info.cg_steps) < 40
    np.testing.assert_allclose(state.info.descent, direction @ gradient, rtol=1e-6)
    assert (int(state.count), int(state.info.skipped_steps), float(state.info.reduction_ratio)) == (1, 0, 0)


def test_the_defaults_are_those_of_the_paper():
    """20 steps of plain CG from zero, tolerance 1e-5."""
    params, batch = problems.mlp_params(), problems.batch()
    direction, state, gradient = direction_of(
        hessian_free(1.0, problems.mlp, problems.LOSS, damping=1e-6), params, batch
    )
    model, w = references.Model(), problems.flat(params)
    matrix = model.ggn(w, jax.tree.map(np.asarray, batch)) + 1e-6 * np.eye(w.size)
    start, ones = np.zeros(w.size), np.ones(w.size)
    steps = int(state[0].info.cg_steps)
    residual_after = lambda k: np.linalg.norm(references.naive_pcg(matrix, gradient, start, ones, k)[1])
    assert steps == 20 or residual_after(steps) < 1e-5 <= residual_after(steps - 1)
    want, _ = references.naive_pcg(matrix, gradient, start, ones, steps)
    np.testing.assert_allclose(-direction, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_curvature_may_be_taken_on_part_of_the_batch():
    params, batch = problems.mlp_params(), problems.batch(size=8)
    kwargs = {"damping": 0.25, "num_cg_steps": 60, "tolerance": 1e-10}
    tx = scale_by_hessian_free(Model(problems.mlp, problems.LOSS, curvature_batch_size=0.25), **kwargs)
    direction, _, gradient = direction_of(tx, params, batch)
    part = jax.tree.map(lambda x: np.asarray(x)[::4], batch)
    matrix = references.Model().ggn(problems.flat(params), part) + 0.25 * np.eye(gradient.size)
    np.testing.assert_allclose(direction, np.linalg.solve(matrix, gradient), rtol=1e-7, atol=1e-10)


# Levenberg-Marquardt.


def naive_levenberg_marquardt(rule, learning_rates, w, batches, num_cg_steps):
    """Parameters, ratios and damping of every step, in NumPy with dense matrices."""
    model, damping, trace = references.Model(), rule.initial_damping, []
    for t, batch in enumerate(batches):
        g, ggn, lr = model.gradient(w, batch), model.ggn(w, batch), float(learning_rates(t))
        matrix = ggn + damping * np.eye(w.size)
        d, _ = references.naive_pcg(matrix, g, np.zeros(w.size), np.ones(w.size), num_cg_steps)
        w_next = w - lr * d
        predicted = -lr * (g @ d) + 0.5 * lr**2 * (d @ ggn @ d)
        ratio = (model.loss(w_next, batch) - model.loss(w, batch)) / predicted
        if ratio < rule.low:
            damping = min(rule.max_damping, damping / rule.decay)
        elif ratio > rule.high:
            damping = max(rule.min_damping, damping * rule.decay)
        trace.append((w_next, ratio, damping))
        w = w_next
    return trace


@pytest.mark.parametrize(
    ("rule", "learning_rate"),
    [
        (LevenbergMarquardt(initial_damping=0.25, decay=2 / 3), 1.0),
        (
            LevenbergMarquardt(0.05, 0.5, low=0.97, high=0.99, max_damping=0.1),
            optax.linear_schedule(1.0, 0.1, 6),
        ),
    ],
    ids=["constant", "schedule"],
)
def test_adapted_damping_agrees_with_a_second_implementation(rule, learning_rate):
    params, batches = problems.mlp_params(), problems.batches(8)
    tx = hessian_free(learning_rate, problems.mlp, problems.LOSS, damping=rule, num_cg_steps=4, tolerance=0.0)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(problems.mlp_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    rates = learning_rate if callable(learning_rate) else lambda t: learning_rate
    expected = naive_levenberg_marquardt(rule, rates, problems.flat(params), batches, 4)
    state, seen = tx.init(params), set()
    for batch, (w, ratio, damping) in zip(batches, expected, strict=True):
        before = float(state[0].controller["damping"])
        params, state = step(params, state, batch)
        # Damping is kept in float32.
        np.testing.assert_allclose(problems.flat(params), w, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state[0].info.reduction_ratio, ratio, rtol=1e-4)
        np.testing.assert_allclose(state[0].controller["damping"], damping, rtol=1e-6)
        seen.add(np.sign(float(state[0].controller["damping"]) - before))
    assert len(seen) > 1


def ratio_of(loss, w, gradient, direction, residual, damping, step_size):
    """The reduction ratio and the loss after the step; of what a step sees only these are needed."""
    view = View(w, gradient, None, None, None, loss(w), loss, None, None)
    outcome = Outcome(direction, residual, jnp.array(True))
    scale = Scale(jax.tree.map(lambda _: jnp.asarray(damping), w))
    ratio, _, new_loss = reduction_ratio(view, outcome, scale, step_size)
    return ratio, new_loss


@pytest.mark.parametrize("step_size", [0.1, 1.0, 1.5])
def test_the_ratio_of_a_quadratic_is_one_for_every_step_size(step_size):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, 4))
    ggn, w = jnp.asarray(factor @ factor.T), jnp.asarray(rng.normal(size=4))
    direction = jnp.linalg.solve(ggn + 0.5 * jnp.eye(4), ggn @ w)
    residual = jnp.asarray(rng.normal(size=4))  # the identity G d = g - r - damping d holds for any d
    gradient = ggn @ direction + 0.5 * direction + residual
    loss = lambda v: 0.5 * (v - w) @ ggn @ (v - w) + gradient @ (v - w)
    ratio, new_loss = ratio_of(loss, w, gradient, direction, residual, 0.5, step_size)
    np.testing.assert_allclose(ratio, 1.0, rtol=1e-5)
    np.testing.assert_allclose(new_loss, loss(w - step_size * direction), rtol=1e-5)


def test_a_model_that_promises_nothing_is_no_guide():
    one = jnp.ones(1)  # G = 1, g = 1: at 3 d the model is above its start
    assert ratio_of(jnp.sum, one, one, one, 0 * one, 0.0, 3.0)[0] == 0


@pytest.mark.parametrize(
    ("ratio", "want"),
    [
        (0.9, 0.05),
        (0.75, 0.1),
        (0.5, 0.1),
        (0.25, 0.1),
        (0.2, 0.2),
        (-3.0, 0.2),
        (np.nan, 0.2),
        (-np.inf, 0.2),
    ],
)
def test_damping_shrinks_above_three_quarters_and_grows_below_one_quarter(ratio, want):
    rule = LevenbergMarquardt(initial_damping=0.1, decay=0.5)
    np.testing.assert_allclose(rule.adapt(jnp.asarray(0.1), jnp.asarray(ratio)), want, rtol=1e-6)
    # Within its bounds.
    rule = LevenbergMarquardt(initial_damping=0.1, decay=0.5, min_damping=0.08, max_damping=0.15)
    bounded = np.clip(want, 0.08, 0.15)
    np.testing.assert_allclose(rule.adapt(jnp.asarray(0.1), jnp.asarray(ratio)), bounded, rtol=1e-6)


def test_a_step_to_a_loss_that_is_not_finite_is_not_taken_and_damping_grows_until_one_can_be():
    # The full step leads from w = 1 to where the logarithm does not exist.
    predict_fn, loss_fn = lambda w, batch: jnp.log(w), SquaredError()
    batch, params = {"label": jnp.full(1, -10.0)}, jnp.ones(1)
    tx = hessian_free(1.0, predict_fn, loss_fn, damping=LevenbergMarquardt(0.5, 0.5, max_damping=100.0))
    loss = lambda w: loss_fn(predict_fn(w, batch), batch)
    step = jax.jit(lambda w, state: tx.update(jax.grad(loss)(w), state, w, batch=batch))
    state = tx.init(params)
    for refused in range(1, 6):
        updates, state = step(params, state)
        assert int(state[0].info.skipped_steps) == refused
        assert not updates.any()
        np.testing.assert_allclose(state[0].controller["damping"], 0.5 * 2.0**refused)
    updates, state = step(params, state)  # damping 16: d = 10 / 17
    assert int(state[0].info.skipped_steps) == 5
    assert loss(params + updates) < loss(params)


# Errors.


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"num_cg_steps": 0}, ValueError, "`num_cg_steps` must be at least 1"),
        ({"num_cg_steps": 4.0}, TypeError, "`num_cg_steps` must be a Python int"),
        ({"damping": -1}, ValueError, "`damping` must be a number >= 0, got -1"),
        (
            {"damping": "LM"},
            TypeError,
            "`damping` must be a number, a schedule or a LevenbergMarquardt rule, got str",
        ),
        ({"tolerance": float("nan")}, ValueError, "`tolerance` must be a number >= 0, got nan"),
        ({"curvature_batch_size": 0}, ValueError, "`curvature_batch_size`"),
        ({"predict_fn": 3}, TypeError, "`predict_fn` must be a function, got int"),
        ({"loss_fn": None}, TypeError, "`loss_fn` must be a function, got NoneType"),
    ],
)
def test_an_argument_out_of_range_is_an_error_that_names_it(wrong, error, message):
    with pytest.raises(error, match=message):
        hessian_free(1.0, **{"predict_fn": problems.mlp, "loss_fn": problems.LOSS} | wrong)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decay": 1.0}, "`decay` must be strictly between 0 and 1, got 1.0"),
        ({"decay": 0.0}, "`decay`"),
        ({"low": 0.8}, "`low` must be below `high`, 0.75, got 0.8"),
        (
            {"initial_damping": 10.0},
            "`initial_damping` must be from `min_damping` to `max_damping`, from 0.001 to 1.0, got 10.0",
        ),
        (
            {"min_damping": 0.0},
            "`min_damping` must be above 0 and at most `max_damping`, 1.0, got 0.0",
        ),
    ],
)
def test_a_rule_out_of_range_is_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**kwargs)
