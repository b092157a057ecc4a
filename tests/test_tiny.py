"""Tiny tasks, and meta-training over long horizons on them by the command line, on made-up images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import load_pretrained
from mlhf_optax.experiments.cli.commands import run
from mlhf_optax.learned.mlhf_general import MLHFGeneralOptions
from mlhf_optax.tasks import Dataset, tiny, tiny_tasks, tiny_validation_tasks

pytestmark = pytest.mark.usefixtures("unoptimised")

HALF = 260


@pytest.fixture
def images(monkeypatch):
    """Random images in the place of CIFAR-10; each half holds more than the largest batch."""
    random = np.random.default_rng(0)
    part = {
        "image": random.integers(0, 256, (2 * HALF, 32, 32, 3), dtype=np.uint8),
        "label": random.integers(0, 10, 2 * HALF).astype(np.int32),
    }
    monkeypatch.setattr(tiny, "load_cifar10", lambda *folders: Dataset(part, {}, {}))
    monkeypatch.setattr(tiny, "_HALF", HALF)
    return part


def first_gradient(task, key):
    """Two batches, and the loss of fresh parameters on the first of them with its gradient."""
    batch = task.draw(key, (2,))
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    loss_of = lambda p: task.loss_fn(task.predict_fn(p, first), first)
    return batch, jax.value_and_grad(loss_of)(task.init_fn(key))


def test_every_network_has_finite_losses_and_gradients_on_batches_of_its_size(images):
    for task in [*tiny_tasks(), *tiny_validation_tasks()]:
        batch, (loss, gradient) = jax.jit(functools.partial(first_gradient, task))(jax.random.key(0))
        assert {leaf.shape[:2] for leaf in jax.tree.leaves(batch)} == {(2, task.batch_size)}, task.name
        assert np.isfinite(loss), task.name
        for leaf in jax.tree.leaves(gradient):
            assert np.all(np.isfinite(leaf)), task.name
            assert np.any(leaf != 0), task.name


def test_training_and_validation_share_no_image_of_cifar10(images):
    by_name = {task.name: task for task in (*tiny_tasks(), *tiny_validation_tasks())}
    means = images["image"].reshape(-1, 8, 4, 8, 4, 3).mean((2, 4))
    for name, rows in (("conv", slice(0, HALF)), ("wide", slice(HALF, None))):
        part = means[rows]
        expected = (part - part.mean()) / part.std()
        np.testing.assert_allclose(by_name[name].data.meta_train["image"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(by_name[name].data.meta_train["label"], images["label"][rows])
    assert np.mean(by_name["sparse"].data.meta_train["image"] == 0) > 0.5


def test_training_and_validation_draw_different_digits_like_scanned_handwriting(images, monkeypatch):
    sources, draw = [], tiny.draw_digits
    monkeypatch.setattr(tiny, "draw_digits", lambda *own: sources.append(own[2]) or draw(*own))
    by_name = {task.name: task for task in (*tiny_tasks(), *tiny_validation_tasks())}
    training, validation = (set(range(719)[rows]) for rows in sources)
    assert training | validation == set(range(719))
    assert not training & validation
    drawn = [tiny.draw_digits(28, 300, rows) for rows in (slice(0, None, 2), slice(1, None, 2))]
    for examples in drawn:
        image = examples["image"]
        assert image.shape == (300, 28, 28, 1)
        assert image.min() == 0
        assert image.max() == 1
        assert 0.6 < np.mean(image == 0) < 0.9
        assert np.mean(image.max(0) == 0) > 0.05  # some places are always empty
        # Ink lies around the centre, and every class is there.
        place = np.indices((28, 28)).reshape(2, -1) @ image.reshape(300, -1).T / image.sum((1, 2, 3)) - 13.5
        assert np.abs(place).max() < 6
        assert set(examples["label"]) == set(range(10))
    assert by_name["ink-autoencoder-wide"].data.meta_train["image"].min() == 0  # targets are probabilities
    ink = by_name["ink"].data.meta_train["image"]
    np.testing.assert_allclose(ink.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(ink.std((1, 2, 3)), 1, rtol=1e-4)


def test_a_drawn_digit_without_a_turn_is_the_digit(monkeypatch):
    middle = type("Middle", (), {"integers": lambda self, low, high, size: np.full(size, 3)})()
    middle.uniform = lambda low, high, size: np.full(size, 1.0 if low == 0.65 else (low + high) / 2)
    monkeypatch.setattr(np.random, "Generator", lambda bits: middle)
    drawn = tiny.draw_digits(8, 1, slice(0, None, 2))
    digit = tiny.load_digits().meta_train["image"][6]
    np.testing.assert_allclose(drawn["image"][0], np.clip(2.25 * (digit - 0.25), 0, 1), atol=1e-5)


def test_a_batch_of_all_examples_holds_each_once():
    task = tiny._regression("regression")
    batch = task.draw(jax.random.key(0), (3,))
    np.testing.assert_array_equal(batch["image"][2], task.data.meta_train["image"])


def test_patches_are_convolutions():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (2, 2, 3, 5))
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(tiny._patches(x, 2) @ kernel.reshape(-1, 5), wanted, rtol=1e-4, atol=1e-5)


def arguments(folder, *more):
    small = ["--num-pairs", "2", "--truncation", "2", "--horizons", "2,4", "--validation-steps", "1,2"]
    own = ["--only", "regression", "--units", "2", "--output", str(folder)]
    return ["meta-train-long", *own, *small, "--iterations", "4", "--validate-every", "2", *more]


def test_the_command_line_meta_trains_and_goes_on_to_equal_bits(images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlhf_optax.experiments.cli.meta_train_command.tiny_validation_tasks",
        lambda folder: [tiny._regression("other")],
    )
    assert run(arguments(tmp_path / "whole")) == 0
    assert run(arguments(tmp_path / "parts", "--stop-after", "2")) == 0
    assert run(arguments(tmp_path / "parts", "--resume")) == 0
    whole, parts = (
        load_pretrained(tmp_path / name / "meta_params.safetensors") for name in ("whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, whole.meta_params, parts.meta_params)
    record = whole.record
    assert record["optimizer"] == "mlhf_general"
    assert record["trained_on"] == "regression"
    assert len(record["validation"]) == 2
    assert record["meta_training"]["config"]["horizons"] == [2, 4]
    assert (record["num_cg_steps"], record["curvature_batch_size"]) == (2, 0.25)
    tx = whole.optimizer(lambda p, b: b["x"] @ p, lambda z, b: jnp.mean(z**2))
    assert tx.init(jnp.ones((3, 2)))[0].controller.hidden.shape == (1, 2)


def test_what_goes_on_from_meta_parameters_is_judged_against_the_untrained(images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlhf_optax.experiments.cli.meta_train_command.tiny_validation_tasks",
        lambda folder: [tiny._regression("other")],
    )
    assert run(arguments(tmp_path / "first", "--meta-learning-rate", "1.0")) == 0
    start = tmp_path / "first" / "meta_params.safetensors"
    still = ["--meta-learning-rate", "1e-9", "--start", str(start)]
    assert run(arguments(tmp_path / "more", *still)) == 0
    first, more = (load_pretrained(tmp_path / name / "meta_params.safetensors") for name in ("first", "more"))
    best = min(first.record["validation"], key=lambda entry: entry["score"])
    assert best["score"] != 0
    np.testing.assert_allclose(more.record["validation"][0]["score"], best["score"], rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "mnist"], "`only` must be among digits, tanh"),
        (["--horizons", "5"], "must be 2 whole numbers separated by commas, like 20,3000, got '5'"),
        (["--horizons", "9,5"], "`horizons` must be two ascending numbers"),
        (["--devices", "1000"], "`devices` must lie between 1 and"),
        (["--units", "0"], "`units` must lie between 1 and 4096, got 0"),
    ],
)
def test_wrong_options_are_explained(images, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as caught:
        run(arguments(tmp_path, *more))
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_wrong_options_of_the_optimizer_are_refused():
    with pytest.raises(ValueError, match="`curvature_batch_size`"):
        MLHFGeneralOptions(curvature_batch_size=0)
