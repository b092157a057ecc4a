"""The ready tasks: a network, a loss and data, under a name.

A task is what an optimizer is meta-trained or compared on. Registered under its name in
:data:`TASKS` is a function that builds it, whose arguments are the variants of the task (widths,
an activation, where the data lies); :func:`get_task` calls it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax.numpy as jnp
from flax import linen as nn

from mlhf_optax.losses import SoftmaxCrossEntropy
from mlhf_optax.tasks import datasets, models
from mlhf_optax.tasks.image_tasks import cifar10_convnet, cifar10_resnet9
from mlhf_optax.tasks.imagenet_tasks import imagenet_resnet18, tiny_imagenet_resnet18
from mlhf_optax.tasks.task import Task


def digits_mlp(
    hidden: Sequence[int] = (32,), activation: str = "relu", batch_size: int = 128, meta_batch_size: int = 128
) -> Task:
    """Returns the task of classifying 8x8 handwritten digits with dense layers.

    Args:
      hidden: width of every hidden layer.
      activation: ``"relu"``, ``"sigmoid"`` or ``"tanh"``.
      batch_size: examples a mini-batch when networks are trained.
      meta_batch_size: examples a mini-batch in meta-training.

    Returns:
      The task. Variants carry what differs in their name, as in ``"digits-mlp-16-16-tanh"``.

    Raises:
      ValueError: for an unknown ``activation`` or a width below one.

    Example:
      >>> digits_mlp(hidden=(16, 16), activation="tanh").name
      'digits-mlp-16-16-tanh'
    """
    hidden = tuple(hidden)
    name = "digits-mlp"
    if hidden != (32,):
        name += "".join(f"-{width}" for width in hidden) or "-linear"
    if activation != "relu":
        name += f"-{activation}"
    widths = "-".join(str(width) for width in (64, *hidden, 10))
    description = f"handwritten digits (8x8, 10 classes), dense layers {widths}, {activation}"
    model = models.MLP(hidden, activation=activation)
    return _digits_task(name, description, model, batch_size, meta_batch_size)


def digits_convnet(batch_size: int = 128, meta_batch_size: int = 128) -> Task:
    """Returns the task of classifying 8x8 handwritten digits with a small convolutional network.

    Args:
      batch_size: examples a mini-batch when networks are trained.
      meta_batch_size: examples a mini-batch in meta-training.

    Returns:
      The task.

    Example:
      >>> digits_convnet().num_classes
      10
    """
    description = "handwritten digits (8x8, 10 classes), 3x3 convolutions 8 and 16, dense 32 and 10"
    task = _digits_task("digits-convnet", description, models.DigitsConvNet(), batch_size, meta_batch_size)
    return dataclasses.replace(task, sequential_on_cpu=True, pretrained="digits_convnet")


TASKS: dict[str, Callable[..., Task]] = {
    "digits-mlp": digits_mlp,
    "digits-convnet": digits_convnet,
    "cifar10-convnet": cifar10_convnet,
    "cifar10-resnet9": cifar10_resnet9,
    "imagenet-resnet18": imagenet_resnet18,
    "tiny-imagenet-resnet18": tiny_imagenet_resnet18,
}


def get_task(name: str, **options) -> Task:
    """Builds a task by name.

    Args:
      name: a key of :data:`TASKS`.
      **options: arguments of the function registered there, such as ``hidden=(16,)`` for ``"digits-mlp"``.

    Returns:
      The task; its data are not loaded yet.

    Raises:
      ValueError: if there is no such task.
      TypeError: if the task has no such option.

    Example:
      >>> get_task("digits-mlp", batch_size=32).batch_size
      32
    """
    if name not in TASKS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, TASKS))}, got {name!r}")
    known = list(inspect.signature(TASKS[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"the task {name!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
        )
    return TASKS[name](**options)


def _digits_task(
    name: str, description: str, model: nn.Module, batch_size: int, meta_batch_size: int
) -> Task:
    def init_fn(key: chex.PRNGKey) -> chex.ArrayTree:
        return model.init(key, jnp.zeros((1, 8, 8, 1)))["params"]

    def predict_fn(params: Any, batch: Any) -> Any:
        return model.apply({"params": params}, batch["image"])

    return Task(
        name=name,
        description=description,
        init_fn=init_fn,
        predict_fn=predict_fn,
        loss_fn=SoftmaxCrossEntropy(),
        load_data=datasets.digits,
        num_classes=10,
        batch_size=batch_size,
        meta_batch_size=meta_batch_size,
    )


__all__ = ["TASKS", "Task", "digits_convnet", "digits_mlp", "get_task"]
