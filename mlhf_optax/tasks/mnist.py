"""MNIST for the protocol on which learned optimizers of the literature are meta-trained and compared."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from mlhf_optax.support.checks import require
from mlhf_optax.tasks.data import Dataset, Examples, freeze
from mlhf_optax.tasks.models import MLP
from mlhf_optax.tasks.prepared import cache_folder, data_folder, decode_parts, open_sources
from mlhf_optax.tasks.task import Task, image_task

SIZE = 28


def load_mnist(
    data_dir: str | Path | None = None, cache_dir: str | Path | None = None, size: int = SIZE
) -> Dataset:
    """Returns MNIST, whose training set is both the part for meta-training and the part for training.

    That is the protocol of the literature, and the exception here: elsewhere meta-training has a part of
    its own. The images are decoded once, then kept in a file.

    Args:
      data_dir: folder of prepared datasets (:func:`mlhf_optax.tasks.prepared.data_folder`).
      cache_dir: folder of decoded arrays (:func:`mlhf_optax.tasks.prepared.cache_folder`).
      size: height and width; 14, 7, 4, 2 or 1 are means over squares of pixels.

    Returns:
      A :class:`Dataset` of 60,000, the same 60,000, and 10,000 examples; images are float32 of shape
      (N, size, size, 1) in [0, 1], labels int32 (N,), both read-only.

    Raises:
      FileNotFoundError: if the dataset is not there; it says how to get it.
      ImportError: if tensorflow-datasets is missing.
      ValueError: if the files are damaged, or ``size`` does not divide 28.

    Example:
      ``load_mnist("/data/tensorflow_datasets").train["image"].shape`` is ``(60000, 28, 28, 1)``.
    """
    _check_size(size)
    return _load(data_folder(data_dir), cache_folder(cache_dir), size)


def decode_mnist(
    data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> dict[str, Examples]:
    """Returns the parts ``"train"`` and ``"test"`` as they are published: images uint8 (N, 28, 28, 1).

    Args and errors as of :func:`load_mnist`.
    """
    folder, form = data_folder(data_dir), ((SIZE, SIZE, 1), 10)
    sources = open_sources("mnist", folder)
    return decode_parts(sources, "mnist", folder, "mnist", cache_folder(cache_dir), *form)


@functools.cache
def _load(folder: Path, cache_dir: Path, size: int) -> Dataset:
    parts = decode_mnist(folder, cache_dir)
    train, test = (_shrunk(parts[name], size) for name in ("train", "test"))
    return Dataset(train, train, test)


def _shrunk(part: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    window = SIZE // size
    blocks = part["image"].reshape(-1, size, window, size, window, 1)
    images = blocks.mean(axis=(2, 4), dtype=np.float32) / np.float32(255.0)
    return freeze(image=images, label=part["label"])


def mnist_mlp(
    hidden: Sequence[int] = (20,),
    activation: str = "sigmoid",
    *,
    batch_size: int = 128,
    meta_batch_size: int = 128,
    size: int = SIZE,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Task:
    """Returns the task on which L2L, RNNprop and HyperAdam were meta-trained: a small MLP on MNIST.

    All weights and biases start from a normal distribution of standard deviation 0.1.

    Args:
      hidden: width of every hidden layer.
      activation: a key of :data:`mlhf_optax.tasks.ACTIVATIONS`.
      batch_size: examples per mini-batch when networks are trained.
      meta_batch_size: examples per mini-batch in meta-training.
      size: height and width of the images, a divisor of 28; small ones are cheap to meta-train on.
      data_dir: see :func:`load_mnist`.
      cache_dir: see :func:`load_mnist`.

    Returns:
      The task. Variants carry what differs in their name, as in ``"mnist-mlp-7x7-relu"``.

    Raises:
      ValueError: for an unknown ``activation``, a width below one, or a ``size`` that does not divide 28.

    Example:
      >>> mnist_mlp(activation="relu", size=7).name
      'mnist-mlp-7x7-relu'

    Source: Lv, Jiang, Li 2017, section 5.1.
    """
    _check_size(size)
    hidden = tuple(hidden)
    name = "mnist-mlp" if size == SIZE else f"mnist-mlp-{size}x{size}"
    if hidden != (20,):
        name += "".join(f"-{width}" for width in hidden) or "-linear"
    name += "" if activation == "sigmoid" else f"-{activation}"
    layers = "-".join(map(str, (size * size, *hidden, 10)))
    task = image_task(
        name,
        f"MNIST ({size}x{size}, 10 classes; one part for meta-training and training), dense layers {layers}, "
        f"{activation}",
        MLP(hidden, 10, activation),
        (size, size, 1),
        load_data=functools.partial(load_mnist, data_dir, cache_dir, size),
        num_classes=10,
        batch_size=batch_size,
        meta_batch_size=meta_batch_size,
    )

    def init_fn(key):
        shapes = jax.eval_shape(task.init_fn, key)
        draw = lambda x, k: 0.1 * jax.random.normal(k, x.shape, x.dtype)
        return jax.tree.map(draw, shapes, optax.tree.split_key_like(key, shapes))

    return dataclasses.replace(task, init_fn=init_fn)


def _check_size(size: int) -> None:
    """Raises ValueError unless images of 28 x 28 can be shrunk to this size."""
    require(size >= 1 and SIZE % size == 0, "size", f"a divisor of {SIZE}, such as 28, 14 or 7", size)
