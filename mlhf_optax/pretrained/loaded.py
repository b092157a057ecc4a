"""Meta-parameters in use: an optimizer whose signature, help and errors are those of what was loaded."""

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.curvature_batch import ShareOrAll
from mlhf_optax.learned import LEARNED, LearnedFamily, get_learned
from mlhf_optax.support.checks import check_known, require_function

_MODEL = {
    "predict_fn": "``predict_fn(params, batch) -> outputs``, any pytree of arrays.",
    "loss_fn": "``loss_fn(outputs, batch) -> scalar``, a function of what ``predict_fn`` returns.",
}
_FULL_BATCH = """every batch is all of the data, so the loss has no noise: differential equations, fits to
    measurements, regression on all examples. Then nothing learned is used, as a rule is better there:
    :func:`mlhf_optax.full_batch.full_batch`, Levenberg and Marquardt's, with steps refused that raise the
    loss, and exact solves where they are cheap. It leaves nothing to set but ``axis_name``.
"""
_CALL = (
    "call `optimizer(predict_fn, loss_fn, ...)` with the functions `predict_fn(params, batch) -> outputs` "
    "and `loss_fn(outputs, batch) -> scalar`; all else goes by name, such as `learning_rate=0.5`"
)


class OptimizerFn(Protocol):
    """What :attr:`Pretrained.optimizer` is: from a model to an optax transformation."""

    def __call__(
        self, predict_fn: PredictFn, loss_fn: LossFn, **arguments: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation; see :attr:`Pretrained.optimizer`."""
        ...


class Pretrained(NamedTuple):
    """Meta-parameters and the record of how they were made.

    Attributes:
      meta_params: what was learned.
      record: what they were trained on and how to use them; at least ``optimizer``, ``task`` and
        ``batch_size``.
    """

    meta_params: Any
    record: dict[str, Any]

    @property
    def family(self) -> LearnedFamily:
        """The learned optimizer that they belong to."""
        return get_learned(self.record["optimizer"])

    @property
    def learning_rate(self) -> float | None:
        """The learning rate that the record recommends; None for optimizers that learn theirs."""
        return self.recommended.get("learning_rate")

    @property
    def recommended(self) -> dict[str, Any]:
        """The arguments of the optimizer that the record recommends."""
        return {name: self.record[name] for name in self.family.arguments if name in self.record}

    @property
    def optimizer(self) -> OptimizerFn:
        """The learned optimizer, ``optimizer(predict_fn, loss_fn, **arguments)``.

        ``help(pretrained.optimizer)`` explains all arguments: those of :func:`mlhf_optax.mlhf`, or of the
        optimizer of the literature that was loaded. The record's recommendations are their defaults. Under
        :func:`optax.inject_hyperparams` name what is not a number in ``static_args``.

        Args:
          predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays. Optimizers of the
            literature need gradients only, and neither function.
          loss_fn: ``loss_fn(outputs, batch) -> scalar``.
          **arguments: take the place of what the record recommends.

        Returns:
          The transformation; call ``update(grads, state, params, batch=batch)``.

        Raises:
          TypeError: for a name that is no argument, or what is no function.

        Example:
          >>> import jax.numpy as jnp
          >>> from mlhf_optax import SquaredError, load_pretrained
          >>> predict_fn = lambda params, batch: batch["x"] @ params["kernel"]
          >>> tx = load_pretrained("digits").optimizer(predict_fn, SquaredError(), learning_rate=0.5)
          >>> tx.init({"kernel": jnp.ones((3, 1))})[0].count
          Array(0, dtype=int32)
          >>> load_pretrained().optimizer(predict_fn, SquaredError(), lr=0.5)
          Traceback (most recent call last):
          TypeError: `optimizer` has no argument `lr`; did you mean `learning_rate`? ...
        """
        return _optimizer_of(self.family, self.meta_params, _defaults(self.recommended))

    def __repr__(self) -> str:
        record, name = self.record, str(self.record.get("optimizer"))
        about = f"{LEARNED[name].label}, {LEARNED[name].description}" if name in LEARNED else name
        recommended = self.recommended if name in LEARNED else {}
        leaves = jax.tree.leaves(self.meta_params)
        made = f"{record.get('task')}, {record.get('batch_size')} examples per batch, {record.get('date')}"
        return "\n".join(
            (
                f"Pretrained: {about}",
                f"  meta-trained on: {made}",
                f"  size: {sum(leaf.size for leaf in leaves):,} numbers in {len(leaves)} arrays",
                f"  recommends: {_assigned(recommended)}",
                "  use: .optimizer(predict_fn, loss_fn); .record tells how it was made",
            )
        )


def _defaults(recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults that the record recommends; a share that nobody set may be all of it."""
    share = recommended.get("curvature_batch_size")
    of_share = {"curvature_batch_size": ShareOrAll(share)} if isinstance(share, float) else {}
    return {**recommended, **of_share}


def _optimizer_of(family: LearnedFamily, meta_params: Any, recommended: Mapping[str, Any]) -> OptimizerFn:
    """Returns the function that :attr:`Pretrained.optimizer` is."""
    shown = list(inspect.signature(family.optimizer).parameters.values())[1:]
    # Without annotations, which fill a screen once JAX's unions are written out.
    shown = [p.replace(default=recommended.get(p.name, p.default), annotation=p.empty) for p in shown]
    if family.full_batch is not None:
        shown.insert(2, inspect.Parameter("full_batch", inspect.Parameter.KEYWORD_ONLY, default=False))
    parameters = {parameter.name: parameter for parameter in shown}

    def optimizer(predict_fn: Any = None, loss_fn: Any = None, *others: Any, **arguments: Any) -> Any:
        check_known("optimizer", arguments, parameters)
        for name, value in (("predict_fn", predict_fn), ("loss_fn", loss_fn)):
            is_needed = parameters[name].default is inspect.Parameter.empty  # gradients may be enough
            if not callable(value) and (is_needed or value is not None):
                if hasattr(value, "dtype"):
                    require_function(name, value)
                came = "is missing" if value is None else f"must be a function, got {_short(value)}"
                raise TypeError(f"`{name}` {came}; {_CALL}")
        if others:
            raise TypeError(f"got {2 + len(others)} arguments by position; {_CALL}")
        if arguments.pop("full_batch", False) and family.full_batch is not None:
            if superfluous := sorted(arguments.keys() - {"axis_name"}):
                raise ValueError(
                    f"`full_batch=True` leaves nothing to set; leave out {', '.join(superfluous)}. "
                    "`hessian_free` with `LevenbergMarquardt.without_noise(...)` and `solvers.BySize(...)` "
                    "has all of it as arguments"
                )
            return family.full_batch(predict_fn, loss_fn, **arguments)
        return family.optimizer(meta_params, predict_fn, loss_fn, **{**recommended, **arguments})

    shows: Any = optimizer
    shows.__signature__ = inspect.Signature(shown)
    shows.__doc__ = _help(family, list(parameters), recommended)
    shows.__qualname__ = "Pretrained.optimizer"
    return optimizer


def _help(family: LearnedFamily, names: list[str], recommended: Mapping[str, Any]) -> str:
    """Returns the docstring of an optimizer, with the arguments as its family explains them."""
    section = re.search(r"^Args:\n((?:  .*\n|\n)+)", inspect.getdoc(family.optimizer) or "", re.MULTILINE)
    entries = re.findall(r"^  (\w+): ((?:.*\n)(?:    .*\n)*)", section[1] if section else "", re.MULTILINE)
    texts = dict(entries) | {name: f"{text}\n" for name, text in _MODEL.items()} | {"full_batch": _FULL_BATCH}
    explained = "".join(f"  {name}: {texts[name]}" for name in names if name in texts)
    about = f"What it is: {family.description}. Defaults from the record: {_assigned(recommended)}."
    return f"""Returns {family.label} with these meta-parameters, as an optax transformation.

{textwrap.fill(about, 100)}

Args:
{explained}
Returns:
  A transformation; call ``update(grads, state, params, batch=batch)``.

Raises:
  TypeError: for a name that is no argument, or what is no function.
"""


def _assigned(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "nothing"


def _short(value: Any) -> str:
    is_plain = isinstance(value, bool | int | float | str)
    return repr(value) if is_plain else f"an object of type {type(value).__name__}"
