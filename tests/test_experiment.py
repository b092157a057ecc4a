"""The experiments' common parts on a linear classifier of three blobs, and the scripts' own."""

import json
import math

import jax
import pytest
from blobs import SGD, TASK

from mlhf_optax.comparison import experiment
from mlhf_optax.comparison import mlhf_contenders as contenders
from mlhf_optax.comparison.comparison import grid_contenders
from mlhf_optax.comparison.epoch_figures import save_epoch_comparison
from mlhf_optax.comparison.epoch_results import EpochResult
from mlhf_optax.comparison.experiment import ForeignContender, run_experiment
from mlhf_optax.comparison.experiment_options import (
    add_network_options,
    apply_quick,
    experiment_parser,
    network_options,
)
from mlhf_optax.comparison.mlhf_contenders import mlhf_contenders
from mlhf_optax.comparison.trainings import Program


def parse(folder, *arguments):
    base = ["--epochs", "1", "--seeds", "1", "--meta-params", "untrained", "--output", str(folder)]
    return experiment_parser(None, "blobs", 8).parse_args([*base, *arguments])


@pytest.fixture
def short_clock(monkeypatch):
    """No waiting for measurements of time; returns what was measured."""
    measured = []

    def clock(task, optimizers, **options):
        measured.append(list(optimizers))
        return dict.fromkeys(optimizers, 0.5)

    monkeypatch.setattr(experiment, "seconds_per_step", clock)
    return measured


def run(folder, *arguments):
    options = parse(folder, *arguments)
    contenders = [*mlhf_contenders(TASK, options), SGD, *grid_contenders(8, ["adam"])]
    return run_experiment(TASK, contenders, options, "Blobs", "blobs.py", {"more": 1})


def test_everything_is_trained_reported_and_drawn_once(tmp_path, short_clock, capsys):
    results = run(tmp_path)
    names = [result.name for result in results]
    assert names[:3] == ["mlhf", "mlhf curvature 0.25", "sgd lr=0.00625 momentum=0.9"]
    assert len(names) == 2 + 9 + 27
    assert {result.seconds_per_step for result in results} == {0.5}
    report = json.loads((tmp_path / "results.json").read_text())
    assert [entry["name"] for entry in report["results"]] == names
    assert [report[key] for key in ("task", "num_epochs", "batch_size", "num_train", "more")] == [
        "blobs",
        1,
        8,
        30,
        1,
    ]
    assert report["command"].startswith("python benchmarks/blobs.py")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Blobs: blobs, 1 epoch, 1 seed, batch 8" in " ".join(printed.split())
    assert "best of the other 36 there" in printed
    assert "MLHF curvature 0.25 lr=1" in printed
    assert "0 of 38 settings diverged" in printed


def test_a_second_run_goes_on_with_what_is_there(tmp_path, short_clock):
    first = run(tmp_path, "--only", "sgd")
    again = run(tmp_path, "--only", "sgd", "mlhf", "--resume", "--curvature-share", "0")
    assert [result.name for result in again] == ["mlhf", *SGD.names]
    assert again[1:] == first
    assert short_clock == [[SGD.names[0]], ["mlhf", SGD.names[0]]]
    assert run(tmp_path, "--only", "sgd", "--resume") == first
    assert len(short_clock) == 2


def test_other_meta_parameters_are_another_experiment(tmp_path, short_clock, monkeypatch):
    run(tmp_path, "--only", "mlhf")
    fresh = contenders.init_meta_params
    monkeypatch.setattr(contenders, "init_meta_params", lambda key, **o: fresh(jax.random.key(1), **o))
    with pytest.raises(ValueError, match="has results of other settings"):
        run(tmp_path, "--only", "mlhf", "--resume")


def test_unknown_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--only must be among mlhf, sgd, adam, got lion"):
        run(tmp_path, "--only", "lion")


def test_mlhf_follows_its_record_unless_told_otherwise(tmp_path):
    first, part = mlhf_contenders(TASK, parse(tmp_path, "--learning-rate", "0.5"))
    assert first.hyperparameters[0]["learning_rate"] == 0.5
    assert first.hyperparameters[0]["num_cg_steps"] == 4
    assert part.hyperparameters[0]["curvature_batch_size"] == 0.25
    assert first.hyperparameters[0]["momentum"] == 0.0
    averaged, _ = mlhf_contenders(TASK, parse(tmp_path, "--momentum", "0.5"))
    assert averaged.hyperparameters[0]["momentum"] == 0.5
    (alone,) = mlhf_contenders(TASK, parse(tmp_path, "--curvature-share", "0"))
    assert alone.hyperparameters[0]["learning_rate"] == 1.0
    assert mlhf_contenders(TASK, parse(tmp_path, "--only", "adam")) == []


def test_cheaper_variants_have_names_of_their_own(tmp_path):
    found = mlhf_contenders(TASK, parse(tmp_path, "--cg-steps", "2", "4", "2", "--curvature-share", "0.5"))
    about = [one.hyperparameters[0] for one in found]
    assert [one.names for one in found] == [("mlhf",), ("mlhf curvature 0.5 CG 2",), ("mlhf curvature 0.5",)]
    assert [(a["curvature_batch_size"], a["num_cg_steps"]) for a in about] == [(None, 4), (0.5, 2), (0.5, 4)]
    assert len({a["meta_params_digest"] for a in about}) == 1


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many"])
def test_cg_steps_are_at_least_one(count, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "--cg-steps", count)
    assert f"--cg-steps: must be a whole number of at least 1, got '{count}'" in capsys.readouterr().err


class Foreign(ForeignContender):
    def program(self, task):
        return Program(task, grid_contenders(8, ["sgd"])[0].make_optimizer)

    def seconds_per_step(self, task):
        return 7.0


def test_contenders_may_bring_their_own_steps_and_clock(tmp_path, short_clock):
    ours = Foreign("foreign", SGD.names, SGD.hyperparameters, None, SGD.stacked)
    expected = run_experiment(TASK, [SGD], parse(tmp_path / "sgd"), "x", "x.py")
    results = run_experiment(TASK, [ours], parse(tmp_path / "foreign"), "x", "x.py")
    assert [r.train_loss for r in results] == [r.train_loss for r in expected]
    assert {r.seconds_per_step for r in results} == {7.0}


def test_quick_is_short():
    options = experiment_parser(None, "x", 128).parse_args(["--quick", "--epochs", "9"])
    apply_quick(options)
    assert (options.epochs, options.seeds) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "channels", "hidden"),
    [
        ([], (32, 64), (32,)),
        (["--channels", "8", "16", "--hidden", "16"], (8, 16), (16,)),
        (["--quick"], (8, 16), (16,)),
    ],
)
def test_networks_can_be_narrow(arguments, channels, hidden):
    parser = experiment_parser(None, "x", 128)
    add_network_options(parser)
    options = parser.parse_args(arguments)
    apply_quick(options)
    assert network_options(options) == {"channels": channels, "hidden": hidden}


def result(name, losses, accuracies):
    steps = tuple(5 * (i + 1) for i in range(len(losses)))
    return EpochResult(
        name, name.split()[0], {}, 1, steps, losses, accuracies[-1], 1e-3, 5, accuracies, losses[-1:]
    )


def test_figures_show_mlhf_and_the_best_of_every_family(tmp_path, monkeypatch):
    import matplotlib.figure

    seen = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: seen.append(self) or save(self, *a, **k)
    )
    results = [
        result("mlhf", (1.0, 0.5), (0.5, 0.6)),
        result("sgd low", (2.0, 0.4), (0.3, 0.4)),
        result("sgd accurate", (1.5, 0.9), (0.3, 0.7)),
        result("sgd neither", (3.0, 1.0), (0.2, 0.2)),
        result("adam diverged", (math.inf, math.inf), (0.1, 0.1)),
    ]
    save_epoch_comparison(results, tmp_path / "x.svg", "title")
    (loss, loss_by_time), (accuracy, _) = seen[0].axes[:2], seen[0].axes[2:]
    lines = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert lines.pop("adam diverged") != [math.inf, math.inf]
    assert lines == {
        "MLHF": [1.0, 0.5],
        "sgd low": [2.0, 0.4],
        "sgd accurate": [1.5, 0.9],
        "best of the other 4 at each epoch": [1.5, 0.4],
    }
    assert list(accuracy.lines[-1].get_ydata()) == [0.3, 0.7]
    assert {line.get_marker() for line in loss.lines} == {"o"}  # a line through one point cannot be seen
    assert list(loss.lines[0].get_xdata()) == [1.0, 2.0]
    assert list(loss_by_time.lines[0].get_xdata()) == pytest.approx([5e-3, 1e-2])


def test_figures_need_results(tmp_path):
    with pytest.raises(ValueError, match="`results` is empty"):
        save_epoch_comparison([], tmp_path / "x.png", "")
