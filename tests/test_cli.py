"""The command line, from arguments to files."""

import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

import mlhf_optax
from mlhf_optax import cli, init_meta_params, save_meta_params
from mlhf_optax.comparison import train_command
from mlhf_optax.tasks import TASKS

RECORD = {
    "optimizer": "mlhf",
    "task": "digits-mlp",
    "learning_rate": 0.5,
    "batch_size": 64,
    "num_cg_steps": 1,
    "max_update_ratio": 0.1,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, with a known width of the terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def meta_params(folder):
    return str(save_meta_params(folder / "mine", init_meta_params(jax.random.key(0)), RECORD))


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code


TINY = ("--seeds", "2", "--steps", "3", "--hidden", "4")


def test_train_prints_a_table_and_writes_results_and_figure(capsys, folder, meta_params):
    files = ("--json", "out.json", "--figure", "out.png")
    assert run("train", *TINY, "--optimizers", "sgd,mlhf", "--meta-params", meta_params, *files) == 0
    out = capsys.readouterr().out
    assert "64-4-10" in out
    assert "MLHF lr=0.5" in out
    assert "best of the other 9 there" in out
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "out.json").read_text())
    assert data["task"] == "digits-mlp-4"
    assert data["command"].startswith("mlhf-optax train --seeds 2 --steps 3")
    assert [entry["family"] for entry in data["optimizers"]] == ["mlhf"] + 9 * ["sgd"]
    settings = data["optimizers"][0]["setting"]
    assert (settings["learning_rate"], settings["num_cg_steps"], settings["meta_params"]) == (0.5, 1, meta_params)
    assert data["optimizers"][1]["steps"] == [1, 2, 3]


def test_the_figure_goes_to_the_current_folder_by_default(folder):
    assert run("train", *TINY, "--optimizers", "adam", "--activation", "tanh") == 0
    assert (folder / "mlhf-optax-digits-mlp-4-tanh.png").exists()


def test_options_of_mlhf_override_its_record(meta_params):
    plan = train_command.make_plan(
        "digits-mlp",
        {"batch_size": 32},
        families=["mlhf", "adam"],
        meta_params=meta_params,
        learning_rate=2.0,
        num_cg_steps=7,
        curvature_batch_size=0.25,
    )
    settings = plan.contenders[0].settings[0]
    assert (settings["learning_rate"], settings["num_cg_steps"], settings["curvature_batch_size"]) == (
        2.0,
        7,
        0.25,
    )
    assert plan.contenders[1].settings[0]["learning_rate"] == pytest.approx(0.1 * 32 / 128)


def test_arguments_of_train_reach_the_plan(monkeypatch, folder):
    seen = {}

    def plan(task, options, **others):
        seen.update(others, task=task, options=options)

    monkeypatch.setattr("mlhf_optax.comparison.commands.make_plan", plan)
    monkeypatch.setattr(
        "mlhf_optax.comparison.commands.run_plan", lambda plan, **options: seen.update(options) or True
    )
    arguments = (
        "train digits-convnet --seeds 3 --steps 40 --batch-size 64 --learning-rate 0.5 --cg-steps 2 --all"
    )
    assert run(*arguments.split(), "--curvature-batch-size", "0.5", "--optimizers", "adam, mlhf") == 0
    expected = {
        "task": "digits-convnet",
        "options": {"batch_size": 64},
        "families": ["adam", "mlhf"],
        "num_seeds": 3,
        "num_steps": 40,
        "learning_rate": 0.5,
        "num_cg_steps": 2,
        "curvature_batch_size": 0.5,
        "show_all": True,
        "command": f"mlhf-optax {arguments} --curvature-batch-size 0.5 --optimizers 'adam, mlhf'",
    }
    assert {name: seen[name] for name in expected} == expected


@pytest.mark.parametrize(("text", "part"), [("32", 32), ("0.25", 0.25), (None, None)])
def test_curvature_batch_is_a_number_or_a_share(text, part):
    from mlhf_optax.comparison.arguments import parse_part

    assert parse_part(text) == part
    assert type(parse_part(text)) is type(part)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "`name` must be one of 'digits-mlp', 'digits-convnet', "),
        (["cifar10-convnet", "--data-dir", "nowhere"], "no prepared dataset 'cifar10' in nowhere; say where"),
        (["cifar10-convnet", "--channels", "8"], "`channels` must be one number a convolution"),
        (["cifar10-resnet9", "--channels", "8,16"], "`channels` must be one number, those of the first"),
        (["cifar10-resnet9", "--channels", "x"], "--channels must be widths separated by commas"),
        (["--optimizers", "mlhf,lion"], "--optimizers must be among mlhf,adam_rates,sgd,rmsprop,adam"),
        (["--optimizers", ""], "--optimizers must be among mlhf,adam_rates,sgd,rmsprop,adam"),
        (["--hidden", "4,x"], "--hidden must be widths separated by commas, like 32 or 32,32, got '4,x'"),
        (["digits-convnet", "--hidden", "4"], "the task 'digits-convnet' has no option 'hidden'"),
        (["--activation", "swish"], "`activation` must be one of"),
        (["--batch-size", "9999"], "number of training examples of 'digits-mlp', 719, got 9999"),
        (
            ["--curvature-batch-size", "half"],
            "--curvature-batch-size must be a number or a share, got 'half'",
        ),
        (["--meta-params", "nowhere/x"], "there is no such file"),
        (["--json", "nowhere/out.json"], "the folder of nowhere/out.json does not exist"),
        (["--figure", "nowhere/out.png"], "the folder of nowhere/out.png does not exist"),
    ],
)
def test_wrong_arguments_are_explained_in_one_line_before_any_work(arguments, message, capsys, folder):
    assert run("train", *arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert message in streams.err
    assert streams.err.count("\n") == 1
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--steps", "-1"], ["--steps", "many"], ["--nonsense"]]
)
def test_wrong_options_are_refused(arguments, capsys):
    assert run("train", *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_ctrl_c_shows_what_was_done_and_writes_nothing(monkeypatch, capsys, folder):
    compare = train_command.compare

    def interrupted(task, contenders, steps, on_progress, **options):
        def stop(progress):
            if progress.optimizer.startswith("adam"):
                raise KeyboardInterrupt

        return compare(task, contenders, steps, on_progress=stop, **options)

    monkeypatch.setattr(train_command, "compare", interrupted)
    assert run("train", *TINY, "--optimizers", "sgd,adam", "--json", "out.json") == 130
    out = capsys.readouterr().out
    assert "sgd lr=" in out
    assert "adam lr=" not in out
    assert "Stopped: neither figure nor file was written." in out
    assert not any(folder.iterdir())


@pytest.fixture
def driver_calls(monkeypatch):
    calls = []
    module = types.ModuleType("mlhf_optax.comparison.meta_train_command")
    module.run_meta_training = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "mlhf_optax.comparison.meta_train_command", module)
    return calls


def test_meta_train_has_defaults(driver_calls):
    assert run("meta-train") == 0
    (options,) = driver_calls
    assert options.pop("output").as_posix() == "runs/digits-mlp"
    assert options == {
        "task": "digits-mlp",
        "iterations": 1000,
        "num_tasks": 8,
        "unroll_length": 10,
        "batch_size": None,
        "meta_learning_rate": 1e-2,
        "seed": 0,
        "resume": False,
        "checkpoint_every": 50,
        "validate_every": 100,
        "validation_steps": (10, 30, 100, 300),
        "settings": None,
        "start": None,
        "initial": {},
        "learning_rate": 1.0,
        "keep_probability": 0.95,
        "age_scale": None,
        "replay_opt_state": False,
        "same_batch_weight": 1.0,
        "curvature_batch_size": None,
        "stop_after": None,
        "task_options": {},
    }


def test_meta_train_hands_on_its_arguments(driver_calls):
    arguments = (
        "meta-train digits-convnet --output there --iterations 7 --num-tasks 3 --unroll-length 5 "
        "--batch-size 16 --meta-learning-rate 0.1 --learning-rate 0.5 --seed 4 --resume --checkpoint-every 2 "
        "--validate-every 3 --validation-steps 1,5 --settings authors --initial-damping 100 "
        "--initial-preconditioner 0.5 --keep-probability 0.5 --age-scale 50 --replay-opt-state "
        "--same-batch-weight 0.25 --curvature-batch-size 8 --stop-after 6"
    )
    assert run(*arguments.split()) == 0
    (options,) = driver_calls
    assert options.pop("output").as_posix() == "there"
    assert options.pop("initial") == {"initial_damping": 100.0, "initial_preconditioner": 0.5}
    values = ["digits-convnet", {}, 7, 3, 5, 16, 0.1, 0.5, 4, True, 2, 3, (1, 5)]
    values += ["authors", None]
    values += [0.5, 50.0, True, 0.25, 8, 6]
    assert list(options.values()) == values


def test_meta_train_goes_on_from_other_meta_parameters(driver_calls, capsys):
    assert run("meta-train", "--start", "digits") == 0
    assert driver_calls.pop()["start"] == "digits"
    assert run("meta-train", "--start", "nowhere.safetensors") == 2
    assert "nowhere.safetensors: there is no such file" in capsys.readouterr().err
    assert run("meta-train", "--start", "digits", "--settings", "relative", "--initial-damping", "3") == 2
    assert "leave out initial_damping, settings" in " ".join(capsys.readouterr().err.split())
    assert not driver_calls


@pytest.mark.parametrize("steps", ["10,5", "0,10", "10,10", "ten", ""])
def test_validation_steps_ascend(driver_calls, capsys, steps):
    assert run("meta-train", "--validation-steps", steps) == 2
    assert "must be ascending numbers" in capsys.readouterr().err
    assert not driver_calls


def test_meta_train_takes_variants_of_tasks(driver_calls):
    assert run("meta-train", "digits-mlp", "--hidden", "4,5") == 0
    assert driver_calls[0]["task_options"] == {"hidden": (4, 5)}


def test_meta_train_says_at_once_what_is_wrong_with_the_task(driver_calls, capsys):
    assert run("meta-train", "cifar10-convnet", "--data-dir", "nowhere") == 2
    assert "no prepared dataset 'cifar10' in nowhere" in capsys.readouterr().err
    assert not driver_calls


def test_options_of_image_tasks_reach_them(monkeypatch, folder):
    seen = {}
    monkeypatch.setattr(
        "mlhf_optax.comparison.commands.make_plan", lambda task, options, **others: seen.update(options)
    )
    monkeypatch.setattr("mlhf_optax.comparison.commands.run_plan", lambda plan, **options: True)
    assert run("train", "cifar10-convnet", "--channels", "8, 16", "--hidden", "16", "--data-dir", "here") == 0
    assert seen == {"channels": (8, 16), "hidden": (16,), "data_dir": Path("here")}
    assert run("train", "cifar10-resnet9", "--channels", "4") == 0
    assert seen["channels"] == 4


@pytest.mark.parametrize("option", ["--initial-damping", "--initial-preconditioner"])
def test_meta_train_refuses_starting_values_that_are_not_positive(driver_calls, capsys, option):
    assert run("meta-train", option, "-1") == 2
    assert f"`{option[2:].replace('-', '_')}` must be a positive number, got -1" in capsys.readouterr().err
    assert not driver_calls


@pytest.mark.parametrize("option", ["--learning-rate", "--meta-learning-rate", "--age-scale"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_meta_train_refuses_rates_and_scales_that_are_not_positive(driver_calls, capsys, option, value):
    assert run("meta-train", option, value) == 2
    assert f"`{option}` must be a positive number, got {float(value)}" in capsys.readouterr().err
    assert not driver_calls


def test_meta_train_refuses_unknown_settings(driver_calls, capsys):
    assert run("meta-train", "--settings", "best") == 2
    assert "'best' is not one of" in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not driver_calls


def test_list_shows_every_task_and_what_is_shipped(monkeypatch, capsys):
    monkeypatch.setattr("mlhf_optax.comparison.commands.list_pretrained", lambda: {"shipped": RECORD})
    assert run("list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TASKS)
    assert "shipped" in out
    assert "0.5" in out


@pytest.mark.parametrize("command", [[], ["train"], ["meta-train"], ["list"]])
def test_help(command, capsys):
    assert run(*command, "--help") == 0
    assert "Usage: mlhf-optax" in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    run()
    streams = capsys.readouterr()
    assert "Usage: mlhf-optax" in streams.out + streams.err


def test_python_m_is_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "mlhf_optax", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == mlhf_optax.__version__


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_extras_are_explained(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert run("train") == 1
    remedy = "run `pip install 'mlhf-optax[experiments]'`"
    assert capsys.readouterr().err == f"mlhf-optax needs {package}, which is not installed; {remedy}\n"


def test_the_package_loads_none_of_the_extras():
    extras = ["typer", "rich", "matplotlib", "sklearn", "tqdm", "tensorflow"]
    code = (
        f"import sys, mlhf_optax, mlhf_optax.cli; print([name for name in {extras} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
