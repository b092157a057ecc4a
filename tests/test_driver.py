"""The driver: what it writes, what it keeps, and that a run that was stopped ends as one that was not."""

import dataclasses
import errno
import gc
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.meta_training import (
    MetaTrainingConfig,
    Schedule,
    Validation,
    checkpoints,
    driver,
    json_log,
    meta_train,
)
from mlhf_optax.support import files

pytestmark = pytest.mark.usefixtures("unoptimised")

SCHEDULE = Schedule(iterations=9, checkpoint_every=2, validate_every=3, report_every=5)


class State(NamedTuple):
    iteration: jax.Array
    meta_params: Any
    key: jax.Array


def init(key, meta_params):
    return State(jnp.zeros((), jnp.int32), meta_params, jax.random.key_data(key))


@jax.jit
def step(state, batch):
    """A random walk that every batch and the whole past have a part in."""
    key, noise_key = jax.random.split(jax.random.wrap_key_data(state.key))
    move = jax.random.normal(noise_key, (3,)) + batch
    meta_params = {"w": 0.9 * state.meta_params["w"] + move}
    metrics = {"l_p": jnp.mean(move), "inner_loss": jnp.max(move)}
    return State(state.iteration + 1, meta_params, jax.random.key_data(key)), metrics


@jax.jit
def score(meta_params):
    w = meta_params["w"]
    return Validation(jnp.sum(w), jnp.stack([w[0], w[1]]), w[2])


def run(folder, schedule=SCHEDULE, validate_fn=score, step_fn=step, **kwargs):
    return meta_train(
        None,
        None,
        {"w": jnp.ones(3)},
        lambda key: jax.random.uniform(key, (3,)),
        validate_fn,
        folder,
        schedule,
        algorithm=(init, step_fn),
        **kwargs,
    )


def lines(folder, name):
    found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    for line in found:
        if name == "metrics":
            assert line.pop("seconds") >= 0
    return found


def saved(folder):
    """The meta-iterations of the checkpoints, the newest first."""
    names = [path.name for path in checkpoints.list_checkpoints(folder / "checkpoints")]
    numbers = [int(name[11:19]) for name in names]
    assert names == [f"checkpoint-{number:08d}.safetensors" for number in numbers]
    return numbers


def outcome(folder):
    """All that a run leaves but the time that it took."""
    last = checkpoints.list_checkpoints(folder / "checkpoints")[0]
    return last.name, last.read_bytes(), lines(folder, "metrics"), lines(folder, "validation")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder), outcome(folder)


def assert_undisturbed(done, folder, undisturbed):
    jax.tree.map(np.testing.assert_array_equal, done, undisturbed[0])
    assert outcome(folder) == undisturbed[1]


# What a run writes and returns.


def test_a_run_writes_metrics_validations_and_checkpoints_as_it_goes(tmp_path):
    seen = []
    done = run(tmp_path, progress=lambda iteration, metrics: seen.append((iteration, metrics)))
    metrics, validations = lines(tmp_path, "metrics"), lines(tmp_path, "validation")
    assert [line["iteration"] for line in metrics] == list(range(1, 10))
    assert set(metrics[0]) == {"iteration", "l_p", "inner_loss"}
    assert [line["iteration"] for line in validations] == [3, 6, 9]
    assert saved(tmp_path) == [9, 8, 6]
    # Looks at the metrics: every fifth, and where validation or checkpoint wait for the device anyway.
    assert [iteration for iteration, _ in seen] == [2, 3, 4, 5, 6, 8, 9]
    assert seen[-1][1]["inner_loss"] == metrics[-1]["inner_loss"]
    assert int(done.state.iteration) == 9


def test_the_best_by_validation_are_kept_not_the_last(tmp_path):
    scores, seen = iter([3.0, 1.0, math.nan, 2.0]), []

    def scripted(meta_params):
        seen.append(np.array(meta_params["w"]))
        return Validation(np.float32(next(scores)), np.zeros(1), np.zeros(()))

    done = run(tmp_path, Schedule(iterations=8, validate_every=2), scripted)
    np.testing.assert_array_equal(done.best_meta_params["w"], seen[1])
    assert not np.array_equal(done.state.meta_params["w"], seen[1])
    assert (int(done.best_iteration), float(done.best_score)) == (4, 1.0)


def test_numbers_that_are_not_finite_are_null_in_the_files(tmp_path):
    bad = lambda meta_params: Validation(
        jnp.float32(6.9), jnp.array([1.0, jnp.inf]), jnp.asarray(jnp.float32(jnp.nan))
    )
    nan_metric = lambda state, batch: (step(state, batch)[0], {"l_s": jnp.asarray(jnp.nan)})
    run(tmp_path, Schedule(iterations=1), bad, nan_metric)
    assert lines(tmp_path, "metrics") == [{"iteration": 1, "l_s": None}]
    (line,) = lines(tmp_path, "validation")
    assert (line["losses"], line["worst_loss"]) == ([1.0, None], None)


def test_meta_parameters_that_are_not_finite_end_the_run_before_they_are_saved(tmp_path):
    def breaking(state, batch):
        state, metrics = step(state, batch)
        factor = jnp.where(state.iteration == 4, jnp.nan, 1.0)
        return state._replace(meta_params={"w": factor * state.meta_params["w"]}), metrics

    message = "no longer finite at meta-iteration 4; lower `meta_learning_rate` .* resume"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, step_fn=breaking)
    assert saved(tmp_path) == [2]


# Resuming.


class Moments:
    """Interrupts a run at its n-th line of code in the driver and what it writes with."""

    FILES = tuple(module.__file__ for module in (driver, json_log, checkpoints, files))

    def __init__(self, stop_at=None):
        self.stop_at, self.passed = stop_at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _on_call(self, frame, event, argument):
        return self._on_line if frame.f_code.co_filename in self.FILES else None

    def _on_line(self, frame, event, argument):
        if event == "line":
            self.passed += 1
            if self.passed == self.stop_at:
                raise KeyboardInterrupt
        return self._on_line


# A file is left open if the interrupt comes between opening it and entering its block.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_is_interrupted_at_any_moment_ends_as_one_that_was_not(tmp_path, undisturbed):
    with Moments() as moments:
        run(tmp_path / "count")
    assert moments.passed > 300
    for number, stop_at in enumerate(np.linspace(30, moments.passed - 1, 12).astype(int)):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt), Moments(stop_at):
            run(folder)
        gc.collect()  # a lock whose release was interrupted goes with the last run
        # The second try is interrupted too, while it takes up the files of the first.
        with pytest.raises(KeyboardInterrupt), Moments(20 + 10 * number):
            run(folder, resume=True)
        gc.collect()
        assert_undisturbed(run(folder, resume=True), folder, undisturbed)


def test_resuming_a_run_that_has_ended_changes_nothing_and_a_longer_one_goes_on(tmp_path, undisturbed):
    run(tmp_path, Schedule(iterations=6, checkpoint_every=2, validate_every=3))
    before = outcome(tmp_path)
    done = run(tmp_path, Schedule(iterations=6, checkpoint_every=2, validate_every=3), resume=True)
    assert int(done.state.iteration) == 6
    assert outcome(tmp_path) == before
    assert_undisturbed(run(tmp_path, resume=True), tmp_path, undisturbed)


def test_a_run_that_stops_early_is_whole_and_can_go_on(tmp_path, undisturbed):
    short = Schedule(iterations=9, checkpoint_every=4, validate_every=4, stop_after=3)
    done = run(tmp_path, short)
    assert int(done.state.iteration) == int(done.best_iteration) == 3  # validated and saved at the end
    assert saved(tmp_path) == [3]
    done = run(tmp_path, resume=True)
    assert int(done.state.iteration) == int(undisturbed[0].state.iteration)
    jax.tree.map(np.testing.assert_array_equal, done.state, undisturbed[0].state)
    assert Schedule(iterations=9, stop_after=20).last == 9


def test_ending_at_the_last_checkpoint_of_a_killed_run_judges_it(tmp_path):
    class Killed(Exception):
        pass

    def fatal_step(state, batch):
        if int(state.iteration) == 4:
            raise Killed
        return step(state, batch)

    schedule = Schedule(iterations=9, checkpoint_every=2, validate_every=9)
    four = dataclasses.replace(schedule, stop_after=4)
    run(tmp_path / "whole", four)
    with pytest.raises(Killed):
        run(tmp_path / "killed", schedule, step_fn=fatal_step)
    assert not lines(tmp_path / "killed", "validation")
    for _ in range(2):  # judged once, whoever asks again
        done = run(tmp_path / "killed", four, resume=True)
        assert int(done.best_iteration) == 4
        assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"of meta-iteration 4, and the run is to end at 2.*--stop-after"):
        run(tmp_path / "whole", dataclasses.replace(schedule, stop_after=2), resume=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = outcome(tmp_path)
    with pytest.raises(ValueError, match=r"already has checkpoints; set `resume` \(--resume\) to go on"):
        run(tmp_path)
    assert outcome(tmp_path) == before


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    run(tmp_path, Schedule(iterations=1), about={"task": "digits"})
    before = outcome(tmp_path)
    message = "config.max_age: None there, 5 now, seed: 0 there, 1 now, task: 'digits' there, 'mine' now"
    with pytest.raises(ValueError, match=rf"a run with other settings \({message}\); resume with"):
        run(tmp_path, resume=True, seed=1, config=MetaTrainingConfig(max_age=5), about={"task": "mine"})
    assert outcome(tmp_path) == before


# What a user has stays.


def test_a_run_over_damaged_checkpoints_keeps_its_own_and_ends_as_undisturbed(tmp_path, undisturbed):
    run(tmp_path, dataclasses.replace(SCHEDULE, checkpoint_every=3))
    for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")[:2]:
        path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="checkpoint-0000000[69].safetensors is damaged"):
        done = run(tmp_path, resume=True)
    assert_undisturbed(done, tmp_path, undisturbed)
    # The lines of what was done twice are beside those that count.
    old = [json.loads(line) for line in (tmp_path / "metrics.jsonl.old").read_text().splitlines()]
    assert [line["iteration"] for line in old] == [4, 5, 6, 7, 8, 9]


def test_metrics_without_checkpoints_are_set_aside_not_emptied(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"iteration": 1, "seconds": 1.0}\nhalf a li')
    run(tmp_path, Schedule(iterations=1))
    assert len(lines(tmp_path, "metrics")) == 1
    run(tmp_path, Schedule(iterations=2), resume=True)  # nothing to set aside
    old = tmp_path / "metrics.jsonl.old"
    assert old.read_text() == '{"iteration": 1, "seconds": 1.0}\nhalf a li\n'


@pytest.mark.parametrize("content", ['{"iteration": 1}', '{"iteration": 1}\n'])
def test_a_log_goes_on_in_a_new_line(tmp_path, content):
    log = tmp_path / "x.jsonl"
    log.write_text(content)
    json_log.rewind_json_lines(log, 1)
    json_log.append_json_line(log, {"iteration": 2})
    assert log.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
    assert not log.with_name("x.jsonl.old").exists()


def test_two_runs_in_one_folder_are_kept_apart(tmp_path):
    with files.locked_folder(tmp_path / "runs"):
        with pytest.raises(OSError, match=r"`output` .*runs is in use by another run; wait .* another"):
            run(tmp_path / "runs")
        assert not (tmp_path / "runs" / "metrics.jsonl").exists()
    run(tmp_path / "runs", Schedule(iterations=1))  # an ended run lets go


def test_an_output_that_is_a_file_or_may_not_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    for inside in (".", "below"):
        with pytest.raises(
            OSError, match=r"`output` .*notes.* is not a folder that can be written to \(.*use"
        ):
            run(tmp_path / "notes" / inside)
    assert (tmp_path / "notes").read_text() == "mine"

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", forbidden)
    with pytest.raises(PermissionError, match=r"can be written to \(Permission denied\); use another one"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("owner", "name", "moment"), [(os, "fsync", 3), (Path, "open", 6)], ids=["checkpoint", "log"]
)
def test_a_full_disk_is_named_and_the_run_can_go_on(tmp_path, monkeypatch, undisturbed, owner, name, moment):
    calls = []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        original = getattr(owner, name)
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match=r"cannot write .*(checkpoint|jsonl).*: No space left on device"):
            run(tmp_path)
    assert saved(tmp_path)
    assert_undisturbed(run(tmp_path, resume=True), tmp_path, undisturbed)


def test_a_schedule_counts_from_one_and_without_an_algorithm_a_task_is_needed(tmp_path):
    for name in ("iterations", "checkpoint_every", "validate_every", "report_every"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            Schedule(**{"iterations": 5} | {name: 0})
    with pytest.raises(ValueError, match="`task` and `learned` are needed without an `algorithm`"):
        meta_train(None, None, {}, None, score, tmp_path, SCHEDULE)
