"""Meta-parameters that ship with the package, each with the record of how it was made."""

import os
from importlib import resources
from typing import Any

from mlhf_optax.pretrained.files import Pretrained, load_meta_params, read_pair, read_record


def load_pretrained(name_or_path: str | os.PathLike) -> Pretrained:
    """Loads shipped meta-parameters by name, or your own by path.

    Args:
      name_or_path: a key of :func:`list_pretrained`, or the path of a file that
        :func:`mlhf_optax.save_meta_params` wrote. A shipped name wins; for a file of that name in
        the current folder write ``./name``.

    Returns:
      A :class:`mlhf_optax.Pretrained`: ``meta_params`` for :func:`mlhf_optax.mlhf`, and the ``record``
      of what they were trained on and how to use them.

    Raises:
      FileNotFoundError: if there is neither such a name nor such a file; it lists the names.
      ValueError: if a file is damaged, foreign or of a newer version.

    Example:
      >>> load_pretrained("digits").learning_rate
      1.0
    """
    names = _shipped()
    if name_or_path in names:
        folder = resources.files(__name__)
        return read_pair(folder / f"{name_or_path}.npz", folder / f"{name_or_path}.json")
    try:
        return load_meta_params(name_or_path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Shipped meta-parameters go by the names {names}; "
            "`mlhf-optax meta-train` makes your own"
        ) from error


def list_pretrained() -> dict[str, dict[str, Any]]:
    """Returns the names of the shipped meta-parameters and their records.

    Returns:
      A dict from names for :func:`load_pretrained` to records: the task and data of meta-training,
      the learning rate, batch size and CG steps to use, the command, date and machine.

    Example:
      >>> list_pretrained()["digits"]["task"]
      'digits-mlp'
    """
    folder = resources.files(__name__)
    return {name: read_record(folder / f"{name}.json") for name in _shipped()}


def _shipped() -> list[str]:
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".npz") for name in files if name.endswith(".npz"))


__all__ = ["list_pretrained", "load_pretrained"]
