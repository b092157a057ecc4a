"""`convolve` against `jax.lax.conv_general_dilated`: values, every derivative, loops, vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from numpy.testing import assert_allclose

from mlhf_optax import SoftmaxCrossEntropy, ggn_matvec
from mlhf_optax.tasks import cpu_convolution
from mlhf_optax.tasks.convolution import convolve

LAYOUT = ("NHWC", "HWIO", "NHWC")
# images, kernel, strides, padding; more than 8 images, which the gradient of the kernel takes in pieces.
CASES = {
    "5x5 of 3 channels": ((3, 6, 7, 3), (5, 5, 3, 4), (1, 1), "SAME"),
    "3x3, 19 images": ((19, 5, 5, 4), (3, 3, 4, 2), (1, 1), "SAME"),
    "3x3 valid, stride 2": ((9, 7, 6, 2), (3, 3, 2, 4), (2, 2), "VALID"),
    "3x3 same, stride 2, even": ((2, 6, 6, 5), (3, 3, 5, 3), (2, 2), "SAME"),
    "1x1": ((3, 4, 5, 3), (1, 1, 3, 4), (1, 1), "SAME"),
    "1x1, stride 2": ((3, 4, 5, 3), (1, 1, 3, 4), (2, 2), "SAME"),
    "1x1, padded": ((2, 3, 3, 2), (1, 1, 2, 3), (2, 1), ((1, 1), (0, 2))),
    "2x3, uneven pads and strides": ((2, 5, 6, 2), (2, 3, 2, 3), (2, 1), ((1, 0), (0, 2))),
    "last rows unused": ((2, 6, 6, 2), (3, 3, 2, 2), (2, 2), "VALID"),
}


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def close(ours, theirs):
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-10, atol=1e-10), ours, theirs)


@pytest.fixture(params=["copies", "canonical"])
def way(request, monkeypatch):
    """Both ways of computing, as the sizes of the test would all take the one for small images."""
    if request.param == "canonical":
        monkeypatch.setattr(cpu_convolution, "_SMALL", 0)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, way, x64):
    *shapes, strides, padding = request.param
    function = lambda conv: lambda x, k: conv(x, k, strides, padding, dimension_numbers=LAYOUT)
    return function(convolve), function(lax.conv_general_dilated), arrays(*shapes)


def test_values_and_derivatives_are_those_of_jax(case):
    """Second order as well: the derivatives of each of the three contractions are the other two."""
    ours, theirs, operands = case
    tangents = arrays(*(x.shape for x in operands), seed=1)

    def everything(conv):
        def gradient(x, k):
            return jax.grad(lambda x, k: jnp.sum(conv(x, k) ** 3), (0, 1))(x, k)

        return jax.jvp(conv, operands, tangents), jax.jvp(gradient, operands, tangents)

    close(*(jax.jit(functools.partial(everything, conv))() for conv in (ours, theirs)))


def test_without_jit(x64):
    images, kernel = arrays((2, 5, 5, 3), (3, 3, 3, 2))
    options = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": LAYOUT}
    grads = [
        jax.grad(lambda k, conv=conv: jnp.sum(jnp.sin(conv(images, k, **options))))(kernel)
        for conv in (convolve, lax.conv_general_dilated)
    ]
    close(*grads)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 4), (4, 2), (None, 3)])
def test_vmap_over_either_or_both_operands(axes, way, x64):
    """Of values and gradients; a vmap of a vmap over the other operand on top."""
    shapes = [(2, 4, 4, 3), (3, 2, 3, 2)]
    batched = [s if a is None else (*s[:a], 5, *s[a:]) for s, a in zip(shapes, axes, strict=True)]
    operands = arrays(*batched)

    def everything(conv, x, k):
        one = lambda x, k: conv(x, k, (2, 1), "SAME", dimension_numbers=LAYOUT)
        gradient = jax.grad(lambda x, k: jnp.sum(one(x, k) ** 3), (0, 1))
        outer = lambda x: jax.vmap(gradient, axes)(x, k)
        return jax.vmap(one, axes)(x, k), outer(x), jax.vmap(outer)(jnp.stack([x, 2 * x]))

    both = (convolve, lax.conv_general_dilated)
    close(*(jax.jit(functools.partial(everything, conv))(*operands) for conv in both))


@pytest.mark.parametrize("loop", ["fori", "scan", "map"])
def test_ggn_products_in_loops_are_those_outside(loop, way, x64):
    loss = SoftmaxCrossEntropy()
    images, kernel, direction = arrays((9, 4, 4, 2), (3, 3, 2, 3), (3, 3, 2, 3))
    batch = {"image": images, "label": jnp.arange(9) % 3}

    def product(conv, v):
        def predict(k, batch):
            hidden = jnp.tanh(conv(batch["image"], k, (1, 1), "SAME", dimension_numbers=LAYOUT))
            return jnp.mean(
                conv(hidden, jnp.swapaxes(k, 2, 3), (2, 2), "SAME", dimension_numbers=LAYOUT), (1, 2)
            )

        return ggn_matvec(predict, loss, kernel, {**batch, "label": batch["label"] % 2})(v)

    def in_loop(v):
        if loop == "fori":
            return lax.fori_loop(0, 2, lambda _, u: product(convolve, u), v)
        if loop == "scan":
            return lax.scan(lambda u, _: (product(convolve, u), None), v, length=2)[0]
        return lax.map(functools.partial(product, convolve), jnp.stack([v, 2 * v]))

    once = product(lax.conv_general_dilated, direction)
    expected = jnp.stack([once, 2 * once]) if loop == "map" else product(lax.conv_general_dilated, once)
    close(jax.jit(in_loop)(direction), expected)


@pytest.mark.parametrize(
    ("shapes", "strides", "options"),
    [
        (((2, 5, 5, 4), (3, 3, 2, 4)), (1, 1), {"feature_group_count": 2}),
        (((2, 5, 5, 2), (2, 2, 2, 3)), (1, 1), {"rhs_dilation": (2, 2)}),
        (((2, 5, 5, 2), (2, 2, 2, 3)), (1, 1), {"lhs_dilation": (1, 2), "padding": ((0, 0), (1, 0))}),
        (((2, 7, 3), (3, 3, 2)), (1,), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
        (((2, 3, 5, 5), (4, 3, 2, 2)), (1, 1), {"dimension_numbers": None}),
        (((2, 5, 5, 2), (2, 2, 2, 3)), (1, 1), {"preferred_element_type": "float32"}),
        (((2, 5, 6, 2), (2, 2, 2, 3)), (1, 2), {"padding": ((-1, 0), (1, -2))}),
        (((2, 5, 6, 2), (1, 1, 2, 3)), (2, 2), {"padding": ((-1, -1), (0, 0))}),
        (((2, 3, 3, 2), (5, 5, 2, 3)), (1, 1), {}),
        (((2, 3, 6, 2), (5, 2, 2, 3)), (2, 1), {}),
        (((2, 3, 3, 2), (2, 2, 2, 0)), (1, 1), {}),
    ],
    ids=[
        *("groups", "kernel dilation", "image dilation", "one dimension", "layout of JAX", "element type"),
        *("negative padding", "1x1, negative padding", "large kernel", "high kernel", "no channels"),
    ],
)
def test_other_convolutions_are_handed_to_jax(shapes, strides, options):
    operands, tangents = arrays(*shapes), arrays(*shapes, seed=1)
    options = {"window_strides": strides, "padding": "VALID", "dimension_numbers": LAYOUT, **options}

    def everything(conv):
        one = functools.partial(conv, **options)
        outputs, pull_back = jax.vjp(one, *operands)
        pairs = [jnp.stack(pair) for pair in zip(operands, tangents, strict=True)]
        return jax.jvp(one, operands, tangents), pull_back(outputs), jax.vmap(one)(*pairs)

    ours, theirs = everything(convolve), everything(lax.conv_general_dilated)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs)


def test_half_precision_keeps_its_type():
    images, kernel = (x.astype(jnp.bfloat16) for x in arrays((9, 4, 4, 3), (3, 3, 3, 2)))
    conv = lambda x, k: convolve(x, k, (1, 1), "SAME", dimension_numbers=LAYOUT)
    outputs, pull_back = jax.vjp(conv, images, kernel)
    assert {x.dtype for x in (outputs, *pull_back(outputs))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("kernel", "dtype", "error"),
    [((3, 3, 4, 2), "float32", ValueError), ((3, 3, 3, 2), "float16", TypeError)],
    ids=["channels", "types"],
)
def test_errors_are_those_of_jax(kernel, dtype, error):
    with pytest.raises(error, match="conv_general_dilated"):
        convolve(jnp.zeros((1, 4, 4, 3)), jnp.zeros(kernel, dtype), (1, 1), "SAME", dimension_numbers=LAYOUT)


def test_programs_for_gpus_hold_the_convolutions_of_jax_alone():
    """No transposed copies, no loops, no padding: for every derivative what `lax` gives."""
    images, kernel = arrays((16, 4, 4, 3), (3, 3, 3, 2))

    def program(conv):
        loss = lambda x, k: jnp.sum(conv(x, k, (2, 2), "SAME", dimension_numbers=LAYOUT) ** 2)
        text = export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=["cuda"])(
            images, kernel
        ).mlir_module()
        names = ("convolution", "transpose", "while", "pad ", "concatenate", "reverse")
        return {name: text.count(f"stablehlo.{name}") for name in names}

    assert program(convolve) == program(lax.conv_general_dilated)
