"""The learned optimizers of the literature on the protocol on which their papers compare them.

A network of 784-20-10 on MNIST, batches of 128, a number of steps; then the mean loss of the final parameters
on the same mini-batches, and the mean of that over many starts. They were meta-trained on networks with
sigmoid; ReLU, ELU and tanh show how far that carries. The published numbers stand beside ours.

    python benchmarks/held_out/learned_optimizers.py --data-dir DIR --output runs/learned_optimizers

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
``--meta-train NAME`` meta-trains one of them instead, with the recipe of the shipped meta-parameters: on
MNIST of 7 x 7 pixels, and all but L2L with random scaling and a convex companion. L2L went on from there with
``--start`` and ``--image-size``; the record of the shipped file has the command.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlhf_optax import list_pretrained, load_pretrained
from mlhf_optax import meta_training as mt
from mlhf_optax.experiments.meta_train import meta_train_task, shown_losses
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import progress_bar
from mlhf_optax.experiments.scripts import (
    Table,
    command_line,
    draw_panels,
    finite_or_none,
    parse_options,
    save_drawing,
    saved,
)
from mlhf_optax.experiments.tables import format_loss
from mlhf_optax.learned import LEARNED, get_learned
from mlhf_optax.support.checks import FROM_ONE, check_choice, check_fields, require
from mlhf_optax.support.files import locked_folder
from mlhf_optax.tasks import Task, mnist_mlp

PUBLISHED = {
    "adam": {"sigmoid": 0.35, "relu": 0.32, "elu": 0.31, "tanh": 0.34},
    "l2l": {"sigmoid": 0.38, "relu": 1.42, "elu": 2.02, "tanh": 0.83},
    "rnnprop": {"sigmoid": 0.34, "relu": 0.31, "elu": 0.31, "tanh": 0.33},
    "hyperadam": {"sigmoid": 0.33, "relu": 0.29, "elu": 0.28, "tanh": 0.36},
}
"""Final loss after 100 steps, mean of 100 runs (Wang, Sun, Xu 2019, their run of all four)."""

ADAM_RATES = {"sigmoid": 0.03125, "relu": 0.0221, "elu": 0.0221, "tanh": 0.01105}
"""Tuned for 100 steps by Lv, Jiang, Li 2017."""
LONG_ADAM_RATES = {2000: 0.015625, 10_000: 0.0078125}
"""The same for longer trainings with sigmoid."""

_TRICKS = {"random_scaling": 3.0, "companion_size": 20}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How shipped meta-parameters were made."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


RECIPES = {
    "rnnprop": Recipe(config=_TRICKS),
    # Without the tricks, as in its paper: that it fails on other networks is the point.
    "l2l": Recipe(),
    "hyperadam": Recipe(config=_TRICKS),
    "variational_hyperadam": Recipe(config=_TRICKS),
    "hierarchical": Recipe(config=_TRICKS),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    optimizers: tuple[str, ...] = ()
    """Shipped names, paths, or "adam"; by default Adam and all that have a recipe and are shipped."""
    activations: tuple[str, ...] = tuple(ADAM_RATES)
    """Of the networks."""
    steps: tuple[int, ...] = (100,)
    """Lengths of the trainings; the papers' are 100, 2000 and 10000."""
    starts: int = 100
    """Trainings of every optimizer."""
    data_dir: Path | None = None
    """Where MNIST lies; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    output: Path = Path("runs/learned_optimizers")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder."""
    quick: bool = False
    """20 steps, 2 starts and images of 7 x 7: minutes on two cores."""
    meta_train: str | None = None
    """Meta-train this one instead; the result goes to the folder."""
    iterations: int = 1000
    """Of the meta-training."""
    num_tasks: int = 4
    """Networks in training side by side in the meta-training."""
    meta_learning_rate: float = 3e-3
    """Of the meta-training; it falls along a cosine."""
    image_size: int = 7
    """Height and width of the images in the meta-training, which takes longer with more pixels."""
    start: str | None = None
    """Shipped name or path of meta-parameters from which the meta-training goes on."""

    def __post_init__(self):
        for name in self.activations:
            check_choice("activations", name, ADAM_RATES)
        if self.meta_train is not None:
            check_choice("meta_train", self.meta_train, RECIPES)
        is_divisor = self.image_size >= 1 and 28 % self.image_size == 0
        require(is_divisor, "image_size", "a divisor of 28", self.image_size)
        check_fields(self, FROM_ONE, "starts")
        require(self.steps and min(self.steps) >= 1, "steps", "numbers of at least 1", self.steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the protocol, prints the table, writes ``results.json`` and ``figure.png``; or meta-trains."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, steps=(20,), starts=2, iterations=min(2, options.iterations))
    command = command_line(__file__, arguments)
    if options.meta_train:
        print(meta_train(options.meta_train, options, command))
        return
    names = options.optimizers or ("adam", *(name for name in RECIPES if name in list_pretrained()))
    with locked_folder(options.output) as folder:
        rows = run_all(names, options, folder)
        content = with_origin(command, starts=options.starts, published=PUBLISHED, rows=rows)
        write_json(folder / "results.json", content)
        save_drawing(folder / "figure.png", draw, content)
    print(*table(content).markdown(), sep="\n")


def run_all(names: Sequence[str], options: Options, folder: Path) -> list[dict[str, Any]]:
    """Returns a row for every length, activation and optimizer, from files where they are finished."""
    rows = []
    for steps in options.steps:
        for activation in options.activations:
            for name in names:
                path = folder / f"{Path(name).stem}-{activation}-{steps}.json"
                about = {
                    "optimizer": name,
                    "activation": activation,
                    "steps": steps,
                    "starts": options.starts,
                }
                row = json.loads(path.read_text()) if options.resume and path.exists() else {}
                if any(row.get(key) != value for key, value in about.items()):
                    row = about | run_one(name, activation, steps, options)
                    write_json(path, row)
                rows.append(row)
                print(f"{activation:8s} {steps:6d} steps  {name:24s} {_final(row['loss'])}", flush=True)
    return rows


def run_one(name: str, activation: str, steps: int, options: Options) -> dict[str, Any]:
    """Returns the mean final loss over the starts, its standard error, and the mean curve."""
    task = mnist_mlp(
        activation=activation,
        size=7 if options.quick else 28,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
    )
    finals, curves = protocol(task, optimizer_of(name, activation, steps, task), steps)(
        jax.tree.map(jnp.asarray, task.data.train), jax.random.split(jax.random.key(0), options.starts)
    )
    finals, curve = np.asarray(finals, np.float64), np.mean(np.asarray(curves, np.float64), axis=0)
    kept = np.unique(np.geomspace(1, steps, 50).astype(int)) - 1
    return {
        "loss": finite_or_none(float(finals.mean())),
        "standard_error": finite_or_none(float(finals.std() / math.sqrt(len(finals)))),
        "largest_loss": finite_or_none(float(finals.max())),
        "diverged": int(np.sum(~np.isfinite(finals))),
        "curve_steps": (kept + 1).tolist(),
        "curve": [finite_or_none(float(curve[i])) for i in kept],
    }


def optimizer_of(name: str, activation: str, steps: int, task: Task) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer by name; Adam has the rate that is tuned for the task."""
    if name != "adam":
        return load_pretrained(name).optimizer(task.predict_fn, task.loss_fn)
    rate = ADAM_RATES[activation] if activation != "sigmoid" else LONG_ADAM_RATES.get(steps, 0.03125)
    return optax.with_extra_args_support(optax.adam(rate))


def protocol(
    task: Task, tx: optax.GradientTransformationExtraArgs, steps: int
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns a jitted function from examples and keys to final losses (S,) and losses by step (S, steps)."""

    def train(examples, key):
        init_key, data_key = jax.random.split(key)
        params = task.init_fn(init_key)
        count = examples["label"].shape[0]
        rows = jax.random.randint(data_key, (steps, task.batch_size), 0, count)
        take = lambda chosen: jax.tree.map(lambda x: x[chosen], examples)
        loss_of = lambda p, batch: task.loss_fn(task.predict_fn(p, batch), batch)

        def step(carry, chosen):
            params, state = carry
            batch = take(chosen)
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), rows)
        final = jnp.mean(jax.lax.map(lambda chosen: loss_of(params, take(chosen)), rows))
        return final, losses

    return jax.jit(lambda examples, keys: jax.lax.map(lambda key: train(examples, key), keys))


def meta_train(name: str, options: Options, command: str) -> Path:
    """Meta-trains with the recipe and returns the path of the result."""
    task = mnist_mlp(size=options.image_size, data_dir=options.data_dir, cache_dir=options.cache_dir)
    family, recipe = get_learned(name), RECIPES[name]
    config = mt.MetaTrainingConfig(
        **{
            "num_tasks": options.num_tasks,
            "unroll_length": 20,
            "meta_learning_rate": options.meta_learning_rate,
            "decay_iterations": options.iterations,
            # Trainings of 100 steps; some end earlier, so that those side by side are of all ages.
            "keep_probability": 0.95,
            "max_age": 100,
            "fresh_probability": 1.0,
            **recipe.config,
        }
    )
    schedule = mt.Schedule(options.iterations, checkpoint_every=100, validate_every=100)
    with progress_bar("meta-training") as update:
        return meta_train_task(
            task,
            family,
            family.options(**recipe.options),
            options.output,
            schedule,
            config,
            start=options.start,
            validation_steps=(10, 30, 100),
            resume=options.resume,
            command=command,
            on_progress=lambda iteration, metrics: update(
                completed=iteration,
                total=schedule.last,
                loss="  ".join(f"{key} {value:.3g}" for key, value in shown_losses(metrics).items()),
            ),
        )


def table(content: dict[str, Any]) -> Table:
    """Returns the final losses on the protocol of the literature, with what is published beside them."""
    activations = list(dict.fromkeys(row["activation"] for row in content["rows"]))
    rows = [["final loss (published)", *activations]]
    for name, steps in dict.fromkeys((row["optimizer"], row["steps"]) for row in content["rows"]):
        own = {
            row["activation"]: row["loss"]
            for row in content["rows"]
            if (row["optimizer"], row["steps"]) == (name, steps)
        }
        known = content["published"].get(name, {}) if steps == 100 else {}
        beside = [f" ({known[activation]:.2f})" if activation in known else "" for activation in activations]
        shown = [_final(own[activation]) for activation in activations]
        rows.append([_title(name), *map("".join, zip(shown, beside, strict=True))])
    note = (
        f"784-20-10 on MNIST, {content['rows'][0]['steps']} steps of batch 128, {content['starts']} starts "
        "(published: 100). All were meta-trained on the network with sigmoid and images of 7 x 7 pixels, L2L "
        "then on 28 x 28."
    )
    return Table(rows, note, content)


def longer(*contents: dict[str, Any]) -> Table:
    """Returns the final losses with sigmoid after longer trainings, a column for each length."""
    columns = {}
    for content in contents:
        for row in content["rows"]:
            columns.setdefault(row["steps"], {})[row["optimizer"]] = row
    rows = [["final loss with sigmoid", *(f"{steps:,} steps" for steps in columns)]]
    for name in next(iter(columns.values())):
        rows.append([_title(name), *(_final(column[name]["loss"]) for column in columns.values())])
    starts = " and ".join(str(content["starts"]) for content in contents)
    note = (
        f"The same protocol for longer, starts: {starts}. The rate of Adam is tuned for each length; the "
        "learned ones are as above, meta-trained on 100 steps."
    )
    commands = " && ".join(content["command"] for content in contents)
    return Table(rows, note, contents[-1] | {"command": commands})


def _title(name: str) -> str:
    return LEARNED[name].label if name in LEARNED else "tuned Adam" if name == "adam" else name


def _final(loss: float | None) -> str:
    return format_loss(math.inf if loss is None else loss)  # JSON has no infinity


TABLES = {
    "learned_optimizers": lambda folder: table(*saved(folder, "learned_optimizers")),
    "learned_optimizers_long": lambda folder: longer(
        *saved(folder, "learned_optimizers_2000", "learned_optimizers_10000")
    ),
}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the mean losses by step, an axis for every activation and length, a line for every optimizer."""
    panels: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        title = f"{row['activation']}, {row['steps']} steps"
        panels.setdefault(title, {})[row["optimizer"]] = (row["curve_steps"], row["curve"])
    scales = {"xscale": "log", "yscale": "log"}
    draw_panels(figure, panels, xlabel="steps", ylabel="training loss, nats", **scales)


if __name__ == "__main__":
    main()
