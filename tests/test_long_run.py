"""The benchmark of a long training records what it promises, resumes exactly, and tells stable from not."""

import json
import math

import long_run_cifar10
import pytest
from blobs import TASK


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setattr(long_run_cifar10.Options, "make_task", lambda *_: TASK)
    return long_run_cifar10


def arguments(folder, *more):
    return [
        "--meta-params",
        "untrained",
        "--steps",
        "6",
        "--record-every",
        "2",
        "--output",
        str(folder),
        *more,
    ]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_records_loss_damping_and_preconditioner_over_time(module, tmp_path):
    module.main(arguments(tmp_path))
    report = results(tmp_path)
    records = report["records"]
    assert records["step"] == [2, 4, 6]
    assert all(len(values) == 3 and all(map(math.isfinite, values)) for values in records.values())
    for name in ("damping", "preconditioner"):
        low, mean, high = (records[f"{name}_{kind}"] for kind in ("min", "mean", "max"))
        rounding = 1 + 1e-5  # of a mean of equal numbers
        assert all(0 < a <= b * rounding <= c * rounding**2 for a, b, c in zip(low, mean, high, strict=True))
    assert report["num_steps"] == 6
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(module, tmp_path, monkeypatch):
    module.main(arguments(tmp_path / "whole"))
    save, saved = module.save_checkpoint, []

    def save_two(*given):
        save(*given)
        saved.append(given)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", save_two)
    with pytest.raises(KeyboardInterrupt):
        module.main(arguments(tmp_path / "stopped"))
    monkeypatch.setattr(module, "save_checkpoint", save)
    with pytest.raises(SystemExit):
        module.main(arguments(tmp_path / "stopped"))  # without --resume nothing is overwritten
    module.main(arguments(tmp_path / "stopped", "--resume"))
    assert results(tmp_path / "stopped")["records"] == results(tmp_path / "whole")["records"]


def test_lengths_that_do_not_fit_are_refused(module, tmp_path, capsys):
    with pytest.raises(SystemExit):
        module.main(["--steps", "7", "--record-every", "2", "--output", str(tmp_path)])
    assert "--steps must be a multiple of --record-every" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([2.0, 1.0, 1.5], True), ([2.0, 1.0, 2.1], False), ([2.0, math.nan], False), ([2.0, math.inf], False)],
)
def test_stable_means_finite_and_never_above_the_first_record(module, losses, expected):
    assert module.is_stable({"train_loss": losses}) is expected
