"""The tasks that were never met, and what is trained on them."""

import math
import types

import held_out
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rivals
import tasks

from mlhf_optax.experiments import Contender
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
        monkeypatch.setattr(tasks, name, lambda *folders, part=part: Dataset(part, part, part))


NAMES = sorted(set(tasks.TASKS) - {"cifar10-conv", *tasks.BATCH_SIZES})


@pytest.mark.parametrize("name", NAMES)
def test_every_task_starts_at_the_loss_of_knowing_nothing(made_up_data, name):
    task = tasks.TASKS[name]((None, None))
    params = jax.jit(task.init_fn)(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[:8], task.data.train)
    loss_of = lambda p: task.loss_fn(task.predict_fn(p, batch), batch)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    chance = {"shakespeare-lstm": math.log(65), "shakespeare-transformer": math.log(65), "poisson": 0.7}
    chance |= dict.fromkeys(tasks.AUTOENCODERS, math.log(2))
    chance |= {"mnist-vae": 784 / 12, "diabetes": 0.5, "burgers": 1.4, "quadratic-deep": 340}
    assert float(loss) == pytest.approx(chance.get(name, math.log(10)), rel=0.6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_every_task_has_a_length():
    assert set(tasks.LENGTHS) == set(tasks.TASKS)


def test_the_poisson_residual_is_zero_for_the_solution():
    task = tasks.TASKS["poisson"]((None, None))
    points = {"image": np.array([[0.3, -0.2], [0.5, 0.5]], np.float32)}
    zero = jax.tree.map(np.zeros_like, task.init_fn(jax.random.key(0)))
    # Of u = 0 the residual is f: 2 pi^2 sin(pi x) sin(pi y), in units of ten.
    f = 2 * np.pi**2 * np.prod(np.sin(np.pi * points["image"]), axis=1)
    np.testing.assert_allclose(task.predict_fn(zero, points)[:, 0], f / 10, rtol=1e-4)


def test_the_burgers_residual_is_that_of_the_start_where_the_network_is_zero():
    task = tasks.TASKS["burgers"]((None, None))
    x = np.array([0.3, -0.8])
    points = {"image": np.array([[0.3, 0.0], [-0.8, 0.7]], np.float32)}
    zero = jax.tree.map(np.zeros_like, task.init_fn(jax.random.key(0)))
    # Of u = -sin(pi x), for every t.
    u, u_x, u_xx = -np.sin(np.pi * x), -np.pi * np.cos(np.pi * x), np.pi**2 * np.sin(np.pi * x)
    np.testing.assert_allclose(task.predict_fn(zero, points)[:, 0], u * u_x - 0.01 / np.pi * u_xx, rtol=1e-4)


def test_the_loss_of_the_variational_autoencoder_is_squared_error_and_divergence(made_up_data):
    task = tasks.TASKS["mnist-vae"]((None, None))
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
    task = tasks.TASKS["quadratic-deep"]((None, None))
    loss = lambda w: task.loss_fn(task.predict_fn({"w": w}, task.data.test), task.data.test)
    eigenvalues = np.linalg.eigvalsh(jax.hessian(loss)(np.zeros(100)))
    assert np.all((eigenvalues[:90] > -1e-4) & (eigenvalues[:90] < 1.001))
    assert np.all((eigenvalues[90:] > 29.9) & (eigenvalues[90:] < 60.1))
    # Published test losses after training are 87.0 to 87.4.
    assert float(loss(np.mean(task.data.train["image"], axis=0))) == pytest.approx(87, rel=0.05)


def test_with_a_cosine_nothing_is_timed_and_what_has_no_rate_is_left_out(monkeypatch, capsys):
    calls = []

    def compare(task, contenders, steps, **options):
        calls.append((contenders, steps, options["timed"]))
        return types.SimpleNamespace(is_complete=False)

    monkeypatch.setattr(held_out, "compare", compare)
    held_out.main(["--tasks", "diabetes", "--steps", "40", "--cosine"])
    ((contenders, steps, is_timed),) = calls
    families = {"mlhf_general", "gauss_newton", "untrained", "adam defaults", *rivals.RATES}
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
    contender = rivals.with_cosine(sgd, 4)
    tx = contender.make_optimizer(learning_rate=2.0)
    state, updates = tx.init(jnp.ones(())), []
    for _ in range(5):
        update, state = tx.update(jnp.ones(()), state)
        updates.append(float(update))
    np.testing.assert_allclose(updates, [-2, -1 - 0.5**0.5, -1, -1 + 0.5**0.5, 0], atol=1e-6)
    assert contender.settings == ({"learning_rate": 1.0, "cosine_steps": 4},)


def test_the_mlhf_of_the_paper_is_left_out_where_it_does_not_know_the_layers():
    diabetes, quadratic = (tasks.TASKS[name]((None, None)) for name in ("diabetes", "quadratic-deep"))
    assert rivals.knows_layers("cifar10", diabetes)
    assert not rivals.knows_layers("cifar10", quadratic)
    assert rivals.knows_layers("l2l", quadratic)
    contenders = rivals.contenders_for(quadratic, held_out.Options(learned=("l2l", "cifar10")), 10)
    assert [one.family for one in contenders][-1] == "l2l"
