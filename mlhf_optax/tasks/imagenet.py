"""ImageNet (ILSVRC2012), streamed: crops of the training images are made while the device computes."""

import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlhf_optax.tasks.array_cache import cached_arrays
from mlhf_optax.tasks.datasets import Dataset, Examples, freeze
from mlhf_optax.tasks.streaming import Stream
from mlhf_optax.tasks.tfds_data import Source, data_folder, open_sources

NUM_CLASSES = 1000
_CROP_AREA = (0.08, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)


def imagenet(
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    image_size: int = 224,
    num_held: int = 5000,
    num_workers: int = 8,
) -> Dataset:
    """Returns ImageNet: 1.28 million training images in 1000 classes, streamed.

    What is held in memory are the first ``num_held`` training images for meta-training, as many of the
    others for taking the training loss, and as many validation images for testing. All that is not for
    meta-training is streamed for training. (In its files the dataset is shuffled, so the first images
    are a random sample.)

    Args:
      data_dir: folder of prepared datasets (:func:`mlhf_optax.tasks.tfds_data.data_folder`).
      cache_dir: folder of decoded arrays (:func:`mlhf_optax.tasks.array_cache.cache_folder`).
      image_size: height and width of the crops.
      num_held: images of each part that is held in memory.
      num_workers: processes that decode.

    Returns:
      A :class:`Dataset` whose part ``train`` is a :class:`Stream`; images are uint8.

    Raises:
      FileNotFoundError: if the dataset is not there; it says how to get it.
      ImportError: if tensorflow-datasets is missing.
      ValueError: if the files are damaged.

    Example:
      ``len(imagenet("/data/tensorflow_datasets").train)`` is 1,276,167.
    """
    folder, cache = data_folder(data_dir), None if cache_dir is None else Path(cache_dir)
    return _load(folder, cache, image_size, num_held, num_workers)


@functools.cache
def _load(folder: Path, cache_dir: Path | None, image_size: int, num_held: int, num_workers: int) -> Dataset:
    sources = open_sources("imagenet2012", folder)
    too_few = [split for split in ("train", "validation") if len(sources.get(split, ())) <= 2 * num_held]
    if too_few:
        raise ValueError(
            f"the dataset 'imagenet2012' in {folder} must have more than {2 * num_held} examples in "
            f"{' and '.join(too_few)}; it was prepared only in part: delete it and prepare it again"
        )
    train, test = sources["train"], sources["validation"]
    central = functools.partial(central_crop, image_size=image_size)
    parts = {
        "meta_train": Stretch(train, 0, num_held),
        "sample": Stretch(train, num_held, 2 * num_held),
        "test": Stretch(test, 0, num_held),
    }

    def decode() -> dict[str, np.ndarray]:
        held = {name: _all_of(part, central, folder) for name, part in parts.items()}
        return {f"{name}_{key}": array for name, part in held.items() for key, array in part.items()}

    described = b"".join(
        path.read_bytes() for path in sorted(folder.glob("imagenet2012/*/dataset_info.json"))
    )
    name = f"imagenet-{image_size}-{num_held}-{zlib.crc32(described):08x}"
    arrays = cached_arrays(name, decode, cache_dir)
    held = {part: freeze({key: arrays[f"{part}_{key}"] for key in ("image", "label")}) for part in parts}
    crop = functools.partial(random_crop, image_size=image_size)
    stream = Stream(Stretch(train, num_held, len(train)), crop, held["sample"], num_workers)
    return Dataset(held["meta_train"], stream, held["test"])


class Stretch:
    """The examples of a source from one number to another.

    Example:
      >>> list(Stretch("abcde", 1, 3))
      ['b', 'c']
    """

    def __init__(self, source: Source, start: int, stop: int):
        self._source, self._numbers = source, range(start, stop)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._numbers)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns an example."""
        return self._source[self._numbers[index]]


def random_crop(example: Mapping[str, Any], rng: np.random.Generator, image_size: int) -> Examples:
    """Cuts out a part of random area and shape, as networks for ImageNet are usually trained.

    The part has 8 % to 100 % of the area and sides in a ratio of 3:4 to 4:3; where ten attempts do not
    fit into the image, it is the largest square in the middle.

    Args:
      example: ``"image"``, uint8 of shape (height, width, 3), and ``"label"``.
      rng: random numbers.
      image_size: height and width of the result.

    Returns:
      ``"image"``, uint8 of shape (image_size, image_size, 3), and ``"label"``, int32.

    Example:
      >>> image = np.zeros((40, 60, 3), np.uint8)
      >>> random_crop({"image": image, "label": 3}, np.random.default_rng(0), 8)["image"].shape
      (8, 8, 3)
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
    """Cuts out the middle square.

    Args:
      example: see :func:`random_crop`.
      image_size: height and width of the result.
      share: side of the square over the shorter side of the image.

    Returns:
      As :func:`random_crop`.

    Example:
      >>> central_crop({"image": np.zeros((40, 60, 3), np.uint8), "label": 3}, 8)["label"]
      np.int32(3)
    """
    height, width = example["image"].shape[:2]
    side = max(1, round(share * min(height, width)))
    left, top = (width - side) // 2, (height - side) // 2
    return _resized(example, (left, top, left + side, top + side), image_size)


def _resized(example: Mapping[str, Any], box: tuple[int, int, int, int], image_size: int) -> Examples:
    from PIL import Image

    image = Image.fromarray(example["image"])
    pixels = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box)
    return {"image": np.asarray(pixels), "label": np.int32(example["label"])}


def _all_of(part: Stretch, crop: Callable[[Mapping[str, Any]], Examples], folder: Path) -> Examples:
    try:
        examples = [crop(part[index]) for index in range(len(part))]
    except Exception as error:  # Damaged files make array_record and tfds raise nearly anything.
        raise ValueError(f"the dataset 'imagenet2012' in {folder} is damaged ({error})") from error
    labels = np.array([example["label"] for example in examples], np.int32)
    if not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise ValueError(f"the dataset 'imagenet2012' in {folder} has labels out of [0, {NUM_CLASSES})")
    return {"image": np.stack([example["image"] for example in examples]), "label": labels}


__all__ = ["Stretch", "central_crop", "imagenet", "random_crop"]
