"""What is public, that it is documented, what importing it loads, and who may import whom."""

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

# Modules that need nothing but arrays, and the optimizers that are made of them.
KERNELS = {"curvature", "losses", "pcg", "coordinate_lstm", "layer_types", "momentum", "safeguards"}
OPTIMIZERS = {
    "controls",
    "meta_params",
    "mlhf",
    "mlhf_step",
    "levenberg_marquardt",
    "hessian_free",
    "train_state",
}
CORE = KERNELS | OPTIMIZERS


def module_name(path):
    """`meta_training.replay` for its file; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported_names(tree):
    """Everything that is imported anywhere in a module, also inside functions, in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(tree):
    """The modules of the package that a module imports."""
    modules = set()
    for name in imported_names(tree):
        package, _, rest = name.partition(".")
        if package == "mlhf_optax":
            parent = rest.rpartition(".")[0]
            modules.add(rest if rest in FILES else parent)
    return modules


IMPORTS = {name: own_modules(tree) for name, tree in TREES.items()}


def reachable(name):
    """All modules that importing a module imports, itself included."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += IMPORTS[current] - {""}
    return seen


# Names.


def exports():
    """The names that `mlhf_optax/__init__.py` re-exports, with the modules they come from."""
    for node in ast.walk(TREES[""]):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mlhf_optax."):
            for alias in node.names:
                yield alias.name, node.module


EXPORTS = dict(exports())


def test_the_names_of_the_readme_are_there():
    expected = {
        "mlhf",
        "scale_by_mlhf",
        "ScaleByMLHFState",
        "MLHFInfo",
        "extend_meta_params",
        "init_meta_params",
        "MetaParams",
        "Settings",
    }
    expected |= {"hessian_free", "scale_by_hessian_free", "ScaleByHessianFreeState", "LevenbergMarquardt"}
    expected |= {
        "TrainState",
        "SoftmaxCrossEntropy",
        "SigmoidCrossEntropy",
        "SquaredError",
        "load_pretrained",
    }
    expected |= {
        "ggn_matvec",
        "pcg",
        "layer_types",
        "limit_update_ratio",
        "PAPER_SETTINGS",
        "AUTHORS_SETTINGS",
    }
    assert expected <= EXPORTS.keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlhf_optax.__version__)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_is_public_in_its_module_and_documented_with_an_example(name):
    module = importlib.import_module(EXPORTS[name])
    value = getattr(mlhf_optax, name)
    assert value is getattr(module, name)
    assert name in module.__all__
    if inspect.isfunction(value) or inspect.isclass(value):
        # Records explain their fields; all else shows its use, or says where it is shown.
        text = inspect.getdoc(value)
        assert "Attributes:" in text or re.search(r"Example:\n +(>>>|See :func:)", text)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mlhf_optax' has no attribute 'adam'"):
        mlhf_optax.adam  # noqa: B018


@pytest.mark.parametrize("name", sorted(CORE))
def test_every_public_name_of_the_core_is_listed_once_sorted_and_documented(name):
    tree = TREES[name]
    (listed,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    assert len(set(listed)) == len(listed)
    defined = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined.keys() <= set(listed)
    module = importlib.import_module(f"mlhf_optax.{name}")
    assert all(hasattr(module, public) for public in listed)
    assert all(ast.get_docstring(node) for node in defined.values())
    assert ast.get_docstring(tree)


def test_every_module_says_what_it_is():
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


# What importing loads.


def test_importing_the_package_loads_none_of_the_heavy_or_optional_libraries():
    unwanted = ["tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "rich", "tyro", "tqdm", "PIL"]
    unwanted += ["flax", "orbax", "grain", "pandas", "polars"]
    code = f"import sys, mlhf_optax; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_train_state_loads_flax_but_nothing_optional():
    unwanted = ["tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "tyro", "polars"]
    code = (
        "import sys; from mlhf_optax import TrainState; assert 'flax' in sys.modules; "
        f"print([m for m in {unwanted} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Who may import whom.


def test_imports_have_no_cycles():
    def visit(name, path):
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in IMPORTS[name] - {"", name}:
                visit(other, [*path, name])
            done.add(name)

    done = set()
    for name in IMPORTS:
        visit(name, [])


def test_kernels_import_only_kernels_and_optimizers_only_the_core():
    assert FILES.keys() >= CORE
    for name in CORE:
        allowed = KERNELS if name in KERNELS else CORE
        assert IMPORTS[name] - {""} <= allowed, name


@pytest.mark.parametrize("name", ["mlhf", *(name for name in FILES if name.startswith("meta_training"))])
def test_the_optimizer_and_its_meta_training_know_no_models_datasets_or_tasks(name):
    assert not [other for other in reachable(name) if other.startswith("tasks")]


def test_nobody_imports_the_command_line():
    importers = {name for name, modules in IMPORTS.items() if "cli" in modules}
    assert importers <= {"__main__"}


def test_no_private_parts_of_jax_or_optax_are_used():
    used = {name for tree in TREES.values() for name in imported_names(tree)}
    assert not [name for name in used if re.match(r"(jax|optax|flax|chex)\.(_|.*\._)", name)]


def test_nothing_of_the_package_imports_tests_or_benchmarks():
    used = {name.partition(".")[0] for tree in TREES.values() for name in imported_names(tree)}
    assert not used & {"tests", "benchmarks", "pytest"}
