"""Section 4.3 of the paper: what LSTM_p, the learned preconditioner, is worth.

Meta-trains MLHF on CUDA-convnet and the whole training set of CIFAR-10 in four configurations: without
LSTM_p (P = 1) with 20 and with 4 CG steps, with it with 2 and with 4. Shown is how l_p, which is lower
the nearer the direction is to the natural gradient, and the norm of the last residual of each unroll
develop (figure 4).

In those curves every configuration solves systems of its own, for each learns another damping. So that
solvers can be compared on the same systems, one network is then trained with the last configuration,
and at each of its steps the four solvers solve its system, from the same start, and so does a fifth
one, whose preconditioner is made of the learned damping alone.

    python benchmarks/ablation_preconditioner.py --data-dir DIR --output runs/ablation_preconditioner

What is done is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ablation_report import print_table, save_figure, summarise
from ablation_solvers import CONFIGURATIONS, DAMPING_ALONE, Configuration, compare_solvers, configured

from mlhf_optax import layer_types, meta_training
from mlhf_optax.comparison.experiment_options import (
    add_network_options,
    join_examples,
    narrow,
    network_options,
)
from mlhf_optax.comparison.meta_train_command import draw_batches
from mlhf_optax.comparison.meta_train_start import SETTINGS, learned_options
from mlhf_optax.comparison.reporting import command_line, report, write_json
from mlhf_optax.meta_params import MetaParams, init_meta_params
from mlhf_optax.tasks import Task, cifar10_convnet, num_examples

UNROLL = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    options = parse(arguments)
    task = make_task(options)
    results = []
    for configuration in CONFIGURATIONS:
        runs = [meta_train(task, configuration, seed, options) for seed in range(options.seeds)]
        results.append(summarise(configuration, [run.metrics for run in runs]))
        print(f"{configuration.name}: l_p {results[-1]['l_p'][-1]:.4g}", flush=True)
        meta_params = runs[0].meta_params
    on_same_systems = compare_solvers(task, meta_params, options.solver_steps, options.batch_size)
    for result in results:
        result["on_same_systems"] = on_same_systems[result["name"]]
    content = report(
        command_line("ablation_preconditioner.py"),
        task=task.name,
        settings=options.settings,
        iterations=iterations(task, options),
        num_epochs=options.epochs,
        seeds=options.seeds,
        batch_size=options.batch_size,
        results=results,
        damping_alone=on_same_systems[DAMPING_ALONE],
    )
    write_json(options.output / "results.json", content)
    save_figure(content, options.output / "figure.png")
    print_table(content)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--epochs", type=float, default=250, help="passes over the data in meta-training; the paper's is 250")
    add("--seeds", type=int, default=1, help="meta-trainings of every configuration")
    add("--batch-size", type=int, default=64)
    add("--num-tasks", type=int, default=1, help="networks in training side by side")
    add("--settings", choices=SETTINGS, default="relative", help="what the LSTMs see and mean")
    # Ten times the rate that LSTM_s bears in long trainings: l_p is not greedy, LSTM_p learns in an epoch.
    add("--meta-learning-rate", type=float, default=3e-2)
    add("--solver-steps", type=int, default=200, help="systems on which the solvers are compared")
    add("--data-dir", type=Path, help="where the data lie; by default $TFDS_DATA_DIR")
    add("--cache-dir", type=Path, help="where decoded data are kept")
    add("--output", type=Path, default=Path("runs/ablation_preconditioner"))
    add("--resume", action="store_true", help="go on from what lies in the folder")
    add("--quick", action="store_true", help="a narrow network and 10 meta-iterations")
    add_network_options(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        # 10 unrolls of 10 steps of 32 examples are a sixteenth of an epoch of 50,000.
        options.epochs, options.seeds, options.batch_size, options.solver_steps = 1 / 16, 1, 32, 10
        narrow(options)
    return options


def make_task(options: argparse.Namespace) -> Task:
    """Returns the task; its part for meta-training is the whole training set, as in the paper."""
    network = network_options(options)
    task = cifar10_convnet(data_dir=options.data_dir, cache_dir=options.cache_dir, **network)

    def load():
        whole = join_examples(task.data.meta_train, task.data.train)
        return dataclasses.replace(task.data, meta_train=whole, train=whole)

    return dataclasses.replace(task, load_data=load)


def iterations(task: Task, options: argparse.Namespace) -> int:
    """Returns the number of meta-iterations that see the data ``options.epochs`` times."""
    examples = UNROLL * options.batch_size * options.num_tasks
    return max(1, round(options.epochs * num_examples(task.data.meta_train) / examples))


class Run(NamedTuple):
    """What one meta-training left."""

    meta_params: MetaParams
    metrics: list[dict[str, float]]


def meta_train(task: Task, configuration: Configuration, seed: int, options: argparse.Namespace) -> Run:
    """Meta-trains one configuration, or goes on with it."""
    settings = configured(SETTINGS[options.settings], configuration)
    learned = with_residual(
        meta_training.mlhf_optimizer(
            num_cg_steps=configuration.num_cg_steps,
            # 20 steps of CG unrolled take long to compile.
            unroll=configuration.num_cg_steps <= 4,
            **learned_options(options.settings),
        )
    )
    types = jax.tree.leaves(layer_types(jax.eval_shape(task.init_fn, jax.random.key(0))))
    meta_params = init_meta_params(jax.random.key(seed), settings, layer_types=sorted(set(types)))
    config = meta_training.MetaTrainingConfig(
        num_tasks=options.num_tasks,
        unroll_length=UNROLL,
        meta_learning_rate=options.meta_learning_rate,
        decay_iterations=iterations(task, options),
        # One network alone would grow old, and the LSTMs forget how to start.
        keep_probability=0.5,
    )
    optimizer = meta_training.meta_optimizer(config)
    if not configuration.has_lstm_p:
        # Its output starts at zero, where P is the same for all coordinates, and stays there.
        optimizer = optax.chain(optimizer, optax.freeze(only_lstm_p(meta_params)))
    examples = jax.tree.map(jnp.asarray, task.data.meta_train)
    shape = (options.num_tasks, UNROLL + 1, options.batch_size)
    sample = functools.partial(draw_batches, task, examples, shape)
    total = iterations(task, options)
    folder = options.output / f"{CONFIGURATIONS.index(configuration) + 1}-seed-{seed}"
    done = meta_training.meta_train(
        task,
        learned,
        meta_params,
        sample,
        no_validation,
        folder,
        meta_training.Schedule(total, checkpoint_every=min(50, total), validate_every=total),
        config,
        seed=seed,
        resume=options.resume,
        about={"configuration": configuration.name, "settings": options.settings, "task": task.name},
        progress=lambda iteration, metrics: print_progress(configuration, iteration, total, metrics),
        algorithm=meta_training.make_meta_step(task, learned, config, optimizer),
    )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(done.state.meta_params, metrics)


def only_lstm_p(meta_params: MetaParams) -> Any:
    """Returns a mask of the weights of LSTM_p."""
    fill = lambda tree, value: jax.tree.map(lambda _: value, tree)
    return dataclasses.replace(
        meta_params,
        damping=fill(meta_params.damping, False),
        preconditioner=fill(meta_params.preconditioner, True),
    )


def with_residual(learned: meta_training.LearnedOptimizer) -> meta_training.LearnedOptimizer:
    """Adds the norm of the residual after the last step of the unroll to what is recorded."""

    def meta_gradient(*arguments):
        result = learned.meta_gradient(*arguments)
        norm = optax.tree.norm(result.opt_state[0].residual)
        return result._replace(meta_losses={**result.meta_losses, "residual_norm": norm})

    return learned._replace(meta_gradient=meta_gradient)


def no_validation(meta_params: MetaParams) -> meta_training.Validation:
    """The ablation is about the curves of meta-training; nothing is chosen by validation."""
    del meta_params
    return meta_training.Validation(jnp.zeros(()), jnp.zeros(0), jnp.zeros(()))


def print_progress(
    configuration: Configuration, iteration: int, total: int, metrics: dict[str, float]
) -> None:
    """Prints a line now and then."""
    if iteration % max(1, total // 20) == 0:
        values = "  ".join(f"{name} {metrics[name]:.4g}" for name in ("l_p", "residual_norm", "inner_loss"))
        print(f"{configuration.name}: {iteration}/{total}  {values}", flush=True)


if __name__ == "__main__":
    main()
