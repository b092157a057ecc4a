"""What follows the solve: the bound on the update, momentum, weight decay, their order and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlhf_optax import limit_update_ratio
from mlhf_optax.transforms import after_solve, average_updates, decay_weights, require_params

pytestmark = pytest.mark.usefixtures("strict_ranks")


def run(tx, updates, params=None):
    """What becomes of updates one after another, and the last state."""
    state, found = tx.init(updates[0]), []
    for update in updates:
        out, state = tx.update(update, state, params)
        found.append(out)
    return found, state


# The bound.


def bound(updates, params, max_update_ratio=0.25, **kwargs):
    return run(limit_update_ratio(max_update_ratio, **kwargs), [updates], params)[0][0]


def test_a_long_update_keeps_its_direction_and_gets_the_allowed_norm():
    params = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    updates = {"a": jnp.array([0.0, 6.0]), "b": jnp.array(8.0)}
    got = bound(updates, params, 0.5)  # norms 5 and 10 over the whole tree
    np.testing.assert_allclose(got["a"], [0.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(got["b"], 2.0, rtol=1e-6)


def test_parameters_at_zero_count_as_small_ones():
    got = bound(jnp.array([3.0, 0.0, 4.0, 0.0]), jnp.zeros(4), 0.5, min_rms=0.01)
    np.testing.assert_allclose(np.linalg.norm(got), 0.5 * 0.01 * 2, rtol=1e-6)


def test_a_zero_update_has_finite_value_and_gradient():
    value, gradient = jax.value_and_grad(lambda u: jnp.sum(bound(u, jnp.ones(3))))(jnp.zeros(3))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.ones(3))


def test_the_gradient_of_a_bounded_update_agrees_with_finite_differences(x64):
    params, updates, direction = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0]), jnp.array([0.3, 0.9])
    outcome = lambda u: jnp.sum(jnp.array([1.0, 5.0]) * bound(u, params))
    want = (outcome(updates + 1e-6 * direction) - outcome(updates - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(jax.grad(outcome)(updates) @ direction, want, rtol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept_and_norms_do_not_overflow_in_them(dtype):
    updates = jnp.full(1000, 300.0, dtype)  # the sum of squares is above the range of float16
    got = bound(updates, jnp.ones(1000, dtype), 0.5)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(float), np.full(1000, 0.5), rtol=1e-2)


# Momentum.


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_all_updates(x64, momentum):
    updates = np.random.default_rng(0).normal(size=(6, 4))
    found, _ = run(average_updates(momentum), list(jnp.asarray(updates)))
    for t, got in enumerate(found):
        weights = momentum ** np.arange(t, -1, -1.0)
        np.testing.assert_allclose(got, np.average(updates[: t + 1], axis=0, weights=weights), rtol=1e-5)


def test_zero_updates_change_no_average_and_are_passed_on():
    one, two, zero = {"a": jnp.ones(2)}, {"a": jnp.array([4.0, 0.0])}, {"a": jnp.zeros(2)}
    tx = average_updates(0.5)
    with_skips, state = run(tx, [zero, one, zero, zero, two])
    without, expected = run(tx, [one, two])
    for got, want in zip(with_skips, [zero, without[0], zero, zero, without[1]], strict=True):
        np.testing.assert_array_equal(got["a"], want["a"])
    jax.tree.map(np.testing.assert_array_equal, state, expected)


# All together.


def test_an_update_is_decayed_scaled_bounded_and_then_averaged():
    params = jnp.array([3.0, 4.0])
    directions = [jnp.array([0.1, -0.2]), jnp.array([1e10, 0.0]), jnp.array([0.0, 0.1])]
    tx = after_solve(0.5, max_update_ratio=0.2, momentum=0.5, weight_decay=0.1)
    found, _ = run(tx, directions, params)
    bounded = [-0.5 * (np.array(d) + 0.1 * np.array(params)) for d in directions]
    bounded[1] *= 0.2 * 5 / np.linalg.norm(bounded[1])  # the only one longer than a fifth of the parameters
    for t, got in enumerate(found):
        weights = 0.5 ** np.arange(t, -1, -1.0)
        np.testing.assert_allclose(got, np.average(bounded[: t + 1], axis=0, weights=weights), rtol=1e-5)


def test_without_options_it_is_the_learning_rate_alone_and_keeps_no_state():
    tx = after_solve(optax.linear_schedule(1.0, 0.0, 2), max_update_ratio=None)
    found, state = run(tx, [jnp.array([1.0, -2.0])] * 3, jnp.zeros(2))
    np.testing.assert_allclose(found, [[-1.0, 2.0], [-0.5, 1.0], [0.0, 0.0]])
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [()]  # the count of the schedule


@pytest.mark.parametrize("parameter", [1.0, jnp.nan, jnp.inf])
def test_a_zero_direction_gives_a_zero_update_whatever_the_parameters_are(parameter):
    tx = after_solve(0.5, momentum=0.5, weight_decay=0.1)
    params = jnp.array([parameter, 1.0])
    found, state = run(tx, [jnp.zeros(2)], params)
    np.testing.assert_array_equal(found[0], np.zeros(2))
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))


def test_numbers_that_are_injected_do_not_change_the_structure_of_the_state():
    params, values = jnp.array([3.0, 4.0]), {"max_update_ratio": 0.5, "momentum": 0.0, "weight_decay": 0.0}
    make = lambda learning_rate, max_update_ratio, momentum, weight_decay: after_solve(
        learning_rate, max_update_ratio=max_update_ratio, momentum=momentum, weight_decay=weight_decay
    )
    tx = optax.inject_hyperparams(make)(1.0, **values)
    state, update = tx.init(params), jax.jit(tx.update)
    assert jax.tree.structure(state.inner_state[3]) == jax.tree.structure(average_updates(0.9).init(params))
    updates, after = update(-10 * params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    np.testing.assert_allclose(updates, 0.5 * params, rtol=1e-6)
    after.hyperparams["momentum"] = jnp.asarray(0.5)
    after.hyperparams["max_update_ratio"] = jnp.asarray(0.2)
    updates, _ = update(-10 * params, after, params)
    # The first average had the weight 1, the second has 1/2 for the new update, over 1 - 1/4.
    np.testing.assert_allclose(updates, (0.5 * 0.5 + 0.5 * 0.2) / 0.75 * params, rtol=1e-6)


# Errors.


def test_a_ratio_that_is_not_positive_and_a_momentum_out_of_range_are_errors():
    for make in (limit_update_ratio, lambda r: after_solve(1.0, max_update_ratio=r)):
        for ratio in (0, -0.5, float("nan")):
            with pytest.raises(
                ValueError, match="`max_update_ratio` must be positive, or None for no bound, "
            ):
                make(ratio)
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), or None for none, got"):
            average_updates(momentum)


def test_missing_parameters_are_an_error():
    for name, tx in (("limit_update_ratio", limit_update_ratio(0.1)), ("decay_weights", decay_weights(0.1))):
        with pytest.raises(ValueError, match=rf"`{name}` needs the current parameters.*not None"):
            tx.update(jnp.ones(2), tx.init(None), None)
    require_params({}, "name")
