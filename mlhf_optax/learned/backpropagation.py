"""What learned optimizers share that need gradients only and are meta-trained by back-propagation."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import optax

from mlhf_optax.learned.family import LearnedFamily, number_problem
from mlhf_optax.support.checks import POSITIVE, check_choice, check_fields

if TYPE_CHECKING:
    from mlhf_optax.meta_training.interface import LearnedOptimizer

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
    """Whether the meta-gradient treats the gradients that the optimizer sees as constants, or also goes
    through them, by second derivatives of the network ("differentiated")."""
    remat: bool = False
    """Compute each step again in the backward pass: less memory, a third more time."""

    def __post_init__(self):
        check_choice("meta_loss", self.meta_loss, get_args(MetaLossName))
        check_choice("inner_gradients", self.inner_gradients, get_args(InnerGradients))
        check_fields(self, POSITIVE, "learning_rate")


def backpropagated(
    name: str,
    init: Callable[[jax.Array], Any],
    build: Callable[..., optax.GradientTransformation],
    *,
    label: str = "",
    description: str = "",
    options: type[BackpropagationOptions] = BackpropagationOptions,
    penalty: Callable[[Any], jax.Array] | None = None,
) -> LearnedFamily:
    """Returns the record of a learned optimizer that needs gradients only and fits any network.

    Args:
      name: in the registry.
      init: ``init(key) -> meta_params``, untrained ones, always of the same shapes.
      build: ``build(meta_params, *, learning_rate=..., ...) -> optax.GradientTransformation``. Its keyword
        arguments are those of the optimizer, and its docstring explains them.
      label: in tables; the name by default.
      description: one line.
      options: its dataclass of options.
      penalty: see :func:`mlhf_optax.meta_training.unrolled_optimizer`.

    Returns:
      The record.

    Example:
      See :mod:`mlhf_optax.learned.adam_rates`.
    """

    def optimizer(
        meta_params: Any, predict_fn: Any = None, loss_fn: Any = None, **arguments: Any
    ) -> optax.GradientTransformationExtraArgs:
        del predict_fn, loss_fn
        return optax.with_extra_args_support(build(meta_params, **arguments))

    def learned(options: BackpropagationOptions, start: Any = None) -> "LearnedOptimizer":
        # Here, since whoever only uses the optimizer needs no meta-training.
        from mlhf_optax.meta_training.interface import META_LOSSES, unrolled_optimizer

        return unrolled_optimizer(
            lambda meta_params, task: optimizer(meta_params, learning_rate=options.learning_rate),
            META_LOSSES[options.meta_loss],
            init=lambda key, task: init(key) if start is None else start.meta_params,
            second_derivatives=options.inner_gradients == "differentiated",
            remat=options.remat,
            penalty=penalty,
        )

    _show_arguments(optimizer, build)
    return LearnedFamily(
        name=name,
        learned=learned,
        optimizer=optimizer,
        label=label,
        description=description,
        options=options,
        record=lambda options: {"learning_rate": options.learning_rate},
        arguments=("learning_rate",),
        check_record=_check_record,
        template=lambda structure: jax.eval_shape(lambda: init(jax.random.key(0))),
        fits_any=True,
    )


def _show_arguments(optimizer: Any, build: Callable[..., Any]) -> None:
    """Gives ``optimizer`` the docstring of ``build``, and its keyword arguments as a signature."""
    of_model = list(inspect.signature(optimizer).parameters.values())[:3]
    keywords = list(inspect.signature(build).parameters.values())[1:]
    optimizer.__signature__ = inspect.Signature([*of_model, *keywords])
    optimizer.__doc__ = build.__doc__


def _check_record(record: Mapping[str, Any]) -> str | None:
    return number_problem("learning_rate", record.get("learning_rate", 1.0))
