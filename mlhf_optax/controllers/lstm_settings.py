"""What the two LSTMs of MLHF see, and what their outputs mean: small objects that make up `Settings`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.controllers import units
from mlhf_optax.controllers.protocol import Quotient, Scale
from mlhf_optax.support import trees
from mlhf_optax.support.checks import NOT_NEGATIVE, POSITIVE, Range, require


class Inputs(NamedTuple):
    """What the LSTMs look at, trees shaped like the parameters."""

    direction: chex.ArrayTree  # d0, the previous one
    residual: chex.ArrayTree  # r0, the previous one, or the current starting residual for LSTM_p
    gradient: chex.ArrayTree


def _number(default: float, allowed: Range) -> Any:
    return dataclasses.field(default=default, metadata={"allowed": allowed})


class _Checked:
    """A dataclass whose numbers must be in the ranges of their fields."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if allowed := field.metadata.get("allowed"):
                # Settings come from files, too, where anything may stand in the place of a number.
                value = getattr(self, field.name)
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                require(is_number and allowed.holds(value), field.name, allowed.wanted, value)


# Features.


@dataclasses.dataclass(frozen=True)
class TanhFeatures:
    """The tanh of d0, r0 and g (paper). Late in training, when all three are tiny, it is as good as zero."""

    count: ClassVar[int] = 3

    def own(self, inputs: Inputs) -> chex.ArrayTree:
        """Returns each parameter's own features, leaves ``(F, *shape)`` in at least float32."""
        return jax.tree.map(lambda *q: jnp.stack([jnp.tanh(trees.at_least_f32(x)) for x in q]), *inputs)

    def shared(self, inputs: Inputs) -> jax.Array | None:
        """Returns None: no feature is shared by all coordinates."""
        del inputs


@dataclasses.dataclass(frozen=True)
class LogFeatures(_Checked):
    """The clipped log magnitude and the clipped scaled value of every quantity, which tell 1e-3 from 1e-6.

    Args:
      log_range: magnitudes from ``exp(-log_range)`` to 1 are resolved; > 0.
      has_shared: add the log of each quantity's root mean square over all parameters.

    Source: Andrychowicz et al. 2016, appendix A.
    """

    log_range: float = _number(16.0, POSITIVE)
    has_shared: bool = True

    @property
    def count(self) -> int:
        """Number of features."""
        return 9 if self.has_shared else 6

    def own(self, inputs: Inputs) -> chex.ArrayTree:
        """Returns each parameter's own features, leaves ``(F, *shape)`` in at least float32."""

        def two(x):
            return self._log_magnitude(jnp.abs(x)), jnp.clip(x * math.exp(self.log_range), -1.0, 1.0)

        def stack(*quantities):
            return jnp.stack([feature for x in quantities for feature in two(trees.at_least_f32(x))])

        return jax.tree.map(stack, *inputs)

    def shared(self, inputs: Inputs) -> jax.Array | None:
        """Returns the features that are the same for all coordinates, shape (3,), if there are any."""
        if not self.has_shared:
            return None
        return jnp.stack([self._log_magnitude(trees.root_mean_square(tree)) for tree in inputs])

    def _log_magnitude(self, magnitude: jax.Array) -> jax.Array:
        """Returns -1 at and below exp(-log_range), 0 at 1, at most 1."""
        smallest = math.exp(-self.log_range)
        return jnp.clip(jnp.log(jnp.maximum(magnitude, smallest)) / self.log_range, -1.0, 1.0)


# From outputs to positive values.


@dataclasses.dataclass(frozen=True)
class Softplus(_Checked):
    """``softplus(scale * output + c)`` (paper), ``initial`` where the output is zero; ``scale`` > 0."""

    scale: float = _number(1.0, POSITIVE)

    def __call__(self, output: jax.Array, initial: float) -> jax.Array:
        """Returns positive values."""
        offset = initial + math.log(-math.expm1(-initial))  # softplus^-1
        return jax.nn.softplus(self.scale * output + offset)


@dataclasses.dataclass(frozen=True)
class Exponential(_Checked):
    """``initial * exp(scale * output)``, which spans many decades; ``scale`` > 0."""

    scale: float = _number(3.0, POSITIVE)

    def __call__(self, output: jax.Array, initial: float) -> jax.Array:
        """Returns positive values."""
        # Between exp(-30) and exp(30) no later product of such values leaves float32.
        return jnp.exp(jnp.clip(self.scale * output + math.log(initial), -30.0, 30.0))


# The unit of both.


@dataclasses.dataclass(frozen=True)
class Unit(_Checked):
    """The unit of s and P, ``rms(g)^gradient_power / rms(w0)^parameter_power`` over all parameters.

    Near a minimum of a cross-entropy the GGN shrinks with the loss. A damping that shrinks with the gradient,
    as in regularised Newton methods (Fan and Yuan 2005), keeps its size relative to the GGN. With both powers
    1 the unit has the dimension of curvature, loss over parameter squared. The outputs then mean the same on
    wide networks, whose parameters are smaller, as on narrow ones. The size of the parameters is measured at
    the start: a damping that sinks as they grow would let the noise of mini-batches in.

    Args:
      gradient_power: 0 for the paper.
      parameter_power: 0 for the paper.
      gradient_floor: smallest root mean square of the gradient that counts. Without it a training whose
        gradient is rounding noise keeps taking long steps, and jumps away.
      parameter_floor: smallest root mean square of the parameters that counts.

    Raises:
      ValueError: for a negative power or a floor that is not positive.

    Example:
      >>> float(Unit(parameter_power=1.0)(jnp.array([0.5, -0.5]), jnp.array(0.25)))
      2.0
    """

    gradient_power: float = _number(1.0, NOT_NEGATIVE)
    parameter_power: float = _number(0.0, NOT_NEGATIVE)
    gradient_floor: float = _number(units.COORDINATE_NOISE_FLOOR, POSITIVE)
    parameter_floor: float = _number(units.PARAMETER_FLOOR, POSITIVE)

    def __call__(self, gradient: chex.ArrayTree, initial_rms: jax.Array) -> jax.Array:
        """Returns a positive scalar; 1 where both powers are 0."""
        return units.unit(trees.root_mean_square(gradient), initial_rms, **dataclasses.asdict(self))


# What P is, made of the values of LSTM_p and the damping.


@dataclasses.dataclass(frozen=True)
class Divide:
    """Solves ``P y = r`` with P from LSTM_p (paper)."""

    def __call__(self, values: chex.ArrayTree, damping: chex.ArrayTree) -> Quotient:
        """Returns the preconditioner."""
        del damping
        return Quotient(values)


@dataclasses.dataclass(frozen=True)
class Multiply:
    """Takes ``y = P r`` (the authors' code)."""

    def __call__(self, values: chex.ArrayTree, damping: chex.ArrayTree) -> Scale:
        """Returns the preconditioner."""
        del damping
        return Scale(values)


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """Divides by ``s + P``. The damping is known, so LSTM_p has only the diagonal of the GGN to estimate."""

    def __call__(self, values: chex.ArrayTree, damping: chex.ArrayTree) -> Quotient:
        """Returns the preconditioner."""
        return Quotient(jax.tree.map(jnp.add, damping, values))


_KINDS: dict[str, tuple[type, ...]] = {
    "features": (TanhFeatures, LogFeatures),
    "output": (Softplus, Exponential),
    "unit": (Unit,),
    "preconditioner": (Divide, Multiply, Jacobi),
}


@dataclasses.dataclass(frozen=True)
class Settings(_Checked):
    """What the LSTMs see and what their outputs mean.

    The defaults did best on handwritten digits. With tanh features, softplus and an absolute scale
    (:data:`PAPER_SETTINGS`) the LSTMs cannot tell late training from early. They keep the damping that was
    right early, and late losses stay orders of magnitude higher.

    Args:
      features: :class:`TanhFeatures` (paper) or :class:`LogFeatures`.
      output: :class:`Softplus` (paper) or :class:`Exponential`.
      unit: :class:`Unit` of s and P.
      preconditioner: :class:`Divide` (paper), :class:`Multiply` (the authors' code) or :class:`Jacobi`.
      initial_damping: s of a freshly initialised LSTM_s, in the unit, > 0.
      initial_preconditioner: the same for LSTM_p.
      damping_floor: constant added to s (paper: 0, the authors' code: 2e-5).
      sees_current_residual: LSTM_p sees the starting residual ``g - A d0`` of the current step (the
        authors' code) rather than the residual of the previous one (paper).

    Raises:
      ValueError: for a value out of range.
      TypeError: for an object of a wrong kind.

    Example:
      >>> Settings(features=TanhFeatures()).features.count
      3
    """

    features: TanhFeatures | LogFeatures = LogFeatures()
    output: Softplus | Exponential = Exponential()
    unit: Unit = Unit()
    preconditioner: Divide | Multiply | Jacobi = Jacobi()
    initial_damping: float = _number(30.0, POSITIVE)
    initial_preconditioner: float = _number(30.0, POSITIVE)
    damping_floor: float = _number(0.0, NOT_NEGATIVE)
    sees_current_residual: bool = False

    def __post_init__(self):
        for name, allowed in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, allowed):
                names = " or ".join(kind.__name__ for kind in allowed)
                raise TypeError(f"`{name}` must be a {names}, got {value!r}")
        super().__post_init__()

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain JSON values; each object names its kind."""
        values = dataclasses.asdict(self)
        return values | {name: {"kind": type(getattr(self, name)).__name__} | values[name] for name in _KINDS}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Returns the settings that :meth:`to_json` wrote.

        Raises:
          ValueError: for an unknown kind or a value out of range.
          TypeError: for an unknown field.
        """
        kinds = {kind.__name__: kind for some in _KINDS.values() for kind in some}

        def restored(value: Any) -> Any:
            if not isinstance(value, Mapping):
                return value
            arguments = dict(value)
            kind = arguments.pop("kind", None)
            if kind not in kinds:
                raise ValueError(f"there is no setting of the kind {kind!r}")
            return kinds[kind](**arguments)

        return cls(**{name: restored(value) for name, value in values.items()})


PAPER_SETTINGS = Settings(
    features=TanhFeatures(),
    output=Softplus(),
    unit=Unit(gradient_power=0.0),
    preconditioner=Divide(),
    initial_damping=math.log(2.0),  # softplus(0)
    initial_preconditioner=math.log(2.0),
)
"""The method as the paper states it."""

AUTHORS_SETTINGS = dataclasses.replace(
    PAPER_SETTINGS, damping_floor=2e-5, preconditioner=Multiply(), sees_current_residual=True
)
"""The method as in the authors' code."""
