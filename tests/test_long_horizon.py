"""Long-horizon meta-training against a plain loop, and what it owes to trainings that end or blow up."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlhf_optax import SquaredError
from mlhf_optax.learned import get_learned
from mlhf_optax.meta_training import LongHorizonConfig, make_long_horizon_step, unrolled_optimizer

pytestmark = pytest.mark.usefixtures("unoptimised")

TASK = SimpleNamespace(
    init_fn=lambda key: jax.random.normal(key, (3,)),
    predict_fn=lambda params, batch: batch["x"] @ params,
    loss_fn=SquaredError(targets="y"),
)
SGD = unrolled_optimizer(lambda log_rate, task: optax.sgd(jnp.exp(log_rate)), None)
CONFIG = LongHorizonConfig(num_pairs=4, truncation=5, horizons=(10, 30), sigma=0.1)


def draw(key, config=CONFIG):
    keys = jax.random.split(jax.random.key(key))
    x = jax.random.normal(keys[0], (config.num_pairs, config.truncation, 8, 3))
    return {"x": x, "y": x @ jnp.array([1.0, -2.0, 0.5])}


@pytest.fixture(scope="module")
def sgd():
    """`init` and `step` for stochastic gradient descent, compiled once."""
    return make_long_horizon_step([TASK], SGD, CONFIG)


def copy(tree):
    return jax.tree.map(jnp.array, tree)


def naive_truncation(config, centre, pairs, number, batches):
    """Meta-losses, and parameters after them, of both trainings of a pair, in NumPy float64."""
    outcomes = []
    first = None
    for sign, row in ((1, 0), (-1, 1)):
        rate = np.exp(float(centre) + sign * float(pairs.noise[number]))
        w = np.asarray(pairs.params[number, row], np.float64)
        losses = []
        for t in range(config.truncation):
            x, y = (np.asarray(batches[name][number, t], np.float64) for name in "xy")
            error = x @ w - y
            losses.append(0.5 * np.mean(error**2))
            w = w - rate * x.T @ error / len(y)
        known = float(pairs.first_loss[number])
        first = (losses[0] if np.isnan(known) else known) if first is None else first
        relative = np.minimum(np.array(losses) / first, config.loss_ceiling)
        logs = np.log(relative + config.loss_floor)
        if config.early_steps:
            ages = float(pairs.age[number]) + np.arange(config.truncation)
            logs = logs / np.sqrt(1 + ages / config.early_steps)
        outcomes.append((np.mean(logs), w))
    return outcomes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"early_steps": 3.0, "difference_bound": 0.05, "init_spread": 0.5, "average_decay": 0.5},
    ],
)
def test_gradient_and_trainings_agree_with_a_plain_loop_over_two_truncations(options):
    config = LongHorizonConfig(num_pairs=3, truncation=4, horizons=(50, 50), sigma=0.1, **options)
    # The meta-optimizer hands over what it was given, so that the gradient can be read off.
    init, step = make_long_horizon_step([TASK], SGD, config, optax.sgd(1.0))
    centre = jnp.array(-2.0)
    state, squares, mean = init(jax.random.key(1), centre), None, -2.0
    # As if all had just begun: else some of the first pairs end early.
    state = state._replace(pairs=(state.pairs[0]._replace(horizon=jnp.full(3, 50)),))
    for number in range(2):
        batches, before = draw(number, config), copy(state)
        state, metrics = step(state, [batches])
        estimates = []
        for pair in range(3):
            plus, minus = naive_truncation(config, before.centre, before.pairs[0], pair, batches)
            bound = config.difference_bound or np.inf
            difference = np.clip(plus[0] - minus[0], -bound, bound)
            estimates.append(difference / (2 * config.sigma**2) * float(before.pairs[0].noise[pair]))
            for row, outcome in enumerate((plus, minus)):
                np.testing.assert_allclose(state.pairs[0].params[pair, row], outcome[1], rtol=2e-4)
        # A task's gradient is divided by its running root mean square.
        gradient = np.mean(estimates)
        squares = gradient**2 if squares is None else 0.95 * squares + 0.05 * gradient**2
        np.testing.assert_allclose(before.centre - state.centre, gradient / np.sqrt(squares), rtol=5e-3)
        keep = min(config.average_decay, (number + 1) / (number + 11))
        mean = keep * mean + (1 - keep) * float(state.centre)
        np.testing.assert_allclose(state.meta_params, mean, rtol=1e-5)
        assert np.isfinite(metrics["meta_loss"])


@pytest.mark.parametrize(
    "name",
    ["adam_rates", "rnnprop", "l2l", "hyperadam", "variational_hyperadam", "hierarchical", "mlhf_general"],
)
def test_every_learned_optimizer_for_any_network_can_be_trained_so(name):
    family = get_learned(name)
    learned = family.learned(family.resolve(family.options(), None), None)
    meta_params = learned.init(jax.random.key(0), TASK)
    init, step = make_long_horizon_step([TASK], learned, CONFIG)
    state = init(jax.random.key(1), meta_params)
    before = copy(state.pairs[0].params)
    for number in range(2):
        state, metrics = step(state, [draw(number)])
    assert np.isfinite(metrics["meta_loss"])
    assert metrics["meta_gradient_norm"] > 0  # so both trainings of a pair differ
    assert int(state.counts["dropped_gradients"]) == 0
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.centre, meta_params)
    assert any(jax.tree.leaves(moved))
    assert np.all(np.isfinite(state.pairs[0].params))
    assert np.any(state.pairs[0].params != before)


def test_the_estimate_has_the_sign_and_size_of_the_derivative_of_the_meta_loss():
    """With small noise a pair's estimate is the directional derivative, found here by finite differences."""
    config = LongHorizonConfig(num_pairs=64, truncation=10, horizons=(10, 10), sigma=1e-2, loss_ceiling=1e6)
    x = jax.random.normal(jax.random.key(0), (10, 8, 3))
    series = {"x": x, "y": x @ jnp.array([1.0, -2.0, 0.5])}
    batches = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (64, *leaf.shape)), series)
    fixed = SimpleNamespace(**(vars(TASK) | {"init_fn": lambda key: jnp.array([0.5, 0.5, 0.5])}))
    seen = []
    record = optax.GradientTransformation(
        optax.init_empty_state, lambda g, s, p=None: (jax.debug.callback(lambda v: seen.append(v), g) or g, s)
    )
    rate_of = lambda log_rates: jnp.exp(log_rates.sum())
    learned = unrolled_optimizer(lambda meta, task: optax.sgd(rate_of(meta)), None)
    init, step = make_long_horizon_step([fixed], learned, config, record)
    meta_params = jnp.array([-1.0, -1.5])
    state, _ = step(init(jax.random.key(1), meta_params), [batches])
    jax.block_until_ready(state)
    direction = np.asarray(seen[0])

    def meta_loss(meta):
        w, losses = jnp.array([0.5, 0.5, 0.5]), []
        for t in range(10):
            batch = jax.tree.map(lambda leaf: leaf[t], series)  # noqa: B023
            loss, g = jax.value_and_grad(lambda p: TASK.loss_fn(batch["x"] @ p, batch))(w)  # noqa: B023
            losses.append(loss)
            w = w - rate_of(meta) * g
        return jnp.mean(jnp.log(jnp.stack(losses) / losses[0] + 1e-2))

    exact = np.asarray(jax.grad(meta_loss)(meta_params))
    cosine = direction @ exact / np.linalg.norm(direction) / np.linalg.norm(exact)
    assert cosine > 0.95


def test_noise_stays_from_start_to_end_and_then_a_fresh_pair_with_other_noise_begins(sgd):
    init, step = sgd
    state = init(jax.random.key(0), jnp.array(-3.0))
    assert len(set(np.asarray(state.pairs[0].horizon).tolist())) > 1  # staggered
    for number in range(8):
        before = copy(state.pairs[0])
        state, _ = step(state, [draw(number)])
        after, is_over = state.pairs[0], np.asarray(before.age >= before.horizon)
        np.testing.assert_array_equal(after.noise[~is_over], before.noise[~is_over])
        assert not np.any(np.asarray(after.noise[is_over]) == np.asarray(before.noise[is_over]))
        np.testing.assert_array_equal(after.age, np.where(is_over, 5, np.asarray(before.age) + 5))
        assert np.all((np.asarray(after.horizon) >= 1) & (np.asarray(after.horizon) <= 30))
    assert int(state.counts["fresh"]) > 0


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_lengths_of_trainings_are_drawn_as_asked_for(exponent):
    config = LongHorizonConfig(num_pairs=1000, truncation=1, horizons=(20, 2000), horizon_exponent=exponent)
    init, step = make_long_horizon_step([TASK], SGD, config)
    state = init(jax.random.key(0), jnp.array(-3.0))
    over = state.pairs[0]._replace(age=state.pairs[0].horizon + 0)
    state, _ = step(state._replace(pairs=(over,)), [draw(0, config)])
    drawn = np.asarray(state.pairs[0].horizon)
    assert drawn.min() >= 20
    assert drawn.max() <= 2000
    # The share of trainings longer than h, by the integral of the density.
    tail = (lambda h: -(h**-exponent)) if exponent else np.log
    for length in (40, 200, 600):
        expected = (tail(2000.0) - tail(float(length))) / (tail(2000.0) - tail(20.0))
        assert np.mean(drawn > length) == pytest.approx(expected, abs=0.05)


def test_it_learns_a_rate_on_two_tasks_of_very_different_scale():
    steep = SimpleNamespace(**(vars(TASK) | {"loss_fn": lambda z, b: 100 * TASK.loss_fn(z, b)}))
    relative = unrolled_optimizer(lambda log_rate, task: optax.adam(jnp.exp(log_rate)), None)
    config = LongHorizonConfig(
        num_pairs=4, truncation=5, horizons=(20, 40), sigma=0.1, meta_learning_rate=0.1
    )
    init, step = make_long_horizon_step([TASK, steep], relative, config)
    state = init(jax.random.key(0), jnp.array(-7.0))
    for number in range(40):
        state, metrics = step(state, [draw(number, config), draw(number, config)])
    assert float(state.meta_params) > -5.0
    assert {"meta_loss_0", "meta_loss_1"} <= metrics.keys()


def test_trainings_that_blow_up_count_as_the_ceiling_and_spoil_nothing(sgd):
    init, step = sgd
    state = init(jax.random.key(0), jnp.array(5.0))  # a rate of 150
    for number in range(6):
        state, metrics = step(state, [draw(number)])
        assert np.isfinite(metrics["meta_loss"])
    assert float(metrics["meta_loss"]) <= np.log(CONFIG.loss_ceiling + CONFIG.loss_floor) + 1e-6
    assert int(state.counts["diverged"]) > 0
    assert np.isfinite(float(state.meta_params))
    assert float(state.meta_params) <= 5.0 + 1e-3


def test_equal_seeds_give_equal_bits_and_the_state_is_one_pytree_that_goes_on(sgd):
    init, step = sgd
    run = lambda state, numbers: functools.reduce(
        lambda s, number: step(s, [draw(number)])[0], numbers, state
    )

    whole = run(init(jax.random.key(3), jnp.array(-3.0)), range(4))
    half = copy(run(init(jax.random.key(3), jnp.array(-3.0)), range(2)))
    jax.tree.map(np.testing.assert_array_equal, run(half, range(2, 4)), whole)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_pairs": 0}, "`num_pairs` must be at least 1, got 0"),
        ({"sigma": 0.0}, "`sigma` must be a positive number"),
        ({"horizons": (30, 10)}, "`horizons` must be two ascending numbers"),
        ({"horizon_exponent": -0.5}, "`horizon_exponent` must be a number >= 0, got -0.5"),
        ({"final_rate_share": 1.5}, r"`final_rate_share` must be in \[0, 1\], got 1.5"),
        ({"task_axis": "pmap"}, "`task_axis` must be one of 'auto', 'vmap', 'sequential', got 'pmap'"),
        ({"decay_iterations": 0}, "`decay_iterations` must be a positive number, or None"),
    ],
)
def test_wrong_numbers_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        LongHorizonConfig(**wrong)


def test_wrong_tasks_and_batches_are_refused(sgd):
    with pytest.raises(ValueError, match="`tasks` is empty"):
        make_long_horizon_step([], SGD, CONFIG)
    init, step = sgd
    state = init(jax.random.key(0), jnp.array(-3.0))
    with pytest.raises(ValueError, match="one entry per task, 1, got 2"):
        step(state, [draw(0), draw(0)])
    short = jax.tree.map(lambda leaf: leaf[:, :2], draw(0))
    with pytest.raises(ValueError, match=r"\(num_pairs, truncation, ...\) = \(4, 5\)"):
        step(state, [short])
