"""The figure of a comparison."""

import itertools
import math
import sys

import pytest
from matplotlib.figure import Figure

from mlhf_optax.comparison.figures import save_comparison
from mlhf_optax.comparison.results import Result

STEPS = (1, 3, 10, 30, 100)


def result(name, losses, seconds=1e-3):
    return Result(name, name.split()[0], {}, 2, STEPS, tuple(losses), 0.9, seconds)


MLHF = result("mlhf", [2.0, 1.0, 0.5, 0.04, 0.02], 5e-3)
EARLY = result("adam early", [2.1, 1.5, 1.0, 0.05, 0.04])
LATE = result("adam late", [2.2, 1.9, 1.5, 0.6, 0.001])
DULL = result("adam dull", [2.2, 2.1, 1.6, 0.7, 0.5])
LOST = result("sgd lost", [2.3, 2.5, math.nan, math.inf, math.nan])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_file_of_the_wanted_kind_is_written(tmp_path, ending):
    path = save_comparison([MLHF, EARLY, LATE, DULL, LOST], tmp_path / f"curves.{ending}", "title")
    start = path.read_bytes()[:100]
    assert start.startswith(b"\x89PNG") if ending == "png" else b"<?xml" in start


def test_curves_by_step_and_by_time(tmp_path, drawn):
    save_comparison([MLHF, EARLY, LATE, DULL], tmp_path / "curves.png", "title")
    by_step, by_time = drawn[0].axes
    step_lines, time_lines = by_step.get_lines(), by_time.get_lines()
    assert len(time_lines) == 3, "MLHF and the two that lead their family, without the dull one"
    assert len(step_lines) == 4, "and the lowest of the others"
    assert list(step_lines[0].get_xdata()) == list(STEPS)
    assert list(time_lines[0].get_xdata()) == [step * 5e-3 for step in STEPS]
    assert list(step_lines[-1].get_ydata()) == [2.1, 1.5, 1.0, 0.05, 0.001]
    assert step_lines[0].get_linewidth() > step_lines[1].get_linewidth()
    assert {axes.get_yscale() for axes in drawn[0].axes} == {"log"}


def test_every_curve_is_labelled_at_its_end(tmp_path, drawn):
    save_comparison([MLHF, EARLY, LATE], tmp_path / "curves.png", "title")
    labels = drawn[0].axes[0].texts
    texts = [label.get_text() for label in labels]
    assert sorted(texts) == ["MLHF", "adam early", "adam late", "best of the other 2 at each step"]
    heights = sorted(label.xyann[1] for label in labels)
    assert all(b - a >= 0.0499 for a, b in itertools.pairwise(heights)), "no label on another"
    ends = {label.get_text(): label.xy for label in labels}
    assert ends["MLHF"] == (100, 0.02)


def test_what_diverged_ends_where_it_diverged(tmp_path, drawn):
    save_comparison([LOST], tmp_path / "curves.png", "title")
    ends = {label.get_text(): label.xy for label in drawn[0].axes[0].texts}
    assert ends["sgd lost"] == (3, 2.5)


def test_a_training_without_one_finite_loss_is_left_out(tmp_path, drawn):
    hopeless = result("sgd hopeless", [math.nan] * 5)
    save_comparison([MLHF, hopeless], tmp_path / "curves.png", "title")
    assert [label.get_text() for label in drawn[0].axes[0].texts] == ["MLHF"]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="`results` is empty"):
        save_comparison([], tmp_path / "curves.png", "title")


def test_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[experiments\]'"):
        save_comparison([MLHF], tmp_path / "curves.png", "title")
