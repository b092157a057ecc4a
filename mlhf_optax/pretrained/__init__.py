"""Meta-parameters that ship with the package, each with the record of how it was made."""

import os
from importlib import resources
from typing import Any

from mlhf_optax.pretrained.files import Pretrained, decode, load_meta_params, save_meta_params

_ENDING = ".safetensors"


def load_pretrained(name_or_path: str | os.PathLike = "general") -> Pretrained:
    """Loads shipped meta-parameters by name, or your own by path.

    Args:
      name_or_path: a key of :func:`list_pretrained`, or the path of a file that
        :func:`mlhf_optax.save_meta_params` wrote. A shipped name wins; for a file of that name in
        the current folder write ``./name``. By default those for any network.

    Returns:
      A :class:`mlhf_optax.Pretrained`: the ``meta_params``, the ``record`` of what they were trained on, and
      the ``optimizer`` with the arguments that the record recommends.

    Raises:
      FileNotFoundError: if there is neither such a name nor such a file; it lists the names.
      ValueError: if a file is damaged, foreign or of another version.

    Example:
      >>> load_pretrained().record["optimizer"], load_pretrained("digits").record["optimizer"]
      ('mlhf_general', 'mlhf')
    """
    shipped = _shipped()
    if name_or_path in shipped:
        file = shipped[name_or_path]
        return decode(file.read_bytes(), str(file))
    try:
        return load_meta_params(name_or_path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Shipped meta-parameters go by the names {list(shipped)}; "
            "`mlhf-optax meta-train` makes your own"
        ) from error


def list_pretrained() -> dict[str, dict[str, Any]]:
    """Returns the names of the shipped meta-parameters and their records.

    Returns:
      A dict from names for :func:`load_pretrained` to records: the learned optimizer, the task and data of
      meta-training, the arguments to use, the command, date and machine.

    Example:
      >>> list_pretrained()["digits"]["task"]
      'digits-mlp'
    """
    return {name: load_pretrained(name).record for name in _shipped()}


def _shipped() -> dict[Any, Any]:
    files = sorted(resources.files(__name__).iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(_ENDING): file for file in files if file.name.endswith(_ENDING)}


__all__ = ["Pretrained", "list_pretrained", "load_meta_params", "load_pretrained", "save_meta_params"]
