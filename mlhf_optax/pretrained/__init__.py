"""Meta-parameters that ship with the package, each with the record of how it was made."""

import os
from importlib import resources
from typing import Any

from mlhf_optax.pretrained.files import decode, load_meta_params, save_meta_params
from mlhf_optax.pretrained.loaded import Pretrained

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
      TypeError: for neither a name nor a path.
      ValueError: if a file is damaged, foreign or of another version.

    Example:
      >>> load_pretrained().record["optimizer"], load_pretrained("digits").record["optimizer"]
      ('mlhf_general', 'mlhf')
      >>> load_pretrained()
      Pretrained: MLHF general, one small LSTM for every tensor of any network chooses ...
        meta-trained on: tiny tasks, 64 examples per batch, ...
        size: 1,209 numbers in 5 arrays
        recommends: learning_rate=1.0, num_cg_steps=2, max_growth=1.0, curvature_batch_size=0.25
        use: .optimizer(predict_fn, loss_fn); .record tells how it was made
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"`name_or_path` must be a name or a path, got {type(name_or_path).__name__}; the model goes to "
            "`load_pretrained().optimizer(predict_fn, loss_fn)`"
        )
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
