"""What follows the solve: both bounds, momentum, weight decay, their order and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlhf_optax import limit_growth, limit_update_ratio
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


# The bound on growth.


def bounded_norms(norms, max_growth, decay, free=3):
    """What `limit_growth` does to norms, with the whole history at hand."""
    seen, found = [], []
    for norm in norms:
        if norm > 0 and len(seen) >= free:
            shares = np.maximum(1 - decay, 1 / np.arange(1, len(seen) + 1))
            weights = [share * np.prod(1 - shares[k + 1 :]) for k, share in enumerate(shares)]
            found.append(min(norm, max_growth * np.exp(np.average(np.log(seen), weights=weights))))
        else:
            found.append(norm)
        seen += [norm] if norm > 0 else []
    return found


@pytest.mark.parametrize(("max_growth", "decay"), [(1.0, 0.98), (0.5, 0.7), (2.0, 0.9)])
def test_norms_are_bounded_by_the_geometric_mean_of_those_before(x64, max_growth, decay):
    norms = np.exp(np.random.default_rng(0).normal(size=80))
    norms[[0, 7, 8]] = 0
    direction = np.array([0.6, -0.8])
    found, state = run(limit_growth(max_growth, decay), [jnp.asarray(n * direction) for n in norms])
    want = np.outer(bounded_norms(norms, max_growth, decay), direction)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert int(state.count) == 77


def test_the_bound_on_growth_has_no_scale_and_follows_updates_that_stay_larger():
    norms = np.r_[np.ones(50), np.full(300, 100.0)]
    small, _ = run(limit_growth(), [jnp.array([n, 0.0]) for n in norms])
    large, _ = run(limit_growth(), [jnp.array([1e6 * n, 0.0]) for n in norms])
    np.testing.assert_allclose(large, 1e6 * np.asarray(small), rtol=1e-4)
    lengths = np.asarray(small)[:, 0]
    assert lengths[50] == 1
    assert lengths[-1] > 95
    assert np.all(np.diff(lengths[50:]) > 0)


def test_one_long_update_among_short_ones_hardly_moves_the_bound():
    norms = [1.0] * 60 + [1e6, 1.0, 1e6]
    found, _ = run(limit_growth(), [{"a": jnp.full(4, n / 2)} for n in norms])
    lengths = [float(jnp.linalg.norm(update["a"])) for update in found]
    np.testing.assert_allclose(lengths[:62], 1.0, rtol=1e-5)
    assert lengths[62] < 1.4  # 1e6^0.02 = 1.32


def test_growth_under_vmap_scan_and_grad_and_in_low_precision():
    tx = limit_growth(decay=0.5)

    def lengths(scale):
        updates = scale * jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0], [2.0, 2.0], [9.0, 9.0]])
        step = lambda state, update: tx.update(update, state)[::-1]
        return jax.lax.scan(step, tx.init(None), updates)[1]

    each = jax.vmap(lengths)(jnp.array([0.0, 1.0, 3.0]))
    for got, scale in zip(each, (0.0, 1.0, 3.0), strict=True):
        np.testing.assert_allclose(got, lengths(scale), rtol=1e-6)
    gradient = jax.jacfwd(lengths)(0.0), jax.jacfwd(lengths)(1.0)
    np.testing.assert_allclose(gradient[1], lengths(1.0), rtol=1e-5)  # it is without scale
    assert np.all(np.isfinite(gradient[0]))
    found, _ = run(limit_growth(), [jnp.ones(3, jnp.bfloat16)] * 4 + [jnp.full(3, 8.0, jnp.bfloat16)])
    assert found[-1].dtype == jnp.bfloat16
    np.testing.assert_allclose(found[-1].astype(float), 1.0, rtol=1e-2)


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


def test_growth_is_bounded_before_the_learning_rate():
    tx = after_solve(optax.linear_schedule(0.0, 1.0, 10), max_growth=1.0, max_update_ratio=None)
    found, _ = run(tx, [jnp.array([1.0])] * 8 + [jnp.array([5.0])], jnp.ones(1))
    np.testing.assert_allclose(np.ravel(found), -0.1 * np.arange(9), atol=1e-6)


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
    assert jax.tree.structure(state.inner_state.average) == jax.tree.structure(
        average_updates(0.9).init(params)
    )
    updates, after = update(-10 * params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    np.testing.assert_allclose(updates, 0.5 * params, rtol=1e-6)
    after.hyperparams["momentum"] = jnp.asarray(0.5)
    after.hyperparams["max_update_ratio"] = jnp.asarray(0.2)
    updates, _ = update(-10 * params, after, params)
    # The first average had the weight 1, the second has 1/2 for the new update, over 1 - 1/4.
    np.testing.assert_allclose(updates, (0.5 * 0.5 + 0.5 * 0.2) / 0.75 * params, rtol=1e-6)


# Errors.


def test_bounds_that_are_not_positive_and_decays_out_of_range_are_errors():
    for make in (limit_update_ratio, lambda r: after_solve(1.0, max_update_ratio=r)):
        for ratio in (0, -0.5, float("nan")):
            with pytest.raises(
                ValueError, match="`max_update_ratio` must be a positive number, or None, got"
            ):
                make(ratio)
    for growth in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`max_growth` must be a positive number, or None, got"):
            after_solve(1.0, max_growth=growth)
    for decay in (0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`decay` must be strictly between 0 and 1, got"):
            limit_growth(decay=decay)
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), or None, got"):
            average_updates(momentum)


def test_missing_parameters_are_an_error():
    for name, tx in (("limit_update_ratio", limit_update_ratio(0.1)), ("decay_weights", decay_weights(0.1))):
        with pytest.raises(ValueError, match=rf"`{name}` needs the current parameters.*not None"):
            tx.update(jnp.ones(2), tx.init(None), None)
    require_params({}, "name")
