"""What learned optimizers that are meta-trained by back-propagation share: options and the record."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax

from mlhf_optax.learned.family import LearnedFamily, number_problem
from mlhf_optax.meta_training.interface import META_LOSSES, LearnedOptimizer, unrolled_optimizer

MetaLossName = Literal["last", "mean", "mean_after", "sum", "log"]
InnerGradients = Literal["constant", "differentiated"]


@dataclasses.dataclass(frozen=True)
class BackpropagationOptions:
    """How an optimizer is meta-trained by back-propagation through the unroll.

    Raises:
      ValueError: for an unknown name, or a learning rate that is not positive.
    """

    learning_rate: float = 1.0
    """Factor of the updates, in meta-training and in the record."""
    meta_loss: MetaLossName = "mean"
    """What an unroll minimises: its last loss, the mean or the sum of its losses, the mean of the losses on
    every mini-batch after the step on it, or the mean of their logarithms."""
    inner_gradients: InnerGradients = "constant"
    """Whether the meta-gradient takes the gradients that the optimizer is given for constants, or goes
    through them, by second derivatives of the network ("differentiated")."""
    remat: bool = False
    """Compute steps anew in the backward pass: less memory, a third more time."""

    def __post_init__(self):
        if self.meta_loss not in META_LOSSES:
            known = ", ".join(map(repr, META_LOSSES))
            raise ValueError(f"`meta_loss` must be one of {known}, got {self.meta_loss!r}")
        if self.inner_gradients not in ("constant", "differentiated"):
            raise ValueError(
                f"`inner_gradients` must be 'constant' or 'differentiated', got {self.inner_gradients!r}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be a positive number, got {self.learning_rate}")


def backpropagated(
    name: str,
    label: str,
    description: str,
    options: type[BackpropagationOptions],
    init: Callable[[jax.Array], Any],
    transformation: Callable[..., optax.GradientTransformation],
    penalty: Callable[[Any], jax.Array] | None = None,
) -> LearnedFamily:
    """Returns the record of a learned optimizer that needs gradients only and fits any network.

    Args:
      name: in the registry.
      label: in tables.
      description: one line.
      options: its dataclass of options.
      init: ``init(key) -> meta_params``, always of the same shapes.
      transformation: ``transformation(meta_params, learning_rate=) -> optax.GradientTransformation``, whose
        keyword arguments are those of the optimizer.
      penalty: see :func:`mlhf_optax.meta_training.unrolled_optimizer`.

    Returns:
      The record.
    """

    def learned(options: BackpropagationOptions, start: Any = None) -> LearnedOptimizer:
        def build(meta_params, task):
            del task
            return optimizer(meta_params, None, None, learning_rate=options.learning_rate)

        return unrolled_optimizer(
            build,
            META_LOSSES[options.meta_loss],
            init=lambda key, task: init(key) if start is None else start.meta_params,
            second_derivatives=options.inner_gradients == "differentiated",
            remat=options.remat,
            penalty=penalty,
        )

    def optimizer(
        meta_params: Any, predict_fn: Any, loss_fn: Any, **arguments: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation; the model is not needed."""
        del predict_fn, loss_fn
        return optax.with_extra_args_support(transformation(meta_params, **arguments))

    _show_arguments(optimizer, transformation)

    def template(structure: Mapping[str, Any]) -> Any:
        del structure
        return jax.eval_shape(lambda: init(jax.random.key(0)))

    return LearnedFamily(
        name=name,
        label=label,
        description=description,
        options=options,
        learned=learned,
        optimizer=optimizer,
        arguments=("learning_rate",),
        record=lambda options: {"learning_rate": options.learning_rate},
        template=template,
        check_record=_check_record,
        fits_any=True,
    )


def _show_arguments(optimizer: Any, transformation: Callable[..., Any]) -> None:
    """Has help and signature of the optimizer name the keyword arguments of the transformation."""
    of_model = list(inspect.signature(optimizer).parameters.values())[:3]
    keywords = list(inspect.signature(transformation).parameters.values())[1:]
    optimizer.__signature__ = inspect.Signature([*of_model, *keywords])


def _check_record(record: Mapping[str, Any]) -> str | None:
    return number_problem("learning_rate", record.get("learning_rate", 1.0))
