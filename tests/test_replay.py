"""The replay buffer: what it keeps, and how often each entry is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.meta_training.unrolled.replay import init_replay, sample, store


def filled(values, capacity):
    """A buffer with these numbers stored one after another."""
    replay = init_replay(jnp.zeros(()), capacity)
    for value in values:
        replay = store(replay, jnp.array([value]), jnp.array([True]))
    return replay


def test_entries_are_trees_and_keep_their_dtypes():
    example = {"w": jnp.ones((2, 3)), "age": jnp.zeros((), jnp.int32)}
    replay = init_replay(example, 4)
    entries = {"w": jnp.arange(12.0).reshape(2, 2, 3), "age": jnp.array([5, 6], jnp.int32)}
    replay = store(replay, entries, jnp.array([True, True]))
    assert replay.entries["age"].dtype == jnp.int32
    drawn, _ = sample(replay, jax.random.key(0), 50)
    assert drawn["w"].shape == (50, 2, 3)
    # Leaves of one entry stay together.
    np.testing.assert_array_equal(drawn["w"][:, 0, 0], 6.0 * (drawn["age"] - 5))
    assert set(np.asarray(drawn["age"]).tolist()) == {5, 6}


def test_the_oldest_entries_are_overwritten():
    replay = filled([1.0, 2.0, 3.0], capacity=2)
    np.testing.assert_array_equal(replay.entries, [3.0, 2.0])
    assert int(replay.stored) == 3
    # Two at once go over the end of the ring.
    replay = store(replay, jnp.array([4.0, 5.0]), jnp.array([True, True]))
    np.testing.assert_array_equal(replay.entries, [5.0, 4.0])
    assert replay.is_filled.all()


def test_only_what_the_mask_says_is_stored():
    put = jax.jit(store)
    replay = put(init_replay(jnp.zeros(()), 3), jnp.array([1.0, 2.0, 3.0]), jnp.array([True, False, True]))
    np.testing.assert_array_equal(replay.entries, [1.0, 3.0, 0.0])
    np.testing.assert_array_equal(replay.is_filled, [True, True, False])
    unchanged = put(replay, jnp.array([7.0, 8.0, 9.0]), jnp.zeros(3, bool))
    jax.tree.map(np.testing.assert_array_equal, unchanged, replay)


def test_draws_are_uniform_over_what_is_stored():
    values = [1.0, 2.0, 3.0, 4.0]
    drawn, found = sample(filled(values, capacity=10), jax.random.key(0), 20_000)
    assert bool(found)
    shares = np.array([np.mean(np.asarray(drawn) == value) for value in values])
    assert np.sum(shares) == pytest.approx(1.0)
    np.testing.assert_allclose(shares, 0.25, atol=0.015)


def test_an_empty_buffer_says_so():
    drawn, found = sample(init_replay(jnp.zeros(2), 3), jax.random.key(0), 4)
    assert not bool(found)
    assert drawn.shape == (4, 2)


def test_a_buffer_for_nothing_is_an_error():
    with pytest.raises(ValueError, match="`capacity` must be at least 1, got 0"):
        init_replay(jnp.zeros(()), 0)
