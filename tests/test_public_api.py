"""What is public, that it is documented, and what importing it loads; pyproject.toml has import contracts."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import mlhf_optax

PACKAGE = pathlib.Path(mlhf_optax.__file__).parent
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def exports():
    """The names that `mlhf_optax/__init__.py` re-exports, with the modules they come from."""
    for node in ast.walk(TREES[pathlib.Path("__init__.py")]):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mlhf_optax."):
            for alias in node.names:
                yield alias.name, node.module


EXPORTS = dict(exports())


def run_alone(code):
    """What a process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def imported_names(tree):
    """Everything that is imported anywhere in a module, also inside functions, in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_names_of_the_readme_are_there():
    expected = """
        mlhf gauss_newton hessian_free scale_by_damped_step load_pretrained save_meta_params TrainState
        SoftmaxCrossEntropy SquaredError layer_types PAPER_SETTINGS AUTHORS_SETTINGS
        scale_by_mlhf scale_by_hessian_free DampedStepState StepInfo LevenbergMarquardt Settings MetaParams
        init_meta_params extend_meta_params load_meta_params list_pretrained ggn_matvec pcg
        limit_update_ratio limit_growth SigmoidCrossEntropy Pretrained
    """
    assert set(expected.split()) - {"TrainState"} <= EXPORTS.keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlhf_optax.__version__)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_is_documented_with_an_example(name):
    value = getattr(mlhf_optax, name)
    assert value is getattr(importlib.import_module(EXPORTS[name]), name)
    if inspect.isfunction(value) or inspect.isclass(value):
        # Records explain their fields; all else shows its use.
        text = inspect.getdoc(value)
        assert "Attributes:" in text or re.search(r"Example:\n +(>>>|See :func:)", text)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mlhf_optax' has no attribute 'adam'"):
        mlhf_optax.adam  # noqa: B018


def test_every_module_and_every_public_name_in_it_says_what_it_is():
    silent = []
    for path, tree in TREES.items():
        named = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))]
        silent += [
            f"{path}: {getattr(node, 'name', 'the module')}"
            for node in named
            if not getattr(node, "name", "").startswith("_") and not ast.get_docstring(node)
        ]
    assert silent == []


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [("import mlhf_optax.experiments.cli", []), ("from mlhf_optax import TrainState", ["flax", "orbax"])],
)
def test_importing_loads_no_heavy_or_optional_library_that_it_does_not_need(statement, allowed):
    unwanted = ["tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "rich", "tyro", "tqdm", "PIL"]
    unwanted += ["flax", "orbax", "grain", "pandas", "polars"]
    unwanted = [name for name in unwanted if name not in allowed]
    optional = [name for name in unwanted if name != "rich" or not allowed]  # flax itself may load rich
    code = f"import sys; {statement}; print([m for m in {optional} if m in sys.modules])"
    assert run_alone(code).strip() == "[]"


USE = "import mlhf_optax; mlhf_optax.load_pretrained().optimizer(len, len)"


@pytest.mark.parametrize("statement", ["import mlhf_optax", "import mlhf_optax; dir(mlhf_optax)", USE])
def test_neither_import_nor_the_usual_call_loads_meta_training_rivals_tasks_or_experiments(statement):
    loaded = run_alone(f"{statement}\nimport sys\nprint(*sys.modules)").split()
    own = {name for name in loaded if name.startswith("mlhf_optax.")}
    apart = (
        "meta_training",
        "learned.literature",
        "learned.adam_rates",
        "tasks",
        "experiments",
        "train_state",
    )
    assert not [name for name in own if name.removeprefix("mlhf_optax.").startswith(apart)]
    assert not {"flax", "tensorflow", "matplotlib", "sklearn", "polars", "orbax"} & set(loaded)
    assert {"mlhf_optax.mlhf", "mlhf_optax.pretrained"} <= own
    assert len(own) <= 50
    assert ("mlhf_optax.learned.mlhf_general" in own) == (statement == USE)


def test_a_shipped_optimizer_loads_its_own_module_alone():
    code = "import sys, mlhf_optax; mlhf_optax.load_pretrained('l2l').optimizer(); print(*sys.modules)"
    own = {name for name in run_alone(code).split() if name.startswith("mlhf_optax.learned.literature.")}
    assert own == {f"mlhf_optax.learned.literature.{name}" for name in ("l2l", "cells")}


def test_importing_takes_little_longer_than_importing_jax_and_optax():
    clock = "import time\nstart = time.process_time()\nimport {}\nprint(time.process_time() - start)"
    seconds = {"optax, jax": [], "mlhf_optax": []}
    for _ in range(5):
        for names, times in seconds.items():  # in turn, so that what else runs slows both
            times.append(float(run_alone(clock.format(names))))
    assert min(seconds["mlhf_optax"]) <= 1.3 * min(seconds["optax, jax"])


def test_names_that_are_loaded_late_are_listed():
    assert EXPORTS.keys() <= set(dir(mlhf_optax))
    late = {"lodo", "LODOState", "TrainState"}
    code = (
        f"import mlhf_optax as m; print(not {late} & m.__dict__.keys(), m.lodo.__name__, 'lodo' in vars(m))"
    )
    assert run_alone(code).split() == ["True", "lodo", "True"]


def test_no_private_parts_of_jax_or_optax_and_no_tests_are_used():
    used = {name for tree in TREES.values() for name in imported_names(tree)}
    assert not [name for name in used if re.match(r"(jax|optax|flax|chex)\.(_|.*\._)", name)]
    assert not {name.partition(".")[0] for name in used} & {"tests", "benchmarks", "pytest"}
