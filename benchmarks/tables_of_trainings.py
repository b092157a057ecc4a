"""Tables of trainings against the rivals of the paper, by step, epoch and time."""

import math
from typing import Any

from ablation_solvers import DAMPING_ALONE, TITLES
from table_cells import bold, with_note

from mlhf_optax.experiments import Comparison, comparison_markdown
from mlhf_optax.experiments.origin import origin_line
from mlhf_optax.experiments.results import best_at
from mlhf_optax.experiments.tables import format_loss, markdown_table

SECOND_ORDER = {"hf-fixed": "HF(Fixed)", "hf-lm": "HF(LM)", "kfac": "K-FAC"}


def by_step(found: Comparison) -> list[str]:
    """Returns losses by step, as of ``mlhf-optax train``."""
    seeds = found.curves()[0].seeds
    note = (
        f"`{found.about['task']}`, mean over {seeds} seeds, loss in nats on the whole training part. For "
        f"each first-order family we show the setting with the lowest final loss. {origin_line(found.about)}"
    )
    return [*comparison_markdown(found), "", note]


def by_epoch(found: Comparison) -> list[str]:
    """Returns losses by epoch, and against the best of the grid at equal time."""
    record, curves = found.about, found.curves()
    learned, others = ([c for c in curves if c.is_learned == wanted] for wanted in (True, False))
    note = (
        f"`{record['task']}`, {curves[0].steps[-1] // record['steps_per_epoch']} epochs of "
        f"{record['num_train']} images, batch {record['batch_size']}, seeds: {learned[0].seeds} for MLHF, "
        f"{others[0].seeds} for the grid."
    )
    if learned[0].seeds > 1:
        shown = [*learned, best_at(others, others[0].steps[-1])]
        losses = (f"{c.label} {', '.join(map(format_loss, found.last_losses(c.optimizer)))}" for c in shown)
        note += f" The last loss of every seed: {'; '.join(losses)}."
    return [*comparison_markdown(found, "epoch"), "", f"{note} {origin_line(record)}"]


def second_order(found: Comparison, longer: Comparison | None = None) -> list[str]:
    """Returns rows for each MLHF and for the best setting of each family at the end of the run.

    In brackets are the loss and the time of MLHF over those of the best setting of all. ``longer`` are
    results of a longer run with ``--only mlhf``, as its steps take less time.
    """
    curves, last = found.curves(), found.curves()[0].steps[-1]
    others = [curve for curve in curves if not curve.is_learned]
    first = best_at(others, last)
    rows = [["", "steps", "training loss", "test accuracy", "seconds in all"]]
    followed = {curve.optimizer: curve for curve in longer.curves()} if longer else {}
    for curve in (one for one in curves if one.is_learned):
        much = followed.get(curve.optimizer, curve)
        for step, loss, accuracy in zip(much.steps, much.train_loss, much.test_accuracy, strict=True):
            # The time per step is that of the comparison, where all were measured in turns.
            seconds, its = step * curve.seconds_per_step, last * first.seconds_per_step
            shown = f"{format_loss(loss)} ({bold(loss, first.loss_at(last))})", f"{accuracy:.1%}"
            rows.append([curve.label, f"{step}", *shown, f"{seconds:.0f} ({bold(seconds, its)})"])
    for family, title in SECOND_ORDER.items():
        members = [curve for curve in others if curve.family == family]
        if members:
            best, lost = best_at(members, last), sum(math.isinf(c.loss_at(last)) for c in members)
            name = (
                f"{title}, best of {len(members)}, {lost} diverged: {best.label.removeprefix(f'{family} ')}"
            )
            seconds = f"{last * best.seconds_per_step:.0f}"
            rows.append([name, f"{last}", format_loss(best.loss_at(last)), f"{best.accuracy:.1%}", seconds])
    record = found.about
    note = (
        f"`{record['task']}`, {record['num_train']} images, batch {record['batch_size']}, seeds: "
        f"{first.seeds}; in brackets over the best of all settings. {origin_line(record)}"
    )
    if longer:
        note += f" The losses of MLHF: `{longer.about['command']}`."
    return [*markdown_table(rows), "", note]


def transfer_digits(content: dict[str, Any]) -> list[str]:
    """Returns one row per variant: the loss of MLHF over that of the best of the grid."""
    first = content["rows"][0]
    head = ["loss of MLHF / best of the grid, after step", *map(str, first["steps"])]
    rows = [[*head, "test accuracy, points"]]
    for row in content["rows"]:
        pairs = zip(row["mlhf"], row["best_of_grid"], strict=True)
        points = f"{100 * (row['mlhf_test_accuracy'] - row['best_test_accuracy']):+.1f}"
        ratios = (bold(math.inf if own is None else own, best) for own, best in pairs)
        rows.append([row["variant"], *ratios, points])
    note = f"The same meta-parameters on networks and batches that they never saw, {first['seeds']} seeds."
    return with_note(rows, note, content)


def ablation(content: dict[str, Any]) -> list[str]:
    """Returns one row per configuration: l_p and residual at the end, and on the same systems."""
    rows = [["meta-training of", "l_p at the end", "residual", "same systems: l_p ratio", "residual"]]
    for result in content["results"]:
        same, ends = result["on_same_systems"], (result["l_p"][-1], result["residual_norm"][-1])
        values = (*ends, same["l_p_ratio"], same["residual_ratio"])
        rows.append([TITLES[result["name"]], *(f"{x:.3g}" for x in values)])
    same = content["damping_alone"]
    rows.append([DAMPING_ALONE, "", "", f"{same['l_p_ratio']:.3g}", f"{same['residual_ratio']:.3g}"])
    note = (
        f"`{content['task']}`, {content['iterations']} meta-iterations, seeds: {content['seeds']}, batch "
        f"{content['batch_size']}. A lower l_p is better. On the same systems l_p is given over that of 20 "
        "steps without LSTM_p (above 1 is better), and the residual over the gradient."
    )
    return with_note(rows, note, content)


def long_run(content: dict[str, Any]) -> list[str]:
    """Returns loss, accuracy, damping and preconditioner at some steps of the long run."""
    records = content["records"]
    count = len(records["step"])
    chosen = sorted({round(count ** (i / 5)) - 1 for i in range(6)})
    rows = [["after step", *(f"{records['step'][i]:.0f}" for i in chosen)]]
    formats = {"train_loss": ".3f", "test_accuracy": ".1%"}
    for name, form in (formats | dict.fromkeys(("damping_mean", "preconditioner_mean"), ".2g")).items():
        rows.append([name.replace("_", " "), *(format(records[name][i], form) for i in chosen)])
    skipped = f"{records['skipped_steps'][-1]:.0f} of {content['num_steps']} steps skipped"
    verdict = "no loss above the first record" if content["is_stable"] else "NOT stable"
    share = content["curvature_share"] or 1
    momentum = f", momentum {content['momentum']:g}" if content.get("momentum") else ""
    note = (
        f"`{content['task']}`, batch {content['batch_size']}, curvature on {share:g} of it, learning rate "
        f"{content['learning_rate']:g}{momentum}: {skipped}, {verdict}."
    )
    return with_note(rows, note, content)
