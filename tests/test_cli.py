"""The command line, from arguments to files."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from shared import one_compilation as one_compilation

import mlhf_optax
from mlhf_optax import experiments, init_meta_params, list_pretrained, load_pretrained, save_meta_params
from mlhf_optax.experiments import cli
from mlhf_optax.experiments.cli import list_command, meta_train_command, train_command
from mlhf_optax.experiments.cli.commands import parse
from mlhf_optax.experiments.cli.meta_train_command import MetaTrain
from mlhf_optax.learned import LEARNED
from mlhf_optax.meta_training import MetaTrainingConfig, Schedule
from mlhf_optax.support.files import locked_folder
from mlhf_optax.tasks import TASKS, get_task

pytestmark = pytest.mark.usefixtures("unoptimised")

RECORD = {"optimizer": "mlhf", "task": "digits-mlp", "learning_rate": 0.5, "batch_size": 64}
RECORD |= {"num_cg_steps": 1, "max_update_ratio": 0.1}
TINY = ("--seeds", "2", "--steps", "3", "--hidden", "4")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, with a known width of the terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def meta_params(folder):
    kinds = ("dense_bias", "dense_kernel")
    own = init_meta_params(jax.random.key(0), layer_types=kinds, units=(2,))
    return str(save_meta_params(folder / "mine", own, RECORD))


SMALL = "--optimizer adam_rates --num-tasks 2 --unroll-length 2 --batch-size 8 --iterations 1 --hidden 4"
SMALL = f"{SMALL} --validation-steps 1".split()


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code


def refused(capsys, *arguments):
    """Runs a command that must fail with one line before it prints anything; returns the line."""
    assert run(*arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    return streams.err


def wrong_usage(capsys, *arguments):
    """Runs a command whose options are refused; returns what is said, without the frame around it."""
    assert run(*arguments) == 2
    return unframed(capsys.readouterr().err)


def unframed(text):
    return " ".join(" ".join(line.strip("│| ") for line in text.splitlines()).split())


# Training ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meta_trained(one_compilation, tmp_path_factory):
    """The folder of a small meta-training from the command line."""
    output = tmp_path_factory.mktemp("meta-trained")
    assert run("meta-train", *SMALL, "--learning-rate", "0.03", "--output", str(output)) == 0
    return output


def test_any_learned_optimizer_is_meta_trained_and_compared_in_table_file_and_figure(
    meta_trained, capsys, folder
):
    file = str(meta_trained / "meta_params.safetensors")
    found = load_pretrained(file).record
    assert (found["optimizer"], found["meta_training"]["learning_rate"]) == ("adam_rates", 0.03)
    options = ("--optimizers", "sgd, adam_rates", "--meta-params", file, "--activation", "tanh")
    assert run("train", *TINY, *options, "--json", "out.json") == 0
    out = capsys.readouterr().out
    assert "64-4-10" in out
    assert "best of the other 9 there" in out
    assert "Adam, learned rates / that best" in out
    assert f"Adam, learned rates (meta-parameters {file}, learning rate 0.03) and 9 settings" in out
    assert (folder / "mlhf-optax-digits-mlp-4-tanh.png").read_bytes().startswith(b"\x89PNG")
    result = experiments.Comparison.load("out.json")
    assert result.about["task"] == "digits-mlp-4-tanh"
    assert result.about["command"].startswith("mlhf-optax train --seeds 2 --steps 3")
    learned, *others = result.curves()
    assert (learned.optimizer, learned.seeds, learned.steps) == ("adam_rates", 2, [1, 2, 3])
    assert learned.setting["meta_params"] == file
    assert [curve.family for curve in others] == 9 * ["sgd"]


def contenders(*arguments):
    options = parse(["train", *arguments])
    task = get_task(options.task, **options.task_options())
    learned = train_command._learned_contenders(task, options)
    return [*learned, *train_command._other_contenders(task, options.optimizers)]


def test_meta_parameters_may_be_given_for_one_of_several_optimizers(meta_trained):
    file = str(meta_trained / "meta_params")
    for given in (file, f"adam_rates={file}"):
        own, shipped = contenders("--optimizers", "adam_rates,mlhf", "--meta-params", given)
        assert (own.family, own.settings[0]["meta_params"]) == ("adam_rates", file)
        assert (shipped.family, shipped.settings[0]["meta_params"]) == ("mlhf", "digits")


def test_the_label_says_which_line_load_pretrained_gives():
    general, digits = contenders("--optimizers", "mlhf_general,mlhf")
    assert general.labels == ("MLHF general = load_pretrained()",)
    assert digits.labels == ("MLHF",)
    (other,) = contenders("--optimizers", "mlhf_general", "--cg-steps", "3")
    assert other.labels == ("MLHF general",)


def test_options_override_the_record(meta_params):
    options = "--learning-rate 2 --cg-steps 7 --curvature-batch-size 0.25 --optimizers mlhf,adam,muon"
    learned, adam, muon = contenders(*options.split(), "--batch-size", "32", "--meta-params", meta_params)
    expected = {
        "learning_rate": 2.0,
        "num_cg_steps": 7,
        "curvature_batch_size": 0.25,
        "max_update_ratio": 0.1,
    }
    assert expected.items() <= learned.settings[0].items()
    assert adam.settings[0]["learning_rate"] == pytest.approx(0.1 * 32 / 128)
    assert [one["learning_rate"] for one in muon.settings][::9] == pytest.approx([0.001, 1.0])


@pytest.mark.parametrize(("task", "name"), [("digits-convnet", "digits_convnet"), ("digits-mlp", "digits")])
def test_meta_parameters_are_by_default_those_of_the_task(task, name):
    assert contenders(task, "--optimizers", "mlhf")[0].settings[0]["meta_params"] == name


def test_a_task_that_recommends_another_optimizer_gets_any_shipped_set(monkeypatch):
    monkeypatch.setattr(train_command, "list_pretrained", lambda: {"digits": {"optimizer": "mlhf"}})
    task = dataclasses.replace(get_task("digits-mlp"), pretrained="other")
    assert train_command._shipped_meta_params(task, "mlhf")[0] == "digits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "`name` must be one of 'digits-mlp', 'digits-convnet', "),
        (["cifar10-convnet", "--data-dir", "nowhere"], "no prepared dataset 'cifar10' in nowhere"),
        (["cifar10-convnet", "--channels", "8"], "`channels` must be one number per convolution"),
        (["cifar10-resnet9", "--channels", "8,16"], "`channels` must be one number"),
        (["digits-convnet", "--hidden", "4"], "the task 'digits-convnet' has no option 'hidden'"),
        (["--activation", "swish"], "`activation` must be one of"),
        (["--batch-size", "9999"], "`batch_size` must be between 1 and the number of training examples"),
        (["--curvature-batch-size", "2.0"], "`curvature_batch_size` as a fraction must lie in (0, 1], got"),
        (["--curvature-batch-size", "0"], "`curvature_batch_size` must be at least 1 example, got 0"),
        (["--cg-steps", "0"], "`num_cg_steps` must be at least 1"),
        (["--optimizers", "adam", "--cg-steps", "2"], "`num_cg_steps` is an argument of no"),
        (["--meta-params", "nowhere/x"], "there is no such file"),
        (["--optimizers", "adam", "--meta-params", "digits"], "digits holds meta-parameters of 'mlhf', but"),
        (
            ["--optimizers", "mlhf_general", "--meta-params", "digits"],
            "of 'mlhf', but they are asked for mlhf_general",
        ),
        (["--meta-params", "adam_rates=digits"], "of 'mlhf', but they are asked for adam_rates"),
        (
            ["--optimizers", "mlhf", "--meta-params", "digits,digits_convnet"],
            "two sets for 'mlhf', digits and digits_convnet",
        ),
        (["--optimizers", "adam_rates"], "no meta-parameters of 'adam_rates' come with the package"),
        (["--json", "nowhere/out.json"], "the folder of nowhere/out.json does not exist"),
        (["--figure", "nowhere/out.png"], "the folder of nowhere/out.png does not exist"),
        (["--figure", "out.txt"], "`figure` must end in one of"),
        (["--json", "."], ". is a folder; name a file in it"),
    ],
)
def test_wrong_arguments_are_explained_in_one_line_before_any_work(arguments, message, capsys, folder):
    assert message in refused(capsys, "train", *arguments)
    assert not any(folder.iterdir())


def test_a_file_that_cannot_be_written_is_refused_before_any_work(capsys, monkeypatch, folder):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == folder and mode == os.W_OK))
    assert "out.json cannot be written" in refused(
        capsys, "train", "--figure", "/tmp/a.png", "--json", "out.json"
    )


def test_a_curvature_batch_beyond_the_batch_is_explained(capsys, meta_params):
    options = ("--optimizers", "mlhf", "--meta-params", meta_params, "--curvature-batch-size", "500")
    assert run("train", *TINY, *options) == 2
    assert capsys.readouterr().err.startswith("error: `curvature_batch_size`=500 is larger than the batch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "`seeds` must be at least 1, got 0"),
        (["--steps", "-1"], "`steps` must be at least 1, got -1"),
        (["--steps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--learning-rate", "-1"], "`learning_rate` must be a positive number, got -1.0"),
        (["--nonsense"], "Unrecognized options: --nonsense"),
        (["--hidden", "4,x"], "must be whole numbers separated by commas, like 32 or 32,32, got '4,x'"),
        (["--channels", "x"], "must be whole numbers separated by commas"),
        (
            ["--optimizers", "mlhf,lion"],
            ",".join([*LEARNED, "sgd,rmsprop,adam,muon,gauss_newton"]),
        ),
        (["--optimizers", ""], "must be among mlhf,"),
        (["--curvature-batch-size", "half"], "no type matching INT|FLOAT"),
    ],
)
def test_wrong_options_of_train_are_refused(arguments, message, capsys):
    assert message in wrong_usage(capsys, "train", *arguments)


def test_ctrl_c_shows_progress_and_what_was_done_and_writes_nothing(monkeypatch, capsys, folder):
    def interrupted(*arguments, on_progress, **options):
        def stopping(progress):
            if progress.optimizer.startswith("adam"):
                raise KeyboardInterrupt
            on_progress(progress)

        return compare(*arguments, on_progress=stopping, **options)

    compare = experiments.compare
    monkeypatch.setattr(experiments, "compare", interrupted)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("train", *TINY, "--optimizers", "sgd,adam", "--json", "out.json") == 130
    out, progress = capsys.readouterr()
    assert all(text in progress for text in ("compiling and timing single steps", "/216", "loss 2."))
    assert "sgd lr=" in out
    assert "adam lr=" not in out
    assert "Stopped: neither figure nor file was written." in out
    assert not any(folder.iterdir())


def test_a_disk_that_is_full_after_a_comparison_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", full_disk)
    options = ("--optimizers", "sgd", "--json", "out.json")
    assert run("train", "--seeds", "1", "--steps", "1", "--hidden", "4", *options) == 2
    streams = capsys.readouterr()
    assert "sgd lr=" in streams.out
    assert streams.err.startswith("error: cannot write out.json: No space left on device")


# Meta-training -----------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Arguments of meta-trainings that are not done."""
    calls = []
    names = ("task", "family", "options", "output", "schedule", "config")

    def stop(*arguments, **others):
        calls.append(dict(zip(names, arguments, strict=True)) | others)
        raise KeyboardInterrupt

    monkeypatch.setattr(meta_train_command, "meta_train_task", stop)
    return calls


def test_meta_train_has_defaults(calls, capsys):
    assert run("meta-train") == 130
    assert "--resume goes on from the last checkpoint in runs/digits-mlp." in capsys.readouterr().out
    (call,) = calls
    family = next(iter(LEARNED.values()))
    assert (call["task"].name, call["family"], call["options"]) == ("digits-mlp", family, family.options())
    assert call["output"] == Path("runs/digits-mlp")
    schedule, config = call["schedule"], call["config"]
    assert (schedule.iterations, schedule.checkpoint_every, schedule.validate_every) == (1000, 50, 100)
    assert (config.num_tasks, config.unroll_length, config.meta_learning_rate) == (8, 10, 0.01)
    assert (config.decay_iterations, config.keep_probability) == (1000, 0.95)
    assert (call["validation_steps"], call["seed"], call["resume"]) == ((10, 30, 100, 300), 0, False)
    assert call["start"] is None


def test_meta_train_hands_on_its_arguments(calls):
    arguments = (
        "meta-train digits-mlp --hidden 4,5 --output there --iterations 7 --num-tasks 3 --unroll-length 5 "
        "--batch-size 16 --meta-learning-rate 0.1 --learning-rate 0.5 --seed 4 --resume --checkpoint-every 2 "
        "--validate-every 3 --validation-steps 1,5 --settings authors --initial-damping 100 "
        "--initial-preconditioner 0.5 --keep-probability 0.5 "
        "--same-batch-weight 0.25 --curvature-batch-size 8 --stop-after 6 --start digits "
        "--fresh-probability 0.75 --max-age 200 --random-scaling 3 "
        "--companion-size 20"
    )
    assert run(*arguments.split()) == 130
    (call,) = calls
    assert (call["task"].name, call["task"].meta_batch_size) == ("digits-mlp-4-5", 16)
    settings = {"settings": "authors", "initial_damping": 100.0, "initial_preconditioner": 0.5}
    settings |= {
        "learning_rate": 0.5,
        "same_batch_weight": 0.25,
        "curvature_batch_size": 8,
        "num_cg_steps": 4,
    }
    assert dataclasses.asdict(call["options"]) == settings
    assert dataclasses.astuple(call["schedule"])[:3] == (7, 2, 3)
    assert call["schedule"].stop_after == 6
    config = call["config"]
    assert (config.num_tasks, config.unroll_length, config.meta_learning_rate) == (3, 5, 0.1)
    assert (config.keep_probability, config.fresh_probability, config.max_age) == (0.5, 0.75, 200)
    assert (config.random_scaling, config.companion_size) == (3.0, 20)
    rest = (call["output"], call["validation_steps"], call["seed"], call["resume"], call["start"])
    assert rest == (Path("there"), (1, 5), 4, True, "digits")
    assert call["command"] == f"mlhf-optax {arguments}"


def test_options_of_image_tasks_reach_them():
    variant = "--channels 8,16 --hidden 16 --data-dir here"
    options = parse(["train", "cifar10-convnet", *variant.split()])
    assert options.task_options() == {"channels": (8, 16), "hidden": (16,), "data_dir": Path("here")}
    assert parse(["train", "cifar10-resnet9", "--channels", "4"]).task_options() == {"channels": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimizer", "velo"],
            "no learned optimizer 'velo'; there are mlhf, mlhf_general, adam_rates",
        ),
        (["cifar10-convnet", "--data-dir", "nowhere"], "no prepared dataset 'cifar10' in nowhere"),
        (["--batch-size", "1000000"], "must be between 1 and the number of meta-training examples"),
        (["--start", "nowhere"], "there is no such file"),
        (["--start", "digits", "--settings", "relative", "--initial-damping", "3"], "leave out initial_"),
        (["--start", "digits", "--optimizer", "adam_rates"], "holds meta-parameters of 'mlhf', not of"),
        (["--output", "file"], "is not a folder that can be written to"),
    ],
)
def test_meta_train_says_in_one_line_what_is_wrong(arguments, message, capsys, folder):
    (folder / "file").touch()
    assert message in refused(capsys, "meta-train", *arguments)


def test_what_lies_in_the_folder_of_a_meta_training_is_not_lost(meta_trained, capsys, folder):
    shutil.copytree(meta_trained, "out")
    again = ("meta-train", *SMALL, "--learning-rate", "0.03", "--output", "out")
    assert "already has checkpoints; set `resume` (--resume)" in refused(capsys, *again)
    assert "other settings (seed: 0 there, 4 now)" in refused(capsys, *again, "--resume", "--seed", "4")
    with locked_folder(folder / "out"):
        assert "is in use by another run" in refused(capsys, *again, "--resume")
    assert run(*again, "--resume") == 0
    assert "iteration 1 of 1, in out/meta_params.safetensors" in capsys.readouterr().out
    files = [path / "meta_params.safetensors" for path in (meta_trained, folder / "out")]
    jax.tree.map(np.testing.assert_array_equal, *(load_pretrained(path).meta_params for path in files))


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_a_meta_training_with_one_line(meta_trained, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left on device" in refused(capsys, "meta-train", *SMALL, "--output", "out")


def test_progress_of_a_meta_training_shows_the_losses_it_has(meta_trained, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("meta-train", *SMALL, "--output", "out") == 0
    shown = capsys.readouterr().err
    assert "1/1" in shown
    assert "meta loss" in shown
    assert "inner loss" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((["--validation-steps", text], "must be ascending numbers") for text in ("10,5", "0,10", "1,1")),
        *(
            (["--validation-steps", text], "must be whole numbers separated by commas")
            for text in ("ten", "")
        ),
        *((["--learning-rate", text], "`learning_rate` must be a positive number") for text in ("0", "nan")),
        *((["--meta-learning-rate", text], "`meta_learning_rate` must be a pos") for text in ("-1", "inf")),
        (["--keep-probability", "2"], "`keep_probability` must be in [0, 1], got 2.0"),
        (["--stop-after", "0"], "`stop_after` must be at least 1, or None, got 0"),
        (["--initial-damping", "-1"], "`initial_damping` must be a positive number, got -1"),
        (["--initial-preconditioner", "-1"], "`initial_preconditioner` must be a positive number, got -1"),
        *((["--seed", text], "`seed` must be from 0 to 2**32 - 1, got") for text in ("-1", "9" * 20)),
        (["--settings", "best"], "'best'"),
        (["--curvature-batch-size", "2.0"], "must lie in (0, 1], got 2.0"),
        (["--curvature-batch-size", "0"], "must be at least 1 example, got 0"),
        (["--optimizer", "adam_rates", "--settings", "paper"], "Unrecognized options: --settings"),
        (["--optimizer"], "Missing value for argument '--optimizer'"),
    ],
)
def test_wrong_options_of_meta_train_are_refused(arguments, message, capsys, calls):
    assert message in wrong_usage(capsys, "meta-train", *arguments)
    assert not calls


@pytest.mark.parametrize("family", LEARNED.values(), ids=list(LEARNED))
def test_options_of_a_learned_optimizer_are_its_own_and_have_help(family, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # wider ones show groups of options side by side
    names = lambda cls: {field.name for field in dataclasses.fields(cls)}
    own = names(family.options)
    assert not own & (names(MetaTrain) | names(Schedule) | names(MetaTrainingConfig))
    assert run("meta-train", "--optimizer", family.name, "--help") == 0
    out = unframed(capsys.readouterr().out)
    for name in own:
        flag, text = f"--{name.replace('_', '-')} ", out.split(f"--{name.replace('_', '-')} ")[-1]
        assert flag in out
        assert len(text.split("--")[0]) > 20, f"{flag} has no help"


# Everything else ---------------------------------------------------------------------------------


def test_list_shows_tasks_optimizers_and_what_is_shipped(monkeypatch, capsys):
    monkeypatch.setattr(list_command, "list_pretrained", lambda: {"shipped": RECORD})
    assert run("list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*TASKS, *LEARNED, "shipped", "learning_rate 0.5", "muon"))
    assert out.count("any network") >= sum(family.fits_any for family in LEARNED.values())


@pytest.mark.parametrize("columns", [20, 60, 80])
def test_list_never_cuts_off_a_name_that_has_to_be_typed(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "…" not in out
    first = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert {*TASKS, *LEARNED, *list_pretrained()} <= first
    rows = {tuple(line.split()[:2]) for line in out.splitlines()}
    assert {(name, record["optimizer"]) for name, record in list_pretrained().items()} <= rows


@pytest.mark.parametrize(
    ("command", "flag"), [([], "-h"), (["train"], "--help"), (["meta-train"], "-h"), (["list"], "--help")]
)
def test_help(command, flag, capsys):
    assert run(*command, flag) == 0
    out = capsys.readouterr().out
    assert f"usage: {' '.join(['mlhf-optax', *command])} [-h]" in out
    assert "None" not in out


def test_no_arguments_show_the_help_and_unknown_commands_are_refused(capsys):
    assert run() == 0
    assert "usage: mlhf-optax" in capsys.readouterr().out
    assert "Available subcommands: train, meta-train, meta-train-long, list" in wrong_usage(capsys, "tarin")


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_python_m_is_the_command_line():
    assert python("-m", "mlhf_optax", "--version").stdout.strip() == mlhf_optax.__version__


WITHOUT_EXTRAS = """
import sys
from mlhf_optax.experiments.cli import main
for package in ("tyro", "rich", "polars"):
    for name in [name for name in sys.modules if name.startswith("mlhf_optax.experiments.")]:
        del sys.modules[name]
    sys.modules[package] = None
    try:
        main(["train"])
    except SystemExit as stop:
        print(stop.code)
    del sys.modules[package]
"""


def test_missing_extras_are_explained():
    done = python("-c", WITHOUT_EXTRAS)
    text = "mlhf-optax needs {}, which is not installed; run `pip install 'mlhf-optax[experiments]'`\n"
    assert done.stderr == "".join(map(text.format, ("tyro", "rich", "polars")))
    assert done.stdout == "1\n" * 3
