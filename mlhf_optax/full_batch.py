"""The optimizer for losses without noise: all of the data in every batch."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mlhf_optax.controllers.levenberg_marquardt import LevenbergMarquardt
from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.hessian_free import hessian_free
from mlhf_optax.solvers import BySize
from mlhf_optax.support.placement import AxisName
from mlhf_optax.transforms import check_by_name


def full_batch(
    predict_fn: PredictFn, loss_fn: LossFn, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Returns what ``load_pretrained().optimizer(predict_fn, loss_fn, full_batch=True)`` is.

    It is a rule, with nothing learned and nothing to set: Levenberg and Marquardt's for losses without noise
    (:meth:`mlhf_optax.LevenbergMarquardt.without_noise`), with the solver that the sizes call for
    (:class:`mlhf_optax.solvers.BySize`). Without noise the quadratic model tells how far it can be trusted,
    and that leaves little to learn. A step that raises the loss is refused.

    Give it all of the data at every step. Parameters are float64 where the last digits count, else float32.

    Args:
      predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in the outputs.
      axis_name: axis along which batches differ (:class:`mlhf_optax.Model`).

    Returns:
      The transformation; call ``update(grads, state, params, batch=batch)``.

    Raises:
      ValueError: from ``init``, for parameters in low precision, or in several.

    Warns:
      UserWarning: once, for batches whose shapes change, and outside of ``jit`` also for a loss that is not
        finite at the start and for batches whose loss changes. Under ``jit`` ``info`` counts them, as
        ``skipped_steps`` and ``changed_batches``.

    Example:
      >>> predict_fn = lambda w, batch: jnp.exp(w * batch["t"]) - batch["y"]
      >>> loss_fn = lambda residuals, batch: jnp.sum(residuals**2)
      >>> t = jnp.linspace(0.0, 1.0, 5)
      >>> batch, w = {"t": t, "y": jnp.exp(-2.0 * t)}, jnp.array(1.0)
      >>> tx = full_batch(predict_fn, loss_fn)
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     grads = jax.grad(lambda w: loss_fn(predict_fn(w, batch), batch))(w)
      ...     updates, state = tx.update(grads, state, w, batch=batch)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(10):
      ...     w, state = step(w, state)
      >>> w.round(4)
      Array(-2., dtype=float32)
    """
    rule = LevenbergMarquardt.without_noise()
    inner = hessian_free(1.0, predict_fn, loss_fn, damping=rule, solver=BySize(), axis_name=axis_name)
    said: set[str] = set()
    shapes: list[Any] = []

    def warn_once(what: str, text: str) -> None:
        if what not in said:
            said.add(what)
            warnings.warn(text, stacklevel=4)

    def init_fn(params):
        _check_precision(params)
        shapes.clear()
        return inner.init(params)

    def update_fn(updates, state: Any, params: Any = None, *others, batch=None, **extra_args):
        now = jax.tree.map(np.shape, batch)
        if shapes and shapes[0] != now:
            warn_once("batch", f"the batch has other shapes than before, {now} after {shapes[0]}; {_SAME}")
        shapes[:] = [now]
        check_by_name(others, "full_batch")
        found: Any = inner.update(updates, state, params, batch=batch, **extra_args)
        updates, state = found
        info = state[0].info
        if not isinstance(info.loss, Tracer):
            if not jnp.isfinite(info.loss) and int(state[0].count) == 0:
                warn_once(
                    "loss",
                    f"the loss is {float(info.loss)} at the start, so no step is taken; give parameters "
                    "where loss and gradient are finite",
                )
            if int(info.changed_batches):
                warn_once("batch", f"the loss of this batch is another than that of the last one; {_SAME}")
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_SAME = (
    "`full_batch=True` takes every batch for the same, all of the data, and refuses steps that raise its "
    "loss. For mini-batches leave it out"
)


def _check_precision(params: Any) -> None:
    """Raises ValueError for parameters in low precision, or in several."""
    leaves = [(jax.tree_util.keystr(path), leaf.dtype) for path, leaf in jax.tree.leaves_with_path(params)]
    for name, dtype in leaves:
        if dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"`full_batch=True` needs parameters in float32 or float64, got {dtype} in `params{name}`: "
                "rounding would be the noise of the loss. Let `predict_fn` compute in low precision if it "
                "must"
            )
        if dtype != leaves[0][1]:
            raise ValueError(
                f"parameters must have one dtype, got {dtype} in `params{name}` beside {leaves[0][1]} in "
                f"`params{leaves[0][0]}`; cast them all to float64"
            )
