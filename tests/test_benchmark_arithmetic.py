"""Ratios, medians, ranks and aims of the benchmarks against plain Python, and their tables."""

import json
import math
import re
import statistics
import sys
from collections import defaultdict

import aims
import held_out
import learned_optimizers
import numpy as np
import polars as pl
import pytest
import ratios
import second_order_cifar10
import tables
import ten_times_horizon
import variants
from ablation_preconditioner import table as ablation
from experiment import by_epoch

from mlhf_optax.experiments import Comparison
from mlhf_optax.experiments.results import Curve, frame_of

ORIGIN = {
    "machine": {"backend": "cpu", "cpu": "Processor", "cores": 2},
    "versions": {"jax": "1", "python": "3"},
    "date": "2026-11-21T00:00",
    "command": "python x.py",
}
SIZES = {"task": "blobs", "batch_size": 8, "num_train": 32, "steps_per_epoch": 4}
SHIPPED = {
    path.stem: json.loads(path.read_text()) for path in (tables.HERE / "held_out" / "results").glob("*.json")
}


# Ratios of losses.


def curve(family, losses, seconds=None, test=None, steps=(10, 100, 1000)):
    name, count = f"{family} {seconds} {losses}", len(losses)
    rest = [test or [None] * count, [None] * count, seconds, None]
    return Curve(name, family, name, {}, 1, list(steps[:count]), losses, *rest)


def ratio_of(curves, kind, contender, step):
    found = ratios.ratios(curves).filter(pl.col("contender") == contender, pl.col("step") == step)
    return found[kind].item()


def test_in_equal_time_a_rival_takes_as_many_steps_as_fit_in():
    curves = [
        curve("mlhf_general", [1.0, 0.1, 0.01], 0.4),
        curve("gauss_newton", [2.0, 1.0, 0.5], 0.8),
        curve("untrained", [2.5, 1.9, 0.5], 0.4),
        curve("adam", [4.0, 2.0, 1.0], 0.1),
        curve("adam", [0.5, math.inf, math.inf], 0.1),
        curve("adam", [2.0, 0.5, 0.2], 0.1),
        curve("muon", [1.0, 0.2, 0.1], 0.4),
    ]
    found = lambda contender, step: ratio_of(curves, "by_time", contender, step)
    # 40 s are 50 steps of the constant and 400 of Adam.
    assert found("constant", 100) == pytest.approx(0.1 / 2 ** (1 - np.log10(5)))
    assert found("untrained", 100) == pytest.approx(0.1 / 1.9)
    assert found("default Adam", 100) == pytest.approx(0.1 / 2 ** (1 - np.log10(4)))
    assert found(ratios.ADAM_OR_SGD, 100) == pytest.approx(0.1 / (0.5 * 0.4 ** np.log10(4)))
    assert found("best Muon", 100) == pytest.approx(0.5)
    assert ratio_of(curves, "ratios", ratios.ADAM_OR_SGD, 10) == pytest.approx(2.0)
    assert math.isnan(found("default Adam", 1000))
    assert found("constant", 1000) == pytest.approx(0.01 / 0.5 ** np.log10(5))
    # Of fewer steps than were recorded the first recorded loss is taken, which is the rival's gain.
    assert found("constant", 10) == pytest.approx(0.5)
    # A part of a grid that did not train for as long makes the whole unknown.
    slow = [*curves, curve("sgd", [1.0, 1.0, 1.0], 0.1)]
    assert math.isnan(ratio_of(slow, "by_time", ratios.ADAM_OR_SGD, 1000))


def test_the_best_of_each_grid_counts_by_test_loss_too_and_diverged_trainings_never_win():
    own, constant = curve("mlhf", [1.0], test=[2.0]), curve("gauss_newton", [0.5], test=[4.0])
    rest = [("u", 2.0, 1.0), ("adam", 2.0, 2.5), ("adam", 3.0, 1.0), ("muon", 0.5, None), ("sgd", 4.0, 8.0)]
    curves = [own, constant, *(curve(family, [a], test=[b]) for family, a, b in rest)]
    curves.append(curve("gauss_newton", [1e-9], test=[0.5]))
    by_test = lambda contender: ratio_of(curves, "by_test_loss", contender, 10)
    assert by_test("constant") == 0.5
    assert by_test(ratios.ADAM_OR_SGD) == 2.0  # of the second Adam, whose training loss is higher
    assert by_test("best Muon") == 0.0
    assert by_test(curves[-1].label) == 4.0
    assert ratio_of(curves, "ratios", ratios.ADAM_OR_SGD, 10) == pytest.approx(1 / 3)
    assert ratio_of(curves, "ratios", curves[-1].label, 10) == pytest.approx(1 / ratios.SOLVED)
    untested = [one._replace(test_loss=[None]) for one in curves]
    assert ratios.nested(ratios.ratios(untested))["by_test_loss"] == {10: {}}
    diverged = [own._replace(train_loss=[math.inf]), *curves[1:]]
    assert set(ratios.nested(ratios.ratios(diverged))["ratios"][10].values()) == {None}


@pytest.mark.parametrize("name", ["held_out", "held_out_batches", "held_out_dampings", "held_out_cosine"])
def test_medians_counts_and_ranks_are_those_of_plain_python(name):
    rows = SHIPPED[name]["rows"]
    found = defaultdict(list)
    for row in rows:
        for kind in ratios.KINDS:
            for step, at_step in row.get(kind, {}).items():
                for contender, ratio in at_step.items():
                    if kind != "by_time" or ratio is not None:
                        found[kind, contender, int(step)].append(math.inf if ratio is None else ratio)
    frame = ratios.long(rows)
    summary = ratios.summary(frame)
    assert len(summary) == len(found)
    for kind, contender, step, median, ahead, tasks in summary.iter_rows():
        of_tasks = found[kind, contender, step]
        assert median == pytest.approx(statistics.median(of_tasks), rel=1e-14)
        assert (ahead, tasks) == (sum(ratio < 1 for ratio in of_tasks), len(of_tasks))
    for step, rank in ratios.mean_ranks(frame).items():
        places = [
            1 + sum((at[rival] or math.inf) > 1 for rival in ratios.RIVALS if rival in at)
            for at in (row["ratios"].get(str(step)) for row in rows)
            if at
        ]
        assert rank == pytest.approx(statistics.mean(places))


def test_equal_losses_share_a_place():
    at = lambda *values: {"10": dict(zip(ratios.RIVALS, values, strict=True))}
    rows = [{"task": "a", "ratios": at(1, 1, 1, 1, 1)}, {"task": "b", "ratios": at(2, 0.5, 3, 1, None)}]
    assert ratios.mean_ranks(ratios.long(rows)) == {10: (1 + 4) / 2}


# What is said of them.


def held_out_row(task, ratio, by_time, accuracy=0.9):
    at = lambda x: {str(step): dict.fromkeys(ratios.RIVALS, x) for step in (10, 30, 100)}
    row = {"task": task, "steps": [10, 30, 100], "losses": [0.4, 0.2, 0.1], "test_losses": [0.5, 0.4, None]}
    row |= {"ratios": at(ratio), "by_time": at(by_time), "accuracy": accuracy, "best_adam_accuracy": 0.9}
    return row | {"by_test_loss": at(0.8) if task == "poisson" else {}}


def test_what_was_aimed_at_is_judged_by_the_numbers():
    long = {"rows": [{"task": "digits", "is_learned": True, "blows_up": False, "ends_at_chance": False}]}
    judged = lambda *rows: aims.table(ORIGIN | {"rows": rows}, {"rows": []}, long).rows[1:]
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
    _, first, second = held_out.last_losses(ORIGIN | {"rows": rows}).rows
    assert (first[1:4], first[7:9]) == (["100", "0.100", "0.200"], ["0.200", "0.250"])
    assert second[2:4] == ["0.100", "0.125"]
    assert set(second[7:]) == {""}


def test_other_dampings_are_compared_with_the_constant():
    rows = [held_out_row("a", 0.5, 0.7), held_out_row("b", 0.5, 0.7)]
    for row, ratio in zip(rows, (0.25, 1.0), strict=True):
        for at in row["ratios"].values():
            at["gauss_newton damping=3"] = ratio
    assert variants.dampings(ORIGIN | {"seeds": 1, "rows": rows}).rows[1] == ["3", *["1.25 (1 of 2)"] * 3]


def test_a_constant_rate_is_compared_with_a_falling_one_from_the_same_seeds():
    about = {"task": "a", "steps": [8], "ratios": {"8": dict.fromkeys(ratios.RIVALS, 0.5)}}
    about |= {"accuracy": None, "best_adam_accuracy": None}
    falling = ORIGIN | {"seeds": 1, "rows": [about | {"losses": [0.2]}]}
    constant = {"rows": [about | {"losses": [0.3], "last_losses": [0.1, 0.4, 0.4]}]}
    _, first, second, *_ = variants.cosine(constant, falling).rows
    assert first[:3] + first[7:8] == ["a, falling rate", "8", "**0.50**", "0.200"]
    assert second[:3] + second[7:8] == ["a, constant rate", "8", "**0.25**", "0.100"]


def test_tasks_with_other_numbers_of_seeds_are_named():
    rows = [{"task": "a", "seeds": 3}, {"task": "b", "seeds": 1}, {"task": "c"}]
    assert held_out.seeds_text({"seeds": 3, "rows": rows}) == "Seeds: 3; 1 for b."
    assert held_out.seeds_text({"seeds": 3, "rows": rows[:1]}) == "Seeds: 3."


@pytest.mark.parametrize(
    ("losses", "rise", "blows_up", "at_chance"),
    [
        ([1.0, 0.5, 0.2, 0.1], 1.0, False, False),
        ([1.0, 0.1, 0.29, 0.05], 2.9, False, False),
        ([1.0, 0.1, 0.4, 0.05], 4.0, True, False),
        ([1.0, 1e-8, 1e-6, 1e-9], 1.0, False, False),  # both below the floor, 2e-3
        ([1.0, 1e-8, 0.02, 1e-9], 10.0, True, False),
        ([2.1, 2.0, 1.9, 1.9], 1.0, False, True),
        ([1.0, 0.5, np.inf, np.inf], None, True, True),
        ([1.0, 0.5, np.nan, 0.5], None, True, False),
    ],
)
def test_trainings_that_blow_up_or_end_at_chance_are_told(losses, rise, blows_up, at_chance):
    found = ten_times_horizon.about(losses, first=2.0)
    assert (found["blows_up"], found["ends_at_chance"]) == (blows_up, at_chance)
    assert found["worst_rise"] == (None if rise is None else pytest.approx(rise))


def test_uneven_times_of_one_optimizer_are_told():
    seconds = {"mlhf_general": 9.0, "adam defaults": 1.0, "adam lr=1": 1.4, "adam lr=2": None}
    assert held_out.spread_of_times(seconds) == 1.4
    assert held_out.spread_of_times({"mlhf_general": 9.0}) == 1.0


def test_a_learned_optimizer_that_diverged_is_told_beside_what_is_published():
    row = {"optimizer": "l2l", "activation": "relu", "steps": 100}
    content = ORIGIN | {"starts": 2, "published": {"l2l": {"relu": 1.42}}}
    short = learned_optimizers.table(
        content | {"rows": [row | {"loss": None}, row | {"loss": 1, "steps": 200}]}
    )
    assert short.rows[1:] == [["L2L", "diverged (1.42)"], ["L2L", "1.000"]]
    long = [content | {"rows": [row | {"steps": n, "loss": x}]} for n, x in ((2000, 0.5), (10_000, None))]
    assert learned_optimizers.longer(*long).rows[1] == ["L2L", "0.500", "diverged"]


# Comparisons for epochs.


def entry(name, losses, accuracy, seconds, steps=(4, 8), seeds=(0.0,)):
    shifted = lambda shift: [None if math.isinf(loss) else loss + shift for loss in losses]
    curves = [
        {"seed": seed, "train_loss": shifted(shift), "test_accuracy": [0.1, accuracy]}
        for seed, shift in enumerate(seeds)
    ]
    about = {"optimizer": name, "family": name.split()[0], "label": name, "setting": {}}
    return {**about, "seconds_per_step": seconds, "steps": list(steps), "curves": curves}


def comparison(*entries):
    return Comparison(frame_of(entries, 4), ORIGIN | SIZES)


def test_second_order_optimizers_are_shown_with_their_best_setting_and_how_many_diverged():
    measured = comparison(
        entry("mlhf", (1.5, 1.0), 0.6, 0.2),
        entry("mlhf curvature 0.25", (1.5, 1.2), 0.5, 0.1),
        entry("hf-fixed lr=1 damping=1", (1.2, math.inf), 0.0, 0.8),
        entry("hf-fixed lr=0.1 damping=1", (1.6, 1.25), 0.5, 0.8),
        entry("kfac lr=1 damping=1 decay=0.9", (1.1, 0.8), 0.7, 0.5),
    )
    # Of the longer run the losses count; the time per step is that of the comparison.
    longer = comparison(entry("mlhf", (1.5, 0.5), 0.7, 9.0, steps=(8, 16)))
    assert second_order_cifar10.table(measured, longer).rows[1:] == [
        ["mlhf", "8", "1.500 (1.88)", "10.0%", "2 (**0.40**)"],
        ["mlhf", "16", "0.500 (**0.62**)", "70.0%", "3 (**0.80**)"],
        ["mlhf curvature 0.25", "4", "1.500 (1.88)", "10.0%", "0 (**0.10**)"],
        ["mlhf curvature 0.25", "8", "1.200 (1.50)", "50.0%", "1 (**0.20**)"],
        ["HF(Fixed), best of 2, 1 diverged: lr=0.1 damping=1", "8", "1.250", "50.0%", "6"],
        ["K-FAC, best of 1, 0 diverged: lr=1 damping=1 decay=0.9", "8", "0.800", "70.0%", "4"],
    ]


def test_the_spread_over_seeds_is_told_where_there_are_several():
    two = {"seeds": (-0.1, 0.1)}
    measured = comparison(
        entry("mlhf", (1.5, 1.0), 0.6, 0.15, **two),
        entry("sgd lr=1 momentum=0.9", (2.0, 1.9), 0.5, 0.1, **two),
        entry("sgd lr=2 momentum=0.9", (2.1, 1.6), 0.5, 0.1, **two),
    )
    note = by_epoch(measured).note
    assert "2 epochs of 32 images, batch 8, seeds: 2 for MLHF, 2 for the grid" in note
    assert note.endswith("every seed: mlhf 0.900, 1.100; sgd lr=2 momentum=0.9 1.500, 1.700.")
    single = Comparison(measured.frame.filter(pl.col("seed") == 0), measured.about)
    assert "every seed" not in by_epoch(single).note


def test_the_ablation_is_shown_by_configuration():
    same = {"l_p_ratio": 0.96, "residual_ratio": 0.25}
    result = {"name": "mlhf", "l_p": [-0.5, -0.75], "residual_norm": [0.2, 0.125], "on_same_systems": same}
    alone = {"l_p_ratio": 0.9, "residual_ratio": 0.5}
    content = ORIGIN | SIZES | {"results": [result], "iterations": 2, "seeds": 1, "damping_alone": alone}
    assert ablation(content).rows[1:] == [
        ["with LSTM_p, 4 CG steps (MLHF)", "-0.75", "0.125", "0.96", "0.25"],
        ["P from the damping alone, 4 CG steps", "", "", "0.9", "0.5"],
    ]


# The tables in the READMEs.


def test_every_table_is_whole_and_ends_with_its_origin_and_none_is_left_out():
    made, texts = tables.tables(), "".join(file.read_text() for file in tables.FILES)
    for name, make in made.items():
        table = make()
        assert len({len(row) for row in table.rows}) == 1
        assert len(table.note) <= 260  # two lines
        assert table.markdown()[-1].endswith(f"{table.about['date'][:10]}.")
        assert f"<!-- table {name} -->" in texts


def test_what_the_page_of_the_benchmarks_links_to_is_there():
    text = (tables.HERE / "README.md").read_text()
    targets = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", text)
    assert len(targets) > 10
    assert [target for target in targets if not (tables.HERE / target).exists()] == []
    figures = {path.relative_to(tables.HERE).as_posix() for path in tables.HERE.glob("*/figures/*")}
    assert figures - {*targets} == {"held_out/figures/held-out.png"}  # in the README of the project


def test_the_digits_are_those_of_the_first_release():
    """Typed from the README of version 0.1.0."""
    text = "\n".join(tables.tables()["digits-mlp"]().markdown())
    for cells_of_row in (
        "0.116 | 8.0e-3 | 4.6e-5 | 2.0e-6 | 1.8e-7 | 95.2% | 0.83 |",
        "0.603 | 0.126 | 4.7e-3 | 8.0e-4 | 4.0e-6 | 95.8% | 0.08 |",
        "sgd lr=0.01 momentum=0.99 | 2.256 | 1.885 | 0.234 | 0.067 | 1.8e-3 | 93.6% | 0.09 |",
        "rmsprop lr=0.01 decay=0.99 | 0.960 | 0.291 | 0.088 | 0.034 | 0.015 | 94.5% | 0.08 |",
    ):
        assert cells_of_row in text


def test_a_stale_table_is_found_and_made_anew(monkeypatch, tmp_path):
    made = {"t": lambda: held_out.Table([["a", "b"], ["x", "1"]], "A note.", ORIGIN)}
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- table t -->\nstale\n<!-- end t -->\nafter\n")
    monkeypatch.setattr(tables, "FILES", (file,))
    monkeypatch.setattr(tables, "tables", lambda: made)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="are not those of the results"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    assert (
        "before\n<!-- table t -->\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n\nA note.\n\n`" in file.read_text()
    )
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()


def test_commands_are_shown_with_the_places_of_today():
    line = "`python benchmarks/step_time.py --json benchmarks/results/step_time.json`; benchmarks/gone.py"
    assert tables.as_today(line) == (
        "`python benchmarks/speed/step_time.py --json benchmarks/speed/results/step_time.json`; "
        "benchmarks/gone.py"
    )
