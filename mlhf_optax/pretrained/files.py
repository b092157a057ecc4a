"""Meta-parameters on disk: one safetensors file of arrays, with text that says what they are.

The metadata holds ``format``, ``version``, ``structure`` (JSON from which the learned optimizer knows the
tree), ``record`` (JSON: what the set was trained on and how to use it) and a digest over everything.
Files come from strangers too, so what a file may claim is bounded before it is decoded.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.learned import LearnedFamily, get_learned
from mlhf_optax.pretrained.loaded import Pretrained
from mlhf_optax.support.files import pack_arrays, unpack_arrays, write_atomically
from mlhf_optax.support.layer_types import path_text

FORMAT = "mlhf-optax meta-parameters"
VERSION = 2  # 1 was a pair of .npz and .json

_ENDING = ".safetensors"
_FOREIGN_ENDINGS = (".npz", ".npy", ".json", ".msgpack", ".pkl", ".pickle")  # a name like v1.5 has none
_REMEDY = (
    "if a newer mlhf_optax wrote the file, upgrade; otherwise restore it from a copy, or write it again with "
    "`save_meta_params`"
)

# The largest shipped set takes 40 kB, with a record of 20 kB, 96 arrays and a structure of 25 values.
_MAX_BYTES = 64 * 2**20
_MAX_HEADER = 2**20
_MAX_ARRAYS = 1000
_MAX_DEPTH = 32
_MAX_STRUCTURE = 200
_MAX_SIZE = 10**6


def save_meta_params(path: str | os.PathLike, meta_params: Any, record: Mapping[str, Any]) -> Path:
    """Writes meta-parameters and their record to ``NAME.safetensors``.

    The file appears whole or not at all, and equal arguments give equal bytes.

    Args:
      path: where to write, with or without the ending ``.safetensors``.
      meta_params: the meta-parameters, float32.
      record: plain JSON values. ``optimizer`` names the learned optimizer, ``task`` what it was meta-trained
        on, ``batch_size`` the examples per mini-batch. Recommended arguments of the optimizer go beside
        them; MLHF needs ``learning_rate``, ``num_cg_steps`` and ``max_update_ratio``. Anything else may
        follow.

    Returns:
      The path of the file.

    Raises:
      TypeError: if ``meta_params`` are not those of the optimizer that the record names.
      ValueError: if an array is not finite, not float32 or of a wrong shape, if ``record`` lacks
        a key, has a value out of range or is not plain JSON, or if ``path`` has the ending of another format.
      OSError: if the file cannot be written.

    Example:
      >>> import jax, tempfile
      >>> from mlhf_optax import init_meta_params
      >>> record = {"optimizer": "mlhf", "task": "mine", "batch_size": 64}
      >>> record |= {"learning_rate": 1.0, "num_cg_steps": 4, "max_update_ratio": 0.25}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = save_meta_params(f"{folder}/mine", init_meta_params(jax.random.key(0)), record)
      ...     load_meta_params(path).learning_rate
      1.0
    """
    if Path(path).suffix in _FOREIGN_ENDINGS:
        raise ValueError(f"`path` must end in {_ENDING} or have no ending, got {os.fspath(path)!r}")
    if problem := _record_problem(record):
        raise ValueError(f"`record` cannot be saved: {problem}")
    try:
        record_text = json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`record` cannot be saved: it must be plain JSON without NaN ({error})") from error
    structure = get_learned(record["optimizer"]).structure(meta_params)
    arrays = {path_text(where): np.asarray(leaf) for where, leaf in jax.tree.leaves_with_path(meta_params)}
    text = {
        "format": FORMAT,
        "version": str(VERSION),
        "structure": json.dumps(structure),
        "record": record_text,
    }
    try:
        data = pack_arrays(arrays, text)
        loaded, _ = _decode(data)
    except ValueError as error:
        raise ValueError(f"`meta_params` cannot be saved: {error}") from error
    if jax.tree.structure(loaded) != jax.tree.structure(meta_params):
        raise TypeError(
            f"`meta_params` are not those of {record['optimizer']!r}, which `record` names: their structure "
            f"is {jax.tree.structure(meta_params)}, its own is {jax.tree.structure(loaded)}"
        )
    path = _with_ending(path)
    write_atomically(path, data)
    return path


def load_meta_params(path: str | os.PathLike) -> Pretrained:
    """Reads what :func:`save_meta_params` wrote; nothing in the file is executed.

    Args:
      path: the file, with or without the ending ``.safetensors``.

    Raises:
      FileNotFoundError: if the file is not there.
      ValueError: if it is damaged, foreign, of another version, larger than such files are or
        contradicts itself; the message names the file, what is wrong and what to do.

    Example:
      See :func:`save_meta_params`.
    """
    file = _with_ending(path)
    old = file.with_name(f"{file.name.removesuffix(_ENDING).removesuffix('.npz')}.npz")
    if not file.is_file() and old.is_file():
        raise ValueError(
            f"{old}: an earlier mlhf_optax wrote this, with a .json beside it; this one reads a single "
            f"{_ENDING} file. Load the pair with the version that wrote it, and give its settings and arrays "
            "to `save_meta_params`"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file, it should hold meta-parameters")
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file}: meta-parameters take at most {_MAX_BYTES} bytes; {_REMEDY}")
    return decode(file.read_bytes(), str(file))


def decode(data: bytes, file: str) -> Pretrained:
    """Returns what the content of a file holds, or says why it is refused; see :func:`load_meta_params`."""
    try:
        return Pretrained(*_decode(data))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {_REMEDY}") from error


def _decode(data: bytes) -> tuple[Any, dict[str, Any]]:
    arrays, text = unpack_arrays(data, max_header=_MAX_HEADER, max_arrays=_MAX_ARRAYS)
    if text.get("format") != FORMAT:
        raise ValueError(f"its format is {text.get('format')!r}, not {FORMAT!r}")
    if text.get("version") != str(VERSION):
        raise ValueError(f"it has format version {text.get('version')!r}, this mlhf_optax reads {VERSION}")
    structure, record = (_parse(text.get(name, ""), name) for name in ("structure", "record"))
    if problem := _record_problem(record):
        raise ValueError(f"its record cannot be used: {problem}")
    template = _template(structure, get_learned(record["optimizer"]))
    expected = {path_text(where): leaf for where, leaf in jax.tree.leaves_with_path(template)}
    if problem := _array_problem(arrays, expected):
        raise ValueError(problem)
    leaves = [jnp.asarray(arrays[name]) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), record


def _parse(text: str, name: str) -> dict[str, Any]:
    """Returns the JSON object in a text that may be hostile."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} is not JSON, or nested too deep ({error})") from error
    level, depth = [value], 0
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"its {name} is nested more than {_MAX_DEPTH} deep")
    if not isinstance(value, dict):
        raise ValueError(f"its {name} is not a JSON object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _template(structure: dict[str, Any], family: LearnedFamily) -> Any:
    """Returns the meta-parameters that a structure promises, as shapes only."""
    values = jax.tree.leaves(structure)
    if len(values) > _MAX_STRUCTURE or any(isinstance(x, int) and abs(x) > _MAX_SIZE for x in values):
        raise ValueError(
            f"its structure has more than {_MAX_STRUCTURE} values or an integer beyond {_MAX_SIZE}"
        )
    try:
        return family.template(structure)
    except Exception as error:  # whatever a structure that was made up leads to
        raise ValueError(f"its structure is not one that {family.name!r} understands ({error!r})") from error


def _array_problem(arrays: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> str | None:
    if set(arrays) != set(expected):
        absent, surplus = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        return f"its structure asks for arrays that are absent ({absent}) or does not know some ({surplus})"
    for name, array in arrays.items():
        if array.shape != expected[name].shape:
            return f"'{name}' has shape {array.shape}, the structure asks for {expected[name].shape}"
        if array.dtype != np.float32:
            return f"'{name}' has dtype {array.dtype}, but must be float32"
        if not np.all(np.isfinite(array)):
            return f"'{name}' has values that are not finite"
    return None


def _record_problem(record: Mapping[str, Any]) -> str | None:
    missing = [key for key in ("optimizer", "task", "batch_size") if key not in record]
    if missing:
        return f"it lacks {missing}, which a user of the meta-parameters has to know"
    for key in ("optimizer", "task"):
        if not isinstance(record[key], str):
            return f"'{key}' must be a name, got {record[key]!r}"
    size = record["batch_size"]
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < math.inf:
        return f"'batch_size' must be a positive number, got {size!r}"
    try:
        return get_learned(record["optimizer"]).check_record(record)
    except ValueError as error:
        return str(error)


def _with_ending(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.name:
        raise ValueError(f"{path}: this is a folder; give the file that holds meta-parameters")
    return path.with_name(f"{path.name.removesuffix(_ENDING)}{_ENDING}")
