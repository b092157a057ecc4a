"""Every example of the READMEs runs as it is printed, and trains."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optax
import pytest

import mlhf_optax
from mlhf_optax import StepInfo, learned

pytestmark = pytest.mark.usefixtures("unoptimised")

ROOT = Path(__file__).resolve().parents[1]
TEXT, OF_BENCHMARKS = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in ("", "benchmarks")
)


def find_examples(text):
    """Returns heading and code of every fenced Python block."""
    found, heading = [], "start"
    for match in re.finditer(r"^#+ (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```$", text, re.M | re.S):
        if match["heading"]:
            heading = match["heading"]
        else:
            found.append((heading, match["code"]))
    return found


EXAMPLES = find_examples(TEXT) + find_examples(OF_BENCHMARKS)


def losses_of(code, capsys):
    """Runs an example and returns the losses that it prints."""
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return [float(number) for number in re.findall(r"loss (\S+)", capsys.readouterr().out)]


@pytest.mark.parametrize("code", [pytest.param(code, id=heading) for heading, code in EXAMPLES])
def test_example_runs_and_its_loss_falls(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # One of them adds an optimizer; other tests look at those that are there.
    monkeypatch.setattr(learned, "LEARNED", dict(learned.LEARNED))
    losses = losses_of(code, capsys)
    assert len(losses) >= 20
    assert losses[-1] < 0.5 * losses[0]
    if "load_pretrained().optimizer" in code:
        adam = optax.with_extra_args_support(optax.adam(1e-3))
        stand_in = SimpleNamespace(optimizer=lambda predict_fn, loss_fn: adam)
        monkeypatch.setattr(mlhf_optax, "load_pretrained", lambda: stand_in)
        assert losses[-1] < 0.5 * losses_of(code, capsys)[-1]


def test_there_is_an_example_for_every_kind_of_user():
    headings = " ".join(heading for heading, _ in EXAMPLES)
    for word in ("linen", "nnx", "Any function", "Meta-training", "Learned optimizers of the literature"):
        assert word in headings


def test_the_table_of_the_info_names_its_fields():
    section = TEXT.split("## Reading the state")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert named == list(StepInfo._fields)


def test_the_numbers_are_those_of_the_results():
    script = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_short_enough_to_be_read():
    assert len(TEXT.splitlines()) <= 250


def test_links_into_the_project_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", TEXT)
    assert targets
    installed = Path(mlhf_optax.__file__).parents[1]
    for target in targets:
        # Outside the source tree the package lies where it is installed.
        root = installed if target.startswith("mlhf_optax/") else ROOT
        assert (root / target).is_file(), f"README.md links to {target}, which is not there"
