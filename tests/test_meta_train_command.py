"""`mlhf-optax meta-train` from its arguments to the file that it ships."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mlhf_optax import (
    AUTHORS_SETTINGS,
    PAPER_SETTINGS,
    Settings,
    init_meta_params,
    load_meta_params,
    load_pretrained,
    mlhf,
    save_meta_params,
    tasks,
)
from mlhf_optax import meta_training as mt
from mlhf_optax.comparison import meta_train_command as command
from mlhf_optax.comparison import meta_train_start
from mlhf_optax.meta_training import driver
from mlhf_optax.tasks import Dataset

TASK = "digits-mlp-linear"
ITERATIONS = 4


def linear_digits():
    """The digits without a hidden layer, and with nothing but the part for meta-training."""
    task = tasks.digits_mlp(hidden=())
    data = task.data
    return dataclasses.replace(task, load_data=lambda: Dataset(data.meta_train, None, None))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The tiny task by its name, one CG step, and compiled functions that all runs share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, TASK, linear_digits)
        patch.setattr(command, "_NUM_CG_STEPS", 1)
        for module, name in ((driver, "make_meta_step"), (mt, "make_validation")):
            patch.setattr(module, name, share(getattr(module, name)))
        yield


def share(make):
    made = []

    def shared(*args):
        if not made:
            made.append(make(*args))
        return made[0]

    return shared


def run(output, **kwargs):
    """Runs with a terminal of its own; returns the result and what was printed."""
    console = Console(file=io.StringIO(), force_terminal=True, no_color=True, highlight=False, width=120)
    arguments = {
        "task": TASK,
        "iterations": ITERATIONS,
        "num_tasks": 2,
        "unroll_length": 2,
        "batch_size": 8,
        "meta_learning_rate": 0.1,
        "seed": 3,
        "resume": False,
        "checkpoint_every": 2,
        "validate_every": 2,
        "settings": "default",
        "validation_steps": (1, 2),
    }
    path = command.run_meta_training(output=output, console=console, **arguments | kwargs)
    return load_meta_params(path), path, console.file.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"))


def test_the_result_can_be_loaded_and_used(trained):
    (meta_params, record), path, _ = trained
    assert path.name == "meta_params.safetensors"
    assert meta_params.settings == Settings()
    assert meta_params.layer_types == ("dense_bias", "dense_kernel")
    task = tasks.get_task(TASK)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:16]), task.data.meta_train)
    params = task.init_fn(jax.random.key(0))
    optimizer = mlhf(record["learning_rate"], meta_params, task.predict_fn, task.loss_fn, num_cg_steps=1)
    loss, grads = jax.value_and_grad(lambda p: task.loss_fn(task.predict_fn(p, batch), batch))(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, batch=batch)
    after = jax.tree.map(jnp.add, params, updates)
    assert task.loss_fn(task.predict_fn(after, batch), batch) < loss


def test_the_record_says_how_it_was_made_and_how_to_use_it(trained):
    record = trained[0].record
    assert {key: record[key] for key in ("task", "learning_rate", "batch_size", "num_cg_steps")} == {
        "task": TASK,
        "learning_rate": 1.0,
        "batch_size": 8,
        "num_cg_steps": 1,
    }
    assert (record["max_update_ratio"], record["step_loss"]) == (0.25, "relative")
    assert "the part for meta-training only" in record["trained_on"]
    made = record["meta_training"]
    assert (made["settings"], made["iterations"], made["seed"]) == ("default", ITERATIONS, 3)
    assert (made["stopped_after"], made["same_batch_weight"]) == (ITERATIONS, 1.0)
    assert (made["validation_steps"], made["start"]) == ([1, 2], None)
    assert (made["config"]["num_tasks"], made["config"]["decay_iterations"]) == (2, ITERATIONS)
    assert set(record["totals"]) == {"diverged", "stuck", "replayed", "fresh", "dropped_gradients"}
    assert [line["iteration"] for line in record["curves"]] == [1, 2, 3, 4]
    assert all(np.isfinite(line["inner_loss"]) for line in record["curves"])
    validation = record["validation"]
    assert [line["iteration"] for line in validation] == [2, 4]
    best = min(validation, key=lambda line: line["score"])
    assert record["best_iteration"] == best["iteration"]
    assert record["seconds"] > 0
    assert record["command"].startswith("mlhf-optax")
    assert {"commit", "date", "machine", "versions"} <= set(record)


def test_the_terminal_shows_progress_and_what_to_do_next(trained):
    _, path, printed = trained
    assert "4/4" in printed
    assert "inner loss" in printed
    assert "best meta-parameters by validation: iteration" in printed
    assert f"mlhf-optax train {TASK} --meta-params {path}" in printed.replace("\n", "")


def test_a_run_that_was_stopped_is_resumed_with_the_same_result(trained, tmp_path, monkeypatch):
    def stopping_reporter(bar, iterations):
        def report(iteration, metrics):
            if iteration == 3:
                raise KeyboardInterrupt

        return report

    # Looks at the metrics come every fifth iteration, and at every checkpoint.
    with monkeypatch.context() as patch:
        patch.setattr(command, "_reporter", stopping_reporter)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, checkpoint_every=1)
    assert not (tmp_path / "meta_params.safetensors").exists()
    (meta_params, record), path, _ = run(tmp_path, resume=True, checkpoint_every=1)
    jax.tree.map(np.testing.assert_array_equal, meta_params, trained[0].meta_params)
    assert path.read_bytes() == trained[1].read_bytes()
    same = ("validation", "curves", "totals", "best_iteration", "meta_training")
    assert {key: record[key] for key in same} == {key: trained[0].record[key] for key in same}


def test_a_folder_in_use_and_other_settings_are_refused(trained):
    folder = trained[1].parent
    with pytest.raises(ValueError, match=r"already has checkpoints; set `resume` \(--resume\)"):
        run(folder)
    message = r"other settings \(batch_size: 8 there, 16 now, learning_rate: 1.0 there, 0.5 now\)"
    with pytest.raises(ValueError, match=message):
        run(folder, resume=True, batch_size=16, learning_rate=0.5)


def test_a_validation_that_diverged_does_not_cost_the_result(tmp_path, monkeypatch):
    bad = mt.Validation(jnp.float32(6.9), jnp.array([2.0, jnp.inf]), jnp.float32(1000.0))
    monkeypatch.setattr(command, "_validator", lambda *_: lambda meta_params: bad)
    (_, record), path, _ = run(tmp_path)
    assert record["validation"][0]["losses"] == [2.0, None]
    assert "Infinity" not in path.with_suffix(".json").read_text()
    assert json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[0])["losses"] == [2.0, None]


# What the settings stand for.


class Stopped(Exception):
    """Ends a run before anything is trained."""


def prepared(monkeypatch, tmp_path, **kwargs):
    """Options, meta-parameters and config with which a run would be started."""
    seen = {}

    def meta_train(task, learned, meta_params, sample_fn, validate_fn, output, schedule, config, **others):
        seen.update(options=learned.meta_gradient.args[0], meta_params=meta_params, config=config)
        seen.update(others, schedule=schedule, functions=(sample_fn, validate_fn))
        seen.update(batches=jax.eval_shape(sample_fn, jax.random.key(0)))
        raise Stopped

    monkeypatch.setattr(mt, "meta_train", meta_train)
    with pytest.raises(Stopped):
        run(tmp_path, **kwargs)
    return seen


FAITHFUL = {
    "paper": (PAPER_SETTINGS, None, 0.0, "difference", 1.0),
    "authors": (AUTHORS_SETTINGS, 0.25, 0.02, "difference", 10.0),
    "default": (Settings(), 0.25, 0.02, "relative", 10.0),
    "relative": (
        Settings(parameter_power=1.0, initial_damping=10.0, initial_preconditioner=10.0),
        0.25,
        0.02,
        "relative",
        10.0,
    ),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_settings_select_what_the_networks_mean_and_the_losses_and_bounds_that_go_with_it(
    monkeypatch, tmp_path, name
):
    seen = prepared(monkeypatch, tmp_path, settings=name)
    options = seen["options"]
    found = (options.max_update_ratio, options.update_noise, options.step_loss, options.damping_loss_scale)
    assert (seen["meta_params"].settings, *found) == FAITHFUL[name]
    assert meta_train_start.learned_options(name)["max_update_ratio"] == options.max_update_ratio
    assert meta_train_start.learned_options(name)["step_loss"] == options.step_loss


def test_it_goes_on_from_other_meta_parameters_with_their_settings(monkeypatch, tmp_path):
    authors = init_meta_params(jax.random.key(5), AUTHORS_SETTINGS, layer_types=["dense_kernel", "other"])
    record = load_pretrained("digits").record | {"meta_training": {"settings": "authors"}}
    path = save_meta_params(tmp_path / "first", authors, record)
    seen = prepared(monkeypatch, tmp_path / "second", settings=None, start=str(path))
    found = seen["meta_params"]
    assert found.settings == AUTHORS_SETTINGS
    assert seen["options"].step_loss == "difference"
    assert (seen["about"]["settings"], seen["about"]["start"]) == ("authors", str(path))
    assert found.layer_types == ("dense_bias", "dense_kernel", "other")
    for part in ("damping", "preconditioner"):
        for name in ("dense_kernel", "other"):
            known, kept = (getattr(one, part)[name] for one in (authors, found))
            jax.tree.map(np.testing.assert_array_equal, known, kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": "paper"}, "settings of its own, 'default'; leave out settings"),
        ({"settings": "default", "initial": {"initial_damping": 3.0}}, "leave out initial_damping, or"),
    ],
)
def test_settings_that_contradict_the_start_are_refused(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, start="digits", **arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("made", [{"settings": "mine"}, {"settings": None}])
def test_a_start_with_unknown_settings_is_refused(tmp_path, made):
    digits = load_pretrained("digits")
    path = save_meta_params(tmp_path / "a", digits.meta_params, digits.record | {"meta_training": made})
    with pytest.raises(ValueError, match=r"names settings ('mine'|None); it should be one of 'default'"):
        run(tmp_path / "b", settings=None, start=str(path))


def test_a_start_whose_record_does_not_say_how_it_was_made_counts_as_default(monkeypatch, tmp_path):
    digits = load_pretrained("digits")
    path = save_meta_params(tmp_path / "a", digits.meta_params, digits.record | {"meta_training": "long ago"})
    seen = prepared(monkeypatch, tmp_path / "b", settings=None, start=str(path))
    assert seen["about"]["settings"] == "default"


def test_the_record_names_the_start(tmp_path):
    (_, record), _, _ = run(tmp_path, settings=None, start="digits")
    assert (record["meta_training"]["start"], record["meta_training"]["settings"]) == ("digits", "default")


def test_arguments_reach_the_meta_training(monkeypatch, tmp_path):
    seen = prepared(
        monkeypatch,
        tmp_path,
        task="digits-mlp",
        task_options={"hidden": (5,)},
        batch_size=None,
        learning_rate=0.5,
        keep_probability=0.25,
        age_scale=50.0,
        replay_opt_state=True,
        unroll_length=7,
        same_batch_weight=0.5,
        curvature_batch_size=0.25,
    )
    options = seen["options"]
    assert (options.learning_rate, options.same_batch_weight, options.curvature_batch_size) == (
        0.5,
        0.5,
        0.25,
    )
    assert seen["about"]["curvature_batch_size"] == 0.25
    config = seen["config"]
    assert (config.unroll_length, config.keep_probability, config.meta_learning_rate) == (7, 0.25, 0.1)
    assert (config.age_scale, config.replay_opt_state) == (50.0, True)
    schedule = seen["schedule"]
    assert (schedule.iterations, schedule.checkpoint_every, schedule.validate_every) == (ITERATIONS, 2, 2)
    assert (seen["seed"], seen["resume"]) == (3, False)
    own_size = tasks.get_task("digits-mlp").meta_batch_size
    assert seen["batches"]["image"].shape[:3] == (2, 8, own_size)
    assert seen["about"]["task"] == "digits-mlp-5"


def test_batches_are_augmented_as_in_training(monkeypatch, tmp_path):
    def blank(key, batch):
        return {**batch, "image": jnp.zeros_like(batch["image"])}

    monkeypatch.setitem(tasks.TASKS, "blank", lambda: dataclasses.replace(linear_digits(), augment_fn=blank))
    draw_batches, validate = prepared(monkeypatch, tmp_path, task="blank")["functions"]
    drawn = draw_batches(jax.random.key(0))
    assert drawn["image"].shape[:3] == (2, 3, 8)
    assert not drawn["image"].any()
    assert np.unique(drawn["label"]).size > 1
    batches, examples = validate.args[1:]
    assert not batches["image"].any()
    assert examples["image"].any()  # what the loss is taken on is never augmented


def test_unknown_names_are_errors(tmp_path):
    with pytest.raises(
        ValueError, match="`settings` must be one of 'default', 'relative', 'paper', 'authors', got 'x'"
    ):
        run(tmp_path, settings="x")
    with pytest.raises(ValueError, match=r"must be one of .*'digits-mlp'.*, got 'nothing'"):
        run(tmp_path, task="nothing")
