"""What a controller is: from what a step sees to damping, preconditioner and its own next state.

The damped step (:mod:`mlhf_optax.damped_step`) is the same for every optimizer of the library. An optimizer
is a controller, a solver (:mod:`mlhf_optax.solvers`) and what follows the solve
(:mod:`mlhf_optax.transforms`):

==========================  =========================  =================  ==================================
optimizer                   controller                 solver             after the solve
==========================  =========================  =================  ==================================
``load_pretrained()``       ``tensor_lstm``            ``PCG(2)``         growth, learning rate, update bound
``load_pretrained(name)``   ``coordinate_lstm``        ``PCG(4)``         learning rate, update bound
``gauss_newton``            ``constant``               ``PCG(4)``         the same, growth on request
``hessian_free``            ``scheduled``              ``TolerancePCG``   learning rate
``hessian_free``, adapted   ``levenberg_marquardt``    ``TolerancePCG``   learning rate
``full_batch=True``         ``levenberg_marquardt``    ``BySize``         nothing
==========================  =========================  =================  ==================================

A step calls ``control`` (what damping and preconditioner are made of), ``operators`` (S and P for the solver)
and ``observe`` (what came of it), in this order. :func:`mlhf_optax.controllers.scheduled` is the shortest
example.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.dense import Matvec
from mlhf_optax.support.packing import AnyPacking
from mlhf_optax.support.placement import AxisName


class View(NamedTuple):
    """What a step sees before it solves.

    Attributes:
      params: w, the current parameters. This and the next three are vectors of ``packing`` if there is one.
      gradient: g, shaped like the parameters; zeros if it is not finite.
      direction: d0, where CG starts: the previous direction, or zeros.
      residual: r0, the previous residual, or zeros; empty unless the controller keeps it.
      ggn: product with the undamped GGN at w, a :class:`mlhf_optax.dense.GGN`, on vectors a ``PackedGGN``.
      loss: loss on the batch of the GGN products at w, a scalar of at least float32.
      loss_at: ``loss_at(params)``, the loss on the whole batch.
      initial_rms: root mean square of the parameters when the optimizer was initialised, a scalar.
      is_valid: whether the gradient and its square are finite, shape (); a step that is not valid is skipped.
      axis_name: axis of ``jax.shard_map`` or ``jax.pmap`` along which batches differ and all else here is the
        same; None for ``jax.jit``.
      packing: how trees like the parameters are packed, if the controller works on vectors.
    """

    params: chex.ArrayTree
    gradient: chex.ArrayTree
    direction: chex.ArrayTree
    residual: Any
    ggn: Any
    loss: jax.Array
    loss_at: Callable[[Any], jax.Array]
    initial_rms: jax.Array
    is_valid: jax.Array
    axis_name: AxisName = None
    packing: Any = None


class Control(NamedTuple):
    """What a controller says at a step.

    Attributes:
      signal: what the operators are made of, a pytree; meta-training differentiates by it.
      state: the controller's next state.
      seen: what the signal was made of, for back-propagation through time; computed only if used.
      finite_witness: a pytree that is finite only if the state is, given a gradient with finite squares and a
        state before that was. A step checks it before it is taken: small arrays save time. None is the state.
    """

    signal: Any
    state: Any
    seen: Any = ()
    finite_witness: Any = None


class Scale(NamedTuple):
    """The operator ``v -> values * v``, diagonal.

    Attributes:
      values: tree like the parameters; a leaf is a scalar for the whole tensor, or a number per coordinate.

    Example:
      >>> Scale({"w": jnp.array(2.0)})({"w": jnp.array([1.0, 3.0])})
      {'w': Array([2., 6.], dtype=float32)}
    """

    values: chex.ArrayTree

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """Returns the product."""
        return jax.tree.map(lambda s, v: (s * v).astype(v.dtype), self.values, vector)


class Quotient(NamedTuple):
    """The operator ``v -> v / values``, the inverse of :class:`Scale`.

    Attributes:
      values: as those of :class:`Scale`.
    """

    values: chex.ArrayTree

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """Returns the product with the inverse."""
        # The reciprocal does not depend on the vector, so a compiled solve takes it once, not in every step.
        return jax.tree.map(lambda p, v: ((1.0 / p) * v).astype(v.dtype), self.values, vector)


class PerTensor(NamedTuple):
    """Numbers that show how large an operator on vectors is.

    Attributes:
      numbers: one for every tensor, shape (tensors,).
      sizes: of the tensors, likewise.
    """

    numbers: jax.Array
    sizes: Any


class Product(NamedTuple):
    """An operator that is given as a function.

    Attributes:
      values: tree like the parameters that shows how large the operator is, or :class:`PerTensor`.
      times: the product with a vector.
    """

    values: Any
    times: Matvec

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """Returns the product."""
        return self.times(vector)


class Operator(Protocol):
    """A linear map of trees like the parameters, with numbers that tell how large it is."""

    @property
    def values(self) -> Any:
        """For the info: a tree of scalars per tensor or numbers per coordinate, or :class:`PerTensor`."""
        ...

    def __call__(self, vector: chex.ArrayTree, /) -> chex.ArrayTree:
        """Returns the product."""
        ...


class Operators(NamedTuple):
    """The operators of one solve.

    Attributes:
      damping: S, positive semidefinite; ``values`` are shown in the info.
      preconditioner: approximates ``A^-1``, positive definite; None is the identity. Its ``values`` are
        shown, too.
      right_hand_side: what the system is solved for, such as a running mean of gradients; None is g.
      step_scale: factor on the direction that is handed on, a scalar; None is 1.
      damping_after_preconditioner: the product with ``S P^-1`` where it is cheap, as for a preconditioner
        that is ``S^-1``. The solve then needs no product with S per step, and tells S d.
      longest: CG starts from zero, and its first direction is the previous one, with the length in
        [0, longest] that is exact in the quadratic model; needs ``damping_after_preconditioner``. None to
        start from the previous direction as it is.
    """

    damping: Operator
    preconditioner: Operator | None = None
    right_hand_side: chex.ArrayTree | None = None
    step_scale: jax.Array | None = None
    damping_after_preconditioner: Matvec | None = None
    longest: jax.Array | float | None = None


class Outcome(NamedTuple):
    """What came of a step, before anything is moved.

    Attributes:
      direction: d.
      residual: ``r = b - (G + S) d`` for the right-hand side b, usually g.
      is_sound: whether all is finite and d is a direction of descent, shape ().
      right_hand_side: b.
      damped: S d, if the operators have ``damping_after_preconditioner``; else empty.
    """

    direction: chex.ArrayTree
    residual: chex.ArrayTree
    is_sound: jax.Array
    right_hand_side: Any = ()
    damped: Any = ()


class Observed(NamedTuple):
    """What a controller makes of an outcome.

    Attributes:
      state: its next state.
      is_accepted: whether the step is taken, shape (); one that is not sound never is.
      reduction_ratio: change of the loss over the change that the quadratic model predicts; 0 if it was
        not measured.
      is_refused: whether the step is not taken although all was finite, as it would have raised the loss or
        the damping was too small; not counted as skipped.
      is_another_batch: whether the loss is not that which the step before had foreseen for the same batch.
    """

    state: Any
    is_accepted: jax.Array
    reduction_ratio: jax.Array
    is_refused: Any = False
    is_another_batch: Any = False


def accept(view: View, outcome: Outcome, state: Any) -> Observed:
    """Takes every sound step; what most controllers do with an outcome."""
    del view
    return Observed(state, outcome.is_sound, jnp.zeros((), jnp.float32))


class Controller(NamedTuple):
    """A controller, four functions.

    Attributes:
      init: ``init(params) -> state``.
      control: ``control(view, state) ->`` :class:`Control`.
      operators: ``operators(view, signal) ->`` :class:`Operators`.
      observe: ``observe(view, outcome, state) ->`` :class:`Observed`; :func:`accept` for most.
      is_warm_started: CG starts from the previous direction, which the state then holds; otherwise from zero.
      keeps_residual: the state holds the previous residual, too, for the view; only if warm started.
      packing: ``packing(params)``, how a tree like the parameters becomes the vectors that the controller
        works on (:mod:`mlhf_optax.support.packing`); None for trees.
    """

    init: Callable[[chex.ArrayTree], Any]
    control: Callable[[View, Any], Control]
    operators: Callable[[View, Any], Operators]
    observe: Callable[[View, Outcome, Any], Observed] = accept
    is_warm_started: bool = True
    keeps_residual: bool = False
    packing: Callable[[chex.ArrayTree], AnyPacking] | None = None
