"""The networks, against NumPy and against Flax's own layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from mlhf_optax import layer_types
from mlhf_optax.tasks.models import ACTIVATIONS, MLP, ConvNet, DigitsConvNet, max_pool

NUMPY_ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_dense_layers_with_the_activation_between(activation, x64):
    model = MLP(hidden=(5, 4), num_outputs=3, activation=activation)
    images = jax.random.normal(jax.random.key(1), (2, 3, 2, 1))
    params = model.init(jax.random.key(0), images)["params"]
    x = np.asarray(images).reshape(2, 6)
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        x = x @ np.asarray(params[layer]["kernel"]) + np.asarray(params[layer]["bias"])
        x = NUMPY_ACTIVATIONS[activation](x) if layer != "Dense_2" else x
    np.testing.assert_allclose(model.apply({"params": params}, images), x, rtol=1e-6)


@pytest.mark.parametrize("options", [{"hidden": (0,)}, {"num_outputs": 0}])
def test_mlp_widths_must_be_positive(options):
    with pytest.raises(ValueError, match="`hidden` and `num_outputs` must be at least 1"):
        MLP(**options)


def test_mlp_activation_must_be_known():
    with pytest.raises(
        ValueError, match=r"`activation` must be one of \['relu', 'sigmoid', 'tanh'\], got 'gelu'"
    ):
        MLP(activation="gelu")


def test_convnet_has_layers_that_mlhf_knows():
    params = jax.eval_shape(DigitsConvNet().init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    assert layer_types(params) == {
        "Conv_0": {"kernel": "conv_kernel", "bias": "conv_bias"},
        "Conv_1": {"kernel": "conv_kernel", "bias": "conv_bias"},
        "Dense_0": {"kernel": "dense_kernel", "bias": "dense_bias"},
        "Dense_1": {"kernel": "dense_kernel", "bias": "dense_bias"},
    }


class PlainConvNet(nn.Module):
    """What DigitsConvNet computes, from Flax's own convolution and pooling."""

    @nn.compact
    def __call__(self, x):
        for channels in (8, 16):
            x = nn.max_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def test_convnet_computes_what_plain_flax_layers_do(x64):
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1), jnp.float64)
    params = jax.jit(DigitsConvNet().init)(jax.random.key(0), images)["params"]

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradient(model):
        outputs, pull_back = jax.vjp(lambda p: model.apply({"params": p}, images), params)
        return outputs, pull_back(jnp.cos(outputs))[0]

    ours, plain = outputs_and_gradient(DigitsConvNet()), outputs_and_gradient(PlainConvNet())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, plain)


def size(model, shape):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 185_130),
        ({"channels": (64, 64), "hidden": (384, 192)}, 1_756_426),
        ({"channels": (8, 16), "hidden": (16,)}, 20_394),
    ],
)
def test_sizes_of_the_convnets(options, expected):
    assert size(ConvNet(**options), (1, 32, 32, 3)) == expected


class PlainCifarNet(nn.Module):
    """What ConvNet computes, in the usual order: convolution, ReLU, pooling."""

    @nn.compact
    def __call__(self, x):
        for channels in (3, 4):
            x = nn.max_pool(nn.relu(nn.Conv(channels, (5, 5))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(5)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


@pytest.mark.parametrize("convolution", [None, lax.conv_general_dilated])
def test_pooling_before_relu_and_another_convolution_change_nothing(convolution, x64):
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 2), jnp.float64)
    model = ConvNet(channels=(3, 4), hidden=(5,), convolution=convolution)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradient(model):
        outputs, pull_back = jax.vjp(lambda p: model.apply({"params": p}, images), params)
        return outputs, pull_back(jnp.cos(outputs))[0]

    ours, plain = outputs_and_gradient(model), outputs_and_gradient(PlainCifarNet())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, plain)


@pytest.mark.parametrize("options", [{"channels": (0,)}, {"hidden": (-1,)}, {"num_outputs": 0}])
def test_convnet_widths_must_be_positive(options):
    with pytest.raises(ValueError, match="`channels`, `hidden` and `num_outputs` must be at least 1"):
        ConvNet(**options)


def test_max_pool_is_reduce_window(x64):
    images = jax.random.normal(jax.random.key(0), (2, 6, 9, 4))
    expected = lax.reduce_window(images, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 3, 3, 1), "VALID")
    np.testing.assert_array_equal(max_pool(images, 3), expected)


def test_max_pool_needs_whole_windows():
    with pytest.raises(ValueError, match="`window` must divide height and width, got 2 for images of 5x4"):
        max_pool(jnp.zeros((1, 5, 4, 1)))
