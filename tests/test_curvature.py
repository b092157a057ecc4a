"""GGN products against dense matrices built from full Jacobians, in float64."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import references
from jax import lax
from jax.flatten_util import ravel_pytree

from mlhf_optax.curvature import ggn_matvec, output_curvature
from mlhf_optax.curvature_batch import check_curvature_batch, curvature_subset
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


CASES = [mlp_case, conv_case, pytree_case, sequence_case]


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
    (_, forward), (_, pull_back) = jax.jvp(product, (point,), (tangent,)), jax.vjp(product, point)
    for moved in (forward, pull_back(tangent)[0]):
        np.testing.assert_allclose(moved, product(tangent), rtol=1e-12)


def test_products_run_under_jit_vmap_and_scan_also_of_several_parameters():
    predict_fn, loss_fn, params, batch = mlp_case()
    flat, unravel = ravel_pytree(params)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def transformed(flat_params, vectors):
        matvec = ggn_matvec(predict_fn, loss_fn, unravel(flat_params), batch)
        product = lambda v: ravel_pytree(matvec(unravel(v)))[0]
        return jax.vmap(product)(vectors), lax.scan(lambda c, v: (c, product(v)), None, vectors)[1]

    vectors = normal(9, 4, flat.size)
    products = transformed(np.stack([flat, 0.5 * flat]), vectors)
    for number, factor in enumerate((1.0, 0.5)):
        dense = references.dense_ggn(predict_fn, loss_fn, unravel(factor * flat), batch)
        for got in products:
            np.testing.assert_allclose(got[number], vectors @ dense, rtol=1e-9, atol=1e-12)


def test_low_precision_parameters_give_products_of_their_dtype():
    predict_fn, loss_fn, params, batch = mlp_case()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    low_batch = {**batch, "x": batch["x"].astype(jnp.bfloat16)}
    times = jax.jit(lambda params, batch: ggn_matvec(predict_fn, loss_fn, params, batch)(params))
    product = times(low, low_batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype(jnp.bfloat16)}
    exact = times(params, batch)
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

PARAMS = jnp.ones((2, 3))
SIZED = ("x", "y")


def squared(outputs, batch):
    return jnp.mean((outputs - batch["y"][:, None]) ** 2)


def full_batch(**others):
    return {"x": jnp.arange(16.0).reshape(8, 2), "y": jnp.arange(8.0), **others}


def subset(part, batch, per_example=None, predict_fn=lambda p, b: b["x"] @ p, loss_fn=squared):
    return curvature_subset(predict_fn, PARAMS, batch, part, per_example, loss_fn=loss_fn)


@pytest.mark.parametrize(("part", "count"), [(None, 8), (3, 3), (8, 8), (0.25, 2), (1.0, 8), (0.01, 1)])
def test_part_of_a_batch_is_at_even_distances_and_what_is_not_named_is_kept_whole(part, count):
    taken = [0, 4] if part == 0.25 else list(range(count))
    state = {"mean": jnp.ones(8), "key": jax.random.key(0), "n": 5, "mode": "train", "none": None}
    unnamed, named = (
        subset(part, full_batch()),
        subset(part, full_batch(state=state, mask=None), ["x", "y", "mask"]),
    )
    for small in (unnamed, named, jax.jit(lambda batch: subset(part, batch))(full_batch())):
        for name in SIZED:
            np.testing.assert_array_equal(small[name], full_batch()[name][jnp.array(taken)])
    assert named["state"] == state
    assert named["mask"] is None
    every_other = lambda batch: {"x": batch["x"][::2]}
    np.testing.assert_array_equal(subset(every_other, full_batch())["x"], full_batch()["x"][::2])


class Pair(NamedTuple):
    x: jax.Array
    y: jax.Array
    scale: jax.Array


@pytest.mark.parametrize(
    ("make", "names"), [(Pair, ("x", "y")), (lambda *leaves: leaves, (0, 1))], ids=["NamedTuple", "tuple"]
)
def test_names_are_fields_of_a_named_tuple_or_positions(make, names):
    batch = make(jnp.ones((8, 2)), jnp.ones(8), jnp.ones(8))
    predict_fn = lambda p, b: b[0] @ p * jnp.sum(b[2])
    loss_fn = lambda z, b: jnp.mean((z - b[1][:, None]) ** 2)
    small = subset(2, batch, names, predict_fn, loss_fn)
    assert [leaf.shape for leaf in small] == [(2, 2), (2,), (8,)]
    assert isinstance(small, type(batch))


def test_examples_of_several_positions_may_give_flat_outputs_if_they_are_named():
    batch = {"x": jnp.ones((4, 3, 2)), "y": jnp.ones((4, 3))}
    predict_fn = lambda p, b: b["x"].reshape(-1, 2) @ p
    loss_fn = lambda z, b: jnp.mean((z - b["y"].reshape(-1, 1)) ** 2)
    assert subset(0.5, batch, SIZED, predict_fn, loss_fn)["x"].shape == (2, 3, 2)
    with pytest.raises(
        ValueError, match=r"'x' of shape \(4, 3, 2\) does not begin with the 12 examples of the"
    ):
        subset(0.5, batch, None, predict_fn, loss_fn)


def test_a_model_may_work_on_groups_of_examples():
    predict_fn = lambda p, b: (b["x"].reshape(-1, 4, 2) - b["x"].reshape(-1, 4, 2).mean(1, keepdims=True)) @ p
    grouped = lambda p, b: predict_fn(p, b).reshape(-1, 3)
    assert subset(4, full_batch(), predict_fn=grouped)["x"].shape == (4, 2)


NORMED = lambda p, b: (b["x"] @ p)[..., None] * b["scale"][None, None]  # outputs of shape (8, 3, 8)
NORMED_LOSS = lambda z, b: jnp.mean((z - b["y"][:, None, None]) ** 2)
HIDDEN = lambda p, b: jnp.tanh(b["x"] @ jnp.ones((2, 8)) - b["mean"][None]) @ jnp.ones((8, 3)) * p.sum()
REMEDY = r".*per_example=\(\"image\", \"label\"\)"


@pytest.mark.parametrize("part", [1, 0.5])
@pytest.mark.parametrize(
    ("others", "predict_fn", "loss_fn", "message"),
    [
        ({"state": {"mean": jnp.ones(3)}}, None, squared, r"'state/mean' of shape \(3,\) does not begin"),
        ({"n": 5}, None, squared, r"'n' of shape \(\) does not begin with the 8 examples of the outputs"),
        # Model state that is as long as the batch, which a part of one example would broadcast.
        ({"mean": jnp.ones(8)}, HIDDEN, squared, "model or the loss does not work"),
        ({"scale": jnp.ones(8)}, NORMED, NORMED_LOSS, "gives other than as many more outputs"),
        # Tables that are read at indices: shorter ones are read past their end.
        ({"weight": jnp.ones(8)}, None, lambda z, b: squared(z, b) * b["weight"][b["y"].astype(int)].mean(),
         r"'weight' of shape \(8,\) is as long as the batch, but model and loss"),
        ({"table": jnp.ones((8, 3))}, lambda p, b: b["x"] @ p + b["table"][b["y"].astype(int)], squared,
         r"'table' of shape \(8, 3\) is as long as the batch"),
        ({"bank": jnp.ones((8, 2))}, lambda p, b: b["x"] @ p * b["bank"].sum(), squared,
         r"'bank' of shape \(8, 2\) is as long as the batch"),
    ],
)  # fmt: skip
def test_model_state_that_would_be_cut_is_an_error_unless_names_say_what_is(
    others, predict_fn, loss_fn, message, part
):
    predict_fn, batch = predict_fn or (lambda p, b: b["x"] @ p), full_batch(**others)
    cut = lambda batch: subset(part, batch, None, predict_fn, loss_fn)
    for function in (cut, jax.jit(cut)):
        with pytest.raises(ValueError, match=message + REMEDY):
            function(batch)
    small = subset(part, batch, SIZED, predict_fn, loss_fn)
    jax.tree.map(np.testing.assert_array_equal, {name: small[name] for name in others}, others)
    assert small["x"].shape[0] == small["y"].shape[0] < 8


def test_a_forgotten_name_and_a_name_too_many_are_errors():
    with pytest.raises(ValueError, match="a per-example array is not named" + REMEDY):
        subset(1, full_batch(), ("x",))
    with pytest.raises(ValueError, match="model or the loss does not work" + REMEDY):
        subset(1, full_batch(mean=jnp.ones(8)), ("x", "y", "mean"), HIDDEN)
    with pytest.raises(ValueError, match=r"'z' of shape \(3,\) does not begin with the 8 examples of other"):
        subset(1, full_batch(z=jnp.ones(3)), ("x", "y", "z"))
    with pytest.raises(ValueError, match=r"'key' of shape \(\) does not begin with"):
        subset(1, {**full_batch(), "key": jax.random.key(0)}, ("key", "x"))
    with pytest.raises(ValueError, match=r"`per_example` names image, label, but the batch has x, y"):
        subset(1, full_batch(), ("image", "label", "x"))


def test_an_error_of_the_model_itself_is_not_dressed_up():
    with pytest.raises(KeyError, match="missing"):
        subset(2, full_batch(), predict_fn=lambda p, b: b["missing"])


@pytest.mark.parametrize("predict_fn", [lambda p, b: jnp.sum(b["x"]), lambda p, b: (b["x"], b["y"][:2])])
def test_part_of_a_batch_needs_a_leading_dimension(predict_fn):
    with pytest.raises(ValueError, match=r"share one leading batch dimension.*pass a function"):
        subset(0.5, full_batch(), predict_fn=predict_fn, loss_fn=None)


def test_part_of_a_batch_larger_than_the_batch_is_an_error():
    with pytest.raises(ValueError, match=r"`curvature_batch_size`=9 is larger than the batch of 8"):
        subset(9, full_batch())


def test_part_of_a_batch_out_of_range_or_of_another_type_is_an_error():
    for part in (0, -1, 0.0, 1.5, 2.0, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"`curvature_batch_size`.*got {part}"):
            check_curvature_batch(part)
    for part in (True, "half", np.array([1])):
        with pytest.raises(TypeError, match=f"`curvature_batch_size` must be .* got {type(part).__name__}"):
            check_curvature_batch(part)


@pytest.mark.parametrize(
    ("part", "names", "error", "message"),
    [
        (0.5, "image", TypeError, r"`per_example` must be names such as .*, got 'image'"),
        (0.5, 3, TypeError, "`per_example` must be names such as .*, got 3"),
        (0.5, (), ValueError, "`per_example` names nothing"),
        (lambda batch: batch, ("image",), ValueError, "`per_example` has no effect"),
    ],
)  # fmt: skip
def test_names_that_are_none_are_errors(part, names, error, message):
    with pytest.raises(error, match=message):
        check_curvature_batch(part, names)
    check_curvature_batch(None, ("image",))
