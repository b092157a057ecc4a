"""Meta-parameters on disk: plain arrays and JSON, nothing that a load could execute.

A set ``NAME`` is two files. ``NAME.npz`` is a NumPy archive: one float32 array an entry, under readable
names such as ``damping/dense_kernel/layers/0/kernel``, and ``header.json`` with format, version,
settings, layer types, units and a checksum over all of it. ``NAME.json`` is the record: what the set
was trained on and how to use it, bound to the arrays by the same checksum.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.layer_types import path_text
from mlhf_optax.meta_params import MetaParams, Settings, init_meta_params
from mlhf_optax.mlhf import mlhf

FORMAT = "mlhf-optax meta-parameters"
FORMAT_VERSION = 1
RECORD_KEYS = ("task", "learning_rate", "batch_size", "num_cg_steps", "max_update_ratio")

_HEADER = "header.json"
_RESTORE = "restore the file from a copy, or write it again with `save_meta_params`"


class Pretrained(NamedTuple):
    """Meta-parameters and the record of how they were made.

    Attributes:
      meta_params: the LSTMs and their settings.
      record: what they were trained on and how to use them; at least ``task``, ``learning_rate``,
        ``batch_size``, ``num_cg_steps`` and ``max_update_ratio``.
    """

    meta_params: MetaParams
    record: dict[str, Any]

    @property
    def learning_rate(self) -> float:
        """The learning rate that the record recommends."""
        return float(self.record["learning_rate"])

    def optimizer(
        self, predict_fn: PredictFn, loss_fn: LossFn, **changes: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Returns :func:`mlhf_optax.mlhf` with what the record recommends.

        Args:
          predict_fn: ``predict_fn(params, batch) -> outputs``.
          loss_fn: ``loss_fn(outputs, batch) -> scalar``.
          **changes: arguments of :func:`mlhf_optax.mlhf`; they take the place of the record's
            ``learning_rate``, ``num_cg_steps`` and ``max_update_ratio``, or come on top.

        Returns:
          The optimizer; call ``update(grads, state, params, batch=batch)``.

        Example:
          >>> from mlhf_optax import SquaredError, load_pretrained
          >>> predict_fn = lambda params, batch: batch["x"] @ params["kernel"]
          >>> tx = load_pretrained("digits").optimizer(predict_fn, SquaredError(), learning_rate=0.5)
          >>> tx.init({"kernel": jnp.ones((3, 1))})[0].count
          Array(0, dtype=int32)
        """
        names = ("learning_rate", "num_cg_steps", "max_update_ratio")
        arguments = {name: self.record[name] for name in names} | changes
        return mlhf(meta_params=self.meta_params, predict_fn=predict_fn, loss_fn=loss_fn, **arguments)


def save_meta_params(path: str | os.PathLike, meta_params: MetaParams, record: Mapping[str, Any]) -> Path:
    """Writes meta-parameters to ``NAME.npz`` and their record to ``NAME.json``.

    Each file appears whole or not at all, and equal meta-parameters give equal bytes.

    Args:
      path: where to write, with or without the ending ``.npz``.
      meta_params: the meta-parameters, float32.
      record: plain JSON values, at least ``task`` (str), ``learning_rate`` and ``batch_size``
        (numbers > 0), ``num_cg_steps`` (int) and ``max_update_ratio`` (number, or None for no bound).

    Returns:
      The path of the ``.npz`` file.

    Raises:
      TypeError: if ``meta_params`` is no MetaParams.
      ValueError: if an array is not finite, not float32 or of a wrong shape, or if ``record`` lacks
        a key or is not plain JSON.

    Example:
      >>> import jax, tempfile
      >>> record = {"task": "mine", "learning_rate": 1.0, "batch_size": 64}
      >>> record |= {"num_cg_steps": 4, "max_update_ratio": 0.25}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = save_meta_params(f"{folder}/mine", init_meta_params(jax.random.key(0)), record)
      ...     load_meta_params(path).learning_rate
      1.0
    """
    if not isinstance(meta_params, MetaParams):
        raise TypeError(f"`meta_params` must be a MetaParams, got {type(meta_params).__name__}")
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "settings": dataclasses.asdict(meta_params.settings),
        "layer_types": list(meta_params.layer_types),
        "units": list(meta_params.units),
    }
    arrays = {name: np.asarray(array) for name, array in _named_leaves(meta_params).items()}
    if problem := _array_problem(arrays, _template(header)):
        raise ValueError(f"`meta_params` cannot be saved: {problem}")
    if problem := _record_problem(record):
        raise ValueError(f"`record` cannot be saved: {problem}")
    header["sha256"] = _checksum(header, arrays)
    try:
        text = json.dumps({**record, "sha256": header["sha256"]}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`record` cannot be saved: it must be plain JSON without NaN ({error})") from error
    npz_path, record_path = _paths(path)
    write_atomically(npz_path, _encode(header, arrays))
    write_atomically(record_path, f"{text}\n".encode())
    return npz_path


def load_meta_params(path: str | os.PathLike) -> Pretrained:
    """Reads what :func:`save_meta_params` wrote; nothing in the files is executed.

    Args:
      path: the ``.npz`` file, with or without that ending; its record lies beside it.

    Returns:
      A :class:`Pretrained`.

    Raises:
      FileNotFoundError: if the file or its record is not there.
      ValueError: if a file is damaged, foreign, of a newer version or contradicts itself; the
        message names the file, what is wrong and what to do.

    Example:
      See :func:`save_meta_params`.
    """
    return read_pair(*_paths(path))


def read_pair(npz_file: Traversable, record_file: Traversable) -> Pretrained:
    """Reads a set from its two files, which may lie inside an installed package."""
    for file, content in ((npz_file, "meta-parameters"), (record_file, "the record of meta-parameters")):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: there is no such file, it should hold {content}")
    meta_params, checksum = _decode(npz_file.read_bytes(), str(npz_file))
    return Pretrained(meta_params, read_record(record_file, checksum))


def read_record(file: Traversable, checksum: str | None = None) -> dict[str, Any]:
    """Reads a record, and makes sure that it belongs to the arrays of this checksum if one is given."""
    try:
        record = json.loads(file.read_bytes())
        problem = _record_problem(record) if isinstance(record, dict) else "it is not a JSON object"
    except ValueError as error:
        raise ValueError(f"{file}: it is not JSON ({error}); {_RESTORE}") from error
    own_checksum = None if problem else record.pop("sha256", None)
    if problem is None and checksum is not None and own_checksum != checksum:
        problem = "it is the record of other meta-parameters than those beside it"
    if problem:
        raise ValueError(f"{file}: {problem}; {_RESTORE}")
    return record


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that at any moment ``path`` holds all of the old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _paths(path: str | os.PathLike) -> tuple[Path, Path]:
    npz_path = Path(path)
    stem = npz_path.name.removesuffix(".npz")
    return npz_path.with_name(f"{stem}.npz"), npz_path.with_name(f"{stem}.json")


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _template(header: Mapping[str, Any]) -> Any:
    """The meta-parameters that a header promises, as shapes only."""
    settings, names, units = Settings(**header["settings"]), header["layer_types"], header["units"]
    init = functools.partial(init_meta_params, settings=settings, layer_types=names, units=units)
    return jax.eval_shape(lambda: init(jax.random.key(0)))


def _array_problem(arrays: Mapping[str, Any], template: Any) -> str | None:
    expected = _named_leaves(template)
    if set(arrays) != set(expected):
        absent, surplus = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        return f"its settings ask for arrays that are absent ({absent}) or do not know some ({surplus})"
    for name, array in arrays.items():
        if array.shape != expected[name].shape:
            return f"'{name}' has shape {array.shape}, the settings ask for {expected[name].shape}"
        if array.dtype != np.float32:
            return f"'{name}' has dtype {array.dtype}, but must be float32"
        if not np.all(np.isfinite(array)):
            return f"'{name}' has values that are not finite"
    return None


def _record_problem(record: Mapping[str, Any]) -> str | None:
    missing = [key for key in RECORD_KEYS if key not in record]
    if missing:
        return f"it lacks {missing}, which a user of the meta-parameters has to know"
    for key in ("learning_rate", "batch_size", "num_cg_steps", "max_update_ratio"):
        value = record[key]
        if value is None and key == "max_update_ratio":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            return f"'{key}' must be a positive number, got {value!r}"
    if not isinstance(record["num_cg_steps"], int):
        return f"'num_cg_steps' must be an int, got {record['num_cg_steps']!r}"
    return None


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    content = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + b"\0" + arrays[name].astype("<f4").tobytes())
    return digest.hexdigest()


def _encode(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        # ZipInfo carries a fixed date, where a plain name would carry the time of writing.
        archive.writestr(zipfile.ZipInfo(_HEADER), json.dumps(header, indent=1))
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array.astype("<f4"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return buffer.getvalue()


def _decode(data: bytes, file: str) -> tuple[MetaParams, str]:
    """Returns the meta-parameters in an archive and their checksum, or says why it is refused."""
    header, arrays = _read_archive(data, file)
    version = header.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{file}: it has format version {version!r} and this mlhf_optax reads versions up to "
            f"{FORMAT_VERSION}; upgrade mlhf_optax"
        )
    try:
        template = _template(header)
    except (KeyError, TypeError, ValueError) as error:
        known = [field.name for field in dataclasses.fields(Settings)]
        raise ValueError(
            f"{file}: its header is not one that this mlhf_optax understands ({error!r}; known settings: "
            f"{known}); if it comes from a newer mlhf_optax upgrade yours, otherwise {_RESTORE}"
        ) from error
    problem = _array_problem(arrays, template)
    if problem is None and header.get("sha256") != _checksum(header, arrays):
        problem = "its content does not match its checksum, so it was changed after it was written"
    if problem:
        raise ValueError(f"{file}: {problem}; {_RESTORE}")
    leaves = [jnp.asarray(arrays[name]) for name in _named_leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), header["sha256"]


def _read_archive(data: bytes, file: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    is_zip = data.startswith(b"PK")
    try:
        # Whole entries are read before they are parsed: that verifies the archive's own checksums,
        # so that a damaged shape can never ask for memory.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        header = json.loads(entries.pop(_HEADER, b"null"))
        if isinstance(header, dict) and header.get("format") == FORMAT:
            return header, {name.removesuffix(".npy"): _parse_array(entry) for name, entry in entries.items()}
        is_zip = False  # whole, but somebody else's
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        if is_zip:
            raise ValueError(f"{file}: the file is damaged or cut short ({error}); {_RESTORE}") from error
    raise ValueError(f"{file}: not meta-parameters of mlhf_optax; pass a file that `save_meta_params` wrote")


def _parse_array(entry: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(entry), allow_pickle=False)


__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "RECORD_KEYS",
    "Pretrained",
    "load_meta_params",
    "read_pair",
    "read_record",
    "save_meta_params",
    "write_atomically",
]
