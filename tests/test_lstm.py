"""The coordinate-wise LSTM against one coordinate at a time in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from mlhf_optax.controllers import lstm

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")


def random_weights(num_inputs=3, units=(4, 4), seed=0):
    rng = np.random.default_rng(seed)
    weights = lstm.init_weights(jax.random.key(seed), num_inputs, units)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.5 * rng.normal(size=x.shape)), weights)


@pytest.mark.parametrize("units", [(4, 4), (3,), (2, 5, 3)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_several_steps_agree_with_one_coordinate_at_a_time(units, shape):
    weights = random_weights(3, units)
    inputs = np.random.default_rng(1).normal(size=(4, 3, *shape))
    carry = lstm.init_carry(jnp.zeros(shape), units, jnp.float64)
    step = jax.jit(lstm.apply)
    outputs = []
    for x in inputs:
        output, carry = step(weights, carry, x)
        outputs.append(output)

    for index in np.ndindex(shape):
        naive_carry = [(np.zeros(n), np.zeros(n)) for n in units]
        for x, output in zip(inputs, outputs, strict=True):
            want, naive_carry = references.naive_lstm(weights, naive_carry, x[(slice(None), *index)])
            np.testing.assert_allclose(output[index], want, rtol=1e-10)
        for layer, (cell, hidden) in zip(carry, naive_carry, strict=True):
            np.testing.assert_allclose(layer.cell[(slice(None), *index)], cell, rtol=1e-10)
            np.testing.assert_allclose(layer.hidden[(slice(None), *index)], hidden, rtol=1e-10)


def test_shared_features_act_like_features_of_every_coordinate():
    weights, shared = random_weights(5), jnp.array([0.7, -1.3])
    own = np.random.default_rng(1).normal(size=(3, 4, 2))
    carry = jax.tree.map(lambda x: x + 0.1, lstm.init_carry(jnp.zeros((4, 2)), dtype=jnp.float64))
    everywhere = jnp.concatenate([own, jnp.broadcast_to(shared[:, None, None], (2, 4, 2))])

    def run(weights, *features):
        output, new = lstm.apply(weights, carry, *features)
        return jnp.sum(output**2), (output, new)

    got, want = (jax.grad(run, has_aux=True)(weights, *x) for x in ((own, shared), (everywhere,)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), got, want)


def test_fresh_weights_give_zero_whatever_is_seen_and_remember():
    weights = lstm.init_weights(jax.random.key(0), 3, (4, 2))
    assert [layer.kernel.shape for layer in weights.layers] == [(16, 7), (8, 6)]
    assert weights.output_kernel.shape == (2,)
    for layer in weights.layers:
        i, f, g, o = np.split(layer.bias, 4)
        assert (f == 1).all()
        assert not np.any([i, g, o])
        assert np.std(layer.kernel) > 0.1
    carry = lstm.init_carry(jnp.zeros(5), (4, 2))
    output, next_carry = lstm.apply(weights, carry, jnp.ones((3, 5)))
    assert not output.any()
    assert all(leaf.any() for leaf in jax.tree.leaves(next_carry))


def test_different_keys_and_layers_get_different_weights():
    draw = lambda seed: lstm.init_weights(jax.random.key(seed), 4, (4, 4))
    first, other = draw(0), draw(1)
    assert not np.allclose(first.layers[0].kernel, other.layers[0].kernel)
    assert not np.allclose(first.layers[0].kernel, first.layers[1].kernel)


def test_carries_are_trees_with_the_units_in_front():
    params = {"w": jnp.ones((3, 2)), "b": (jnp.ones(2), jnp.ones(()))}
    carry = lstm.init_carry(params, (4, 5), jnp.bfloat16)
    assert [jax.tree.leaves(jax.tree.map(jnp.shape, layer.cell, is_leaf=None)) for layer in carry] == [
        [4, 2, 4, 4, 3, 2],
        [5, 2, 5, 5, 3, 2],
    ]
    assert jax.tree.structure(carry[0].hidden) == jax.tree.structure(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(carry)} == {jnp.dtype(jnp.bfloat16)}
    assert not any(leaf.any() for leaf in jax.tree.leaves(carry))


def test_a_low_precision_carry_keeps_its_dtype_while_the_arithmetic_does_not_use_it():
    weights = random_weights()
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)))
    exact, _ = lstm.apply(weights, lstm.init_carry(jnp.zeros(5), (4, 4), float), inputs)
    low, carry = lstm.apply(weights, lstm.init_carry(jnp.zeros(5), (4, 4), jnp.bfloat16), inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(carry)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(low, exact, rtol=1e-12)  # a zero carry loses nothing


def test_the_gradient_through_two_steps_agrees_with_finite_differences():
    inputs = np.random.default_rng(1).normal(size=(2, 3, 2))

    def outcome(weights):
        carry = lstm.init_carry(jnp.zeros(2), (4, 4), float)
        _, carry = lstm.apply(weights, carry, inputs[0])
        return jnp.sum(lstm.apply(weights, carry, inputs[1])[0])

    outcome = jax.jit(outcome)
    weights, direction = random_weights(), random_weights(seed=3)
    moved = lambda step: outcome(jax.tree.map(lambda w, d: w + step * d, weights, direction))
    along = jax.tree.map(lambda g, d: jnp.sum(g * d), jax.jit(jax.grad(outcome))(weights), direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(along)), (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-7)


@pytest.mark.parametrize(("num_inputs", "units"), [(0, (4,)), (3, ()), (3, (4, 0)), (3, (-1,))])
def test_sizes_below_one_are_an_error(num_inputs, units):
    with pytest.raises(ValueError, match=r"`(num_inputs|units)` must be at least 1"):
        lstm.init_weights(jax.random.key(0), num_inputs, units)
