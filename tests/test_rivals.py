"""The learned optimizers of the literature against naive ones in NumPy, and how they are meta-trained."""

from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rivals_reference as reference
from problems import LOSS, batch, flat, mlp, mlp_params

from mlhf_optax import lodo
from mlhf_optax.learned import LEARNED
from mlhf_optax.learned.backpropagation import MetaLossName
from mlhf_optax.learned.literature.hierarchical import hierarchical, init_hierarchical
from mlhf_optax.learned.literature.hyperadam import hyperadam, init_hyperadam
from mlhf_optax.learned.literature.l2l import init_l2l, l2l
from mlhf_optax.learned.literature.rnnprop import RNNPropOptions, init_rnnprop, rnnprop
from mlhf_optax.learned.literature.variational_hyperadam import (
    init_variational_hyperadam,
    variational_hyperadam,
)
from mlhf_optax.meta_training import META_LOSSES, MetaTrainingConfig, Trajectory, make_meta_step, with_tricks

pytestmark = pytest.mark.usefixtures("unoptimised")

TASK = SimpleNamespace(init_fn=lambda key: mlp_params(dtype=jnp.float32), predict_fn=mlp, loss_fn=LOSS)
BACKPROPAGATED = ["rnnprop", "l2l", "hyperadam", "variational_hyperadam", "hierarchical"]


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


def test_l2l_is_the_naive_one(x64):
    meta_params = louder(init_l2l(jax.random.key(0)))
    agrees(l2l(meta_params), reference.L2L(meta_params, 26))


def test_hyperadam_is_the_naive_one(x64):
    meta_params = louder(init_hyperadam(jax.random.key(0)))
    state = agrees(hyperadam(meta_params), reference.HyperAdam(meta_params, 26))
    assert state[0].moments.variance_weight["Dense_1"]["bias"].shape == (20, 2)


def test_hyperadam_with_constant_decays_and_one_candidate_is_adam(x64):
    # Decays that no input moves, and weights that take the first candidate alone.
    logit = lambda p: np.log(p / (1 - p))
    meta_params = init_hyperadam(jax.random.key(0))
    decays = meta_params.decays._replace(
        kernel=jnp.zeros((40, 40)),
        bias=jnp.concatenate([jnp.full(20, logit(0.9)), jnp.full(20, logit(0.99))]),
    )
    weights = meta_params.weights._replace(kernel=jnp.zeros((20, 20)), bias=jnp.zeros(20).at[0].set(1.0))
    tx = hyperadam(meta_params._replace(decays=decays, weights=weights), learning_rate=0.3)
    adam, params = optax.adam(0.3, 0.9, 0.99), mlp_params(dtype=float)
    own_state, its_state = tx.init(params), adam.init(params)
    for grads in gradients(5):
        grads = jax.tree.map(jnp.asarray, grads)
        own, own_state = tx.update(grads, own_state)
        its, its_state = adam.update(grads, its_state)
        np.testing.assert_allclose(flat(own), flat(its), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kl_reduction", ["sum", "mean"])
def test_variational_hyperadam_is_the_naive_one(deterministic, kl_reduction, x64):
    meta_params = louder(init_variational_hyperadam(jax.random.key(0)))
    leaves, key = jax.tree.leaves(mlp_params()), jax.random.key(7)

    def noise():
        nonlocal key
        key, draw = jax.random.split(key)
        keys = jax.random.split(draw, len(leaves))
        return flat([jax.random.normal(k, p.shape, float) for k, p in zip(keys, leaves, strict=True)])

    naive = reference.VariationalHyperAdam(meta_params, 26, None if deterministic else noise)
    options = {"deterministic": deterministic, "kl_reduction": kl_reduction, "seed": 7}
    state = agrees(variational_hyperadam(meta_params, **options), naive)
    assert float(state[0].kl) == pytest.approx(getattr(np, kl_reduction)(naive.kl), rel=1e-5)


def test_a_wrong_reduction_of_the_divergence_is_refused():
    with pytest.raises(ValueError, match="`kl_reduction` must be one of 'sum', 'mean', got 'max'"):
        variational_hyperadam(init_variational_hyperadam(jax.random.key(0)), kl_reduction="max")


def test_the_hierarchical_optimizer_is_the_naive_one(x64):
    meta_params = louder(init_hierarchical(jax.random.key(0)), 0.1)
    sizes = [leaf.size for leaf in jax.tree.leaves(mlp_params())]
    state = agrees(hierarchical(meta_params), reference.Hierarchical(meta_params, sizes))
    assert state[0].means["Dense_0"]["kernel"].shape == (4, 3, 4)


def test_a_wrong_first_rate_of_the_hierarchical_optimizer_is_refused():
    with pytest.raises(ValueError, match="`initial_rate` must be a positive number, got 0"):
        hierarchical(init_hierarchical(jax.random.key(0)), initial_rate=0)


# LODO, which is not meta-trained.


def test_lodo_is_the_naive_one(x64):
    tx = lodo(0.3, 0.01, 0.8)
    state = tx.init(mlp_params(dtype=float))
    blocks, permutations = np.asarray(state.blocks), np.asarray(state.permutations)
    assert blocks.shape == (16, 14, 4, 4)
    agrees(tx, reference.LODO(blocks, permutations, 26, 0.3, 0.01, 0.8))


def test_lodo_starts_as_gradient_descent_and_learns_from_the_second_step_on(x64):
    params, tx = mlp_params(dtype=float), lodo(0.5, momentum=0.0)
    first, second = (jax.tree.map(jnp.asarray, g) for g in gradients(2))
    updates, state = tx.update(first, tx.init(params))
    np.testing.assert_allclose(flat(updates), -0.5 * flat(first), rtol=1e-10, atol=1e-12)
    assert not np.allclose(flat(tx.update(second, state)[0]), -0.5 * flat(second), rtol=1e-5)


def test_lodo_learns_the_inverse_hessian_of_a_noisy_bowl():
    scales = jnp.exp(jnp.linspace(jnp.log(0.01), 0.0, 8))
    bowl = lambda x, centre: 0.5 * jnp.sum(scales * (x - centre) ** 2)

    def mean_loss(tx, steps=4000):
        def step(carry, key):
            x, state, centre = carry
            centre += jax.random.normal(key, centre.shape)
            loss, grads = jax.value_and_grad(bowl)(x, centre)
            updates, state = tx.update(grads, state)
            return (x + updates, state, centre), loss

        start = (jnp.zeros(8), tx.init(jnp.zeros(8)), jnp.zeros(8))
        losses = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(jax.random.key(0), steps))[1])()
        return float(jnp.mean(losses[steps // 2 :]))

    floor = 0.5 * float(jnp.sum(scales))
    learned = mean_loss(lodo(1.0, 3e-3, 0.0))
    assert floor < learned < 0.8 * mean_loss(optax.sgd(1.0))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be a positive number, got 0.0"),
        ({"learning_rate": lambda count: 1.0}, TypeError, "must be a number, got a schedule"),
        ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"block_size": 1}, ValueError, "`block_size` must be at least 2, got 1"),
    ],
)
def test_wrong_arguments_of_lodo_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        lodo(**arguments)


def test_lodo_without_parameters_is_refused():
    with pytest.raises(ValueError, match="parameters with at least one number, got none"):
        lodo().init({})


# Meta-training.


def test_the_meta_losses_are_those_of_the_papers():
    assert set(META_LOSSES) == set(get_args(MetaLossName))
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
        (
            {"inner_gradients": "both"},
            "`inner_gradients` must be one of 'constant', .*, got 'both'",
        ),
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
        fresh_probability=1.0,
        max_age=8,
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
    assert max(ages) == 4


def test_random_scaling_leaves_the_network_and_changes_what_is_trained():
    learned = LEARNED["adam_rates"].learned(LEARNED["adam_rates"].options())
    task, _ = with_tricks(TASK, learned, random_scaling=3.0)
    scaled, params, data = task.init_fn(jax.random.key(0)), TASK.init_fn(None), batch()
    loss = lambda t, p: float(t.loss_fn(t.predict_fn(p, data), data))
    assert loss(task, scaled) == pytest.approx(loss(TASK, params), rel=1e-5)
    factors = flat(scaled.fixed.scale.network)
    assert np.abs(np.log(factors)).max() <= 3.0
    assert np.log(factors).std() > 1.0
    np.testing.assert_allclose(flat(scaled.seen.network) * factors, flat(params), rtol=1e-5)
    assert with_tricks(TASK, learned) == (TASK, learned)


def test_the_convex_companion_adds_a_bounded_square():
    learned = LEARNED["adam_rates"].learned(LEARNED["adam_rates"].options())
    task, _ = with_tricks(TASK, learned, companion_size=4)
    params, data = task.init_fn(jax.random.key(0)), batch()
    loss = lambda p: float(task.loss_fn(task.predict_fn(p, data), data))
    plain = float(LOSS(mlp(TASK.init_fn(None), data), data))
    target = np.asarray(params.fixed.target)
    assert loss(params) - plain == pytest.approx(np.mean(target**2), abs=1e-5)
    away = params._replace(seen=params.seen._replace(companion=jnp.array([9.0, *target[1:]])))
    assert loss(away) - plain == pytest.approx(10.0 / 4, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"random_scaling": -1.0}, "`random_scaling` must be a number >= 0, got -1.0"),
        ({"companion_size": -1}, "`companion_size` must be a number >= 0, got -1"),
    ],
)
def test_wrong_tricks_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        MetaTrainingConfig(**wrong)
