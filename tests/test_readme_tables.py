"""The tables that the README gets from results of the paper's experiments."""

import math

import pytest
from readme_cifar10 import best_by_time, epochs_table
from readme_markdown import ratio
from readme_paper import ablation_table, second_order_table

MACHINE = {"backend": "cpu", "cpu": "Processor", "cores": 2}
ORIGIN = {"machine": MACHINE, "versions": {"jax": "1", "python": "3"}, "date": "2026-11-21T00:00"}


def entry(name, losses, accuracy, seconds):
    last = None if math.isinf(losses[-1]) else losses[-1]
    return {
        "name": name,
        "hyperparameters": {},
        "seeds": 1,
        "steps": [4, 8],
        "train_loss": [None if math.isinf(x) else x for x in losses],
        "test_accuracy": accuracy,
        "seconds_per_step": seconds,
        "steps_per_epoch": 4,
        "test_curve": [0.1, accuracy],
        "final_losses": [last],
    }


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def report(*results, **about):
    sizes = {"task": "blobs", "batch_size": 8, "num_train": 32, "command": "python x.py"}
    return ORIGIN | sizes | {"results": list(results)} | about


def test_second_order_optimizers_are_shown_with_their_best_setting_and_how_many_diverged():
    measured = report(
        entry("mlhf", (1.5, 1.0), 0.6, 0.2),
        entry("mlhf curvature 0.25", (1.5, 1.2), 0.5, 0.1),
        entry("hf-fixed lr=1 damping=1", (1.2, math.inf), 0.0, 0.8),
        entry("hf-fixed lr=0.1 damping=1", (1.6, 1.25), 0.5, 0.8),
        entry("kfac lr=1 damping=1 decay=0.9", (1.1, 0.8), 0.7, 0.5),
    )
    head, rule, *rows, _, note = second_order_table(measured)
    assert len(cells(head)) == len(cells(rule)) == 5
    assert [cells(row) for row in rows] == [
        ["mlhf", "4", "1.500 (1.88)", "10.0%", "1 (**0.20**)"],
        ["mlhf", "8", "1.000 (1.25)", "60.0%", "2 (**0.40**)"],
        ["mlhf curvature 0.25", "4", "1.500 (1.88)", "10.0%", "0 (**0.10**)"],
        ["mlhf curvature 0.25", "8", "1.200 (1.50)", "50.0%", "1 (**0.20**)"],
        ["HF(Fixed), best of 2, 1 diverged: lr=0.1 damping=1", "8", "1.250", "50.0%", "6"],
        ["K-FAC, best of 1, 0 diverged: lr=1 damping=1 decay=0.9", "8", "0.800", "70.0%", "4"],
    ]
    assert "32 images, batch 8" in note
    assert "`python x.py`; Processor, 2 cores" in note


def test_a_longer_run_of_mlhf_takes_the_place_of_its_rows_with_the_time_of_the_comparison():
    measured = report(
        entry("mlhf", (1.5, 1.0), 0.6, 0.2), entry("hf-fixed lr=1 damping=1", (1.2, 1.0), 0.5, 0.8)
    )
    longer = report(entry("mlhf", (1.5, 0.5), 0.7, 9.0) | {"steps": [8, 16]}, command="python y.py")
    *rows, _, note = second_order_table(measured, longer)[2:]
    assert note.endswith("The losses of MLHF: `python y.py`.")
    assert [cells(row)[1:] for row in rows[:2]] == [
        ["8", "1.500 (1.50)", "10.0%", "2 (**0.25**)"],
        ["16", "0.500 (**0.50**)", "70.0%", "3 (**0.50**)"],
    ]


def test_the_ablation_is_shown_by_configuration():
    result = {
        "name": "mlhf",
        "l_p": [-0.5, -0.75],
        "residual_norm": [0.2, 0.125],
        "on_same_systems": {"l_p_ratio": 0.96, "residual_ratio": 0.25},
        "seconds_per_iteration": 1.5,
    }
    alone = {"l_p_ratio": 0.9, "residual_ratio": 0.5}
    content = report(result, iterations=2, seeds=1, damping_alone=alone)
    head, _, row, last, _, note = ablation_table(content)
    assert len(cells(head)) == 5
    assert cells(row) == ["with LSTM_p, 4 CG steps (MLHF)", "-0.75", "0.125", "0.96", "0.25"]
    assert cells(last) == ["P from the damping alone, 4 CG steps", "", "", "0.9", "0.5"]
    assert "`blobs`, 2 meta-iterations, seeds: 1, batch 8" in note


def test_mlhf_is_shown_against_the_grid_by_epoch_and_by_time():
    measured = report(
        entry("mlhf", (1.5, 1.0), 0.6, 0.15),
        entry("sgd lr=1 momentum=0.9", (2.0, 1.6), 0.5, 0.1),
        entry("adam lr=0.1 b1=0.9 b2=0.9", (2.5, 1.25), 0.4, 0.2),
        num_epochs=2,
    )
    head, _, own, best, by_time, _, note = epochs_table(measured)
    assert cells(head)[1:] == ["1", "2", "test accuracy", "ms a step"]
    assert cells(own) == ["mlhf", "1.500 (**0.75**)", "1.000 (**0.80**)", "60.0%", "150"]
    assert cells(best) == ["best of 2 in that column", "2.000", "1.250", "50.0%", "100"]
    # An epoch of MLHF lasts one and a half of the grid, whose best is then half way between 2 and 1.25.
    assert cells(by_time)[:3] == ["best of 2 by the time of mlhf", "1.625 (**0.92**)", "-"]
    assert "2 epochs of 32 images, batch 8, seeds: 1 for MLHF, 1 for the grid" in note
    assert "every seed" not in note


def test_the_spread_over_seeds_is_told():
    several = {"seeds": 2, "final_losses": [0.9, 1.1]}
    best = {"seeds": 2, "final_losses": [1.5, 1.7]}
    measured = report(
        entry("mlhf", (1.5, 1.0), 0.6, 0.15) | several,
        entry("sgd lr=1 momentum=0.9", (2.0, 1.9), 0.5, 0.1) | several,
        entry("sgd lr=2 momentum=0.9", (2.1, 1.6), 0.5, 0.1) | best,
        num_epochs=2,
    )
    note = epochs_table(measured)[-1]
    assert "every seed: mlhf 0.900, 1.100; sgd lr=2 momentum=0.9 1.500, 1.700." in note


def test_what_the_grid_has_not_reached_is_not_made_up():
    before, between, at, after = best_by_time([4.0, 2.0], [1, 3], 0.5)[:1] + best_by_time(
        [4.0, 2.0, 1.0], [1, 2, 4], 1.5
    )
    assert math.isnan(before)
    assert (between, at) == (3.0, 1.5)
    assert math.isnan(after)


@pytest.mark.parametrize(
    ("own", "best", "text"),
    [
        (1.0, 1.02, "**0.98**"),
        (1.02, 1.0, "1.02"),
        (0.5, 10.0, "**0.05**"),
        (31.0, 1.0, "31"),
        (math.inf, 1.0, "diverged"),
    ],
)
def test_ratios_near_one_have_three_digits(own, best, text):
    assert ratio(own, best) == text
