"""Which settings of MLHF meta-train well: the paper's, its authors', the default, and what lies between.

Meta-trains ``digits-mlp`` from the same seed under each setting and validates on fresh starts of the
part for meta-training; neither the training nor the test part is touched.

    python benchmarks/settings_digits.py --json settings_digits.json --figure settings_digits.png

Runs that are interrupted go on where they were (``--output``). ``--quick``: two settings, 4 iterations.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from experiment import BenchmarkOptions, command_line, parse_options

from mlhf_optax import AUTHORS_SETTINGS, PAPER_SETTINGS, Settings, init_meta_params
from mlhf_optax import meta_training as mt
from mlhf_optax.controllers.lstm_settings import Divide, TanhFeatures, Unit
from mlhf_optax.tasks import epoch_indices, get_task, num_examples, sample_batches, take

FAITHFUL = {
    "max_update_ratio": None,
    "update_noise": 0.0,
    "step_loss": "difference",
    "damping_loss_scale": 1.0,
}
AUTHORS = {"step_loss": "difference"}
ABSOLUTE = Settings(unit=Unit(gradient_power=0.0), initial_damping=1.0, initial_preconditioner=1.0)
# Name: (settings, arguments of mlhf_optimizer). Each row after the third takes one thing away.
CASES: dict[str, tuple[Settings, dict[str, Any]]] = {
    "paper": (PAPER_SETTINGS, FAITHFUL),
    "authors": (AUTHORS_SETTINGS, AUTHORS),
    "default": (Settings(), {}),
    "absolute l_s": (Settings(), {"step_loss": "difference"}),
    "log l_s": (Settings(), {"step_loss": "log"}),
    "damping not in units of g": (ABSOLUTE, {}),
    "P divides alone": (Settings(preconditioner=Divide()), {}),
    "tanh inputs": (Settings(features=TanhFeatures()), {}),
    "no bound, no noise": (Settings(), {"max_update_ratio": None, "update_noise": 0.0}),
}
STEPS = (10, 30, 100, 300)


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script; ``repeats`` has no effect."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which settings."""
    iterations: int = 300
    """Meta-iterations."""
    output: Path = Path("runs/settings_digits")
    """Folder for what the meta-trainings leave."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Meta-trains under every setting, prints the table as it grows, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        folder = options.output.with_name(options.output.name + "-quick")
        options = dataclasses.replace(options, cases=("paper", "default"), iterations=4, output=folder)
    rows = []
    for name in options.cases:
        rows.append(run_case(name, options))
        losses = "".join(f"{loss:11.1e}" for loss in rows[-1]["losses"])
        print(f"{name:27s}{losses}{rows[-1]['score']:10.2f}  {rows[-1]['iteration']}", flush=True)
    options.save(command_line(__file__, arguments), draw, task="digits-mlp", steps=list(STEPS), rows=rows)


def run_case(name: str, options: Options) -> dict[str, Any]:
    """Meta-trains under one setting; returns its best validation and all of them."""
    settings, arguments = CASES[name]
    task, learned = get_task("digits-mlp"), mt.mlhf_optimizer(1.0, **arguments)
    config = mt.MetaTrainingConfig(decay_iterations=options.iterations, keep_probability=0.95)
    meta_params = init_meta_params(jax.random.key(0), settings, layer_types=["dense_bias", "dense_kernel"])
    examples = jax.tree.map(jnp.asarray, task.data.meta_train)
    order = epoch_indices(jax.random.key(1), num_examples(examples), task.batch_size, STEPS[-1])
    batches, validate = take(examples, order), mt.make_validation(task, learned, STEPS)
    shape = (config.num_tasks, config.unroll_length + 1, task.batch_size)
    output = options.output / name.replace(" ", "-")
    mt.meta_train(
        task,
        learned,
        meta_params,
        lambda key: sample_batches(examples, key, shape),
        lambda candidate: validate(candidate, batches, examples, jax.random.key(2)),
        output,
        mt.Schedule(options.iterations, checkpoint_every=50, validate_every=min(50, options.iterations)),
        config,
        resume=True,
        about={"case": name, "iterations": options.iterations},
    )
    history = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    return {"name": name, "validation": history, **min(history, key=lambda line: line["score"])}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the validation score along meta-training, a line per setting."""
    figure.set_size_inches(7, 4.2)
    axes = figure.subplots()
    for row in content["rows"]:
        scores = [(line["iteration"], line["score"]) for line in row["validation"]]
        axes.plot(*zip(*scores, strict=True), marker="o", markersize=3, label=row["name"])
    axes.set(xlabel="meta-iterations", ylabel=f"mean log loss after {', '.join(map(str, STEPS))} steps")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
