"""The bound on the update, finiteness, selection, and the errors for missing arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlhf_optax import limit_update_ratio
from mlhf_optax.safeguards import require_batch, require_params, select_tree, tree_is_finite

pytestmark = pytest.mark.usefixtures("strict_ranks")


def bound(updates, params, max_ratio=0.25, **kwargs):
    tx = limit_update_ratio(max_ratio, **kwargs)
    return tx.update(updates, tx.init(params), params)[0]


def test_a_long_update_keeps_its_direction_and_gets_the_allowed_norm():
    params, updates = (
        {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)},
        {"a": jnp.array([0.0, 6.0]), "b": jnp.array(8.0)},
    )
    got = bound(updates, params, 0.5)  # norms 5 and 10 over the whole tree
    np.testing.assert_allclose(got["a"], [0.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(got["b"], 2.0, rtol=1e-6)


def test_a_short_update_is_left_alone():
    updates = jnp.array([0.1, -0.2])
    np.testing.assert_array_equal(bound(updates, jnp.array([3.0, 4.0])), updates)


def test_parameters_at_zero_count_as_small_ones():
    got = bound(jnp.array([3.0, 0.0, 4.0, 0.0]), jnp.zeros(4), 0.5, min_rms=0.01)
    np.testing.assert_allclose(np.linalg.norm(got), 0.5 * 0.01 * 2, rtol=1e-6)


def test_a_zero_update_has_finite_value_and_gradient():
    value, gradient = jax.value_and_grad(lambda u: jnp.sum(bound(u, jnp.ones(3))))(jnp.zeros(3))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.ones(3))


def test_the_gradient_of_a_bounded_update_agrees_with_finite_differences():
    with jax.enable_x64(True):
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


def test_the_ratio_may_be_injected():
    tx = optax.inject_hyperparams(limit_update_ratio)(max_ratio=0.5)
    params = jnp.array([3.0, 4.0])
    updates, _ = jax.jit(tx.update)(10 * params, tx.init(params), params)
    np.testing.assert_allclose(updates, 0.5 * params, rtol=1e-6)


@pytest.mark.parametrize("ratio", [0, -0.5, float("nan")])
def test_a_ratio_that_is_not_positive_is_an_error(ratio):
    with pytest.raises(ValueError, match="`max_update_ratio` must be positive, or None for no bound"):
        limit_update_ratio(ratio)


def test_missing_parameters_are_an_error():
    with pytest.raises(ValueError, match=r"`limit_update_ratio` needs the current parameters.*not None"):
        bound(jnp.ones(2), None)
    require_params({}, "name")


def test_a_missing_batch_is_an_error_that_shows_the_call():
    with pytest.raises(
        TypeError, match=r"`mlhf` needs the batch.*`tx.update\(grads, state, params, batch=batch\)`"
    ):
        require_batch(None, "mlhf")
    require_batch({}, "mlhf")


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_number_makes_a_tree_not_finite(value):
    tree = {"a": jnp.ones((2, 2)), "b": (jnp.zeros(3), jnp.array(1))}
    assert tree_is_finite(tree)
    assert not tree_is_finite({**tree, "a": tree["a"].at[1, 0].set(value)})
    assert tree_is_finite({})


def test_selection_keeps_the_dtypes_of_the_second_tree():
    new, old = {"a": jnp.ones(2)}, {"a": jnp.zeros(2, jnp.bfloat16)}
    for condition, want in ((True, 1.0), (False, 0.0)):
        got = select_tree(jnp.asarray(condition), new, old)["a"]
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(float), [want, want])
