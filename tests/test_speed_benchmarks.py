"""The parts that the benchmarks of speed time, their targets, and their processes."""

import contenders
import jax
import jax.numpy as jnp
import meta_step_time
import numpy as np
import pytest
import scaling
import step_memory
import step_time
from jax.flatten_util import ravel_pytree

from mlhf_optax.experiments import scripts
from mlhf_optax.tasks import MLP

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    """A network that compiles quickly; the cache of programs is as it was afterwards."""
    monkeypatch.setitem(contenders.NETWORKS, "linear", (MLP(()), (2, 2, 1), (8,)))
    before = jax.config.values["jax_enable_compilation_cache"]
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture
def task():
    return contenders.make_task("linear")


@pytest.fixture
def params(task):
    return task.init_fn(jax.random.key(0))


def test_parts_do_what_their_names_say(task, params):
    batch = contenders.draw_batch("linear", 8)
    parts = contenders.part_contenders(task, params)
    gradient = parts["gradient"].advance(parts["gradient"].state, batch)[1]
    expected = jax.grad(contenders.loss, 1)(task, params, batch)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], ravel_pytree(expected)[0])
    one, many = (parts[name].advance(parts[name].state, batch)[1] for name in ("one_product", "products"))
    # Of a model that is linear in its parameters the GGN is the Hessian.
    flat, unravel = ravel_pytree(params)
    matrix = jnp.eye(flat.size) + jax.hessian(lambda x: contenders.loss(task, unravel(x), batch))(flat)
    for result, power in ((one, 1), (many, contenders.NUM_CG_STEPS + 1)):
        expected = np.linalg.matrix_power(np.asarray(matrix), power) @ flat
        np.testing.assert_allclose(ravel_pytree(result)[0], expected, rtol=1e-4, atol=1e-5)
    # Those of `general` are on a quarter of the batch, the first of every four.
    part = jax.tree.map(lambda leaf: leaf[::4], batch)
    loss = lambda x: contenders.loss(task, unravel(x), part)
    expected = np.linalg.matrix_power(np.asarray(jnp.eye(flat.size) + jax.hessian(loss)(flat)), 3) @ flat
    result = parts["general_products"].advance(parts["general_products"].state, batch)[1]
    np.testing.assert_allclose(ravel_pytree(result)[0], expected, rtol=1e-4, atol=1e-5)
    after = jax.eval_shape(parts["lstm"].advance, parts["lstm"].state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, parts["lstm"].state)


def test_every_optimizer_trains_in_a_step(task, params):
    batch = contenders.draw_batch("linear", 4)
    start = contenders.loss(task, params, batch)
    for name, (advance, state) in contenders.step_contenders(task, params).items():
        assert contenders.loss(task, jax.jit(advance)(state, batch)[0], batch) < start, name


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


def test_configurations_grow_one_number_at_a_time():
    base, *others = meta_step_time.configurations("cuda-convnet")
    assert base == ("cuda-convnet", 64, 10, 4, 1)
    assert len(others) == 6
    assert all(sum(a != b for a, b in zip(base, other, strict=True)) == 1 for other in others)


def test_ways_to_train_are_measured_in_processes_that_keep_memory_or_not(monkeypatch):
    seen = []

    def run(script, worker, environment):
        assert (step_memory.KEPT.items() <= environment.items()) == (worker.way == "kept")
        seen.append(worker)
        return {"adam": 1.0, "general": 8.0}[worker.optimizer] / (2 if worker.way == "scan" else 1), len(seen)

    monkeypatch.setattr(step_memory, "in_fresh_process", run)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # of a user that has read the README
    found = {}
    monkeypatch.setattr(scripts.BenchmarkOptions, "report", lambda *given, **content: found.update(content))
    step_memory.main(["--repeats", "2"])
    rows = {(row["optimizer"], row["way"]): (row["seconds"], row["over_adam"]) for row in found["rows"]}
    assert len(seen) == 2 * len(rows) == 12
    assert (rows["general", "called"], rows["general", "scan"]) == ((8.0, 8.0), (4.0, 8.0))
    assert found["rows"][3]["page_faults"] == (4 + 10) / 2
    monkeypatch.setattr(step_memory.sys, "platform", "darwin")
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


def test_collectives_are_counted_with_their_bytes_and_cost_time():
    found = scaling.collectives("%a = (f32[4,2]{1,0}, f32[]) all-reduce(%b, %c), channel_id=1")
    assert found == {"all-reduce": (1, 36)}
    options = scaling.Options(bandwidth=1e3, latency=0.5, peak=100.0, utilization=0.5)
    assert scaling.predicted_efficiency(1, 50.0, 50.0, {}, options) == 1.0
    # 1 s of computing, half a second of latency, and 2 * 3/4 * 36 bytes.
    seconds = 1 + 0.5 + 1.5 * 36 / 1e3
    assert scaling.predicted_efficiency(4, 50.0, 50.0, found, options) == pytest.approx(1 / seconds)
