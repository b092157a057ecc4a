"""Tasks of classifying natural images: the networks and data of the paper's experiments."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mlhf_optax.losses import SoftmaxCrossEntropy
from mlhf_optax.tasks.cifar10 import cifar10
from mlhf_optax.tasks.image_augmentation import augment_batch, network_input
from mlhf_optax.tasks.models import ConvNet, Convolution
from mlhf_optax.tasks.resnet import ResNet, batch_statistics, mini_resnet
from mlhf_optax.tasks.task import Task, no_augmentation

_STATISTICS_SAMPLE = 1024  # training examples from which statistics for evaluation are taken


def cifar10_convnet(
    channels: Sequence[int] = (32, 64),
    hidden: Sequence[int] = (32,),
    batch_size: int = 128,
    meta_batch_size: int = 64,
    augment: bool = True,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    convolution: Convolution | None = None,
) -> Task:
    """Returns the task of the paper's section 4.1: CUDA-convnet on CIFAR-10.

    Args:
      channels: output channels of the 5x5 convolutions; ``(8, 16)`` with ``hidden=(16,)`` is a narrow
        network that is cheap to meta-train on.
      hidden: widths of the dense layers before the last one.
      batch_size: examples a mini-batch when networks are trained.
      meta_batch_size: examples a mini-batch in meta-training.
      augment: crop and mirror training images at random.
      data_dir: where CIFAR-10 lies (:func:`mlhf_optax.tasks.cifar10.cifar10`).
      cache_dir: where its decoded arrays are kept.
      convolution: see :class:`mlhf_optax.tasks.models.ConvNet`.

    Returns:
      The task. Variants carry what differs in their name, as in ``"cifar10-convnet-8-16-dense-16"``.

    Raises:
      TypeError: if ``channels`` is a number.
      ValueError: for a width below one.

    Example:
      >>> cifar10_convnet(channels=(8, 16), hidden=(16,)).name
      'cifar10-convnet-8-16-dense-16'
    """
    if isinstance(channels, int):
        raise TypeError(f"`channels` must be one number a convolution, such as (8, 16), got {channels}")
    channels, hidden = tuple(channels), tuple(hidden)
    name = "cifar10-convnet"
    if channels != (32, 64):
        name += _dashed(channels)
    if hidden != (32,):
        name += "-dense" + _dashed(hidden)
    widths = f"5x5 convolutions {_listed(channels)}, dense {_listed((*hidden, 10))}"
    return image_task(
        name,
        f"CIFAR-10 (32x32, 10 classes), {widths}",
        ConvNet(channels, hidden, convolution=convolution),
        image_shape=(32, 32, 3),
        load_data=functools.partial(cifar10, data_dir, cache_dir),
        num_classes=10,
        batch_size=batch_size,
        meta_batch_size=meta_batch_size,
        augment=augment,
        pad=4,
        pretrained="cifar10",
    )


def cifar10_resnet9(
    channels: int = 16,
    batch_size: int = 128,
    meta_batch_size: int = 128,
    augment: bool = True,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Task:
    """Returns the task of the paper's section 4.4: the mini ResNet v2 of 9 blocks on CIFAR-10.

    Args:
      channels: channels of the first three blocks; the others have two and four times as many.
      batch_size: examples a mini-batch when networks are trained.
      meta_batch_size: examples a mini-batch in meta-training.
      augment: crop and mirror training images at random.
      data_dir: where CIFAR-10 lies (:func:`mlhf_optax.tasks.cifar10.cifar10`).
      cache_dir: where its decoded arrays are kept.

    Returns:
      The task.

    Raises:
      TypeError: if ``channels`` is not a number.
      ValueError: if it is below one.

    Example:
      >>> cifar10_resnet9(channels=4).name
      'cifar10-resnet9-4'
    """
    if not isinstance(channels, int):
        raise TypeError(f"`channels` must be one number, those of the first blocks, got {channels!r}")
    widths = ", ".join(f"3x{width * channels}" for width in (1, 2, 4))
    return image_task(
        "cifar10-resnet9" if channels == 16 else f"cifar10-resnet9-{channels}",
        f"CIFAR-10 (32x32, 10 classes), ResNet v2 of 9 blocks of {widths} channels",
        mini_resnet(10, channels),
        image_shape=(32, 32, 3),
        load_data=functools.partial(cifar10, data_dir, cache_dir),
        num_classes=10,
        batch_size=batch_size,
        meta_batch_size=meta_batch_size,
        augment=augment,
        pad=4,
        pretrained="cifar10_resnet",
    )


def image_task(
    name: str,
    description: str,
    model: ConvNet | ResNet,
    *,
    image_shape: tuple[int, int, int],
    augment: bool,
    pad: int,
    **fields: Any,
) -> Task:
    """Returns a task of classifying images that are 8-bit arrays in the data.

    Args:
      name: of the task.
      description: of the task.
      model: the network.
      image_shape: height, width and channels.
      augment: crop and mirror training images at random.
      pad: how far crops move (:func:`mlhf_optax.tasks.image_augmentation.augment_images`).
      **fields: other fields of :class:`mlhf_optax.tasks.task.Task`.

    Returns:
      The task.

    Example:
      See :func:`cifar10_convnet`.
    """
    has_state = isinstance(model, ResNet)
    return Task(
        name=name,
        description=description,
        init_fn=lambda key: model.init(key, jnp.zeros((1, *image_shape)))["params"],
        predict_fn=_resnet_predict_fn(model) if has_state else _predict_fn(model),
        loss_fn=SoftmaxCrossEntropy(),
        sequential_on_cpu=True,
        augment_fn=functools.partial(augment_batch, pad=pad) if augment else no_augmentation,
        model_state_fn=_statistics_fn(model) if has_state else None,
        **fields,
    )


def _predict_fn(model: ConvNet):
    def predict_fn(params: Any, batch: Any) -> jax.Array:
        return model.apply({"params": params}, network_input(batch["image"]))  # type: ignore[return-value]

    return predict_fn


def _resnet_predict_fn(model: ResNet):
    """Normalises by ``batch["model_state"]`` where there is one, otherwise by the batch itself."""

    def predict_fn(params: Any, batch: Any) -> Any:
        images, variables = network_input(batch["image"]), {"params": params}
        if "model_state" in batch:
            variables["batch_stats"] = batch["model_state"]
            return model.apply(variables, images, use_running_average=True)
        return model.apply(variables, images, mutable=["batch_stats"])[0]

    return predict_fn


def _statistics_fn(model: ResNet):
    def model_state_fn(params: Any, examples: Any) -> Any:
        return batch_statistics(model, params, network_input(examples["image"][:_STATISTICS_SAMPLE]))

    return model_state_fn


def _dashed(widths: Sequence[int]) -> str:
    return "".join(f"-{width}" for width in widths)


def _listed(widths: Sequence[int]) -> str:
    return " and ".join(str(width) for width in widths)


__all__ = ["cifar10_convnet", "cifar10_resnet9", "image_task"]
