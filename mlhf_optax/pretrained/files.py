"""Meta-parameters on disk: plain arrays and JSON, nothing that a load could execute.

A set ``NAME`` is two files. ``NAME.npz`` holds arrays and settings
(:mod:`mlhf_optax.pretrained.archive`). ``NAME.json`` is the record: what the set was trained on and how
to use it, bound to the arrays by their checksum.
"""

import json
import math
import os
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import optax

from mlhf_optax.controllers.coordinate_lstm import MetaParams
from mlhf_optax.curvature import LossFn, PredictFn, check_curvature_batch
from mlhf_optax.mlhf import mlhf
from mlhf_optax.pretrained.archive import RESTORE, decode, encode

RECORD_KEYS = ("task", "learning_rate", "batch_size", "num_cg_steps", "max_update_ratio")


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

    @property
    def recommended(self) -> dict[str, Any]:
        """The arguments of :func:`mlhf_optax.mlhf` that the record recommends."""
        names = ("learning_rate", "num_cg_steps", "max_update_ratio")
        others = {"curvature_batch_size": None, "momentum": None}
        return {name: self.record[name] for name in names} | {
            name: self.record.get(name, usual) for name, usual in others.items()
        }

    def optimizer(
        self, predict_fn: PredictFn, loss_fn: LossFn, **changes: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Returns :func:`mlhf_optax.mlhf` with what the record recommends.

        Args:
          predict_fn: ``predict_fn(params, batch) -> outputs``.
          loss_fn: ``loss_fn(outputs, batch) -> scalar``.
          **changes: arguments of :func:`mlhf_optax.mlhf`; they take the place of the record's
            ``learning_rate``, ``num_cg_steps``, ``max_update_ratio`` and, where it has them,
            ``curvature_batch_size`` (None: the whole batch) and ``momentum`` (0: none), or come on top.

        Returns:
          The optimizer; call ``update(grads, state, params, batch=batch)``.

        Example:
          >>> import jax.numpy as jnp
          >>> from mlhf_optax import SquaredError, load_pretrained
          >>> predict_fn = lambda params, batch: batch["x"] @ params["kernel"]
          >>> tx = load_pretrained("digits").optimizer(predict_fn, SquaredError(), learning_rate=0.5)
          >>> tx.init({"kernel": jnp.ones((3, 1))})[0].count
          Array(0, dtype=int32)
        """
        arguments = self.recommended | changes
        return mlhf(meta_params=self.meta_params, predict_fn=predict_fn, loss_fn=loss_fn, **arguments)


def save_meta_params(path: str | os.PathLike, meta_params: MetaParams, record: Mapping[str, Any]) -> Path:
    """Writes meta-parameters to ``NAME.npz`` and their record to ``NAME.json``.

    Each file appears whole or not at all, and equal meta-parameters give equal bytes.

    Args:
      path: where to write, with or without the ending ``.npz``.
      meta_params: the meta-parameters, float32.
      record: plain JSON values, at least ``task`` (str), ``learning_rate`` and ``batch_size``
        (numbers > 0), ``num_cg_steps`` (int) and ``max_update_ratio`` (number, or None for no bound);
        more may follow, such as ``curvature_batch_size`` and ``momentum``.

    Returns:
      The path of the ``.npz`` file.

    Raises:
      TypeError: if ``meta_params`` is no MetaParams.
      ValueError: if an array is not finite, not float32 or of a wrong shape, or if ``record`` lacks
        a key or is not plain JSON.

    Example:
      >>> import jax, tempfile
      >>> from mlhf_optax import init_meta_params
      >>> record = {"task": "mine", "learning_rate": 1.0, "batch_size": 64}
      >>> record |= {"num_cg_steps": 4, "max_update_ratio": 0.25}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = save_meta_params(f"{folder}/mine", init_meta_params(jax.random.key(0)), record)
      ...     load_meta_params(path).learning_rate
      1.0
    """
    data, checksum = encode(meta_params)
    if problem := _record_problem(record):
        raise ValueError(f"`record` cannot be saved: {problem}")
    try:
        text = json.dumps({**record, "sha256": checksum}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`record` cannot be saved: it must be plain JSON without NaN ({error})") from error
    npz_path, record_path = _paths(path)
    write_atomically(npz_path, data)
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
    meta_params, checksum = decode(npz_file.read_bytes(), str(npz_file))
    return Pretrained(meta_params, read_record(record_file, checksum))


def read_record(file: Traversable, checksum: str | None = None) -> dict[str, Any]:
    """Reads a record, and makes sure that it belongs to the arrays of this checksum if one is given."""
    try:
        record = json.loads(file.read_bytes())
        problem = _record_problem(record) if isinstance(record, dict) else "it is not a JSON object"
    except ValueError as error:
        raise ValueError(f"{file}: it is not JSON ({error}); {RESTORE}") from error
    own_checksum = None if problem else record.pop("sha256", None)
    if problem is None and checksum is not None and own_checksum != checksum:
        problem = "it is the record of other meta-parameters than those beside it"
    if problem:
        raise ValueError(f"{file}: {problem}; {RESTORE}")
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
    momentum = record.get("momentum") or 0.0
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        return f"'momentum' must be a number in [0, 1), got {momentum!r}"
    try:
        check_curvature_batch(record.get("curvature_batch_size"))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


__all__ = [
    "RECORD_KEYS",
    "Pretrained",
    "load_meta_params",
    "read_pair",
    "read_record",
    "save_meta_params",
    "write_atomically",
]
