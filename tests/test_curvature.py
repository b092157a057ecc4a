"""GGN products against dense matrices built from full Jacobians, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import references
from jax import lax
from jax.flatten_util import ravel_pytree

from mlhf_optax.curvature import ggn_matvec, output_curvature
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


# Models with rules of their own, and outputs that nothing differentiates.


def dense_ggn(matvec, params):
    flat, unravel = ravel_pytree(params)
    return np.stack([ravel_pytree(matvec(unravel(row)))[0] for row in np.eye(flat.size)])


@jax.custom_vjp
def custom_tanh(x):
    return jnp.tanh(x)


custom_tanh.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, ct: (ct * (1 - y**2),))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "remat", "jit"])
def test_a_model_with_a_custom_vjp_has_the_same_product_as_the_model_without(wrap):
    """Forward mode is refused by JAX; J v is the transpose of the rule's J^T u."""
    _, loss_fn, params, batch = mlp_case()

    def model(activation):
        def layer(x, w):
            return activation(x @ w)

        def apply(p, batch):
            hidden = wrap(layer)(batch["x"] + p["b"][None, :3], p["w"])
            return jax.lax.map(lambda row: activation(row)[None] @ p["v"], hidden)[:, 0]

        return apply

    for in_jit in (lambda f: f, jax.jit):
        own, plain = (
            in_jit(lambda v, a=a: ggn_matvec(model(a), loss_fn, params, batch)(v))
            for a in (custom_tanh, jnp.tanh)
        )
        vector = jax.tree.map(lambda x: normal(9, *x.shape), params)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), own(vector), plain(vector)
        )
    jacobian = jax.jacrev(lambda p: model(custom_tanh)(p, batch))(params)  # of its own rule
    rows = np.concatenate([np.asarray(jacobian[name]).reshape(15, -1) for name in sorted(params)], 1)
    outputs = model(jnp.tanh)(params, batch)
    hessian = np.asarray(jax.hessian(lambda z: loss_fn(z, batch))(outputs)).reshape(15, 15)
    matrix = dense_ggn(ggn_matvec(model(custom_tanh), loss_fn, params, batch), params)
    np.testing.assert_allclose(matrix, rows.T @ hessian @ rows, rtol=1e-8, atol=1e-12)


def test_a_custom_vjp_whose_rule_cannot_be_differentiated_is_an_error_that_says_what_to_do():
    @jax.custom_vjp
    def solve(x):
        return x**2

    def backward(x, ct):
        halve = lambda c: (c[0] + 1, c[1] * 0.5 + x * c[1])
        return (jax.lax.while_loop(lambda c: c[0] < 3, halve, (0, ct))[1],)

    solve.defvjp(lambda x: (x**2, x), backward)
    message = r"`predict_fn` uses `jax.custom_vjp` \(in .*solve\).*DirectAdjoint\(\).*`jax.custom_jvp`"
    predict = lambda p, b: solve(p * b["x"])
    batch = {"x": jnp.arange(3.0), "label": jnp.zeros(3)}
    with pytest.raises(ValueError, match=message):
        ggn_matvec(predict, SquaredError(), jnp.ones(3), batch)


def test_a_model_that_only_has_a_forward_mode_is_an_error_that_says_what_to_do():
    go_on = lambda c: c[0] < 3
    predict = lambda w, b: jax.lax.while_loop(go_on, lambda c: (c[0] + 1, jnp.sin(w * c[1])), (0, b))[1]
    matvec = ggn_matvec(predict, lambda z, b: jnp.mean(z**2), jnp.ones(3), jnp.arange(3.0))
    with pytest.raises(ValueError, match=r"forward-mode derivative only.*DirectAdjoint.*`lax.scan`"):
        matvec(jnp.ones(3))


def test_outputs_that_are_not_floating_are_constants():
    predict, _, params, batch = mlp_case()
    loss_fn = lambda z, b: jnp.mean(z["logits"][z["kept"]] ** 2 * (1 + z["class"][z["kept"], None]))
    kept = np.array([0, 2, 3])

    def with_predictions(p, batch):
        logits = predict(p, batch)
        return {"logits": logits, "class": jnp.argmax(logits, -1), "kept": kept, "mask": logits > 0}

    classes = jnp.argmax(predict(params, batch), -1)
    floats = lambda z, b: jnp.mean(z[kept] ** 2 * (1 + classes[kept, None]))
    vector = jax.tree.map(lambda x: normal(9, *x.shape), params)
    got = jax.jit(lambda v: ggn_matvec(with_predictions, loss_fn, params, batch)(v))(vector)
    want = ggn_matvec(predict, floats, params, batch)(vector)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), got, want)
    with pytest.raises(ValueError, match="`predict_fn` returns no floating-point outputs"):
        ggn_matvec(lambda p, b: jnp.argmax(predict(p, b), -1), floats, params, batch)


def test_a_pair_of_outputs_and_state_is_an_error_that_says_to_return_the_outputs():
    predict, loss_fn, params, batch = mlp_case()
    with pytest.raises(ValueError, match=r"a tuple of 2\. If `predict_fn` returns `\(outputs, state\)`"):
        ggn_matvec(lambda p, b: (predict(p, b), {"count": 3}), loss_fn, params, batch)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda z, b: -jnp.mean(z),
        lambda z, b: jnp.sum(z * b["x"].sum()) / 5 + 3.0,
        lambda z, b: jnp.mean(jnp.abs(z)),
    ],
)
def test_a_loss_that_is_linear_in_the_outputs_is_an_error(loss_fn):
    """Its curvature is zero: every step would have the length that damping says, and nothing would tell."""
    predict, _, params, batch = mlp_case()
    with pytest.raises(ValueError, match=r"`loss_fn` is linear in the outputs.*NegativeLogLikelihood"):
        ggn_matvec(predict, loss_fn, params, batch)
    # One output that is curved is enough.
    ggn_matvec(predict, lambda z, b: loss_fn(z, b) + jnp.mean(z[:, 0] ** 2), params, batch)


def test_errors_of_a_users_own_functions_say_how_they_were_called():
    predict, loss_fn, params, batch = mlp_case()
    with pytest.raises(KeyError) as caught:
        ggn_matvec(lambda p, b: b["missing"], loss_fn, params, batch)
    assert any("`predict_fn(params, batch)`" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError) as caught:
        ggn_matvec(predict, lambda params, batch: params["w"], params, batch)
    assert any("`loss_fn(outputs, batch)`" in note for note in caught.value.__notes__)
