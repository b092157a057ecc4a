"""What a task is: a network, a loss and data."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict

import chex
import jax.numpy as jnp
from flax import linen as nn

from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.losses import SoftmaxCrossEntropy
from mlhf_optax.tasks.augmentation import augment_batch, network_input
from mlhf_optax.tasks.data import Dataset, check_batch_fits, num_examples, sample_batches
from mlhf_optax.tasks.resnet import ResNet, batch_statistics

AugmentFn = Callable[[chex.PRNGKey, Any], Any]  # augment_fn(key, batch) -> batch

_STATISTICS_SAMPLE = 1024  # training examples from which statistics for evaluation are taken


def no_augmentation(key: chex.PRNGKey, batch: Any) -> Any:
    """Returns the batch as it is."""
    del key
    return batch


@dataclasses.dataclass(frozen=True)
class Task:
    """A network to train, its loss and its data.

    Attributes:
      name: short name, such as ``"digits-mlp"``.
      init_fn: ``init_fn(key) -> params``.
      predict_fn: ``predict_fn(params, batch) -> outputs``, logits of shape (B, num_classes) for classes.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, nats per example.
      load_data: returns the data; called when :attr:`data` is first looked at.
      description: one line for people.
      num_classes: number of classes; None for what has no accuracy, such as regression.
      batch_size: examples per mini-batch when networks are trained.
      meta_batch_size: the same when optimizers are meta-trained; the number of all examples for a problem
        without noise.
      curvature_batch_size: share of a mini-batch for curvature in meta-training; None leaves it to the
        optimizer.
      pretrained: name of the shipped meta-parameters recommended for this task.
      augment_fn: ``augment_fn(key, batch) -> batch``, applied to every mini-batch that is trained on, in
        comparisons as in meta-training, and never in evaluation. The batch has any leading axes, such as
        (num_tasks, T + 1, B), in the place of N. It can be used under ``jit``.
      model_state_fn: for networks with batch normalisation, ``model_state_fn(params, examples) ->
        model_state``: what ``predict_fn`` normalises by in evaluation. It reaches ``predict_fn`` as
        ``batch["model_state"]``; without that entry, as in training, ``predict_fn`` normalises by the
        batch itself. None for other networks.
    """

    name: str
    init_fn: Callable[[chex.PRNGKey], chex.ArrayTree]
    predict_fn: PredictFn
    loss_fn: LossFn
    load_data: Callable[[], Dataset]
    description: str = ""
    num_classes: int | None = None
    batch_size: int = 128
    meta_batch_size: int = 64
    curvature_batch_size: float | None = None
    pretrained: str = "digits"
    augment_fn: AugmentFn = no_augmentation
    model_state_fn: Callable[[Any, Any], Any] | None = None

    @functools.cached_property
    def data(self) -> Dataset:
        """The parts ``meta_train``, ``train`` and ``test``; loaded on first use, then kept."""
        return self.load_data()

    def draw(self, key: chex.PRNGKey, shape: tuple[int, ...]) -> chex.ArrayTree:
        """Returns batches for meta-training, not augmented; leaves ``(*shape, meta_batch_size, ...)``."""
        return sample_batches(self.data.meta_train, key, (*shape, self.meta_batch_size))

    @property
    def chance_loss(self) -> float:
        """Loss of equal probabilities for all classes, in nats: where a stuck training stays; NaN without."""
        return math.nan if self.num_classes is None else math.log(self.num_classes)


def check_batch_size(task: Task, part: Literal["train", "meta_train"] = "train") -> None:
    """Raises a ValueError if ``batch_size`` (or ``meta_batch_size``) is below one or larger than its part.

    To be called before anything of the size of a batch is allocated. Loads the data.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> check_batch_size(get_task("digits-mlp", batch_size=1000))
      Traceback (most recent call last):
      ValueError: `batch_size` must be between 1 and the number of training examples ... 719, got 1000; ...
    """
    prefix, kind = {"train": ("", "training"), "meta_train": ("meta_", "meta-training")}[part]
    argument, available = f"{prefix}batch_size", num_examples(getattr(task.data, part))
    check_batch_fits(getattr(task, argument), available, argument, f"{kind} examples of {task.name!r}")


def image_task(
    name: str,
    description: str,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    augment: bool = False,
    pad: int = 0,
    **fields: Any,
) -> Task:
    """Returns a task of classifying images.

    Args:
      name: of the task.
      description: of the task.
      model: the network. A :class:`mlhf_optax.tasks.ResNet` is evaluated by statistics of the training
        part.
      image_shape: height, width and channels. 8-bit images are standardised for the network.
      augment: crop and mirror training images at random.
      pad: how far crops move (:func:`mlhf_optax.tasks.augment_images`).
      **fields: other fields of :class:`Task`.

    Example:
      >>> import jax
      >>> from mlhf_optax.tasks import MLP, load_digits
      >>> task = image_task("digits", "", MLP((8,)), (8, 8, 1), load_data=load_digits, num_classes=10)
      >>> task.predict_fn(task.init_fn(jax.random.key(0)), task.data.test).shape
      (359, 10)
    """
    is_resnet = isinstance(model, ResNet)

    def predict_fn(params: Any, batch: Any) -> Any:
        images, variables = network_input(batch["image"]), {"params": params}
        if not is_resnet:
            return model.apply(variables, images)
        if "model_state" in batch:
            variables["batch_stats"] = batch["model_state"]
            return model.apply(variables, images, use_running_average=True)
        return model.apply(variables, images, mutable=["batch_stats"])[0]

    def model_state_fn(params: Any, examples: Any) -> Any:
        assert isinstance(model, ResNet)
        return batch_statistics(model, params, network_input(examples["image"][:_STATISTICS_SAMPLE]))

    return Task(
        name=name,
        description=description,
        init_fn=lambda key: model.init(key, jnp.zeros((1, *image_shape)))["params"],
        predict_fn=predict_fn,
        loss_fn=SoftmaxCrossEntropy(),
        augment_fn=functools.partial(augment_batch, pad=pad) if augment else no_augmentation,
        model_state_fn=model_state_fn if is_resnet else None,
        **fields,
    )


class FileOptions(TypedDict, total=False):
    """Options of every task whose data lie in files."""

    batch_size: int
    """Examples per mini-batch when networks are trained."""
    meta_batch_size: int
    """Examples per mini-batch in meta-training."""
    augment: bool
    """Crop and mirror training images at random; True by default."""
    data_dir: str | Path | None
    """Where the data lie; see the function that loads them."""
    cache_dir: str | Path | None
    """Where decoded images are kept."""


def file_task(
    name: str,
    description: str,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    load: Callable[..., Dataset],
    options: FileOptions,
    **fields: Any,
) -> Task:
    """Returns an :func:`image_task` whose data come from ``load(data_dir, cache_dir)``."""
    given = {"augment": True, "data_dir": None, "cache_dir": None, **options}
    load_data = functools.partial(load, given.pop("data_dir"), given.pop("cache_dir"))
    return image_task(name, description, model, image_shape, load_data=load_data, **given, **fields)
