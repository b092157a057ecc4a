"""Rivals that need no tuning, the new tasks, and the ratios over all of them."""

import json
import math

import jax
import jax.numpy as jnp
import new_tasks
import numpy as np
import optax
import polars as pl
import pytest
import readme_figure
import tasks
import untuned
import untuned_ratios
import untuned_rivals
from blobs import TASK
from matplotlib.figure import Figure

from mlhf_optax.experiments import compare
from mlhf_optax.tasks import Dataset

pytestmark = pytest.mark.usefixtures("unoptimised")


# Rivals.


def test_schedule_free_is_judged_by_its_average():
    rival = untuned_rivals.UNTUNED["schedule-free"]
    found = compare(TASK, [rival.contender("schedule-free", 3)], [3], seeds=[0], timed=False)
    changed = untuned_rivals.dataclasses.replace(rival, eval_params=None)
    raw = compare(TASK, [changed.contender("schedule-free", 3)], [3], seeds=[0], timed=False)
    losses = found.frame["train_loss"].item(), raw.frame["train_loss"].item()
    assert losses[0] != losses[1]
    assert found.frame["label"].item() == "schedule-free AdamW"


def test_the_fixed_nadamw_warms_up_for_a_tenth_and_ends_at_zero():
    tx = untuned_rivals.UNTUNED["nadamw"].make(20)
    params = jnp.full((), 1e-6)  # so small that weight decay does not count
    state, sizes = tx.init(params), []
    for _ in range(21):
        update, state = tx.update(jnp.ones(()), state, params)
        sizes.append(-float(update))
    # Of a constant gradient the update is the rate, but for the look ahead of Nesterov.
    assert sizes[0] == 0
    assert np.argmax(sizes) == 2
    assert sizes[2] == pytest.approx(1.908e-3, rel=0.2)
    assert sizes[-1] == pytest.approx(0, abs=1e-9)
    assert untuned_rivals.UNTUNED["nadamw"].contender("nadamw", 20).settings[0]["num_steps"] == 20


def test_what_is_not_installed_or_knows_no_such_layers_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr(untuned_rivals.importlib.util, "find_spec", lambda name: None)
    quadratic = tasks.TASKS["quadratic-deep"]((None, None))
    names = ("adam", "psgd-kron", "soap", "prodigy", "cifar10")
    found, left_out = untuned_rivals.rivals_of(quadratic, names, 10)
    assert [one.labels[0] for one in found] == ["adam defaults", "Prodigy"]
    assert left_out == {
        "PSGD Kron": "psgdax is not installed",
        "SOAP": "jno is not installed",
        "MLHF cifar10": "does not know the layers",
    }
    assert new_tasks.problem("neural-ode") == "diffrax is not installed"
    assert new_tasks.problem("flow") == ""


def test_a_package_that_fails_on_a_task_is_left_out_with_its_words(monkeypatch):
    def refuse(length):
        raise TypeError("no vectors\nat all")

    monkeypatch.setattr(untuned_rivals.importlib.util, "find_spec", lambda name: True)
    one = untuned_rivals.Untuned("Kron", refuse, package="psgdax")
    monkeypatch.setitem(untuned_rivals.UNTUNED, "psgd-kron", one)
    assert untuned_rivals.rivals_of(TASK, ["psgd-kron"], 10) == ([], {"Kron": "TypeError: no vectors"})


@pytest.mark.parametrize("name", [name for name, one in untuned_rivals.UNTUNED.items() if not one.package])
def test_every_rival_of_optax_lowers_a_quadratic(name):
    tx = optax.with_extra_args_support(untuned_rivals.UNTUNED[name].make(100))
    loss = lambda params: 0.5 * jnp.sum((params["w"] - 1) ** 2)
    params = {"w": jnp.zeros((3, 2))}

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(100):
        params, state = step(params, state)
    assert float(loss(params)) < 0.999 * 3


# Tasks.


@pytest.fixture
def made_up_data(monkeypatch):
    """Random images and text in the place of MNIST, CIFAR-10 and Shakespeare."""
    random = np.random.default_rng(0)
    part = lambda size, channels: {
        "image": random.integers(0, 256, (16, size, size, channels), dtype=np.uint8),
        "label": np.arange(16, dtype=np.int32) % 10,
    }
    for module, name, of in ((new_tasks, "load_mnist", part(28, 1)), (tasks, "load_mnist", part(28, 1))):
        monkeypatch.setattr(module, name, lambda *folders, of=of: Dataset({}, of, of))
    of_cifar10 = part(32, 3)
    monkeypatch.setattr(new_tasks, "load_cifar10", lambda *folders: Dataset({}, of_cifar10, of_cifar10))
    text = np.concatenate([[0], random.integers(1, 65, 30), [0], random.integers(1, 65, 80), [0, 5, 6, 7, 0]])
    texts = dict.fromkeys(("train", "test"), text.astype(np.int32))
    monkeypatch.setattr(new_tasks, "read_shakespeare", lambda folder: texts)
    monkeypatch.setattr(new_tasks, "_pretrained", lambda folders: _network())


def _network():
    params = new_tasks.MLP((256, 256)).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    return jax.tree.map(np.asarray, params)


CHANCE = {
    "clicks": math.log(2),
    "contrastive": math.log(16),
    "citations": math.log(7),
    "neural-ode": 1.3,
    "flow": 5.0,
    "lstm-lengths": math.log(65),
}


@pytest.mark.parametrize("name", [name for name in new_tasks.NEW_TASKS if name != "neural-ode"])
def test_every_new_task_starts_at_the_loss_of_knowing_nothing(made_up_data, name):
    task = new_tasks.NEW_TASKS[name]((None, None))
    params = jax.jit(task.init_fn)(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[: min(16, len(leaf))], task.data.train)
    loss_of = lambda p: task.loss_fn(task.predict_fn(p, batch), batch)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    assert float(loss) == pytest.approx(CHANCE.get(name, math.log(10)), rel=0.8)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert new_tasks.NEW_LENGTHS[name] >= 300


def test_the_neural_ode_starts_at_the_loss_of_standing_still():
    pytest.importorskip("diffrax")
    task = new_tasks.NEW_TASKS["neural-ode"]((None, None))
    zero = jax.tree.map(np.zeros_like, task.init_fn(jax.random.key(0)))
    data = task.data.test
    still = np.mean(0.5 * (data["target"] - data["image"][:, None]) ** 2)
    assert float(task.loss_fn(task.predict_fn(zero, data), data)) == pytest.approx(still, rel=1e-4)


def test_lines_are_cut_at_their_ends_and_only_what_is_there_counts(made_up_data):
    part = new_tasks.lines((None, None)).train
    assert part["length"].tolist() == [31, 4]  # one of eighty characters is too long
    assert part["label"][1].tolist() == [5, 6, 7] + [0] * 45
    assert part["image"][1].tolist() == [0, 5, 6, 7] + [0] * 44
    np.testing.assert_array_equal(part["mask"].sum(axis=1), part["length"])


def test_a_fifth_of_the_labels_for_training_is_drawn_at_random(monkeypatch):
    part = {"image": np.zeros((5000, 28, 28, 1), np.uint8), "label": np.zeros(5000, np.int32)}
    monkeypatch.setattr(new_tasks, "load_mnist", lambda *folders: Dataset({}, part, part))
    data = new_tasks.NEW_TASKS["label-noise"]((None, None)).data
    assert np.mean(data.train["label"] != 0) == pytest.approx(0.2 * 0.9, abs=0.02)
    assert not data.test["label"].any()


def test_the_flow_is_a_probability_density():
    task = new_tasks.NEW_TASKS["flow"]((None, None))
    params = task.init_fn(jax.random.key(0))
    x = np.linspace(-12, 12, 400, dtype=np.float32)
    points = np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)
    density = np.exp(jax.jit(task.predict_fn)(params, {"image": points}))
    assert density.sum() * (x[1] - x[0]) ** 2 == pytest.approx(1, rel=0.02)


def test_lora_starts_as_the_frozen_network_and_has_few_parameters(made_up_data):
    task = new_tasks.NEW_TASKS["lora"]((None, None))
    params, base = task.init_fn(jax.random.key(0)), _network()
    batch = task.data.test
    expected = new_tasks.mnist_task("", new_tasks.MLP((256, 256)), (None, None)).predict_fn(base, batch)
    np.testing.assert_allclose(task.predict_fn(params, batch), expected, rtol=1e-4, atol=1e-5)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(params) * 30 < count(base)


# Ratios.


def row(task, **curves):
    """A row of results: of every optimizer the losses and the seconds per step."""
    kept = {
        label: {
            "train_loss": losses,
            "test_loss": [None if loss is None else 2 * loss for loss in losses],
            "seconds_per_step": seconds,
            "is_tuned": label == "grid",
        }
        for label, (losses, seconds) in curves.items()
    }
    return {"task": task, "steps": [10, 100, 1000], "left_out": {}, "curves": kept}


ROWS = [
    row(
        "one",
        MLHF=([1.0, 0.1, 0.01], 0.2),
        adam=([2.0, 0.05, 0.04], 0.1),
        slow=([4.0, 1.0, 0.5], 0.4),
        grid=([1e-3] * 3, 0.1),
    ),
    row("two", MLHF=([1.0, 1.0, 1.0], 0.2), adam=([0.5, 2.0, None], 0.1), slow=([4.0, 2.0, 0.5], 0.4)),
]


def ratio_of(task, rival, kind, when):
    frame = untuned_ratios.frame_of(ROWS, "MLHF")
    found = frame.filter(
        pl.col("task") == task, pl.col("rival") == rival, pl.col("kind") == kind, pl.col("when") == when
    )
    return found["ratio"].item() if len(found) else None


def test_the_best_of_the_untuned_is_chosen_task_by_task():
    best = untuned_ratios.BEST
    assert ratio_of("one", best, "steps", "10") == pytest.approx(0.5)
    assert ratio_of("one", best, "steps", "100") == pytest.approx(2.0)
    assert ratio_of("two", best, "steps", "1000") == pytest.approx(2.0)
    assert ratio_of("two", "adam", "steps", "1000") == 0  # it diverged
    assert ratio_of("one", best, "test", "10") == pytest.approx(0.5)
    assert ratio_of("one", "grid", "steps", "10") is None  # what is tuned is no rival here


def test_in_equal_time_fast_rivals_take_more_steps_and_what_was_not_trained_for_long_is_left_out():
    # 20 s are 200 steps of Adam and 50 of the slow one.
    adam = math.exp(np.interp(math.log(200), np.log([100, 1000]), np.log([0.05, 0.04])))
    assert ratio_of("one", "adam", "time", "100") == pytest.approx(0.1 / adam)
    slow = math.exp(np.interp(math.log(50), np.log([10, 100]), np.log([4.0, 1.0])))
    assert ratio_of("one", "slow", "time", "100") == pytest.approx(0.1 / slow)
    assert ratio_of("one", "adam", "time", "1000") is None
    # At the end of Adam's training MLHF has taken 500 steps; at the end of its own the slow one 500.
    own = math.exp(np.interp(math.log(500), np.log([100, 1000]), np.log([0.1, 0.01])))
    assert ratio_of("one", "adam", "time", "end") == pytest.approx(own / 0.04)
    slow = math.exp(np.interp(math.log(500), np.log([100, 1000]), np.log([1.0, 0.5])))
    assert ratio_of("one", "slow", "time", "end") == pytest.approx(0.01 / slow)


def test_aims_are_judged_by_the_strongest_rival_and_by_each():
    found = untuned_ratios.summary(untuned_ratios.frame_of(ROWS, "MLHF"))
    assert untuned_ratios.strongest(found, "steps", "1000") == ["slow", "adam"]
    assert untuned_ratios.strongest(found, "time", "3") == []
    origin = {
        "machine": {"backend": "cpu", "cpu": "Processor", "cores": 1},
        "versions": {"jax": "1", "python": "3"},
        "command": "python x.py --tasks a-1 b-1 c-1 d-1 --seeds 1",
        "date": "2026-12-01T00:00",
        "left_out": {"neural-ode": "diffrax is not installed"},
        "rows": ROWS,
    }
    rows = untuned.aims(origin).rows
    assert rows[1][1:] == ["1 of 2 at 100 steps", "**missed**"]
    assert rows[2][2] == "**missed**"
    assert "slow (1 of 2)" in rows[3][1]
    samples = untuned.by_samples(origin)
    assert [line[0] for line in samples.rows[1:4]] == [untuned_ratios.BEST, "slow", "adam"]
    assert "Left out: neural-ode (diffrax is not installed)." in samples.note
    assert samples.about["command"] == "python x.py --seeds 1"


def test_the_figure_shows_the_strongest_rivals_and_the_tuned_ones(tmp_path):
    """From what was measured; the tasks that are named, a task that was not measured is refused."""
    results, figure = tmp_path / "results.json", tmp_path / "figure.png"
    results.write_text(json.dumps({"rows": ROWS, "left_out": {}}))
    where = ["--results", str(results), "--figure", str(figure)]
    readme_figure.main([*where, "--tasks", "one"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"`tasks` must be among one, two, got \('three',\)"):
        readme_figure.main([*where, "--tasks", "three"])
    drawn = Figure()
    untuned.draw(drawn, {"rows": ROWS}, count=1)
    assert len(drawn.axes) == 4
    lines = {line.get_label(): line for line in drawn.axes[0].lines}
    assert lines.keys() == {"MLHF", "slow"}
    np.testing.assert_allclose(drawn.axes[2].lines[0].get_xdata(), 0.2 * np.array([10, 100, 1000]))
    assert [axes.get_xlabel() for axes in drawn.axes] == ["steps", "steps", "seconds", "seconds"]
