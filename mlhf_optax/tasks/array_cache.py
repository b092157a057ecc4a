"""Arrays that take long to make, kept in files: made once, then read."""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns the folder for files that can be made anew at any time.

    Args:
      cache_dir: the folder; if None, ``mlhf_optax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
      The folder, whether it is there or not.

    Example:
      >>> cache_folder("/tmp/arrays").name
      'arrays'
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlhf_optax"


def cached_arrays(
    name: str, make: Callable[[], Mapping[str, np.ndarray]], cache_dir: str | Path | None = None
) -> dict[str, np.ndarray]:
    """Returns arrays from a file of the cache, or makes them and writes the file.

    The file is written under another name and renamed, so it is whole or not there; what is damaged
    later is noticed by the checksums of the zip format.

    Args:
      name: name of the file without ending. It must tell apart whatever leads to other arrays.
      make: makes the arrays, by name.
      cache_dir: see :func:`cache_folder`.

    Returns:
      The arrays by name.

    Raises:
      ValueError: if the file is damaged.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> first = cached_arrays("ones", lambda: {"x": np.ones(2)}, folder)
      >>> cached_arrays("ones", lambda: {"x": np.zeros(2)}, folder)
      {'x': array([1., 1.])}
    """
    path = cache_folder(cache_dir) / f"{name}.npz"
    if not path.exists():
        arrays = dict(make())
        _write(path, arrays)
        return arrays
    try:
        # Opened here, as numpy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it will be made anew") from error


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["cache_folder", "cached_arrays"]
