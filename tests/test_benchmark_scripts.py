"""Every benchmark script runs with its smallest options, prints its table, and writes what it promises."""

import json
import sys

import ablation_preconditioner
import deterministic
import first_order_cifar10
import held_out
import jax
import learned_optimizers
import lodo_tasks
import meta_step_time
import numpy as np
import pytest
import rivals
import scaling
import second_order_cifar10
import step_memory
import step_time
import ten_times_horizon
import to_the_end
import transfer_resnet18
import untuned
import width_depth
from blobs import TASK

from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.experiments import engine, scripts
from mlhf_optax.pretrained import save_meta_params
from mlhf_optax.tasks import MLP, Dataset, mnist
from mlhf_optax.tasks.data import freeze

pytestmark = pytest.mark.usefixtures("unoptimised")

CONVNET = ["--epochs", "1", "--seeds", "1", "--meta-params", "untrained", "--curvature-share", "0"]
SPEED = ["--repeats", "1"]
# Script, arguments, and what it writes.
RUNS = {
    "first order": (first_order_cifar10, [*CONVNET, "--only", "mlhf", "adam"], "results.json figure.png"),
    "second order": (
        second_order_cifar10,
        [*CONVNET, "--only", "mlhf", "hf-fixed"],
        "results.json figure.png",
    ),
    "resnet": (transfer_resnet18, [*CONVNET, "--examples", "16", "--only", "adam", "mlhf"], "results.json"),
    "ablation": (
        ablation_preconditioner,
        ["--passes", "0.1", "--batch-size", "4", "--solver-steps", "2"],
        "results.json figure.png",
    ),
    "held out": (
        held_out,
        ["--tasks", "diabetes", "--steps", "4", "--learned", "lodo", "--meta-params", "general"],
        "results.json figure.png learned.png",
    ),
    "untuned": (
        untuned,
        [
            *(
                "--tasks",
                "diabetes",
                "flow",
                "--steps",
                "4",
                "--tuned-on",
                "diabetes",
                "--meta-params",
                "general",
            ),
            *("--rivals", "adam", "schedule-free", "momo", "nadamw", "psgd-kron", "lodo"),
        ],
        "results.json figure.png",
    ),
    "end": (
        to_the_end,
        [
            *("--quick", "--steps", "4", "--records", "2", "--meta-params", "general"),
            *("--families", "MLHF", "MLHF, both", "AdamW", "schedule-free AdamW"),
        ],
        "results.json figure.png",
    ),
    "width and depth": (
        width_depth,
        ["--kinds", "tanh", "--widths", "4", "--depths", "2", "--steps", "3", "--meta-params", "general"],
        "results.json figure.png",
    ),
    "horizon": (
        ten_times_horizon,
        ["--tasks", "diabetes", "--steps", "8", "--records", "4", "--meta-params", "general"],
        "results.json figure.png",
    ),
    "literature": (
        learned_optimizers,
        ["--quick", "--optimizers", "adam", "--activations", "sigmoid", "tanh"],
        "results.json figure.png",
    ),
    "bowl": (lodo_tasks, ["--task", "bowl", "--steps", "20"], "bowl.json"),
    "deterministic": (
        deterministic,
        [
            "--quick",
            "--seconds",
            "0.01",
            "--problems",
            "heat",
            "nist",
            "--optimizers",
            "full_batch=True",
            "Adam",
        ],
        "results.json figure.png",
    ),
    "step": (step_time, [*SPEED, "--tasks", "linear", "--batches", "4"], "results.json figure.png"),
    "memory": (step_memory, SPEED, "results.json figure.png"),
    "meta step": (meta_step_time, [*SPEED, "--tasks", "digits-mlp"], "results.json figure.png"),
    "scaling": (
        scaling,
        [*SPEED, "--devices", "1", "--batch", "8", "--width", "4", "--cg-steps", "1", "--timed"],
        "results.json figure.png",
    ),
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Blobs, noise, a linear network and no waiting for clocks, in the place of what a script works on."""
    for script in (first_order_cifar10, second_order_cifar10):
        monkeypatch.setattr(script.Options, "make_task", lambda *given, **how: TASK)
    monkeypatch.setattr(transfer_resnet18, "get_task", lambda *given, **how: TASK)
    monkeypatch.setattr(ablation_preconditioner, "make_task", lambda options: TASK)
    monkeypatch.setattr(engine, "seconds_per_step", lambda task, optimizers: dict.fromkeys(optimizers, 0.5))
    for script in (rivals, untuned):
        monkeypatch.setattr(script, "RATES", {"adam": [1e-2], "sgd": [1e-1], "muon": [1e-2]})
    monkeypatch.setattr(to_the_end, "GRIDS", {"AdamW": ((1e-2,), (0.1,))})
    monkeypatch.setattr(to_the_end, "_OWN_DECAYS", (1e-3,))
    monkeypatch.setattr(to_the_end, "_DECAYS", (0.0,))
    record = {"optimizer": "mlhf_general", "learning_rate": 1.0, "num_cg_steps": 2, "batch_size": 64}
    record |= {"task": "none", "max_update_ratio": 0.25}
    save_meta_params(tmp_path / "general", init_tensor_lstm(jax.random.key(0)), record)

    def noise(data_dir=None, cache_dir=None, size=28):
        part = freeze(
            image=np.random.default_rng(0).random((300, size, size, 1), np.float32),
            label=np.arange(300, dtype=np.int32) % 2,
        )
        return Dataset(part, part, part)

    monkeypatch.setattr(mnist, "load_mnist", noise)
    monkeypatch.setattr(width_depth, "load_mnist", noise)
    monkeypatch.setitem(step_time.NETWORKS, "linear", (MLP(()), (2, 2, 1), (8,)))
    monkeypatch.setitem(sys.modules, "somax", None)
    monkeypatch.setattr(step_memory, "in_fresh_process", lambda script, worker, environment: [1.0, 2.0])
    small = lambda script, worker: meta_step_time.measure(
        meta_step_time.Configuration("linear", 4, 2, 1, 2), repeats=1
    )
    monkeypatch.setattr(meta_step_time, "in_fresh_process", small)
    monkeypatch.setattr(meta_step_time, "GROWING", dict.fromkeys(meta_step_time.GROWING, ()))
    # Each of the four takes a minute to compile; what they find is tested in test_ablation.py.
    last = ablation_preconditioner.CONFIGURATIONS[-1:]
    monkeypatch.setattr(ablation_preconditioner, "CONFIGURATIONS", last)
    optimizers = scaling.optimizers(1)
    monkeypatch.setattr(scaling, "optimizers", lambda cg_steps: {"adam": optimizers["adam"]})
    before = jax.config.values["jax_enable_compilation_cache"]
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize("name", RUNS)
def test_a_script_runs_and_reports(name, tiny, tmp_path, capsys):
    script, arguments, files = RUNS[name]
    if issubclass(script.Options, scripts.BenchmarkOptions):
        where = ["--json", str(tmp_path / "results.json")]
        where += ["--figure", str(tmp_path / "figure.png")] * ("figure.png" in files)
    else:
        where = ["--output", str(tmp_path)]
    arguments = [str(tmp_path / "general") if one == "general" else one for one in arguments]
    script.main([*arguments, *where])
    found = {file: (tmp_path / file).read_bytes() for file in files.split()}
    assert all(content.startswith(b"\x89PNG") for file, content in found.items() if file.endswith("png"))
    content = json.loads(next(found[file] for file in found if file.endswith("json")))
    assert content.keys() >= {"machine", "versions", "command", "date"}
    assert f"{script.__name__}.py {arguments[0]}" in content["command"]
    printed = capsys.readouterr().out
    if make := getattr(script, "table", None) if "rows" in content else None:
        # What was written makes the table that was printed.
        assert "\n".join(make(content).markdown()) in printed
    else:
        assert "| ---" in printed or "best of the other" in printed


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (held_out, ["--tasks", "mnist-transformer"], "`tasks` must be one of 'digits-mlp'"),
        (held_out, ["--learned", "velo"], "`learned` must be one of 'l2l'"),
        (untuned, ["--tasks", "mnist-transformer"], "`tasks` must be one of 'digits-mlp'"),
        (untuned, ["--rivals", "velo"], "`rivals` must be one of 'adam', 'schedule-free'"),
        (to_the_end, ["--problems", "digit"], "invalid choice"),
        (to_the_end, ["--families", "SGD"], "`families` must be one of 'MLHF', 'MLHF, weight decay'"),
        (width_depth, ["--widths", "6"], "`widths` must be numbers from 1 on, multiples of 4, got (6,)"),
        (ten_times_horizon, ["--steps", "5", "--records", "6"], "`records` must be from 1 to 5, the steps"),
        (learned_optimizers, ["--activations", "softsign"], "`activations` must be one of 'sigmoid'"),
        (learned_optimizers, ["--image-size", "5"], "`image_size` must be a divisor of 28, got 5"),
        (learned_optimizers, ["--meta-train", "velo"], "`meta_train` must be one of 'rnnprop'"),
        (lodo_tasks, ["--task", "images"], "`task` must be one of 'bowl', 'pixels', got 'images'"),
        (step_time, ["--tasks", "cnn"], "`tasks` must be one of 'digits-mlp'"),
        (step_time, ["--batches", "64", "0"], "numbers of examples such as 64 128, got (64, 0)"),
        (deterministic, ["--problems", "wave"], "`problems` must be one of 'poisson'"),
        (step_memory, ["--steps", "0"], "`steps` must be at least 1, got 0"),
        (meta_step_time, ["--tasks", "resnet9"], "`tasks` must be one of 'digits-mlp'"),
        (second_order_cifar10, ["--decays", "0.5"], "`decays` must be among 0.667, 0.9,"),
        (first_order_cifar10, ["--epochs", "0"], "`epochs` must be at least 1, got 0"),
        (first_order_cifar10, ["--cg-steps", "0"], "`cg_steps` must be at least 1, got (0,)"),
    ],
)
def test_wrong_options_are_refused_with_what_is_wanted(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
