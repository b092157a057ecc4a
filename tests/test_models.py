"""The networks, against NumPy and against Flax's own layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from mlhf_optax import layer_types
from mlhf_optax.tasks import ACTIVATIONS, MLP, ConvNet
from mlhf_optax.tasks.models import max_pool

NUMPY_ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
SMALL = ConvNet(channels=(3, 4), hidden=(5,))


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


class PlainConvNet(nn.Module):
    """What ConvNet computes, from Flax's own layers in the usual order: convolution, ReLU, pooling."""

    like: ConvNet

    @nn.compact
    def __call__(self, x):
        for channels in self.like.channels:
            x = nn.relu(nn.Conv(channels, (self.like.kernel_size,) * 2)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        for width in self.like.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


@pytest.mark.parametrize(
    "model",
    [SMALL, SMALL.clone(convolution=lax.conv_general_dilated), ConvNet((8, 16), kernel_size=3)],
)
def test_convnet_computes_what_plain_flax_layers_do(model, x64):
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 2), jnp.float64)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    plain = jax.eval_shape(PlainConvNet(model).init, jax.random.key(0), images)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradient(model):
        outputs, pull_back = jax.vjp(lambda p: model.apply({"params": p}, images), params)
        return outputs, pull_back(jnp.cos(outputs))[0]

    ours, plain = outputs_and_gradient(model), outputs_and_gradient(PlainConvNet(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, plain)


def test_convnet_has_layers_that_mlhf_knows():
    params = jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    assert layer_types(params) == {
        "Conv_0": {"kernel": "conv_kernel", "bias": "conv_bias"},
        "Conv_1": {"kernel": "conv_kernel", "bias": "conv_bias"},
        "Dense_0": {"kernel": "dense_kernel", "bias": "dense_bias"},
        "Dense_1": {"kernel": "dense_kernel", "bias": "dense_bias"},
    }


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (MLP, {"hidden": (0,)}, r"`hidden` must be at least 1 throughout, got \(0,\)"),
        (MLP, {"num_outputs": 0}, "`num_outputs` must be at least 1, got 0"),
        (MLP, {"activation": "mish"}, "`activation` must be one of 'relu', .*'gelu', 'elu', got 'mish'"),
        (ConvNet, {"channels": (0,)}, r"`channels` must be at least 1 throughout, got \(0,\)"),
        (ConvNet, {"hidden": (-1,)}, r"`hidden` must be at least 1 throughout, got \(-1,\)"),
        (ConvNet, {"num_outputs": 0}, "`num_outputs` must be at least 1, got 0"),
        (ConvNet, {"kernel_size": 0}, "`kernel_size` must be at least 1, got 0"),
    ],
)
def test_settings_must_make_sense(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_max_pool_is_reduce_window(x64):
    images = jax.random.normal(jax.random.key(0), (2, 6, 9, 4))
    expected = lax.reduce_window(images, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 3, 3, 1), "VALID")
    np.testing.assert_array_equal(max_pool(images, 3), expected)


def test_max_pool_needs_whole_windows():
    with pytest.raises(ValueError, match="`window` must be a divisor of height and width, 5x4, got 2"):
        max_pool(jnp.zeros((1, 5, 4, 1)))
