"""GGN products against dense matrices built from full Jacobians, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import references
from jax import lax
from jax.flatten_util import ravel_pytree

from mlhf_optax.curvature import check_curvature_batch, curvature_subset, ggn_matvec, output_curvature
from mlhf_optax.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def mlp_case():
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 3)}
    predict = lambda p, batch: jnp.tanh(batch["x"] @ p["w"] + p["b"][None]) @ p["v"]
    batch = {"x": normal(3, 5, 3), "label": jnp.array([0, 1, 2, 1, 0])}
    return predict, SoftmaxCrossEntropy(label_smoothing=0.1), params, batch


def conv_case():
    params = {"kernel": normal(0, 2, 2, 1, 3), "dense": 0.5 * normal(1, 27, 2)}

    def predict(p, batch):
        dims = ("NHWC", "HWIO", "NHWC")
        maps = lax.conv_general_dilated(batch["image"], p["kernel"], (1, 1), "VALID", dimension_numbers=dims)
        return jax.nn.softplus(maps).reshape(maps.shape[0], -1) @ p["dense"]

    batch = {"image": normal(2, 3, 4, 4, 1), "label": (normal(3, 3, 2) > 0).astype(float)}
    return predict, SigmoidCrossEntropy(), params, batch


def pytree_case():
    """Two heads of different ranks, and a loss that couples them."""
    params = (normal(0, 3, 4), {"scale": normal(1)})

    def predict(p, batch):
        hidden = jnp.tanh(batch["x"] @ p[0])
        return {"mean": hidden, "log_scale": (p[1]["scale"] * jnp.sum(hidden), hidden[:, 0])}

    def loss(outputs, batch):
        log_scale, first = outputs["log_scale"]
        coupled = outputs["mean"] + log_scale - batch["y"]
        return jnp.mean(jnp.square(coupled)) + jnp.mean(jnp.exp(first))

    return predict, loss, params, {"x": normal(2, 5, 3), "y": normal(3, 5, 4)}


def sequence_case():
    """A recurrent model: outputs of shape (B, T, C) out of a scan, some positions masked."""
    params = {"in": normal(0, 2, 3), "rec": normal(1, 3, 3), "out": normal(2, 3, 4)}

    def predict(p, batch):
        def step(hidden, x):
            hidden = jnp.tanh(x @ p["in"] + hidden @ p["rec"])
            return hidden, hidden @ p["out"]

        _, logits = lax.scan(step, jnp.zeros((batch["x"].shape[0], 3)), batch["x"].swapaxes(0, 1))
        return logits.swapaxes(0, 1)

    mask = jnp.array([[1, 1, 1], [1, 0, 0]])
    batch = {"x": normal(3, 2, 3, 2), "label": jnp.array([[0, 3, 1], [2, 0, 0]]), "mask": mask}
    return predict, SoftmaxCrossEntropy(mask="mask"), params, batch


def custom_loss_case():
    """A convex loss without a closed form."""
    predict, _, params, batch = mlp_case()
    loss = lambda z, batch: jnp.mean(jnp.log(jnp.cosh(z - 1.0))) + jnp.mean(z**4)
    return predict, loss, params, batch


CASES = [mlp_case, conv_case, pytree_case, sequence_case, custom_loss_case]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_column_is_that_of_the_dense_matrix_which_is_symmetric_and_psd(case):
    predict_fn, loss_fn, params, batch = case()
    dense = references.dense_ggn(predict_fn, loss_fn, params, batch)
    matrix = references.columns(ggn_matvec(predict_fn, loss_fn, params, batch), params)
    np.testing.assert_allclose(matrix, dense, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12
    assert np.abs(matrix).max() > 1e-3


def test_agrees_with_the_complex_step_in_numpy():
    """The same matrix without any derivative of JAX."""
    params, batch = problems.mlp_params(), problems.batch()
    matrix = references.columns(ggn_matvec(problems.mlp, problems.LOSS, params, batch), params)
    numpy_batch = jax.tree.map(np.asarray, batch)
    np.testing.assert_allclose(
        matrix, references.Model().ggn(problems.flat(params), numpy_batch), rtol=1e-9, atol=1e-12
    )


def test_the_derivative_with_respect_to_the_vector_is_the_product_itself():
    predict_fn, loss_fn, params, batch = mlp_case()
    flat, unravel = ravel_pytree(params)
    matvec = ggn_matvec(predict_fn, loss_fn, params, batch)
    product = lambda v: ravel_pytree(matvec(unravel(v)))[0]
    point, tangent = normal(7, flat.size), normal(8, flat.size)
    value, moved = jax.jvp(product, (point,), (tangent,))
    np.testing.assert_allclose(moved, product(tangent), rtol=1e-12)
    _, pull_back = jax.vjp(product, point)
    np.testing.assert_allclose(pull_back(tangent)[0], product(tangent), rtol=1e-12)
    np.testing.assert_allclose(value, product(point), rtol=1e-12)


def test_products_run_under_jit_vmap_scan_and_fori_loop():
    predict_fn, loss_fn, params, batch = mlp_case()
    flat, unravel = ravel_pytree(params)
    dense = references.dense_ggn(predict_fn, loss_fn, params, batch)

    @jax.jit
    def transformed(flat_params, vectors):
        matvec = ggn_matvec(predict_fn, loss_fn, unravel(flat_params), batch)
        product = lambda v: ravel_pytree(matvec(unravel(v)))[0]
        by_scan = lax.scan(lambda c, v: (c, product(v)), None, vectors)[1]
        cubed = lax.fori_loop(0, 3, lambda _, v: product(v), vectors[0])
        return jax.vmap(product)(vectors), by_scan, cubed

    vectors = normal(9, 4, flat.size)
    by_vmap, by_scan, cubed = transformed(flat, vectors)
    np.testing.assert_allclose(by_vmap, vectors @ dense, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_scan, vectors @ dense, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(cubed, np.linalg.matrix_power(dense, 3) @ vectors[0], rtol=1e-9)


def test_matrices_of_several_parameters_and_batches_under_vmap():
    predict_fn, loss_fn, params, batch = mlp_case()
    stack = lambda tree, factor: jax.tree.map(lambda x: jnp.stack([x, factor * x]), tree)
    two_params, two_batches = stack(params, 0.5), stack(batch, 1)
    product = lambda p, b, v: ggn_matvec(predict_fn, loss_fn, p, b)(v)
    got = jax.vmap(product, in_axes=(0, 0, None))(two_params, two_batches, params)
    for i in range(2):
        one = jax.tree.map(lambda x: x[i], (two_params, two_batches))  # noqa: B023
        want = ggn_matvec(predict_fn, loss_fn, *one)(params)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g[i], w, rtol=1e-9), got, want)  # noqa: B023


def test_low_precision_parameters_give_products_of_their_dtype():
    predict_fn, loss_fn, params, batch = mlp_case()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    low_batch = {**batch, "x": batch["x"].astype(jnp.bfloat16)}
    product = ggn_matvec(predict_fn, loss_fn, low, low_batch)(low)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype(jnp.bfloat16)}
    exact = ggn_matvec(predict_fn, loss_fn, params, batch)(params)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g.astype(float), w, rtol=0.1, atol=0.02), product, exact
    )


def test_a_method_named_curvature_is_used_instead_of_differentiating():
    class Marked(SquaredError):
        def curvature(self, outputs, batch):
            return lambda vector: 7.0 * vector

    got = output_curvature(Marked(), jnp.ones(2), {"label": jnp.zeros(2)})(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(got, [7.0, 14.0])


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="`params` has no arrays"):
        ggn_matvec(lambda p, b: b, lambda z, b: jnp.sum(z), {}, jnp.ones(2))


@pytest.mark.parametrize("loss_fn", [lambda z, b: z, lambda z, b: (jnp.sum(z), z)], ids=["vector", "pair"])
def test_a_loss_that_is_not_a_scalar_is_an_error(loss_fn):
    with pytest.raises(ValueError, match=r"`loss_fn\(outputs, batch\)` must return one scalar"):
        ggn_matvec(lambda p, b: p * b, loss_fn, jnp.ones(2), jnp.ones(2))


# Part of the batch.

PREDICT = lambda p, batch: batch["x"] @ p


def full_batch():
    return {"x": jnp.arange(16.0).reshape(8, 2), "y": jnp.arange(8.0), "state": {"mean": jnp.ones(3)}, "n": 5}


@pytest.mark.parametrize(("part", "count"), [(None, 8), (3, 3), (8, 8), (0.25, 2), (1.0, 8), (0.01, 1)])
def test_part_of_a_batch_is_its_first_examples(part, count):
    small = curvature_subset(PREDICT, jnp.ones(2), full_batch(), part)
    np.testing.assert_array_equal(small["x"], full_batch()["x"][:count])
    np.testing.assert_array_equal(small["y"], full_batch()["y"][:count])
    np.testing.assert_array_equal(small["state"]["mean"], np.ones(3))
    assert small["n"] == 5


def test_part_of_a_batch_by_a_function():
    every_other = lambda batch: {"x": batch["x"][::2]}
    small = curvature_subset(PREDICT, jnp.ones(2), full_batch(), every_other)
    np.testing.assert_array_equal(small["x"], full_batch()["x"][::2])


@pytest.mark.parametrize("predict_fn", [lambda p, b: jnp.sum(b["x"]), lambda p, b: (b["x"], b["y"][:2])])
def test_part_of_a_batch_needs_a_leading_dimension(predict_fn):
    with pytest.raises(ValueError, match=r"share one leading batch dimension.*pass a function"):
        curvature_subset(predict_fn, jnp.ones(2), full_batch(), 0.5)


def test_part_of_a_batch_larger_than_the_batch_is_an_error():
    with pytest.raises(ValueError, match=r"`curvature_batch_size`=9 is larger than the batch of 8"):
        curvature_subset(PREDICT, jnp.ones(2), full_batch(), 9)


@pytest.mark.parametrize("part", [0, -1, 0.0, 1.5, -0.5, math.nan, math.inf])
def test_part_of_a_batch_out_of_range_is_an_error(part):
    with pytest.raises(ValueError, match="`curvature_batch_size`"):
        check_curvature_batch(part)


@pytest.mark.parametrize("part", [True, "half", np.array([1])])
def test_part_of_a_batch_of_another_type_is_an_error(part):
    with pytest.raises(TypeError, match=f"`curvature_batch_size` must be .* got {type(part).__name__}"):
        check_curvature_batch(part)
