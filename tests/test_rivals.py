"""The learned optimizers of the literature against naive ones in NumPy, and how they are meta-trained."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rivals_reference as reference
from problems import LOSS, batch, flat, mlp, mlp_params

from mlhf_optax.learned import LEARNED
from mlhf_optax.learned.rnnprop import RNNPropOptions, init_rnnprop, rnnprop
from mlhf_optax.meta_training import META_LOSSES, MetaTrainingConfig, Trajectory, make_meta_step, with_tricks

TASK = SimpleNamespace(init_fn=lambda key: mlp_params(dtype=jnp.float32), predict_fn=mlp, loss_fn=LOSS)
BACKPROPAGATED = ["rnnprop"]


def louder(meta_params, scale=0.3):
    """Weights so large that every path through the networks counts."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(x + scale * rng.normal(size=x.shape), x.dtype), meta_params)


def gradients(count, seed=0):
    """Gradients of an MLP that grow and shrink by orders of magnitude, one of them zero."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        scale = 10.0 ** rng.integers(-4, 2) if i != 3 else 0.0
        yield jax.tree.map(lambda p: scale * rng.normal(size=p.shape), mlp_params())  # noqa: B023


def agrees(tx, naive, steps=10, rtol=1e-6, atol=1e-9):
    params = mlp_params(dtype=float)
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients(steps):
        got, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        np.testing.assert_allclose(flat(got), naive.update(flat(grads)), rtol=rtol, atol=atol)
    return state


def test_rnnprop_is_the_naive_one(x64):
    meta_params = louder(init_rnnprop(jax.random.key(0)))
    state = agrees(rnnprop(meta_params), reference.RNNProp(meta_params, 26))
    assert state[0].carry[1].hidden["Dense_0"]["kernel"].shape == (20, 3, 4)


def test_rnnprop_does_not_depend_on_the_scale_of_gradients_and_its_updates_are_bounded():
    tx = rnnprop(louder(init_rnnprop(jax.random.key(0)), 3.0), learning_rate=0.05)
    grads = jax.tree.map(jnp.ones_like, mlp_params(dtype=jnp.float32))
    small, large = (tx.update(optax.tree.scale(c, grads), tx.init(grads))[0] for c in (1e-3, 1e3))
    np.testing.assert_allclose(flat(small), flat(large), rtol=1e-3, atol=1e-6)
    assert np.abs(flat(large)).max() <= 0.05


# Meta-training.


def test_the_meta_losses_are_those_of_the_papers():
    trajectory = Trajectory(jnp.array([4.0, 2.0, 1.0]), jnp.array([3.0, 1.0]))
    found = {name: float(loss(trajectory)) for name, loss in META_LOSSES.items()}
    assert found == pytest.approx(
        {"last": 1.0, "mean": 1.5, "mean_after": 2.0, "sum": 7.0, "log": np.log(2.0) / 2}, abs=1e-5
    )


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"meta_loss": "best"}, "`meta_loss` must be one of 'last', 'mean', .*, got 'best'"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a positive number, got 0.0"),
    ],
)
def test_wrong_options_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        RNNPropOptions(**wrong)


def data(num_tasks, length):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_tasks, length + 1, *x.shape)), batch())


@pytest.mark.parametrize("name", BACKPROPAGATED)
def test_meta_training_lowers_the_inner_loss_with_all_tricks(name):
    family = LEARNED[name]
    learned = family.learned(family.options())
    config = MetaTrainingConfig(
        num_tasks=2,
        unroll_length=4,
        meta_learning_rate=3e-3,
        random_scaling=1.0,
        companion_size=3,
        horizons=(4, 8),
        horizon_iterations=3,
    )
    init, meta_step = make_meta_step(TASK, learned, config)
    start = learned.init(jax.random.key(1), TASK)
    state, ages = init(jax.random.key(0), start), []
    for _ in range(8):
        state, metrics = meta_step(state, data(2, 4))
        ages.append(float(metrics["age"]))
        assert np.isfinite(metrics["meta_loss"])
        assert metrics["meta_gradient_norm"] > 0
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, state.meta_params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert max(ages[:4]) == 0
    assert max(ages) == 4


def test_random_scaling_leaves_the_network_and_changes_what_is_trained():
    learned = LEARNED["adam_rates"].learned(LEARNED["adam_rates"].options())
    task, _ = with_tricks(TASK, learned, random_scaling=3.0)
    episode, params, data = task.init_fn(jax.random.key(0)), TASK.init_fn(None), batch()
    loss = lambda t, p: float(t.loss_fn(t.predict_fn(p, data), data))
    assert loss(task, episode) == pytest.approx(loss(TASK, params), rel=1e-5)
    factors = flat(episode.constants.scale.network)
    assert np.abs(np.log(factors)).max() <= 3.0
    assert np.log(factors).std() > 1.0
    np.testing.assert_allclose(flat(episode.params.network) * factors, flat(params), rtol=1e-5)
    assert with_tricks(TASK, learned) == (TASK, learned)


def test_the_convex_companion_adds_a_bounded_square():
    learned = LEARNED["adam_rates"].learned(LEARNED["adam_rates"].options())
    task, _ = with_tricks(TASK, learned, companion_size=4)
    episode, data = task.init_fn(jax.random.key(0)), batch()
    loss = lambda e: float(task.loss_fn(task.predict_fn(e, data), data))
    plain = float(LOSS(mlp(TASK.init_fn(None), data), data))
    target = np.asarray(episode.constants.target)
    assert loss(episode) - plain == pytest.approx(np.mean(target**2), abs=1e-5)
    away = episode._replace(params=episode.params._replace(companion=jnp.array([9.0, *target[1:]])))
    assert loss(away) - plain == pytest.approx(10.0 / 4, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"random_scaling": -1.0}, "`random_scaling` must be a number >= 0, got -1.0"),
        ({"companion_size": -1}, "`companion_size` must be a number >= 0, got -1"),
        ({"horizons": (200, 100)}, r"`horizons` must be ascending numbers of steps, got \(200, 100\)"),
        ({"horizons": (100,), "max_age": 3}, "`max_age` must be None beside `horizons`, got 3"),
        ({"horizon_iterations": 0}, "`horizon_iterations` must be at least 1"),
    ],
)
def test_wrong_tricks_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        MetaTrainingConfig(**wrong)
