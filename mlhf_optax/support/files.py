"""Files that survive a kill, a full disk and a second process; arrays that come back as they were written.

Arrays lie in the safetensors format, with text beside them in its metadata, so reading a file cannot
execute anything. A digest covers arrays and text: the format itself has none, and a flipped bit would
load as another number.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

_DIGEST = "sha256"

# Names of dtypes in the format and in NumPy; the format's own reader for NumPy knows no bfloat16.
_DTYPES = {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"}
_DTYPES |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}
_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
_DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}


def write_atomically(path: str | os.PathLike, data: bytes | Callable[[BinaryIO], object]) -> None:
    """Writes a file so that at any moment ``path`` holds all of the old content or all of the new.

    ``data`` is the content, or a function that writes it to an open file.

    Raises:
      OSError: if it cannot be written, for example on a full disk; the old content is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write {path}: {reason}; what it held before, if anything, is unchanged"
        raise OSError(error.errno, message) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Makes a folder for the output of a run, with its parents, and keeps every other run out of it.

    The operating system releases the lock when the process ends, also when it is killed.

    Raises:
      OSError: if another run writes to the folder, or if it cannot be made or written to.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as parent, locked_folder(f"{parent}/runs/1") as folder:
      ...     folder.is_dir()
      True
    """
    import filelock  # here, because few users of the package write to folders

    folder = Path(path)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            raise OSError(
                f"`output` {folder} is in use by another run; wait until that one ends, or use another folder"
            ) from error
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"`output` {folder} is not a folder that can be written to ({reason}); use another one"
            raise OSError(error.errno, message) from error
        yield folder
    finally:
        lock.release()  # nothing to do if it was not acquired


def pack_arrays(arrays: Mapping[str, np.ndarray], text: Mapping[str, str]) -> bytes:
    """Returns the content of a safetensors file of arrays and text; equal arguments give equal bytes.

    The key ``sha256`` is added to the text, a digest of arrays and text.

    Raises:
      ValueError: for an array of a type that the format does not have.

    Example:
      >>> data = pack_arrays({"w": np.arange(2)}, {"made": "today"})
      >>> unpack_arrays(data)
      ({'w': array([0, 1])}, {'made': 'today'})
    """
    # The library takes the memory as it lies, so a transposed array would come back transposed.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES.values():
            raise ValueError(f"'{name}' has dtype {array.dtype}, which a safetensors file cannot hold")
    packed = safetensors.numpy.save(arrays, {**text, _DIGEST: _digest(arrays, text)})
    end = 8 + int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8:end])
    # The library writes metadata in an order that changes from run to run.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content + packed[end:]


def unpack_arrays(
    data: bytes, *, max_header: int | None = None, max_arrays: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays and the text in the content of a file that :func:`pack_arrays` made.

    Args:
      data: the content.
      max_header: bytes that names, shapes and text may take; checked before anything is decoded.
      max_arrays: number of arrays that there may be.

    Raises:
      ValueError: if the content is damaged, of another format or beyond a limit.
    """
    size = int.from_bytes(data[:8], "little")
    if max_header is not None and max_header < size <= len(data) - 8:
        raise ValueError(f"its header takes {size} bytes, more than the {max_header} allowed")
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is damaged, cut short or of another format ({error})") from error
    if max_arrays is not None and len(entries) > max_arrays:
        raise ValueError(f"it has {len(entries)} arrays, more than the {max_arrays} allowed")
    text = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    if _DIGEST not in text or not all(entry["dtype"] in _DTYPES for _, entry in entries):
        raise ValueError("it has no digest or arrays of unknown types, so another program wrote it")
    arrays = {
        name: np.frombuffer(entry["data"], jnp.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
        for name, entry in entries
    }
    if text.pop(_DIGEST) != _digest(arrays, text):
        raise ValueError("its content does not match its digest, so it was changed after it was written")
    return arrays, text


def _digest(arrays: Mapping[str, np.ndarray], text: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(text), sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
