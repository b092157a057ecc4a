"""The tables of the READMEs: every one is made from the shipped results, and its numbers are theirs."""

import math
import re

import polars as pl
import pytest
import tables_of_held_out
from readme_tables import FILES, ROOT, TABLES, rewritten, table
from tables_of_held_out import held_out_cosine, seeds_text
from tables_of_learned import learned_optimizers, learned_optimizers_long
from tables_of_trainings import ablation, by_epoch, second_order

from mlhf_optax.experiments import Comparison
from mlhf_optax.experiments.results import frame_of

MACHINE = {"backend": "cpu", "cpu": "Processor", "cores": 2}
ORIGIN = {"machine": MACHINE, "versions": {"jax": "1", "python": "3"}, "date": "2026-11-21T00:00"}
SIZES = {"task": "blobs", "batch_size": 8, "num_train": 32, "steps_per_epoch": 4, "command": "python x.py"}


def entry(name, losses, accuracy, seconds, steps=(4, 8), seeds=(0.0,)):
    shifted = lambda shift: [None if math.isinf(loss) else loss + shift for loss in losses]
    curves = [
        {"seed": seed, "train_loss": shifted(shift), "test_accuracy": [0.1, accuracy]}
        for seed, shift in enumerate(seeds)
    ]
    about = {"optimizer": name, "family": name.split()[0], "label": name, "setting": {}}
    return {**about, "seconds_per_step": seconds, "steps": list(steps), "curves": curves}


def comparison(*entries, **about):
    return Comparison(frame_of(entries, 4), ORIGIN | SIZES | about)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_second_order_optimizers_are_shown_with_their_best_setting_and_how_many_diverged():
    measured = comparison(
        entry("mlhf", (1.5, 1.0), 0.6, 0.2),
        entry("mlhf curvature 0.25", (1.5, 1.2), 0.5, 0.1),
        entry("hf-fixed lr=1 damping=1", (1.2, math.inf), 0.0, 0.8),
        entry("hf-fixed lr=0.1 damping=1", (1.6, 1.25), 0.5, 0.8),
        entry("kfac lr=1 damping=1 decay=0.9", (1.1, 0.8), 0.7, 0.5),
    )
    head, rule, *rows, _, note = second_order(measured)
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
    rival = entry("hf-fixed lr=1 damping=1", (1.2, 1.0), 0.5, 0.8)
    longer = comparison(entry("mlhf", (1.5, 0.5), 0.7, 9.0, steps=(8, 16)), command="python y.py")
    *rows, _, note = second_order(comparison(entry("mlhf", (1.5, 1.0), 0.6, 0.2), rival), longer)[2:]
    assert note.endswith("The losses of MLHF: `python y.py`.")
    assert [cells(row)[1:] for row in rows[:2]] == [
        ["8", "1.500 (1.50)", "10.0%", "2 (**0.25**)"],
        ["16", "0.500 (**0.50**)", "70.0%", "3 (**0.50**)"],
    ]


def test_a_learned_optimizer_that_diverged_is_told_beside_what_is_published():
    row = {"optimizer": "l2l", "activation": "relu", "steps": 100}
    content = ORIGIN | {"command": "python x.py", "starts": 2, "published": {"l2l": {"relu": 1.42}}}
    short = learned_optimizers(content | {"rows": [row | {"loss": None}]})
    assert cells(short[2]) == ["L2L", "diverged (1.42)"]
    long = [content | {"rows": [row | {"steps": n, "loss": x}]} for n, x in ((2000, 0.5), (10_000, None))]
    assert cells(learned_optimizers_long(*long)[2]) == ["L2L", "0.500", "diverged"]


def test_tasks_with_other_numbers_of_seeds_are_named():
    rows = [{"task": "a", "seeds": 3}, {"task": "b", "seeds": 1}, {"task": "c"}]
    assert seeds_text({"seeds": 3, "rows": rows}) == "Seeds: 3; 1 for b."
    assert seeds_text({"seeds": 3, "rows": rows[:1]}) == "Seeds: 3."


def test_a_constant_rate_is_compared_with_a_falling_one_from_the_same_seeds():
    ratios = dict.fromkeys(("best Adam or SGD", "best Muon", "default Adam", "constant", "untrained"), 0.5)
    about = {"task": "a", "steps": [8], "ratios": {"8": ratios}, "accuracy": None, "best_adam_accuracy": None}
    falling = ORIGIN | {"command": "python x.py", "seeds": 1, "rows": [about | {"losses": [0.2]}]}
    constant = {"rows": [about | {"losses": [0.3], "last_losses": [0.1, 0.4, 0.4]}]}
    _, _, *rows = held_out_cosine(constant, falling)
    assert cells(rows[0])[:3] + cells(rows[0])[7:8] == ["a, falling rate", "8", "**0.50**", "0.200"]
    assert cells(rows[1])[:3] + cells(rows[1])[7:8] == ["a, constant rate", "8", "**0.25**", "0.100"]


def held_out_row(task, ratio, by_time, accuracy=0.9):
    rivals = ("best Adam or SGD", "best Muon", "default Adam", "constant", "untrained")
    at = lambda x: {str(step): dict.fromkeys(rivals, x) for step in (10, 30, 100)}
    row = {"task": task, "steps": [10, 30, 100], "losses": [0.4, 0.2, 0.1], "test_losses": [0.5, 0.4, None]}
    row |= {"ratios": at(ratio), "by_time": at(by_time), "accuracy": accuracy, "best_adam_accuracy": 0.9}
    return row | {"by_test_loss": at(0.8) if task == "poisson" else {}}


def test_what_was_aimed_at_is_judged_by_the_numbers(monkeypatch):
    monkeypatch.setattr(tables_of_held_out, "STEPS", (10, 30, 100, 3000))
    long = {"rows": [{"task": "digits", "is_learned": True, "blows_up": False, "ends_at_chance": False}]}
    judged = lambda *rows: [
        cells(line)
        for line in tables_of_held_out.held_out_aims(
            ORIGIN | {"command": "python x.py", "rows": rows}, {"rows": []}, long
        )[2:-2]
    ]
    good = judged(held_out_row("poisson", 0.5, 0.7), held_out_row("mnist-mlp", 0.8, 0.9))
    assert {row[-1] for row in good} == {"met"}
    assert good[0][1] == "0.65, 0.65 at 30, 100 steps"
    long["rows"][0]["blows_up"] = True
    bad = judged(held_out_row("poisson", 1.2, 1.5, 0.8), held_out_row("mnist-mlp", 1.3, 1.0))
    assert {row[-1] for row in bad} == {"**missed**"}
    assert bad[1][1] == "at worst 1.30, mnist-mlp at 100 steps"
    assert bad[4][1] == "0 of 2 at 100 steps"
    assert bad[5][1] == "behind on 1 of 1: poisson (1.50 of best Muon at 100 steps)"
    assert bad[6][1].startswith("behind on 2 of 2: poisson (1.50")
    assert bad[7][1] == "at worst -10.0 points, poisson"
    assert bad[8][1].startswith("digits of 1")


def test_losses_of_rivals_follow_from_the_ratios():
    rows = [held_out_row("poisson", 0.5, 0.7), held_out_row("mnist-mlp", 0.8, 0.9)]
    rows[0]["test_losses"] = [0.5, 0.4, 0.2]
    content = ORIGIN | {"command": "python x.py", "rows": rows}
    _, _, *lines = tables_of_held_out.held_out_losses(content)
    assert cells(lines[0])[1:4] == ["100", "0.100", "0.200"]
    assert cells(lines[0])[7:9] == ["0.200", "0.250"]
    assert cells(lines[1])[2:4] == ["0.100", "0.125"]
    assert set(cells(lines[1])[7:]) == {""}


def test_other_dampings_are_compared_with_the_constant():
    rows = [held_out_row("a", 0.5, 0.7), held_out_row("b", 0.5, 0.7)]
    for row, ratio in zip(rows, (0.25, 1.0), strict=True):
        for at in row["ratios"].values():
            at["gauss_newton damping=3"] = ratio
    content = ORIGIN | {"command": "python x.py", "seeds": 1, "rows": rows}
    _, _, row, *_ = tables_of_held_out.held_out_dampings(content)
    assert cells(row) == ["3", *["1.25 (1 of 2)"] * 3]


def test_the_ablation_is_shown_by_configuration():
    same = {"l_p_ratio": 0.96, "residual_ratio": 0.25}
    result = {"name": "mlhf", "l_p": [-0.5, -0.75], "residual_norm": [0.2, 0.125], "on_same_systems": same}
    alone = {"l_p_ratio": 0.9, "residual_ratio": 0.5}
    content = ORIGIN | SIZES | {"results": [result], "iterations": 2, "seeds": 1, "damping_alone": alone}
    head, _, row, last, _, note = ablation(content)
    assert len(cells(head)) == 5
    assert cells(row) == ["with LSTM_p, 4 CG steps (MLHF)", "-0.75", "0.125", "0.96", "0.25"]
    assert cells(last) == ["P from the damping alone, 4 CG steps", "", "", "0.9", "0.5"]
    assert "`blobs`, 2 meta-iterations, seeds: 1, batch 8" in note


def test_the_spread_over_seeds_is_told_where_there_are_several():
    two = {"seeds": (-0.1, 0.1)}
    measured = comparison(
        entry("mlhf", (1.5, 1.0), 0.6, 0.15, **two),
        entry("sgd lr=1 momentum=0.9", (2.0, 1.9), 0.5, 0.1, **two),
        entry("sgd lr=2 momentum=0.9", (2.1, 1.6), 0.5, 0.1, **two),
    )
    note = by_epoch(measured)[-1]
    assert "2 epochs of 32 images, batch 8, seeds: 2 for MLHF, 2 for the grid" in note
    assert "every seed: mlhf 0.900, 1.100; sgd lr=2 momentum=0.9 1.500, 1.700." in note
    single = Comparison(measured.frame.filter(pl.col("seed") == 0), measured.about)
    assert "every seed" not in by_epoch(single)[-1]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_made_of_the_shipped_results(name):
    lines = table(name, ROOT / "benchmarks" / "results")
    assert re.search(r"; \d{4}-\d\d-\d\d\.$|_mlhf`\.$", lines[-1])
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == (name != "ggn_in_loops")


def test_the_files_have_the_tables_as_they_are_made_now():
    texts = [file.read_text() for file in FILES]
    for text in texts:
        assert rewritten(text, ROOT / "benchmarks" / "results") == text
    assert all(f"<!-- table {name} -->" in "".join(texts) for name in TABLES)


def test_the_digits_are_those_of_the_first_release():
    """Typed from the README of version 0.1.0."""
    text = "\n".join(table("digits-mlp", ROOT / "benchmarks" / "results"))
    for cells_of_row in (
        "0.116 | 8.0e-3 | 4.6e-5 | 2.0e-6 | 1.8e-7 | 95.2% | 0.83 |",
        "0.603 | 0.126 | 4.7e-3 | 8.0e-4 | 4.0e-6 | 95.8% | 0.08 |",
        "sgd lr=0.01 momentum=0.99 | 2.256 | 1.885 | 0.234 | 0.067 | 1.8e-3 | 93.6% | 0.09 |",
        "rmsprop lr=0.01 decay=0.99 | 0.960 | 0.291 | 0.088 | 0.034 | 0.015 | 94.5% | 0.08 |",
    ):
        assert cells_of_row in text
