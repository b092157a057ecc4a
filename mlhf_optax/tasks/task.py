"""What a task is: a network, a loss and data."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex

from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.tasks.datasets import Dataset

AugmentFn = Callable[[chex.PRNGKey, Any], Any]  # augment_fn(key, batch) -> batch


def no_augmentation(key: chex.PRNGKey, batch: Any) -> Any:
    """Returns the batch as it is."""
    del key
    return batch


@dataclasses.dataclass(frozen=True)
class Task:
    """A network to train, its loss and its data.

    Attributes:
      name: short name, such as ``"digits-mlp"``.
      description: one line for people.
      init_fn: ``init_fn(key) -> params``.
      predict_fn: ``predict_fn(params, batch) -> outputs``, logits of shape (B, num_classes).
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, nats per example.
      load_data: returns the data; called when :attr:`data` is first looked at.
      num_classes: number of classes.
      batch_size: examples a mini-batch when networks are trained.
      meta_batch_size: the same when optimizers are meta-trained.
      sequential_on_cpu: several trainings are faster one after the other than under ``vmap`` on a CPU, as
        is the case for convolutions.
      pretrained: name of the shipped meta-parameters recommended for this task.
      augment_fn: ``augment_fn(key, batch) -> batch``, applied to every mini-batch that is trained on, in
        comparisons as in meta-training, and never in evaluation. The batch has the leaves of
        ``data.train`` with any leading axes, such as (num_tasks, T + 1, B), in the place of N. It can be
        used under ``jit``.
      model_state_fn: for networks with batch normalisation, ``model_state_fn(params, examples) ->
        model_state``: what ``predict_fn`` is to normalise by in evaluation, from a part of the data.
        It reaches ``predict_fn`` as ``batch["model_state"]``; without that entry, as in training,
        ``predict_fn`` normalises by the batch itself. None for other networks.
    """

    name: str
    description: str
    init_fn: Callable[[chex.PRNGKey], chex.ArrayTree]
    predict_fn: PredictFn
    loss_fn: LossFn
    load_data: Callable[[], Dataset]
    num_classes: int
    batch_size: int = 128
    meta_batch_size: int = 64
    sequential_on_cpu: bool = False
    pretrained: str = "digits"
    augment_fn: AugmentFn = no_augmentation
    model_state_fn: Callable[[Any, Any], Any] | None = None

    @functools.cached_property
    def data(self) -> Dataset:
        """The parts ``meta_train``, ``train`` and ``test``; loaded on first use, then kept."""
        return self.load_data()

    @property
    def chance_loss(self) -> float:
        """Loss of equal probabilities for all classes, in nats: where a stuck training stays."""
        return math.log(self.num_classes)


__all__ = ["AugmentFn", "Task", "no_augmentation"]
