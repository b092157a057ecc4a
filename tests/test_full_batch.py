"""One word for losses without noise: `load_pretrained().optimizer(..., full_batch=True)`."""

import warnings

import jax
import jax.numpy as jnp
import nist
import numpy as np
import optax
import problems
import pytest
from jax.flatten_util import ravel_pytree

from mlhf_optax import (
    LevenbergMarquardt,
    Model,
    SquaredError,
    hessian_free,
    load_pretrained,
    scale_by_damped_step,
)
from mlhf_optax.controllers import scheduled
from mlhf_optax.curvature import ggn_matvec
from mlhf_optax.solvers import Exact, TolerancePCG

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def general():
    return load_pretrained()


def train(tx, model, params, batch, steps):
    """Returns the losses before every step, the parameters and the info."""

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(model.loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))
    (params, state), losses = run((params, tx.init(params)))
    return np.asarray(losses), params, optax.tree.get(state, "info")


def tanh_network(widths, dtype="float64"):
    keys = jax.random.split(jax.random.key(0), len(widths))
    shapes = zip(keys, widths[:-1], widths[1:], strict=False)
    return [jax.random.normal(key, (m, n), dtype) / m**0.5 for key, m, n in shapes]


def predict_fn(params, batch):
    z = batch["x"]
    for kernel in params[:-1]:
        z = jnp.tanh(z @ kernel)
    return (z @ params[-1])[:, 0]


MODEL = Model(predict_fn, SquaredError())


def regression(count, features=3, dtype="float64"):
    x = np.random.default_rng(0).normal(size=(count, features)).astype(dtype)
    return {"x": jnp.asarray(x), "label": jnp.sin(2 * x[:, 0]) * jnp.asarray(x[:, 1])}


def test_a_network_is_fitted_to_rounding_without_a_choice(general):
    params, batch = tanh_network((3, 16, 8, 1)), regression(30)
    tx = general.optimizer(*MODEL_FUNCTIONS, full_batch=True)
    losses, _, info = train(tx, MODEL, params, batch, 60)
    assert np.all(np.diff(losses) <= 0)
    assert losses[-1] < 1e-20
    assert int(info.skipped_steps) == 0
    assert int(info.changed_batches) == 0


MODEL_FUNCTIONS = (predict_fn, SquaredError())
HARD = ("MGH09", "Thurber", "BoxBOD", "Rat42", "MGH10", "Eckerle4", "Rat43", "Bennett5")


@pytest.mark.parametrize("name", HARD)
def test_fits_of_higher_difficulty_have_the_certified_sum_of_squares(name, general):
    fit = nist.load()[name]
    tx = general.optimizer(fit.predict_fn, nist.loss_fn, full_batch=True)
    losses, _, _ = train(tx, Model(fit.predict_fn, nist.loss_fn), fit.starts[1], fit.batch, 300)
    assert nist.is_right(losses[-1], fit.sum_of_squares)
    assert losses[-1] > 0.999 * fit.sum_of_squares


def test_models_and_certified_values_belong_together():
    record = nist.load()
    assert len(record) == 27
    for name, fit in record.items():
        found = float(nist.loss_fn(fit.predict_fn(fit.certified, fit.batch), fit.batch))
        assert nist.is_right(found, fit.sum_of_squares, digits=5), name


def solution_of(solver, model, params, batch, damping=1e-3):
    tx = scale_by_damped_step(scheduled(damping), model, solver=solver)
    gradient = jax.jit(jax.grad(model.loss))(params, batch)
    direction, state = jax.jit(tx.update)(gradient, tx.init(params), params, batch=batch)
    return problems.flat(direction), state


@pytest.mark.parametrize("case", ["regression", "classes", "an unused output"])
def test_both_spaces_have_the_same_direction(case):
    params, batch = tanh_network((3, 16, 8, 1)), regression(20)
    model = MODEL
    if case == "classes":
        params, batch = problems.mlp_params(), problems.batch(size=8)
        model = Model(problems.mlp, problems.LOSS)
    if case == "an unused output":
        only = lambda z, batch: jnp.mean(jnp.where(jnp.arange(20) < 15, (z - batch["label"]) ** 2, 0.0))
        model = Model(predict_fn, only)
    want, _ = solution_of(Exact(space="parameters"), model, params, batch)
    got, state = solution_of(Exact(space="outputs"), model, params, batch)
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)
    assert float(state.info.cg_residual_norm) < 1e-10


def test_the_acceleration_is_half_of_what_the_bend_adds():
    params, batch = tanh_network((3, 4, 1)), regression(30)
    plain, _ = solution_of(Exact(), MODEL, params, batch, 1.0)
    got, _ = solution_of(Exact(acceleration=100.0), MODEL, params, batch, 1.0)
    flat, unravel = ravel_pytree(params)
    outputs = lambda v: predict_fn(unravel(v), batch)
    jacobian = jax.jacobian(outputs)(flat)
    bend = jax.jacfwd(jax.jacfwd(lambda t: outputs(flat + t * plain)))(0.0)
    matrix = ggn_matvec(predict_fn, SquaredError(), params, batch).matrix + jnp.eye(flat.size)
    scale = ggn_matvec(lambda z, b: z, SquaredError(), batch["label"], batch).matrix[0, 0]
    np.testing.assert_allclose(
        got, plain + jnp.linalg.solve(matrix, scale * jacobian.T @ bend) / 2, rtol=1e-8
    )
    far, _ = solution_of(Exact(acceleration=1e-9), MODEL, params, batch, 1.0)
    np.testing.assert_array_equal(far, plain)


def test_a_relative_tolerance_is_a_share_of_the_right_hand_side():
    params, batch = tanh_network((3, 16, 1)), regression(50)
    norm = float(jnp.linalg.norm(problems.flat(jax.grad(MODEL.loss)(params, batch))))
    _, state = solution_of(TolerancePCG(500, 1e-3, is_relative=True), MODEL, params, batch)
    assert float(state.info.cg_residual_norm) < 1e-3 * norm
    assert 1 < int(state.info.cg_steps) < 500
    idle, _ = solution_of(TolerancePCG(12, 1e-3, early_exit=False, is_relative=True), MODEL, params, batch)
    left, _ = solution_of(TolerancePCG(12, 1e-3, is_relative=True), MODEL, params, batch)
    np.testing.assert_allclose(idle, left, rtol=1e-9)


def test_large_problems_are_solved_by_cg(monkeypatch, general):
    monkeypatch.setattr("mlhf_optax.dense.MAX_OPERATIONS", 10)
    params, batch = tanh_network((3, 16, 1)), regression(50)
    tx = general.optimizer(*MODEL_FUNCTIONS, full_batch=True)
    losses, _, info = train(tx, MODEL, params, batch, 40)
    assert int(info.cg_steps) > 1
    assert losses[-1] < 0.1 * losses[0]
    assert np.all(np.diff(losses) <= 0)


def test_refused_steps_are_counted_apart_from_skipped_ones():
    fit, batch = lambda p, batch: jnp.arctan(batch["x"] * p), {"x": jnp.ones(1), "label": jnp.zeros(1)}
    rule = LevenbergMarquardt.without_noise(initial_damping=1e-6)
    tx = hessian_free(1.0, fit, SquaredError(), damping=rule, solver=Exact())
    model, params = Model(fit, SquaredError()), jnp.full((1,), 3.0)
    _, params, info = train(tx, model, params, batch, 1)
    assert (int(info.refused_steps), int(info.skipped_steps)) == (1, 0)
    np.testing.assert_array_equal(params, 3.0)
    bad = jax.tree.map(lambda leaf: jnp.nan * leaf, batch)
    _, _, info = train(tx, model, params, bad, 1)
    assert (int(info.refused_steps), int(info.skipped_steps)) == (0, 1)


def test_the_first_step_of_a_fit_is_as_long_as_the_radius_and_later_ones_follow_the_ratio():
    fit = nist.load()["Misra1a"]
    rule = LevenbergMarquardt.without_noise()
    model, start = Model(fit.predict_fn, nist.loss_fn), fit.starts[0]
    tx = hessian_free(1.0, *(fit.predict_fn, nist.loss_fn), damping=rule, solver=Exact())
    state = jax.jit(tx.update)(
        jax.grad(model.loss)(start, fit.batch), tx.init(start), start, batch=fit.batch
    )[1][0]
    unit = problems.flat(state.controller["diagonal"])
    norm = lambda tree: np.linalg.norm(np.sqrt(unit) * problems.flat(tree))
    matrix = ggn_matvec(fit.predict_fn, nist.loss_fn, start, fit.batch).matrix
    damped = np.asarray(matrix) + np.diag(float(state.controller["damping"]) * unit)
    direction = np.linalg.solve(damped, problems.flat(jax.grad(model.loss)(start, fit.batch)))
    length = np.linalg.norm(np.sqrt(unit) * direction)
    assert length <= 0.1 * norm(start) * (1 + 1e-6)
    np.testing.assert_allclose(state.controller["length"], length, rtol=1e-6)
    ratio = float(state.info.reduction_ratio)
    want = rule.adapt_radius(jnp.asarray(0.1 * norm(start)), jnp.asarray(length), jnp.asarray(ratio))
    np.testing.assert_allclose(state.controller["radius"], want, rtol=1e-6)
    assert rule.has_radius(32)
    assert not rule.has_radius(33)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_kept_in_less_than_the_precision_of_the_parameters(dtype, general):
    tx = general.optimizer(*MODEL_FUNCTIONS, full_batch=True)
    state = tx.init(tanh_network((3, 4, 1), dtype))[0].controller
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {dtype, "int32"}


# Bad input.


def test_a_batch_that_changes_is_counted_and_warned_of(general):
    params, first = tanh_network((3, 4, 1)), regression(30)
    other = {**first, "label": first["label"] + 1.0}
    tx = general.optimizer(*MODEL_FUNCTIONS, full_batch=True)
    update, gradient = jax.jit(tx.update), jax.jit(jax.grad(MODEL.loss))
    state, counts = tx.init(params), []
    for batch in (first, first, other, other, first):
        updates, state = update(gradient(params, batch), state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        counts.append(int(state[0].info.changed_batches))
    assert counts == [0, 0, 1, 1, 2]
    with pytest.warns(UserWarning, match="another than that of the last one; `full_batch=True`"):
        tx.update(gradient(params, first), state, params, batch=first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        tx.update(gradient(params, first), state, params, batch=first)


def test_a_batch_of_another_shape_is_warned_of(general):
    params = tanh_network((3, 4, 1))
    tx = general.optimizer(*MODEL_FUNCTIONS, full_batch=True)
    state = tx.init(params)
    shapes = lambda batch: jax.eval_shape(lambda p, s: tx.update(p, s, p, batch=batch), params, state)
    shapes(regression(30))
    with pytest.warns(UserWarning, match=r"other shapes than before.*For mini-batches leave it out"):
        shapes(regression(20))


def test_a_loss_that_is_not_finite_at_the_start_is_warned_of_and_nothing_is_lost(general):
    params, batch = tanh_network((3, 4, 1)), regression(30)
    batch = {**batch, "x": batch["x"].at[0, 0].set(jnp.nan)}
    tx = general.optimizer(*MODEL_FUNCTIONS, full_batch=True)
    with pytest.warns(UserWarning, match="the loss is nan at the start, so no step is taken"):
        updates, state = tx.update(jax.grad(MODEL.loss)(params, batch), tx.init(params), params, batch=batch)
    assert not np.any(problems.flat(updates))
    assert int(state[0].info.skipped_steps) == 1


def test_low_and_mixed_precision_are_errors_that_name_the_parameter(general):
    tx = general.optimizer(*MODEL_FUNCTIONS, full_batch=True)
    with pytest.raises(ValueError, match=r"float32 or float64, got float16 in `params\['w'\]`"):
        tx.init({"b": jnp.ones(2), "w": jnp.ones(2, "float16")})
    with pytest.raises(ValueError, match=r"got float32 in `params\['w'\]` beside float64 in `params\['b'\]`"):
        tx.init({"b": jnp.ones(2), "w": jnp.ones(2, "float32")})


def test_other_settings_beside_it_are_an_error(general):
    with pytest.raises(ValueError, match="leaves nothing to set; leave out learning_rate, num_cg_steps"):
        general.optimizer(*MODEL_FUNCTIONS, full_batch=True, num_cg_steps=4, learning_rate=0.1)
    with pytest.raises(TypeError, match="has no argument `full_batch`"):
        load_pretrained("digits").optimizer(*MODEL_FUNCTIONS, full_batch=True)
    assert "every batch is all of the data" in (general.optimizer.__doc__ or "")
