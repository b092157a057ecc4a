"""Examples in Markdown: every fenced Python block of the READMEs and of docs/ runs as printed.

A comment in the line before a block says how:

    <!-- goes on -->         the block uses the names of the one before it; else it stands alone
    <!-- needs: diffrax -->  it is skipped, with this reason, where the library is missing
"""

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import optax
import pytest

import mlhf_optax

_BLOCKS = re.compile(
    r"^#+ (?P<heading>[^\n]+)$|(?P<notes>(?:^<!--[^\n]*-->\n)*)^```python\n(?P<code>.*?)^```$", re.M | re.S
)


class Example(NamedTuple):
    """One program: a block, and those that go on from it."""

    page: Path
    heading: str
    code: str
    needs: tuple[str, ...]

    def run(self, capsys) -> list[float]:
        """Runs it as a script in the current folder, and returns the losses that it prints."""
        for library in self.needs:
            if importlib.util.find_spec(library) is None:
                pytest.skip(f"{library} is not installed")
        before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_compilation_cache_dir")}
        script, arguments = Path("example.py"), sys.argv
        script.write_text(self.code, encoding="utf-8")
        try:
            sys.argv = [str(script)]
            runpy.run_path(str(script), run_name="__main__")
        finally:
            sys.argv = arguments
            for name, value in before.items():  # which some of them set
                jax.config.update(name, value)
        return [float(number) for number in re.findall(r"loss (\d\S*)", capsys.readouterr().out)]

    def parameter(self):
        """Returns it as a parameter of a test."""
        return pytest.param(self, id=f"{self.page.stem}-{self.heading}".replace(" ", "-"))


def find_examples(page: Path) -> list[Example]:
    """Returns the examples of a page."""
    found: list[Example] = []
    heading = "start"
    for match in _BLOCKS.finditer(page.read_text(encoding="utf-8")):
        if match["heading"]:
            heading = match["heading"]
            continue
        needs = tuple(re.findall(r"needs: ([\w.]+)", match["notes"]))
        if "goes on" in match["notes"]:
            before = found.pop()
            found.append(before._replace(code=before.code + match["code"], needs=before.needs + needs))
        else:
            found.append(Example(page, heading, match["code"], needs))
    return found


def loss_of_adam(example: Example, monkeypatch, capsys) -> float:
    """Returns the last loss of an example with untuned Adam in the place of `load_pretrained()`."""
    adam = optax.with_extra_args_support(optax.adam(1e-3))
    stand_in = SimpleNamespace(optimizer=lambda predict_fn, loss_fn, **arguments: adam)
    monkeypatch.setattr(mlhf_optax, "load_pretrained", lambda: stand_in)
    return example.run(capsys)[-1]


def find_links(page: Path) -> list[str]:
    """Returns the relative links of a page, without anchors."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\((?!https?://|#)([^)\s#]+)(?:#[^)\s]*)?\)", text)
