"""Meta-training in several processes: the first one reads and writes files, for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")


def is_first() -> bool:
    """Returns whether this process is the one that reads and writes files."""
    return jax.process_index() == 0


def whole(tree: Tree) -> Tree:
    """Returns the tree with whole arrays in this process, also where other processes have parts of them.

    All processes must call it, because each sends its parts to the others.

    Example:
      >>> whole({"w": np.ones(2)})
      {'w': array([1., 1.])}
    """
    from jax.experimental import multihost_utils  # here, because few meta-trainings need it

    def one(leaf: Any) -> Any:
        if getattr(leaf, "is_fully_addressable", True):
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def from_first(function: Callable[[], Tree], like: Tree) -> Tree:
    """Returns what a function returns in the first process; no other process calls it.

    All processes must call this one.

    Args:
      function: called in the first process alone.
      like: arrays and numbers of the same structure, shapes and dtypes as those that it returns; each
        process has all of them.

    Raises:
      RuntimeError: in all other processes, if the function raises; the first one raises its error.

    Example:
      >>> from_first(lambda: 7, like=0)
      7
    """
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    result, error = like, None
    if is_first():
        try:
            result = function()
        except Exception as raised:  # the others would wait for ever
            error = raised
    if multihost_utils.broadcast_one_to_all(np.array(error is not None)):
        raise error or RuntimeError("the first process could not go on; its error message says why")
    return jax.tree.map(jnp.asarray, multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, result)))
