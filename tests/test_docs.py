"""The pages: every example runs and trains, every public name has an entry, no card is missing."""

import re
import runpy
from pathlib import Path

import pytest
from examples import find_examples, find_links, loss_of_adam

import mlhf_optax
from mlhf_optax import StepInfo, learned, list_pretrained

pytestmark = pytest.mark.usefixtures("unoptimised")

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(
    page for page in DOCS.glob("**/*.md") if "_" not in {part[0] for part in page.relative_to(DOCS).parts}
)
EXAMPLES = [example for page in PAGES for example in find_examples(page)]


@pytest.mark.parametrize("example", [example.parameter() for example in EXAMPLES])
def test_example_runs_and_its_loss_falls(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # One of them adds an optimizer; other tests look at those that are there.
    monkeypatch.setattr(learned, "LEARNED", dict(learned.LEARNED))
    losses = example.run(capsys)
    if losses:
        assert losses[-1] < 0.5 * losses[0]
        if "load_pretrained().optimizer" in example.code and '"info"' not in example.code:  # Adam has none
            assert losses[-1] < loss_of_adam(example, monkeypatch, capsys)
    else:
        assert re.search(r"^ *assert ", example.code, re.M), "an example shows a loss that falls, or asserts"


def test_there_is_an_example_for_every_kind_of_user():
    headings = {example.heading for example in EXAMPLES}
    assert {"Flax linen", "Flax nnx", "Any function", "Many devices", "In your own loop"} <= headings
    assert {"A new controller", "A new learned optimizer", "A new benchmark"} <= headings
    with_example = {example.page for example in EXAMPLES}
    guides = {page for page in PAGES if page.parent.name == "guides" and page.stem not in ("index", "rl")}
    assert guides <= with_example


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(r":: mlhf_optax\.(\w+)$", text, re.M))
    exported = re.findall(
        r"^ *from \S+ import (\w+) as \1$", Path(mlhf_optax.__file__).read_text("utf-8"), re.M
    )
    assert {"mlhf", "TrainState", "PAPER_SETTINGS"} < set(exported) <= listed


def test_the_table_of_the_info_names_its_fields():
    section = (DOCS / "reading-info.md").read_text(encoding="utf-8").split("## The fields")[1]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert named == list(StepInfo._fields)


def test_the_walks_through_the_code_lead_through_what_is_there():
    package = Path(mlhf_optax.__file__).parent
    rows = re.findall(r"\| `([\w/]+\.py)` \| `(\w+)` \|", (DOCS / "layout.md").read_text(encoding="utf-8"))
    assert len(rows) == 12
    for file, name in rows:
        assert re.search(rf"^ *(def|class) {name}\b", (package / file).read_text(encoding="utf-8"), re.M), (
            name
        )


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in find_links(page):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}, which is not there"


def test_the_figures_of_the_info_are_drawn_by_their_script(tmp_path):
    runpy.run_path(str(DOCS / "plot_info.py"))["main"](tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "figures").iterdir()}


def test_there_is_a_card_for_each_set_of_meta_parameters(tmp_path):
    runpy.run_path(str(DOCS / "cards.py"))["write"](tmp_path)
    text = (tmp_path / "cards.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## `(\w+)`$", text, re.M)) == set(list_pretrained())
    for record in list_pretrained().values():
        assert record["command"] in text
        assert record["trained_on"] in text
