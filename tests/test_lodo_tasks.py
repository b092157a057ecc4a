"""The script that runs LODO on tasks of its paper, on a few steps."""

import json

import jax.numpy as jnp
import lodo_tasks
import numpy as np
import optax
import pytest

from mlhf_optax.tasks import Dataset
from mlhf_optax.tasks.data import freeze

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_the_floor_of_the_bowl_is_that_of_the_paper():
    assert lodo_tasks.noisy_bowl()[1]["floor"] == pytest.approx(7.41, abs=0.01)


def test_what_is_seen_of_a_pixel_lies_above_it_or_to_its_left():
    images = np.arange(2 * 28 * 28, dtype=np.float32).reshape(2, 28, 28) / 255
    padded = jnp.asarray(np.pad(images, ((0, 0), (4, 0), (4, 4))))
    places = [(0, 0, 0), (1, 10, 27), (1, 27, 5)]
    inputs, labels = lodo_tasks.context(padded, jnp.array(places))
    for (image, row, column), seen, label in zip(places, inputs, labels, strict=True):
        at = lambda r, c, image=image: images[image, r, c] if 0 <= r < 28 and 0 <= c < 28 else 0.0
        expected = [at(row + r, column + c) for r in range(-4, 0) for c in range(-4, 5)]
        expected += [at(row, column + c) for c in range(-4, 0)] + [row / 28, column / 28]
        np.testing.assert_allclose(seen, expected, rtol=1e-6)
        assert int(label) == image * 784 + row * 28 + column


def test_pixels_are_learned_and_a_training_that_diverges_is_told(tmp_path, monkeypatch, capsys):
    image = np.where(np.arange(28) % 2, 1.0, 0.0).astype(np.float32) * np.ones((5, 28, 1), np.float32)
    part = freeze(image=image[..., None], label=np.zeros(5, np.int32))
    monkeypatch.setattr(lodo_tasks, "load_mnist", lambda *folders: Dataset(part, part, part))
    chosen = {name: lodo_tasks.OPTIMIZERS["pixels"][name] for name in ("adam, rate 0.01", "lodo, rate 0.3")}
    blown_up = {"momentum": optax.sgd(jnp.nan)}
    monkeypatch.setitem(lodo_tasks.OPTIMIZERS, "pixels", chosen | blown_up)
    lodo_tasks.main(["--task", "pixels", "--steps", "30", "--output", str(tmp_path)])
    adam, lodo, momentum = json.loads((tmp_path / "pixels.json").read_text())["rows"]
    assert adam["losses"][-1] < 0.2 * adam["losses"][0]  # the stripes are told by the pixel to the left
    assert lodo["losses"][-1] < 0.5 * lodo["losses"][0]
    assert momentum["losses"][-1] is None
    assert "diverged" in capsys.readouterr().out
