"""The benchmark of a long training records what it promises, resumes exactly, and tells stable from not."""

import json
import math

import long_run_cifar10 as script
import pytest
from blobs import TASK

from mlhf_optax.support.files import locked_folder

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(autouse=True)
def _blobs(monkeypatch):
    monkeypatch.setattr(script.Options, "make_task", lambda *_: TASK)


def run(folder, *more):
    usual = ["--meta-params", "untrained", "--steps", "6", "--record-every", "2", "--output"]
    script.main([*usual, str(folder), *more])
    return json.loads((folder / "results.json").read_text())


def test_a_run_records_over_time_and_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    report = run(tmp_path / "whole")
    records = report["records"]
    assert records["step"] == [2, 4, 6]
    assert all(len(values) == 3 and all(map(math.isfinite, values)) for values in records.values())
    for name in ("damping", "preconditioner"):
        low, mean, high = (records[f"{name}_{kind}"] for kind in ("min", "mean", "max"))
        rounding = 1 + 1e-5  # of a mean of equal numbers
        assert all(0 < a <= b * rounding <= c * rounding**2 for a, b, c in zip(low, mean, high, strict=True))
    assert report["num_steps"] == 6
    assert (tmp_path / "whole" / "figure.png").stat().st_size > 1000

    save, saved, stopped = script.save_checkpoint, [], tmp_path / "stopped"

    def save_two(*given):
        save(*given)
        saved.append(given)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_checkpoint", save_two)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.setattr(script, "save_checkpoint", save)
    with pytest.raises(SystemExit):
        run(stopped)  # without --resume nothing is overwritten
    with locked_folder(stopped), pytest.raises(OSError, match="is in use by another run"):
        run(stopped, "--resume")
    assert run(stopped, "--resume")["records"] == records


def test_lengths_that_do_not_fit_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--steps", "7", "--record-every", "2", "--output", str(tmp_path)])
    assert "--steps must be a multiple of --record-every" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([2.0, 1.0, 1.5], True), ([2.0, 1.0, 2.1], False), ([2.0, math.nan], False), ([2.0, math.inf], False)],
)
def test_stable_means_finite_and_never_above_the_first_record(losses, expected):
    assert script.is_stable({"train_loss": losses}) is expected
