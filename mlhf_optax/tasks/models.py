"""Flax networks of the tasks. Each maps images (B, height, width, channels) to logits (B, C).

Residual networks are in :mod:`mlhf_optax.tasks.resnet`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlhf_optax.support.checks import FROM_ONE, check_choice, check_each, check_fields, require
from mlhf_optax.tasks.convolution import convolve

Convolution = Callable[..., jax.Array]  # called like jax.lax.conv_general_dilated

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]]
ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": nn.tanh, "gelu": nn.gelu, "elu": nn.elu}


class MLP(nn.Module):
    """Dense layers with one activation between them; images are flattened.

    Attributes:
      hidden: width of every hidden layer; may be empty.
      num_outputs: number of outputs C.
      activation: a key of :data:`ACTIVATIONS`, such as ``"relu"``.

    Raises:
      ValueError: for an unknown ``activation`` or a width below one.

    Example:
      >>> params = MLP(hidden=(32,)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      2410
    """

    hidden: tuple[int, ...] = (32,)
    num_outputs: int = 10
    activation: str = "relu"

    def __post_init__(self):
        check_choice("activation", self.activation, ACTIVATIONS)
        check_each("hidden", self.hidden, FROM_ONE)
        check_fields(self, FROM_ONE, "num_outputs")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits of shape (B, C) for images of any shape (B, ...)."""
        x = images.reshape(images.shape[0], -1)
        for width in self.hidden:
            x = ACTIVATIONS[self.activation](nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)


class ConvNet(nn.Module):
    """Convolutions, each followed by 2x2 max pooling and ReLU, then dense layers with ReLU between.

    The default is the CUDA-convnet variant of the paper: 185,130 parameters for images of 32x32x3 and
    10 classes (the paper says 186 thousand). ``ConvNet(channels=(64, 64), hidden=(384, 192))`` is the
    larger network of its authors' code, 1,756,426 parameters.

    Attributes:
      channels: output channels of every convolution; height and width of the images are halved as often.
      hidden: widths of the dense layers before the last one.
      num_outputs: number of outputs C.
      convolution: called in place of ``jax.lax.conv_general_dilated``;
        :func:`mlhf_optax.tasks.convolution.convolve`, which is fast in loops on CPUs, if None.
      kernel_size: height and width of the kernels.

    Raises:
      ValueError: for a width or kernel size below one.

    Example:
      >>> params = ConvNet().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      185130

    Source: paper, section 4.1.
    """

    channels: tuple[int, ...] = (32, 64)
    hidden: tuple[int, ...] = (32,)
    num_outputs: int = 10
    convolution: Convolution | None = None
    kernel_size: int = 5

    def __post_init__(self):
        check_each("channels", self.channels, FROM_ONE)
        check_each("hidden", self.hidden, FROM_ONE)
        check_fields(self, FROM_ONE, "num_outputs", "kernel_size")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits of shape (B, C) for images of shape (B, height, width, channels)."""
        x, kernel = images, (self.kernel_size, self.kernel_size)
        for channels in self.channels:
            x = nn.Conv(channels, kernel, conv_general_dilated=self.convolution or convolve)(x)
            x = nn.relu(max_pool(x))  # the same as pooling after ReLU, at a quarter of its cost
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)


def max_pool(images: jax.Array, window: int = 2) -> jax.Array:
    """Takes the maximum over non-overlapping square windows of images of shape (B, height, width, C).

    It is a reshape and a maximum over the window axes. The derivative of the usual ``reduce_window`` repeats
    the search for the maximum in every GGN product, which made a whole step 2.5 times slower.
    """
    batch, height, width, channels = images.shape
    fits = height % window == 0 == width % window
    require(fits, "window", f"a divisor of height and width, {height}x{width}", window)
    windows = images.reshape(batch, height // window, window, width // window, window, channels)
    return jnp.max(windows, axis=(2, 4))
