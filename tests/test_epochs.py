"""Trainings for epochs: what is judged when, and going on after a stop."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blobs import SEQUENTIAL, SGD, TASK

from mlhf_optax.comparison import epochs, first_order, training
from mlhf_optax.comparison.comparison import Contender
from mlhf_optax.comparison.epoch_results import EpochResult
from mlhf_optax.comparison.epochs import Plan, default_judge_at, train_epochs
from mlhf_optax.comparison.trainings import Program, Trainings
from mlhf_optax.tasks import Stream, no_augmentation


@pytest.mark.parametrize("task", [TASK, SEQUENTIAL])
def test_curves_are_those_of_training_by_steps(task, tmp_path):
    results = train_epochs(task, SGD, Plan(4, [0, 3], tmp_path, judge_at=[1, 4]))
    stacked = first_order.stack_hyperparameters(first_order.grid(8, ["sgd"]))
    curves = training.train(task, first_order.sgd, stacked, seeds=[0, 3], num_steps=12, record_steps=[3, 12])
    assert [result.name for result in results] == list(SGD.names)
    for index, result in enumerate(results):
        assert result.steps == (3, 12)
        assert result.steps_per_epoch == 3
        np.testing.assert_allclose(result.train_loss, curves.train_loss[index].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(result.final_losses, curves.train_loss[index, :, -1], rtol=1e-5)
        assert result.test_accuracy == pytest.approx(curves.test_accuracy[index].mean())
        assert result.test_curve[-1] == result.test_accuracy


class Stop(Exception):
    """Stands for a process that is killed."""


def stop_after(count):
    """A callback that raises after so many calls with steps."""
    calls = iter(range(count))

    def on_step(steps, loss):
        if steps and next(calls, None) is None:
            raise Stop

    return on_step


def streamed(task):
    """The task, with its training part read example by example."""
    train, ready = task.data.train, lambda example, rng: example
    source = [{key: values[number] for key, values in train.items()} for number in range(30)]
    return dataclasses.replace(
        task, load_data=lambda: dataclasses.replace(task.data, train=Stream(source, ready, sample=train))
    )


@pytest.mark.parametrize(
    ("task", "steps"), [(TASK, 8), (SEQUENTIAL, 8), (SEQUENTIAL, 20), (streamed(TASK), 8)]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(task, steps, tmp_path):
    contender = dataclasses.replace(
        SGD,
        names=SGD.names[:3],
        hyperparameters=SGD.hyperparameters[:3],
        stacked={name: values[:3] for name, values in SGD.stacked.items()},
    )
    whole = train_epochs(task, contender, Plan(4, [0, 1], tmp_path / "whole", judge_at=[1, 2, 4]))
    plan = Plan(4, [0, 1], tmp_path / "parts", resume=True, judge_at=[1, 2, 4])
    with pytest.raises(Stop):
        train_epochs(task, contender, plan, stop_after(steps))
    taken = []
    resumed = train_epochs(task, contender, plan, lambda steps, loss: taken.append(steps))
    assert resumed == whole
    # Whole epochs are done again from the last one judged, and no more than that.
    is_sequential = task is SEQUENTIAL
    done = 6 * is_sequential * (steps > 12)
    assert sum(1 for number in taken if number) < (36 if is_sequential else 12) - done
    assert train_epochs(task, contender, plan, stop_after(0)) == whole
    assert not list((tmp_path / "parts").glob("*/checkpoint*"))


@pytest.mark.parametrize("task", [TASK, SEQUENTIAL])
def test_more_seeds_take_only_the_new_ones(task, tmp_path):
    whole = train_epochs(task, SGD, Plan(2, [0, 1, 2], tmp_path / "whole"))
    taken, plan = [], Plan(2, [0], tmp_path / "grown", resume=True)
    train_epochs(task, SGD, plan)
    plan = plan._replace(seeds=[0, 1, 2])
    # A stop on the way loses neither the first seed nor the epochs of the others.
    with pytest.raises(Stop):
        train_epochs(task, SGD, plan, stop_after(5))
    grown = train_epochs(task, SGD, plan, lambda number, loss: taken.append(number))
    for one, other in zip(grown, whole, strict=True):
        assert (one.name, one.seeds, one.steps) == (other.name, 3, other.steps)
        for curve in ("train_loss", "test_curve", "final_losses"):
            np.testing.assert_allclose(getattr(one, curve), getattr(other, curve), rtol=1e-5)
        assert one.test_accuracy == pytest.approx(other.test_accuracy)
    assert sum(taken) < 9 * 2 * 6  # nine settings, two new seeds, two epochs of three steps
    assert train_epochs(task, SGD, plan, stop_after(0)) == grown
    with pytest.raises(ValueError, match="has results of other settings"):
        train_epochs(task, SGD, plan._replace(seeds=[0, 1]))


def test_results_that_do_not_belong_together_are_not_joined(tmp_path):
    (one, other, *_) = train_epochs(TASK, SGD, Plan(1, [0], tmp_path))
    with pytest.raises(ValueError, match="differ in name, hyperparameters"):
        one.joined(other)


def test_streamed_mini_batches_are_those_of_the_stream(tmp_path):
    """Without augmentation, a step of SGD by hand on the first mini-batch of every seed."""
    task = dataclasses.replace(streamed(TASK), augment_fn=no_augmentation)
    runs = Trainings(Program(task, lambda: optax.sgd(0.5)), None, [0, 4], 3)
    before = jax.tree.map(np.array, runs.state.params)  # a copy: the state is donated
    runs.step()
    for index, seed in enumerate((0, 4)):
        batch = next(task.data.train.batches(seed, 8))
        params = jax.tree.map(lambda leaf: leaf[0, index], before)  # noqa: B023
        gradient = jax.grad(lambda p: task.loss_fn(task.predict_fn(p, batch), batch))(params)  # noqa: B023
        expected = params["kernel"] - 0.5 * gradient["kernel"]
        np.testing.assert_allclose(runs.state.params["kernel"][0, index], expected, rtol=1e-5)


def test_results_are_not_overwritten(tmp_path):
    train_epochs(TASK, SGD, Plan(1, [0], tmp_path))
    with pytest.raises(ValueError, match=r"already has results of sgd lr=.*--resume"):
        train_epochs(TASK, SGD, Plan(1, [0], tmp_path))


def test_results_of_other_settings_are_refused(tmp_path):
    train_epochs(TASK, SGD, Plan(1, [0], tmp_path))
    with pytest.raises(ValueError, match="has results of other settings"):
        train_epochs(TASK, SGD, Plan(1, [1], tmp_path, resume=True))
    without_bias = dataclasses.replace(TASK, init_fn=lambda key: {"kernel": jnp.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"'num_parameters': 12.*there.*'num_parameters': 9.*now"):
        train_epochs(without_bias, SGD, Plan(1, [0], tmp_path, resume=True))


def test_settings_advance_in_groups(tmp_path):
    apart = train_epochs(TASK, SGD, Plan(2, [0], tmp_path / "apart", group_size=4))
    together = train_epochs(TASK, SGD, Plan(2, [0], tmp_path / "together"))
    assert sorted(path.name for path in (tmp_path / "apart").iterdir()) == [
        "sgd-lr-0.000625-momentum-0.99.json",
        "sgd-lr-0.00625-momentum-0.9.json",
        "sgd-lr-6.25e-05-momentum-0.999.json",
    ]
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_allclose(one.train_loss, other.train_loss, rtol=1e-5)


def test_what_has_diverged_ends_early(tmp_path):
    explode = Contender("sgd", ("bad",), ({},), lambda: first_order.sgd(math.inf, 0.9))
    steps = []
    (result,) = train_epochs(TASK, explode, Plan(9, [0], tmp_path), lambda n, loss: steps.append(n))
    assert sum(steps) == 3
    assert set(result.train_loss) == {math.inf}
    assert set(result.test_curve) == {0.0}
    assert result.to_json()["train_loss"] == [None] * len(result.steps)


def test_steps_and_losses_are_reported(tmp_path):
    calls = []
    plan = Plan(2, [0, 1], tmp_path, group_size=3)
    results = train_epochs(TASK, SGD, plan, lambda n, loss: calls.append((n, loss)))
    assert sum(n for n, _ in calls) == 9 * 2 * 6
    assert calls[3][1] == pytest.approx(min(result.train_loss[0] for result in results[:3]))


def test_results_survive_json(tmp_path):
    (result, *_) = train_epochs(TASK, SGD, Plan(1, [0], tmp_path))
    result = dataclasses.replace(result, train_loss=(math.inf,), final_losses=(math.inf,))
    assert EpochResult.from_json(json.loads(json.dumps(result.to_json())), "sgd") == result


@pytest.mark.parametrize("num_epochs", [1, 7, 60, 250])
def test_judged_are_the_first_epochs_and_the_last(num_epochs):
    epochs_judged = default_judge_at(num_epochs)
    assert list(epochs_judged) == sorted(set(epochs_judged))
    assert set(range(1, min(num_epochs, 10) + 1)) | {num_epochs} <= set(epochs_judged)
    assert len(epochs_judged) <= 40


@pytest.mark.parametrize("judge_at", [[2, 1], [0, 2], [1], [1, 2, 3]])
def test_epochs_to_judge_at_must_make_sense(judge_at, tmp_path):
    with pytest.raises(ValueError, match="`judge_at` must ascend from 1 or more to the last epoch, 2, got"):
        train_epochs(TASK, SGD, Plan(2, [0], tmp_path, judge_at=judge_at))


def test_there_must_be_epochs(tmp_path):
    with pytest.raises(ValueError, match="`num_epochs` must be at least 1, got 0"):
        epochs.default_judge_at(0)
