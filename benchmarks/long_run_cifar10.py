"""The paper's claim of stability: one long training of CUDA-convnet on CIFAR-10 with MLHF.

Trains on the last 2/5 of the training set for many steps at one learning rate, and records over time the
training loss (on the first 2,048 examples, without augmentation), the test accuracy, damping and
preconditioner (smallest, mean, largest over all coordinates), and the steps that were skipped. A run
counts as stable if its loss is finite at every record and no later record is above the first.

    python benchmarks/long_run_cifar10.py --data-dir DIR --output runs/long_run_cifar10

``--resume`` goes on from the last checkpoint after a stop. ``--quick`` takes a minute on two cores.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.progress import track

from mlhf_optax.comparison.experiment_options import add_network_options, limit_data, network_options
from mlhf_optax.comparison.mlhf_contenders import find_meta_params
from mlhf_optax.comparison.reporting import command_line, report, write_json
from mlhf_optax.comparison.trainings import Program, Trainings
from mlhf_optax.meta_training.checkpoints import load_last_checkpoint, save_checkpoint
from mlhf_optax.tasks import Task, cifar10_convnet, take

SAMPLE = 2048  # training examples on which the loss is recorded
STATISTICS = tuple(
    f"{name}_{kind}" for name in ("damping", "preconditioner") for kind in ("min", "mean", "max")
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the training and writes what was recorded."""
    options = parse(arguments)
    task = make_task(options)
    source, learned = find_meta_params(task, options.meta_params)
    rate = learned.learning_rate if options.learning_rate is None else options.learning_rate
    optimizer = learned.optimizer(
        task.predict_fn,
        task.loss_fn,
        learning_rate=rate,
        curvature_batch_size=options.curvature_share or None,
    )
    settings = {
        "meta_params": source,
        "learning_rate": rate,
        "momentum": learned.recommended["momentum"],
        "curvature_share": options.curvature_share,
        "batch_size": task.batch_size,
        "record_every": options.record_every,
        "seed": options.seed,
    }
    runs = Trainings(Program(task, lambda: optimizer), {}, [options.seed], options.steps)
    records = train(task, runs, options, settings)
    content = report(
        command_line("long_run_cifar10.py", arguments),
        task=task.name,
        num_steps=options.steps,
        **settings,
        is_stable=is_stable(records),
        records=records,
    )
    write_json(options.output / "results.json", content)
    save_figure(content, options.output / "figure.png")
    print_table(content)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--steps", type=int, default=10_000)
    add("--record-every", type=int, default=100, help="steps between records and checkpoints")
    add("--batch-size", type=int, default=128)
    add_network_options(parser)
    add("--curvature-share", type=float, default=0.25, help="share of the batch for GGN products; 0 for all")
    add("--meta-params", help="shipped name or path; by default those for the task")
    add("--learning-rate", type=float, help="by default what the record says")
    add("--seed", type=int, default=0)
    add("--data-dir", type=Path, help="where the data lie; by default $TFDS_DATA_DIR")
    add("--cache-dir", type=Path, help="where decoded data are kept")
    add("--output", type=Path, default=Path("runs/long_run_cifar10"))
    add("--resume", action="store_true", help="go on from what lies in the folder")
    add("--quick", action="store_true", help="a tiny network, few examples, 20 steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.record_every, options.batch_size = 20, 5, 32
        options.channels, options.hidden = [4, 4], [4]
    if options.steps < 1 or options.record_every < 1 or options.steps % options.record_every:
        parser.error(
            f"--steps must be a multiple of --record-every, both at least 1, got {options.steps} and "
            f"{options.record_every}"
        )
    if (options.output / "checkpoints").exists() and not options.resume:
        parser.error(
            f"{options.output} already has a run; add --resume to go on with it, or use another --output"
        )
    return options


def make_task(options: argparse.Namespace) -> Task:
    """Returns the task that the options ask for."""
    task = cifar10_convnet(
        **network_options(options),
        batch_size=options.batch_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
    )
    return limit_data(task, 256, 640, 256) if options.quick else task


def train(
    task: Task, runs: Trainings, options: argparse.Namespace, settings: dict[str, Any]
) -> dict[str, list[float]]:
    """Trains from the last checkpoint on and returns what was recorded, a list of numbers a name."""
    names = (
        "step",
        "train_loss",
        "test_accuracy",
        "descent",
        "cg_residual_norm",
        "skipped_steps",
        *STATISTICS,
    )
    count = options.steps // options.record_every
    records = {name: np.full(count, np.nan, np.float64) for name in names}
    folder, about = options.output / "checkpoints", settings | {"task": task.name, "steps": options.steps}
    template = {"state": jax.eval_shape(lambda: runs.state), "records": records}
    found = load_last_checkpoint(folder, template, about) if options.resume else None
    first = 0
    if found is not None:
        first, tree = found
        runs.state, records = tree["state"], {name: np.array(x) for name, x in tree["records"].items()}
        runs.steps_done = first * options.record_every
    sample = take(task.data.train, np.arange(min(SAMPLE, len(task.data.train["label"]))))
    for index in track(range(first, count), "records", total=count, completed=first):
        for _ in range(options.record_every):
            runs.step()
        runs.wait()
        for name, value in measure(runs, sample).items():
            records[name][index] = value
        save_checkpoint(folder, index + 1, {"state": runs.state, "records": records}, about)
    return {name: values.tolist() for name, values in records.items()}


def measure(runs: Trainings, sample: Any) -> dict[str, float]:
    """Returns one record."""
    info = optax.tree.get(runs.state, "info")
    of_step = {name: float(np.ravel(value)[0]) for name, value in info._asdict().items()}
    kept = ("descent", "cg_residual_norm", "skipped_steps", *STATISTICS)
    return {
        "step": runs.steps_done,
        "train_loss": float(runs.loss_on(sample)[0, 0]),
        "test_accuracy": float(runs.test_accuracy()[0, 0]),
        **{name: of_step[name] for name in kept},
    }


def is_stable(records: dict[str, list[float]]) -> bool:
    """Whether no loss is above the first one, or not a number."""
    losses = np.array(records["train_loss"])
    return bool(np.isfinite(losses).all() and (losses <= losses[0]).all())


def save_figure(content: dict[str, Any], path: Path) -> None:
    """Draws loss and accuracy, damping, and preconditioner over the steps."""
    from matplotlib.figure import Figure

    records = content["records"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, damping, preconditioner = figure.subplots(1, 3)
    loss.plot(records["step"], records["train_loss"], label="training loss, nats")
    loss.plot(records["step"], records["test_accuracy"], label="test accuracy")
    loss.set(yscale="log", xlabel="step")
    loss.legend()
    for axes, name in ((damping, "damping"), (preconditioner, "preconditioner")):
        axes.fill_between(records["step"], records[f"{name}_min"], records[f"{name}_max"], alpha=0.3)
        axes.plot(records["step"], records[f"{name}_mean"])
        axes.set(yscale="log", xlabel="step", title=f"{name}: smallest, mean and largest")
    share = content["curvature_share"] or 1
    figure.suptitle(
        f"{content['task']}, batch {content['batch_size']}, curvature on {share:g} of it, learning rate "
        f"{content['learning_rate']:g}, {content['num_steps']} steps"
    )
    figure.savefig(path, dpi=150)


def print_table(content: dict[str, Any]) -> None:
    """Prints some of the records, evenly spaced in the logarithm."""
    records = content["records"]
    chosen = np.unique(np.geomspace(1, len(records["step"]), 8).round().astype(int)) - 1
    print(f"{'step':>8s}{'loss':>10s}{'accuracy':>10s}{'damping':>12s}{'precond.':>12s}{'skipped':>9s}")
    for i in chosen:
        print(
            f"{records['step'][i]:8.0f}{records['train_loss'][i]:10.4g}{records['test_accuracy'][i]:10.1%}"
            f"{records['damping_mean'][i]:12.3g}{records['preconditioner_mean'][i]:12.3g}"
            f"{records['skipped_steps'][i]:9.0f}"
        )
    print("stable" if content["is_stable"] else "NOT stable: a loss above the first one, or not finite")


if __name__ == "__main__":
    main()
