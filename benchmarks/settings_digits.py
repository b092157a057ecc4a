"""Which settings of MLHF meta-train well: the paper's, its authors', the default, and what lies between.

Meta-trains ``digits-mlp`` from the same seed under each setting and validates on fresh starts of the
part for meta-training; neither the training nor the test part is touched.

    python benchmarks/settings_digits.py --json settings_digits.json --figure settings_digits.png

Runs that are interrupted go on where they were (``--output``). ``--quick``: two settings, 4 iterations.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mlhf_optax import AUTHORS_SETTINGS, PAPER_SETTINGS, Settings, init_meta_params
from mlhf_optax import meta_training as mt
from mlhf_optax.comparison.reporting import command_line, report, write_json
from mlhf_optax.tasks import epoch_indices, get_task, num_examples, sample_batches, take

FAITHFUL = {
    "max_update_ratio": None,
    "update_noise": 0.0,
    "step_loss": "difference",
    "damping_loss_scale": 1.0,
}
AUTHORS = {"step_loss": "difference"}
DEFAULT = Settings()
# Name: (settings, arguments of mlhf_optimizer). Each row after the third takes one thing away.
CASES: dict[str, tuple[Settings, dict[str, Any]]] = {
    "paper": (PAPER_SETTINGS, FAITHFUL),
    "authors": (AUTHORS_SETTINGS, AUTHORS),
    "default": (DEFAULT, {}),
    "absolute l_s": (DEFAULT, {"step_loss": "difference"}),
    "log l_s": (DEFAULT, {"step_loss": "log"}),
    "damping not in units of g": (
        dataclasses.replace(DEFAULT, gradient_power=0.0, initial_damping=1.0, initial_preconditioner=1.0),
        {},
    ),
    "P divides alone": (dataclasses.replace(DEFAULT, preconditioner_form="divide"), {}),
    "tanh inputs": (dataclasses.replace(DEFAULT, input_features="tanh"), {}),
    "no bound, no noise": (DEFAULT, {"max_update_ratio": None, "update_noise": 0.0}),
}
STEPS = (10, 30, 100, 300)


def main(arguments: Sequence[str] | None = None) -> None:
    """Meta-trains under every setting, prints the table as it grows, writes JSON and figure."""
    options = _parse(arguments)
    rows = []
    print(
        f"{'setting':27s}"
        + "".join(f"{f'{step} steps':>11s}" for step in STEPS)
        + f"{'mean log':>10s}  best at"
    )
    for name in options.cases:
        rows.append(run_case(name, options))
        losses = "".join(f"{loss:11.1e}" for loss in rows[-1]["losses"])
        print(f"{name:27s}{losses}{rows[-1]['score']:10.2f}  {rows[-1]['iteration']}", flush=True)
    if options.json:
        write_json(
            options.json,
            report(
                command_line("settings_digits.py", arguments), task="digits-mlp", steps=list(STEPS), rows=rows
            ),
        )
    if options.figure:
        save_figure(rows, options.figure)


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Meta-trains under one setting; returns its best validation and all of them."""
    settings, arguments = CASES[name]
    task = get_task("digits-mlp")
    learned = mt.mlhf_optimizer(1.0, **arguments)
    config = mt.MetaTrainingConfig(decay_iterations=options.iterations, keep_probability=0.95)
    meta_params = init_meta_params(jax.random.key(0), settings, layer_types=["dense_bias", "dense_kernel"])
    examples = jax.tree.map(jnp.asarray, task.data.meta_train)
    batches = take(
        examples, epoch_indices(jax.random.key(1), num_examples(examples), task.batch_size, STEPS[-1])
    )
    validate = mt.make_validation(task, learned, STEPS)
    output = options.output / name.replace(" ", "-")
    mt.meta_train(
        task,
        learned,
        meta_params,
        lambda key: sample_batches(
            examples, key, (config.num_tasks, config.unroll_length + 1, task.batch_size)
        ),
        lambda candidate: validate(candidate, batches, examples, jax.random.key(2)),
        output,
        mt.Schedule(options.iterations, checkpoint_every=50, validate_every=min(50, options.iterations)),
        config,
        resume=True,
        about={"case": name, "iterations": options.iterations},
    )
    history = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    return {"name": name, "validation": history, **min(history, key=lambda line: line["score"])}


def save_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the validation score along meta-training, a line a setting."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in rows:
        scores = [(line["iteration"], line["score"]) for line in row["validation"]]
        axes.plot(*zip(*scores, strict=True), marker="o", markersize=3, label=row["name"])
    axes.set(xlabel="meta-iterations", ylabel=f"mean log loss after {', '.join(map(str, STEPS))} steps")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/settings_digits"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--quick", action="store_true", help="two settings, 4 meta-iterations")
    options = parser.parse_args(arguments)
    if options.quick:
        options.cases, options.iterations = ["paper", "default"], 4
        options.output = options.output.with_name(options.output.name + "-quick")
    return options


if __name__ == "__main__":
    main()
