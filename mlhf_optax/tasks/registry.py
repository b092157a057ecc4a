"""The tasks by name."""

import inspect
from collections.abc import Callable

from mlhf_optax.support.checks import check_choice
from mlhf_optax.tasks.cifar10 import cifar10_convnet, cifar10_resnet9
from mlhf_optax.tasks.digits import digits_convnet, digits_mlp
from mlhf_optax.tasks.mnist import mnist_mlp
from mlhf_optax.tasks.task import FileOptions, Task
from mlhf_optax.tasks.tiny_imagenet import tiny_imagenet_resnet18

TASKS: dict[str, Callable[..., Task]] = {
    "digits-mlp": digits_mlp,
    "digits-convnet": digits_convnet,
    "mnist-mlp": mnist_mlp,
    "cifar10-convnet": cifar10_convnet,
    "cifar10-resnet9": cifar10_resnet9,
    "tiny-imagenet-resnet18": tiny_imagenet_resnet18,
}


def get_task(name: str, **options) -> Task:
    """Builds a task by its name in :data:`TASKS`; its data are not loaded yet.

    ``options`` are arguments of the function registered there, such as ``hidden=(16,)`` for ``"digits-mlp"``.

    Raises:
      ValueError: if there is no such task.
      TypeError: if the task has no such option.

    Example:
      >>> get_task("digits-mlp", batch_size=32).batch_size
      32
    """
    check_choice("name", name, TASKS)
    parameters = inspect.signature(TASKS[name]).parameters
    shared = FileOptions.__annotations__ if "options" in parameters else {}
    known = [*(parameter for parameter in parameters if parameter != "options"), *shared]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(
            f"the task {name!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
        )
    return TASKS[name](**options)
