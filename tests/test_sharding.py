"""Training on several devices: XLA makes eight of one CPU, in a process of its own."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent


def test_on_eight_devices():
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
            FOLDER / "eight_devices.py",
        ],
        cwd=FOLDER.parent,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
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
    return [
        subprocess.Popen(
            call(i), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(processes)
    ]


def run_processes(processes, devices, folder, task):
    """Returns the arrays that the first of so many processes writes."""
    runs = start_processes(processes, devices, folder, task)
    try:
        outputs = [run.communicate(timeout=240)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
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
