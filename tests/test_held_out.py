"""The comparison on tasks that were never met: each task's loss, and the table, figure and JSON of one."""

import json
import math
import types

import held_out
import held_out_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ten_times_horizon

from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.experiments import Contender, engine
from mlhf_optax.experiments.results import Curve
from mlhf_optax.pretrained import save_meta_params
from mlhf_optax.tasks import Dataset

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture
def made_up_data(monkeypatch):
    """Eight random images and lines of text in the place of MNIST and Shakespeare."""
    random = np.random.default_rng(0)
    images = {
        "image": random.integers(0, 256, (8, 28, 28, 1), dtype=np.uint8),
        "label": np.arange(8, dtype=np.int32),
    }
    text = {name: random.integers(0, 65, (8, 32)).astype(np.int32) for name in ("image", "label")}
    for name, part in (("load_mnist", images), ("load_shakespeare", text)):
        monkeypatch.setattr(held_out_tasks, name, lambda *folders, part=part: Dataset(part, part, part))


NAMES = sorted(set(held_out_tasks.TASKS) - {"cifar10-conv", *held_out_tasks.BATCH_SIZES})


@pytest.mark.parametrize("name", NAMES)
def test_every_task_starts_at_the_loss_of_knowing_nothing(made_up_data, name):
    task = held_out_tasks.TASKS[name]((None, None))
    params = jax.jit(task.init_fn)(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[:8], task.data.train)
    loss_of = lambda p: task.loss_fn(task.predict_fn(p, batch), batch)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    chance = {"shakespeare-lstm": math.log(65), "shakespeare-transformer": math.log(65), "poisson": 0.7}
    chance |= dict.fromkeys(held_out_tasks.AUTOENCODERS, math.log(2))
    chance |= {"mnist-vae": 784 / 12, "diabetes": 0.5, "burgers": 1.4, "quadratic-deep": 340}
    assert float(loss) == pytest.approx(chance.get(name, math.log(10)), rel=0.6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_every_task_has_a_length():
    assert set(held_out_tasks.LENGTHS) == set(held_out_tasks.TASKS)


def test_the_poisson_residual_is_zero_for_the_solution():
    task = held_out_tasks.TASKS["poisson"]((None, None))
    points = {"image": np.array([[0.3, -0.2], [0.5, 0.5]], np.float32)}
    zero = jax.tree.map(np.zeros_like, task.init_fn(jax.random.key(0)))
    # Of u = 0 the residual is f: 2 pi^2 sin(pi x) sin(pi y), in units of ten.
    f = 2 * np.pi**2 * np.prod(np.sin(np.pi * points["image"]), axis=1)
    np.testing.assert_allclose(task.predict_fn(zero, points)[:, 0], f / 10, rtol=1e-4)


def test_the_burgers_residual_is_that_of_the_start_where_the_network_is_zero():
    task = held_out_tasks.TASKS["burgers"]((None, None))
    x = np.array([0.3, -0.8])
    points = {"image": np.array([[0.3, 0.0], [-0.8, 0.7]], np.float32)}
    zero = jax.tree.map(np.zeros_like, task.init_fn(jax.random.key(0)))
    # Of u = -sin(pi x), for every t.
    u, u_x, u_xx = -np.sin(np.pi * x), -np.pi * np.cos(np.pi * x), np.pi**2 * np.sin(np.pi * x)
    np.testing.assert_allclose(task.predict_fn(zero, points)[:, 0], u * u_x - 0.01 / np.pi * u_xx, rtol=1e-4)


def test_the_loss_of_the_variational_autoencoder_is_squared_error_and_divergence(made_up_data):
    task = held_out_tasks.TASKS["mnist-vae"]((None, None))
    batch = jax.tree.map(lambda leaf: leaf[:8], task.data.train)
    random = np.random.default_rng(0)
    pixels, mean, log_deviation = (random.normal(size=(8, n)).astype(np.float32) for n in (784, 8, 8))
    outputs = np.concatenate([pixels, mean, log_deviation], axis=1)
    # The divergence of N(mean, deviation^2) from N(0, 1), by quadrature.
    x, weights = np.polynomial.hermite_e.hermegauss(20)
    z = mean[..., None] + np.exp(log_deviation)[..., None] * x
    log_ratio = 0.5 * z**2 - 0.5 * x**2 - log_deviation[..., None]
    divergence = np.sum(log_ratio * weights / weights.sum(), axis=(1, 2))
    error = np.sum((pixels - batch["image"] / 255) ** 2, axis=1)
    assert float(task.loss_fn(outputs, batch)) == pytest.approx(np.mean(error + divergence), rel=1e-5)


def test_the_quadratic_has_the_eigenvalues_and_the_noise_floor_of_deepobs():
    task = held_out_tasks.TASKS["quadratic-deep"]((None, None))
    loss = lambda w: task.loss_fn(task.predict_fn({"w": w}, task.data.test), task.data.test)
    eigenvalues = np.linalg.eigvalsh(jax.hessian(loss)(np.zeros(100)))
    assert np.all((eigenvalues[:90] > -1e-4) & (eigenvalues[:90] < 1.001))
    assert np.all((eigenvalues[90:] > 29.9) & (eigenvalues[90:] < 60.1))
    # Published test losses after training are 87.0 to 87.4.
    assert float(loss(np.mean(task.data.train["image"], axis=0))) == pytest.approx(87, rel=0.05)


def untrained(folder):
    """The path of untrained meta-parameters."""
    record = {"optimizer": "mlhf_general", "learning_rate": 1.0, "num_cg_steps": 2, "batch_size": 64}
    record |= {"task": "none", "max_update_ratio": 0.25}
    return str(save_meta_params(folder / "general", init_tensor_lstm(jax.random.key(0)), record))


@pytest.fixture
def run_diabetes(tmp_path, monkeypatch):
    """Runs four steps of few optimizers, each of which is said to take half a second; returns the row."""
    monkeypatch.setattr(held_out, "RATES", {"adam": [1e-2], "sgd": [1e-1], "muon": [1e-2]})
    monkeypatch.setattr(held_out, "STEPS", (1, 4))
    monkeypatch.setattr(engine, "seconds_per_step", lambda task, optimizers: dict.fromkeys(optimizers, 0.5))

    def run(*options):
        arguments = ["--tasks", "diabetes", "--steps", "4", "--seeds", "1", "--output", str(tmp_path / "out")]
        held_out.main([*arguments, "--meta-params", untrained(tmp_path), *options])
        (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
        return row

    return run


def test_ratios_and_losses_are_printed_written_and_drawn(tmp_path, run_diabetes, capsys):
    row = run_diabetes("--learned", "rnnprop", "lodo")
    assert (row["task"], row["steps"], row["accuracy"]) == ("diabetes", [1, 4], None)
    assert set(row["ratios"]["4"]) == {*held_out.RIVALS, "RNNprop", "LODO"}
    assert (row["seeds"], row["last_losses"]) == (1, row["losses"][-1:])
    assert row["state_floats"]["adam defaults"] == pytest.approx(2, abs=0.01)
    assert row["state_floats"]["rnnprop"] > 40
    for step, ratios in row["ratios"].items():  # a step of each is said to take as long
        assert row["by_time"][step] == pytest.approx(ratios)
    assert 0 < row["ratios"]["4"]["default Adam"] < 1
    for name in ("figure.png", "learned.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "best Adam or SGD" in printed
    assert "median over tasks" in printed


def test_with_a_cosine_nothing_is_timed_and_what_has_no_rate_is_left_out(monkeypatch, capsys):
    calls = []

    def compare(task, contenders, steps, **options):
        calls.append((contenders, steps, options["timed"]))
        return types.SimpleNamespace(is_complete=False)

    monkeypatch.setattr(held_out, "compare", compare)
    held_out.main(["--tasks", "diabetes", "--steps", "40", "--cosine"])
    ((contenders, steps, is_timed),) = calls
    families = {"mlhf_general", "gauss_newton", "untrained", "adam defaults", *held_out.RATES}
    assert {one.family for one in contenders} == families
    assert all(setting["cosine_steps"] == 40 for one in contenders for setting in one.settings)
    assert (steps, is_timed) == ([10, 30, 40], False)
    assert "Stopped: --resume goes on" in capsys.readouterr().out


def test_mlhf_may_have_more_cg_steps_and_its_rivals_stay(monkeypatch):
    calls = []
    found = types.SimpleNamespace(is_complete=False)
    monkeypatch.setattr(
        held_out, "compare", lambda task, contenders, *args, **how: calls.append(contenders) or found
    )
    for options in ((), ("--num-cg-steps", "10"), ("--num-cg-steps", "10", "--cosine")):
        held_out.main(["--tasks", "diabetes", "--steps", "40", "--learned", "rnnprop", *options])
    settings = [[one.settings for one in contenders] for contenders in calls]
    assert [of_own[0][0]["num_cg_steps"] for of_own in settings] == [2, 10, 10]
    assert settings[0][1:] == settings[1][1:]


def test_with_a_cosine_updates_fall_to_zero():
    rates = {"learning_rate": np.array([1.0])}
    sgd = Contender("sgd", ("sgd",), ({"learning_rate": 1.0},), optax.sgd, rates)
    contender = held_out.with_cosine(sgd, 4)
    tx = contender.make_optimizer(learning_rate=2.0)
    state, updates = tx.init(jnp.ones(())), []
    for _ in range(5):
        update, state = tx.update(jnp.ones(()), state)
        updates.append(float(update))
    np.testing.assert_allclose(updates, [-2, -1 - 0.5**0.5, -1, -1 + 0.5**0.5, 0], atol=1e-6)
    assert contender.settings == ({"learning_rate": 1.0, "cosine_steps": 4},)


def test_in_equal_time_a_rival_takes_as_many_steps_as_fit_in():
    def curve(family, seconds, losses, steps=(10, 100, 1000)):
        name = f"{family} {seconds} {losses}"
        return Curve(
            name,
            family,
            name,
            {},
            1,
            list(steps),
            losses,
            [None] * len(steps),
            [None] * len(steps),
            seconds,
            None,
        )

    own = curve("mlhf_general", 0.4, [1.0, 0.1, 0.01])
    constant = curve("gauss_newton", 0.8, [2.0, 1.0, 0.5])
    default = curve("adam", 0.1, [4.0, 2.0, 1.0])
    adams = [curve("adam", 0.1, [0.5, math.inf, math.inf]), curve("adam", 0.1, [2.0, 0.5, 0.2])]
    untrained = curve("untrained", 0.4, [2.5, 1.9, 0.5])
    curves = [own, constant, untrained, default, *adams, curve("muon", 0.4, [1.0, 0.2, 0.1])]
    found = held_out.ratios_by_time(curves, 100)
    # 40 s are 50 steps of the constant and 400 of Adam.
    assert found["constant"] == pytest.approx(0.1 / 2 ** (1 - np.log10(5)))
    assert found["untrained"] == pytest.approx(0.1 / 1.9)
    assert found["default Adam"] == pytest.approx(0.1 / 2 ** (1 - np.log10(4)))
    assert found[held_out.ADAM_OR_SGD] == pytest.approx(0.1 / (0.5 * 0.4 ** np.log10(4)))
    assert found["best Muon"] == pytest.approx(0.5)
    assert held_out.ratios(curves, 10)[held_out.ADAM_OR_SGD] == pytest.approx(2.0)
    late = held_out.ratios_by_time(curves, 1000)
    assert math.isnan(late["default Adam"])
    assert late["constant"] == pytest.approx(0.01 / 0.5 ** np.log10(5))
    # Of fewer steps than were recorded the first recorded loss is taken, which is the rival's gain.
    assert held_out.ratios_by_time(curves, 10)["constant"] == pytest.approx(0.5)


def test_test_losses_and_ranks_are_those_of_the_best_of_each_grid():
    def curve(family, train, test):
        name = f"{family} {train}"
        return Curve(name, family, name, {}, 1, [10], [train], [test], [None], None, None)

    own, constant, untrained = curve("mlhf", 1.0, 2.0), curve("gauss_newton", 0.5, 4.0), curve("u", 2.0, 1.0)
    grid = [
        curve("adam", 2.0, 2.5),
        curve("adam", 3.0, 1.0),
        curve("muon", 0.5, None),
        curve("sgd", 4.0, 8.0),
    ]
    curves = [own, constant, untrained, *grid, curve("gauss_newton", 4.0, 0.5)]
    found = held_out.ratios_by_test_loss(curves, 10)
    assert found["constant"] == 0.5
    assert found[held_out.ADAM_OR_SGD] == 2.0  # of the second Adam, whose training loss is higher
    assert found["best Muon"] == 0.0
    assert found["gauss_newton 4.0"] == 4.0
    ratios = held_out.ratios(curves, 10)
    assert ratios[held_out.ADAM_OR_SGD] == pytest.approx(1 / 3)
    assert held_out.ranks_at([{"ratios": {10: ratios}}, {"ratios": {30: ratios}}], 10) == [3]
    none = [one._replace(test_loss=[None]) for one in curves]
    assert held_out.ratios_by_test_loss(none, 10) == {}


def test_the_mlhf_of_the_paper_is_left_out_where_it_does_not_know_the_layers():
    diabetes, quadratic = (
        held_out_tasks.TASKS[name]((None, None)) for name in ("diabetes", "quadratic-deep")
    )
    assert held_out.knows_layers("cifar10", diabetes)
    assert not held_out.knows_layers("cifar10", quadratic)
    assert held_out.knows_layers("l2l", quadratic)
    contenders = held_out.contenders_for(quadratic, held_out.Options(learned=("l2l", "cifar10")), 10)
    assert [one.family for one in contenders][-1] == "l2l"


def test_uneven_times_of_one_optimizer_are_told():
    seconds = {"mlhf_general": 9.0, "adam defaults": 1.0, "adam lr=1": 1.4, "adam lr=2": None}
    assert held_out.spread_of_times(seconds) == 1.4
    assert held_out.spread_of_times({"mlhf_general": 9.0}) == 1.0


def test_unknown_tasks_are_named(capsys):
    with pytest.raises(SystemExit):
        held_out.main(["--tasks", "mnist-transformer"])
    assert "--tasks must be among" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("losses", "rise", "blows_up", "at_chance"),
    [
        ([1.0, 0.5, 0.2, 0.1], 1.0, False, False),
        ([1.0, 0.1, 0.29, 0.05], 2.9, False, False),
        ([1.0, 0.1, 0.4, 0.05], 4.0, True, False),
        ([1.0, 1e-8, 1e-6, 1e-9], 1.0, False, False),  # both below the floor, 2e-3
        ([1.0, 1e-8, 0.02, 1e-9], 10.0, True, False),
        ([2.1, 2.0, 1.9, 1.9], 1.0, False, True),
        ([1.0, 0.5, np.inf, np.inf], None, True, True),
        ([1.0, 0.5, np.nan, 0.5], None, True, False),
    ],
)
def test_trainings_that_blow_up_or_end_at_chance_are_told(losses, rise, blows_up, at_chance):
    found = ten_times_horizon.about(losses, first=2.0)
    assert (found["blows_up"], found["ends_at_chance"]) == (blows_up, at_chance)
    assert found["worst_rise"] == (None if rise is None else pytest.approx(rise))


def test_long_trainings_are_printed_written_and_drawn(tmp_path, capsys):
    arguments = ["--tasks", "diabetes", "--steps", "8", "--records", "4"]
    arguments += ["--meta-params", untrained(tmp_path)]
    ten_times_horizon.main([*arguments, "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["optimizer"], row["is_learned"]) for row in rows][1] == ("adam defaults", False)
    assert rows[0]["is_learned"]
    assert all(row["steps"] == [2, 4, 6, 8] and len(row["losses"]) == 4 for row in rows)
    assert all(row["last"] == row["losses"][-1] < row["first_loss"] for row in rows)
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "worst rise" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ten_times_horizon.main(["--steps", "5", "--records", "6"])
    assert "--records must be at least 1" in " ".join(capsys.readouterr().err.replace("│", " ").split())
