"""Section 4.3 of the paper: what LSTM_p, the learned preconditioner, is worth.

Meta-trains MLHF on CUDA-convnet and the whole training set of CIFAR-10 in four configurations: without
LSTM_p (P = 1) with 20 and with 4 CG steps, with it with 2 and with 4. Records l_p, which is lower the nearer
the direction is to the natural gradient, and the norm of the last residual of each unroll (figure 4).

In those curves every configuration solves systems of its own, for each learns another damping. So that
solvers can be compared on the same systems, one network is then trained with the last configuration.
At each of its steps the four solvers solve its system, from the same start, and so does a fifth one, whose
preconditioner is made of the learned damping alone.

    python benchmarks/paper/ablation_preconditioner.py --data-dir DIR --output runs/ablation_preconditioner

What is done is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ablation_solvers import (
    CONFIGURATIONS,
    DAMPING_ALONE,
    TITLES,
    Configuration,
    compare_solvers,
    draw_batches,
)
from experiment import ConvnetOptions

from mlhf_optax import MetaParams, init_meta_params, layer_types, meta_training
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.scripts import Table, command_line, parse_options, save_drawing, saved
from mlhf_optax.learned.mlhf import SETTINGS
from mlhf_optax.tasks import Task, num_examples

UNROLL = 10


@dataclasses.dataclass(frozen=True)
class Options(ConvnetOptions):
    """Options of this script. Those of the comparisons that it does not name here have no effect."""

    passes: float = 250.0
    """Passes over the data in meta-training; the paper's is 250."""
    seeds: int = 1
    """Meta-trainings of every configuration."""
    batch_size: int = 64
    """Examples per mini-batch."""
    num_tasks: int = 1
    """Networks in training side by side."""
    settings: Literal["default", "relative"] = "relative"
    """What the LSTMs see and mean."""
    # Ten times the rate that LSTM_s bears in long trainings: l_p is not greedy, LSTM_p learns in an epoch.
    meta_learning_rate: float = 3e-2
    """Learning rate of meta-training."""
    solver_steps: int = 200
    """Systems on which the solvers are compared."""
    output: Path = Path("runs/ablation_preconditioner")
    """Folder for all that is written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        # 10 unrolls of 10 steps of 32 examples are a sixteenth of an epoch of 50,000.
        options = dataclasses.replace(options, passes=1 / 16, seeds=1, batch_size=32, solver_steps=10)
    task = make_task(options)
    results = []
    for configuration in CONFIGURATIONS:
        runs = [meta_train(task, configuration, seed, options) for seed in range(options.seeds)]
        results.append(summarise(configuration, [metrics for _, metrics in runs]))
        print(f"{configuration.name}: l_p {results[-1]['l_p'][-1]:.4g}", flush=True)
        meta_params = runs[0][0]
    on_same_systems = compare_solvers(task, meta_params, options.solver_steps, options.batch_size)
    for result in results:
        result["on_same_systems"] = on_same_systems[result["name"]]
    content = with_origin(
        command_line(__file__, arguments),
        task=task.name,
        settings=options.settings,
        iterations=iterations(task, options),
        num_epochs=options.passes,
        seeds=options.seeds,
        batch_size=options.batch_size,
        results=results,
        damping_alone=on_same_systems[DAMPING_ALONE],
    )
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)
    print(*table(content).markdown(), sep="\n")


def make_task(options: Options) -> Task:
    """Returns the task; its part for meta-training is the whole training set, as in the paper."""
    narrow = {"channels": (8, 16), "hidden": (16,)} if options.quick else {}
    task = dataclasses.replace(options, quick=False, **narrow).make_task((0, 0, 0))

    def load():
        parts = task.data.meta_train, task.data.train
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        return dataclasses.replace(task.data, meta_train=whole, train=whole)

    return dataclasses.replace(task, load_data=load)


def iterations(task: Task, options: Options) -> int:
    """Returns the number of meta-iterations that see the data ``options.passes`` times."""
    examples = UNROLL * options.batch_size * options.num_tasks
    return max(1, round(options.passes * num_examples(task.data.meta_train) / examples))


def meta_train(
    task: Task, configuration: Configuration, seed: int, options: Options
) -> tuple[MetaParams, list[dict[str, float]]]:
    """Meta-trains one configuration, or goes on with it; returns what was learned, and the metrics."""
    settings, total = configuration.settings(SETTINGS[options.settings]), iterations(task, options)
    learned = meta_training.mlhf_optimizer(
        num_cg_steps=configuration.num_cg_steps,
        unroll=configuration.num_cg_steps <= 4,  # 20 steps of CG unrolled take long to compile
        max_update_ratio=0.25,
        step_loss="relative",
    )
    learned = with_residual(learned)
    types = jax.tree.leaves(layer_types(jax.eval_shape(task.init_fn, jax.random.key(0))))
    meta_params = init_meta_params(jax.random.key(seed), settings, layer_types=sorted(set(types)))
    config = meta_training.MetaTrainingConfig(
        num_tasks=options.num_tasks,
        unroll_length=UNROLL,
        meta_learning_rate=options.meta_learning_rate,
        decay_iterations=total,
        keep_probability=0.5,  # one network alone would grow old, and the LSTMs forget how to start
    )
    optimizer = meta_training.meta_optimizer(config)
    if not configuration.has_lstm_p:
        # Its output starts at zero, where P is the same for all coordinates, and stays there.
        optimizer = optax.chain(optimizer, optax.freeze(only_lstm_p(meta_params)))
    examples = jax.tree.map(jnp.asarray, task.data.meta_train)
    shape = (options.num_tasks, UNROLL + 1, options.batch_size)
    folder = options.output / f"{CONFIGURATIONS.index(configuration) + 1}-seed-{seed}"
    # The ablation is about the curves of meta-training; nothing is chosen by validation.
    nothing = meta_training.Validation(jnp.zeros(()), jnp.zeros(0), jnp.zeros(()))
    done = meta_training.meta_train(
        task,
        learned,
        meta_params,
        functools.partial(draw_batches, task, examples, shape),
        lambda meta_params: nothing,
        folder,
        meta_training.Schedule(total, checkpoint_every=min(50, total), validate_every=total),
        config,
        seed=seed,
        resume=options.resume,
        about={"configuration": configuration.name, "settings": options.settings, "task": task.name},
        algorithm=meta_training.make_meta_step(task, learned, config, optimizer),
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return done.state.meta_params, [json.loads(line) for line in lines]


def only_lstm_p(meta_params: MetaParams) -> Any:
    """Returns a mask of the weights of LSTM_p."""
    fill = lambda tree, value: jax.tree.map(lambda _: value, tree)
    damping, preconditioner = fill(meta_params.damping, False), fill(meta_params.preconditioner, True)
    return dataclasses.replace(meta_params, damping=damping, preconditioner=preconditioner)


def with_residual(learned: meta_training.LearnedOptimizer) -> meta_training.LearnedOptimizer:
    """Adds the norm of the residual after the last step of the unroll to what is recorded."""

    def meta_gradient(*arguments):
        result = learned.meta_gradient(*arguments)
        norm = optax.tree.norm(result.opt_state[0].residual)
        return result._replace(meta_losses={**result.meta_losses, "residual_norm": norm})

    return learned._replace(meta_gradient=meta_gradient)


def summarise(
    configuration: Configuration, metrics: Sequence[Sequence[Mapping[str, float]]], points: int = 100
) -> dict[str, Any]:
    """Returns curves averaged over seeds, of which each has its list of ``metrics``, and over stretches."""
    total = len(metrics[0])
    edges = np.unique(np.linspace(0, total, min(points, total) + 1).astype(int))

    def curve(name: str) -> list[float]:
        lines = [[line[name] for line in of_seed] for of_seed in metrics]
        values = np.array(lines, float)  # null becomes NaN
        return [float(np.nanmean(values[:, a:b])) for a, b in itertools.pairwise(edges)]

    return {
        "name": configuration.name,
        "has_lstm_p": configuration.has_lstm_p,
        "num_cg_steps": configuration.num_cg_steps,
        "iterations": [int(edge) for edge in edges[1:]],
        **{name: curve(name) for name in ("l_p", "residual_norm", "inner_loss")},
        "seconds_per_iteration": float(np.median([line["seconds"] for line in metrics[0]])),
    }


def table(content: dict[str, Any]) -> Table:
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
        f"{content['batch_size']}. On the same systems l_p is given over that of 20 steps without LSTM_p "
        "(above 1 is better), and the residual over the gradient."
    )
    return Table(rows, note, content)


TABLES = {"ablation_preconditioner": lambda folder: table(*saved(folder, "ablation_preconditioner"))}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws l_p and the residual by meta-iterations, and the comparison on the same systems."""
    figure.set_size_inches(13, 4.5)
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


if __name__ == "__main__":
    main()
