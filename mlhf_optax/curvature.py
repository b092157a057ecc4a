"""Products with the generalized Gauss-Newton matrix (GGN) of any model and any convex loss.

The GGN of ``loss_fn(predict_fn(params, batch), batch)`` with respect to ``params`` is
``G = J^T H_l J``: ``J`` is the Jacobian of the outputs, ``H_l`` the Hessian of the loss with
respect to the outputs (paper, equation 1). It is never formed. One product costs a forward-mode
pass, a product with ``H_l`` and a reverse-mode pass; all products of one step share one
linearization of the model (paper, section 2.2).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.dense import GGN, Linearization, Matvec
from mlhf_optax.support import placement, trees

Batch = Any
Outputs = Any
PredictFn = Callable[[chex.ArrayTree, Batch], Outputs]  # predict_fn(params, batch) -> outputs
LossFn = Callable[[Outputs, Batch], jax.Array]  # loss_fn(outputs, batch) -> scalar


def output_curvature(loss_fn: LossFn, outputs: Outputs, batch: Batch) -> Matvec:
    """Returns the product with ``H_l``, the Hessian of the loss with respect to the outputs.

    A loss with a method ``curvature(outputs, batch) -> matvec`` (every loss of
    :mod:`mlhf_optax.losses`) answers in closed form; any other loss is differentiated twice.

    Args:
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in ``outputs``.
      outputs: pytree of arrays, the point at which the curvature is taken.
      batch: the batch that the outputs belong to.

    Returns:
      A linear function from and to pytrees shaped like ``outputs``.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda z, batch: jnp.sum(z**4)
      >>> output_curvature(loss, jnp.array([1.0, 2.0]), None)(jnp.ones(2))
      Array([12., 48.], dtype=float32)
    """
    closed_form = getattr(loss_fn, "curvature", None)
    if closed_form is not None:
        return closed_form(outputs, batch)
    return jax.linearize(jax.grad(lambda z: loss_fn(z, batch)), outputs)[1]


def ggn_matvec(predict_fn: PredictFn, loss_fn: LossFn, params: chex.ArrayTree, batch: Batch) -> GGN:
    """Linearizes the model once and returns ``v -> G v`` for the GGN ``G = J^T H_l J``.

    The result is linear and symmetric positive semidefinite when the loss is convex, can be used
    under ``jit``, ``vmap`` and inside ``lax`` loops, and its derivative with respect to ``v`` is
    again a GGN product: no second derivative of the model is ever taken (paper, section 3.1).

    On several devices use ``jax.jit`` on a global batch sharded over a mesh: the product is then that of
    the whole batch. Where the code runs per device and ``loss_fn`` is the mean over the device's own
    shard, products are *not* averaged as gradients are, and nothing fails. Under ``jax.pmap``, and under
    ``jax.shard_map`` with ``check_vma=False``, each device multiplies by the GGN of its own shard:
    directions differ from device to device, and so do the parameters after the first step. Under
    ``jax.shard_map`` with replicated parameters, JAX sums the product over the n devices, as it does for
    ``jax.grad``: the result is n times the product of the whole batch, n times too much beside an
    averaged gradient. There, a loss that averages over the devices itself, ``lambda z, b:
    jax.lax.pmean(loss(z, b), axis_name)``, gives the gradient and the product of the whole batch.

    Args:
      predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays of any shape.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in ``outputs``.
      params: pytree of arrays, the point at which the matrix is taken.
      batch: whatever ``predict_fn`` and ``loss_fn`` understand.

    Returns:
      A function from and to pytrees shaped like ``params``.

    Raises:
      ValueError: if ``params`` has no array leaves or ``loss_fn`` does not return a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> predict = lambda w, batch: batch["x"] @ w
      >>> square = lambda z, batch: 0.5 * jnp.sum((z - batch["y"]) ** 2)
      >>> batch = {"x": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "y": jnp.zeros(2)}
      >>> matvec = ggn_matvec(predict, square, jnp.zeros(2), batch)  # G = x^T x
      >>> matvec(jnp.array([1.0, 0.0]))
      Array([1., 2.], dtype=float32)
    """
    return loss_and_ggn(predict_fn, loss_fn, params, batch)[1]


def loss_and_ggn(
    predict_fn: PredictFn,
    loss_fn: LossFn,
    params: chex.ArrayTree,
    batch: Batch,
    axis_name: placement.AxisName = None,
) -> tuple[jax.Array, GGN]:
    """Returns the loss at ``params``, which the linearization has the outputs for, and :func:`ggn_matvec`.

    With ``axis_name`` both are means over that mapped axis.
    """
    if not jax.tree.leaves(params):
        raise ValueError("`params` has no arrays, so there is no curvature to take; pass parameters")
    # What differs from device to device has derivatives of its own on each; they are averaged once, below.
    params = placement.mark_varying(params, axis_name)
    outputs, push_forward, pull_back = _linearized(predict_fn, params, batch)
    _check_scalar_loss(loss_fn, outputs.tree, batch)
    curvature = _curvature_of_floats(loss_fn, outputs, batch)
    _check_curved(curvature, outputs)

    def matvec(vector: chex.ArrayTree) -> chex.ArrayTree:
        # v -> J v -> H_l J v -> J^T H_l J v
        product = pull_back(curvature(push_forward(placement.mark_varying(vector, axis_name))))
        return placement.mean_over(product, axis_name)

    def bend(direction: chex.ArrayTree) -> list[jax.Array]:
        floats = lambda p: _split(predict_fn(p, batch)).floats
        slope = lambda p: jax.jvp(floats, (p,), (direction,))[1]
        return jax.jvp(slope, (params,), (direction,))[1]

    slope = lambda: jax.grad(lambda floats: loss_fn(outputs.merge(floats), batch))(outputs.floats)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in outputs.floats]
    at = Linearization(
        params, shapes, push_forward, curvature, slope, bend, axis_name, outputs.has_convolutions
    )
    return placement.mean_over(loss_fn(outputs.tree, batch), axis_name), GGN(matvec, at)


class _Outputs(NamedTuple):
    """Outputs of a model.

    Attributes:
      tree: as the model returns them.
      floats: the leaves that are differentiated.
      merge: from such leaves to a tree; the others, predictions, masks and counters, are constants.
      has_convolutions: whether they come from any.
    """

    tree: Outputs
    floats: list[jax.Array]
    merge: Callable[[list[jax.Array]], Outputs]
    has_convolutions: bool = False


def _split(tree: Outputs) -> _Outputs:
    leaves, treedef = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def merge(floats: list[jax.Array]) -> Outputs:
        own = iter(floats)
        return treedef.unflatten([next(own) if f else leaf for f, leaf in zip(is_float, leaves, strict=True)])

    return _Outputs(tree, [leaf for f, leaf in zip(is_float, leaves, strict=True) if f], merge)


def _linearized(
    predict_fn: PredictFn, params: chex.ArrayTree, batch: Batch
) -> tuple[_Outputs, Callable[[Any], list[jax.Array]], Callable[[list[jax.Array]], Any]]:
    """Returns the outputs, ``v -> J v`` and ``u -> J^T u``, for the outputs that are floating-point."""

    def floats(p: chex.ArrayTree) -> tuple[list[jax.Array], Outputs]:
        outputs = _split(_noting(_PREDICT, predict_fn, p, batch))
        return outputs.floats, outputs.tree

    leaves, push_forward, tree = jax.linearize(floats, params, has_aux=True)
    if not leaves:
        raise ValueError(
            "`predict_fn` returns no floating-point outputs, so there is nothing to take curvature of; "
            "return logits, means or log-probabilities, not predictions"
        )
    outputs = _split(tree)
    program = jax.make_jaxpr(push_forward)(params)
    outputs = outputs._replace(has_convolutions=_has_convolutions(program))
    if _custom_rules(program):
        return outputs, *_from_reverse_mode(floats, params, leaves)
    transposed = jax.linear_transpose(push_forward, params)

    def pull_back(u: list[jax.Array]) -> chex.ArrayTree:
        try:
            return transposed(u)[0]
        except Exception as error:  # whatever has no transpose
            raise ValueError(
                "`predict_fn` has a forward-mode derivative only, but curvature takes both J v and J^T u. Of "
                "`diffrax`, pass `adjoint=diffrax.DirectAdjoint()` (not `ForwardMode()`); in the place of "
                "`lax.while_loop` use `lax.scan` or `lax.fori_loop` with a fixed number of steps"
            ) from error

    return outputs, push_forward, pull_back


_CUSTOM_VJP = ("custom_lin", "custom_vjp_call", "custom_vjp_call_jaxpr")


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Returns all equations of a program, also those of loops and functions that it calls."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    yield from _equations(part)


def _custom_rules(jaxpr: Any) -> list[str]:
    """Returns the names of the ``jax.custom_vjp`` functions in a program, which JAX refuses only late."""
    return [_function_name(own) for own in _equations(jaxpr) if own.primitive.name in _CUSTOM_VJP]


def _has_convolutions(jaxpr: Any) -> bool:
    return any(own.primitive.name == "conv_general_dilated" for own in _equations(jaxpr))


def _function_name(equation: Any) -> str:
    """Returns the name of the function with the custom rule where the program tells it."""
    jaxpr = equation.params.get("call_jaxpr")
    info = getattr(getattr(jaxpr, "jaxpr", jaxpr), "debug_info", None)
    return getattr(info, "func_src_info", "").split(" at ")[0] or equation.primitive.name


def _from_reverse_mode(
    floats: Callable, params: chex.ArrayTree, leaves: list[jax.Array]
) -> tuple[Callable[[Any], list[jax.Array]], Callable[[list[jax.Array]], Any]]:
    """Returns ``v -> J v`` and ``u -> J^T u`` of a model with ``jax.custom_vjp`` inside.

    It tells ``J^T u`` alone. That is linear in u, so its transpose is ``J v``.
    """
    _, reverse, _ = jax.vjp(floats, params, has_aux=True)
    zeros = [jnp.zeros_like(leaf) for leaf in leaves]
    try:
        _, pull_back = jax.linearize(lambda u: reverse(u)[0], zeros)
        if _custom_rules(jax.make_jaxpr(pull_back)(zeros)):
            raise TypeError("the backward rule is itself a custom one")
        transposed = jax.linear_transpose(pull_back, zeros)
        jax.eval_shape(transposed, params)
    except Exception as error:  # whatever the rule does
        names = ", ".join(sorted(set(_custom_rules(jax.make_jaxpr(floats)(params)))))
        raise ValueError(
            f"`predict_fn` uses `jax.custom_vjp` (in {names}), which has no forward-mode derivative, and its "
            "backward rule cannot be differentiated either, so there is no curvature to take. Of `diffrax`, "
            "pass `adjoint=diffrax.DirectAdjoint()`; of `optimistix`, `ImplicitAdjoint()`, its default; in a "
            "function of your own use `jax.custom_jvp`, or leave the custom rule out of the `predict_fn` "
            "that the optimizer gets"
        ) from error
    return lambda v: transposed(v)[0], pull_back


def _curvature_of_floats(
    loss_fn: LossFn, outputs: _Outputs, batch: Batch
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Returns the product with ``H_l`` on the leaves that are differentiated."""
    if len(outputs.floats) == len(jax.tree.leaves(outputs.tree)):
        product = output_curvature(loss_fn, outputs.tree, batch)
        return lambda vector: jax.tree.leaves(product(outputs.merge(vector)))
    of_floats = jax.grad(lambda floats: loss_fn(outputs.merge(floats), batch))
    return jax.linearize(of_floats, outputs.floats)[1]


def _check_curved(curvature: Callable[[list[jax.Array]], list[jax.Array]], outputs: _Outputs) -> None:
    """Raises ValueError for a loss that is linear in all outputs: then no direction would see curvature."""
    config: Any = jax.config
    if config.jax_disable_jit:
        return  # of a branch that is taken, not of the loss: `lax.cond` is a branch of Python there
    jaxpr: Any = jax.make_jaxpr(curvature)(outputs.floats).jaxpr
    depends = set(jaxpr.invars)
    is_reached = lambda variables: any(not hasattr(v, "val") and v in depends for v in variables)
    for equation in jaxpr.eqns:
        if is_reached(equation.invars):
            depends.update(equation.outvars)
    if not is_reached(jaxpr.outvars):
        raise ValueError(
            "`loss_fn` is linear in the outputs, or in pieces, so its curvature is zero and damping alone "
            "would set the length of a step. For log-probabilities, as of a normalising flow, use "
            "`mlhf_optax.NegativeLogLikelihood()`; in the place of an absolute error or a hinge a smooth "
            "one, such as Huber's or the squared hinge; else let `predict_fn` return what the loss is "
            "curved in"
        )


_PREDICT = "`predict_fn` is called as `predict_fn(params, batch)`, with the batch given to `update`"
_LOSS = "`loss_fn` is called as `loss_fn(outputs, batch)`, with the outputs of `predict_fn(params, batch)`"


def _noting(note: str, function: Callable, *args: Any) -> Any:
    """Calls a function of the user; its errors say how it was called."""
    try:
        return function(*args)
    except Exception as error:
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def _check_scalar_loss(loss_fn: LossFn, outputs: Outputs, batch: Batch) -> None:
    try:
        shape = trees.shapes_of(functools.partial(_noting, _LOSS, loss_fn), outputs, batch)
    except (AttributeError, TypeError) as error:
        if type(outputs) is not tuple:
            raise
        raise ValueError(
            f"`loss_fn` fails on the outputs, which are a tuple of {len(outputs)}. If `predict_fn` returns "
            "`(outputs, state)`, return the outputs alone, and read the state from the batch"
        ) from error
    if not hasattr(shape, "shape") or shape.shape != ():
        raise ValueError(
            "`loss_fn(outputs, batch)` must return one scalar (reduce over the batch, for example with "
            f"`jnp.mean`), got {shape}"
        )
