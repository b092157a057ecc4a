"""The paper's claim of stability: one long training of CUDA-convnet on CIFAR-10 with MLHF.

Trains on the last 2/5 of the training set for many steps at one learning rate, and records over time the
training loss (on the first 2,048 examples, without augmentation), the test accuracy, damping and
preconditioner (smallest, mean, largest over all coordinates), and the steps that were skipped. A run
counts as stable if its loss is finite at every record and no later record is above the first.

    python benchmarks/long_run_cifar10.py --data-dir DIR --output runs/long_run_cifar10

``--resume`` goes on from the last checkpoint after a stop. ``--quick`` takes a minute on two cores.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from experiment import ConvnetOptions, command_line, find_meta_params, parse_options, save_drawing
from rich.progress import track
from tables_of_trainings import long_run

from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.runs import Program, RunGrid
from mlhf_optax.meta_training.checkpoints import load_last_checkpoint, save_checkpoint
from mlhf_optax.support.files import locked_folder
from mlhf_optax.tasks import Task, take

SAMPLE = 2048  # training examples on which the loss is recorded
STATISTICS = tuple(
    f"{name}_{kind}" for name in ("damping", "preconditioner") for kind in ("min", "mean", "max")
)
OF_INFO = ("descent", "cg_residual_norm", "skipped_steps", *STATISTICS)


@dataclasses.dataclass(frozen=True)
class Options(ConvnetOptions):
    """Options of this script. Those of the comparisons that it does not name here have no effect."""

    steps: int = 10_000
    """Length of the training."""
    record_every: int = 100
    """Steps between records and checkpoints."""
    seed: int = 0
    """Seed of the training."""
    output: Path = Path("runs/long_run_cifar10")
    """Folder for all that is written."""

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1 or self.record_every < 1 or self.steps % self.record_every:
            raise ValueError(
                f"--steps must be a multiple of --record-every, both at least 1, got {self.steps} and "
                f"{self.record_every}"
            )
        if (self.output / "checkpoints").exists() and not self.resume:
            raise ValueError(
                f"{self.output} already has a run; add --resume to go on with it, or use another --output"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the training and writes what was recorded."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, steps=20, record_every=5, batch_size=32)
    task = options.make_task((256, 640, 256))
    source, learned = find_meta_params(task, options.meta_params)
    changes: dict[str, Any] = {"curvature_batch_size": options.curvature_share or None}
    if options.learning_rate is not None:
        changes["learning_rate"] = options.learning_rate
    chosen = learned.recommended | changes
    settings = {
        "meta_params": source,
        "learning_rate": chosen["learning_rate"],
        "momentum": chosen.get("momentum", 0.0),
        "curvature_share": options.curvature_share,
        "batch_size": task.batch_size,
        "record_every": options.record_every,
        "seed": options.seed,
    }
    optimizer = learned.optimizer(task.predict_fn, task.loss_fn, **changes)
    runs = RunGrid(Program(task, lambda: optimizer), {}, [options.seed], options.steps)
    with locked_folder(options.output):
        records = train(task, runs, options, settings)
    content = with_origin(
        command_line(__file__, arguments),
        task=task.name,
        num_steps=options.steps,
        **settings,
        is_stable=is_stable(records),
        records=records,
    )
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)
    print(*long_run(content), sep="\n")


def train(task: Task, runs: RunGrid, options: Options, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Trains from the last checkpoint on and returns what was recorded, a list of numbers per name."""
    names = ("step", "train_loss", "test_accuracy", *OF_INFO)
    count = options.steps // options.record_every
    records = np.full((len(names), count), np.nan)
    folder, about = options.output / "checkpoints", settings | {"task": task.name, "steps": options.steps}
    # As integers, since jax would round them to float32.
    template = {"state": jax.eval_shape(lambda: runs.state), "records": records.view(np.uint32)}
    found = load_last_checkpoint(folder, template, about) if options.resume else None
    first = 0
    if found is not None:
        first, tree = found
        runs.state, records = tree["state"], np.array(tree["records"]).view(np.float64)
        runs.steps_done = first * options.record_every
    sample = take(task.data.train, np.arange(min(SAMPLE, len(task.data.train["label"]))))
    for index in track(range(first, count), "records", total=count, completed=first):
        for _ in range(options.record_every):
            runs.step()
        runs.wait()
        info = optax.tree.get(runs.state, "info")._asdict()
        values = [runs.steps_done, runs.train_loss(sample)[0, 0], runs.test_accuracy()[0, 0]]
        records[:, index] = values + [np.ravel(info[name])[0] for name in OF_INFO]
        save_checkpoint(folder, index + 1, {"state": runs.state, "records": records.view(np.uint32)}, about)
    return dict(zip(names, records.tolist(), strict=True))


def is_stable(records: dict[str, list[float]]) -> bool:
    """Whether no loss is above the first one, or not a number."""
    losses = np.array(records["train_loss"])
    return bool(np.isfinite(losses).all() and (losses <= losses[0]).all())


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws loss and accuracy, damping, and preconditioner over the steps."""
    figure.set_size_inches(13, 4)
    records = content["records"]
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
    about = f"batch {content['batch_size']}, curvature on {share:g} of it, rate {content['learning_rate']:g}"
    figure.suptitle(f"{content['task']}, {about}, {content['num_steps']} steps")


if __name__ == "__main__":
    main()
