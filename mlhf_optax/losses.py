"""Ready losses with their mean reduction and the closed form of their output curvature.

Each is a function ``loss(outputs, batch) -> scalar`` that also knows ``curvature(outputs, batch)``, the
product with its Hessian with respect to the outputs. The closed form saves differentiating the loss twice.
:class:`NegativeLogLikelihood` has no curvature of its own and takes that of the empirical Fisher matrix.
Where none of these fits, use any other convex function of the same signature.

A mask shields: where it is zero, outputs, labels and targets may hold anything, NaN included, and change
neither the loss nor its derivatives. (It cannot shield what a model itself makes of a NaN input.)

Nothing that would make the loss wrong is passed over. A label outside the classes, or a weight of a mask
that is negative or not finite, is a ValueError where the values are known. Under ``jit`` it makes loss and
gradients NaN, and the optimizers of this package skip and count such a step.
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
from mlhf_optax.support.checks import DECAY, check_fields

Getter = Hashable | Callable[[Any], Any]

_TAKE_REAL = "let the model return real ones, such as the real part"


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
    """Returns the weights of a (masked) mean over `shape`, and where they are not zero (None: everywhere).

    They sum to one, or to zero for an empty mask.
    """
    if mask is None:
        count = math.prod(shape)
        if not isinstance(count, int):  # under `jax.export` with a size that is a symbol
            return jnp.ones(shape, dtype) / jnp.asarray(count, dtype), None
        return jnp.full(shape, 1.0 / max(1, count), dtype), None
    values = _mask_values(_get(batch, mask, "mask"), shape, dtype)
    return _normalized(values, jnp.sum(values)), values != 0


def _normalized(values: jax.Array, total: jax.Array) -> jax.Array:
    return values / jnp.where(total == 0, 1.0, total)


def _mask_values(given: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns the weights of a mask, NaN in the place of what is none."""
    values = jnp.asarray(given)
    if values.shape != shape:
        raise ValueError(f"the mask must have the shape of the positions, {shape}, got {values.shape}")
    values = values.astype(dtype)
    is_weight = jnp.isfinite(values) & (values >= 0)
    _check_known(is_weight, given, "the weights of a mask must be finite and >= 0")
    return jnp.where(is_weight, values, jnp.nan)


def _shield(array: jax.Array, is_counted: jax.Array | None) -> jax.Array:
    """Puts zeros where the mask is zero: zero times NaN would be NaN, in the loss or its derivative."""
    if is_counted is None:
        return array
    axes = tuple(range(is_counted.ndim, array.ndim))
    return jnp.where(jnp.expand_dims(is_counted, axes), array, jnp.zeros((), array.dtype))


def _check_real(array: Any, what: str, remedy: str) -> None:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{what} must be real, got {array.dtype} of shape {array.shape}; {remedy}")


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
        check_fields(self, DECAY, "label_smoothing")

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
        """Returns logits, labels that are classes, weights (NaN where a label is none), and what counts."""
        _check_real(outputs, "logits", _TAKE_REAL)
        given = _get(batch, self.labels, "labels")
        labels = jnp.asarray(given)
        if labels.shape != outputs.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"softmax cross-entropy needs integer labels of shape {outputs.shape[:-1]} for logits of "
                f"shape {outputs.shape}, got {labels.dtype} of shape {labels.shape}"
            )
        dtype, num_classes = trees.wide_dtype(outputs), outputs.shape[-1]
        weights, is_counted = _weights(batch, self.mask, labels.shape, dtype)
        labels = labels.astype(trees.common_dtype(labels.dtype, jnp.int32))  # so that they compare with C
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
        _check_real(outputs, "logits", _TAKE_REAL)
        logits, targets, weights = _entries(outputs, batch, self.targets, self.mask)
        return jnp.sum((jax.nn.softplus(logits) - targets * logits) * weights)

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * p * (1 - p) * u``."""
        _check_real(outputs, "logits", _TAKE_REAL)
        dtype = trees.wide_dtype(outputs)
        weights, is_counted = _weights(batch, self.mask, outputs.shape, dtype)
        logits = _shield(outputs.astype(dtype), is_counted)
        # sigmoid(x) sigmoid(-x) keeps its precision where p is close to one.
        scale = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits) * weights
        return lambda vector: (scale * _shield(vector, is_counted)).astype(outputs.dtype)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Half the mean squared error: ``0.5 * mean(|outputs - targets|^2)`` over all entries.

    Outputs may be complex, as those of a Fourier transform. A complex entry counts once, so the loss is twice
    that of the same numbers as pairs of real ones.

    Args:
      targets: where the targets stand in the batch (key or function); the shape of the outputs.
      mask: where a mask of that shape stands, or None; see :class:`SoftmaxCrossEntropy`.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in squared units of the outputs.

    Raises:
      TypeError: for complex targets of real outputs, whose imaginary part nothing could fit.
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
        return 0.5 * jnp.sum(_squared_modulus(outputs - targets) * weights)

    def curvature(self, outputs: jax.Array, batch: Any) -> Callable[[jax.Array], jax.Array]:
        """Returns ``u -> H_l u = weight * u``, conjugated if the outputs are complex.

        JAX's gradient with respect to a complex z is the conjugate of the direction of steepest ascent, so
        the derivative of that gradient in the direction u is a multiple of conj(u).
        """
        weights, is_counted = _weights(batch, self.mask, outputs.shape, _real_dtype(outputs))
        return lambda vector: (weights * jnp.conj(_shield(vector, is_counted))).astype(outputs.dtype)


def _squared_modulus(z: jax.Array) -> jax.Array:
    # Not `abs(z)**2`, whose derivative at zero is NaN.
    is_complex = jnp.issubdtype(z.dtype, jnp.complexfloating)
    return jnp.square(z.real) + jnp.square(z.imag) if is_complex else jnp.square(z)


def _real_dtype(array: jax.Array) -> Any:
    """Returns the dtype of weights: at least float32, and real also for complex outputs."""
    return jnp.finfo(trees.wide_dtype(array)).dtype


def _entries(
    outputs: jax.Array, batch: Any, targets: Getter, mask: Getter | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns outputs and targets, at least float32 and zero where the mask is, and weights of the mean."""
    found, dtype = jnp.asarray(_get(batch, targets, "targets")), trees.wide_dtype(outputs)
    if found.shape != outputs.shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {outputs.shape}, got {found.shape}; reshape "
            "one of them (a silent broadcast would change the loss)"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.complexfloating):
        _check_real(found, "targets of real outputs", "let the model return complex outputs, or take `.real`")
    weights, is_counted = _weights(batch, mask, outputs.shape, _real_dtype(outputs))
    return _shield(outputs.astype(dtype), is_counted), _shield(found.astype(dtype), is_counted), weights


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood:
    r"""Minus the mean log-probability, for models that return it: normalising flows, mixtures.

    The loss ``l = -mean(log p_i)`` is linear in the outputs ``log p_i``. Its Hessian with respect to them is
    zero, so its own Gauss-Newton matrix would be zero, too. The curvature that is used instead,

    .. math::
      H = \operatorname{diag}(\text{weights}), \qquad
      J^T H J = \frac{1}{B} \sum_i \nabla \log p_i \, (\nabla \log p_i)^T,

    makes the matrix the empirical Fisher matrix. It is positive semidefinite for any model, and close to the
    Hessian of the loss where the model is the distribution that the data come from; elsewhere the two may
    differ much. For classes prefer :class:`SoftmaxCrossEntropy`, which has the true Fisher matrix.

    Args:
      mask: where a mask shaped like the outputs stands (key or function), or None: weights >= 0 in the mean;
        see :class:`SoftmaxCrossEntropy`.

    Returns:
      Called as ``loss(outputs, batch)``, a scalar in nats per observation. ``outputs`` are log-probabilities,
      one number for each independent observation: shape (B,), any other shape, or a pytree of such arrays,
      over all entries of which the mean is taken. Add up the terms of one observation in the model.

    Raises:
      TypeError: for outputs that are complex.
      ValueError: if the mask is not shaped like the outputs, or for weights of it that are known and not
        finite and >= 0.

    Example:
      >>> import jax.numpy as jnp  # a normal distribution
      >>> log_prob = lambda p, x: -0.5 * ((x - p["mean"]) / jnp.exp(p["log_sd"])) ** 2 - p["log_sd"] - 0.919
      >>> loss, x = NegativeLogLikelihood(), jnp.array([1.0, 3.0])
      >>> outputs = log_prob({"mean": 2.0, "log_sd": 0.0}, x)
      >>> round(float(loss(outputs, x)), 3)
      1.419
      >>> loss.curvature(outputs, x)(jnp.ones(2))
      Array([0.5, 0.5], dtype=float32)

    Source: Martens, `New insights and perspectives on the natural gradient method
    <https://arxiv.org/abs/1412.1193>`_, 2014, section on the empirical Fisher.
    """

    mask: Getter | None = None

    def __call__(self, outputs: Any, batch: Any) -> jax.Array:
        """Returns minus the mean log-probability, a scalar in nats per observation."""
        weights, are_counted = self._weights(outputs, batch)

        def term(log_probs: jax.Array, weight: jax.Array, is_counted: jax.Array | None) -> jax.Array:
            return jnp.sum(_shield(log_probs.astype(weight.dtype), is_counted) * weight)

        return -trees.total(list(map(term, jax.tree.leaves(outputs), weights, are_counted)))

    def curvature(self, outputs: Any, batch: Any) -> Callable[[Any], Any]:
        """Returns ``u -> weight * u``, with which the Gauss-Newton matrix is the empirical Fisher matrix."""
        weights, are_counted = self._weights(outputs, batch)

        def product(vector: Any) -> Any:
            leaves, treedef = jax.tree.flatten(vector)
            scale = lambda u, weight, is_counted: (weight * _shield(u, is_counted)).astype(u.dtype)
            return treedef.unflatten(map(scale, leaves, weights, are_counted))

        return product

    def _weights(self, outputs: Any, batch: Any) -> tuple[list[jax.Array], list[jax.Array | None]]:
        """Returns weights, leaf by leaf, which sum to one over all leaves, and where they are not zero."""
        leaves, treedef = jax.tree.flatten(outputs)
        for leaf in leaves:
            _check_real(leaf, "log-probabilities", _TAKE_REAL)
        dtypes = [trees.wide_dtype(leaf) for leaf in leaves]
        if self.mask is None:
            share = 1.0 / max(1, trees.size(outputs))
            weights = [jnp.full(leaf.shape, share, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
            return weights, [None] * len(leaves)
        try:
            given = treedef.flatten_up_to(_get(batch, self.mask, "mask"))
        except ValueError as error:
            raise ValueError(f"the mask must be a tree of arrays like the outputs: {error}") from error
        values = list(map(_mask_values, given, [leaf.shape for leaf in leaves], dtypes))
        total = trees.total([jnp.sum(value) for value in values])
        return [_normalized(value, total.astype(value.dtype)) for value in values], [v != 0 for v in values]
