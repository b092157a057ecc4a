"""Ready losses with their mean reduction and the closed form of their output curvature.

Each is a function ``loss(outputs, batch) -> scalar`` that also knows ``curvature(outputs, batch)``,
the product with its Hessian with respect to the outputs, which saves differentiating it twice.
Use any other convex function of the same signature where these do not fit.

A mask shields: where it is zero, outputs, labels and targets may hold anything, NaN included, and change
neither the loss nor its derivatives. (It cannot shield what a model itself makes of a NaN input.) What
would make the loss wrong is never passed over: labels outside the classes and mask weights that are
negative or not finite are a ValueError where their values are known, and a NaN loss with NaN gradients
under ``jit``, which the optimizers of this package skip and count.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mlhf_optax.support import trees

Getter = Hashable | Callable[[Any], Any]


def _get(batch: Any, getter: Getter, argument: str) -> Any:
    if callable(getter):
        return getter(batch)
    try:
        return batch[getter]
    except (KeyError, IndexError, TypeError) as error:
        has = sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(
            f"the loss looks for `{argument}` under {getter!r} in the batch, which has {has}; "
            f"pass `{argument}=` a key of your batch or a function of it"
        ) from error


def _weights(
    batch: Any, mask: Getter | None, shape: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Weights of a (masked) mean over `shape`, and where they are not zero (None: everywhere).

    They sum to one, or to zero for an empty mask.
    """
    if mask is None:
        return jnp.full(shape, 1.0 / max(1, math.prod(shape)), dtype), None
    given = _get(batch, mask, "mask")
    values = jnp.asarray(given)
    if values.shape != shape:
        raise ValueError(f"the mask must have the shape of the positions, {shape}, got {values.shape}")
    values = values.astype(dtype)
    is_weight = jnp.isfinite(values) & (values >= 0)
    _check_known(is_weight, given, "the weights of a mask must be finite and >= 0")
    values = jnp.where(is_weight, values, jnp.nan)
    total = jnp.sum(values)
    return values / jnp.where(total == 0, 1.0, total), values != 0


def _shield(array: jax.Array, is_counted: jax.Array | None) -> jax.Array:
    """Puts zeros where the mask is zero: a weight of zero times NaN, or its derivative, would be NaN."""
    if is_counted is None:
        return array
    axes = tuple(range(is_counted.ndim, array.ndim))
    return jnp.where(jnp.expand_dims(is_counted, axes), array, jnp.zeros((), array.dtype))


def _check_known(is_valid: jax.Array, values: Any, rule: str) -> None:
    """Raises ValueError for values that break the rule, if they are known now."""
    if isinstance(is_valid, Tracer) or not is_valid.is_fully_addressable:
        return
    wrong = np.asarray(values)[~np.asarray(is_valid)]
    if wrong.size:
        raise ValueError(f"{rule}, got {wrong[0]}")


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """Mean softmax cross-entropy with integer labels.

    Args:
      labels: where the labels stand in the batch, a key or a function of the batch; integers of
        shape ``outputs.shape[:-1]``.
      mask: where a mask of the same shape stands, or None: weights >= 0 of the positions in the mean.
        Where it is 0 nothing counts, whatever stands there; all 0 give the loss 0.
      label_smoothing: weight in [0, 1) moved from the label to the uniform distribution.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in nats per position. ``outputs`` are logits of
      shape ``(..., C)`` with any leading shape.

    Raises:
      ValueError: if ``label_smoothing`` is out of range, labels or mask do not fit the outputs, or
        (where their values are known; under ``jit`` the loss is NaN instead) a label that counts is not
        one of 0 to C - 1 or a weight of the mask is not finite and >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = SoftmaxCrossEntropy()
      >>> round(float(loss(jnp.zeros((4, 10)), {"label": jnp.arange(4)})), 4)
      2.3026
    """

    labels: Getter = "label"
    mask: Getter | None = None
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"`label_smoothing` must lie in [0, 1), got {self.label_smoothing}")

    def __call__(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """Returns the mean loss, a scalar in nats per position."""
        logits, labels, weights, _ = self._positions(outputs, batch)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1, mode="promise_in_bounds")[..., 0]
        smooth = self.label_smoothing
        per_position = -(1.0 - smooth) * picked - smooth * jnp.mean(log_probs, axis=-1)
        return jnp.sum(per_position * weights)

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * (p * u - p <p, u>)``; which label it is does not enter."""
        logits, _, weights, is_counted = self._positions(outputs, batch)
        probs = jax.nn.softmax(logits, axis=-1)

        def product(vector: jax.Array) -> jax.Array:
            scaled = probs * _shield(vector, is_counted)
            centered = scaled - probs * jnp.sum(scaled, axis=-1, keepdims=True)
            return (weights[..., None] * centered).astype(outputs.dtype)

        return product

    def _positions(self, outputs: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Logits, labels that are classes, weights (NaN where a label is none), and what counts."""
        given = _get(batch, self.labels, "labels")
        labels = jnp.asarray(given)
        if labels.shape != outputs.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"softmax cross-entropy needs integer labels of shape {outputs.shape[:-1]} for logits of "
                f"shape {outputs.shape}, got {labels.dtype} of shape {labels.shape}"
            )
        dtype, num_classes = trees.wide_dtype(outputs), outputs.shape[-1]
        weights, is_counted = _weights(batch, self.mask, labels.shape, dtype)
        labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # so that they compare with C
        is_class = (labels >= 0) & (labels < num_classes)
        is_fine = is_class if is_counted is None else is_class | ~is_counted
        _check_known(is_fine, given, f"labels must lie in 0 to {num_classes - 1} for {num_classes} classes")
        # A factor, not a choice of NaN, so that gradients are NaN as well and the step is skipped.
        weights = weights * jnp.where(is_fine, 1.0, jnp.nan).astype(dtype)
        logits = _shield(outputs.astype(dtype), is_counted)
        return logits, jnp.where(is_class, labels, 0), weights, is_counted


@dataclasses.dataclass(frozen=True)
class SigmoidCrossEntropy:
    """Mean sigmoid cross-entropy of independent binary targets.

    Args:
      targets: where the targets stand in the batch (key or function); values in [0, 1] of the
        shape of the logits.
      mask: where a mask of that shape stands, or None; see :class:`SoftmaxCrossEntropy`.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in nats per logit.

    Raises:
      ValueError: if targets or mask do not have the shape of the outputs, or for weights of the mask
        that are known and not finite and >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = SigmoidCrossEntropy(targets="y")
      >>> round(float(loss(jnp.zeros(3), {"y": jnp.array([0.0, 1.0, 1.0])})), 4)
      0.6931
    """

    targets: Getter = "label"
    mask: Getter | None = None

    def __call__(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """Returns the mean loss, a scalar in nats per logit."""
        logits, targets, weights = _entries(outputs, batch, self.targets, self.mask)
        return jnp.sum((jax.nn.softplus(logits) - targets * logits) * weights)

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * p * (1 - p) * u``."""
        dtype = trees.wide_dtype(outputs)
        weights, is_counted = _weights(batch, self.mask, outputs.shape, dtype)
        logits = _shield(outputs.astype(dtype), is_counted)
        # sigmoid(x) sigmoid(-x) keeps its precision where p is close to one.
        scale = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits) * weights
        return lambda vector: (scale * _shield(vector, is_counted)).astype(outputs.dtype)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Half the mean squared error: ``0.5 * mean((outputs - targets)^2)`` over all entries.

    Args:
      targets: where the targets stand in the batch (key or function); the shape of the outputs.
      mask: where a mask of that shape stands, or None; see :class:`SoftmaxCrossEntropy`.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in squared units of the outputs.

    Raises:
      ValueError: if targets or mask do not have the shape of the outputs, or for weights of the mask
        that are known and not finite and >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> float(SquaredError()(jnp.zeros(2), {"label": jnp.array([1.0, 3.0])}))
      2.5
    """

    targets: Getter = "label"
    mask: Getter | None = None

    def __call__(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """Returns the mean loss, a scalar in squared units of the outputs."""
        outputs, targets, weights = _entries(outputs, batch, self.targets, self.mask)
        return 0.5 * jnp.sum(jnp.square(outputs - targets) * weights)

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * u``."""
        weights, is_counted = _weights(batch, self.mask, outputs.shape, trees.wide_dtype(outputs))
        return lambda vector: (weights * _shield(vector, is_counted)).astype(outputs.dtype)


def _entries(
    outputs: jax.Array, batch: Any, targets: Getter, mask: Getter | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs and targets in at least float32, zero where the mask is, and the weights of the mean."""
    found, dtype = jnp.asarray(_get(batch, targets, "targets")), trees.wide_dtype(outputs)
    if found.shape != outputs.shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {outputs.shape}, got {found.shape}; reshape "
            "one of them (a silent broadcast would change the loss)"
        )
    weights, is_counted = _weights(batch, mask, outputs.shape, dtype)
    return _shield(outputs.astype(dtype), is_counted), _shield(found.astype(dtype), is_counted), weights
