"""How the pages are built: `sphinx-build -W -n docs docs/_build`. Warnings are errors; nothing is fetched."""

import contextlib
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cards

import mlhf_optax

project = "mlhf-optax"
author = copyright = "The mlhf-optax authors"
release = version = mlhf_optax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = "mlhf-optax"
html_copy_source = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# Docstrings say what arguments are, with shapes and units; annotations written out would bury them.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # a NamedTuple's fields are not documented a second time as properties
napoleon_custom_sections = [("Source", "References")]

# Names of the project have to lead somewhere; those of other libraries are not looked up: no network.
nitpick_ignore_regex = [("py:.*", r"(?!mlhf_optax).*")]


def _name_in_code(app, env, node, contnode):
    """Shows a name of the project that has no entry in the reference as code, if there is such a thing."""
    module, _, name = node["reftarget"].rpartition(".")
    for way in (f"{module}:{name}", node["reftarget"]):
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            pkgutil.resolve_name(way)
            return contnode
    return None


def setup(app):
    """Writes what is generated before the pages are read."""
    app.connect("builder-inited", lambda app: cards.write(Path(app.srcdir) / "_generated"))
    app.connect("missing-reference", _name_in_code)
