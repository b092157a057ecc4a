"""Tiny-ImageNet, the stand-in for ImageNet where that is out of reach: 64x64 pixels, up to 200 classes.

It is read from one file of JPEG images, which is made of the folder that is distributed:

    python -m mlhf_optax.tasks.tiny_imagenet tiny-imagenet-200 tiny_imagenet.npz
"""

import argparse
import functools
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mlhf_optax.tasks.array_cache import cached_arrays
from mlhf_optax.tasks.datasets import Dataset, Examples, freeze
from mlhf_optax.tasks.tfds_data import data_folder

IMAGE_SHAPE = (64, 64, 3)
META_TRAIN_SHARE = 1 / 5
_PATTERN = "tiny_imagenet*.npz"
_SPLITS = ("train", "test")


def tiny_imagenet(
    data_dir: str | Path | None = None, cache_dir: str | Path | None = None, num_classes: int | None = None
) -> Dataset:
    """Returns Tiny-ImageNet: the first 1/5 of the training set is for meta-training, the rest for training.

    Args:
      data_dir: the file, or the folder that holds it under a name like ``tiny_imagenet.npz``
        (:func:`mlhf_optax.tasks.tfds_data.data_folder` if None).
      cache_dir: folder of decoded arrays (:func:`mlhf_optax.tasks.array_cache.cache_folder`).
      num_classes: number of classes that the file must hold; any if None.

    Returns:
      A :class:`Dataset`; images are uint8 of shape (N, 64, 64, 3), labels int32 (N,), both read-only.

    Raises:
      FileNotFoundError: if there is no such file; it says how to make it.
      ImportError: if pillow is missing.
      ValueError: if the file is damaged or has other classes, or the folder holds several.

    Example:
      ``tiny_imagenet("tiny_imagenet.npz").test["image"].shape`` is ``(5000, 64, 64, 3)`` for 100 classes.
    """
    path = find_file(data_folder(data_dir))
    data, found = _load(path, None if cache_dir is None else Path(cache_dir))
    if num_classes not in (None, found):
        raise ValueError(
            f"{path} holds {found} classes, but `num_classes` is {num_classes}; set it to {found}"
        )
    return data


def find_file(place: Path) -> Path:
    """Returns the file itself, or the one in a folder.

    Raises:
      FileNotFoundError: if there is none; it says how to make it.
      ValueError: if there are several.
    """
    files = [place] if place.is_file() else sorted(place.glob(_PATTERN))
    if not files:
        raise FileNotFoundError(
            f"there is no Tiny-ImageNet in {place}; say where its file {_PATTERN} lies with `data_dir` "
            "(--data-dir). To make it, get http://cs231n.stanford.edu/tiny-imagenet-200.zip (for research), "
            "unpack it and run: python -m mlhf_optax.tasks.tiny_imagenet tiny-imagenet-200 "
            "tiny_imagenet.npz"
        )
    if len(files) > 1:
        raise ValueError(f"{place} holds several files {_PATTERN}; give the path of one as `data_dir`")
    return files[0]


@functools.cache
def _load(path: Path, cache_dir: Path | None) -> tuple[Dataset, int]:
    try:
        # Opened here, as numpy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = [f"{split}_{part}" for split in _SPLITS for part in ("jpeg", "offsets")]
            found = {name: file[name] for name in (*names, "y_train", "y_test", "wnids")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    described = b"".join(found[name].tobytes() for name in ("train_offsets", "test_offsets", "y_train"))
    decode = lambda: {f"{split}_image": _decode(path, found, split) for split in _SPLITS}
    images = cached_arrays(f"tiny-imagenet-{zlib.crc32(described):08x}", decode, cache_dir)
    boundary = round(META_TRAIN_SHARE * len(found["y_train"]))
    data = Dataset(
        meta_train=_part(path, found, images, "train", slice(None, boundary)),
        train=_part(path, found, images, "train", slice(boundary, None)),
        test=_part(path, found, images, "test", slice(None)),
    )
    return data, len(found["wnids"])


def _part(path: Path, found: Mapping[str, np.ndarray], images, split: str, rows: slice) -> Examples:
    labels = found[f"y_{split}"]
    if labels.shape != (len(images[f"{split}_image"]),) or not 0 <= labels.min() <= labels.max() < len(
        found["wnids"]
    ):
        raise _damaged(path, f"labels of {split} do not fit its images and classes")
    return freeze({"image": images[f"{split}_image"][rows], "label": labels[rows].astype(np.int32)})


def _decode(path: Path, found: Mapping[str, np.ndarray], split: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Tiny-ImageNet is decoded by pillow, which is not installed; run `pip install 'mlhf-optax[data]'`"
        ) from error
    content, offsets = found[f"{split}_jpeg"].tobytes(), found[f"{split}_offsets"]
    images = np.empty((len(offsets) - 1, *IMAGE_SHAPE), np.uint8)
    for index in range(len(images)):
        try:
            # A few of the images are grey.
            with Image.open(io.BytesIO(content[offsets[index] : offsets[index + 1]])) as image:
                images[index] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise _damaged(path, f"image {index} of {split}: {error}") from error
    return images


def _damaged(path: Path, problem: object) -> ValueError:
    return ValueError(
        f"{path} is not a whole file of Tiny-ImageNet ({problem}); make it again with "
        "`python -m mlhf_optax.tasks.tiny_imagenet`"
    )


def pack_tiny_imagenet(folder: str | Path, path: str | Path, num_classes: int = 200) -> Path:
    """Makes the file that :func:`tiny_imagenet` reads of the folder that is distributed.

    The classes are the first in the order of their names; images of the training set follow each other
    class by class in turns, so that every stretch of them holds all classes. The validation set, whose
    labels are public, is for testing.

    Args:
      folder: ``tiny-imagenet-200``, unpacked.
      path: where to write.
      num_classes: classes to keep.

    Returns:
      The path.

    Raises:
      FileNotFoundError: if the folder is not that of Tiny-ImageNet.

    Example:
      ``pack_tiny_imagenet("tiny-imagenet-200", "tiny_imagenet.npz", num_classes=100)``
    """
    folder = Path(folder)
    if not (folder / "val" / "val_annotations.txt").is_file():
        raise FileNotFoundError(
            f"{folder} is not tiny-imagenet-200 unpacked: val/val_annotations.txt is missing"
        )
    wnids = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())[:num_classes]
    of_class = [sorted((folder / "train" / wnid / "images").glob("*.JPEG")) for wnid in wnids]
    turns = zip(*of_class, strict=False)
    train = [(file, label) for turn in turns for label, file in enumerate(turn)]
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    labelled = [line.split("\t")[:2] for line in lines if line]
    test = [(folder / "val" / "images" / name, wnids.index(w)) for name, w in labelled if w in wnids]
    arrays = {"wnids": np.array(wnids)}
    for split, files in (("train", train), ("test", test)):
        arrays |= _pack(split, files)
    np.savez(path, allow_pickle=False, **arrays)
    return Path(path)


def _pack(split: str, files: Sequence[tuple[Path, int]]) -> dict[str, np.ndarray]:
    contents = [file.read_bytes() for file, _ in files]
    return {
        f"{split}_jpeg": np.frombuffer(b"".join(contents), np.uint8),
        f"{split}_offsets": np.cumsum([0, *map(len, contents)]),
        f"y_{split}": np.array([label for _, label in files]),
    }


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes one file of the folder tiny-imagenet-200.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--classes", type=int, default=200)
    options = parser.parse_args(arguments)
    print(pack_tiny_imagenet(options.folder, options.file, options.classes))


if __name__ == "__main__":
    _main()

__all__ = ["find_file", "pack_tiny_imagenet", "tiny_imagenet"]
