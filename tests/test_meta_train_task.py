"""Meta-training on a ready task, from a learned optimizer's options to the file that it ships."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import one_compilation as one_compilation

from mlhf_optax import AUTHORS_SETTINGS, init_meta_params, load_meta_params, load_pretrained, save_meta_params
from mlhf_optax import meta_training as mt
from mlhf_optax.experiments.meta_train import meta_train_task
from mlhf_optax.learned import get_learned
from mlhf_optax.learned.mlhf import MLHFOptions
from mlhf_optax.tasks import Dataset, digits_mlp

pytestmark = pytest.mark.usefixtures("unoptimised")

LAST = 4
OPTIONS = MLHFOptions(num_cg_steps=1)


def linear_digits(**changes):
    """The digits without a hidden layer, and with nothing but the part for meta-training."""
    task = digits_mlp(hidden=(), meta_batch_size=8)
    data = Dataset(task.data.meta_train, None, None)
    return dataclasses.replace(task, load_data=lambda: data, **changes)


TASK = linear_digits()


def run(output, options=OPTIONS, task=TASK, *, config=None, **others):
    schedule = mt.Schedule(LAST, checkpoint_every=1, validate_every=2)
    usual = mt.MetaTrainingConfig(num_tasks=2, unroll_length=2, decay_iterations=LAST)
    others = {"validation_steps": (1, 2), "seed": 3, "command": "by hand"} | others
    return meta_train_task(task, get_learned("mlhf"), options, output, schedule, config or usual, **others)


@pytest.fixture(scope="module")
def trained(one_compilation, tmp_path_factory):
    path = run(tmp_path_factory.mktemp("run"))
    return path, load_meta_params(path)


def test_the_result_trains_the_task(trained):
    path, pretrained = trained
    assert path.name == "meta_params.safetensors"
    assert pretrained.meta_params.layer_types == ("dense_bias", "dense_kernel")
    batch = jax.tree.map(lambda x: jnp.asarray(x[:16]), TASK.data.meta_train)
    loss_fn = lambda params: TASK.loss_fn(TASK.predict_fn(params, batch), batch)
    params, optimizer = TASK.init_fn(jax.random.key(0)), pretrained.optimizer(TASK.predict_fn, TASK.loss_fn)
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, batch=batch)
    assert loss_fn(jax.tree.map(jnp.add, params, updates)) < loss


def test_the_record_says_how_it_was_made_and_how_to_use_it(trained):
    record = trained[1].record
    expected = {"optimizer": "mlhf", "task": "digits-mlp-linear", "batch_size": 8, "command": "by hand"}
    expected |= {"learning_rate": 1.0, "num_cg_steps": 1, "max_update_ratio": 0.25}
    assert expected.items() <= record.items()
    assert "the part for meta-training only" in record["trained_on"]
    made = record["meta_training"]
    expected = {"settings": "default", "same_batch_weight": 1.0, "start": None, "iterations": LAST, "seed": 3}
    assert (expected | {"stopped_after": LAST, "validation_steps": [1, 2]}).items() <= made.items()
    assert (made["config"]["num_tasks"], made["config"]["decay_iterations"]) == (2, LAST)
    assert set(record["totals"]) == {"diverged", "stuck", "replayed", "fresh", "dropped_gradients"}
    names = {"iteration", "l_p", "l_s", "inner_loss", "log_inner_loss", "age"}
    assert [set(line) for line in record["curves"]] == LAST * [names]
    assert [line["iteration"] for line in record["curves"]] == [1, 2, 3, 4]
    assert np.isfinite([line["inner_loss"] for line in record["curves"]]).all()
    best = min(record["validation"], key=lambda line: line["score"])
    assert [line["iteration"] for line in record["validation"]] == [2, 4]
    assert record["best_iteration"] == best["iteration"]
    assert record["seconds"] > 0
    assert {"commit", "date", "machine", "versions"} <= set(record)


def test_a_run_that_was_stopped_is_resumed_with_the_same_result(trained, tmp_path):
    def stop(iteration, metrics):
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_progress=stop)
    assert not (tmp_path / "meta_params.safetensors").exists()
    found = load_meta_params(run(tmp_path, resume=True))
    jax.tree.map(np.testing.assert_array_equal, found.meta_params, trained[1].meta_params)
    same = ("validation", "curves", "totals", "best_iteration", "meta_training")
    assert {key: found.record[key] for key in same} == {key: trained[1].record[key] for key in same}


def test_other_settings_are_refused_on_resume_and_named(trained):
    options, task = dataclasses.replace(OPTIONS, learning_rate=0.5), linear_digits(meta_batch_size=16)
    told = r"batch_size: 8 there, 16 now, learning_rate: 1.0 there, 0.5 now"
    with pytest.raises(ValueError, match=rf"other settings \({told}\)"):
        run(trained[0].parent, options, task, resume=True)


def test_a_validation_that_diverged_does_not_cost_the_result(trained, tmp_path, monkeypatch):
    bad = mt.Validation(jnp.float32(6.9), jnp.array([2.0, jnp.inf]), jnp.float32(1000.0))
    monkeypatch.setattr(mt, "make_validation", lambda *_: lambda *_: bad)
    record = load_meta_params(run(tmp_path)).record
    assert record["validation"][0]["losses"] == [2.0, None]
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["losses"] == [2.0, None]


@pytest.mark.parametrize("name", ["x.npz", "x.v2.json"])
def test_meta_parameters_are_not_written_under_the_ending_of_another_format(name, trained, tmp_path):
    with pytest.raises(
        ValueError, match=rf"`path` must end in .safetensors or have no ending, got '.*{name}'"
    ):
        save_meta_params(tmp_path / name, *trained[1])
    assert not any(tmp_path.iterdir())
    assert save_meta_params(tmp_path / "v1.5", *trained[1]).name == "v1.5.safetensors"


def test_a_batch_beyond_the_data_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"`meta_batch_size` must be between 1 and .*, 719, got 100000000"):
        run(tmp_path / "out", task=linear_digits(meta_batch_size=10**8))
    assert not any(tmp_path.iterdir())


# What a meta-training is started with.


class Stopped(Exception):
    """Ends a run before anything is trained."""


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """A function that returns what a run would be started with."""

    def prepare(**arguments):
        seen = {}

        def stop(task, learned, meta_params, sample_fn, validate_fn, *_, about, **others):
            seen.update(meta_params=meta_params, about=about, options=learned.meta_gradient.args[0])
            seen.update(sample_fn=sample_fn, validate_fn=validate_fn)
            raise Stopped

        monkeypatch.setattr(mt, "meta_train", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "prepared", **arguments)
        return seen

    return prepare


def test_it_goes_on_from_other_meta_parameters_with_their_settings(prepared, tmp_path):
    first = init_meta_params(jax.random.key(5), AUTHORS_SETTINGS, layer_types=["dense_kernel", "other"])
    record = load_pretrained("digits").record | {"meta_training": {"settings": "authors"}}
    path = str(save_meta_params(tmp_path / "first", first, record))
    seen = prepared(start=path)
    found = seen["meta_params"]
    assert found.settings == AUTHORS_SETTINGS
    assert seen["options"].step_loss == "difference"
    assert (seen["about"]["settings"], seen["about"]["start"]) == ("authors", path)
    assert found.layer_types == ("dense_bias", "dense_kernel", "other")
    for name in ("dense_kernel", "other"):
        jax.tree.map(np.testing.assert_array_equal, first.damping[name], found.damping[name])


def test_the_record_names_the_start_and_the_settings_that_it_brought(trained, tmp_path):
    made = load_meta_params(run(tmp_path, start="digits")).record["meta_training"]
    assert (made["start"], made["settings"]) == ("digits", "default")


def test_the_settings_of_a_start_decide_what_the_record_recommends(tmp_path):
    start = load_pretrained("digits")
    start = start._replace(record=start.record | {"meta_training": {"settings": "paper"}})
    family = get_learned("mlhf")
    options = family.resolve(MLHFOptions(), start)
    assert options.settings == "paper"
    assert family.record(options)["max_update_ratio"] is None
    assert family.record(family.resolve(MLHFOptions(), None))["max_update_ratio"] == 0.25


def test_batches_are_augmented_as_in_training(prepared):
    def blank(key, batch):
        return {**batch, "image": jnp.zeros_like(batch["image"])}

    sample_fn = prepared(task=linear_digits(augment_fn=blank))["sample_fn"]
    drawn = sample_fn(jax.random.key(0))
    assert drawn["image"].shape[:3] == (2, 3, 8)
    assert not drawn["image"].any()
    assert np.unique(drawn["label"]).size > 1


def test_validation_trains_on_augmented_batches_and_judges_on_examples_as_they_are(prepared, monkeypatch):
    calls = []
    monkeypatch.setattr(mt, "make_validation", lambda *_: lambda *arguments: calls.append(arguments))
    task = linear_digits(augment_fn=lambda key, batch: {**batch, "image": 0 * batch["image"]})
    prepared(task=task)["validate_fn"](None)
    (_, batches, examples, _), *_ = calls
    assert batches["image"].shape[:2] == (2, 128)
    assert not batches["image"].any()
    assert examples["image"].any()
