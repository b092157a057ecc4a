"""The engine of comparisons: runs side by side against runs one by one, stops, seeds."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from blobs import SEQUENTIAL, SGD, TASK

from mlhf_optax.experiments import Contender, compare, epoch_steps, grid_contenders, log_steps, runs
from mlhf_optax.experiments.engine import TABLE_STEPS
from mlhf_optax.experiments.runs import (
    Program,
    RunGrid,
    accuracy,
    augmentation_key,
    draw_order,
    init_run,
    mean_loss,
    run_step,
)
from mlhf_optax.support.files import locked_folder
from mlhf_optax.tasks import no_augmentation, take

pytestmark = pytest.mark.usefixtures("unoptimised")

PLAIN = dataclasses.replace(TASK, augment_fn=no_augmentation)


def part_of(contender, part, sequential=None):
    """Some settings of a contender, one after the other if wanted."""
    make = lambda task: Program(task, contender.make_optimizer, sequential)
    return dataclasses.replace(
        contender,
        names=contender.names[part],
        settings=contender.settings[part],
        labels=contender.labels[part],
        stacked={name: values[part] for name, values in contender.stacked.items()},
        program=make,
    )


def train(contender, steps, task=TASK, **options):
    return compare(task, [contender], steps, timed=False, **options).frame


def losses(frame, optimizer, seed):
    own = frame.filter((pl.col("optimizer") == optimizer) & (pl.col("seed") == seed))
    return own["train_loss"].to_numpy()


def train_naively(contender, index, seed, num_steps):
    """Losses on both parts after every step, and accuracy, by a plain loop."""
    make = contender.make_optimizer
    optimizer = make(**{name: float(values[index]) for name, values in contender.stacked.items()})
    key, loss = jax.random.key(seed), lambda p, batch: TASK.loss_fn(TASK.predict_fn(p, batch), batch)
    params, rows = TASK.init_fn(jax.random.fold_in(key, 0)), []
    opt_state = optimizer.init(params)
    for step, indices in enumerate(draw_order(TASK, key, num_steps)):
        batch = TASK.augment_fn(augmentation_key(key, step), take(TASK.data.train, indices))
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
        right = np.argmax(TASK.predict_fn(params, TASK.data.test), axis=1) == TASK.data.test["label"]
        rows.append([float(loss(params, TASK.data.train)), float(loss(params, TASK.data.test)), right.mean()])
    return np.array(rows)


@pytest.mark.parametrize(
    ("contender", "sequential"), [*((one, False) for one in grid_contenders(batch_size=8)), (SGD, True)]
)
def test_runs_side_by_side_are_those_one_by_one(contender, sequential):
    contender = part_of(contender, slice(1, None, 4), sequential)
    frame = train(contender, range(1, 5), seeds=[3, 5])
    assert frame.shape == (len(contender.names) * 2 * 4, 11)
    assert frame["epoch"].to_list()[:4] == [1 / 3, 2 / 3, 1, 4 / 3]
    for index in (0, 1):
        for seed in (3, 5):
            own = frame.filter((pl.col("optimizer") == contender.names[index]) & (pl.col("seed") == seed))
            found = own.select("train_loss", "test_loss", "test_accuracy").to_numpy()
            np.testing.assert_allclose(found, train_naively(contender, index, seed, 4), rtol=1e-5)


def test_seeds_decide_the_start_and_the_order_of_the_batches():
    still = Contender("still", ("still",), ({},), optax.set_to_zero)
    first, second = train(still, [1], seeds=[0, 1])["train_loss"]
    alone = train(still, [1], seeds=[0])["train_loss"][0]
    assert first == pytest.approx(alone, rel=1e-6)
    assert second != pytest.approx(alone, rel=1e-3)
    orders = [np.asarray(draw_order(TASK, jax.random.key(seed), 4)) for seed in (0, 1, 0)]
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])


def test_curves_are_recorded_at_the_chosen_steps():
    every, some = train(SGD, range(1, 7), seeds=[0]), train(SGD, [2, 5], seeds=[0])
    assert some["step"].unique().to_list() == [2, 5]
    assert losses(some, SGD.names[0], 0).tolist() == losses(every, SGD.names[0], 0)[[1, 4]].tolist()


def test_the_optimizer_gets_the_batch():
    def update(updates, state, params=None, *, batch, **others):
        return jax.tree.map(jnp.zeros_like, updates), batch["label"]

    make = lambda: optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(8, jnp.int32), update)
    batch = take(TASK.data.train, np.arange(8))
    state = run_step(TASK, make, {}, batch, init_run(TASK, make, {}, jax.random.key(0)))
    np.testing.assert_array_equal(state.opt_state, batch["label"])


@pytest.mark.parametrize("sequential", [False, True])
def test_mini_batches_are_augmented_anew_in_every_step_and_run(sequential):
    """The augmentation writes a random number into each label; the optimizer remembers them."""

    def remember(updates, state, params=None, *, batch, value):
        del value
        count, seen = state
        return jax.tree.map(jnp.zeros_like, updates), (count + 1, seen.at[count].set(batch["label"]))

    task = dataclasses.replace(
        TASK,
        augment_fn=lambda key, batch: {**batch, "label": jax.random.bits(key, batch["label"].shape)},
        loss_fn=lambda outputs, batch: jnp.mean(outputs),
    )
    init = lambda params: (jnp.zeros((), jnp.int32), jnp.zeros((3, 8), jnp.uint32))
    make = lambda rate: optax.GradientTransformationExtraArgs(init, remember)
    grid = RunGrid(Program(task, make, sequential), {"rate": np.ones(2)}, [0, 1], 3)
    for _ in range(3):
        grid.step()
    states = jax.tree.leaves(grid.state, is_leaf=lambda x: hasattr(x, "opt_state"))
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
    grid = RunGrid(Program(task, lambda: optax.sgd(1.0)), None, [0], 1)
    grid.step()
    # One step moves each bias by -1/3; the bias itself cancels out as it is in the state, too.
    expected = -np.mean(TASK.data.train["label"])
    np.testing.assert_allclose([grid.train_loss(), grid.test_loss()], [[[expected]]] * 2, rtol=1e-6)
    assert grid.state.params["bias"][0, 0] == pytest.approx([-1 / 3] * 3)


def test_evaluation_in_chunks_is_that_of_the_whole(monkeypatch):
    params = init_run(TASK, optax.set_to_zero, {}, jax.random.key(0)).params
    whole = mean_loss(TASK, params, TASK.data.train), accuracy(TASK, params, TASK.data.test)
    for chunk in (2048, 7):
        monkeypatch.setattr(runs, "_EVALUATION_CHUNK", chunk)
        grid = RunGrid(Program(TASK, optax.set_to_zero), None, [0], 1)
        np.testing.assert_allclose([grid.train_loss(), grid.test_accuracy()], np.reshape(whole, (2, 1, 1)))


@pytest.mark.parametrize("sequential", [False, True])
def test_an_optimizer_gets_the_loss_of_the_batch_and_may_be_judged_by_other_parameters(sequential):
    """It leaves parameters as they are, and keeps the loss and zeros to be judged by."""

    def keep(updates, state, params=None, *, batch, value):
        del state, batch
        return jax.tree.map(jnp.zeros_like, updates), (value, jax.tree.map(jnp.zeros_like, params))

    init = lambda params: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    make = lambda: optax.GradientTransformationExtraArgs(init, keep)
    grid = RunGrid(Program(PLAIN, make, sequential, eval_params=lambda state, _: state[1]), None, [3], 1)
    grid.step()
    (run,) = jax.tree.leaves(grid.state, is_leaf=lambda x: hasattr(x, "opt_state"))
    start = init_run(PLAIN, make, {}, jax.random.key(3)).params
    batch = take(PLAIN.data.train, draw_order(PLAIN, jax.random.key(3), 1)[0])
    np.testing.assert_allclose(np.ravel(run.opt_state[0]), mean_loss(PLAIN, start, batch), rtol=1e-6)
    np.testing.assert_allclose(grid.train_loss(), [[np.log(3)]], rtol=1e-6)
    frames = [
        compare(PLAIN, [contender], [2], seeds=[3], timed=False).frame["train_loss"].item()
        for judged in (None, lambda state, _: state[1])
        for contender in [Contender("keep", ("keep",), ({},), make, eval_params=judged)]
    ]
    np.testing.assert_allclose(
        frames, [float(mean_loss(PLAIN, start, PLAIN.data.train)), np.log(3)], rtol=1e-6
    )


def test_convolutions_run_one_after_the_other_on_a_cpu():
    assert not Program(TASK, optax.set_to_zero).is_sequential
    assert Program(SEQUENTIAL, optax.set_to_zero).is_sequential == (jax.default_backend() == "cpu")


class Stop(Exception):
    """Stands for a process that is killed."""


def stop_after(count, error=Stop):
    """A callback that raises after so many steps."""

    def on_progress(progress):
        if progress.done > count:
            raise error

    return on_progress


@pytest.mark.parametrize(
    ("sequential", "steps_taken"),
    [(False, 1), (False, 26), (False, 40), (True, 26), (True, 40)],
)
def test_a_stopped_comparison_goes_on_as_if_it_had_not_been(sequential, steps_taken, tmp_path):
    contender, steps = part_of(SGD, slice(3), sequential), [3, 6, 12]
    options = {"seeds": [0, 1]}
    whole = train(contender, steps, **options)
    options |= {"folder": tmp_path, "resume": True}
    with pytest.raises(Stop):
        train(contender, steps, on_progress=stop_after(steps_taken), **options)
    taken = []
    resumed = train(contender, steps, on_progress=lambda progress: taken.append(progress.done), **options)
    assert resumed.equals(whole)
    # Only what came after the last record is done again.
    again = sum(after > before for before, after in itertools.pairwise(taken))
    assert again < (36 if sequential else 12) or steps_taken == 1
    assert train(contender, steps, on_progress=None, **options).equals(whole)
    assert not list(tmp_path.glob("*/*"))  # no checkpoint is left


def test_checkpoints_hold_every_bit_of_the_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_EVALUATION_CHUNK", 7)  # sums that no float32 holds
    whole = train(SGD, [3, 6], seeds=[0])
    assert np.any(np.float32(whole["train_loss"].to_numpy()) != whole["train_loss"].to_numpy())
    with pytest.raises(Stop):
        train(SGD, [3, 6], seeds=[0], folder=tmp_path, on_progress=stop_after(9 * 4))
    assert train(SGD, [3, 6], seeds=[0], folder=tmp_path, resume=True).equals(whole)


@pytest.mark.parametrize("sequential", [False, True])
def test_more_seeds_take_only_the_new_ones(sequential, tmp_path):
    contender, seeds = part_of(SGD, slice(3), sequential), [0, 1, 2]
    whole, options = train(contender, [3, 6], seeds=seeds), {"folder": tmp_path, "resume": True}
    train(contender, [3, 6], seeds=seeds[:1], **options)
    with pytest.raises(Stop):  # a stop on the way loses neither the first seed nor the steps of the others
        train(contender, [3, 6], seeds=seeds, on_progress=stop_after(8), **options)
    taken = []
    grown = train(contender, [3, 6], seeds=seeds, on_progress=lambda p: taken.append(p.done), **options)
    keys = ["optimizer", "seed", "step"]
    for measure in ("train_loss", "test_loss", "test_accuracy"):
        pair = (frame.sort(keys)[measure].to_numpy() for frame in (grown, whole))
        np.testing.assert_allclose(*pair, rtol=1e-5)
    assert grown.select(keys).sort(keys).equals(whole.select(keys).sort(keys))
    assert train(contender, [3, 6], seeds=seeds, on_progress=None, **options).equals(grown)
    with pytest.raises(ValueError, match="has results of other settings"):
        train(contender, [3, 6], seeds=[0, 1], **options)


def test_ctrl_c_keeps_what_was_finished():
    adam = part_of(grid_contenders(["adam"])[0], slice(2))
    stop = stop_after(9 * 2 + 1, KeyboardInterrupt)
    stopped = compare(TASK, [SGD, adam], [2], seeds=[0], timed=False, on_progress=stop)
    assert not stopped.is_complete
    assert stopped.frame["family"].unique().to_list() == ["sgd"]
    assert compare(TASK, [adam], [2], seeds=[0], timed=False).is_complete


def test_results_are_neither_overwritten_nor_mixed_with_others(tmp_path):
    train(SGD, [3], seeds=[0], folder=tmp_path)
    with pytest.raises(ValueError, match=r"already has results of sgd lr=.*--resume"):
        train(SGD, [3], seeds=[0], folder=tmp_path)
    with pytest.raises(ValueError, match="has results of other settings"):
        train(SGD, [3], seeds=[1], folder=tmp_path, resume=True)
    without_bias = dataclasses.replace(TASK, init_fn=lambda key: {"kernel": jnp.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"'num_parameters': 12.*there.*'num_parameters': 9.*now"):
        train(SGD, [3], without_bias, seeds=[0], folder=tmp_path, resume=True)


def test_a_folder_in_use_is_refused_before_anything_is_trained(tmp_path):
    asked = []
    with locked_folder(tmp_path), pytest.raises(OSError, match=r"is in use by another run; wait"):
        train(SGD, [3], seeds=[0], folder=tmp_path, on_progress=asked.append)
    assert not asked
    train(part_of(SGD, slice(1)), [1], seeds=[0], folder=tmp_path)


def test_settings_advance_in_groups(tmp_path):
    apart, together = (
        train(SGD, [3, 6], seeds=[0], folder=tmp_path / f"{n}", group_size=n) for n in (4, None)
    )
    assert sorted(path.name for path in (tmp_path / "4").glob("*.json")) == [
        "sgd-lr-0.000625-momentum-0.99.json",
        "sgd-lr-0.00625-momentum-0.9.json",
        "sgd-lr-6.25e-05-momentum-0.999.json",
    ]
    np.testing.assert_allclose(apart["train_loss"].to_numpy(), together["train_loss"].to_numpy(), rtol=1e-5)


def test_what_has_diverged_retires_and_counts_as_wrong(tmp_path):
    explode = Contender("sgd", ("bad",), ({},), lambda: optax.sgd(math.inf))
    steps = []
    frame = train(explode, [3, 9], seeds=[0], folder=tmp_path, on_progress=lambda p: steps.append(p.done))
    assert max(steps) == 3
    assert set(frame["train_loss"]) == set(frame["test_loss"]) == {math.inf}
    assert set(frame["test_accuracy"]) == {0.0}
    (entry,) = json.loads((tmp_path / "bad.json").read_text())["entries"]
    assert entry["curves"][0]["train_loss"] == [None, None]


def test_progress_counts_the_steps_of_all_runs():
    calls = []
    frame = train(SGD, [2, 3], seeds=[0, 1], group_size=3, on_progress=calls.append)
    assert (calls[0].total, calls[-1].done) == (9 * 2 * 3,) * 2
    of_step = frame.filter(pl.col("step") == 2)["train_loss"].to_numpy().reshape(9, 2)
    assert calls[2].loss == pytest.approx(of_step.mean(axis=1)[:3].min())
    assert [call.done for call in calls[:3]] == [6, 12, 12]


def test_a_contender_may_bring_its_own_steps_and_clock(tmp_path):
    ours = dataclasses.replace(part_of(SGD, slice(2)), make_optimizer=None, clock=lambda task: 7.0)
    ours = dataclasses.replace(ours, program=lambda task: Program(task, SGD.make_optimizer))
    found = compare(TASK, [ours], [2], seeds=[0], folder=tmp_path).frame
    assert found["seconds_per_step"].to_list() == [7.0, 7.0]
    again = dataclasses.replace(ours, clock=None)  # the time is known by now
    assert compare(TASK, [again], [2], seeds=[0], folder=tmp_path, resume=True).frame.equals(found)


@pytest.mark.parametrize("steps", [1, 7, 60, 500])
def test_recorded_steps_include_those_of_the_table_and_the_first_epochs(steps):
    recorded = log_steps(steps)
    assert list(recorded) == sorted(set(recorded))
    assert {step for step in TABLE_STEPS if step <= steps} | {1, steps} <= set(recorded)
    assert len(recorded) <= 30
    epochs = [step / 3 for step in epoch_steps(TASK, steps)]
    assert epochs == sorted(set(epochs))
    assert set(range(1, min(steps, 10) + 1)) | {steps} <= set(epochs)
    assert len(epochs) <= 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "`seeds` is empty"),
        ({"steps": [3, 3]}, r"`steps` must ascend from 1 or more, got \(3, 3\)"),
        ({"steps": [0, 3]}, "`steps` must ascend"),
        ({"steps": []}, "`steps` must ascend"),
        ({"contenders": [SGD, SGD]}, "names of optimizers must be unique"),
        ({"task": dataclasses.replace(TASK, batch_size=31)}, "`batch_size` must be between .*, 30, got 31"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"task": TASK, "contenders": [SGD], "steps": [2], "timed": False} | options)


def test_lengths_and_hyperparameters_must_make_sense():
    for call in (lambda: log_steps(0), lambda: epoch_steps(TASK, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            call()
    rates = {"learning_rate": np.ones(2), "momentum": np.ones(3)}
    with pytest.raises(ValueError, match=r"must be arrays of one length, got lengths \[2, 3\]"):
        RunGrid(Program(TASK, SGD.make_optimizer), rates, [0], 1)
