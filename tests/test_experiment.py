"""The common parts of the comparisons on image tasks, on a linear classifier of three blobs."""

import dataclasses
import json

import experiment
import jax
import pytest
from blobs import SGD, TASK
from experiment import ExperimentOptions, learned_contenders, limit_data, run_experiment

from mlhf_optax.experiments import engine, grid_contenders
from mlhf_optax.experiments.scripts import parse_options
from mlhf_optax.tasks import num_examples

pytestmark = pytest.mark.usefixtures("unoptimised")


def parse(folder, *arguments):
    base = ["--epochs", "1", "--seeds", "1", "--meta-params", "untrained", "--output", str(folder)]
    return parse_options(ExperimentOptions, None, [*base, *arguments])


@pytest.fixture
def short_clock(monkeypatch):
    """No waiting for measurements of time; returns what was measured."""
    measured = []
    clock = lambda task, optimizers: measured.append(list(optimizers)) or dict.fromkeys(optimizers, 0.5)
    monkeypatch.setattr(engine, "seconds_per_step", clock)
    return measured


def run(folder, *arguments):
    options = parse(folder, *arguments)
    contenders = [*learned_contenders(TASK, options), SGD, *grid_contenders(["adam"])]
    return run_experiment(TASK, contenders, options, "Blobs", "python benchmarks/blobs.py")


def test_everything_is_trained_reported_and_drawn_once(tmp_path, short_clock, capsys):
    frame = run(tmp_path).frame
    names = frame["optimizer"].to_list()
    assert names[:3] == ["mlhf", "mlhf curvature 0.25", "sgd lr=0.00625 momentum=0.9"]
    assert len(names) == 2 + 9 + 27
    assert set(frame["seconds_per_step"]) == {0.5}
    report = json.loads((tmp_path / "results.json").read_text())
    assert [entry["optimizer"] for entry in report["optimizers"]] == names
    expected = {"task": "blobs", "batch_size": 8, "num_train": 30, "num_parameters": 12, "steps_per_epoch": 3}
    assert report.items() >= (expected | {"command": "python benchmarks/blobs.py", "seeds": [0]}).items()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Blobs: blobs, 1 epoch, 1 seed, batch 8" in " ".join(printed.split())
    assert "best of the other 36 there" in printed
    assert "MLHF curvature 0.25 lr=1" in printed


def test_a_second_run_goes_on_with_what_is_there(tmp_path, short_clock):
    first = run(tmp_path, "--only", "sgd").frame
    again = run(tmp_path, "--only", "sgd", "mlhf", "--resume", "--curvature-share", "0").frame
    assert again["optimizer"].to_list() == ["mlhf", *SGD.names]
    assert again[1:].equals(first)
    assert short_clock == [[SGD.names[0]], ["mlhf", SGD.names[0]]]
    assert run(tmp_path, "--only", "sgd", "--resume").frame.equals(first)
    assert len(short_clock) == 2


def test_other_meta_parameters_are_another_experiment(tmp_path, short_clock, monkeypatch):
    run(tmp_path, "--only", "mlhf", "--curvature-share", "0")
    find = experiment.find_meta_params

    def other(task, name):
        source, found = find(task, name)
        return source, found._replace(meta_params=jax.tree.map(lambda leaf: leaf + 0.1, found.meta_params))

    monkeypatch.setattr(experiment, "find_meta_params", other)
    with pytest.raises(ValueError, match="has results of other settings"):
        run(tmp_path, "--only", "mlhf", "--curvature-share", "0", "--resume")


def test_a_stopped_experiment_says_how_to_go_on(tmp_path, short_clock, monkeypatch, capsys):
    compare = experiment.compare
    stopped = lambda *given, **options: dataclasses.replace(compare(*given, **options), is_complete=False)
    monkeypatch.setattr(experiment, "compare", stopped)
    run(tmp_path, "--only", "sgd")
    assert "--resume goes on from here" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()


def test_unknown_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`only` must be among sgd, adam, got"):
        run(tmp_path, "--only", "lion")


def test_the_learned_one_follows_its_record_unless_told_otherwise(tmp_path):
    settings = lambda *arguments: [
        one.settings[0] for one in learned_contenders(TASK, parse(tmp_path, *arguments))
    ]
    first, part = settings("--learning-rate", "0.5")
    assert (first["learning_rate"], first["num_cg_steps"], first["curvature_batch_size"]) == (0.5, 4, None)
    assert (part["learning_rate"], part["curvature_batch_size"]) == (0.5, 0.25)
    assert settings("--momentum", "0.5")[0]["momentum"] == 0.5
    (alone,) = settings("--curvature-share", "0")
    assert alone["learning_rate"] == 1.0
    assert settings("--only", "adam") == []


def test_cheaper_variants_have_names_of_their_own(tmp_path):
    options = parse(tmp_path, "--cg-steps", "2", "4", "2", "--curvature-share", "0.5")
    found = learned_contenders(TASK, options)
    about = [one.settings[0] for one in found]
    assert [one.names for one in found] == [("mlhf",), ("mlhf curvature 0.5 CG 2",), ("mlhf curvature 0.5",)]
    pairs = [(a["curvature_batch_size"], a["num_cg_steps"]) for a in about]
    assert pairs == [(None, 4), (0.5, 2), (0.5, 4)]
    assert len({a["meta_params_digest"] for a in about}) == 1


def test_quick_is_short(tmp_path):
    quick = parse(tmp_path, "--quick").shortened(batch_size=4)
    assert (quick.epochs, quick.seeds, quick.batch_size) == (2, 1, 4)
    assert parse(tmp_path).shortened(batch_size=4).batch_size == 128


def test_data_can_be_limited():
    data = limit_data(TASK, 10, 20, 5).data
    assert [num_examples(part) for part in (data.meta_train, data.train, data.test)] == [10, 20, 5]
    assert (data.train["image"] == TASK.data.train["image"][:20]).all()
