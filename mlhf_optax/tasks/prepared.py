"""Datasets in files: reading what tensorflow-datasets has prepared, and a cache of decoded arrays.

Files in the array_record format can be read example by example with ``tensorflow-datasets`` and
``pillow`` alone, without tensorflow. Nothing is downloaded here: whoever prepares a dataset accepts its
terms.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlhf_optax.support.files import write_atomically
from mlhf_optax.tasks.data import Examples, freeze


class Source(Protocol):
    """Examples by number, each with ``"image"``, ``"label"`` and maybe more."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Returns an example."""
        ...


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Returns ``data_dir`` or, if it is None, ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    It is the folder of prepared datasets, and may not be there.
    """
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_sources(name: str, folder: Path) -> dict[str, Source]:
    """Opens all splits of a prepared dataset, by name, as sources of decoded examples.

    Raises:
      FileNotFoundError: if the dataset is not there; it says how to get it.
      ImportError: if tensorflow-datasets is missing.
      ValueError: if the dataset is there but cannot be opened.
    """
    if not _descriptions(name, folder):
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


def decode_parts(
    parts: Mapping[str, Source], name: str, folder: Path, cache_name: str, cache_dir: Path, *form: Any
) -> dict[str, Examples]:
    """Decodes parts of the dataset ``name`` in ``folder`` once; then reads them from a file of the cache.

    To ``cache_name`` is added what tells versions of the dataset apart. ``form`` is ``shape`` and
    ``num_classes`` of :func:`decode_split`. The parts are read-only.

    Raises:
      ValueError: if an example or the file in the cache is damaged.
    """
    # The description names version and sizes of the shards: other data, another file.
    described = b"".join(path.read_bytes() for path in _descriptions(name, folder))

    def decode() -> dict[str, np.ndarray]:
        decoded = {part: decode_split(source, name, folder, *form) for part, source in parts.items()}
        return {f"{part}_{key}": array for part in parts for key, array in decoded[part].items()}

    arrays = cached_arrays(f"{cache_name}-{zlib.crc32(described):08x}", decode, cache_dir)
    return {part: freeze(image=arrays[f"{part}_image"], label=arrays[f"{part}_label"]) for part in parts}


def decode_split(
    source: Source, name: str, folder: Path, shape: tuple[int, ...], num_classes: int
) -> dict[str, np.ndarray]:
    """Decodes all examples of a source, checks them and returns them in the order of their ids.

    Files of tensorflow-datasets are shuffled; the ids restore the order in which the dataset was
    published. Examples without ids stay as they are. Shows a progress bar on a terminal.

    Returns:
      ``"image"``, uint8 of shape (N, *shape), and ``"label"``, int32 of shape (N,).

    Raises:
      ValueError: if an example cannot be read or is not what it should be.
    """
    images, labels = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int32)
    ids = []
    for index in _with_progress(range(len(source)), f"decoding {name}"):
        try:
            example = source[index]
            image, label = np.asarray(example["image"]), int(example["label"])
        except Exception as error:  # As in `open_sources`.
            raise _damaged(name, folder, error) from error
        if image.shape != shape or image.dtype != np.uint8 or not 0 <= label < num_classes:
            problem = f"example {index} is an image of {image.dtype}{image.shape} with label {label}"
            raise _damaged(name, folder, problem)
        images[index], labels[index] = image, label
        ids.append(example.get("id", b""))
    order = np.argsort(np.array(ids), kind="stable")
    return {"image": images[order], "label": labels[order]}


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns ``cache_dir`` or, if it is None, ``mlhf_optax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    It is for files that can be made anew at any time, and may not be there yet.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlhf_optax"
    return Path(default if cache_dir is None else cache_dir).expanduser()


def cached_arrays(
    name: str, make: Callable[[], Mapping[str, np.ndarray]], cache_dir: str | Path | None = None
) -> dict[str, np.ndarray]:
    """Returns arrays from the file ``name``.npz of the cache, or makes them and writes the file.

    The name must change with whatever leads to other arrays. The file is whole or absent; later damage
    is noticed by the checksums of the zip format and raises a ValueError.
    """
    path = cache_folder(cache_dir) / f"{name}.npz"
    if not path.exists():
        arrays = dict(make())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
        return arrays
    try:
        return read_arrays(path)
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it will be made anew") from error


DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)  # what `read_arrays` raises


def read_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of an npz file, all or those named; raises one of ``DAMAGE``."""
    # The file is opened here, as numpy leaves a damaged one open.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {name: file[name] for name in (names or file.files)}


def _with_progress(numbers: range, title: str) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:
        return numbers
    return tqdm(numbers, desc=title, leave=False, disable=None)  # None: only on a terminal


def _descriptions(name: str, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{name}/*/dataset_info.json"))


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
