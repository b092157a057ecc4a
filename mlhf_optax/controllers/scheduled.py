"""Damping by a number or a schedule: the smallest controller, and the template of a new one."""

import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.protocol import (
    Control,
    Controller,
    Observed,
    Operators,
    Outcome,
    Scale,
    View,
    accept,
)
from mlhf_optax.support.checks import NOT_NEGATIVE, check_number


def scheduled(damping: optax.ScalarOrSchedule) -> Controller:
    """Returns the controller whose damping is a number or a schedule of the step, without unit or warm start.

    Args:
      damping: a number >= 0, or a schedule. It counts all steps, skipped ones included, as the rest of a
        chain does.

    Returns:
      The controller; its state is the number of steps.

    Raises:
      ValueError: for a negative number.

    Example:
      >>> scheduled(0.1).init({"w": jnp.ones(2)})
      Array(0, dtype=int32)
    """
    if not callable(damping):
        check_number("damping", damping, NOT_NEGATIVE)

    def init(params) -> jax.Array:
        del params
        return jnp.zeros((), jnp.int32)

    def control(view: View, count: jax.Array) -> Control:
        """Chooses: what the operators are made of, and the state to keep if the step is sound."""
        del view  # other controllers look at the gradient, the last direction, the loss, ...
        value = damping(count) if callable(damping) else damping
        return Control(signal=jnp.asarray(value, jnp.float32), state=count)

    def operators(view: View, signal: jax.Array) -> Operators:
        """Makes S of the choice, one number for every tensor; CG has no preconditioner."""
        return Operators(damping=Scale(jax.tree.map(lambda _: signal, view.gradient)))

    def observe(view: View, outcome: Outcome, count: jax.Array) -> Observed:
        """Sees what came of the step, skipped or not, and gives the next state."""
        return accept(view, outcome, jnp.asarray(optax.safe_increment(count)))

    return Controller(init, control, operators, observe, is_warm_started=False)
