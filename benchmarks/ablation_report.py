"""Curves, figure and table of the ablation."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation_solvers import DAMPING_ALONE, TITLES, Configuration


def summarise(
    configuration: Configuration, metrics: Sequence[Sequence[Mapping[str, float]]], points: int = 100
) -> dict[str, Any]:
    """Returns curves averaged over seeds, of which each has its list of ``metrics``, and over stretches."""
    total = len(metrics[0])
    edges = np.unique(np.linspace(0, total, min(points, total) + 1).astype(int))

    def curve(name: str) -> list[float]:
        values = np.array(
            [[line[name] for line in of_seed] for of_seed in metrics], float
        )  # null becomes NaN
        return [float(np.nanmean(values[:, a:b])) for a, b in itertools.pairwise(edges)]

    return {
        "name": configuration.name,
        "has_lstm_p": configuration.has_lstm_p,
        "num_cg_steps": configuration.num_cg_steps,
        "iterations": [int(edge) for edge in edges[1:]],
        "l_p": curve("l_p"),
        "residual_norm": curve("residual_norm"),
        "inner_loss": curve("inner_loss"),
        "seconds_per_iteration": float(np.median([line["seconds"] for line in metrics[0]])),
    }


def save_figure(content: dict[str, Any], path: Path) -> None:
    """Draws l_p and the residual by meta-iterations, and the comparison on the same systems."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for result in content["results"]:
        label = TITLES[result["name"]]
        axes[0].plot(result["iterations"], result["l_p"], label=label)
        axes[1].plot(result["iterations"], result["residual_norm"], label=label)
        axes[2].barh(label, result["on_same_systems"]["l_p_ratio"])
    axes[2].barh(DAMPING_ALONE, content["damping_alone"]["l_p_ratio"])
    axes[0].set(xlabel="meta-iterations", ylabel="l_p (lower is better)")
    axes[1].set(xlabel="meta-iterations", ylabel="norm of the residual", yscale="log")
    axes[2].set(xlabel="same systems: l_p over that of 20 steps\nwithout LSTM_p (higher is better)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def print_table(content: dict[str, Any]) -> None:
    """Prints the ends of the curves and the comparison on the same systems."""
    print(f"\n{'':30s}{'l_p':>10s}{'residual':>10s}   same systems: {'l_p ratio':>10s}{'residual':>10s}")
    for result in content["results"]:
        same = result["on_same_systems"]
        print(
            f"{result['name']:30s}{result['l_p'][-1]:10.4f}{result['residual_norm'][-1]:10.4f}"
            f"{same['l_p_ratio']:27.4f}{same['residual_ratio']:10.4f}"
        )
    same = content["damping_alone"]
    print(f"{DAMPING_ALONE:77s}{same['l_p_ratio']:10.4f}{same['residual_ratio']:10.4f}")
