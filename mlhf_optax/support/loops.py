"""Control flow that Python decides where values are known.

Without ``jit``, a function that is handed to ``lax.cond`` or a loop is a new one in every call, so every call
compiles it anew. Where all values are known, branches and loops of Python do the same and compile nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer


def is_known(*trees: Any) -> bool:
    """Says whether all arrays of some trees have values, so that nothing traces them.

    Example:
      >>> is_known({"w": 1.0}), jax.make_jaxpr(lambda x: is_known(x) * x)(1.0).jaxpr.eqns[0].primitive.name
      (True, 'mul')
    """
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def cond(is_true: Any, if_true: Callable, if_false: Callable, *operands: Any) -> Any:
    """``lax.cond``."""
    if is_known(is_true):
        return if_true(*operands) if is_true else if_false(*operands)
    return lax.cond(is_true, if_true, if_false, *operands)


def repeat(times: int, step: Callable[[Any], Any], state: Any, unroll: bool | int = 1) -> Any:
    """Applies ``step`` to a state so many times: ``lax.fori_loop`` without the index."""
    # A step that closes over what is traced makes the state traced, too: the loop has the rest.
    while times and is_known(state):
        state, times = step(state), times - 1
    return lax.fori_loop(0, times, lambda _, s: step(s), state, unroll=unroll) if times else state


def in_batches(function: Callable[[jax.Array], Any], rows: jax.Array, batch_size: int) -> Any:
    """Applies a function to every row of an array, so many at the same time: ``lax.map``.

    Example:
      >>> in_batches(jnp.sum, jnp.eye(3), batch_size=2)
      Array([1., 1., 1.], dtype=float32)
    """
    if not is_known(rows):
        return lax.map(function, rows, batch_size=batch_size)
    starts = range(0, len(rows), batch_size)
    parts = [jax.vmap(function)(rows[start : start + batch_size]) for start in starts]
    return jax.tree.map(lambda *found: jnp.concatenate(found), *parts)


def while_loop(go_on: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
    """``lax.while_loop``."""
    while is_known(state) and is_known(more := go_on(state)):
        if not more:
            return state
        state = step(state)
    return lax.while_loop(go_on, step, state)
