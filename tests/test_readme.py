"""The README: its example runs as printed and trains, its numbers are those of the records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from examples import find_examples, find_links, loss_of_adam

import mlhf_optax
from mlhf_optax import learned

pytestmark = pytest.mark.usefixtures("unoptimised")

ROOT = Path(__file__).resolve().parents[1]
README, OF_BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
TEXT = README.read_text(encoding="utf-8")
EXAMPLES = find_examples(README) + find_examples(OF_BENCHMARKS)


@pytest.mark.parametrize("example", [example.parameter() for example in EXAMPLES])
def test_example_runs_and_its_loss_falls(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # One of them adds an optimizer; other tests look at those that are there.
    monkeypatch.setattr(learned, "LEARNED", dict(learned.LEARNED))
    losses = example.run(capsys)
    assert len(losses) >= 20
    assert losses[-1] < 0.5 * losses[0]
    if "load_pretrained().optimizer" in example.code:
        assert losses[-1] < 0.5 * loss_of_adam(example, monkeypatch, capsys)


def test_the_first_example_is_ten_lines():
    (first, *_) = find_examples(README)
    assert len(first.code.split("\n\n")[0].splitlines()) == 10


def test_the_numbers_are_those_of_the_results():
    script = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TASKS = {
    "784-512-512-512-10, 128": ("mlp-784-512x3-10", 128),
    "the same, 1,024": ("mlp-784-512x3-10", 1024),
    "CUDA-convnet, 128": ("cuda-convnet", 128),
    "transformer, 128": ("transformer", 128),
    "ResNet of 9 blocks, 128": ("resnet9", 128),
}


@pytest.mark.parametrize("line", TASKS)
def test_the_costs_are_those_of_the_record(line):
    record = json.loads((ROOT / "benchmarks/speed/results/step_time.json").read_text(encoding="utf-8"))
    rows = {row["optimizer"]: row for row in record["rows"] if (row["task"], row["batch"]) == TASKS[line]}
    (cells,) = (row for row in TEXT.splitlines() if row.startswith(f"| {line} |"))
    written = [float(cell.split()[0]) for cell in cells.split("|")[2:-1]]
    steps = [1000 * rows[name]["seconds"] for name in ("sgd", "adam", "general")]
    first = [
        rows[optimizer]["compile_seconds"] + rows[optimizer]["seconds"] for optimizer in ("adam", "general")
    ]
    assert written == pytest.approx([*steps, *first], rel=0.02, abs=0.05)


def test_it_is_short_enough_to_be_read():
    assert len(TEXT.splitlines()) <= 145


def test_links_lead_somewhere():
    targets = find_links(README)
    assert targets
    installed = Path(mlhf_optax.__file__).parents[1]
    for target in targets:
        # Outside the source tree the package lies where it is installed.
        root = installed if target.startswith("mlhf_optax/") else ROOT
        assert (root / target).is_file(), f"README.md links to {target}, which is not there"
