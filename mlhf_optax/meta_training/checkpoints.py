"""Checkpoints of a run, which survive being killed at any moment.

A checkpoint appears whole or not at all. One that was damaged later has the wrong digest; it is reported, and
the one before is used.
"""

# Why not orbax (0.12.8): it reads some flipped bits back as other numbers, refuses arrays of size zero,
# silently skips a save where a later checkpoint lies, damaged or not, and took 160-300 ms and 18 files for a
# state of 40 small arrays, where one safetensors file took 3-18 ms (two busy cores).

import json
import re
import warnings
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.support.files import pack_arrays, unpack_arrays, write_atomically

_NAME = re.compile(r"checkpoint-(\d{8,})\.safetensors")


def save_checkpoint(folder: Path, iteration: int, tree: chex.ArrayTree, about: dict, keep: int = 3) -> Path:
    """Writes a checkpoint and removes all but the newest before it.

    Args:
      folder: where checkpoints lie; made if it is not there.
      iteration: number of the checkpoint.
      tree: pytree of arrays.
      about: what must be equal for the checkpoint to be continued; plain JSON values.
      keep: number of checkpoints kept, at least two so that a damaged one has a predecessor.

    Returns:
      The path of the file.

    Raises:
      OSError: if it cannot be written; the checkpoints before are still there.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> save_checkpoint(folder, 7, {"w": jnp.ones(2)}, {"seed": 0}).name
      'checkpoint-00000007.safetensors'
      >>> load_last_checkpoint(folder, {"w": jnp.zeros(2)}, {"seed": 0})
      (7, {'w': Array([1., 1.], dtype=float32)})
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{iteration:08d}.safetensors"
    arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(tree).items()}
    write_atomically(path, pack_arrays(arrays, {"about": json.dumps(about)}))
    # Not those after it, which are not of this run's past. Temporary files are what a kill has left.
    earlier = [old for old in list_checkpoints(folder) if _iteration(old) < iteration]
    for old in (*earlier[max(keep, 2) - 1 :], *folder.glob(".checkpoint-*.tmp")):
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, the newest first."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted((file for file in files if _NAME.fullmatch(file.name)), key=_iteration, reverse=True)


def load_last_checkpoint(folder: Path, template: chex.ArrayTree, about: dict) -> tuple[int, Any] | None:
    """Loads the newest whole checkpoint.

    Damaged ones that are newer are reported with a warning and renamed to ``NAME.damaged``.

    Args:
      folder: where checkpoints lie.
      template: pytree with the structure, shapes and dtypes that are wanted.
      about: what the checkpoint must have been written under.

    Returns:
      Its iteration and the tree, or None if there are no checkpoints.

    Raises:
      ValueError: if it was written under other settings, which the message names, or does not fit the
        template, or if none of the checkpoints can be read.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            arrays, text = unpack_arrays(path.read_bytes())
            found = json.loads(text["about"])
        except (ValueError, KeyError, OSError) as error:
            warnings.warn(f"checkpoint {path} is damaged ({error}); trying the one before", stacklevel=2)
            damaged.append(path)
            continue
        _check_about(path, found, about)
        tree = _restore(path, arrays, template)
        for other in damaged:  # so that they no longer count among those that are kept
            other.rename(f"{other}.damaged")
        return _iteration(path), tree
    if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(
            f"no checkpoint in {folder} can be read, so the run cannot go on; move that folder away to start "
            "anew, or use another output folder"
        )
    return None


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-").removesuffix(".safetensors"))


def _named_leaves(tree: chex.ArrayTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_about(path: Path, found: dict, wanted: dict) -> None:
    there, now = _flat(found), _flat(json.loads(json.dumps(wanted)))  # tuples are lists in the file
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    if names:
        told = ", ".join(f"{name}: {there.get(name)!r} there, {now.get(name)!r} now" for name in names)
        raise ValueError(
            f"checkpoint {path} belongs to a run with other settings ({told}); resume with the settings from "
            "there, or use another output folder"
        )


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Returns nested settings under dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _restore(path: Path, arrays: dict[str, np.ndarray], template: chex.ArrayTree) -> Any:
    wanted = _named_leaves(template)
    fits = lambda name: arrays[name].shape == wanted[name].shape and arrays[name].dtype == wanted[name].dtype
    if arrays.keys() != wanted.keys() or not all(map(fits, wanted)):
        raise ValueError(
            f"checkpoint {path} does not fit this run (another model or version); use another output folder"
        )
    # Copies: a state that is donated must own its memory.
    leaves = [
        np.array(arrays[name]) if isinstance(leaf, np.ndarray) else jnp.array(arrays[name])
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
