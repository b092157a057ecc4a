"""Results of a comparison: best ones, JSON, tables."""

import dataclasses
import io
import json
import math

import jax
import pytest
from rich.console import Console

from mlhf_optax import init_meta_params
from mlhf_optax.comparison import comparison
from mlhf_optax.comparison.machine import machine_info, versions
from mlhf_optax.comparison.results import Result, best_of, leaders, report, table_steps
from mlhf_optax.comparison.tables import comparison_table, format_loss
from mlhf_optax.tasks import digits_mlp

STEPS = (1, 10, 30, 100)


def result(name, losses, accuracy=0.9, seconds=1e-3, **hyperparameters):
    family = name.split()[0]
    return Result(name, family, hyperparameters, 2, STEPS, tuple(losses), accuracy, seconds)


MLHF = result("mlhf", [2.0, 0.5, 0.04, 0.02], 0.95, 6e-3, learning_rate=0.5)
EARLY = result("adam fast", [2.1, 1.0, 0.5, 0.4])
LATE = result("adam slow", [2.2, 1.5, 0.6, 0.001], 0.96)
MIDDLING = result("adam dull", [2.2, 1.6, 0.7, 0.5])
LOST = result("sgd wild", [2.3, math.nan, math.inf, math.nan], 0.0, 0.5e-3)
ALL = [MLHF, EARLY, LATE, MIDDLING, LOST]


def text_of(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def rows_of(table):
    return [line.split() for line in text_of(table).splitlines()]


def test_the_best_at_a_step_is_never_one_that_diverged():
    assert best_of(ALL, 10) is MLHF
    assert best_of([LOST, LATE, EARLY], 10) is EARLY
    assert best_of([LOST, LATE, EARLY], 100) is LATE


def test_leaders_are_named_once_and_in_order():
    assert leaders(ALL[1:], [10, 30, 100]) == [EARLY, LATE]


def test_columns_are_the_usual_steps_and_the_last():
    assert table_steps(ALL) == [10, 30, 100]
    assert table_steps([dataclasses.replace(MLHF, steps=(1, 10, 30, 70))]) == [10, 30, 70]


def test_the_table_says_who_is_below_whom():
    rows = rows_of(comparison_table(ALL, "title"))
    assert ["MLHF", "lr=0.5", "0.500", "0.040", "0.020", "95.0%", "6.00"] in rows
    assert ["best", "of", "the", "other", "4", "there", "1.000", "0.500", "1.0e-3", "96.0%", "0.50"] in rows
    assert ["MLHF", "/", "that", "best", "0.50x", "0.08x", "20x", "-1.0", "12x"] in rows


def test_the_table_shows_the_best_of_each_family_and_what_diverged():
    names = [row[:2] for row in rows_of(comparison_table(ALL, "title"))]
    assert ["adam", "fast"] in names
    assert ["adam", "slow"] in names
    assert ["adam", "dull"] not in names
    assert ["sgd", "wild", "diverged", "diverged", "diverged", "0.0%", "0.50"] in rows_of(
        comparison_table(ALL, "")
    )


def test_the_whole_table_can_be_asked_for():
    assert "adam dull" in text_of(comparison_table(ALL, "title", show_all=True))


def test_the_best_of_the_others_is_marked():
    table = comparison_table(ALL, "title")
    columns = [list(column.cells) for column in table.columns]
    row = columns[0].index("adam fast")
    assert [str(column[row].style) or str(column[row].spans) for column in columns[1:3]] == [
        "[Span(0, 5, 'bold underline')]"
    ] * 2
    assert columns[3][row].spans == []


def test_a_diverged_mlhf_does_not_look_good():
    lost = dataclasses.replace(MLHF, train_loss=(2.0, math.nan, 0.04, 0.02))
    row = next(row for row in rows_of(comparison_table([lost, EARLY], "")) if row[:2] == ["MLHF", "/"])
    assert row[4] == "diverged"


@pytest.mark.parametrize("results", [[MLHF], [EARLY, LATE]])
def test_tables_of_one_side_only(results):
    text = text_of(comparison_table(results, "title"))
    assert "that best" not in text
    assert ("MLHF" in text) == (results == [MLHF])


def test_tables_of_the_real_grid_fit_a_terminal():
    grid = [
        Result(name, contender.family, {}, 5, STEPS, (2.3, 1e-3, 1e-4, 1e-5), 1.0, 0.099)
        for contender in comparison.grid_contenders(256)
        for name in contender.names
    ]
    lines = text_of(comparison_table(grid, "title", show_all=True)).splitlines()
    assert sum(line.lstrip().startswith(("sgd", "rmsprop", "adam")) for line in lines) == 45
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (0.0, "0.000"),
        (0.01, "0.010"),
        (0.00999, "1.0e-2"),
        (99.9, "99.900"),
        (12345.0, "1.2e4"),
        (math.inf, "diverged"),
    ],
)
def test_losses_are_written_in_few_characters(loss, text):
    assert format_loss(loss) == text


def test_the_report_is_plain_json_of_the_promised_form():
    data = report(digits_mlp(), ALL, "mlhf-optax train")
    data = json.loads(json.dumps(data, allow_nan=False))
    assert list(data) == ["task", "machine", "versions", "command", "date", "results"]
    assert data["task"] == "digits-mlp"
    assert data["command"] == "mlhf-optax train"
    assert data["machine"] == machine_info()
    assert data["versions"] == versions()
    assert data["date"].endswith("+00:00")
    assert data["results"][0] == {
        "name": "mlhf",
        "hyperparameters": {"learning_rate": 0.5},
        "seeds": 2,
        "steps": [1, 10, 30, 100],
        "train_loss": [2.0, 0.5, 0.04, 0.02],
        "test_accuracy": 0.95,
        "seconds_per_step": 6e-3,
    }
    assert data["results"][4]["train_loss"] == [2.3, None, None, None]


def test_machine_and_versions_are_filled_in():
    machine = machine_info()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert machine["backend"] == jax.default_backend()
    assert versions()["jax"] == jax.__version__


def test_comparing_yields_means_over_seeds_contender_by_contender():
    task = digits_mlp(hidden=(4,))
    contenders = [
        comparison.mlhf_contender(task, init_meta_params(jax.random.key(0)), num_cg_steps=1),
        *comparison.grid_contenders(128, ["sgd"]),
    ]
    progress = []
    parts = list(
        comparison.compare(
            task, contenders, num_seeds=2, num_steps=3, on_progress=lambda *event: progress.append(event)
        )
    )
    assert [len(part) for part in parts] == [1, 9]
    for entry in (*parts[0], *parts[1]):
        assert (entry.seeds, entry.steps, len(entry.train_loss)) == (2, (1, 2, 3), 3)
        assert 0 <= entry.test_accuracy <= 1
        assert entry.seconds_per_step > 0
    assert [event[:2] for event in progress] == [(family, n) for family in ("mlhf", "sgd") for n in (1, 2, 3)]
    assert progress[2][2] == pytest.approx(parts[0][0].train_loss[-1])
    assert progress[-1][2] == pytest.approx(min(entry.train_loss[-1] for entry in parts[1]))
