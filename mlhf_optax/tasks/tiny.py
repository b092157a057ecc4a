"""Tiny tasks of many kinds, on which optimizers for any network are meta-trained and validated.

A step of each takes about a millisecond. Each has a part for meta-training alone. Images come from
scikit-learn's digits and, at 8x8 and 16x16 pixels, from CIFAR-10, in both cases from the part for
meta-training. Of CIFAR-10's the first half is for meta-training, the second half for validation. Digits are
also drawn like scanned handwriting, on a larger sheet (:func:`draw_digits`).
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mlhf_optax.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from mlhf_optax.tasks.augmentation import standardize
from mlhf_optax.tasks.cifar10 import load_cifar10
from mlhf_optax.tasks.data import Dataset, Examples, freeze
from mlhf_optax.tasks.digits import load_digits
from mlhf_optax.tasks.models import MLP
from mlhf_optax.tasks.task import Task

_HALF = 15_000  # examples of CIFAR-10 in each of the two parts


def tiny_tasks(data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> list[Task]:
    """Returns the tasks on which optimizers for any network are meta-trained.

    Args:
      data_dir: where CIFAR-10 lies (:func:`mlhf_optax.tasks.load_cifar10`).
      cache_dir: where decoded images are kept.

    Returns:
      Dense networks of several depths and activations, two with sparse inputs and one with wrong labels;
      autoencoders; convolutions with and without normalisation; an attention block; a block that mixes
      patches by dense layers; a recurrent network; and regression on all examples at once.

    Raises:
      FileNotFoundError: if CIFAR-10 is not there; it says how to get it.

    Example:
      ``[task.name for task in tiny_tasks("/data/tensorflow_datasets")]``
    """
    digits = load_digits().meta_train
    colour = _cifar(data_dir, cache_dir, 8, slice(0, _HALF))
    grey = _grey(colour)
    ink = draw_digits(14, 4000, slice(0, None, 2))
    return [
        _classify("digits", MLP((32,)), digits, 64, 0.5),
        _classify("tanh", MLP((32,), activation="tanh"), grey, 64, 0.5),
        _classify("deep", MLP((48, 48)), grey, 128),
        _autoencoder("autoencoder", MLP((32, 8, 32), 64, "tanh"), _as_pixels(grey), 64),
        _classify("sparse", MLP((32, 24), activation="gelu"), _sparse(grey, 1), 32, 0.5),
        _classify("noisy", MLP((24,), activation="sigmoid"), _with_wrong_labels(grey, 0.2), 16, 0.5),
        _classify("conv", _Patches((8, 16)), colour, 64),
        _classify("conv-norm", _Patches((8, 8), norm=True), colour, 32, 0.5),
        _classify("attention", _Attention(16), grey, 64),
        _classify("recurrent", _Recurrent(24), digits, 64, 0.5),
        _regression("regression"),
        _classify("ink", MLP((32,)), _standardized(ink), 64, 0.5),
        _autoencoder("ink-autoencoder", MLP((48, 16, 8, 16, 48), 14 * 14), ink, 64),
        _classify("mixer", _Mixer(16), grey, 64),
    ]


def tiny_validation_tasks(
    data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> list[Task]:
    """Returns larger networks on other images, by which meta-parameters are chosen.

    Args:
      data_dir: where CIFAR-10 lies.
      cache_dir: where decoded images are kept.

    Example:
      ``[task.name for task in tiny_validation_tasks("/data/tensorflow_datasets")]``
    """
    other = slice(_HALF, 2 * _HALF)
    colour, large = (_cifar(data_dir, cache_dir, size, other) for size in (8, 16))
    ink = draw_digits(28, 8000, slice(1, None, 2))
    return [
        _classify("wide", MLP((128, 128)), colour, 256),
        _classify("sparse-wide", MLP((100, 100)), _sparse(_grey(large), 3), 128),
        _classify("digits-deep", MLP((40, 40), activation="tanh"), load_digits().meta_train, 32, 0.5),
        _autoencoder("autoencoder-wide", MLP((48, 8, 48), 64, "tanh"), _as_pixels(_grey(colour)), 128),
        _classify("conv-wide", _Patches((12, 24, 32)), large, 64),
        _classify("ink-wide", MLP((100, 100)), _standardized(ink), 128),
        _autoencoder("ink-autoencoder-wide", MLP((100, 40, 12, 40, 100), 28 * 28), ink, 128),
    ]


def _classify(name: str, model: nn.Module, examples: Examples, batch_size: int, share: float = 0.25) -> Task:
    shape = examples["image"].shape[1:]
    init = lambda key: model.init(key, jnp.zeros((1, *shape)))["params"]
    predict = lambda params, batch: model.apply({"params": params}, batch["image"])
    return Task(
        name,
        init,
        predict,
        SoftmaxCrossEntropy(),
        load_data=lambda: Dataset(examples),
        batch_size=batch_size,
        meta_batch_size=batch_size,
        curvature_batch_size=share,
        pretrained="general",
    )


def _autoencoder(name: str, model: nn.Module, examples: Examples, batch_size: int) -> Task:
    pixels = examples["image"].reshape(len(examples["image"]), -1)
    task = _classify(name, model, {"image": pixels}, batch_size)
    return dataclasses.replace(task, loss_fn=SigmoidCrossEntropy(targets="image"))


def _regression(name: str) -> Task:
    random = np.random.Generator(np.random.PCG64(3))
    inputs = random.standard_normal((256, 6), np.float32)
    weights = [random.standard_normal(shape, np.float32) for shape in ((6, 12), (12, 2))]
    targets = np.tanh(0.5 * np.tanh(0.6 * inputs @ weights[0]) @ weights[1])
    task = _classify(name, MLP((24, 24), 2, "tanh"), freeze(image=inputs, target=targets), 256, 1.0)
    return dataclasses.replace(task, loss_fn=SquaredError(targets="target"))


# Data.


def _cifar(data_dir: Any, cache_dir: Any, size: int, rows: slice) -> Examples:
    """Returns standardised images of the part for meta-training, as means over squares of pixels."""
    part = load_cifar10(data_dir, cache_dir).meta_train
    square = 32 // size
    images = part["image"][rows].reshape(-1, size, square, size, square, 3).mean((2, 4), np.float32)
    return freeze(image=(images - images.mean()) / images.std(), label=part["label"][rows])


def _grey(examples: Examples) -> Examples:
    images = examples["image"].mean(-1, keepdims=True)
    return freeze(image=(images - images.mean()) / images.std(), label=examples["label"])


def _as_pixels(examples: Examples) -> Examples:
    """Returns standardised images as ones in [0, 1]."""
    pixels = 1 / (1 + np.exp(-1.5 * examples["image"]))
    return freeze(image=pixels.astype(np.float32), label=examples["label"])


def draw_digits(size: int, count: int, rows: slice) -> Examples:
    """Returns scikit-learn's digits as scanned handwriting: turned, slanted, moved, on an empty square.

    About four fifths of the pixels are 0, and some of them always.

    Args:
      size: height and width of the square.
      count: number of images.
      rows: digits of the part for meta-training that are drawn from.

    Returns:
      Images (count, size, size, 1) in [0, 1] and their labels.

    Example:
      >>> draw_digits(14, 3, slice(0, 100))["image"].shape
      (3, 14, 14, 1)
    """
    digits, random = load_digits().meta_train, np.random.Generator(np.random.PCG64(5))
    chosen = random.integers(0, len(digits["label"][rows]), count)
    turn, slant = random.uniform(-0.25, 0.25, (2, count))
    height_and_width, shift = random.uniform(0.65, 0.8, (2, count)), random.uniform(-0.06, 0.06, (2, count))
    contrast = random.uniform(1.5, 3.0, (count, 1, 1))
    # The point of the digit that a pixel of the square shows.
    y, x = (np.indices((size, size)).reshape(2, -1, 1) + 0.5) / size - 0.5 - shift[:, None]
    y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
    points = 8 * np.stack([y, x + slant * y]) / height_and_width[:, None] + 3.5
    points = points.transpose(2, 0, 1).reshape(count, 2, size, size).astype(np.float32)
    interpolated = jax.vmap(functools.partial(jax.scipy.ndimage.map_coordinates, order=1))
    drawn = interpolated(digits["image"][rows][chosen, :, :, 0], (points[:, 0], points[:, 1]))
    images = np.clip((np.asarray(drawn) - 0.25) * contrast, 0, 1)[..., None]
    return freeze(image=images.astype(np.float32), label=digits["label"][rows][chosen])


def _standardized(examples: Examples) -> Examples:
    """Returns images with mean 0 and standard deviation 1 each, so that an empty place is below 0."""
    return freeze(image=np.asarray(standardize(examples["image"])), label=examples["label"])


def _sparse(examples: Examples, frame: int) -> Examples:
    """Returns images like scanned ink: most inputs are 0 most of the time, and many always."""
    images = np.clip((examples["image"] - 0.45) / 2, 0, 1)
    size = images.shape[1]
    from_centre = np.hypot(*np.meshgrid(*2 * [np.arange(size) - (size - 1) / 2]))
    images = images * (from_centre < 0.5 * size + 0.4)[..., None]
    images = np.pad(images, ((0, 0), (frame, frame), (frame, frame), (0, 0)))
    return freeze(image=images.astype(np.float32), label=examples["label"])


def _with_wrong_labels(examples: Examples, share: float) -> Examples:
    random = np.random.Generator(np.random.PCG64(4))
    labels = examples["label"].copy()
    is_wrong = random.random(len(labels)) < share
    labels[is_wrong] = random.integers(0, 10, int(is_wrong.sum()))
    return freeze(image=examples["image"], label=labels)


# Networks.


class _Patches(nn.Module):
    """Convolutions as products with patches, which vmap turns into larger products.

    The first has 3x3 kernels, the others 2x2; each halves height and width.
    """

    channels: tuple[int, ...]
    norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = jnp.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)))
        for number, channels in enumerate(self.channels):
            size = 2 if number else 3
            shape = (size, size, x.shape[-1], channels)
            scale = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            kernel = self.param(f"kernel_{number}", scale, shape)
            bias = self.param(f"bias_{number}", nn.initializers.zeros, (channels,))
            x = _patches(x, size) @ kernel.reshape(-1, channels) + bias
            x = nn.relu(nn.GroupNorm(num_groups=2)(x) if self.norm else x)
        return nn.Dense(10)(x.reshape(len(x), -1))


def _patches(x: jax.Array, size: int) -> jax.Array:
    """Returns squares of pixels two apart, shape (B, rows, columns, size * size * channels)."""
    span = 2 * ((x.shape[1] - size) // 2) + 1
    cut = lambda i, j: x[:, i : i + span : 2, j : j + span : 2]
    return jnp.concatenate([cut(i, j) for i in range(size) for j in range(size)], -1)


class _Attention(nn.Module):
    """One block of attention on the rows of an image."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], images.shape[1], -1)
        x = nn.Dense(self.width)(x)
        x = x + self.param("position", nn.initializers.normal(0.3), x.shape[1:])
        queries = nn.DenseGeneral((3, self.width), use_bias=False)(nn.LayerNorm(use_bias=False)(x))
        q, k, v = (queries[:, :, i] for i in range(3))
        weights = nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / math.sqrt(self.width))
        x = x + nn.Dense(self.width, use_bias=False)(weights @ v)
        x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class _Mixer(nn.Module):
    """One block that mixes the patches of 2x2 pixels of an image, then their channels, by dense layers."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        count, side = len(images), images.shape[1] // 2
        x = images.reshape(count, side, 2, side, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(self.width)(x.reshape(count, side * side, -1))
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(side * side)(nn.gelu(nn.Dense(2 * side * side)(y))).swapaxes(1, 2)
        x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class _Recurrent(nn.Module):
    """A tanh network that reads an image row by row."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        rows = nn.Dense(self.width)(images.reshape(images.shape[0], images.shape[1], -1))
        recurrent = self.param("recurrent", nn.initializers.orthogonal(), (self.width, self.width))
        state = jnp.zeros((images.shape[0], self.width))
        for t in range(rows.shape[1]):
            state = jnp.tanh(rows[:, t] + state @ recurrent)
        return nn.Dense(10)(state)
