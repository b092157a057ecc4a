"""The benchmarks of GGN products in loops and of the LSTMs run, and write what they promise."""

import json
from pathlib import Path
from types import SimpleNamespace

import ggn_in_loops
import jax
import jax.numpy as jnp
import lstm_throughput
import pytest

pytestmark = pytest.mark.usefixtures("unoptimised")


def run(module, tmp_path, *arguments):
    """Runs a script; returns its report."""
    figure, path = tmp_path / "figure.png", tmp_path / "report.json"
    arguments = [*arguments, "--json", str(path), "--figure", str(figure)]
    module.main(arguments)
    assert figure.read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    assert report.keys() >= {"machine", "versions", "command", "date"}
    assert report["command"].startswith(f"python benchmarks/{module.__name__}.py {arguments[0]}")
    return report


# GGN products in ggn_in_loops.


def test_every_layer_gets_a_row_for_each_kind_of_loop(tmp_path, capsys):
    layers = ["dense", "pooling 2x2", "conv 3x3 stride 2 (lax)", "conv 1x1 stride 1"]
    small = ["--batch-size", "2", "--products", "2", "--repeats", "1"]
    report = run(ggn_in_loops, tmp_path, "--layers", *layers, *small)
    found = [(row["layer"], row["loop"]) for row in report["rows"]]
    assert found == [(layer, loop) for layer in layers for loop in ("fori_loop", "scan")]
    for row in report["rows"]:
        assert min(row["inside"], row["outside"], row["ratio"]) > 0
        assert row["inside_spread"][0] <= row["inside"] <= row["inside_spread"][1]
    shown = capsys.readouterr().out
    assert all(layer in shown for layer in layers)
    assert "target of 1.2" in shown


@pytest.mark.parametrize("name", ["conv 3x3 stride 1", "conv 5x5 of images", "batch norm", "attention"])
def test_inside_and_outside_of_loops_the_chain_is_the_same(name):
    predict_fn, params, batch = ggn_in_loops.problem(ggn_in_loops.LAYERS[name], 2)
    run = lambda kind: jax.jit(ggn_in_loops.make_chain(kind, predict_fn, 3))(params, batch)
    outside = run("outside")
    for kind in ggn_in_loops.LOOPS:
        gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b), initial=0.0), run(kind), outside)
        assert jax.tree.structure(gaps) == jax.tree.structure(params)
        assert max(jax.tree.leaves(gaps)) < 1e-4


def test_only_the_inputs_of_the_first_layer_have_no_tangents():
    for name, has_gain in (("conv 5x5 of images", False), ("conv 1x1 stride 1", True)):
        assert ("gain" in ggn_in_loops.problem(ggn_in_loops.LAYERS[name], 1)[1]) == has_gain


def test_the_verdict_names_the_convolutions_above_the_target():
    names = ("layer", "ratio", "is_rival", "loop")
    row = lambda layer, ratio, is_rival=False: dict(zip(names, (layer, ratio, is_rival, "scan"), strict=True))
    rows = [row("dense", 9.0), row("conv a", 1.1), row("conv b (lax)", 30.0, True)]
    assert ggn_in_loops.verdict(rows) == "All convolutions of the library reach the target of 1.2."
    assert "conv c in scan (1.30)." in ggn_in_loops.verdict([*rows, row("conv c", 1.3)])
    assert "No convolution" in ggn_in_loops.verdict(rows[:1])


# The LSTMs.


def test_every_size_dtype_and_kind_of_features_gets_a_row(tmp_path, capsys):
    report = run(lstm_throughput, tmp_path, "--coordinates", "50", "--repeats", "1")
    found = [(row["coordinates"], row["carry_dtype"], row["features"]) for row in report["rows"]]
    dtypes, features = ("float32", "bfloat16"), ("log-global", "tanh")
    assert found == [(50, dtype, kind) for dtype in dtypes for kind in features]
    for row in report["rows"]:
        assert min(row[f"{name}_ns"] for name in ("forward", "gradient", "floor")) > 0
        assert row["forward_ratio"] > 0
    assert report["floor"] in ("evaluations", "copies")
    assert "within 2 times the floor in" in capsys.readouterr().out


def test_what_has_no_room_is_skipped_with_a_note(monkeypatch, tmp_path, capsys):
    programs = []
    needed = lambda program: programs.append(program) or len(programs)
    monkeypatch.setattr(lstm_throughput, "needed_memory", needed)
    monkeypatch.setattr(lstm_throughput, "free_memory", lambda: 1)
    monkeypatch.setattr(lstm_throughput, "SETTINGS", {"tanh": lstm_throughput.SETTINGS["tanh"]})
    assert lstm_throughput.measure(10, "float32", "tanh", lstm_throughput.copies, 1) is None
    assert "10 coordinates, float32, tanh: gradient needs" in capsys.readouterr().out


def test_a_gradient_without_room_leaves_the_other_numbers(monkeypatch):
    sizes = iter([1, 3, 1])
    monkeypatch.setattr(lstm_throughput, "needed_memory", lambda program: next(sizes))
    monkeypatch.setattr(lstm_throughput, "free_memory", lambda: 2)
    row = lstm_throughput.measure(10, "float32", "tanh", lstm_throughput.copies, 1)
    assert row["gradient_ns"] is None
    assert row["forward_ns"] > 0


def test_the_floor_keeps_the_carries_and_evaluates_as_many_functions_as_a_step():
    carries, inputs = lstm_throughput._arrays(7, "bfloat16")
    settings = lstm_throughput.SETTINGS["tanh"]
    meta_params = lstm_throughput.init_meta_params(jax.random.key(0), settings, layer_types=["dense_kernel"])
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for name in ("forward", "gradient", "evaluations", "copies"):
        step = getattr(lstm_throughput, name)
        assert shapes(jax.eval_shape(step, meta_params, carries, inputs)[1]) == shapes(carries)
    steps = (lstm_throughput.forward, lstm_throughput.evaluations)
    counts = [count_evaluations(step, meta_params, carries, inputs) for step in steps]
    assert counts == [7 * (80 + 3 + 3 + 2), 7 * (80 + 3 + 2)]  # LSTM_p makes its 3 features anew


def count_evaluations(function, *arguments):
    """Number of elements that go through tanh, sigmoid, exp and log."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            result = equation.outvars[0].aval
            if equation.primitive.name in ("tanh", "logistic", "exp", "log") and result.shape:
                total += result.size
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    total += count(inner.jaxpr)
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_memory_counts_donated_arrays_once_and_is_that_of_the_device_else_of_the_system(monkeypatch):
    shape = jax.ShapeDtypeStruct((1000,), jnp.float32)
    program = lambda **options: jax.jit(lambda x: x + 1, **options).lower(shape).compile()
    assert lstm_throughput.needed_memory(program()) >= 8000
    assert 4000 <= lstm_throughput.needed_memory(program(donate_argnums=0)) < 8000
    if Path("/proc/meminfo").is_file() and jax.default_backend() == "cpu":
        assert 2**20 < lstm_throughput.free_memory() < 2**50
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10, "bytes_in_use": 3})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert lstm_throughput.free_memory() == 7
