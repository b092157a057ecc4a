"""The benchmarks of a training step and of a meta-training step, on a network of one layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import meta_step_time
import meta_training_processes
import numpy as np
import pytest
import step_contenders
import step_memory
import step_time
from experiment import parse_options
from jax.flatten_util import ravel_pytree

from mlhf_optax.tasks import MLP

pytestmark = pytest.mark.usefixtures("unoptimised")

OPTIMIZERS = [
    *("sgd", "adam", "muon", "general", "gauss-newton-diagonal"),
    *("mlhf", "mlhf-quarter", "hessian-free-20"),
]


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    """A network that compiles quickly; the cache of programs is as it was afterwards."""
    monkeypatch.setitem(step_contenders.NETWORKS, "linear", (MLP(()), (2, 2, 1), (8,)))
    before = jax.config.values["jax_enable_compilation_cache"]
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture
def task():
    return step_contenders.make_task("linear")


@pytest.fixture
def params(task):
    return task.init_fn(jax.random.key(0))


def test_parts_do_what_their_names_say(task, params):
    batch = step_contenders.draw_batch("linear", 8)
    parts = step_contenders.part_contenders(task, params)
    gradient = parts["gradient"].advance(parts["gradient"].state, batch)[1]
    expected = jax.grad(step_contenders.loss, 1)(task, params, batch)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], ravel_pytree(expected)[0])
    one, many = (parts[name].advance(parts[name].state, batch)[1] for name in ("one_product", "products"))
    # Of a model that is linear in its parameters the GGN is the Hessian.
    flat, unravel = ravel_pytree(params)
    matrix = jnp.eye(flat.size) + jax.hessian(lambda x: step_contenders.loss(task, unravel(x), batch))(flat)
    for result, power in ((one, 1), (many, step_contenders.NUM_CG_STEPS + 1)):
        expected = np.linalg.matrix_power(np.asarray(matrix), power) @ flat
        np.testing.assert_allclose(ravel_pytree(result)[0], expected, rtol=1e-4, atol=1e-5)
    # Those of `general` are on a quarter of the batch, the first of every four.
    part = jax.tree.map(lambda leaf: leaf[::4], batch)
    loss = lambda x: step_contenders.loss(task, unravel(x), part)
    expected = np.linalg.matrix_power(np.asarray(jnp.eye(flat.size) + jax.hessian(loss)(flat)), 3) @ flat
    result = parts["general_products"].advance(parts["general_products"].state, batch)[1]
    np.testing.assert_allclose(ravel_pytree(result)[0], expected, rtol=1e-4, atol=1e-5)
    after = jax.eval_shape(parts["lstm"].advance, parts["lstm"].state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, parts["lstm"].state)


def test_without_somax_its_row_is_left_out(monkeypatch, task, params):
    monkeypatch.setitem(sys.modules, "somax", None)
    assert list(step_contenders.step_contenders(task, params)) == OPTIMIZERS


def test_step_time_trains_with_every_optimizer_and_writes_rows_parts_and_figure(
    monkeypatch, tmp_path, capsys, task, params
):
    monkeypatch.setitem(sys.modules, "somax", None)
    runners, make = [], step_time.Runner
    monkeypatch.setattr(step_time, "Runner", lambda *given: runners.append(make(*given)) or runners[-1])
    files = ["--json", str(tmp_path / "step.json"), "--figure", str(tmp_path / "step.png")]
    step_time.main(["--tasks", "linear", "--batches", "4", "--repeats", "1", *files])
    batch = step_contenders.draw_batch("linear", 4)
    trained = [params, *(runner.state[0] for runner in runners[: len(OPTIMIZERS)])]
    start, *losses = (step_contenders.loss(task, one, batch) for one in trained)
    assert max(losses) < start
    report = json.loads((tmp_path / "step.json").read_text())
    assert {"machine", "versions", "date", "rows", "parts", "targets", "notes"} <= set(report)
    assert report["command"].startswith("python benchmarks/step_time.py --tasks linear")
    assert [row["optimizer"] for row in report["rows"]] == OPTIMIZERS
    for row in report["rows"]:
        assert (row["task"], row["batch"], row["compilations"], row["finite"]) == ("linear", 4, 1, True)
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["compile_seconds"] > 0
    assert report["rows"][0]["ratio_to_sgd"] == 1.0
    (part,) = report["parts"]
    times = {"gradient", "ggn_product", "products", "general_products", "lstm"}
    assert set(part) == {"task", "batch", *times, "mlhf_over_parts", "general_over_parts"}
    assert (tmp_path / "step.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "compiled more than once" not in printed
    for text in ("mlhf / (gradient + products)", *report["notes"], "python-somax is not installed"):
        assert text in printed


def test_targets_are_judged_where_they_were_measured():
    def row(optimizer, task, batch, ratio, first):
        return {
            **{"optimizer": optimizer, "task": task, "batch": batch, "ratio_to_sgd": ratio},
            **{"seconds": 1.0, "compile_seconds": first - 1.0},
        }

    rows = [
        row("sgd", "cuda-convnet", 128, 1.0, 2.0),
        row("mlhf", "cuda-convnet", 128, 6.5, 9.0),
        row("mlhf-quarter", "cuda-convnet", 128, 2.4, 9.0),
        row("adam", "mlp-784-512x3-10", 1024, 2.0, 2.0),
        row("general", "mlp-784-512x3-10", 1024, 5.2, 20.0),
        row("adam", "transformer", 128, 1.0, 2.0),
        row("general", "transformer", 128, 1.0, 9.0),
        row("general", "resnet9", 128, 1.0, 16.0),
    ]
    part = {"task": "cuda-convnet", "batch": 128, "mlhf_over_parts": 1.1, "general_over_parts": 1.2}
    found = {target["target"]: (target["value"], target["met"]) for target in step_time.targets(rows, [part])}
    assert found == {
        "general / adam, mlp-784-512x3-10, batch 1024": (2.6, False),
        "mlhf / sgd, cuda-convnet, batch 128": (6.5, False),
        "mlhf-quarter / sgd, cuda-convnet, batch 128": (2.4, True),
        "seconds of the first call of mlhf, cuda-convnet, batch 128": (9.0, True),
        "first call over that of adam, general, transformer, batch 128": (4.5, True),
        "seconds of the first call of general, resnet9, batch 128": (16.0, False),
        "mlhf / (gradient + products), cuda-convnet, batch 128": (1.1, True),
        "general / (gradient + products), cuda-convnet, batch 128": (1.2, False),
    }
    assert step_time.targets([rows[1] | {"task": "linear"}], [part | {"task": "linear"}]) == []


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (step_time, ["--tasks", "digits-mlp", "cnn"], "--tasks: there is no cnn; there are digits-mlp"),
        (step_time, ["--batches", "64", "0"], "numbers of examples such as 64 128, got (64, 0)"),
        (step_time, ["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (step_memory, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (meta_step_time, ["--tasks", "resnet9"], "there is no resnet9; there are digits-mlp"),
        (meta_step_time, ["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_wanted(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_configurations_grow_one_number_at_a_time():
    base, *others = meta_step_time.configurations("cuda-convnet")
    assert base == ("cuda-convnet", 64, 10, 4, 1)
    assert len(others) == 6
    assert all(sum(a != b for a, b in zip(base, other, strict=True)) == 1 for other in others)


def test_meta_step_time_measures_and_writes(monkeypatch, tmp_path, capsys):
    configuration = ("linear", 4, 2, 1, 2)
    meta_step_time.main(["--worker", json.dumps(configuration), "--repeats", "1"])
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tuple(measured[name] for name in meta_step_time.Configuration._fields) == configuration
    for name in ("seconds_per_inner_step", "sgd_seconds", "ratio", "compile_seconds", "peak_bytes"):
        assert measured[name] > 0

    def fake(configuration, repeats):
        return measured | configuration._asdict()

    monkeypatch.setattr(meta_step_time, "measure_in_process", fake)
    files = ["--json", str(tmp_path / "meta.json"), "--figure", str(tmp_path / "meta.png")]
    meta_step_time.main(files)
    report = json.loads((tmp_path / "meta.json").read_text())
    assert {"machine", "versions", "command", "date", "rows", "targets"} <= set(report)
    assert len(report["rows"]) == 14
    (target,) = report["targets"]
    assert (target["value"], target["limit"]) == (measured["ratio"], 22.0)
    assert (tmp_path / "meta.png").stat().st_size > 0


def test_a_configuration_is_measured_in_a_process_of_its_own_and_a_failure_reported(monkeypatch):
    configuration, seen = meta_step_time.Configuration("unknown", 4), []

    def run(command, **options):
        seen.append(command)
        said = {"stdout": 'noise\n{"ratio": 2}\n', "stderr": "KeyError: 'unknown'"}
        return subprocess.CompletedProcess(command, len(seen) - 1, **said)

    monkeypatch.setattr(subprocess, "run", run)
    assert meta_step_time.measure_in_process(configuration, repeats=1) == {"ratio": 2}
    python, script, *arguments = seen[0]
    assert (python, Path(script).name) == (sys.executable, "meta_step_time.py")
    options = parse_options(meta_step_time.Options, None, arguments)
    assert (meta_step_time.Configuration(*json.loads(options.worker)), options.repeats) == (configuration, 1)
    with pytest.raises(RuntimeError, match=r"(?s)task='unknown'.*status 1.*KeyError"):
        meta_step_time.measure_in_process(configuration, repeats=1)


def test_ways_to_train_are_measured_in_processes_that_keep_memory_or_not(tmp_path, monkeypatch, capsys):
    seen = []

    def run(command, **options):
        worker = step_memory.Worker(*json.loads(command[-1]))
        is_kept = step_memory.KEPT.items() <= options["env"].items()
        assert is_kept == (worker.way == "kept")
        seen.append(worker)
        seconds = {"adam": 1.0, "general": 8.0}[worker.optimizer] / (2.0 if worker.way == "scan" else 1.0)
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{seconds} {len(seen)}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # of a user that has read the README
    path = tmp_path / "out.json"
    step_memory.main(["--repeats", "2", "--json", str(path), "--figure", str(tmp_path / "out.png")])
    rows = json.loads(path.read_text())["rows"]
    assert len(seen) == 2 * len(rows) == 12
    found = {(row["optimizer"], row["way"]): (row["seconds"], row["over_adam"]) for row in rows}
    assert (found["general", "called"], found["general", "scan"]) == ((8.0, 8.0), (4.0, 8.0))
    assert rows[3]["page_faults"] == (4 + 10) / 2
    assert "memory kept" in capsys.readouterr().out
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no memory")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(RuntimeError, match=r"(?s)'adam', 'called'.*no memory"):
        step_memory.measure(step_memory.Worker("adam", "called", (8, 4), 8, 2))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit, match="for Linux; this is darwin"):
        step_memory.main([])


@pytest.mark.parametrize("optimizer", step_memory.OPTIMIZERS)
def test_steps_called_one_by_one_and_scanned_train_alike(optimizer):
    ends = []
    for way in ("called", "scan"):
        run, state = step_memory.training(step_memory.Worker(optimizer, way, (6, 3), 8, 4))
        start = jax.tree.map(jnp.copy, state[0])
        ends.append(ravel_pytree(run(state)[0])[0])
        assert not np.allclose(ends[-1], ravel_pytree(start)[0])
    np.testing.assert_allclose(*ends, atol=1e-3)  # general amplifies rounding


def test_the_speed_up_of_two_processes_is_that_within_a_round(tmp_path, monkeypatch, capsys):
    seconds = {"one": iter([2.0, 3.0, 4.0]), "two": iter([1.0, 2.0, 4.0]), "apart": iter([1.0, 1.0, 1.0])}
    monkeypatch.setattr(meta_training_processes, "TRAINERS", ("meta_step",))
    monkeypatch.setattr(meta_training_processes, "measure", lambda trainer, way, options: next(seconds[way]))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = tmp_path / "out.json"
    meta_training_processes.main(["--json", str(path), "--figure", str(tmp_path / "out.png")])
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["one"], row["two"], row["two_speed_up"], row["apart_speed_up"]) == (3.0, 2.0, 1.5, 3.0)
    assert "meta_step" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--trainings must be even"):
        meta_training_processes.main(["--trainings", "3"])


def test_a_process_that_shares_nothing_has_half_of_the_trainings():
    worker = meta_training_processes.Worker("meta_step", "apart", 0, 0, "digits-mlp", 4, 6, 2, 1)
    _, state, batches = meta_training_processes.algorithm(worker)
    assert batches["label"].shape == (3, 3, 4)
    assert state.trainings.age.shape == (3,)
