"""Ready losses with their mean reduction and the closed form of their output curvature.

Each is a function ``loss(outputs, batch) -> scalar`` that also knows ``curvature(outputs, batch)``,
the product with its Hessian with respect to the outputs, which saves differentiating it twice.
Use any other convex function of the same signature where these do not fit.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import chex
import jax
import jax.numpy as jnp

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


def _weights(batch: Any, mask: Getter | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Weights of a (masked) mean over `shape`; they sum to one, or to zero for an empty mask."""
    if mask is None:
        return jnp.full(shape, 1.0 / max(1, math.prod(shape)), dtype)
    values = jnp.asarray(_get(batch, mask, "mask"))
    if values.shape != shape:
        raise ValueError(f"the mask must have the shape of the positions, {shape}, got {values.shape}")
    values = values.astype(dtype)
    total = jnp.sum(values)
    return values / jnp.where(total > 0, total, 1.0)


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """Mean softmax cross-entropy with integer labels.

    Args:
      labels: where the labels stand in the batch, a key or a function of the batch; integers of
        shape ``outputs.shape[:-1]``.
      mask: where a mask of the same shape stands (0 leaves a position out of the mean), or None.
      label_smoothing: weight in [0, 1) moved from the label to the uniform distribution.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in nats per position. ``outputs`` are logits of
      shape ``(..., C)`` with any leading shape.

    Raises:
      ValueError: if ``label_smoothing`` is out of range, or labels or mask do not fit the outputs.

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
        labels = self._labels(outputs, batch)
        log_probs = jax.nn.log_softmax(outputs.astype(_at_least_f32(outputs)), axis=-1)
        picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
        smooth = self.label_smoothing
        per_position = -(1.0 - smooth) * picked - smooth * jnp.mean(log_probs, axis=-1)
        return jnp.sum(per_position * _weights(batch, self.mask, labels.shape, log_probs.dtype))

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * (p * u - p <p, u>)``; labels do not enter."""
        labels = self._labels(outputs, batch)
        probs = jax.nn.softmax(outputs.astype(_at_least_f32(outputs)), axis=-1)
        weights = _weights(batch, self.mask, labels.shape, probs.dtype)[..., None]

        def product(vector: jax.Array) -> jax.Array:
            scaled = probs * vector
            result = weights * (scaled - probs * jnp.sum(scaled, axis=-1, keepdims=True))
            return result.astype(outputs.dtype)

        return product

    def _labels(self, outputs: jax.Array, batch: Any) -> jax.Array:
        labels = jnp.asarray(_get(batch, self.labels, "labels"))
        if labels.shape != outputs.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"softmax cross-entropy needs integer labels of shape {outputs.shape[:-1]} for logits of "
                f"shape {outputs.shape}, got {labels.dtype} of shape {labels.shape}"
            )
        return labels


@dataclasses.dataclass(frozen=True)
class SigmoidCrossEntropy:
    """Mean sigmoid cross-entropy of independent binary targets.

    Args:
      targets: where the targets stand in the batch (key or function); values in [0, 1] of the
        shape of the logits.
      mask: where a mask of that shape stands, or None.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in nats per logit.

    Raises:
      ValueError: if targets or mask do not have the shape of the outputs.

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
        targets = _targets(outputs, batch, self.targets)
        logits = outputs.astype(_at_least_f32(outputs))
        per_logit = jax.nn.softplus(logits) - targets * logits
        return jnp.sum(per_logit * _weights(batch, self.mask, logits.shape, logits.dtype))

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * p * (1 - p) * u``."""
        logits = outputs.astype(_at_least_f32(outputs))
        # sigmoid(x) sigmoid(-x) keeps its precision where p is close to one.
        scale = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
        scale = scale * _weights(batch, self.mask, logits.shape, logits.dtype)
        return lambda vector: (scale * vector).astype(outputs.dtype)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Half the mean squared error: ``0.5 * mean((outputs - targets)^2)`` over all entries.

    Args:
      targets: where the targets stand in the batch (key or function); the shape of the outputs.
      mask: where a mask of that shape stands, or None.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in squared units of the outputs.

    Raises:
      ValueError: if targets or mask do not have the shape of the outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> float(SquaredError()(jnp.zeros(2), {"label": jnp.array([1.0, 3.0])}))
      2.5
    """

    targets: Getter = "label"
    mask: Getter | None = None

    def __call__(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """Returns the mean loss, a scalar in squared units of the outputs."""
        targets = _targets(outputs, batch, self.targets)
        errors = outputs.astype(_at_least_f32(outputs)) - targets
        weights = _weights(batch, self.mask, errors.shape, errors.dtype)
        return 0.5 * jnp.sum(jnp.square(errors) * weights)

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * u``."""
        weights = _weights(batch, self.mask, outputs.shape, _at_least_f32(outputs))
        return lambda vector: (weights * vector).astype(outputs.dtype)


def _targets(outputs: jax.Array, batch: Any, getter: Getter) -> jax.Array:
    targets = jnp.asarray(_get(batch, getter, "targets"))
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {outputs.shape}, got {targets.shape}; reshape "
            "one of them (a silent broadcast would change the loss)"
        )
    return targets.astype(_at_least_f32(outputs))


def _at_least_f32(array: chex.Array) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)


__all__ = ["SigmoidCrossEntropy", "SoftmaxCrossEntropy", "SquaredError"]
