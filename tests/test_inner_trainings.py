"""Which inner trainings are recognised as dead, what is stored, and what replaces those that end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.meta_training import MetaGradient, MetaTrainingConfig
from mlhf_optax.meta_training.unrolled.inner_trainings import (
    Health,
    InnerTraining,
    advance,
    examine,
    fresh_training,
    replace_ended,
    without_opt_state,
)
from mlhf_optax.meta_training.unrolled.replay import init_replay

pytestmark = pytest.mark.usefixtures("unoptimised")

# Health.


def unroll_result(losses, gradient_norm=1.0, params=0.0, opt_state=0.0):
    return MetaGradient(
        gradient=jnp.zeros(()),
        meta_losses={},
        params=jnp.asarray(params),
        opt_state=jnp.asarray(opt_state),
        inner_losses=jnp.asarray(losses),
        gradient_norm=jnp.asarray(gradient_norm),
    )


examined = jax.jit(functools.partial(examine, MetaTrainingConfig(stuck_patience=50)))


def health(losses, age=100, first_gradient_norm=1.0, **result):
    """`diverged`, `idle` and `stuck` of a training whose first loss was 2."""
    training = InnerTraining(0.0, 0.0, jnp.int32(age), jnp.float32(2.0), jnp.float32(first_gradient_norm))
    # Ten losses, by which one program is enough.
    losses = [*losses, *(10 - len(losses)) * losses[-1:]]
    return [bool(flag) for flag in examined(training, unroll_result(losses, **result))]


HEALTHY, DIVERGED, IDLE, STUCK = [False] * 3, [True, False, False], [False, True, False], [False, True, True]


@pytest.mark.parametrize(
    ("losses", "details", "expected"),
    [
        pytest.param([1.0, 0.9, 0.8], {}, HEALTHY, id="learning"),
        pytest.param([1.0, 0.9, 7.0, *7 * [0.9]], {}, HEALTHY, id="one bad mini-batch"),
        pytest.param([1.0, 7.0, 8.0], {}, DIVERGED, id="loss far above the first"),
        pytest.param([1.0, np.nan, 0.9], {}, DIVERGED, id="loss not a number"),
        pytest.param([1.0, 0.9, np.inf], {}, DIVERGED, id="infinite loss"),
        pytest.param([1.0, 0.9, 0.8], {"params": np.inf}, DIVERGED, id="parameters"),
        pytest.param([1.0, 0.9, 0.8], {"opt_state": np.nan}, DIVERGED, id="optimizer state"),
        pytest.param([2.0, 1.99, 2.01], {}, STUCK, id="at chance"),
        pytest.param([2.0, 1.99, 2.01], {"age": 49}, IDLE, id="at chance, young"),
        pytest.param([2.0, 2.9, 3.1], {}, STUCK, id="above chance"),
        pytest.param([1.5, 1.5, 1.5], {"gradient_norm": 1e-6}, STUCK, id="gradient vanished"),
        pytest.param([1.5, 1.5, 1.5], {"gradient_norm": 0.0, "age": 10}, IDLE, id="vanished, young"),
        pytest.param([0.1, 0.1, 0.1], {"gradient_norm": 1e-6}, HEALTHY, id="vanished at a minimum"),
        pytest.param(
            [1.5, 1.5, 1.5],
            {"gradient_norm": 1e-6, "first_gradient_norm": 1e-3},
            HEALTHY,
            id="small from the start",
        ),
    ],
)
def test_the_health_of_a_training(losses, details, expected):
    assert health(losses, **details) == expected


def test_the_first_loss_and_gradient_are_remembered():
    training = fresh_training(jax.random.key(0), lambda key: jnp.ones(2), lambda params: 0 * params)
    assert np.isnan(training.first_loss)
    for number, norm in ((1, 5.0), (2, 4.0)):
        training = advance(training, unroll_result([3.0 / number, 1.0], norm, params=number), 10)
        assert int(training.age) == 10 * number
        assert (float(training.first_loss), float(training.first_gradient_norm)) == (3.0, 5.0)
        assert float(training.params) == number


# What goes on, what is stored, what comes instead.

COUNT = 1000
FRESH = -1.0


def trainings(age=10):
    """Trainings whose parameters are their numbers, with optimizer states that are not those of a start."""
    numbers = jnp.arange(1.0, COUNT + 1.0)
    return InnerTraining(
        numbers, jnp.full(COUNT, 7.0), jnp.full(COUNT, age, jnp.int32), 2 * numbers, jnp.ones(COUNT)
    )


def all_healthy(**flags):
    no = jnp.zeros(COUNT, bool)
    return Health(**{"diverged": no, "idle": no, "stuck": no} | flags)


def make_fresh(keys):
    make = lambda key: fresh_training(key, lambda _: jnp.full((), FRESH), jnp.zeros_like)
    return jax.vmap(make)(keys)


def replace(health, running=None, replay=None, seed=0, **config):
    running = trainings() if running is None else running
    config = MetaTrainingConfig(num_tasks=COUNT, **{"replay_capacity": COUNT} | config)
    if replay is None:
        example = jax.tree.map(lambda x: x[0], running)
        replay = init_replay(without_opt_state(example), config.replay_capacity)
    return replaced(config, running, health, replay, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def replaced(config, running, health, replay, key):
    return replace_ended(config, running, health, replay, key, make_fresh, jnp.zeros_like)


FIRST_HALF = jnp.arange(COUNT) < COUNT // 2


@pytest.mark.parametrize("flag", ["diverged", "stuck"])
def test_dead_trainings_are_counted_always_replaced_and_never_stored(flag):
    dead = {flag: FIRST_HALF} | ({"idle": FIRST_HALF} if flag == "stuck" else {})
    after, replay, counts = replace(all_healthy(**dead), keep_probability=1.0, store_probability=1.0)
    np.testing.assert_array_equal(after.params[~FIRST_HALF], trainings().params[~FIRST_HALF])
    assert int(counts[flag]) == COUNT // 2
    assert int(counts["replayed"] + counts["fresh"]) == COUNT // 2
    # What comes instead is a fresh start or one of the healthy, which have just been stored.
    instead = np.asarray(after.params[FIRST_HALF])
    assert ((instead == FRESH) | (instead > COUNT // 2)).all()
    assert int(counts["fresh"]) == np.sum(instead == FRESH)
    stored = np.sort(np.asarray(replay.entries.params)[replay.is_filled])
    np.testing.assert_array_equal(stored, trainings().params[~FIRST_HALF])


def test_a_young_training_that_got_nowhere_goes_on_but_is_not_stored():
    after, replay, counts = replace(all_healthy(idle=FIRST_HALF), keep_probability=1.0, store_probability=1.0)
    np.testing.assert_array_equal(after.params, trainings().params)
    assert int(replay.stored) == COUNT // 2
    assert sum(map(int, counts.values())) == 0


def test_probabilities_are_the_shares_that_go_on_are_fresh_and_are_stored():
    after, replay, counts = replace(
        all_healthy(), keep_probability=0.7, fresh_probability=0.2, store_probability=0.4
    )
    went_on = np.mean(after.params == trainings().params)
    # A replayed state may be the own one, hence a little more than 0.7.
    assert 0.65 < went_on < 0.75
    assert int(counts["fresh"]) / COUNT == pytest.approx(0.3 * 0.2, abs=0.03)
    assert int(counts["replayed"]) / COUNT == pytest.approx(0.3 * 0.8, abs=0.05)
    assert int(replay.stored) / COUNT == pytest.approx(0.4, abs=0.05)


def test_without_anything_stored_fresh_starts_come_instead():
    after, replay, counts = replace(
        all_healthy(), keep_probability=0.0, fresh_probability=0.0, store_probability=0.0
    )
    np.testing.assert_array_equal(after.params, np.full(COUNT, FRESH))
    np.testing.assert_array_equal(after.age, 0)
    assert np.isnan(after.first_loss).all()
    assert (int(counts["fresh"]), int(counts["replayed"]), int(replay.stored)) == (COUNT, 0, 0)


def test_a_replayed_training_goes_on_at_its_age_with_a_new_optimizer_state():
    after, _, counts = replace(
        all_healthy(), keep_probability=0.0, fresh_probability=0.0, store_probability=1.0
    )
    assert int(counts["replayed"]) == COUNT
    np.testing.assert_array_equal(after.age, 10)
    np.testing.assert_array_equal(after.first_loss, 2 * after.params)
    np.testing.assert_array_equal(after.opt_state, 0.0)
    assert len(np.unique(after.params)) > COUNT / 2


def test_old_trainings_are_replaced_although_healthy():
    running = trainings(age=30)._replace(age=jnp.where(FIRST_HALF, 30, 20))
    after, _, _ = replace(all_healthy(), running, keep_probability=1.0, max_age=30, fresh_probability=1.0)
    np.testing.assert_array_equal(after.params == FRESH, FIRST_HALF)


# The settings of a meta-training.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_tasks", 0, "`num_tasks` must be at least 1, got 0"),
        ("unroll_length", 0, "`unroll_length` must be at least 1"),
        ("stuck_patience", -1, "`stuck_patience` must be at least 1"),
        ("keep_probability", 1.1, r"`keep_probability` must be in \[0, 1\], got 1.1"),
        ("fresh_probability", -0.1, "`fresh_probability` must be in"),
        ("store_probability", 2.0, "`store_probability` must be in"),
        ("final_rate_share", -1.0, "`final_rate_share` must be in"),
        ("meta_learning_rate", 0.0, "`meta_learning_rate` must be a positive number"),
        ("divergence_ratio", 0.0, "`divergence_ratio` must be a positive number"),
        ("meta_gradient_clip", 0.0, "`meta_gradient_clip` must be a positive number, or None"),
        ("decay_iterations", 0, "`decay_iterations` must be a positive number, or None"),
        ("max_age", -5, "`max_age` must be a positive number, or None"),
        ("task_axis", "pmap", "`task_axis` must be one of 'auto', 'vmap', 'sequential', got 'pmap'"),
        ("replay_capacity", 7, "`replay_capacity` must be at least `num_tasks`=8, got 7"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(name, value, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainingConfig(**{name: value})
