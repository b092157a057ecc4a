"""Gauss-Newton with one constant against dense solves, what it does not depend on, and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

from mlhf_optax import gauss_newton
from mlhf_optax.controllers.metrics import diagonal

pytestmark = pytest.mark.usefixtures("unoptimised")

METRICS = ("identity", "diagonal")
both_metrics = pytest.mark.parametrize("metric", METRICS)


def make(metric="identity", damping=2.0, predict_fn=problems.linear, loss_fn=problems.LOSS, **kwargs):
    arguments = {"num_cg_steps": 2, "max_update_ratio": None, "unroll": 1, **kwargs}
    return gauss_newton(0.7, predict_fn, loss_fn, damping=damping, metric=metric, **arguments)


@pytest.mark.parametrize(
    ("metric", "num_cg_steps", "unit_decay"),
    [("identity", 3, None), ("diagonal", None, None), ("identity", 3, 0.5), ("diagonal", None, 0.9)],
)
def test_steps_agree_with_dense_matrices_in_numpy(x64, metric, num_cg_steps, unit_decay):
    params, batches = problems.mlp_params(), problems.batches(5)
    expected = references.naive_gauss_newton(
        references.Model(),
        problems.flat(params),
        batches,
        learning_rate=0.7,
        damping=0.5,
        metric=metric,
        num_cg_steps=num_cg_steps,
        unit_decay=unit_decay,
    )
    tx = make(metric, 0.5, problems.mlp, num_cg_steps=num_cg_steps or 50, unit_decay=unit_decay)
    steps = problems.training_steps(tx, params, batches, problems.mlp_loss)
    for (params, state, _), (w, direction) in zip(steps, expected, strict=True):
        # Metric and unit have a part in float32.
        np.testing.assert_allclose(problems.flat(state[0].direction), direction, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(problems.flat(params), w, rtol=1e-4, atol=1e-6)
    assert (int(state[0].count), int(state[0].info.skipped_steps)) == (5, 0)


def first_update(tx, loss_fn, params, batch, factor=1.0):
    @jax.jit
    def update(params):
        grads = jax.grad(lambda p: factor * loss_fn(p, batch))(params)
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    return problems.flat(update(params))


@both_metrics
def test_a_constant_factor_on_the_loss_changes_nothing(x64, metric):
    params, batch = problems.linear_params(dtype=float), problems.batch()
    scaled = lambda outputs, batch: 1000.0 * problems.LOSS(outputs, batch)
    one = first_update(make(metric), problems.linear_loss, params, batch)
    other = first_update(make(metric, loss_fn=scaled), problems.linear_loss, params, batch, 1000.0)
    np.testing.assert_allclose(other, one, rtol=1e-5)


@both_metrics
def test_the_unit_of_the_parameters_changes_nothing(x64, metric):
    build = lambda predict_fn: make(metric, predict_fn=predict_fn)
    one, tenth = (problems.rescaled_direction(build, scale) for scale in (1.0, 0.1))
    np.testing.assert_allclose(tenth, one, rtol=1e-5)


def test_with_the_diagonal_metric_and_large_damping_steps_have_the_direction_of_adam(x64):
    params, batches = problems.linear_params(), problems.batches(3)
    ours, gradient = make(diagonal(0.9, floor=0.0), 1e6), jax.jit(jax.grad(problems.linear_loss))
    adam = optax.scale_by_adam(b1=0.0, b2=0.9, eps=1e-12)
    adam_state = adam.init(params)
    steps = problems.training_steps(ours, params, batches)
    for batch, (after, _, _) in zip(batches, steps, strict=True):
        want, adam_state = adam.update(gradient(params, batch), adam_state)
        got, want = problems.flat(params) - problems.flat(after), problems.flat(want)
        np.testing.assert_allclose(got @ want / np.linalg.norm(got) / np.linalg.norm(want), 1.0, atol=1e-5)
        params = after


def test_any_metric_may_be_given(x64):
    params, batch = problems.linear_params(dtype=float), problems.batch()
    named = first_update(make("diagonal"), problems.linear_loss, params, batch)
    other = first_update(make(diagonal(floor=10.0)), problems.linear_loss, params, batch)
    assert not np.allclose(other, named, rtol=0.01)


# Transformations.


def train(metric, damping, params, batches):
    """Parameters after a training in a `scan`, and its last state."""
    tx = make(metric, damping)

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(problems.linear_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), batches)[0]


@both_metrics
def test_the_derivative_by_the_damping_agrees_with_finite_differences(x64, metric):
    batches, params = problems.stack(problems.batches(3)), problems.linear_params(dtype=float)

    @jax.jit
    @jax.value_and_grad
    def last_loss(damping):
        return problems.linear_loss(train(metric, damping, params, batches)[0], problems.batch(9))

    want = (last_loss(2.01)[0] - last_loss(1.99)[0]) / 0.02
    assert abs(want) > 1e-4
    np.testing.assert_allclose(last_loss(2.0)[1], want, rtol=1e-2)


def test_bound_momentum_and_decay_are_those_of_the_other_optimizers():
    params, batch = problems.linear_params(dtype=jnp.float32), problems.batch()
    plain = first_update(make(), problems.linear_loss, params, batch)
    bounded = first_update(make(max_update_ratio=0.01), problems.linear_loss, params, batch)
    size = np.linalg.norm(problems.flat(params))
    np.testing.assert_allclose(bounded, 0.01 * size * plain / np.linalg.norm(plain), rtol=1e-5)
    decayed = first_update(make(weight_decay=0.1, momentum=0.5), problems.linear_loss, params, batch)
    np.testing.assert_allclose(decayed, plain - 0.7 * 0.1 * problems.flat(params), rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"damping": 0.0}, ValueError, "`damping` must be a positive number, got 0.0"),
        (
            {"metric": "adam"},
            ValueError,
            "`metric` must be one of 'identity', 'diagonal', 'kronecker' or a Metric, got 'adam'",
        ),
        ({"num_cg_steps": 0}, ValueError, "`num_cg_steps` must be at least 1"),
        ({"max_update_ratio": -1}, ValueError, "`max_update_ratio` must be a positive number"),
        ({"predict_fn": 3}, TypeError, "`predict_fn` must be a function, got int"),
    ],
)
def test_an_argument_out_of_range_is_an_error_that_names_it(wrong, error, message):
    with pytest.raises(error, match=message):
        make(**wrong)
