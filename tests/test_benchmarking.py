"""Timing in turns, and the records of measurements."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mlhf_optax.comparison import benchmarking
from mlhf_optax.comparison.benchmarking import Timing, interleaved
from mlhf_optax.comparison.machine import free_memory, needed_memory
from mlhf_optax.comparison.reporting import command_line, report, write_json


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


def test_seconds_a_call_whatever_the_calls_a_stretch(clock):
    thunks = {"slow": clock.takes(3.0), "fast": clock.takes(1.0)}
    times = interleaved(thunks, repeats=3, inner={"slow": 1, "fast": 5})
    assert list(times) == ["slow", "fast"]
    assert times["slow"].rounds == (3.0, 3.0, 3.0)
    assert times["fast"].rounds == (1.0, 1.0, 1.0)
    assert times["slow"].over(times["fast"]) == 3.0


def test_contenders_take_turns_and_none_always_comes_first(clock):
    calls = []
    thunks = {name: clock.takes(1.0, calls, name) for name in "ab"}
    interleaved(thunks, repeats=3, inner=2)
    assert "".join(calls) == "ab" + "aabb" + "bbaa" + "aabb"  # one each to warm up


def test_stretches_are_long_enough_to_be_measured(clock, monkeypatch):
    lengths = []
    measure = benchmarking._seconds

    def spy(thunk, count):
        lengths.append(measure(thunk, count))
        return lengths[-1]

    monkeypatch.setattr(benchmarking, "_seconds", spy)
    times = interleaved({"short": clock.takes(1e-4), "long": clock.takes(0.5)}, repeats=2)
    assert min(lengths[-4:]) >= 0.02
    assert max(lengths[-4:]) == pytest.approx(0.5)  # one call where one is long enough
    assert times["short"].median == pytest.approx(1e-4)


def test_a_function_too_short_for_the_clock_is_timed_all_the_same():
    assert interleaved({"nothing": lambda: None}, repeats=1, stretch_seconds=1e-3)["nothing"].median > 0


def test_rounds_are_reported(clock):
    done = []
    interleaved({"a": clock.takes(1.0)}, repeats=3, inner=1, on_round=done.append)
    assert done == [1, 2, 3]


def test_arrays_are_waited_for():
    waited = []

    class Result:
        def block_until_ready(self):
            waited.append(True)

    interleaved({"a": lambda: [jnp.ones(2), Result()]}, repeats=2, inner=3)
    assert len(waited) == 3  # the warm-up and each stretch


def test_the_ratio_is_that_of_the_rounds_not_of_the_medians():
    # A machine that gets slower hides the ratio of 2 from the medians, not from the rounds.
    ours, theirs = Timing((2.0, 4.0, 20.0, 40.0)), Timing((1.0, 2.0, 10.0, 20.0))
    assert ours.over(theirs) == 2.0


def test_the_spread_leaves_out_outliers_where_there_are_many_rounds():
    timing = Timing((100.0, *range(1, 20), 0.0))
    assert (timing.low, timing.median, timing.high) == (2, 10, 18)
    assert timing.to_json() == {"median": 10, "low": 2, "high": 18}
    assert Timing((3.0,)).to_json() == {"median": 3.0, "low": 3.0, "high": 3.0}


@pytest.mark.parametrize(
    ("thunks", "options", "message"),
    [
        ({}, {}, "needs a function to time"),
        ({"a": int}, {"repeats": 0}, "repeats >= 1, got .* and 0"),
        ({"a": int}, {"inner": 0}, "at least one call a stretch, got {'a': 0}"),
        ({"a": int, "b": int}, {"inner": {"a": 1}}, "got {'a': 1, 'b': 0}"),
    ],
)
def test_bad_arguments_are_refused_by_name(thunks, options, message):
    with pytest.raises(ValueError, match=message):
        interleaved(thunks, **options)


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="got 1 and 2 of them; time both"):
        Timing((1.0,)).over(Timing((1.0, 1.0)))


def test_memory_counts_donated_arrays_once():
    shape = jax.ShapeDtypeStruct((1000,), jnp.float32)
    program = lambda **options: jax.jit(lambda x: x + 1, **options).lower(shape).compile()
    assert needed_memory(program()) >= 8000
    assert 4000 <= needed_memory(program(donate_argnums=0)) < 8000


def test_free_memory_is_that_of_the_device_else_of_the_system(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 10, "bytes_in_use": 3}

    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and jax.default_backend() == "cpu":
        assert 2**20 < free_memory() < 2**50
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert free_memory() == 7


def test_the_command_is_the_one_to_type(monkeypatch):
    monkeypatch.setattr("sys.argv", ["anything.py", "--json", "a b.json"])
    assert command_line("x.py") == "python benchmarks/x.py --json 'a b.json'"
    assert command_line("x.py", []) == "python benchmarks/x.py"


def test_a_report_is_written_whole_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "report.json"
    written = report("python benchmarks/x.py", rows=[{"ratio": 1.5}])
    write_json(path, written)
    assert json.loads(path.read_text()) == written
    assert written["date"].endswith("+00:00")
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
