"""CIFAR-10, split as in the paper, and the tasks on it of the paper's experiments."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from mlhf_optax.tasks.data import Dataset
from mlhf_optax.tasks.models import ConvNet, Convolution
from mlhf_optax.tasks.prepared import cache_folder, data_folder, decode_parts, open_sources
from mlhf_optax.tasks.resnet import mini_resnet
from mlhf_optax.tasks.task import FileOptions, Task, file_task

IMAGE_SHAPE = (32, 32, 3)
SIZES = {"train": 50_000, "test": 10_000}
META_TRAIN_SHARE = 3 / 5


def load_cifar10(data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Dataset:
    """Returns CIFAR-10: 60,000 images of 32x32 pixels in 10 classes.

    The first 3/5 of the training set are for meta-training, the last 2/5 for training, in the order in
    which the dataset was published, which is that of the paper. Decoded once, then kept in a file.

    Args:
      data_dir: folder of prepared datasets (:func:`mlhf_optax.tasks.prepared.data_folder`).
      cache_dir: folder of decoded arrays (:func:`mlhf_optax.tasks.prepared.cache_folder`).

    Returns:
      A :class:`Dataset` of 30,000, 20,000 and 10,000 examples; images are uint8 of shape
      (N, 32, 32, 3), labels int32 (N,), both read-only.

    Raises:
      FileNotFoundError: if the dataset is not there; it says how to get it.
      ImportError: if tensorflow-datasets is missing.
      ValueError: if the files are damaged.

    Example:
      ``load_cifar10("/data/tensorflow_datasets").train["image"].shape`` is ``(20000, 32, 32, 3)``.

    Source: paper, section 4.1.
    """
    return _load(data_folder(data_dir), cache_folder(cache_dir))


@functools.cache
def _load(folder: Path, cache_dir: Path) -> Dataset:
    sources = open_sources("cifar10", folder)
    found = {split: len(sources.get(split, ())) for split in SIZES}
    if found != SIZES:
        raise ValueError(
            f"the dataset 'cifar10' in {folder} must have {SIZES} examples, it has {found}; it was prepared "
            "only in part: delete it and prepare it again"
        )
    whole = decode_parts(sources, "cifar10", folder, "cifar10", cache_dir, IMAGE_SHAPE, 10)
    boundary = round(META_TRAIN_SHARE * SIZES["train"])
    rows = lambda chosen: {key: array[chosen] for key, array in whole["train"].items()}
    return Dataset(rows(slice(boundary)), rows(slice(boundary, None)), whole["test"])


def cifar10_convnet(
    channels: Sequence[int] = (32, 64),
    hidden: Sequence[int] = (32,),
    *,
    convolution: Convolution | None = None,
    **options: Unpack[FileOptions],
) -> Task:
    """Returns the task of the paper's section 4.1: CUDA-convnet on CIFAR-10.

    Args:
      channels: output channels of the 5x5 convolutions; ``(8, 16)`` with ``hidden=(16,)`` is a narrow
        network that is cheap to meta-train on.
      hidden: widths of the dense layers before the last one.
      convolution: see :class:`mlhf_optax.tasks.ConvNet`.
      **options: see :class:`mlhf_optax.tasks.FileOptions`; batches are of 128, in meta-training of 64.

    Returns:
      The task. Variants carry what differs in their name, as in ``"cifar10-convnet-8-16-dense-16"``.

    Raises:
      TypeError: if ``channels`` is a number.
      ValueError: for a width below one.

    Example:
      >>> cifar10_convnet(channels=(8, 16), hidden=(16,)).name
      'cifar10-convnet-8-16-dense-16'
    """
    if isinstance(channels, int):
        raise TypeError(f"`channels` must be one number per convolution, such as (8, 16), got {channels}")
    channels, hidden = tuple(channels), tuple(hidden)
    joined = lambda sign, widths: sign.join(map(str, widths))
    name = "cifar10-convnet"
    name += "" if channels == (32, 64) else f"-{joined('-', channels)}"
    name += "" if hidden == (32,) else f"-{joined('-', ('dense', *hidden))}"
    return file_task(
        name,
        f"CIFAR-10 (32x32, 10 classes), 5x5 convolutions {joined(' and ', channels)}, dense "
        f"{joined(' and ', (*hidden, 10))}",
        ConvNet(channels, hidden, convolution=convolution),
        IMAGE_SHAPE,
        load_cifar10,
        {"batch_size": 128, "meta_batch_size": 64, **options},
        num_classes=10,
        pad=4,
        pretrained="cifar10",
    )


def cifar10_resnet9(channels: int = 16, **options: Unpack[FileOptions]) -> Task:
    """Returns the task of the paper's section 4.4: the mini ResNet v2 of 9 blocks on CIFAR-10.

    Args:
      channels: channels of the first three blocks, one number; the others have two and four times as many.
      **options: see :class:`mlhf_optax.tasks.FileOptions`; all batches are of 128.

    Raises:
      TypeError: if ``channels`` is not a number.
      ValueError: if it is below one.

    Example:
      >>> cifar10_resnet9(channels=4).name
      'cifar10-resnet9-4'
    """
    if not isinstance(channels, int):
        raise TypeError(f"`channels` must be one number, those of the first blocks, got {channels!r}")
    widths = ", ".join(f"3x{width * channels}" for width in (1, 2, 4))
    return file_task(
        "cifar10-resnet9" if channels == 16 else f"cifar10-resnet9-{channels}",
        f"CIFAR-10 (32x32, 10 classes), ResNet v2 of 9 blocks of {widths} channels",
        mini_resnet(10, channels),
        IMAGE_SHAPE,
        load_cifar10,
        {"batch_size": 128, "meta_batch_size": 128, **options},
        num_classes=10,
        pad=4,
        pretrained="cifar10_resnet",
    )
