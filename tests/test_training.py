"""Trainings side by side against trainings one by one; the grid; the clock."""

import dataclasses

import blobs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlhf_optax import init_meta_params
from mlhf_optax.comparison import comparison, first_order, inner_training, training, trainings
from mlhf_optax.comparison.inner_training import accuracy, draw_order, init_training, mean_loss
from mlhf_optax.comparison.timing import seconds_per_step
from mlhf_optax.tasks import no_augmentation, take

TASK, SEQUENTIAL = (
    dataclasses.replace(task, augment_fn=no_augmentation) for task in (blobs.TASK, blobs.SEQUENTIAL)
)


def train_naively(optimizer, seed, num_steps):
    """Losses on the whole training part after every step, and test accuracy, by a plain loop."""
    key = jax.random.key(seed)
    state = init_training(TASK, lambda: optimizer, {}, key)
    params, opt_state, losses = state.params, state.opt_state, []
    loss = lambda p, batch: TASK.loss_fn(TASK.predict_fn(p, batch), batch)
    for indices in draw_order(TASK, key, num_steps):
        grads = jax.grad(loss)(params, take(TASK.data.train, indices))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss(params, TASK.data.train)))
    right = np.argmax(TASK.predict_fn(params, TASK.data.test), axis=1) == TASK.data.test["label"]
    return losses, right.mean()


@pytest.mark.parametrize("family", first_order.FAMILIES)
@pytest.mark.parametrize("task", [TASK, SEQUENTIAL])
def test_trainings_side_by_side_are_those_one_by_one(family, task):
    entries = first_order.grid(8, [family])[1::4]
    stacked = first_order.stack_hyperparameters(entries)
    curves = training.train(task, first_order.FAMILIES[family], stacked, seeds=[3, 5], num_steps=4)
    assert curves.steps == (1, 2, 3, 4)
    assert curves.train_loss.shape == (len(entries), 2, 4)
    for index, entry in enumerate(entries[:2]):
        for number, seed in enumerate([3, 5]):
            losses, share = train_naively(entry.make(), seed, 4)
            np.testing.assert_allclose(curves.train_loss[index, number], losses, rtol=1e-5)
            np.testing.assert_allclose(curves.test_accuracy[index, number], share, rtol=1e-6)


def test_seeds_decide_the_start_and_the_order_of_the_batches():
    zero = training.train(TASK, optax.set_to_zero, seeds=[0, 1, 0], num_steps=1).train_loss[0, :, 0]
    assert zero[0] == zero[2] != zero[1]
    orders = [np.asarray(draw_order(TASK, jax.random.key(seed), 4)) for seed in (0, 1, 0)]
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])


def test_the_loss_is_taken_at_the_chosen_steps():
    every = training.train(TASK, lambda: optax.sgd(0.5), seeds=[0], num_steps=6)
    some = training.train(TASK, lambda: optax.sgd(0.5), seeds=[0], num_steps=6, record_steps=[2, 5])
    assert some.steps == (2, 5)
    np.testing.assert_allclose(some.train_loss[0, 0], every.train_loss[0, 0, [1, 4]], rtol=1e-6)


def test_the_optimizer_gets_the_batch():
    def init(params):
        return jnp.zeros(8, jnp.int32)

    def update(updates, state, params=None, *, batch):
        return jax.tree.map(jnp.zeros_like, updates), batch["label"]

    make = lambda: optax.GradientTransformationExtraArgs(init, update)
    key = jax.random.key(0)
    state = init_training(TASK, make, {}, key)
    indices = draw_order(TASK, key, 1)[0]
    state = inner_training.training_step(TASK, make, {}, take(TASK.data.train, indices), state)
    np.testing.assert_array_equal(state.opt_state, TASK.data.train["label"][indices])


def test_every_step_is_reported_and_some_with_losses():
    calls = []
    curves = training.train(
        TASK,
        lambda: optax.sgd(0.1),
        seeds=[0, 1],
        num_steps=3,
        record_steps=[2, 3],
        on_step=lambda step, loss: calls.append((step, loss)),
    )
    assert [step for step, _ in calls] == [1, 2, 3]
    assert calls[0][1] is None
    np.testing.assert_array_equal(calls[1][1], curves.train_loss[..., 0])


def test_divergence_is_kept_and_counts_as_wrong():
    curves = training.train(TASK, lambda: optax.sgd(float("inf")), seeds=[0], num_steps=5)
    assert not np.isfinite(curves.train_loss[0, 0, -1])
    assert curves.test_accuracy[0, 0] == 0


def test_mlhf_trains_a_task():
    contender = comparison.mlhf_contender(TASK, init_meta_params(jax.random.key(0)), source="fresh")
    assert contender.hyperparameters[0] == {
        "learning_rate": 1.0,
        "num_cg_steps": 4,
        "curvature_batch_size": None,
        "max_update_ratio": 0.25,
        "carry_dtype": "float32",
        "momentum": 0.0,
        "meta_params": "fresh",
    }
    curves = training.train(TASK, contender.make_optimizer, contender.stacked, seeds=[0], num_steps=5)
    losses = curves.train_loss[0, 0]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("steps", [1, 7, 60, 500])
def test_recorded_steps_include_those_of_the_table(steps):
    recorded = training.default_record_steps(steps)
    assert list(recorded) == sorted(set(recorded))
    assert {step for step in training.TABLE_STEPS if step <= steps} | {1, steps} <= set(recorded)
    assert len(recorded) <= 30
    assert recorded[-1] == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "`seeds` is empty"),
        ({"num_steps": 0}, "`num_steps` must be at least 1, got 0"),
        (
            {"num_steps": 5, "record_steps": [2, 6]},
            r"`record_steps` must ascend within \[1, 5\], got \(2, 6\)",
        ),
        ({"num_steps": 5, "record_steps": [3, 3]}, "`record_steps` must ascend"),
        ({"num_steps": 5, "record_steps": [0, 3]}, "`record_steps` must ascend"),
        ({"num_steps": 5, "record_steps": []}, "`record_steps` must ascend"),
    ],
)
def test_arguments_of_train_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        training.train(TASK, lambda: optax.sgd(0.1), **options)


def test_too_large_batches_are_refused():
    with pytest.raises(
        ValueError, match="`batch_size` must lie between 1 and the number of examples, 30, got 31"
    ):
        training.train(dataclasses.replace(TASK, batch_size=31), lambda: optax.sgd(0.1))


def test_hyperparameters_must_be_of_one_length():
    rates = {"learning_rate": jnp.ones(2), "momentum": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r"`hyperparameters` must be arrays of one length, got lengths \[2, 3\]"
    ):
        training.train(TASK, first_order.sgd, rates)


def test_evaluation_in_chunks_is_that_of_the_whole(monkeypatch):
    def evaluate():
        runs = trainings.Trainings(trainings.Program(TASK, optax.set_to_zero), None, [0], 1)
        return runs.train_loss()[0, 0], runs.test_accuracy()[0, 0]

    params = init_training(TASK, optax.set_to_zero, {}, jax.random.key(0)).params
    whole = mean_loss(TASK, params, TASK.data.train), accuracy(TASK, params, TASK.data.test)
    np.testing.assert_allclose(evaluate(), whole, rtol=1e-6)
    monkeypatch.setattr(trainings, "_EVALUATION_CHUNK", 7)
    np.testing.assert_allclose(evaluate(), whole, rtol=1e-6)


@pytest.mark.parametrize("task", [TASK, SEQUENTIAL])
def test_mini_batches_are_augmented_anew_in_every_step_and_training(task):
    """The augmentation writes a random number into each label; the optimizer remembers them."""

    def remember(updates, state, params=None, *, batch):
        count, seen = state
        return jax.tree.map(jnp.zeros_like, updates), (count + 1, seen.at[count].set(batch["label"]))

    task = dataclasses.replace(
        task,
        augment_fn=lambda key, batch: {**batch, "label": jax.random.bits(key, batch["label"].shape)},
        loss_fn=lambda outputs, batch: jnp.mean(outputs),
    )
    init = lambda params: (jnp.zeros((), jnp.int32), jnp.zeros((3, 8), jnp.uint32))
    make = lambda rate: optax.GradientTransformationExtraArgs(init, remember)
    runs = trainings.Trainings(trainings.Program(task, make), {"rate": np.ones(2)}, [0, 1], 3)
    for _ in range(3):
        runs.step()
    states = jax.tree.leaves(runs.state, is_leaf=lambda x: hasattr(x, "opt_state"))
    seen = np.array([state.opt_state[1] for state in states]).reshape(2, 2, 3, 8)
    np.testing.assert_array_equal(seen[0], seen[1])  # the same for every setting
    assert len(np.unique(seen[0])) == 2 * 3 * 8


def test_networks_with_state_are_evaluated_with_statistics_of_the_training_part():
    """The network subtracts a mean of labels: of the batch in training, of the training part else."""

    def predict_fn(params, batch):
        mean = batch.get("model_state", jnp.mean(batch["label"]))
        return jnp.zeros((len(batch["label"]), 3)) + params["bias"] - mean

    task = dataclasses.replace(
        TASK,
        predict_fn=predict_fn,
        loss_fn=lambda outputs, batch: jnp.mean(outputs),
        model_state_fn=lambda params, examples: jnp.mean(examples["label"]) + params["bias"][0],
    )
    runs = trainings.Trainings(trainings.Program(task, lambda: optax.sgd(1.0)), None, [0], 1)
    runs.step()
    # One step moves each bias by -1/3; the bias itself cancels out as it is in the state, too.
    expected = -np.mean(TASK.data.train["label"])
    np.testing.assert_allclose(runs.train_loss(), [[expected]], rtol=1e-6)
    assert runs.state.params["bias"][0, 0] == pytest.approx([-1 / 3] * 3)


def test_the_grid_is_that_of_the_paper():
    entries = first_order.grid()
    assert [sum(e.family == family for e in entries) for family in first_order.FAMILIES] == [9, 9, 27]
    assert len({entry.name for entry in entries}) == 45
    for entry in entries:
        values = dict(entry.hyperparameters)
        assert values.pop("learning_rate") in (0.1, 0.01, 0.001)
        assert set(values.values()) <= {0.9, 0.99, 0.999}
        assert (
            values.keys() == {"sgd": {"momentum"}, "rmsprop": {"decay"}, "adam": {"b1", "b2"}}[entry.family]
        )


def test_learning_rates_of_the_grid_grow_with_the_batch():
    rates = {entry.hyperparameters["learning_rate"] for entry in first_order.grid(256, ["sgd"])}
    assert rates == {0.2, 0.02, 0.002}


def test_arguments_of_the_grid_are_checked():
    with pytest.raises(
        ValueError, match=r"`families` must be among \['sgd', 'rmsprop', 'adam'\], got \['lion'\]"
    ):
        first_order.grid(families=["adam", "lion"])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        first_order.grid(0)
    with pytest.raises(
        ValueError, match=r"`entries` must be of exactly one family, got \['rmsprop', 'sgd'\]"
    ):
        first_order.stack_hyperparameters(first_order.grid(families=["sgd", "rmsprop"]))


def test_every_optimizer_is_timed_in_turns():
    rounds = []
    optimizers = {
        "sgd": (first_order.sgd, {"learning_rate": 0.1, "momentum": 0.9}),
        "zero": (optax.set_to_zero, {}),
    }
    times = seconds_per_step(TASK, optimizers, num_steps=2, repeats=3, on_repeat=rounds.append)
    assert times.keys() == optimizers.keys()
    assert min(times.values()) > 0
    assert rounds == [1, 2, 3]


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"repeats": 0}])
def test_arguments_of_the_clock_are_checked(options):
    with pytest.raises(ValueError, match="`num_steps` and `repeats` must be at least 1"):
        seconds_per_step(TASK, {}, **options)
