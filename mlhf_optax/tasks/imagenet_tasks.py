"""Tasks of classifying ImageNet, and Tiny-ImageNet in its place, with ResNet-18 v2."""

import functools
from pathlib import Path

from mlhf_optax.tasks.image_tasks import image_task
from mlhf_optax.tasks.imagenet import imagenet
from mlhf_optax.tasks.resnet import Stem, resnet18
from mlhf_optax.tasks.task import Task
from mlhf_optax.tasks.tiny_imagenet import tiny_imagenet


def imagenet_resnet18(
    channels: int = 64,
    stem: Stem = "imagenet",
    image_size: int = 224,
    batch_size: int = 64,
    meta_batch_size: int = 64,
    augment: bool = True,
    num_workers: int = 8,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Task:
    """Returns the task that the paper's section 4.4 carries MLHF over to: ResNet-18 v2 on ImageNet.

    The training part is streamed, cut out at random by worker processes.

    Args:
      channels: channels of the first stage; they double three times.
      stem: see :class:`mlhf_optax.tasks.resnet.ResNet`.
      image_size: height and width of the images that the network sees.
      batch_size: examples a mini-batch when networks are trained.
      meta_batch_size: examples a mini-batch in meta-training.
      augment: mirror training images at random.
      num_workers: processes that read and decode.
      data_dir: where ImageNet lies (:func:`mlhf_optax.tasks.imagenet.imagenet`).
      cache_dir: where the decoded images that are held in memory are kept.

    Returns:
      The task.

    Raises:
      ValueError: if a number is below one.

    Example:
      >>> imagenet_resnet18().num_classes
      1000
    """
    name = _named("imagenet-resnet18", channels, 64, stem, "imagenet")
    load = functools.partial(imagenet, data_dir, cache_dir, image_size=image_size, num_workers=num_workers)
    return image_task(
        name if image_size == 224 else f"{name}-{image_size}px",
        f"ImageNet ({image_size}x{image_size}, 1000 classes), ResNet-18 v2 from {channels} channels",
        resnet18(1000, stem, channels),
        image_shape=(image_size, image_size, 3),
        load_data=load,
        num_classes=1000,
        batch_size=batch_size,
        meta_batch_size=meta_batch_size,
        augment=augment,
        pad=0,
        pretrained="cifar10_resnet",
    )


def tiny_imagenet_resnet18(
    channels: int = 64,
    stem: Stem = "small",
    num_classes: int = 100,
    batch_size: int = 64,
    meta_batch_size: int = 64,
    augment: bool = True,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Task:
    """Returns the stand-in for ``imagenet-resnet18``: ResNet-18 v2 on Tiny-ImageNet.

    Args:
      channels: channels of the first stage; they double three times.
      stem: see :class:`mlhf_optax.tasks.resnet.ResNet`; ``"imagenet"`` costs a tenth and is less accurate.
      num_classes: classes in the file.
      batch_size: examples a mini-batch when networks are trained.
      meta_batch_size: examples a mini-batch in meta-training.
      augment: crop and mirror training images at random.
      data_dir: where Tiny-ImageNet lies (:func:`mlhf_optax.tasks.tiny_imagenet.tiny_imagenet`).
      cache_dir: where its decoded arrays are kept.

    Returns:
      The task.

    Raises:
      ValueError: if a number is below one.

    Example:
      >>> tiny_imagenet_resnet18(channels=8).name
      'tiny-imagenet-resnet18-8'
    """
    name = _named("tiny-imagenet-resnet18", channels, 64, stem, "small")
    return image_task(
        name,
        f"Tiny-ImageNet (64x64, {num_classes} classes), ResNet-18 v2 from {channels} channels",
        resnet18(num_classes, stem, channels),
        image_shape=(64, 64, 3),
        load_data=functools.partial(tiny_imagenet, data_dir, cache_dir, num_classes),
        num_classes=num_classes,
        batch_size=batch_size,
        meta_batch_size=meta_batch_size,
        augment=augment,
        pad=8,
        pretrained="cifar10_resnet",
    )


def _named(name: str, channels: int, usual_channels: int, stem: str, usual_stem: str) -> str:
    """Adds to a name what is not as usual."""
    name += "" if channels == usual_channels else f"-{channels}"
    return name if stem == usual_stem else f"{name}-{stem}-stem"


__all__ = ["imagenet_resnet18", "tiny_imagenet_resnet18"]
