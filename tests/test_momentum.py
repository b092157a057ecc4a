"""Averaging of directions: the definition, skipped steps, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from mlhf_optax import mlhf
from mlhf_optax.momentum import average_directions

pytestmark = pytest.mark.usefixtures("strict_ranks")


def run(tx, updates):
    state, found = tx.init(updates[0]), []
    for update in updates:
        out, state = tx.update(update, state)
        found.append(out)
    return found, state


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.999])
def test_it_is_the_weighted_mean_of_all_directions(x64, momentum):
    directions = np.random.default_rng(0).normal(size=(6, 4))
    found, _ = run(average_directions(momentum), list(jnp.asarray(directions)))
    for t, got in enumerate(found):
        weights = momentum ** np.arange(t, -1, -1.0)
        np.testing.assert_allclose(got, np.average(directions[: t + 1], axis=0, weights=weights), rtol=1e-5)


def test_zero_updates_change_nothing_and_are_passed_on():
    one, two, zero = {"a": jnp.ones(2)}, {"a": jnp.array([4.0, 0.0])}, {"a": jnp.zeros(2)}
    tx = average_directions(0.5)
    with_skips, state = run(tx, [zero, one, zero, zero, two])
    without, expected = run(tx, [one, two])
    for got, want in zip(with_skips, [zero, without[0], zero, zero, without[1]], strict=True):
        np.testing.assert_array_equal(got["a"], want["a"])
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_kept(dtype):
    found, state = run(average_directions(0.9), [jnp.ones(3, dtype)] * 3)
    assert found[-1].dtype == state.average.dtype == dtype
    np.testing.assert_allclose(found[-1].astype(float), np.ones(3), rtol=2e-2)


def test_a_traced_momentum_is_the_same():
    found = jax.jit(lambda m: run(average_directions(m), [jnp.ones(2), jnp.array([3.0, 1.0])])[0])(0.9)
    want, _ = run(average_directions(0.9), [jnp.ones(2), jnp.array([3.0, 1.0])])
    np.testing.assert_allclose(found[1], want[1], rtol=1e-6)


def test_the_optimizer_averages_before_learning_rate_and_bound():
    meta_params, params = problems.random_meta_params(), problems.linear_params(dtype=jnp.float32)
    batches = problems.batches(2)

    def updates(**options):
        tx = mlhf(0.5, meta_params, problems.linear, problems.LOSS, num_cg_steps=2, **options)
        state, found = tx.init(params), []
        for batch in batches:
            update, state = tx.update(
                jax.grad(problems.linear_loss)(params, batch), state, params, batch=batch
            )
            found.append(update["kernel"])
        return found

    plain, averaged = updates(max_update_ratio=None), updates(max_update_ratio=None, momentum=0.5)
    np.testing.assert_allclose(averaged[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(averaged[1], (plain[0] + 2 * plain[1]) / 3, rtol=1e-5, atol=1e-7)
    bounded = updates(max_update_ratio=1e-3, momentum=0.5)[1]
    np.testing.assert_allclose(np.linalg.norm(bounded), 1e-3 * np.linalg.norm(params["kernel"]), rtol=1e-5)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_out_of_range_is_an_error(momentum):
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), 0 for none, got"):
        average_directions(momentum)
