"""Trainings to the end: their parts, their averages, what is chosen by validation, and stops."""

import dataclasses
import math

import end_trainings
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import to_the_end
import width_depth
from blobs import TASK
from end_trainings import Judge, Problem, Training

from mlhf_optax.experiments.runs import draw_batch, draw_order, mean_loss, start_params
from mlhf_optax.tasks import Dataset, no_augmentation

pytestmark = pytest.mark.usefixtures("unoptimised")

PLAIN = dataclasses.replace(TASK, augment_fn=no_augmentation)
PROBLEM = Problem(PLAIN, PLAIN.data.meta_train, 20)
SGD = Training({"rate": 0.1}, lambda: optax.sgd(0.1))


def naive_losses(parts):
    """Losses on the parts after 20 steps."""
    key = jax.random.key(7)
    params, order, history = start_params(PLAIN, key), draw_order(PLAIN, key, 20), []
    for indices in order:
        batch = draw_batch(PLAIN, PLAIN.data.train, indices, key)
        grads = jax.grad(lambda p: PLAIN.loss_fn(PLAIN.predict_fn(p, batch), batch))(params)  # noqa: B023
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        history.append(params)
    return [float(mean_loss(PLAIN, params, part)) for part in parts]


def test_a_training_is_judged_on_all_parts_as_by_a_plain_loop(tmp_path):
    found = end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [10, 20], 7, tmp_path / "a.json", False)
    parts = PLAIN.data.train, PLAIN.data.meta_train, PLAIN.data.test
    last = found["raw"][-1]
    names = ("train_loss", "validation_loss", "test_loss")
    np.testing.assert_allclose([last[name] for name in names], naive_losses(parts), rtol=1e-5)
    # An average over a twentieth of twenty steps is that of the last.
    assert found["average"][-1] == pytest.approx(last, rel=1e-5)
    assert len(found["raw"]) == 2
    assert not (tmp_path / "a").exists()


def test_the_average_of_growing_weights_lies_behind(monkeypatch, tmp_path):
    """Weights that grow by one per step."""
    monkeypatch.setattr(end_trainings, "_AVERAGED", 0.25)
    task = dataclasses.replace(
        PLAIN,
        init_fn=lambda key: {"w": jnp.zeros(())},
        predict_fn=lambda params, batch: params["w"] + jnp.zeros((len(batch["label"]), 3)),
        loss_fn=lambda outputs, batch: jnp.mean(outputs),
    )
    problem = Problem(task, task.data.meta_train, 40)
    grow = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: ({"w": jnp.ones(())}, state)
    )
    training, path = Training({}, lambda: grow), tmp_path / "a.json"
    found = end_trainings.train(problem, Judge(problem), training, [40], 0, path, False)
    decay = 1 - 1 / 10
    weights = (1 - decay) * decay ** np.arange(40)[::-1] / (1 - decay**40)
    assert found["raw"][0]["test_loss"] == 40
    assert found["average"][0]["test_loss"] == pytest.approx(weights @ np.arange(1, 41), rel=1e-5)


def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    whole = end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [5, 10, 20], 3, tmp_path / "whole.json", False)
    path, save = tmp_path / "cut.json", end_trainings.save_checkpoint

    def save_and_stop(folder, done, *given):
        save(folder, done, *given)
        if done == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(end_trainings, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [5, 10, 20], 3, path, False)
    monkeypatch.setattr(end_trainings, "save_checkpoint", save)
    with pytest.raises(ValueError, match="already has results; set --resume"):
        end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [5, 10, 20], 3, path, False)
    found = end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [5, 10, 20], 3, path, True)
    for kind in ("raw", "average"):
        assert found[kind][-1] == whole[kind][-1]
    assert end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [5, 10, 20], 3, path, True) == found
    with pytest.raises(ValueError, match="has results of other settings"):
        end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [5, 20], 3, path, True)


def test_what_diverges_ends_early_and_never_wins(tmp_path):
    wild = Training({"rate": 2.0}, lambda: optax.sgd(lambda count: jnp.where(count < 7, 0.1, jnp.nan)))
    path = tmp_path / "a.json"
    found = end_trainings.train(PROBLEM, Judge(PROBLEM), wild, [5, 10, 20], 0, path, False)
    assert len(found["raw"]) == 2
    row = {"problem": "blobs", "family": "AdamW"} | found
    fine = end_trainings.train(PROBLEM, Judge(PROBLEM), SGD, [5, 10, 20], 0, tmp_path / "b.json", False)
    curves = to_the_end.mean_curves({"rows": [row, {"problem": "blobs", "family": "AdamW"} | fine]})
    assert math.isinf(curves[0]["raw"]["test_loss"][-1])
    assert to_the_end.chosen(curves, "raw", True)[0]["setting"] == {"rate": 0.1}
    assert curves[0]["raw"]["test_accuracy"][-1] == 0
    without_classes = fine | {"raw": [one | {"test_accuracy": None} for one in fine["raw"]]}
    (one,) = to_the_end.mean_curves({"rows": [{"problem": "blobs", "family": "AdamW"} | without_classes]})
    assert all(map(math.isnan, one["raw"]["test_accuracy"]))


def curve(validation, test):
    return {"raw": {"validation_loss": validation, "test_loss": test}, "setting": {}}


def test_the_test_part_chooses_nothing():
    curves = [curve([3.0, 1.0, 2.0], [0.0, 9.0, 0.0]), curve([3.0, 1.5, 1.5], [1.0, 1.0, 1.0])]
    assert to_the_end.chosen(curves, "raw", False) == (curves[0], 1)
    assert to_the_end.chosen(curves, "raw", True) == (curves[1], 2)


def test_the_validation_parts_are_apart_from_those_that_are_trained_on(monkeypatch):
    """Images that hold their own number."""
    count = 60
    image = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((count, 28, 28, 1), np.uint8)
    part = {"image": image, "label": np.zeros(count, np.int32)}
    data = lambda *folders: Dataset(part, part, part)
    monkeypatch.setattr("tasks.load_mnist", data)
    monkeypatch.setattr(end_trainings, "_VALIDATION", 20)
    problem = end_trainings.autoencoder((None, None))
    numbers = lambda examples: set(np.asarray(examples["image"])[:, 0, 0, 0].tolist())
    assert numbers(problem.validation) == set(range(20))
    assert numbers(problem.task.data.train) == set(range(20, 60))


def test_networks_of_all_widths_and_depths_start_near_the_loss_of_knowing_nothing(monkeypatch):
    random = np.random.default_rng(0)
    part = {
        "image": random.integers(0, 256, (8, 28, 28, 1), dtype=np.uint8),
        "label": np.arange(8, dtype=np.int32),
    }
    monkeypatch.setattr(width_depth, "load_mnist", lambda *folders: Dataset({}, part, part))
    for kind, width, depth in (("tanh", 64, 2), ("relu", 8, 48), ("relu", 512, 2)):
        task = width_depth.network(kind, width, depth, (None, None))
        params = task.init_fn(jax.random.key(0))
        assert len(params) == depth + 1
        loss = float(mean_loss(task, params, task.data.train))
        assert loss == pytest.approx(math.log(10), rel=0.8)
    task = width_depth.network("transformer", 16, 3, (None, None))
    text = {"image": jnp.zeros((2, 32), jnp.int32), "label": jnp.zeros((2, 32), jnp.int32)}
    params = task.init_fn(jax.random.key(0))
    assert sum("Attention" in name for name in params) == 3
    assert float(mean_loss(task, params, text)) == pytest.approx(math.log(65), rel=0.5)


def test_both_series_name_each_network_and_transformers_have_limits():
    options = width_depth.Options(kinds=("tanh", "transformer"), widths=(64, 1024), depths=(2, 24))
    assert width_depth.networks(options) == [
        ("width", "tanh", 64, 2),
        ("width", "tanh", 1024, 2),
        ("depth", "tanh", 64, 2),
        ("depth", "tanh", 64, 24),
        ("width", "transformer", 64, 2),
        ("depth", "transformer", 64, 2),
    ]
