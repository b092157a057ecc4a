"""Training on several devices: XLA makes eight of one CPU, in a process of its own."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent
QUICKLY_COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # devices are compared with one another


@pytest.mark.parametrize("checks", ["steps", "meshes", "meta_training"])
def test_on_eight_devices(checks):
    # First, as XLA reads no flag behind one that it takes for an argument.
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            FOLDER / f"eight_devices_{checks}.py",
        ],
        cwd=FOLDER.parent,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | QUICKLY_COMPILED,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def start_processes(processes, devices, folder, task):
    """Starts `one_of_two_processes.py` in so many processes of so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = FOLDER / "one_of_two_processes.py"
    call = lambda own: [sys.executable, script, *map(str, (port, processes, own, devices, folder, task))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{FOLDER}:{FOLDER.parent}"}
    environment |= QUICKLY_COMPILED
    return [
        subprocess.Popen(
            call(i), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(processes)
    ]


def outputs_of(runs):
    """Waits for processes and returns what they print."""
    try:
        return [run.communicate(timeout=240)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()


def run_processes(processes, devices, folder, task):
    """Returns the arrays that the first of so many processes writes."""
    runs = start_processes(processes, devices, folder, task)
    outputs = outputs_of(runs)
    assert not any(run.returncode for run in runs), "\n".join(output[-3000:] for output in outputs)
    with np.load(folder / f"{task}.npz") as leaves:
        return [leaves[name] for name in leaves.files]


def test_two_processes_equal_one_and_a_checkpoint_moves_to_another_number_of_devices(tmp_path):
    of_two = run_processes(2, 1, tmp_path, "write")
    of_one = run_processes(1, 4, tmp_path, "read")
    for one, two in zip(of_one, of_two, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_a_training_one_of_whose_processes_was_killed_goes_on_in_four(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    first, last = runs = start_processes(2, 1, parts, "die")
    try:
        output = last.communicate(timeout=240)[0]
    finally:
        for run in runs:
            run.kill()  # the other one waits for it
    first.communicate()
    assert last.returncode == -signal.SIGKILL, output[-3000:]
    for one, four in zip(
        run_processes(1, 1, whole, "write"), run_processes(4, 1, parts, "read"), strict=True
    ):
        np.testing.assert_allclose(one, four, atol=1e-4)


def test_two_processes_that_meta_train_equal_one(tmp_path):
    of_one, of_two = (run_processes(*count, tmp_path, "meta") for count in ((1, 4), (2, 1)))
    for one, two in zip(of_one, of_two, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_meta_training_of_two_processes_goes_on_in_four(tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    parts.mkdir()
    whole.mkdir()
    of_one = run_processes(1, 4, whole, "all")
    run_processes(2, 1, parts, "run")
    before = (parts / "run" / "metrics.jsonl").read_text()
    assert len(before.splitlines()) == 2

    refused = start_processes(2, 1, parts, "run")
    told = outputs_of(refused)
    assert all(run.returncode for run in refused)
    assert "already has checkpoints; set `resume`" in told[0], told[0][-3000:]
    assert "the first process could not go on" in told[1], told[1][-3000:]
    assert (parts / "run" / "metrics.jsonl").read_text() == before

    for one, four in zip(of_one, run_processes(4, 1, parts, "resume"), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-5)
    for folder in (parts, whole):
        for name in ("metrics", "validation"):
            lines = (folder / "run" / f"{name}.jsonl").read_text().splitlines()
            assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]
    names = [file.name for file in (parts / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["checkpoint-00000002.safetensors", "checkpoint-00000004.safetensors"]
