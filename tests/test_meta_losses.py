"""The two meta-losses of MLHF as functions of one step's values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.meta_training.unrolled.mlhf_losses import StepLosses, preconditioner_loss, step_gain


def problem():
    """A positive definite matrix, a gradient and some direction."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    return root @ root.T + np.eye(5), rng.normal(size=5), rng.normal(size=5)


def loss_of(matrix, gradient, direction):
    """`preconditioner_loss` on a tree of two leaves."""
    tree = lambda x: {"a": jnp.asarray(x[:2]), "b": jnp.asarray(x[2:]).reshape(3, 1)}
    return preconditioner_loss(tree(direction), tree(gradient - matrix @ direction), tree(gradient))


def test_the_loss_of_lstm_p_is_the_formula(x64):
    matrix, g, d = problem()
    np.testing.assert_allclose(loss_of(matrix, g, d), -(d @ g) / np.sqrt(d @ matrix @ d), rtol=1e-12)


def test_its_minimum_is_the_solution_of_the_system_whatever_its_length(x64):
    matrix, g, d = problem()
    solution = np.linalg.solve(matrix, g)
    least = -np.sqrt(g @ solution)
    for length in (0.1, 1.0, 10.0):
        np.testing.assert_allclose(loss_of(matrix, g, length * solution), least, rtol=1e-12)
    slope = jax.grad(lambda d: loss_of(matrix, g, d))(jnp.asarray(solution))
    np.testing.assert_allclose(slope, np.zeros(5), atol=1e-12)
    for share in (0.01, 0.1, 1.0):
        assert loss_of(matrix, g, solution + share * d) > least


@pytest.mark.parametrize("residual", [1.0, 2.0], ids=["zero curvature", "negative curvature"])
def test_a_direction_without_curvature_has_neither_loss_nor_gradient(residual):
    d, g = jnp.array([2.0]), jnp.array([1.0])
    value, slope = jax.value_and_grad(preconditioner_loss)(d, jnp.array([residual]), g)
    assert (float(value), float(slope[0])) == (0.0, 0.0)


LOSSES = StepLosses(same_before=2.0, next_before=3.0, next_after=1.0, same_after=0.5)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("difference", 1.0 + 0.5 - 2 * 2.0),  # equation 4; the next mini-batch before the step is not used
        ("relative", (1.0 - 3.0) / (3.0 + 0.1) + (0.5 - 2.0) / (2.0 + 0.1)),
        ("log", np.log((1.0 + 0.1) / (3.0 + 0.1)) + np.log((0.5 + 0.1) / (2.0 + 0.1))),
    ],
)
def test_the_gain_of_a_step_and_its_derivatives(x64, scale, expected):
    losses = jax.tree.map(jnp.asarray, LOSSES)
    value, by_next, by_same = step_gain(losses, scale, epsilon=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    slopes = jax.grad(lambda x: step_gain(x, scale, epsilon=0.1)[0])(losses)
    np.testing.assert_allclose([by_next, by_same], [slopes.next_after, slopes.same_after], rtol=1e-12)


@pytest.mark.parametrize("scale", ["difference", "relative", "log"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_gain_on_the_own_mini_batch_can_count_less(x64, scale, weight):
    losses = jax.tree.map(jnp.asarray, LOSSES)
    gain = lambda x, w: step_gain(x, scale, 0.1, w)[0]
    of_next_alone, of_both = gain(losses, 0.0), gain(losses, 1.0)
    np.testing.assert_allclose(gain(losses, weight), of_next_alone + weight * (of_both - of_next_alone))
    _, by_next, by_same = step_gain(losses, scale, 0.1, weight)
    slopes = jax.grad(lambda x: gain(x, weight))(losses)
    np.testing.assert_allclose([by_next, by_same], [slopes.next_after, slopes.same_after], rtol=1e-12)
    assert weight or float(by_same) == 0.0


def test_halving_a_loss_is_worth_the_same_early_and_late_but_for_equation_4():
    gain = lambda size, scale: float(step_gain(StepLosses(*(size * x for x in LOSSES)), scale, 1e-9)[0])
    for scale in ("relative", "log"):
        np.testing.assert_allclose(gain(1e-3, scale), gain(1.0, scale), rtol=1e-5)
    np.testing.assert_allclose(gain(1e-3, "difference"), 1e-3 * gain(1.0, "difference"), rtol=1e-5)


def test_a_growing_loss_counts_in_proportion_or_as_its_logarithm():
    grown = functools.partial(step_gain, StepLosses(*map(jnp.float32, (1.0, 1.0, 100.0, 100.0))))
    assert float(grown("relative")[0]) > 190 > 20 > float(grown("log")[0]) > 0


def test_an_unknown_scale_is_an_error():
    with pytest.raises(ValueError, match="`step_loss` must be one of 'difference', 'relative', 'log', got"):
        step_gain(LOSSES, "huge")
