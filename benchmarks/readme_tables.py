"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results.

    python benchmarks/readme_tables.py            rewrites the tables
    python benchmarks/readme_tables.py --check    fails if one is not up to date

A table lies between ``<!-- table NAME -->`` and ``<!-- end NAME -->``; its name is a key of ``TABLES``.
"""

import json
import re
import sys
from pathlib import Path

import tables_of_held_out
import tables_of_learned
import tables_of_speed
import tables_of_trainings

from mlhf_optax.experiments import Comparison

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")

# Name: what makes the lines, and the files that it is given.
TABLES = {
    "held_out_medians": (tables_of_held_out.held_out_medians, ["held_out"]),
    "held_out": (tables_of_held_out.held_out, ["held_out"]),
    "held_out_aims": (
        tables_of_held_out.held_out_aims,
        ["held_out", "held_out_batches", "ten_times_horizon"],
    ),
    "held_out_losses": (tables_of_held_out.held_out_losses, ["held_out"]),
    "held_out_dampings": (tables_of_held_out.held_out_dampings, ["held_out_dampings"]),
    "held_out_learned": (tables_of_held_out.held_out_learned, ["held_out"]),
    "held_out_cosine": (tables_of_held_out.held_out_cosine, ["held_out", "held_out_cosine"]),
    "held_out_batches": (tables_of_held_out.held_out_batches, ["held_out", "held_out_batches"]),
    "held_out_cg_steps": (tables_of_held_out.held_out_cg_steps, ["held_out", "held_out_cg_steps"]),
    "scaling": (tables_of_speed.scaling, ["scaling"]),
    "meta_training_processes": (tables_of_speed.meta_training_processes, ["meta_training_processes"]),
    "general_validation": (tables_of_learned.general_validation, []),
    "ten_times_horizon": (tables_of_learned.ten_times_horizon, ["ten_times_horizon"]),
    "learned_optimizers": (tables_of_learned.learned_optimizers, ["learned_optimizers"]),
    "learned_optimizers_long": (
        tables_of_learned.learned_optimizers_long,
        ["learned_optimizers_2000", "learned_optimizers_10000"],
    ),
    "lodo_bowl": (tables_of_learned.lodo_bowl, ["lodo_bowl"]),
    "lodo_pixels": (tables_of_learned.lodo_pixels, ["lodo_pixels"]),
    "digits-mlp": (tables_of_trainings.by_step, ["digits-mlp"]),
    "transfer_digits": (tables_of_trainings.transfer_digits, ["transfer_digits"]),
    "first_order_cifar10": (tables_of_trainings.by_epoch, ["first_order_cifar10"]),
    "first_order_cifar10_narrow": (tables_of_trainings.by_epoch, ["first_order_cifar10_narrow"]),
    "second_order_cifar10": (
        tables_of_trainings.second_order,
        ["second_order_cifar10", "second_order_cifar10_mlhf"],
    ),
    "ablation_preconditioner": (tables_of_trainings.ablation, ["ablation_preconditioner"]),
    "transfer_resnet18": (tables_of_trainings.by_epoch, ["transfer_resnet18"]),
    "long_run_cifar10": (tables_of_trainings.long_run, ["long_run_cifar10"]),
    "step_time": (tables_of_speed.step_time, ["step_time"]),
    "step_memory": (tables_of_speed.step_memory, ["step_memory"]),
    "ggn_in_loops": (tables_of_speed.ggn_in_loops, ["ggn_in_loops"]),
    "lstm_throughput": (tables_of_speed.lstm_throughput, ["lstm_throughput"]),
    "meta_step_time": (tables_of_speed.meta_step_time, ["meta_step_time"]),
}


_OF_COMPARISONS = (
    tables_of_trainings.by_step,
    tables_of_trainings.by_epoch,
    tables_of_trainings.second_order,
)


def table(name: str, results: Path) -> list[str]:
    """Returns the lines of a table."""
    make, files = TABLES[name]
    paths = [results / f"{file}.json" for file in files]
    is_comparison = make in _OF_COMPARISONS
    return make(*(Comparison.load(p) if is_comparison else json.loads(p.read_text()) for p in paths))


def rewritten(text: str, results: Path) -> str:
    """Returns a text with its tables made anew from a folder of results."""
    marks = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)

    def fill(found: re.Match) -> str:
        lines = table(found[1], results)
        return "\n".join([f"<!-- table {found[1]} -->", "", *lines, "", f"<!-- end {found[1]} -->"])

    return marks.sub(fill, text)


def main() -> None:
    """Rewrites or checks the files."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        new = rewritten(text, ROOT / "benchmarks" / "results")
        if "--check" not in sys.argv[1:]:
            file.write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"the tables in {file} are not those of benchmarks/results; run this without --check")


if __name__ == "__main__":
    main()
