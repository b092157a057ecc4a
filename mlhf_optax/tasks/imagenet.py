"""ImageNet (ILSVRC2012), streamed, and the task on it that the paper carries MLHF over to.

Crops of the training images are made by worker processes while the device computes.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from mlhf_optax.tasks.data import Dataset, Examples, Source, Stream
from mlhf_optax.tasks.prepared import cache_folder, data_folder, decode_parts, open_sources
from mlhf_optax.tasks.resnet import Stem, resnet18
from mlhf_optax.tasks.task import FileOptions, Task, file_task

NUM_CLASSES = 1000
_CROP_AREA = (0.08, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)


def load_imagenet(
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    image_size: int = 224,
    num_held: int = 5000,
    num_workers: int = 8,
) -> Dataset:
    """Returns ImageNet: 1.28 million training images, uint8, in 1000 classes, streamed.

    Held in memory are the first ``num_held`` training images for meta-training, as many of the others for
    taking the training loss, and as many validation images for testing. All that is not for meta-training
    is streamed for training. (In its files the dataset is shuffled: the first images are a random sample.)

    Args:
      data_dir: as for :func:`load_cifar10`, and so are ``cache_dir`` and the errors.
      cache_dir: likewise.
      image_size: height and width of the crops.
      num_held: images of each part that is held in memory.
      num_workers: processes that decode.

    Example:
      ``len(load_imagenet("/data/tensorflow_datasets").train)`` is 1,276,167.
    """
    return _load(data_folder(data_dir), cache_folder(cache_dir), image_size, num_held, num_workers)


@functools.cache
def _load(folder: Path, cache_dir: Path, image_size: int, num_held: int, num_workers: int) -> Dataset:
    sources = open_sources("imagenet2012", folder)
    too_few = [split for split in ("train", "validation") if len(sources.get(split, ())) <= 2 * num_held]
    if too_few:
        raise ValueError(
            f"the dataset 'imagenet2012' in {folder} must have more than {2 * num_held} examples in "
            f"{' and '.join(too_few)}; it was prepared only in part: delete it and prepare it again"
        )
    train, test = sources["train"], sources["validation"]
    central = functools.partial(central_crop, image_size=image_size)
    held = {
        "meta_train": Stretch(train, 0, num_held, central),
        "sample": Stretch(train, num_held, 2 * num_held, central),
        "test": Stretch(test, 0, num_held, central),
    }

    cache_name, shape = f"imagenet-{image_size}-{num_held}", (image_size, image_size, 3)
    held = decode_parts(held, "imagenet2012", folder, cache_name, cache_dir, shape, NUM_CLASSES)
    crop = functools.partial(random_crop, image_size=image_size)
    stream = Stream(Stretch(train, num_held, len(train)), crop, held["sample"], num_workers)
    return Dataset(held["meta_train"], stream, held["test"])


class Stretch:
    """The examples of a source from one number up to another, each transformed if so wished."""

    def __init__(self, source: Source, start: int, stop: int, transform: Callable[[Any], Any] | None = None):
        self._source, self._numbers, self._transform = source, range(start, stop), transform

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self._source[self._numbers[index]]
        return example if self._transform is None else self._transform(example)


def random_crop(example: Mapping[str, Any], rng: np.random.Generator, image_size: int) -> Examples:
    """Cuts out a part of random area and shape, as networks for ImageNet are usually trained.

    The part has 8 % to 100 % of the area and sides in a ratio of 3:4 to 4:3; where ten attempts do not
    fit into the image, it is the largest square in the middle.

    Returns:
      ``"image"``, uint8 of shape (image_size, image_size, 3), and ``"label"``, int32.
    """
    height, width = example["image"].shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*_CROP_AREA)
        aspect = np.exp(rng.uniform(*np.log(_CROP_ASPECT)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return _resized(example, (left, top, left + w, top + h), image_size)
    return central_crop(example, image_size, share=1.0)


def central_crop(example: Mapping[str, Any], image_size: int, share: float = 0.875) -> Examples:
    """Cuts out the middle square, whose side is a share of the shorter side; else as :func:`random_crop`."""
    height, width = example["image"].shape[:2]
    side = max(1, round(share * min(height, width)))
    left, top = (width - side) // 2, (height - side) // 2
    return _resized(example, (left, top, left + side, top + side), image_size)


def _resized(example: Mapping[str, Any], box: tuple[int, int, int, int], image_size: int) -> Examples:
    from PIL import Image

    image = Image.fromarray(example["image"])
    pixels = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box)
    return {"image": np.asarray(pixels), "label": np.int32(example["label"])}


def imagenet_resnet18(
    channels: int = 64,
    stem: Stem = "imagenet",
    image_size: int = 224,
    *,
    num_workers: int = 8,
    **options: Unpack[FileOptions],
) -> Task:
    """Returns the task that the paper's section 4.4 carries MLHF over to: ResNet-18 v2 on ImageNet.

    The training part is streamed; worker processes crop it at random.

    Args:
      channels: channels of the first stage, at least 1; they double three times.
      stem: see :class:`mlhf_optax.tasks.ResNet`.
      image_size: height and width of the images that the network sees.
      num_workers: processes that read and decode.
      **options: see :class:`mlhf_optax.tasks.FileOptions`; all batches are of 64.

    Example:
      >>> imagenet_resnet18().num_classes
      1000
    """
    name = "imagenet-resnet18"
    name += "" if channels == 64 else f"-{channels}"
    name += "" if stem == "imagenet" else f"-{stem}-stem"
    name += "" if image_size == 224 else f"-{image_size}px"
    return file_task(
        name,
        f"ImageNet ({image_size}x{image_size}, 1000 classes), ResNet-18 v2 from {channels} channels",
        resnet18(NUM_CLASSES, stem, channels),
        (image_size, image_size, 3),
        functools.partial(load_imagenet, image_size=image_size, num_workers=num_workers),
        {"batch_size": 64, "meta_batch_size": 64, **options},
        num_classes=NUM_CLASSES,
        pretrained="cifar10_resnet",
    )
