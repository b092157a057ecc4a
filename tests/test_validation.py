"""Validation of meta-parameters by whole trainings."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from mlhf_optax.meta_training import make_validation, unrolled_optimizer
from mlhf_optax.meta_training.interface import task_loss
from mlhf_optax.meta_training.validation import Validation, score_of

pytestmark = pytest.mark.usefixtures("unoptimised")

STEPS, NUM_STARTS = (1, 4, 6), 2
TASK = SimpleNamespace(
    init_fn=lambda key: {"kernel": jax.random.normal(key, (3, 2))},
    predict_fn=problems.linear,
    loss_fn=problems.LOSS,
)
# The meta-parameter is a learning rate; momentum makes the state count.
LEARNED = unrolled_optimizer(
    lambda rate, task: optax.with_extra_args_support(optax.sgd(rate, momentum=0.5)),
    lambda trajectory: trajectory.losses[-1],
)


BATCHES = problems.stack(problems.batches(STEPS[-1]))
EXAMPLES = problems.batch(seed=9, size=40)


@pytest.fixture(scope="module")
def validate():
    function = make_validation(TASK, LEARNED, STEPS, NUM_STARTS)
    return lambda rate, key=0: function(jnp.float32(rate), BATCHES, EXAMPLES, jax.random.key(key))


def trained_by_hand(rate, key):
    """Losses on the examples after the recorded steps of one training."""
    params, velocity, losses = TASK.init_fn(key), np.zeros((3, 2), np.float32), []
    gradient = jax.jit(jax.grad(problems.linear_loss))
    for number in range(1, STEPS[-1] + 1):
        batch = jax.tree.map(lambda x: x[number - 1], BATCHES)  # noqa: B023
        velocity = 0.5 * velocity + np.asarray(gradient(params, batch)["kernel"])
        params = {"kernel": params["kernel"] - rate * velocity}
        if number in STEPS:
            losses.append(float(task_loss(TASK, params, EXAMPLES)))
    return losses


def test_it_is_a_whole_training_from_every_fresh_start(validate):
    result = validate(0.5)
    losses = np.array([trained_by_hand(0.5, key) for key in jax.random.split(jax.random.key(0), NUM_STARTS)])
    np.testing.assert_allclose(result.losses, losses.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(result.score, np.log(losses).mean(), rtol=1e-5)
    np.testing.assert_allclose(result.worst_loss, losses[:, -1].max(), rtol=1e-5)


def test_scores_of_the_same_starts_and_batches_can_be_compared(validate):
    jax.tree.map(np.testing.assert_array_equal, validate(0.5), validate(0.5))
    assert validate(0.5).score < validate(0.01).score
    assert validate(0.5, key=1).score != validate(0.5).score


def test_a_training_that_diverges_has_the_worst_score_and_it_is_finite(validate):
    result = validate(np.inf)
    assert isinstance(result, Validation)
    np.testing.assert_allclose(result.score, np.log(1000.0), rtol=1e-6)
    assert float(result.worst_loss) == 1000.0
    assert not np.isfinite(result.losses).any()


def test_losses_are_bounded_before_their_logarithm_is_taken():
    losses = jnp.array([[0.0, jnp.nan], [jnp.inf, 1.0]])
    expected = np.mean([np.log(1e-9), np.log(1e3), np.log(1e3), 0.0])
    np.testing.assert_allclose(score_of(losses), expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [(), (0, 10), (10, 10), (30, 10)])
def test_steps_must_increase_from_one(steps):
    with pytest.raises(ValueError, match=r"`steps` must be increasing numbers from 1 on, got \("):
        make_validation(TASK, LEARNED, steps)
