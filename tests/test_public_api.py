"""The surface: what is exported is there and explained, and imports point one way."""

import ast
import importlib
import inspect
import pkgutil
from importlib import metadata, resources
from pathlib import Path

import pytest

import mlhf_optax

FOLDER = Path(mlhf_optax.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mlhf_optax.__path__, "mlhf_optax.")
    if not module.name.endswith("__main__")
)
# Modules may import from their own layer and from those above it in this list.
LAYERS = (
    {"curvature", "pcg", "coordinate_lstm", "layer_types", "losses", "safeguards", "convolution", "machine"},
    {
        "meta_params",
        "meta_params_io",
        "pretrained",
        "mlhf",
        "levenberg_marquardt",
        "hessian_free",
        "train_state",
    },
    {"meta_training"},
    {"models", "datasets", "first_order"},
    {"tasks"},
    {"training", "inner_training", "timing", "results", "comparison", "tables", "figures"},
    {"cli", "commands", "train_command", "meta_train_command", "__main__"},
)


def public_objects():
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in getattr(module, "__all__", ()):
            found = getattr(module, attribute)
            if inspect.isclass(found) or inspect.isfunction(found):
                yield pytest.param(found, id=f"{name}.{attribute}")


@pytest.mark.parametrize("found", list(public_objects()))
def test_everything_exported_is_explained(found):
    text = inspect.getdoc(found) or ""
    assert text.split("\n")[0].endswith(".")


@pytest.mark.parametrize("name", [name for name in mlhf_optax.__dict__ if not name.startswith("_")])
def test_names_at_the_top_are_public_where_they_are_defined(name):
    found = getattr(mlhf_optax, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert name in importlib.import_module(found.__module__).__all__


def test_version_and_marker_of_types_are_installed():
    assert metadata.version("mlhf-optax") == mlhf_optax.__version__
    assert (resources.files(mlhf_optax) / "py.typed").is_file()


def imports_of(path):
    """The modules of this package that a file imports, also inside functions, by their first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mlhf_optax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlhf_optax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("mlhf_optax."))


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_imports_point_one_way(path):
    own = path.relative_to(FOLDER).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    assert own in level, f"say in LAYERS where {own} belongs"
    above = [name for name in imports_of(path) if level.get(name, -1) > level[own]]
    assert not above, f"{own} imports {above}, which are built on it"


def test_meta_training_knows_no_models_and_no_data():
    names = {name for path in (FOLDER / "meta_training").glob("*.py") for name in imports_of(path)}
    assert names
    assert not names & {"models", "datasets", "tasks"}
