"""The archive format of meta-parameters: arrays and JSON in, arrays and JSON out.

An archive is a NumPy ``.npz``: one float32 array an entry, under readable names such as
``damping/dense_kernel/layers/0/kernel``, and ``header.json`` with format, version, settings, layer types,
units and a checksum over all of it. Nothing in it can be executed by reading it.
"""

import dataclasses
import functools
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.controllers.coordinate_lstm import MetaParams, init_meta_params
from mlhf_optax.controllers.lstm_settings import Settings
from mlhf_optax.layer_types import path_text

FORMAT = "mlhf-optax meta-parameters"
FORMAT_VERSION = 1

RESTORE = "restore the file from a copy, or write it again with `save_meta_params`"

_HEADER = "header.json"


def encode(meta_params: MetaParams) -> tuple[bytes, str]:
    """Returns the archive of meta-parameters and their checksum; equal ones give equal bytes.

    Args:
      meta_params: the meta-parameters, float32.

    Returns:
      The archive, and the checksum over settings and arrays that it carries.

    Raises:
      TypeError: if ``meta_params`` is no MetaParams.
      ValueError: if an array is not finite, not float32 or of a wrong shape.

    Example:
      >>> import jax
      >>> data, checksum = encode(init_meta_params(jax.random.key(0), layer_types=["dense_kernel"]))
      >>> meta_params, same_checksum = decode(data, "a file")
      >>> meta_params.layer_types, checksum == same_checksum
      (('dense_kernel',), True)
    """
    if not isinstance(meta_params, MetaParams):
        raise TypeError(f"`meta_params` must be a MetaParams, got {type(meta_params).__name__}")
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "settings": meta_params.settings.to_json(),
        "layer_types": list(meta_params.layer_types),
        "units": list(meta_params.units),
    }
    arrays = {name: np.asarray(array) for name, array in _named_leaves(meta_params).items()}
    if problem := _array_problem(arrays, _template(header)):
        raise ValueError(f"`meta_params` cannot be saved: {problem}")
    header["sha256"] = _checksum(header, arrays)
    return _write_archive(header, arrays), header["sha256"]


def decode(data: bytes, file: str) -> tuple[MetaParams, str]:
    """Returns the meta-parameters in an archive and their checksum, or says why it is refused.

    Args:
      data: the archive.
      file: its name, for messages.

    Returns:
      The meta-parameters and the checksum.

    Raises:
      ValueError: if the archive is damaged, foreign, of a newer version or contradicts itself; the
        message names the file, what is wrong and what to do.

    Example:
      See :func:`encode`.
    """
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
            f"{known}); if it comes from a newer mlhf_optax upgrade yours, otherwise {RESTORE}"
        ) from error
    problem = _array_problem(arrays, template)
    if problem is None and header.get("sha256") != _checksum(header, arrays):
        problem = "its content does not match its checksum, so it was changed after it was written"
    if problem:
        raise ValueError(f"{file}: {problem}; {RESTORE}")
    leaves = [jnp.asarray(arrays[name]) for name in _named_leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), header["sha256"]


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _template(header: Mapping[str, Any]) -> Any:
    """The meta-parameters that a header promises, as shapes only."""
    settings, names, units = from_flat(header["settings"]), header["layer_types"], header["units"]
    init = functools.partial(init_meta_params, settings=settings, layer_types=names, units=units)
    return jax.eval_shape(lambda: init(jax.random.key(0)))


def from_flat(f):
    """Settings of format version 1."""
    from mlhf_optax.controllers import lstm_settings as ls

    if "features" in f:
        return Settings.from_json(f)
    features = (
        ls.TanhFeatures()
        if f["input_features"] == "tanh"
        else ls.LogFeatures(f["log_range"], f["input_features"] == "log-global")
    )
    output = {"softplus": ls.Softplus, "exp": ls.Exponential}[f["output_map"]](f["output_scale"])
    names = ("gradient_power", "parameter_power", "gradient_floor", "parameter_floor")
    unit = ls.Unit(**{n: f[n] for n in names if n in f})
    form = {"divide": ls.Divide, "multiply": ls.Multiply, "jacobi": ls.Jacobi}[f["preconditioner_form"]]
    return Settings(
        features,
        output,
        unit,
        form(),
        f["initial_damping"],
        f["initial_preconditioner"],
        f["damping_floor"],
        f["preconditioner_residual"] == "current",
    )


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


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    content = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + b"\0" + arrays[name].astype("<f4").tobytes())
    return digest.hexdigest()


def _write_archive(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        # ZipInfo carries a fixed date, where a plain name would carry the time of writing.
        archive.writestr(zipfile.ZipInfo(_HEADER), json.dumps(header, indent=1))
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array.astype("<f4"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return buffer.getvalue()


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
            raise ValueError(f"{file}: the file is damaged or cut short ({error}); {RESTORE}") from error
    raise ValueError(f"{file}: not meta-parameters of mlhf_optax; pass a file that `save_meta_params` wrote")


def _parse_array(entry: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(entry), allow_pickle=False)


__all__ = ["FORMAT", "FORMAT_VERSION", "RESTORE", "decode", "encode"]
