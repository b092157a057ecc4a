"""Curves of the ablation: means over stretches and seeds, and what cannot be averaged."""

import ablation_report as script
import numpy as np
import pytest
from ablation_solvers import CONFIGURATIONS, DAMPING_ALONE


def lines(losses):
    return [
        {"l_p": loss, "residual_norm": 2.0 * abs(loss), "inner_loss": 1.0, "seconds": number}
        for number, loss in enumerate(losses)
    ]


def test_curves_are_means_over_seeds_and_stretches():
    summary = script.summarise(CONFIGURATIONS[0], [lines([1, 2, 3, 4]), lines([3, 4, 5, 6])], points=2)
    assert summary["iterations"] == [2, 4]
    assert summary["l_p"] == [2.5, 4.5]
    assert summary["residual_norm"] == [5.0, 9.0]
    assert summary["seconds_per_iteration"] == 1.5
    assert (summary["name"], summary["num_cg_steps"]) == (CONFIGURATIONS[0].name, 20)


def test_what_was_not_finite_is_left_out():
    metrics = lines([1.0, 3.0])
    metrics[0]["l_p"] = None  # as JSON has it
    assert script.summarise(CONFIGURATIONS[3], [metrics], points=1)["l_p"] == [3.0]


def test_there_are_no_more_points_than_iterations():
    assert script.summarise(CONFIGURATIONS[0], [lines([1, 2, 3])])["iterations"] == [1, 2, 3]


def test_table_and_figure_show_every_solver(capsys, tmp_path):
    same = {"l_p_ratio": 0.25, "residual_ratio": 0.5}
    results = [
        script.summarise(one, [lines([-1.0, -2.0])]) | {"on_same_systems": same} for one in CONFIGURATIONS
    ]
    content = {"results": results, "damping_alone": same}
    script.print_table(content)
    printed = capsys.readouterr().out.splitlines()
    for name in (*(one.name for one in CONFIGURATIONS), DAMPING_ALONE):
        (row,) = (line for line in printed if line.startswith(name))
        assert [float(number) for number in row[len(name) :].split()[-2:]] == pytest.approx([0.25, 0.5])
    script.save_figure(content, tmp_path / "figure.png")
    assert np.frombuffer((tmp_path / "figure.png").read_bytes()[1:4], np.uint8).tobytes() == b"PNG"
