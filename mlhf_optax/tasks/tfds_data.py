"""Reading of datasets that tensorflow-datasets has prepared, without tensorflow.

Files in the array_record format can be read example by example with ``tensorflow-datasets`` and
``pillow`` alone. Nothing is downloaded here: whoever prepares a dataset accepts its terms.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Examples by number, each with ``"image"``, ``"label"`` and maybe more."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Returns an example."""
        ...


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Returns the folder of prepared datasets.

    Args:
      data_dir: the folder; if None, that of the environment variable ``TFDS_DATA_DIR``, and if there is
        none, ``~/tensorflow_datasets``, where tensorflow-datasets puts them.

    Returns:
      The folder, whether it is there or not.

    Example:
      >>> data_folder("/data/tfds").name
      'tfds'
    """
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_sources(name: str, data_dir: str | Path | None = None) -> dict[str, Source]:
    """Opens all splits of a prepared dataset.

    Args:
      name: name of the dataset, such as ``"cifar10"``.
      data_dir: see :func:`data_folder`.

    Returns:
      By the name of the split, what gives decoded examples by number.

    Raises:
      FileNotFoundError: if the dataset is not there; it says how to get it.
      ImportError: if tensorflow-datasets is missing.
      ValueError: if the dataset is there but cannot be opened.

    Example:
      >>> open_sources("cifar10", "/nowhere")
      Traceback (most recent call last):
      FileNotFoundError: there is no prepared dataset 'cifar10' in /nowhere; ...
    """
    folder = data_folder(data_dir)
    if not list(folder.glob(f"{name}/*/dataset_info.json")):
        raise FileNotFoundError(
            f"there is no prepared dataset {name!r} in {folder}; say where it lies with `data_dir` "
            f"(--data-dir) or the environment variable TFDS_DATA_DIR, or {_how_to_prepare(name, folder)}"
        )
    try:
        import PIL.Image  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"the dataset {name!r} is read with tensorflow-datasets and pillow, but {error.name} is not "
            "installed; run `pip install 'mlhf-optax[data]'`"
        ) from error
    try:
        sources: Any = tfds.data_source(name, data_dir=folder, download=False)
        return {split: source for split, source in sources.items() if len(source)}
    except Exception as error:  # Damaged files make array_record and tfds raise nearly anything.
        raise _damaged(name, folder, error) from error


def decode_split(
    source: Source, name: str, shape: tuple[int, ...], num_classes: int, data_dir: str | Path | None = None
) -> dict[str, np.ndarray]:
    """Decodes all examples of a split, checks them and returns them in the order of their ids.

    Files of tensorflow-datasets are shuffled; the ids restore the order in which the dataset was
    published. Examples without ids stay as they are. Shows a progress bar on a terminal.

    Args:
      source: one of :func:`open_sources`.
      name: name of the dataset, for messages.
      shape: what every image must be.
      num_classes: labels must lie below it.
      data_dir: see :func:`data_folder`, for messages.

    Returns:
      ``"image"``, uint8 of shape (N, *shape), and ``"label"``, int32 of shape (N,).

    Raises:
      ValueError: if an example cannot be read or is not what it should be.

    Example:
      >>> source = [{"image": np.zeros((1, 1, 3), np.uint8), "label": label} for label in (2, 1)]
      >>> decode_split(source, "two", (1, 1, 3), num_classes=3)["label"]
      array([2, 1], dtype=int32)
    """
    folder = data_folder(data_dir)
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    ids = []
    for index in _with_progress(range(len(source)), f"decoding {name}"):
        try:
            example = source[index]
            image, label = np.asarray(example["image"]), int(example["label"])
        except Exception as error:
            raise _damaged(name, folder, error) from error
        if image.shape != shape or image.dtype != np.uint8 or not 0 <= label < num_classes:
            problem = f"example {index} is an image of {image.dtype}{image.shape} with label {label}"
            raise _damaged(name, folder, problem)
        images[index], labels[index] = image, label
        ids.append(example.get("id", b""))
    order = np.argsort(np.array(ids), kind="stable")
    return {"image": images[order], "label": labels[order]}


def _with_progress(numbers: range, title: str):
    try:
        from tqdm import tqdm
    except ImportError:
        return numbers
    return tqdm(numbers, desc=title, leave=False, disable=None)  # None: only on a terminal


def _how_to_prepare(name: str, folder: Path) -> str:
    return (
        'prepare it once, for which tensorflow is needed: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{folder}', file_format='array_record').download_and_prepare()\""
    )


def _damaged(name: str, folder: Path, problem: object) -> ValueError:
    return ValueError(
        f"the dataset {name!r} in {folder} is damaged or not in the array_record format ({problem}); delete "
        f"{folder / name} and {_how_to_prepare(name, folder)}"
    )


__all__ = ["Source", "data_folder", "decode_split", "open_sources"]
