"""The ready losses: values, gradients and closed-form curvature against NumPy, shielding masks, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import ggn_matvec
from mlhf_optax.losses import NegativeLogLikelihood, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")

RNG = np.random.default_rng(0)


def softmax_batch(*shape):
    labels = RNG.integers(0, 4, size=shape).astype(np.int32)
    return RNG.normal(size=(*shape, 4)), {"label": labels, "mask": some(*shape)}


def dense_batch(*shape):
    targets = (RNG.random(shape) < 0.5).astype(float)
    return RNG.normal(size=shape), {"label": targets, "mask": some(*shape)}


def some(*shape):
    """A mask with at least one true and one false entry, if there is room."""
    mask = np.asarray(RNG.random(shape) < 0.6)
    mask[(0,) * len(shape)], mask[(-1,) * len(shape)] = False, True
    return mask


CASES = {
    "softmax": (SoftmaxCrossEntropy(), *softmax_batch(5)),
    "softmax, one example": (SoftmaxCrossEntropy(), *softmax_batch()),
    "softmax, sequence": (SoftmaxCrossEntropy(), *softmax_batch(2, 3)),
    "softmax, smoothed": (SoftmaxCrossEntropy(label_smoothing=0.2), *softmax_batch(5)),
    "sigmoid": (SigmoidCrossEntropy(), *dense_batch(5, 2)),
    "squared": (SquaredError(), *dense_batch(5, 2)),
    "likelihood": (NegativeLogLikelihood(), *dense_batch(5)),
}
MASKED = {
    "softmax": (SoftmaxCrossEntropy(mask="mask"), *softmax_batch(2, 3)),
    "softmax, smoothed": (SoftmaxCrossEntropy(mask="mask", label_smoothing=0.2), *softmax_batch(5)),
    "sigmoid": (SigmoidCrossEntropy(mask="mask"), *dense_batch(5, 2)),
    "squared": (SquaredError(mask="mask"), *dense_batch(2, 3, 2)),
    "likelihood": (NegativeLogLikelihood(mask="mask"), *dense_batch(5, 2)),
}


def softmax_term(z, label, smoothing):
    """Value, gradient and Hessian of one position, as for the terms below."""
    probs = np.exp(z) / np.exp(z).sum()
    target = (1 - smoothing) * np.eye(len(z))[label] + smoothing / len(z)
    return -target @ np.log(probs), probs - target, np.diag(probs) - np.outer(probs, probs)


def sigmoid_term(z, target):
    prob = 1 / (1 + np.exp(-z))
    value = -(target * np.log(prob) + (1 - target) * np.log(1 - prob))
    return value.item(), prob - target, np.diag(prob * (1 - prob))


def squared_term(z, target):
    return 0.5 * (z - target).item() ** 2, z - target, np.eye(1)


def likelihood_term(z, _):
    """The curvature is not the Hessian, which is zero, but that of the empirical Fisher matrix."""
    return -z.item(), -np.ones(1), np.eye(1)


TERMS = {
    SoftmaxCrossEntropy: softmax_term,
    SigmoidCrossEntropy: sigmoid_term,
    SquaredError: squared_term,
    NegativeLogLikelihood: likelihood_term,
}


def reference(loss, outputs, batch):
    """Value, gradient and Hessian with respect to the outputs: a loop over the positions that count."""
    smoothing = (loss.label_smoothing,) if isinstance(loss, SoftmaxCrossEntropy) else ()
    labels = np.ravel(batch["label"])
    weights = np.ravel(batch["mask"]).astype(float) if loss.mask else np.ones(labels.size)
    positions = outputs.reshape(labels.size, -1)
    value, gradient, hessian = 0.0, np.zeros_like(positions), np.zeros((*positions.shape, *positions.shape))
    for i in np.flatnonzero(weights):
        parts = TERMS[type(loss)](positions[i], labels[i], *smoothing)
        share = weights[i] / weights.sum()
        value, gradient[i], hessian[i, :, i] = value + share * parts[0], share * parts[1], share * parts[2]
    return value, gradient.reshape(outputs.shape), hessian.reshape(outputs.size, outputs.size)


@functools.partial(jax.jit, static_argnums=0)
def computed(loss, outputs, batch):
    """The same three of the library, the Hessian column by column."""
    value, gradient = jax.value_and_grad(loss)(outputs, batch)
    product = lambda v: loss.curvature(outputs, batch)(v.reshape(outputs.shape)).reshape(-1)
    return value, gradient, jax.lax.map(product, jnp.eye(outputs.size)).T


@functools.partial(jax.jit, static_argnums=0)
def times(loss, outputs, batch, vector):
    return loss.curvature(outputs, batch)(vector)


def close(got, want, rtol=1e-10, atol=1e-14):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=atol), got, want)


@pytest.mark.parametrize("case", [*CASES.values(), *MASKED.values()])
def test_value_gradient_and_curvature_are_those_of_a_loop_over_the_positions(case):
    close(computed(*case), reference(*case))


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e300])
@pytest.mark.parametrize("name", MASKED)
def test_where_the_mask_is_zero_anything_may_stand(name, bad):
    loss, outputs, batch = MASKED[name]
    is_out, is_softmax = ~batch["mask"], isinstance(loss, SoftmaxCrossEntropy)
    bad_outputs = np.where(is_out[..., None] if is_softmax else is_out, bad, outputs)
    bad_labels = np.where(is_out, -1 if bad < 0 else 4, batch["label"]) if is_softmax else batch["label"]
    bad_labels = bad_labels if is_softmax else np.where(is_out, bad, bad_labels)
    want = reference(loss, outputs, batch)
    close(computed(loss, bad_outputs, {**batch, "label": bad_labels}), want)
    # What a model with a NaN there pushes forward.
    vector = np.where(np.isfinite(bad_outputs) & (bad_outputs < 1e299), outputs, np.nan)
    product = times(loss, bad_outputs, {**batch, "label": bad_labels}, vector)
    close(product.reshape(-1), want[2] @ outputs.reshape(-1))


@pytest.mark.parametrize("label", [-1, 4, 300, -(2**31)])
@pytest.mark.parametrize("mask", [None, "mask"])
def test_a_label_outside_the_classes_is_an_error_or_a_nan_loss_and_gradient_under_jit(label, mask):
    loss, (outputs, batch) = SoftmaxCrossEntropy(mask=mask), softmax_batch(5)
    batch["label"][-1] = label
    with pytest.raises(ValueError, match=rf"labels must lie in 0 to 3 for 4 classes, got {label}$"):
        loss(jnp.asarray(outputs), batch)
    value, gradient, hessian = computed(loss, outputs, batch)
    assert np.isnan(value)
    assert np.isnan(gradient[-1]).all()
    assert np.isnan(hessian).any()


def test_labels_of_small_and_of_unsigned_types_are_compared_as_numbers():
    outputs = RNG.normal(size=(2, 300))
    for dtype in (np.uint8, np.int8, np.uint32):
        batch = {"label": np.array([0, 127], dtype)}
        value, gradient, _ = reference(SoftmaxCrossEntropy(), outputs, batch)
        close(jax.jit(jax.value_and_grad(SoftmaxCrossEntropy()))(outputs, batch), (value, gradient))
    huge = {"label": np.array([0, 2**32 - 1], np.uint32)}
    assert np.isnan(jax.jit(SoftmaxCrossEntropy())(outputs, huge))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", MASKED)
def test_a_weight_that_is_none_is_an_error_or_a_nan_loss_and_gradient_under_jit(name, weight):
    loss, outputs, batch = MASKED[name]
    mask = np.where(np.cumsum(np.ones_like(batch["label"])).reshape(batch["mask"].shape) == 1, weight, 1.0)
    with pytest.raises(ValueError, match=rf"weights of a mask must be finite and >= 0, got {weight}$"):
        loss(jnp.asarray(outputs), {**batch, "mask": mask})
    value, gradient, hessian = computed(loss, outputs, {**batch, "mask": mask})
    assert np.isnan(value)
    assert np.isnan(gradient).all()
    assert np.isnan(hessian).any()


def test_a_mask_may_hold_fractional_weights():
    outputs, batch = jnp.array([1.0, 2.0]), {"label": jnp.zeros(2), "mask": jnp.array([0.1, 0.3])}
    np.testing.assert_allclose(SquaredError(mask="mask")(outputs, batch), 0.5 * (0.1 * 1 + 0.3 * 4) / 0.4)


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(mask="mask"), SquaredError(mask=lambda b: b["mask"])])
def test_an_empty_mask_gives_zero_loss_gradient_and_curvature(loss):
    outputs, batch = softmax_batch(3) if isinstance(loss, SoftmaxCrossEntropy) else dense_batch(3)
    outputs, batch = jnp.asarray(outputs), {**batch, "mask": np.zeros(3)}
    assert not any(part.any() for part in computed(loss, outputs, batch))


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SigmoidCrossEntropy(), SquaredError()])
def test_large_logits_stay_finite_in_value_gradient_and_curvature(loss):
    outputs = jnp.array([[1e4, -1e4], [0.0, 3e4]])
    batch = {"label": jnp.array([1, 0]) if isinstance(loss, SoftmaxCrossEntropy) else jnp.eye(2)}
    assert all(np.isfinite(part).all() for part in computed(loss, outputs, batch))


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SigmoidCrossEntropy(), SquaredError()])
def test_bfloat16_outputs_are_reduced_in_float32(loss):
    # 512 equal terms: a bfloat16 sum would stop growing at 256.
    outputs = jnp.ones((512, 2), jnp.bfloat16)
    labels = jnp.zeros(512, int) if isinstance(loss, SoftmaxCrossEntropy) else jnp.zeros((512, 2))
    batch, loss_fn = {"label": labels}, jax.jit(loss)
    assert loss_fn(outputs, batch).dtype == jnp.float32
    np.testing.assert_allclose(loss_fn(outputs, batch), loss_fn(outputs.astype(float), batch), rtol=1e-5)
    assert jax.eval_shape(loss.curvature(outputs, batch), outputs).dtype == jnp.bfloat16


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


# Complex numbers.


def complex_numbers(*shape):
    return RNG.normal(size=shape) + 1j * RNG.normal(size=shape)


def as_pairs(z):
    return jnp.stack([z.real, z.imag], -1)


@pytest.mark.parametrize("mask", [None, "mask"])
def test_complex_squared_errors_are_those_of_pairs_of_real_numbers(mask):
    """A complex entry counts once, so the mean is twice that over the numbers of the pairs."""
    inputs, w = complex_numbers(5, 2, 3), RNG.normal(size=3)
    batch = {"label": complex_numbers(5, 2), "mask": some(5, 2)}
    pairs = {"label": as_pairs(batch["label"]), "mask": np.repeat(batch["mask"][..., None], 2, -1)}
    predict = lambda w, _: jnp.einsum("bci,i->bc", inputs, w) ** 2
    predict_pairs = lambda w, _: as_pairs(predict(w, None))
    loss = SquaredError(mask=mask)
    found = jax.value_and_grad(lambda w: loss(predict(w, None), batch))(w)
    wanted = jax.value_and_grad(lambda w: 2 * loss(predict_pairs(w, None), pairs))(w)
    close(found, wanted)
    matrix = lambda *of: jax.vmap(ggn_matvec(*of))(jnp.eye(3))
    wanted = 2 * matrix(predict_pairs, loss, w, pairs)
    close(matrix(predict, loss, w, batch), wanted)
    twice_differentiated = lambda z, b: loss(z, b)
    close(matrix(predict, twice_differentiated, w, batch), wanted)


def test_complex_numbers_where_they_have_no_meaning_are_an_error():
    z = jnp.zeros((2, 3), complex)
    with pytest.raises(TypeError, match=r"of real outputs must be real, got complex128 .* complex outputs"):
        SquaredError()(z.real, {"label": z})
    labels, targets = {"label": jnp.zeros(2, int)}, {"label": z.real}
    for loss, batch in ((SoftmaxCrossEntropy(), labels), (SigmoidCrossEntropy(), targets)):
        for method in (loss, loss.curvature):
            with pytest.raises(TypeError, match=r"logits must be real, got complex128 of shape \(2, 3\)"):
                method(z, batch)
    with pytest.raises(TypeError, match="log-probabilities must be real"):
        NegativeLogLikelihood()(z, None)


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
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 1\)"):
        SoftmaxCrossEntropy(label_smoothing=smoothing)
