"""One meta-iteration: pure, compiled once, for any learned optimizer; and that it learns."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from mlhf_optax import Settings, init_meta_params
from mlhf_optax.meta_training import (
    LearnedOptimizer,
    MetaGradient,
    MetaTrainingConfig,
    make_meta_step,
    meta_optimizer,
    mlhf_optimizer,
    unrolled_optimizer,
)

pytestmark = pytest.mark.usefixtures("unoptimised")

NUM_TASKS, LENGTH = 4, 3


def meta_batches(number, num_tasks=NUM_TASKS):
    """Mini-batches of an unroll of every task, leaves (num_tasks, LENGTH + 1, 8, ...)."""
    batches = problems.stack(problems.batches(num_tasks * (LENGTH + 1), seed=number))
    return jax.tree.map(lambda x: x.reshape(num_tasks, LENGTH + 1, *x.shape[1:]), batches)


# Learned optimizers of other kinds come onto the same harness.


@pytest.mark.parametrize("second_derivatives", [False, True])
def test_back_propagation_through_the_unroll_by_hand(x64, second_derivatives):
    """Two steps of gradient descent w <- w - rate * a * w on a parabola of curvature a."""
    task = SimpleNamespace(
        init_fn=None, predict_fn=lambda w, a: (w, a), loss_fn=lambda z, a: 0.5 * a * z[0] ** 2
    )
    build = lambda rate, task: optax.GradientTransformationExtraArgs(
        lambda w: (), lambda g, state, w, **extra_args: (-rate * g, state)
    )
    meta_loss = lambda trajectory: trajectory.losses[-1] + trajectory.next_losses[0]
    rate, w0, a = 0.3, 2.0, np.array([1.0, 1.5, 0.5])
    results = []
    for remat in (False, True):
        learned = unrolled_optimizer(build, meta_loss, second_derivatives=second_derivatives, remat=remat)
        run = jax.jit(lambda *arguments: learned.meta_gradient(arguments[0], task, *arguments[1:], None))  # noqa: B023
        results.append(run(rate, w0, (), a))
    w1 = w0 * (1 - rate * a[0])
    w2 = w1 * (1 - rate * a[1])
    slope_1 = -a[0] * w0
    slope_2 = slope_1 - a[1] * w1 - (rate * a[1] * slope_1 if second_derivatives else 0.0)
    for result in results:
        np.testing.assert_allclose(result.params, w2)
        np.testing.assert_allclose(
            result.inner_losses, [0.5 * a[0] * w0**2, 0.5 * a[1] * w1**2, 0.25 * w2**2]
        )
        np.testing.assert_allclose(result.meta_losses["meta_loss"], 0.25 * w2**2 + 0.5 * a[0] * w1**2)
        np.testing.assert_allclose(result.gradient, a[2] * w2 * slope_2 + a[0] * w1 * slope_1)
        np.testing.assert_allclose(result.gradient_norm, a[2] * w2)


# MLHF.


class CountedTask:
    """A task that counts how often its model is traced."""

    def __init__(self):
        self.loss_fn, self.traces = problems.LOSS, 0

    def init_fn(self, key):
        return {"kernel": 0.5 * jax.random.normal(key, (3, 2))}

    def predict_fn(self, params, batch):
        self.traces += 1
        return problems.linear(params, batch)


class Mlhf:
    """A compiled meta-step of MLHF and its start, which begins far too cautiously."""

    def __init__(self, **config):
        self.task = CountedTask()
        learned = mlhf_optimizer(num_cg_steps=1, unroll=1, update_noise=0.0)
        self.config = MetaTrainingConfig(num_tasks=NUM_TASKS, unroll_length=LENGTH, **config)
        self.init, self.meta_step = make_meta_step(self.task, learned, self.config)
        self.meta_params = init_meta_params(
            jax.random.key(1), Settings(initial_damping=300.0), layer_types=["dense_kernel"], units=(2,)
        )

    def start(self):
        return self.init(jax.random.key(0), self.meta_params)


@pytest.fixture(scope="module")
def mlhf():
    return Mlhf(meta_learning_rate=0.03, max_age=2 * LENGTH)


def test_the_state_is_a_fixed_point_and_the_program_is_compiled_once(mlhf):
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    state = mlhf.start()
    # A weak type would be lost in a checkpoint, and the program compiled again after it.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    first = kind(state)
    state, metrics = mlhf.meta_step(state, meta_batches(0))
    traces = mlhf.task.traces
    for number in range(1, 4):
        assert kind(state) == first
        state, metrics = mlhf.meta_step(state, meta_batches(number))
    assert mlhf.task.traces == traces
    assert int(state.iteration) == 4
    assert all(np.isfinite(value) for value in metrics.values())
    assert set(metrics) >= {"l_p", "l_s", "inner_loss", "meta_gradient_norm", "age", "healthy"}


def test_the_same_state_and_batches_give_the_same_result_and_the_start_is_not_used_up(mlhf):
    results = [mlhf.meta_step(mlhf.start(), meta_batches(0)) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    other, _ = mlhf.meta_step(results[0][0], meta_batches(1))
    assert not np.array_equal(other.key, results[1][0].key)
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(mlhf.meta_params))


def test_trainings_side_by_side_and_one_after_another_are_the_same(mlhf):
    sequential = Mlhf(meta_learning_rate=0.03, max_age=2 * LENGTH, task_axis="sequential")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    (state, metrics), (other_state, other_metrics) = (
        made.meta_step(made.start(), meta_batches(0)) for made in (mlhf, sequential)
    )
    jax.tree.map(close, metrics, other_metrics)
    jax.tree.map(close, state.trainings, other_state.trainings)


def test_meta_training_makes_the_inner_loss_fall(mlhf):
    state, losses = mlhf.start(), []
    for number in range(60):
        state, metrics = mlhf.meta_step(state, meta_batches(number))
        losses.append(float(metrics["inner_loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert int(state.counts["dropped_gradients"]) == 0
    assert int(state.counts["fresh"] + state.counts["replayed"]) > 60


# The care of the trainings, seen from outside, with an optimizer that does what the mini-batches say.


def obedient():
    """`losses`, `gradient` and `params` of an unroll are those of its first mini-batch."""

    def meta_gradient(meta_params, task, params, opt_state, batches, key):
        first = jax.tree.map(lambda x: x[0], batches)
        return MetaGradient(
            {"rate": first["gradient"]},
            {"meta_loss": first["gradient"]},
            params + first["move"],
            opt_state,
            batches["loss"],
            jnp.ones(()),
        )

    build = lambda meta_params, task: optax.with_extra_args_support(optax.sgd(0.1))
    return LearnedOptimizer(build, meta_gradient)


def obedient_step(**config):
    config = MetaTrainingConfig(num_tasks=3, unroll_length=2, keep_probability=1.0, **config)
    task = SimpleNamespace(init_fn=lambda key: jnp.zeros(()), predict_fn=None, loss_fn=None)
    init, meta_step = make_meta_step(task, obedient(), config, optax.sgd(1.0))
    return init(jax.random.key(0), {"rate": jnp.zeros(())}), meta_step


def obedient_batches(gradient=(1.0, 1.0, 1.0), loss=(1.0, 1.0, 1.0), move=(0.0, 0.0, 0.0)):
    repeat = lambda x: jnp.broadcast_to(jnp.asarray(x)[:, None], (3, 3))
    return {"gradient": repeat(gradient), "loss": repeat(loss), "move": repeat(move)}


def test_a_gradient_that_is_not_finite_is_dropped_and_counted():
    state, meta_step = obedient_step()
    state, metrics = meta_step(state, obedient_batches(gradient=(1.0, np.nan, 4.0)))
    assert float(state.meta_params["rate"]) == -2.5
    assert int(metrics["dropped_gradients"]) == 1
    state, metrics = meta_step(state, obedient_batches(gradient=(np.inf, np.nan, np.nan)))
    assert float(state.meta_params["rate"]) == -2.5
    assert int(state.counts["dropped_gradients"]) == 4


def test_dead_trainings_are_counted_and_replaced():
    state, meta_step = obedient_step(stuck_patience=4, store_probability=1.0, fresh_probability=0.0)
    state, metrics = meta_step(state, obedient_batches(loss=(1.0, 1.0, 1.0), move=(1.0, 2.0, 3.0)))
    np.testing.assert_array_equal(state.trainings.age, [2, 2, 2])
    assert float(metrics["healthy"]) == 1.0
    assert int(state.replay.stored) == 0  # none has got anywhere yet
    # The first has diverged, the second has been at chance for long enough, the third learns.
    state, metrics = meta_step(state, obedient_batches(loss=(9.0, 1.0, 0.5)))
    assert [int(metrics[name]) for name in ("diverged", "stuck", "fresh", "replayed")] == [1, 1, 0, 2]
    assert float(metrics["healthy"]) == pytest.approx(1 / 3)
    np.testing.assert_array_equal(state.trainings.params, [3.0, 3.0, 3.0])
    np.testing.assert_array_equal(state.trainings.age, [4, 4, 4])
    state, metrics = meta_step(state, obedient_batches(loss=(np.nan, 0.1, 0.1)))
    assert int(metrics["diverged"]) == 1
    assert [int(state.counts[name]) for name in ("diverged", "stuck", "replayed")] == [2, 1, 3]
    assert np.isfinite(state.trainings.params).all()
    assert np.isfinite(metrics["inner_loss"])


def test_batches_of_another_shape_are_an_error():
    state, meta_step = obedient_step()
    message = r"`batches` must have shape \(num_tasks, unroll_length \+ 1, ...\) = \(3, 3\) .*got \[\(3, 2\)"
    with pytest.raises(ValueError, match=message):
        meta_step(state, jax.tree.map(lambda x: x[:, :2], obedient_batches()))
    with pytest.raises(ValueError, match="got no arrays"):
        meta_step(state, {})


# The meta-optimizer.


def moves(gradients, **config):
    """What Adam of the config does with these gradients, one after another."""
    tx = meta_optimizer(MetaTrainingConfig(meta_learning_rate=1.0, **config))
    state, result = tx.init(jnp.zeros(())), []
    for gradient in gradients:
        update, state = tx.update(jnp.asarray(gradient), state)
        result.append(float(update))
    return result


def test_the_meta_optimizer_clips_and_decays():
    np.testing.assert_allclose(moves([0.3, 0.3]), [-1.0, -1.0], rtol=1e-3)
    clipped, free = moves([1.0, 1e3, 0.1]), moves([1.0, 1e3, 0.1], meta_gradient_clip=None)
    np.testing.assert_allclose(clipped, moves([1.0, 1.0, 0.1]), rtol=1e-5)
    assert clipped != pytest.approx(free, rel=0.01)
    rates = -np.array(moves([1.0] * 12, decay_iterations=10, final_rate_share=0.1))
    np.testing.assert_allclose(rates[[0, 5, 10, 11]], [1.0, 0.55, 0.1, 0.1], rtol=1e-4)
