"""Tiny-ImageNet, which stands in for ImageNet: 64x64 pixels, up to 200 classes.

It is read from one file of JPEG images, which :func:`pack_tiny_imagenet` makes once of the folder that
is distributed.
"""

import functools
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from mlhf_optax.tasks.data import Dataset, freeze
from mlhf_optax.tasks.prepared import DAMAGE, cache_folder, cached_arrays, data_folder, read_arrays
from mlhf_optax.tasks.resnet import Stem, resnet18
from mlhf_optax.tasks.task import FileOptions, Task, file_task

IMAGE_SHAPE = (64, 64, 3)
META_TRAIN_SHARE = 1 / 5
_PATTERN = "tiny_imagenet*.npz"
_SPLITS = ("train", "test")
_HOW_TO_PACK = (
    'python -c "from mlhf_optax.tasks import pack_tiny_imagenet; '
    "pack_tiny_imagenet('tiny-imagenet-200', 'tiny_imagenet.npz')\""
)


def load_tiny_imagenet(
    data_dir: str | Path | None = None, cache_dir: str | Path | None = None, num_classes: int | None = None
) -> Dataset:
    """Returns Tiny-ImageNet: the first 1/5 of the training set is for meta-training, the rest for training.

    Args:
      data_dir: the file, or the folder that holds it under a name like ``tiny_imagenet.npz``
        (:func:`mlhf_optax.tasks.prepared.data_folder` if None).
      cache_dir: folder of decoded arrays (:func:`mlhf_optax.tasks.prepared.cache_folder`).
      num_classes: number of classes that the file must hold; any if None.

    Returns:
      A :class:`Dataset`; images are uint8 of shape (N, 64, 64, 3), labels int32 (N,), both read-only.

    Raises:
      FileNotFoundError: if there is no such file; it says how to make it.
      ImportError: if pillow is missing.
      ValueError: if the file is damaged or has other classes, or the folder holds several.
    """
    path = _find_file(data_folder(data_dir))
    data, found = _load(path, cache_folder(cache_dir))
    if num_classes not in (None, found):
        raise ValueError(
            f"{path} holds {found} classes, but `num_classes` is {num_classes}; set it to {found}"
        )
    return data


def _find_file(place: Path) -> Path:
    files = [place] if place.is_file() else sorted(place.glob(_PATTERN))
    if not files:
        raise FileNotFoundError(
            f"there is no Tiny-ImageNet in {place}; say where its file {_PATTERN} lies with `data_dir` "
            "(--data-dir). To make it, get http://cs231n.stanford.edu/tiny-imagenet-200.zip (for research), "
            f"unpack it and run: {_HOW_TO_PACK}"
        )
    if len(files) > 1:
        raise ValueError(f"{place} holds several files {_PATTERN}; give the path of one as `data_dir`")
    return files[0]


@functools.cache
def _load(path: Path, cache_dir: Path) -> tuple[Dataset, int]:
    names = [f"{split}_{part}" for split in _SPLITS for part in ("jpeg", "offsets")]
    try:
        packed = read_arrays(path, [*names, "y_train", "y_test", "wnids"])
    except DAMAGE as error:
        raise _damaged(path, error) from error
    described = b"".join(packed[name].tobytes() for name in ("train_offsets", "test_offsets", "y_train"))
    decode = lambda: {f"{split}_image": _decode(path, packed, split) for split in _SPLITS}
    images = cached_arrays(f"tiny-imagenet-{zlib.crc32(described):08x}", decode, cache_dir)
    num_classes = len(packed["wnids"])
    for split in _SPLITS:
        labels = packed[f"y_{split}"]
        if labels.shape != (len(images[f"{split}_image"]),) or not np.isin(labels, range(num_classes)).all():
            raise _damaged(path, f"labels of {split} do not fit its images and classes")
    part = lambda split, rows: freeze(
        image=images[f"{split}_image"][rows], label=packed[f"y_{split}"][rows].astype(np.int32)
    )
    boundary = round(META_TRAIN_SHARE * len(packed["y_train"]))
    parts = (part("train", slice(boundary)), part("train", slice(boundary, None)), part("test", slice(None)))
    return Dataset(*parts), num_classes


def _decode(path: Path, packed: dict[str, np.ndarray], split: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Tiny-ImageNet is decoded by pillow, which is not installed; run `pip install 'mlhf-optax[data]'`"
        ) from error
    content, offsets = packed[f"{split}_jpeg"].tobytes(), packed[f"{split}_offsets"]
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
        f"{path} is not a whole file of Tiny-ImageNet ({problem}); make it again: {_HOW_TO_PACK}"
    )


def pack_tiny_imagenet(folder: str | Path, path: str | Path, num_classes: int = 200) -> Path:
    """Makes the file that :func:`load_tiny_imagenet` reads of the folder that is distributed.

    The classes are the first in the order of their names. Images of the training set follow each other
    class by class in turns, so that every stretch of them holds all classes. The validation set, whose
    labels are public, is for testing.

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
    arrays = {"wnids": np.array(wnids), **_pack("train", train), **_pack("test", test)}
    np.savez(path, allow_pickle=False, **arrays)
    return Path(path)


def _pack(split: str, files: Sequence[tuple[Path, int]]) -> dict[str, np.ndarray]:
    contents = [file.read_bytes() for file, _ in files]
    return {
        f"{split}_jpeg": np.frombuffer(b"".join(contents), np.uint8),
        f"{split}_offsets": np.cumsum([0, *map(len, contents)]),
        f"y_{split}": np.array([label for _, label in files]),
    }


def tiny_imagenet_resnet18(
    channels: int = 64, stem: Stem = "small", num_classes: int = 100, **options: Unpack[FileOptions]
) -> Task:
    """Returns the stand-in for the paper's ResNet-18 v2 on ImageNet (section 4.4): the same on Tiny-ImageNet.

    Args:
      channels: channels of the first stage, at least 1; they double three times.
      stem: see :class:`mlhf_optax.tasks.ResNet`; ``"imagenet"`` costs a tenth and is less accurate.
      num_classes: classes in the file.
      **options: see :class:`mlhf_optax.tasks.FileOptions`; all batches are of 64.

    Example:
      >>> tiny_imagenet_resnet18(channels=8).name
      'tiny-imagenet-resnet18-8'
    """
    name = "tiny-imagenet-resnet18"
    name += "" if channels == 64 else f"-{channels}"
    name += "" if stem == "small" else f"-{stem}-stem"
    return file_task(
        name,
        f"Tiny-ImageNet (64x64, {num_classes} classes), ResNet-18 v2 from {channels} channels",
        resnet18(num_classes, stem, channels),
        IMAGE_SHAPE,
        functools.partial(load_tiny_imagenet, num_classes=num_classes),
        {"batch_size": 64, "meta_batch_size": 64, **options},
        num_classes=num_classes,
        pad=8,
        pretrained="cifar10_resnet",
    )
