"""One step of MLHF, the paper's Algorithm 1, and the state that it hands on; without safeguards.

Paper symbols and the names used here: w ``params``, g ``gradient`` (the incoming updates), d_n
``direction``, r_n ``residual``, s ``damping``, P ``preconditioner``, H-bar v ``matvec`` (GGN product
plus damping), RNN_s and RNN_p ``meta_params.damping`` and ``meta_params.preconditioner``, n in PCG
``num_cg_steps``.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax import coordinate_lstm
from mlhf_optax.controls import Inputs, control_unit, damping_values, preconditioner_values, run_network
from mlhf_optax.curvature import Matvec
from mlhf_optax.meta_params import MetaParams, Settings
from mlhf_optax.pcg import pcg


class MLHFInfo(NamedTuple):
    """What the last step did, for looking at; only the sign of ``descent`` has a say in the next one.

    All but ``skipped_steps`` describe the last step that was tried, also if it was skipped.

    Attributes:
      skipped_steps: number of steps so far that changed nothing because something was not finite
        or the direction was not one of descent.
      descent: <d, g>; positive for a descent direction. After a negative one the next step starts
        its CG from zero, from where it always descends.
      cg_residual_norm: norm of ``g - A d`` after the CG steps.
      damping_min, damping_mean, damping_max: statistics of s over all coordinates.
      preconditioner_min, preconditioner_mean, preconditioner_max: the same for P.
    """

    skipped_steps: jax.Array  # shape=(), dtype=int32
    descent: jax.Array  # shape=(), dtype=float32, as all below
    cg_residual_norm: jax.Array
    damping_min: jax.Array
    damping_mean: jax.Array
    damping_max: jax.Array
    preconditioner_min: jax.Array
    preconditioner_mean: jax.Array
    preconditioner_max: jax.Array


class ScaleByMLHFState(NamedTuple):
    """State of :func:`mlhf_optax.scale_by_mlhf`.

    Attributes:
      count: number of steps that were not skipped.
      direction: d of the last such step, shaped like the parameters.
      residual: r of the last such step, shaped like the parameters.
      damping_carry: state of LSTM_s, leaves (H, *param.shape).
      preconditioner_carry: state of LSTM_p, leaves (H, *param.shape).
      parameter_size: root mean square of the parameters at the start (:class:`mlhf_optax.Settings`).
      info: what the last step did.
    """

    count: jax.Array  # shape=(), dtype=int32
    direction: chex.ArrayTree
    residual: chex.ArrayTree
    damping_carry: tuple[coordinate_lstm.LayerCarry, ...]
    preconditioner_carry: tuple[coordinate_lstm.LayerCarry, ...]
    parameter_size: jax.Array  # shape=(), at least float32
    info: MLHFInfo


class Controls(NamedTuple):
    """Outputs of both LSTMs before the output map, shaped like the parameters.

    Attributes:
      damping: output of LSTM_s.
      preconditioner: output of LSTM_p.
    """

    damping: chex.ArrayTree
    preconditioner: chex.ArrayTree


class Solution(NamedTuple):
    """What PCG found.

    Attributes:
      direction: d, shaped like the parameters.
      residual: r = g - A d, shaped like the parameters.
      residual_norm: norm of r.
    """

    direction: chex.ArrayTree
    residual: chex.ArrayTree
    residual_norm: jax.Array


class Step(NamedTuple):
    """One step of Algorithm 1, before any safeguard.

    Attributes:
      solution: direction and residual.
      controls: LSTM outputs.
      unit: the unit of damping and preconditioner.
      damping_carry: next state of LSTM_s.
      preconditioner_carry: next state of LSTM_p.
    """

    solution: Solution
    controls: Controls
    unit: jax.Array
    damping_carry: tuple[coordinate_lstm.LayerCarry, ...]
    preconditioner_carry: tuple[coordinate_lstm.LayerCarry, ...]


def mlhf_step(
    meta_params: MetaParams,
    types: chex.ArrayTree,
    ggn: Matvec,
    gradient: chex.ArrayTree,
    state: ScaleByMLHFState,
    num_cg_steps: int,
    unroll: bool | int = True,
) -> Step:
    """Runs both LSTMs and the solve (paper, Algorithm 1) without safeguards.

    Args:
      meta_params: the LSTMs.
      types: tree of layer type names.
      ggn: product with the undamped GGN.
      gradient: g.
      state: previous direction, residual and carries, and the size of the parameters.
      num_cg_steps: K.
      unroll: unroll the CG loop.

    Returns:
      A :class:`Step`.

    Example:
      See :func:`mlhf_optax.scale_by_mlhf`, which adds the safeguards.
    """
    settings = meta_params.settings
    d0, unit = start_vector(state), control_unit(settings, gradient, state.parameter_size)
    inputs = Inputs(d0, state.residual, gradient)
    s_out, s_carry = run_network(meta_params.damping, settings, types, state.damping_carry, inputs)
    if settings.preconditioner_residual == "current":
        a_d0 = damped(ggn, damping_values(settings, s_out, unit))(d0)
        start = jax.tree.map(jnp.subtract, gradient, a_d0)
        # This residual depends on s, but what an LSTM sees carries no meta-gradient (section 3.1).
        inputs = inputs._replace(residual=jax.lax.stop_gradient(start))
    p_out, p_carry = run_network(
        meta_params.preconditioner, settings, types, state.preconditioner_carry, inputs
    )
    controls = Controls(s_out, p_out)
    solution = solve(settings, ggn, gradient, d0, controls, unit, num_cg_steps, unroll)
    return Step(solution, controls, unit, s_carry, p_carry)


def solve(
    settings: Settings,
    ggn: Matvec,
    gradient: chex.ArrayTree,
    start: chex.ArrayTree,
    controls: Controls,
    unit: jax.Array,
    num_cg_steps: int,
    unroll: bool | int = True,
) -> Solution:
    """Solves ``(G + diag(s)) d = g`` by PCG from ``start``, with s and P from ``controls``."""
    damping = damping_values(settings, controls.damping, unit)
    direction, residual, info = pcg(
        damped(ggn, damping),
        gradient,
        start,
        num_steps=num_cg_steps,
        preconditioner=preconditioner_values(settings, controls.preconditioner, unit, damping),
        preconditioner_form="multiply" if settings.preconditioner_form == "multiply" else "divide",
        unroll=unroll,
    )
    return Solution(direction, residual, info.residual_norm)


def damped(ggn: Matvec, damping: chex.ArrayTree) -> Matvec:
    """Returns ``v -> G v + s * v``."""

    def matvec(vector: chex.ArrayTree) -> chex.ArrayTree:
        add = lambda gv, s, v: gv + (s * v).astype(gv.dtype)
        return jax.tree.map(add, ggn(vector), damping, vector)

    return matvec


def start_vector(state: ScaleByMLHFState) -> Any:
    """The previous direction, or zero after a step that was not one of descent.

    From zero CG always descends. From a direction that no longer fits it may not, and as a skipped
    step leaves the state as it was, a training on one batch would try the same step for ever.
    """
    failed = state.info.descent < 0
    return jax.tree.map(lambda d: jnp.where(failed, jnp.zeros_like(d), d), state.direction)


__all__ = [
    "Controls",
    "MLHFInfo",
    "ScaleByMLHFState",
    "Solution",
    "Step",
    "damped",
    "mlhf_step",
    "solve",
    "start_vector",
]
