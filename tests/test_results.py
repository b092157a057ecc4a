"""Results of a comparison: means, JSON, old files, tables, figures."""

import io
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from mlhf_optax.experiments import (
    Comparison,
    comparison_markdown,
    comparison_table,
    grid_contenders,
    save_figure,
)
from mlhf_optax.experiments.origin import machine_info, versions, with_origin
from mlhf_optax.experiments.results import best_at, frame_of, leaders
from mlhf_optax.experiments.tables import format_loss, format_ratio, losses_by_time, table_steps

STEPS = [1, 10, 30, 100]
SHIPPED = Path(__file__).parents[1] / "benchmarks" / "paper" / "results"


def entry(name, losses, accuracy=0.9, seconds=1e-3, steps=STEPS, **setting):
    family = name.split()[0]
    accuracies = accuracy if isinstance(accuracy, list) else [None] * (len(losses) - 1) + [accuracy]
    # Two seeds whose mean is what was asked for.
    both = {"test_loss": losses, "test_accuracy": accuracies}
    shifted = lambda shift: [loss and loss + shift for loss in losses]
    curves = [both | {"seed": i, "train_loss": shifted(x)} for i, x in ((0, -1e-5), (1, 1e-5))]
    about = {"optimizer": name, "family": family, "label": name.replace("mlhf", "MLHF"), "setting": setting}
    return {**about, "seconds_per_step": seconds, "steps": list(steps), "curves": curves}


def comparison(*entries, steps_per_epoch=None):
    return Comparison(frame_of(entries, steps_per_epoch), {"task": "x", "steps_per_epoch": steps_per_epoch})


LEARNED = entry("mlhf", [2.0, 0.5, 0.04, 0.02], 0.95, 6e-3, learning_rate=0.5)
EARLY = entry("adam fast", [2.1, 1.0, 0.5, 0.4])
LATE = entry("adam slow", [2.2, 1.5, 0.6, 0.001], 0.96)
DULL = entry("adam dull", [2.2, 1.6, 0.7, 0.5])
LOST = entry("sgd wild", [2.3, None, None, None], 0.0, 0.5e-3)
ALL = comparison(LEARNED, EARLY, LATE, DULL, LOST)


def rows_of(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def named(curves):
    return [curve.optimizer for curve in curves]


def test_curves_are_means_over_seeds_and_infinite_where_one_diverged():
    mine, *_, lost = ALL.curves()
    assert mine.seeds == 2
    assert mine.is_learned
    assert mine.train_loss == pytest.approx([2.0, 0.5, 0.04, 0.02])
    assert mine.accuracy == 0.95
    assert lost.train_loss == pytest.approx([2.3, math.inf, math.inf, math.inf])
    assert ALL.last_losses("mlhf") == pytest.approx([0.02 - 1e-5, 0.02 + 1e-5])


def test_the_best_at_a_step_is_never_one_that_diverged():
    mine, early, late, _, lost = ALL.curves()
    assert best_at([mine, early, late, lost], 10) is mine
    assert best_at([lost, late, early], 10) is early
    assert best_at([lost, late, early], 100) is late
    assert named(leaders([early, late, lost], [10, 30, 100])) == ["adam fast", "adam slow"]


def test_results_survive_a_file(tmp_path):
    ALL.save(tmp_path / "x.json")
    found = Comparison.load(tmp_path / "x.json")
    assert found.frame.equals(ALL.frame)
    assert found.about == ALL.about
    entries = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)["optimizers"]
    assert entries[4]["curves"][0]["train_loss"][1:] == [None] * 3
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x.json holds no comparison"):
        Comparison.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    "name", ["digits-mlp", "first_order_cifar10", "second_order_cifar10", "transfer_resnet18"]
)
def test_files_of_version_0_1_keep_every_number(name):
    found, raw = Comparison.load(SHIPPED / f"{name}.json"), json.loads((SHIPPED / f"{name}.json").read_text())
    for curve, old in zip(found.curves(), raw["results"], strict=True):
        losses = [math.inf if loss is None else loss for loss in old["train_loss"]]
        about = (curve.optimizer, curve.setting, curve.seeds, curve.steps, curve.train_loss, curve.accuracy)
        names = ("name", "hyperparameters", "seeds", "steps")
        assert about == (*(old[key] for key in names), losses, old["test_accuracy"])
        assert curve.seconds_per_step == old["seconds_per_step"]
        assert curve.is_learned == old["name"].startswith("mlhf")
        if "final_losses" in old:
            assert curve.test_accuracy == old["test_curve"]
            last = [math.inf if loss is None else loss for loss in old["final_losses"]]
            assert found.last_losses(curve.optimizer) == last


def test_the_record_says_where_and_how():
    found = json.loads(json.dumps(with_origin("mlhf-optax train", rows=[1]), allow_nan=False))
    assert list(found) == ["machine", "versions", "command", "date", "rows"]
    assert (found["machine"], found["versions"]) == (machine_info(), versions())
    assert found["machine"]["cores"] >= 1
    assert found["date"].endswith("+00:00")


def test_columns_are_the_usual_steps_and_the_last():
    assert table_steps(ALL.curves()[0]) == [10, 30, 100]
    assert table_steps(comparison(entry("sgd", [1.0] * 4, steps=[1, 10, 30, 70])).curves()[0]) == [10, 30, 70]
    steps = [5 * epoch for epoch in range(1, 101)]
    shown = table_steps(comparison(entry("sgd", [1.0] * 100, steps=steps)).curves()[0], "epoch")
    assert (shown[0], shown[-1], len(shown)) == (5, 500, 7)


def test_the_table_says_who_is_below_whom():
    table = comparison_table(ALL, "title")
    rows = rows_of(table)
    assert ["MLHF", "lr=0.5", "0.500", "0.040", "0.020", "95.0%", "6.00"] in rows
    assert ["best", "of", "the", "other", "4", "there", "1.000", "0.500", "1.0e-3", "96.0%", "0.50"] in rows
    assert ["MLHF", "/", "that", "best", "0.50x", "0.08x", "20x", "-1.0", "12.0x"] in rows
    assert ["sgd", "wild", "diverged", "diverged", "diverged", "0.0%", "0.50"] in rows
    names = [row[:2] for row in rows]
    assert ["adam", "fast"] in names
    assert ["adam", "slow"] in names
    assert ["adam", "dull"] not in names
    assert ["adam", "dull"] in [row[:2] for row in rows_of(comparison_table(ALL, "title", show_all=True))]
    cells = [list(map(str, column.cells)) for column in table.columns]
    styles = lambda name: [str(list(c.cells)[cells[0].index(name)].style) for c in table.columns[1:5]]
    assert styles("MLHF / that best") == ["bold green", "bold green", "bold red", "bold red"]
    assert styles("adam fast") == ["bold green", "bold green", "", ""]  # the best of the others there


def test_what_a_label_is_equal_to_stands_in_its_own_row_alone():
    equal = LEARNED | {"label": "MLHF = f()"}
    rows = rows_of(comparison_table(comparison(equal, EARLY), "title"))
    assert ["MLHF", "=", "f()", "lr=0.5"] in [row[:4] for row in rows]
    assert ["MLHF", "/", "that", "best"] in [row[:4] for row in rows]


def test_a_learned_optimizer_that_diverged_does_not_look_good():
    lost = entry("mlhf", [2.0, None, 0.04, 0.02])
    row = next(
        row for row in rows_of(comparison_table(comparison(lost, EARLY), "")) if row[:2] == ["MLHF", "/"]
    )
    assert row[4] == "diverged"


@pytest.mark.parametrize("entries", [[LEARNED], [EARLY, LATE]])
def test_tables_of_one_side_only(entries):
    text = str(rows_of(comparison_table(comparison(*entries), "title")))
    assert "best" not in text
    assert ("MLHF" in text) == (entries == [LEARNED])


def test_tables_of_the_real_grid_fit_a_terminal():
    grid = [
        entry(name, [2.3, 1e-3, 1e-4, 1e-5], 1.0, 0.099) for one in grid_contenders() for name in one.names
    ]
    rows = rows_of(comparison_table(comparison(*grid), "title", show_all=True))
    assert sum(bool(row) and row[0] in ("sgd", "rmsprop", "adam") for row in rows) == 45
    assert not any("…" in cell for row in rows for cell in row)


def test_markdown_compares_by_epoch_and_by_time():
    mine = entry("mlhf", [1.5, 1.0], [0.1, 0.6], 0.15, [4, 8])
    first = entry("sgd a", [2.0, 1.6], [0.1, 0.5], 0.1, [4, 8])
    second = entry("adam b", [2.5, 1.25], [0.1, 0.4], 0.2, [4, 8])
    lines = comparison_markdown(comparison(mine, first, second, steps_per_epoch=4), "epoch")
    head, _, own, best, ratio, by_time, *_ = (
        [c.strip() for c in line.strip("|").split("|")] for line in lines
    )
    assert head == ["training loss after epoch", "1", "2", "test accuracy", "ms per step"]
    assert own == ["MLHF", "1.500", "1.000", "60.0%", "150"]
    assert best == ["best of the other 2 there", "2.000", "1.250", "50.0%", "100"]
    assert ratio == ["MLHF / that best", "**0.75x**", "**0.80x**", "**+10.0**", "1.5x"]
    # An epoch of MLHF lasts one and a half of the others', whose best is then half way between 2 and 1.25.
    assert by_time == ["MLHF / best at equal time", "**0.92x**", "-", "", ""]


def test_what_the_others_have_not_reached_is_not_made_up():
    def by_time(losses, steps, factor):
        both = entry("sgd", losses, 0.5, 1.0, steps), entry("mlhf", losses, 0.5, factor, steps)
        other, mine = comparison(*both).curves()
        return losses_by_time([other], mine)

    assert math.isnan(by_time([4.0, 2.0], [1, 3], 0.5)[0])
    between, at, after = by_time([4.0, 2.0, 1.0], [1, 2, 4], 1.5)
    assert (between, at) == pytest.approx((3.0, 1.5))
    assert math.isnan(after)


def test_losses_and_ratios_are_written_in_few_characters():
    losses = (0.0, 0.01, 0.00999, 0.1534, 99.9, 12345.0, 3.9712e-06, math.inf, math.nan)
    texts = "0.000 0.010 1.0e-2 0.153 99.900 1.2e4 4.0e-6 diverged diverged"
    assert " ".join(map(format_loss, losses)) == texts
    ratios = [(1.0, 1.02), (1.02, 1.0), (0.5, 10.0), (31.0, 1.0), (1.0, 0.0), (math.inf, 1.0)]
    assert " ".join(format_ratio(*pair) for pair in ratios) == "0.98 1.02 0.05 31 - diverged"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig
    spy = lambda figure, *args, **kwargs: figures.append(figure) or save(figure, *args, **kwargs)
    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_figures_show_losses_by_step_and_by_time(tmp_path, drawn, ending, start):
    path = save_figure(ALL, tmp_path / f"curves.{ending}", "title")
    assert path.read_bytes().startswith(start)
    by_step, by_time = drawn[0].axes
    lines = {line.get_label(): line for line in by_step.get_lines()}
    assert list(lines) == ["MLHF", "adam slow", "sgd wild", "best of 4 hand-made at each step"]
    assert list(lines["MLHF"].get_xdata()) == STEPS
    assert list(by_time.get_lines()[0].get_xdata()) == [step * 6e-3 for step in STEPS]
    assert len(by_time.get_lines()) == 3  # the best of others takes no time of its own
    best = lines["best of 4 hand-made at each step"].get_ydata()
    assert list(best) == pytest.approx([2.1, 1.0, 0.5, 0.001])
    assert sum(map(math.isnan, lines["sgd wild"].get_ydata())) == 3
    widths = [line.get_linewidth() for line in lines.values()]
    assert all(a > b for a, b in itertools.pairwise(widths[:2]))


def test_figures_show_accuracy_where_it_was_recorded(tmp_path, drawn):
    results = comparison(
        entry("mlhf", [1.0, 0.5], [0.5, 0.6], steps=[5, 10]),
        entry("sgd low", [2.0, 0.4], [0.3, 0.4], steps=[5, 10]),
        entry("sgd accurate", [1.5, 0.9], [0.3, 0.7], steps=[5, 10]),
        entry("sgd neither", [3.0, 1.0], [0.2, 0.2], steps=[5, 10]),
        steps_per_epoch=5,
    )
    save_figure(results, tmp_path / "x.png", "title", unit="epoch")
    loss, _, accuracy, _ = drawn[0].axes
    labels = [line.get_label() for line in loss.lines]
    assert labels == ["MLHF", "sgd low", "sgd accurate", "best of 3 hand-made at each step"]
    assert list(loss.lines[0].get_xdata()) == [1.0, 2.0]
    assert list(accuracy.lines[-1].get_ydata()) == [0.3, 0.7]
    assert {line.get_marker() for line in loss.lines} == {"o"}  # a line through one point cannot be seen


def test_nothing_to_draw_and_nothing_to_draw_with_are_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`comparison` is empty"):
        save_figure(comparison(), tmp_path / "x.png", "title")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[experiments\]'"):
        save_figure(ALL, tmp_path / "x.png", "title")
