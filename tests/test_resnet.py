"""Residual networks against NumPy, and their statistics in training and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mlhf_optax import layer_types
from mlhf_optax.tasks import ResNet, batch_statistics, mini_resnet, resnet18
from mlhf_optax.tasks.resnet import overlapping_max_pool

pytestmark = pytest.mark.usefixtures("unoptimised")

SMALL = ResNet(stages=((1, 2), (1, 4)), num_outputs=3)


def init(model=SMALL, seed=0, shape=(1, 8, 8, 3)):
    """Random parameters, also where networks start with zeros or ones, so that every one counts."""
    params = jax.eval_shape(model.init, jax.random.key(seed), jnp.zeros(shape))["params"]
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape)) for leaf in leaves])


def images(count=6, seed=1, dtype=None):
    return jax.random.normal(jax.random.key(seed), (count, 8, 8, 3), dtype)


def train_outputs(model, params, x):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["batch_stats"])[0])(params, x)


def numpy_conv(x, kernel, stride=1):
    """Convolution with zeros around it, the smaller pad first, window by window."""
    side = kernel.shape[0]
    out = -(-x.shape[1] // stride)
    pad = max((out - 1) * stride + side - x.shape[1], 0)
    x = np.pad(x, ((0, 0), *[(pad // 2, pad - pad // 2)] * 2, (0, 0)))
    result = np.empty((len(x), out, out, kernel.shape[-1]))
    for i in range(out):
        for j in range(out):
            window = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
            result[:, i, j] = np.tensordot(window, kernel, axes=3)
    return result


def numpy_norm(x, params):
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return np.maximum((x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"], 0)


def numpy_block(x, params, stride):
    shortcut, x = x, numpy_norm(x, params["BatchNorm_0"])
    if "projection" in params:
        shortcut = numpy_conv(x, params["projection"]["kernel"], stride)
    x = numpy_norm(numpy_conv(x, params["Conv_0"]["kernel"], stride), params["BatchNorm_1"])
    return shortcut + numpy_conv(x, params["Conv_1"]["kernel"])


@pytest.mark.parametrize("convolution", [None, jax.lax.conv_general_dilated])
def test_outputs_are_those_of_numpy(convolution, x64):
    params = jax.tree.map(np.asarray, init())
    x = images(dtype=jnp.float64)
    expected = numpy_conv(np.asarray(x), params["stem"]["kernel"])
    expected = numpy_block(expected, params["BasicBlock_0"], 1)
    expected = numpy_norm(numpy_block(expected, params["BasicBlock_1"], 2), params["BatchNorm_0"])
    expected = expected.mean(axis=(1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    outputs = train_outputs(SMALL.clone(convolution=convolution), params, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-9)


def test_mini_resnet_has_nine_blocks_of_the_papers_channels():
    params = jax.eval_shape(mini_resnet().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    blocks = [params[f"BasicBlock_{index}"] for index in range(9)]
    assert "BasicBlock_9" not in params
    assert [block["Conv_1"]["kernel"].shape[-1] for block in blocks] == [16] * 3 + [32] * 3 + [64] * 3
    assert [index for index, block in enumerate(blocks) if "projection" in block] == [3, 6]


def test_resnet18_has_the_size_counted_by_hand():
    """Stem, blocks of two 3x3 convolutions with norms, projections, end."""
    size, before = 7 * 7 * 3 * 64, 64
    for channels in (64, 128, 256, 512):
        for _ in range(2):
            size += 2 * before + 9 * before * channels + 2 * channels + 9 * channels**2
            size += before * channels if before != channels else 0
            before = channels
    size += 2 * 512 + (512 + 1) * 1000
    params = jax.eval_shape(resnet18().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


@pytest.mark.parametrize(("stem", "side"), [("small", 16), ("imagenet", 4)])
def test_stems_scale_images_down_or_not(stem, side):
    model = ResNet(stages=((1, 2),), stem=stem)
    x = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    run = lambda v: model.apply(v, x, capture_intermediates=True, mutable=["intermediates", "batch_stats"])
    seen = jax.eval_shape(run, variables)[1]["intermediates"]
    assert seen["BasicBlock_0"]["__call__"][0].shape == (2, side, side, 2)


def test_layers_are_of_types_that_mlhf_knows():
    types = layer_types(init())
    assert types["BasicBlock_1"] == {
        "BatchNorm_0": {"scale": "norm_scale", "bias": "norm_bias"},
        "BatchNorm_1": {"scale": "norm_scale", "bias": "norm_bias"},
        "Conv_0": {"kernel": "conv_kernel"},
        "Conv_1": {"kernel": "conv_kernel"},
        "projection": {"kernel": "conv_kernel"},
    }


def test_statistics_of_one_batch_make_evaluation_equal_training(x64):
    params, x = init(), images(dtype=jnp.float64)
    statistics = batch_statistics(SMALL, params, x)
    evaluate = jax.jit(lambda x: SMALL.apply({"params": params, "batch_stats": statistics}, x, True))
    np.testing.assert_allclose(evaluate(x), train_outputs(SMALL, params, x), rtol=1e-9)
    # In evaluation an image is judged alone, whatever is in the batch with it.
    np.testing.assert_allclose(evaluate(x[:1]), evaluate(x)[:1], rtol=1e-9)


def test_statistics_are_averaged_over_whole_batches(x64):
    params, x = init(), images(7, dtype=jnp.float64)
    together = batch_statistics(SMALL, params, x, batch_size=3)
    apart = [batch_statistics(SMALL, params, x[i : i + 3]) for i in (0, 3)]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *apart)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), together, expected)


def test_momentum_averages_over_steps_as_flax_does():
    params, x = init(), images()
    new = jax.jit(lambda p: SMALL.apply({"params": p}, x, mutable=["batch_stats"])[1])(params)
    exact = batch_statistics(SMALL, params, x)
    scaled = lambda tree: {"mean": 0.1 * tree["mean"], "var": 0.1 * tree["var"] + 0.9}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        new["batch_stats"]["BatchNorm_0"],
        scaled(exact["BatchNorm_0"]),
    )


def test_overlapping_max_pool_is_reduce_window(x64):
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    window = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    ours, pull_ours = jax.vjp(overlapping_max_pool, x)
    expected, pull_expected = jax.vjp(window, x)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(pull_ours(jnp.cos(ours))[0], pull_expected(jnp.cos(ours))[0], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "large"}, "`stem` must be one of 'small', 'imagenet', got 'large'"),
        ({"stages": ()}, r"`stages` must be pairs .* got \(\)"),
        ({"stages": ((0, 4),)}, r"`stages` must be pairs .* got \(\(0, 4\),\)"),
        ({"num_outputs": 0}, "`num_outputs` must be at least 1, got 0"),
    ],
)
def test_settings_must_make_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{"stages": ((1, 2),), **options})


@pytest.mark.parametrize(
    ("count", "batch_size", "message"),
    [
        (0, 2, r"`images` must be at least one image, got \(0, 8, 8, 3\)"),
        (2, 0, "`batch_size` must be at least 1"),
    ],
)
def test_statistics_need_images(count, batch_size, message):
    with pytest.raises(ValueError, match=message):
        batch_statistics(SMALL, {}, jnp.zeros((count, 8, 8, 3)), batch_size)
