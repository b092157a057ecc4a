"""Which parameter is of which layer type.

MLHF has one set of LSTM weights for each layer type, which all coordinates of that type share (paper,
section 3). The type follows from the parameter tree: the names and ranks of a parameter and its siblings.
Names of Flax linen, Flax nnx, Haiku and Equinox are understood.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

CONV_KERNEL = "conv_kernel"
CONV_BIAS = "conv_bias"
DENSE_KERNEL = "dense_kernel"
DENSE_BIAS = "dense_bias"
NORM_SCALE = "norm_scale"
NORM_BIAS = "norm_bias"

PAPER_LAYER_TYPES = (CONV_KERNEL, CONV_BIAS, DENSE_KERNEL, DENSE_BIAS, NORM_SCALE, NORM_BIAS)

LayerTypesFn = Callable[[chex.ArrayTree], chex.ArrayTree]

_KERNELS = {"kernel", "weight", "w"}
_BIASES = {"bias", "b", "beta", "offset"}
_SCALES = {"scale", "gamma"}


def layer_types(params: chex.ArrayTree, *, rules: Mapping[str, str] | None = None) -> chex.ArrayTree:
    """Returns a tree shaped like ``params`` with the name of the layer type of every parameter.

    A parameter named ``kernel``, ``weight`` or ``w`` is a convolution kernel at rank 4 or 5 and a
    dense kernel at rank 2 (``weight`` at rank 1 is a norm scale, as in Equinox); ``scale`` or
    ``gamma`` is a norm scale; a ``bias`` (``b``, ``beta``, ``offset``) is told from its siblings.

    Args:
      params: pytree of arrays (or of shapes with ``ndim``).
      rules: your own types, looked at first: regular expressions, matched anywhere in a
        parameter's path such as ``"encoder/embedding"``, to type names. A name that the
        meta-parameters do not know needs meta-parameters trained with it.

    Returns:
      A pytree of strings shaped like ``params``.

    Raises:
      ValueError: for a parameter of unknown type; it names the path, the shape and the remedy.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "table": jnp.ones((5, 3))}
      >>> layer_types(params, rules={"table": "dense_kernel"})
      {'Dense_0': {'bias': 'dense_bias', 'kernel': 'dense_kernel'}, 'table': 'dense_kernel'}
    """
    check_whole_tree(params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    siblings: dict[tuple, dict[str, int]] = {}
    for path, leaf in leaves:
        *parent, name = _names(path)
        siblings.setdefault(tuple(parent), {})[name] = getattr(leaf, "ndim", -1)
    types = []
    for path, leaf in leaves:
        text, (*parent, name) = path_text(path), _names(path)
        custom = [kind for pattern, kind in (rules or {}).items() if re.search(pattern, text)]
        found = custom[0] if custom else _builtin_type(name, siblings[tuple(parent)])
        if found is None:
            raise ValueError(_unknown(text, getattr(leaf, "shape", None)))
        types.append(found)
    return jax.tree.unflatten(treedef, types)


def distinct_layer_types(params: chex.ArrayTree, *, rules: Mapping[str, str] | None = None) -> list[str]:
    """Returns the layer types that occur in ``params``, each once and sorted.

    Args:
      params: pytree of arrays (or of shapes with ``ndim``).
      rules: your own types, as for :func:`layer_types`.

    Returns:
      Names of layer types, such as those that meta-parameters need weights for.

    Raises:
      ValueError: for a parameter of unknown type, as :func:`layer_types`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
      >>> distinct_layer_types({"Dense_0": layer, "Dense_1": layer})
      ['dense_bias', 'dense_kernel']
    """
    return sorted(set(jax.tree.leaves(layer_types(params, rules=rules))))


def path_text(path: tuple) -> str:
    """Returns a tree path as ``"Dense_0/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_params(params: chex.ArrayTree, name: str) -> None:
    """Raises an error that names the first parameter that no gradient step can move.

    Args:
      params: pytree of arrays (or of shapes and dtypes).
      name: the optimizer, for the messages.

    Raises:
      TypeError: for a parameter that is complex, of another type without gradients (integer, boolean),
        or no array at all.
      ValueError: for a parameter without entries, or if a wrapper has hidden part of the tree.

    Example:
      >>> import jax.numpy as jnp
      >>> check_params({"table": jnp.arange(3)}, "mlhf")
      Traceback (most recent call last):
      ...
      TypeError: `mlhf` cannot train the parameter 'table' of dtype int32 and shape (3,): ...
    """
    check_whole_tree(params)
    check_leaves(params, name)


def check_leaves(params: chex.ArrayTree, name: str) -> None:
    """Checks as :func:`check_params`, for optimizers that can work on part of a model's parameters."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"`{name}` cannot train the parameter '{path_text(path)}'"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"{where}: it is a {type(leaf).__name__}, not an array; {_remedy(leaf)}")
        shape, dtype = leaf.shape, leaf.dtype
        where = f"{where} of dtype {dtype} and shape {shape}"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{where}: keep its real and its imaginary part as two real parameters")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{where}: it has no gradient; keep it out of `params` and in the batch")
        if 0 in shape:
            raise ValueError(f"{where}: it is empty; leave it out of `params`")


def _remedy(leaf: Any) -> str:
    """Says what to do about a leaf that is no array."""
    if hasattr(leaf, "value"):  # of Keras, or another library's box around an array
        return (
            "take the array that it holds, as in `params = [variable.value for variable in "
            "model.trainable_variables]` for Keras"
        )
    if isinstance(leaf, int | float) and not isinstance(leaf, bool):
        return (
            "use `jnp.asarray`, or, if it is a setting of the model, keep it out of `params`, as "
            "`eqx.partition(model, eqx.is_inexact_array)` does for Equinox"
        )
    return (
        "`params` holds arrays alone. Of an Equinox model, `params, static = eqx.partition(model, "
        "eqx.is_inexact_array)`, with `eqx.combine(params, static)` in `predict_fn`; or "
        "`eqx.filter(model, eqx.is_inexact_array)`"
    )


def check_whole_tree(params: chex.ArrayTree) -> None:
    """Raises ValueError if a wrapper such as ``optax.masked`` has hidden part of the tree."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "this optimizer evaluates the whole model and cannot work on part of its parameters, but "
            "`optax.masked`, `optax.partition` or `optax.multi_transform` has hidden some of them; to freeze "
            "parameters use `optax.chain(optimizer, optax.freeze(mask))`, to treat some differently "
            "chain a masked transformation after the optimizer"
        )


def _builtin_type(name: str, siblings: dict[str, int]) -> str | None:
    rank = siblings[name]
    if name in _KERNELS:
        return _kernel_type(name, rank)
    if name in _SCALES:
        return NORM_SCALE
    if name not in _BIASES:
        return None
    if _SCALES & siblings.keys() or name in ("beta", "offset"):
        return NORM_BIAS
    kinds = {_kernel_type(kernel, siblings[kernel]) for kernel in _KERNELS & siblings.keys()}
    biases = {CONV_KERNEL: CONV_BIAS, DENSE_KERNEL: DENSE_BIAS, NORM_SCALE: NORM_BIAS}
    return biases.get(kinds.pop() or "") if len(kinds) == 1 else None


def _kernel_type(name: str, rank: int) -> str | None:
    # Rank 3 is left open on purpose: a one-dimensional convolution and the projections of an
    # attention layer look alike there.
    if name == "weight" and rank == 1:
        return NORM_SCALE
    return {2: DENSE_KERNEL, 4: CONV_KERNEL, 5: CONV_KERNEL}.get(rank)


def _unknown(path: str, shape) -> str:
    where = f"parameter '{path}'" if path else "the parameter (a bare array without a name)"
    return (
        f"{where} of shape {shape} is of no known layer type; say what it is with `layer_types_fn="
        "functools.partial(layer_types, rules={r'regex of its path': 'dense_kernel'})`, where the type is "
        f"one of {', '.join(PAPER_LAYER_TYPES)} or one that your meta-parameters were trained with. A "
        "flattened tree (`optax.flatten`) has no names and cannot be used"
    )


def _names(path: tuple) -> list[str]:
    """Returns the entries of a path up to the parameter's name (nnx puts the array under `value`)."""
    names = [path_text((entry,)) for entry in path] or [""]
    while len(names) > 1 and names[-1] in ("value", "raw_value"):
        names.pop()
    return names
