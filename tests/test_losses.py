"""The ready losses: values against NumPy, closed-form curvature against the Hessian, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mlhf_optax.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")

RNG = np.random.default_rng(0)


def softmax_batch(*shape):
    labels = RNG.integers(0, 4, size=shape).astype(np.int32)
    return RNG.normal(size=(*shape, 4)), {"label": labels, "mask": RNG.random(shape) < 0.6}


def dense_batch(*shape):
    targets = (RNG.random(shape) < 0.5).astype(float)
    return RNG.normal(size=shape), {"label": targets, "mask": RNG.random(shape) < 0.6}


CASES = {
    "softmax": (SoftmaxCrossEntropy(), *softmax_batch(5)),
    "softmax, one example": (SoftmaxCrossEntropy(), *softmax_batch()),
    "softmax, sequence": (SoftmaxCrossEntropy(), *softmax_batch(2, 3)),
    "softmax, masked": (SoftmaxCrossEntropy(mask="mask"), *softmax_batch(2, 3)),
    "softmax, smoothed": (SoftmaxCrossEntropy(label_smoothing=0.2), *softmax_batch(5)),
    "softmax, masked and smoothed": (
        SoftmaxCrossEntropy(mask="mask", label_smoothing=0.2),
        *softmax_batch(5),
    ),
    "sigmoid": (SigmoidCrossEntropy(), *dense_batch(5, 2)),
    "sigmoid, masked": (SigmoidCrossEntropy(mask="mask"), *dense_batch(5, 2)),
    "squared": (SquaredError(), *dense_batch(5, 2)),
    "squared, masked": (SquaredError(mask="mask"), *dense_batch(2, 3, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_curvature_is_the_hessian(name):
    loss, outputs, batch = CASES[name]
    flat, unravel = ravel_pytree(jnp.asarray(outputs))
    hessian = jax.jit(jax.hessian(lambda z: loss(unravel(z), batch)))(flat)
    product = jax.jit(lambda v: loss.curvature(unravel(flat), batch)(unravel(v)).reshape(-1))
    matrix = np.stack([product(unit) for unit in np.eye(flat.size)], axis=1)
    np.testing.assert_allclose(matrix, hessian, rtol=1e-10, atol=1e-14)


def numpy_softmax(logits, label, smoothing=0.0):
    log_probs = logits - np.log(np.exp(logits).sum())
    target = (1 - smoothing) * np.eye(len(logits))[label] + smoothing / len(logits)
    return -target @ log_probs


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mask", [None, "mask"])
def test_softmax_cross_entropy_is_the_mean_over_the_positions_of_the_mask(mask, smoothing):
    outputs, batch = softmax_batch(3, 4)
    chosen = batch["mask"] if mask else np.ones((3, 4), bool)
    terms = [
        numpy_softmax(z, y, smoothing) for z, y in zip(outputs[chosen], batch["label"][chosen], strict=True)
    ]
    loss = SoftmaxCrossEntropy(mask=mask, label_smoothing=smoothing)
    np.testing.assert_allclose(loss(jnp.asarray(outputs), batch), np.mean(terms), rtol=1e-12)


@pytest.mark.parametrize("mask", [None, "mask"])
def test_sigmoid_cross_entropy_is_the_mean_over_the_logits_of_the_mask(mask):
    outputs, batch = dense_batch(3, 4)
    chosen = batch["mask"] if mask else np.ones((3, 4), bool)
    probs, targets = 1 / (1 + np.exp(-outputs[chosen])), batch["label"][chosen]
    want = -np.mean(targets * np.log(probs) + (1 - targets) * np.log(1 - probs))
    np.testing.assert_allclose(SigmoidCrossEntropy(mask=mask)(jnp.asarray(outputs), batch), want, rtol=1e-12)


@pytest.mark.parametrize("mask", [None, "mask"])
def test_squared_error_is_half_the_mean_over_the_entries_of_the_mask(mask):
    outputs, batch = dense_batch(3, 4)
    chosen = batch["mask"] if mask else np.ones((3, 4), bool)
    want = 0.5 * np.mean((outputs - batch["label"])[chosen] ** 2)
    np.testing.assert_allclose(SquaredError(mask=mask)(jnp.asarray(outputs), batch), want, rtol=1e-12)


def test_a_mask_may_hold_fractional_weights():
    outputs, batch = jnp.array([1.0, 2.0]), {"label": jnp.zeros(2), "mask": jnp.array([0.1, 0.3])}
    np.testing.assert_allclose(SquaredError(mask="mask")(outputs, batch), 0.5 * (0.1 * 1 + 0.3 * 4) / 0.4)


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(mask="mask"), SquaredError(mask=lambda b: b["mask"])])
def test_an_empty_mask_gives_zero_loss_gradient_and_curvature(loss):
    outputs, batch = softmax_batch(3) if isinstance(loss, SoftmaxCrossEntropy) else dense_batch(3)
    outputs, batch = jnp.asarray(outputs), {**batch, "mask": np.zeros(3)}
    value, gradient = jax.value_and_grad(loss)(outputs, batch)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(outputs))
    np.testing.assert_array_equal(loss.curvature(outputs, batch)(outputs), np.zeros_like(outputs))


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SigmoidCrossEntropy(), SquaredError()])
def test_large_logits_stay_finite_in_value_gradient_and_curvature(loss):
    outputs = jnp.array([[1e4, -1e4], [0.0, 3e4]])
    batch = {"label": jnp.array([1, 0]) if isinstance(loss, SoftmaxCrossEntropy) else jnp.eye(2)}
    value, gradient = jax.value_and_grad(loss)(outputs, batch)
    assert all(map(np.all, map(np.isfinite, (value, gradient, loss.curvature(outputs, batch)(outputs)))))


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SigmoidCrossEntropy(), SquaredError()])
def test_bfloat16_outputs_are_reduced_in_float32(loss):
    # 512 equal terms: a bfloat16 sum would stop growing at 256.
    outputs = jnp.ones((512, 2), jnp.bfloat16)
    labels = jnp.zeros(512, int) if isinstance(loss, SoftmaxCrossEntropy) else jnp.zeros((512, 2))
    value = loss(outputs, {"label": labels})
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(outputs.astype(float), {"label": labels}), rtol=1e-5)
    assert loss.curvature(outputs, {"label": labels})(outputs).dtype == jnp.bfloat16


def test_labels_and_targets_are_found_by_key_position_or_function():
    z, labels = jnp.zeros((2, 3)), jnp.array([0, 1])
    want = SoftmaxCrossEntropy()(z, {"label": labels})
    one_hot = jax.nn.one_hot(labels, 3)
    assert SoftmaxCrossEntropy(labels=1)(z, (None, labels)) == want
    assert SoftmaxCrossEntropy(labels=lambda batch: batch.argmax(-1))(z, one_hot) == want
    np.testing.assert_allclose(SquaredError(targets=lambda batch: batch)(z, z + 1), 0.5)


def test_losses_are_hashable_and_comparable_so_that_they_can_be_static():
    assert hash(SoftmaxCrossEntropy(labels="y")) == hash(SoftmaxCrossEntropy(labels="y"))
    assert SquaredError() != SquaredError(targets="y")


# Errors.


def test_a_missing_key_is_named_with_what_the_batch_has():
    message = r"looks for `labels` under 'label' in the batch, which has \['image', 'y'\]; pass `labels=`"
    with pytest.raises(ValueError, match=message):
        SoftmaxCrossEntropy()(jnp.zeros((2, 3)), {"image": 0, "y": 1})
    with pytest.raises(ValueError, match=r"looks for `targets` under 'label' in the batch, which has tuple"):
        SquaredError()(jnp.zeros(2), (1, 2))
    with pytest.raises(ValueError, match=r"looks for `mask` under 'm' in the batch"):
        SquaredError(mask="m")(jnp.zeros(2), {"label": jnp.zeros(2)})


@pytest.mark.parametrize("labels", [jnp.zeros((2, 3), int), jnp.zeros(2), jnp.zeros((), int)])
def test_labels_of_another_shape_or_type_are_an_error(labels):
    with pytest.raises(ValueError, match=r"needs integer labels of shape \(2,\).*got"):
        SoftmaxCrossEntropy()(jnp.zeros((2, 3)), {"label": labels})


@pytest.mark.parametrize("loss", [SigmoidCrossEntropy(), SquaredError()])
def test_targets_that_would_broadcast_are_an_error(loss):
    with pytest.raises(ValueError, match=r"targets must have the shape of the outputs, \(5, 1\), got \(5,\)"):
        loss(jnp.zeros((5, 1)), {"label": jnp.zeros(5)})


def test_a_mask_of_another_shape_is_an_error():
    batch = {"label": jnp.zeros((5, 2)), "mask": jnp.ones(5)}
    with pytest.raises(ValueError, match=r"mask must have the shape of the positions, \(5, 2\), got \(5,\)"):
        SquaredError(mask="mask")(jnp.zeros((5, 2)), batch)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range_is_an_error(smoothing):
    with pytest.raises(ValueError, match=r"`label_smoothing` must lie in \[0, 1\)"):
        SoftmaxCrossEntropy(label_smoothing=smoothing)
