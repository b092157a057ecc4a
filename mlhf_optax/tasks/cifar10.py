"""CIFAR-10, split as in the paper."""

import functools
import zlib
from pathlib import Path

import numpy as np

from mlhf_optax.tasks.array_cache import cached_arrays
from mlhf_optax.tasks.datasets import Dataset, Examples, freeze
from mlhf_optax.tasks.tfds_data import data_folder, decode_split, open_sources

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10
SIZES = {"train": 50_000, "test": 10_000}
META_TRAIN_SHARE = 3 / 5


def cifar10(data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Dataset:
    """Returns CIFAR-10: 60,000 images of 32x32 pixels in 10 classes.

    The first 3/5 of the training set are for meta-training, the last 2/5 for training, in the order in
    which the dataset was published, which is that of the paper. Decoded once and kept in a file; the
    second time it takes a moment.

    Args:
      data_dir: folder of prepared datasets (:func:`mlhf_optax.tasks.tfds_data.data_folder`).
      cache_dir: folder of decoded arrays (:func:`mlhf_optax.tasks.array_cache.cache_folder`).

    Returns:
      A :class:`Dataset` of 30,000, 20,000 and 10,000 examples; images are uint8 of shape
      (N, 32, 32, 3), labels int32 (N,), both read-only.

    Raises:
      FileNotFoundError: if the dataset is not there; it says how to get it.
      ImportError: if tensorflow-datasets is missing.
      ValueError: if the files are damaged.

    Example:
      ``cifar10("/data/tensorflow_datasets").train["image"].shape`` is ``(20000, 32, 32, 3)``.

    Source: paper, section 4.1.
    """
    return _load(data_folder(data_dir), None if cache_dir is None else Path(cache_dir))


@functools.cache
def _load(folder: Path, cache_dir: Path | None) -> Dataset:
    sources = open_sources("cifar10", folder)
    found = {split: len(sources.get(split, ())) for split in SIZES}
    if found != SIZES:
        raise ValueError(
            f"the dataset 'cifar10' in {folder} must have {SIZES} examples, it has {found}; it was prepared "
            "only in part: delete it and prepare it again"
        )

    def decode() -> dict[str, np.ndarray]:
        splits = {s: decode_split(sources[s], "cifar10", IMAGE_SHAPE, NUM_CLASSES, folder) for s in SIZES}
        return {f"{split}_{key}": array for split, part in splits.items() for key, array in part.items()}

    # The description names version and sizes of the shards: other data, another file.
    described = b"".join(path.read_bytes() for path in sorted(folder.glob("cifar10/*/dataset_info.json")))
    arrays = cached_arrays(f"cifar10-{zlib.crc32(described):08x}", decode, cache_dir)
    boundary = round(META_TRAIN_SHARE * SIZES["train"])
    return Dataset(
        meta_train=_part(arrays, "train", slice(None, boundary)),
        train=_part(arrays, "train", slice(boundary, None)),
        test=_part(arrays, "test", slice(None)),
    )


def _part(arrays: dict[str, np.ndarray], split: str, rows: slice) -> Examples:
    return freeze({key: arrays[f"{split}_{key}"][rows] for key in ("image", "label")})


__all__ = ["cifar10"]
