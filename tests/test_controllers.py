"""The parts of controllers: operators, metrics, units, and what a schedule counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from mlhf_optax import Model, scale_by_damped_step
from mlhf_optax.controllers import Quotient, Scale, constant, metrics, scheduled
from mlhf_optax.controllers.units import unit, without_jump

pytestmark = pytest.mark.usefixtures("strict_ranks", "unoptimised")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_scale_and_quotient_are_inverse_diagonal_operators_that_keep_dtypes(dtype):
    # A leaf is a number for the whole tensor, or one per coordinate.
    values = {"kernel": jnp.array(4.0), "bias": jnp.array([0.5, 8.0])}
    vector = {"kernel": jnp.array([[1.0, -2.0]], dtype), "bias": jnp.array([4.0, 4.0], dtype)}
    scaled = Scale(values)(vector)
    np.testing.assert_array_equal(scaled["kernel"].astype(float), [[4.0, -8.0]])
    np.testing.assert_array_equal(scaled["bias"].astype(float), [2.0, 32.0])
    back = Quotient(values)(scaled)
    assert {leaf.dtype for leaf in jax.tree.leaves((scaled, back))} == {jnp.dtype(dtype)}
    jax.tree.map(np.testing.assert_array_equal, back, vector)


def test_a_schedule_counts_skipped_steps_as_the_rest_of_a_chain_does():
    params, batch = problems.linear_params(dtype=jnp.float32), problems.batch()
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.1, 2: 0.1})
    tx = scale_by_damped_step(scheduled(schedule), Model(problems.linear, problems.LOSS))
    grads, state, update = jax.grad(problems.linear_loss)(params, batch), tx.init(params), jax.jit(tx.update)
    bad = jax.tree.map(lambda g: g.at[0, 0].set(jnp.nan), grads)
    for number, (gradient, skipped) in enumerate([(grads, 0), (bad, 1), (grads, 1)]):
        _, state = update(gradient, state, params, batch=batch)
        np.testing.assert_allclose(state.info.damping_mean, 0.5 * 0.1**number, rtol=1e-5)
        assert (int(state.controller), int(state.info.skipped_steps)) == (number + 1, skipped)


def test_the_unit_of_damping_is_gradient_over_parameters_with_floors():
    of = lambda gradient_rms, initial_rms: float(unit(jnp.array(gradient_rms), jnp.array(initial_rms)))
    assert of(2.5, 0.25) == pytest.approx(10.0)
    assert 0 < of(0.0, 0.25) < 1e-6
    assert of(2.5, 1e-9) == pytest.approx(2500.0)
    assert of(2.5, 0.0) == pytest.approx(2.5)  # parameters that all start at zero have no size


def test_a_gradient_is_bounded_by_those_before_it_and_grows_where_they_do():
    gradient = {"a": jnp.array([3e10, -4e10]), "b": jnp.zeros(2, jnp.bfloat16)}
    bounded = without_jump(gradient, jnp.array(2.0))
    np.testing.assert_allclose(bounded["a"], [72.0, -96.0], rtol=1e-5)  # 2 * 30 * sqrt(4) is its norm
    assert bounded["b"].dtype == jnp.bfloat16
    for running in (jnp.array(0.0), jnp.array(1e9)):  # none before it; not that much larger
        jax.tree.map(np.testing.assert_array_equal, without_jump(gradient, running), gradient)
    zero = jax.grad(lambda g: without_jump(g, jnp.array(1.0)).sum())(jnp.zeros(2))
    np.testing.assert_array_equal(zero, np.ones(2))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_a_constant_that_is_not_positive_is_an_error(damping):
    with pytest.raises(ValueError, match="`damping` must be a positive number, got"):
        constant(damping)
    if damping:
        with pytest.raises(ValueError, match="`damping` must be a number >= 0, got"):
            scheduled(damping)


# Metrics.


def after(metric, gradients):
    """The diagonal of a metric after some gradients."""
    state = metric.init(gradients[0])
    for gradient in gradients:
        state = metric.update(gradient, state)
    return metric.values(state, gradients[-1])


@pytest.mark.parametrize("make", [metrics.identity, metrics.diagonal])
def test_a_metric_is_positive_and_differentiable_where_gradients_have_always_been_zero(make):
    metric = make()
    zero, part = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
    total = lambda g: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(after(metric, [g, g])))
    for gradient in (zero, part):
        values = after(metric, [gradient])["w"]
        assert values.dtype == jnp.float32
        assert (values > 0).all()
        assert np.isfinite(jax.grad(total)(gradient)["w"]).all()
    # Without any gradient all coordinates are alike.
    assert float(jnp.std(after(metric, [zero])["w"])) == 0


def test_a_metric_of_low_precision_gradients_is_in_float32():
    state = metrics.diagonal().init({"w": jnp.ones(2, jnp.bfloat16)})
    state = metrics.diagonal().update({"w": jnp.full(2, 1e-3, jnp.bfloat16)}, state)
    assert state.mean_square["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.mean_square["w"], 0.02 * 1e-6, rtol=1e-2)
