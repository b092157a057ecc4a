"""Checkpoints of a meta-training that survive being killed at any moment.

A file is written under a temporary name, flushed to the disk and renamed, so there is either the
whole of it or nothing; it carries a digest, so one that was damaged later is recognised, reported
and passed over in favour of the one before.
"""

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
from flax import serialization

from mlhf_optax.files import write_atomically

_MAGIC = b"mlhf-optax-checkpoint-1\n"
_NAME = re.compile(r"checkpoint-(\d{8})\.msgpack$")


def save_checkpoint(folder: Path, iteration: int, tree: chex.ArrayTree, about: dict, keep: int = 3) -> Path:
    """Writes a checkpoint and removes all but the newest ones.

    Args:
      folder: where checkpoints lie; made if it is not there.
      iteration: number of the checkpoint.
      tree: pytree of arrays.
      about: what must be equal for the checkpoint to be continued; plain JSON values.
      keep: number of checkpoints kept, at least two so that a damaged one has a predecessor.

    Returns:
      The path of the file.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> folder = Path(tempfile.mkdtemp())
      >>> save_checkpoint(folder, 7, {"w": jnp.ones(2)}, {"seed": 0}).name
      'checkpoint-00000007.msgpack'
      >>> load_last_checkpoint(folder, {"w": jnp.zeros(2)}, {"seed": 0})[0]
      7
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    body = json.dumps(about, sort_keys=True).encode() + b"\n" + serialization.msgpack_serialize(leaves)
    path = folder / f"checkpoint-{iteration:08d}.msgpack"
    write_atomically(path, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    # Temporary files are what a run that was killed while writing has left.
    for old in (*list_checkpoints(folder)[max(keep, 2) :], *folder.glob(".checkpoint-*.tmp")):
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.match(path.name)), reverse=True)


def load_last_checkpoint(folder: Path, template: chex.ArrayTree, about: dict) -> tuple[int, Any] | None:
    """Loads the newest whole checkpoint; a damaged one is reported with a warning and passed over.

    Args:
      folder: where checkpoints lie.
      template: pytree with the structure, shapes and dtypes that are wanted.
      about: what the checkpoint must have been written under.

    Returns:
      Its iteration and the tree, or None if there is no whole checkpoint.

    Raises:
      ValueError: if the newest whole checkpoint was written under other settings; it names them.
    """
    for path in list_checkpoints(folder):
        try:
            found, leaves = _read(path)
        except (ValueError, OSError) as error:
            warnings.warn(f"checkpoint {path} is damaged ({error}); trying the one before", stacklevel=2)
            continue
        _check_about(path, found, about)
        iteration = int(_NAME.match(path.name).group(1))  # type: ignore[union-attr]
        return iteration, _restore(path, leaves, template)
    return None


def _read(path: Path) -> tuple[dict, Any]:
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError("not a checkpoint of mlhf_optax")
    digest, _, body = data[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its content does not match its digest")
    about, _, packed = body.partition(b"\n")
    return json.loads(about), serialization.msgpack_restore(packed)


def _check_about(path: Path, found: dict, wanted: dict) -> None:
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as they did in the file
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if names:
        told = ", ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in names)
        raise ValueError(
            f"checkpoint {path} belongs to a meta-training with other settings ({told}); resume with the "
            "same settings, or use another output folder"
        )


def _restore(path: Path, leaves: dict[str, np.ndarray], template: chex.ArrayTree) -> Any:
    wanted, treedef = jax.tree.flatten(template)
    arrays = [leaves[str(i)] for i in range(len(leaves))]
    fits = lambda array, leaf: array.shape == leaf.shape and array.dtype == leaf.dtype
    if len(arrays) != len(wanted) or not all(map(fits, arrays, wanted)):
        raise ValueError(
            f"checkpoint {path} does not fit this meta-training (another model or version); use another "
            "output folder"
        )
    # Copies: a state that is donated must own its memory.
    return treedef.unflatten(jax.numpy.array(array) for array in arrays)


__all__ = ["list_checkpoints", "load_last_checkpoint", "save_checkpoint"]
