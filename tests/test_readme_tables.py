"""The tables that the README gets from results of the paper's experiments."""

import math

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


def test_second_order_optimizers_are_shown_with_their_best_setting_and_how_many_diverged():
    report = ORIGIN | {
        "task": "blobs",
        "batch_size": 8,
        "num_train": 32,
        "num_epochs": 2,
        "command": "python x.py",
        "results": [
            entry("mlhf", (1.5, 1.0), 0.6, 0.2),
            entry("mlhf curvature 0.25", (1.5, 1.2), 0.5, 0.1),
            entry("hf-fixed lr=1 damping=1", (1.2, math.inf), 0.0, 0.8),
            entry("hf-fixed lr=0.1 damping=1", (1.6, 1.25), 0.5, 0.8),
            entry("kfac lr=1 damping=1 decay=0.9", (1.1, 0.8), 0.7, 0.1),
        ],
    }
    head, rule, *rows, _, note = second_order_table(report)
    assert len(cells(head)) == len(cells(rule)) == 7
    assert [cells(row) for row in rows] == [
        ["mlhf", "1.000", "", "60.0%", "200", "", ""],
        ["mlhf curvature 0.25", "1.200", "", "50.0%", "100", "", ""],
        ["HF(Fixed), best of 2: lr=0.1 damping=1", "1.250", "**0.8**", "50.0%", "800", "**0.25**", "1"],
        ["K-FAC, best of 1: lr=1 damping=1 decay=0.9", "0.800", "1.2", "70.0%", "100", "2", "0"],
    ]
    assert "8 steps (2 epochs of 32 images), batch 8" in note
    assert "`python x.py`; Processor, 2 cores" in note


def test_the_ablation_is_shown_by_configuration():
    result = {
        "name": "mlhf",
        "l_p": [-0.5, -0.75],
        "residual_norm": [0.2, 0.125],
        "on_same_systems": {"l_p_ratio": 0.96, "residual_ratio": 0.25},
        "seconds_per_iteration": 1.5,
    }
    about = {"task": "blobs", "iterations": 2, "seeds": 1, "batch_size": 8, "command": "python x.py"}
    head, _, row, _, note = ablation_table(ORIGIN | about | {"results": [result]})
    assert len(cells(head)) == 6
    assert cells(row) == ["with LSTM_p, 4 CG steps (MLHF)", "-0.75", "0.125", "0.96", "0.25", "1.5"]
    assert "`blobs`, 2 meta-iterations, seeds: 1, batch 8" in note
