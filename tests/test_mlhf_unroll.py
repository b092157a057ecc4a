"""The steps of an unroll in meta-training: those of the optimizer in use, also where one is skipped."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from mlhf_optax import Settings
from mlhf_optax.learned import LEARNED
from mlhf_optax.meta_training import mlhf_optimizer

pytestmark = pytest.mark.usefixtures("unoptimised")

LEARNING_RATE = 0.7
OPTIONS = {
    "num_cg_steps": 2,
    "curvature_batch_size": 4,
    "layer_types_fn": lambda params: {"table": "dense_kernel"},
    "max_update_ratio": 0.3,
    "unroll": 1,
}
TABLE = SimpleNamespace(
    init_fn=None, predict_fn=lambda params, batch: batch["image"] @ params["table"], loss_fn=problems.LOSS
)


@jax.jit
@jax.grad
def gradient(params, batch):
    return TABLE.loss_fn(TABLE.predict_fn(params, batch), batch)


class Small:
    """An unroll on a model whose layer types are given, and all that it needs."""

    def __init__(self):
        self.learned = mlhf_optimizer(LEARNING_RATE, update_noise=0.0, **OPTIONS)
        self.meta_params = problems.random_meta_params(Settings(), units=(2,))
        self.params = {"table": problems.linear_params(dtype=jnp.float32)["kernel"]}
        self.optimizer = self.learned.build(self.meta_params, TABLE)
        self.opt_state = self.optimizer.init(self.params)
        self.batches = problems.stack(problems.batches(4))
        self._run = jax.jit(functools.partial(self.learned.meta_gradient, self.meta_params, TABLE))
        self._step = jax.jit(self._take_step)

    def run(self, batches=None, opt_state=None):
        return self._run(
            self.params,
            self.opt_state if opt_state is None else opt_state,
            self.batches if batches is None else batches,
            jax.random.key(0),
        )

    def _take_step(self, params, opt_state, batch):
        updates, opt_state = self.optimizer.update(gradient(params, batch), opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state

    def used(self, batches, opt_state):
        """Parameters and state after the same steps by the optimizer as a user has it."""
        params = self.params
        for t in range(len(batches["label"]) - 1):
            params, opt_state = self._step(params, opt_state, jax.tree.map(lambda x: x[t], batches))  # noqa: B023
        return params, opt_state

    def spoiled(self, *numbers):
        """The mini-batches with a value that is not a number in some of them."""
        image = self.batches["image"]
        for number in numbers:
            image = image.at[number, 0, 0].set(jnp.nan)
        return {**self.batches, "image": image}


@pytest.fixture(scope="module")
def small():
    return Small()


def assert_same_training(result, expected):
    params, opt_state = expected
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, result.params, params)
    jax.tree.map(close, result.opt_state, opt_state)


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def largest(tree):
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def test_an_unroll_takes_the_steps_of_the_optimizer_in_use(small):
    result = small.run()
    assert_same_training(result, small.used(small.batches, small.opt_state))
    assert int(result.opt_state[0].count) == 3
    # The next unroll goes on from there.
    again = small.run(opt_state=result.opt_state)
    assert int(again.opt_state[0].count) == 6


def test_a_step_that_is_not_finite_is_skipped_as_in_use_and_spoils_no_gradient(small):
    batches = small.spoiled(1)
    result = small.run(batches)
    assert_same_training(result, small.used(batches, small.opt_state))
    own = result.opt_state[0]
    assert (int(own.count), int(own.info.skipped_steps)) == (2, 1)
    assert_finite((result.gradient, result.meta_losses, result.params, result.opt_state))
    np.testing.assert_array_equal(np.isfinite(result.inner_losses), [True, False, True, True])
    assert largest(result.gradient.damping) > 0 < largest(result.gradient.preconditioner)


def test_what_follows_a_skipped_first_step_is_learned_from_as_if_it_had_not_been(small):
    skipped, later = small.run(small.spoiled(0)), small.run(jax.tree.map(lambda x: x[1:], small.batches))
    close = functools.partial(
        jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    )
    close(skipped.params, later.params)
    close(skipped.meta_losses["l_s"], later.meta_losses["l_s"])
    close(skipped.gradient.damping, later.gradient.damping)
    # The mean over three steps of which one gave nothing.
    share = lambda x: 2 / 3 * x
    close(skipped.meta_losses["l_p"], share(later.meta_losses["l_p"]))
    close(skipped.gradient.preconditioner, jax.tree.map(share, later.gradient.preconditioner))


def test_a_step_whose_gain_is_not_known_trains_the_preconditioner_alone(small):
    result = small.run(small.spoiled(3))
    assert int(result.opt_state[0].count) == 3
    assert_finite((result.gradient, result.meta_losses, result.params))
    np.testing.assert_allclose(result.meta_losses["l_p"], small.run().meta_losses["l_p"], rtol=1e-6)


def test_an_unroll_of_skipped_steps_changes_and_teaches_nothing(small):
    result = small.run(small.spoiled(0, 1, 2, 3))
    jax.tree.map(np.testing.assert_array_equal, result.params, small.params)
    assert int(result.opt_state[0].info.skipped_steps) == 3
    assert largest(result.gradient) == 0
    assert np.isnan(result.meta_losses["l_s"])
    assert float(result.meta_losses["l_p"]) == 0


def test_after_a_step_that_was_not_one_of_descent_cg_starts_from_zero(small):
    first = jax.tree.map(lambda x: x[0], small.batches)
    far = jax.tree.map(lambda g: -1e6 * g, gradient(small.params, first))
    opt_state = (small.opt_state[0]._replace(direction=far), *small.opt_state[1:])
    result = small.run(opt_state=opt_state)
    assert_same_training(result, small.used(small.batches, opt_state))
    own = result.opt_state[0]
    assert (int(own.count), int(own.info.skipped_steps)) == (2, 1)
    assert_finite(result.gradient)


def test_noise_multiplies_every_coordinate_of_the_update(small):
    noisy = mlhf_optimizer(LEARNING_RATE, update_noise=0.1, **OPTIONS)

    @jax.jit
    def train(opt_state, batches, key):
        meta_gradient = functools.partial(noisy.meta_gradient, small.meta_params, TABLE)
        return meta_gradient(small.params, opt_state, batches, key).params["table"]

    one_step = jax.tree.map(lambda x: x[:2], small.batches)
    before, (plain, _) = small.params["table"], small.used(one_step, small.opt_state)
    moved = [train(small.opt_state, one_step, jax.random.key(i)) - before for i in range(2)]
    ratio = jnp.stack(moved) / (plain["table"] - before)
    assert float(jnp.max(jnp.abs(ratio - 1))) <= 0.1 + 1e-5
    assert float(jnp.std(ratio)) > 0.03
    assert np.min(np.diff(np.sort(ratio, axis=None))) > 1e-5  # no coordinate, no key like another


def test_what_is_per_example_can_be_said_as_in_use(small):
    batches = {**small.batches, "offset": jnp.zeros((len(small.batches["label"]), 3))}
    run = lambda learned: jax.jit(functools.partial(learned.meta_gradient, small.meta_params, TABLE))(
        small.params, small.opt_state, batches, jax.random.key(0)
    )
    said = mlhf_optimizer(LEARNING_RATE, update_noise=0.0, per_example=("image", "label"), **OPTIONS)
    expected = small.run()
    assert_same_training(run(said), (expected.params, expected.opt_state))
    with pytest.raises(ValueError, match="per_example"):
        run(mlhf_optimizer(LEARNING_RATE, update_noise=0.0, **OPTIONS))


def test_a_task_says_what_is_per_example_to_the_general_optimizer():
    family = LEARNED["mlhf_general"]
    learned = family.learned(family.options(num_cg_steps=1))
    batch = {**problems.batch(), "offset": jnp.zeros(3)}
    task = SimpleNamespace(predict_fn=problems.linear, loss_fn=problems.LOSS, curvature_batch_size=2)
    params = problems.linear_params(dtype=jnp.float32)

    def update():
        tx = learned.build(learned.init(jax.random.key(0), task), task)
        return tx.update(params, tx.init(params), params, batch=batch)

    with pytest.raises(ValueError, match="per_example"):
        update()
    task.per_example = ("image", "label")
    assert_finite(update())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"step_loss": "huge"}, "`step_loss` must be one of 'difference', 'relative', 'log', got 'huge'"),
        ({"update_noise": 1.5}, r"`update_noise` must be in \[0, 1\], got 1.5"),
        ({"same_batch_weight": -1.0}, "`same_batch_weight` must be a number >= 0, got -1.0"),
    ],
)
def test_wrong_options_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        mlhf_optimizer(**wrong)
