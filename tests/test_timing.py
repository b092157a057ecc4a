"""Timing in turns, the options of benchmarks, and what is recorded with a measurement."""

import json
import time

import jax.numpy as jnp
import optax
import pytest
from blobs import SGD, TASK

from mlhf_optax.experiments import timing
from mlhf_optax.experiments.origin import origin_line, with_origin, write_json
from mlhf_optax.experiments.scripts import BenchmarkOptions, command_line, in_fresh_process, parse_options
from mlhf_optax.experiments.timing import Timing, interleaved, seconds_per_step


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it on."""

    class Clock:
        now = 0.0

        def takes(self, seconds, calls=None, name=None):
            def thunk():
                self.now += seconds
                if calls is not None:
                    calls.append(name)

            return thunk

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_seconds_per_call_whatever_the_calls_per_stretch(clock):
    thunks = {"slow": clock.takes(3.0), "fast": clock.takes(1.0)}
    times = interleaved(thunks, repeats=3, calls=5)
    assert list(times) == ["slow", "fast"]
    assert (times["slow"].rounds, times["fast"].rounds) == ((3.0,) * 3, (1.0,) * 3)
    assert times["slow"].over(times["fast"]) == 3.0


def test_contenders_take_turns_and_none_always_comes_first(clock):
    calls = []
    thunks = {name: clock.takes(1.0, calls, name) for name in "ab"}
    interleaved(thunks, repeats=3, calls=2)
    assert "".join(calls) == "ab" + "aabb" + "bbaa" + "aabb"  # one each to warm up


def test_stretches_are_long_enough_to_be_measured(clock, monkeypatch):
    lengths, measure = [], timing._seconds
    monkeypatch.setattr(timing, "_seconds", lambda *given: lengths.append(measure(*given)) or lengths[-1])
    times = interleaved({"short": clock.takes(1e-4), "long": clock.takes(0.5)}, repeats=2)
    assert min(lengths[-4:]) >= 0.02
    assert max(lengths[-4:]) == pytest.approx(0.5)  # one call where one is long enough
    assert times["short"].median == pytest.approx(1e-4)


def test_a_function_too_short_for_the_clock_is_timed_all_the_same():
    assert interleaved({"nothing": lambda: None}, repeats=1, stretch_seconds=1e-3)["nothing"].median > 0


def test_arrays_are_waited_for():
    waited = []

    class Result:
        def block_until_ready(self):
            waited.append(True)

    interleaved({"a": lambda: [jnp.ones(2), Result()]}, repeats=2, calls=3)
    assert len(waited) == 3  # the warm-up and each stretch


def test_the_ratio_is_that_of_the_rounds_not_of_the_medians():
    # A machine that gets slower hides the ratio of 2 from the medians, not from the rounds.
    ours, theirs = Timing((2.0, 4.0, 20.0, 40.0)), Timing((1.0, 2.0, 10.0, 20.0))
    assert ours.over(theirs) == 2.0
    with pytest.raises(ValueError, match="got 1 and 2 of them; time both"):
        Timing((1.0,)).over(Timing((1.0, 1.0)))


def test_the_spread_leaves_out_outliers_where_there_are_many_rounds():
    many, one = Timing((100.0, *range(1, 20), 0.0)), Timing((3.0,))
    assert (many.low, many.median, many.high) == (2, 10, 18)
    assert (one.low, one.median, one.high) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("thunks", "options"), [({}, {}), ({"a": int}, {"repeats": 0}), ({"a": int}, {"calls": 0})]
)
def test_bad_arguments_are_refused(thunks, options):
    with pytest.raises(ValueError, match="needs a function to time, `repeats` >= 1 and `calls` >= 1, got"):
        interleaved(thunks, **options)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"repeats": 0}])
def test_arguments_of_the_time_per_step_are_checked(options):
    with pytest.raises(ValueError, match="`num_steps` and `repeats` must be at least 1"):
        seconds_per_step(TASK, {}, **options)


def test_every_optimizer_is_timed():
    first = {name: values[0] for name, values in SGD.stacked.items()}
    optimizers = {"sgd": (SGD.make_optimizer, first), "zero": (optax.set_to_zero, {})}
    times = seconds_per_step(TASK, optimizers, num_steps=2, repeats=3)
    assert times.keys() == optimizers.keys()
    assert min(times.values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "`repeats` must be at least 1, got 0"),
        (["--repeats", "many"], "many"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_options_end_the_script_with_what_is_wanted(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(BenchmarkOptions, "About.", arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_is_the_one_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["anything.py", "--json", "a b.json"])
    monkeypatch.chdir(tmp_path)
    assert command_line(str(tmp_path / "speed" / "x.py")) == "python speed/x.py --json 'a b.json'"
    assert command_line("x.py", []) == "python x.py"
    machine = {"backend": "cpu", "cpu": "Processor", "cores": 1}
    content = {"machine": machine, "versions": {"jax": "1", "python": "3"}, "date": "2026-11-21T00:00"}
    assert origin_line(content | {"command": "c"}) == "`c`; Processor, 1 core; jax 1, Python 3; 2026-11-21."


def test_json_is_written_whole_into_a_new_folder(tmp_path):
    path, content = (
        tmp_path / "new" / "report.json",
        with_origin("python benchmarks/x.py", rows=[{"ratio": 1.5}]),
    )
    write_json(path, content)
    assert json.loads(path.read_text()) == content
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_what_a_process_of_its_own_prints_last_is_returned_and_its_failure_reported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys; print('noise'); n = json.loads(sys.argv[2]); print(1 / n, os.environ['A'])"
    )
    with pytest.raises(RuntimeError, match=r"(?s)measuring 0 ended with status 1 .*ZeroDivisionError"):
        in_fresh_process(str(script), 0)
    assert in_fresh_process(str(script), 2, {"A": ""}) == 0.5
