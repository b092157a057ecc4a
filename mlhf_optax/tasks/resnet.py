"""Residual networks with pre-activation (v2) and batch normalisation.

In training, outputs are normalised by the statistics of the mini-batch itself. So a network is a function
of parameters and mini-batch, which is all that an optimizer sees. For evaluation :func:`batch_statistics`
computes statistics anew at the current parameters. An average over past steps would belong to parameters
that are gone, and would be one more state to carry.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlhf_optax.support.checks import FROM_ONE, check_choice, check_fields, check_number, require
from mlhf_optax.tasks.convolution import convolve
from mlhf_optax.tasks.models import Convolution

Stem = Literal["small", "imagenet"]


class ResNet(nn.Module):
    """ResNet v2 of basic blocks: two 3x3 convolutions, each after batch normalisation and ReLU.

    The first block of every stage but the first halves height and width.

    Attributes:
      stages: number of blocks and channels of every stage.
      num_outputs: number of outputs C.
      stem: ``"small"``, a 3x3 convolution, or ``"imagenet"``, a 7x7 convolution and a 3x3 max pooling,
        both with stride 2.
      convolution: called in place of ``jax.lax.conv_general_dilated``;
        :func:`mlhf_optax.tasks.convolution.convolve`, which is fast in loops on CPUs, if None.
      momentum: weight of the old statistics when those of a mini-batch are collected.

    Raises:
      ValueError: for an unknown ``stem``, no stages, or numbers below one.

    Example:
      >>> model = ResNet(stages=((1, 4), (1, 8)))
      >>> params = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))["params"]
      >>> outputs, new = model.apply({"params": params}, jnp.zeros((2, 8, 8, 3)), mutable=["batch_stats"])
      >>> outputs.shape
      (2, 10)

    Source: He et al., `Identity mappings in deep residual networks <https://arxiv.org/abs/1603.05027>`_,
    2016; paper, section 4.4.
    """

    stages: tuple[tuple[int, int], ...]
    num_outputs: int = 10
    stem: Stem = "small"
    convolution: Convolution | None = None
    momentum: float = 0.9

    def __post_init__(self):
        check_choice("stem", self.stem, get_args(Stem))
        is_fine = self.stages and all(min(stage) >= 1 for stage in self.stages)
        require(is_fine, "stages", "pairs (blocks, channels) of numbers from 1 on", self.stages)
        check_fields(self, FROM_ONE, "num_outputs")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, use_running_average: bool = False) -> jax.Array:
        """Returns logits of shape (B, C) for images of shape (B, height, width, channels).

        With ``use_running_average`` it normalises by the collection ``batch_stats``, not by the mini-batch.
        """
        conv = functools.partial(nn.Conv, use_bias=False, conv_general_dilated=self.convolution or convolve)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=use_running_average, momentum=self.momentum
        )
        channels = self.stages[0][1]
        if self.stem == "imagenet":
            x = overlapping_max_pool(conv(channels, (7, 7), strides=(2, 2), name="stem")(images))
        else:
            x = conv(channels, (3, 3), name="stem")(images)
        for stage, (num_blocks, channels) in enumerate(self.stages):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(channels, stride, conv, norm)(x)
        x = nn.relu(norm()(x))
        return nn.Dense(self.num_outputs)(jnp.mean(x, axis=(1, 2)))


class BasicBlock(nn.Module):
    """Adds to its input, or a 1x1 projection of it, two convolutions, each after norm and ReLU."""

    channels: int
    stride: int  # of the first convolution and of the projection
    conv: Any  # conv(channels, kernel_size, strides=...) -> layer
    norm: Any  # norm() -> layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of shape (B, height / stride, width / stride, channels)."""
        strides = (self.stride, self.stride)
        shortcut, x = x, nn.relu(self.norm()(x))
        if self.stride != 1 or shortcut.shape[-1] != self.channels:
            shortcut = self.conv(self.channels, (1, 1), strides=strides, name="projection")(x)
        x = self.conv(self.channels, (3, 3), strides=strides)(x)
        x = nn.relu(self.norm()(x))
        return shortcut + self.conv(self.channels, (3, 3))(x)


def mini_resnet(num_outputs: int = 10, channels: int = 16) -> ResNet:
    """Returns the paper's mini ResNet for small images: 9 blocks, of once, twice and four times ``channels``.

    Example:
      >>> mini_resnet(channels=4).stages
      ((3, 4), (3, 8), (3, 16))

    Source: paper, section 4.4.
    """
    return ResNet(tuple((3, width * channels) for width in (1, 2, 4)), num_outputs)


def resnet18(num_outputs: int = 1000, stem: Stem = "imagenet", channels: int = 64) -> ResNet:
    """Returns ResNet-18 v2; ``channels`` are those of the first stage, and double three times.

    Example:
      >>> resnet18().stages
      ((2, 64), (2, 128), (2, 256), (2, 512))
    """
    return ResNet(tuple((2, width * channels) for width in (1, 2, 4, 8)), num_outputs, stem)


def batch_statistics(model: ResNet, params: Any, images: jax.Array, batch_size: int = 256) -> Any:
    """Returns the statistics by which batch normalisation normalises in evaluation.

    Args:
      model: the network.
      params: its parameters.
      images: shape (N, height, width, channels): a sample of the training data, as the network sees
        them in training.
      batch_size: images at once; whole batches only are used, or all images if there are fewer.

    Returns:
      The collection ``"batch_stats"`` of the network.

    Raises:
      ValueError: if there are no images or ``batch_size`` is below one.

    Example:
      ``batch_statistics(model, params, images[:1024])``
    """
    check_number("batch_size", batch_size, FROM_ONE)
    require(len(images), "images", "at least one image", images.shape)
    size = min(batch_size, len(images))
    batches = images[: len(images) // size * size].reshape(-1, size, *images.shape[1:])
    exact = model.clone(momentum=0.0)  # what is collected are then the statistics of the batch alone
    statistics = lambda batch: exact.apply({"params": params}, batch, mutable=["batch_stats"])[1]
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(statistics, batches))["batch_stats"]


def overlapping_max_pool(images: jax.Array) -> jax.Array:
    """Takes the maximum over windows of 3x3 at stride 2, padded by one, as in the stem for ImageNet.

    It is the maximum of nine strided copies, whose derivative repeats no search, unlike ``reduce_window``'s.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    copies = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return functools.reduce(jnp.maximum, copies)
