"""The four configurations of the ablation, and how well each solves the same systems."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlhf_optax import MetaParams, Model, Settings, mlhf, pcg
from mlhf_optax.controllers.coordinate_lstm import coordinate_lstm
from mlhf_optax.controllers.lstm_settings import Divide
from mlhf_optax.damped_step import linearize
from mlhf_optax.experiments.meta_train import draw_batches
from mlhf_optax.meta_training.unrolled.mlhf_losses import preconditioner_loss
from mlhf_optax.solvers import damped_ggn
from mlhf_optax.tasks import Task


class Configuration(NamedTuple):
    """One of the four: with or without a learned LSTM_p (then P is the same for all coordinates), and K."""

    name: str
    has_lstm_p: bool
    num_cg_steps: int

    def settings(self, settings: Settings) -> Settings:
        """Returns the settings; without LSTM_p the preconditioner must not be made of the damping."""
        return settings if self.has_lstm_p else dataclasses.replace(settings, preconditioner=Divide())


CONFIGURATIONS = (
    Configuration("without LSTM_p, 20 CG steps", False, 20),
    Configuration("without LSTM_p, 4 CG steps", False, 4),
    Configuration("with LSTM_p, 2 CG steps", True, 2),
    Configuration("mlhf", True, 4),
)

# What a reader is told.
TITLES = {one.name: one.name for one in CONFIGURATIONS} | {"mlhf": "with LSTM_p, 4 CG steps (MLHF)"}

# Jacobi's preconditioner divides by s + P, and s is learned: what of the gain is that, and not LSTM_p's?
DAMPING_ALONE = "P from the damping alone, 4 CG steps"


def compare_solvers(
    task: Task, meta_params: MetaParams, num_steps: int, batch_size: int
) -> dict[str, dict[str, float]]:
    """Trains a network with MLHF and lets the four solvers solve the system of every step.

    Returns:
      By configuration and for ``DAMPING_ALONE``, the mean over the steps of l_p over that of 20 steps
      without LSTM_p (above one is better), and of the norm of the residual over that of the gradient.
    """
    optimizer = mlhf(meta_params, task.predict_fn, task.loss_fn)
    examples = jax.tree.map(jnp.asarray, task.data.meta_train)

    @jax.jit
    def step(params, opt_state, key):
        batch = draw_batches(task, examples, (batch_size,), key)
        gradient = jax.grad(lambda p: task.loss_fn(task.predict_fn(p, batch), batch))(params)
        measured = solve_in_every_way(task, meta_params, params, batch, gradient, opt_state[0])
        updates, opt_state = optimizer.update(gradient, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state, measured

    params = task.init_fn(jax.random.key(0))
    opt_state, measured = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), num_steps):
        params, opt_state, values = step(params, opt_state, key)
        measured.append(values)
    means = jax.tree.map(lambda *leaves: float(np.mean(leaves)), *measured)
    return {name: {"l_p_ratio": pair[0], "residual_ratio": pair[1]} for name, pair in means.items()}


def solve_in_every_way(task: Task, meta_params: MetaParams, params, batch, gradient, state):
    """Returns, by configuration, l_p relative to the first one and the residual relative to the gradient."""
    controller = coordinate_lstm(meta_params)
    view = linearize(controller, state, Model(task.predict_fn, task.loss_fn), params, gradient, batch)
    signal = controller.control(view, state.controller).signal
    # Without its own output LSTM_p is as it starts: the same P for all coordinates.
    silent = signal._replace(preconditioner=jax.tree.map(jnp.zeros_like, signal.preconditioner))
    ways = {
        one.name: (one.settings(meta_params.settings), signal if one.has_lstm_p else silent, one.num_cg_steps)
        for one in CONFIGURATIONS
    }
    ways[DAMPING_ALONE] = (meta_params.settings, silent, 4)
    found = {}
    for name, (settings, chosen, num_steps) in ways.items():
        of_way = coordinate_lstm(dataclasses.replace(meta_params, settings=settings))
        damping, preconditioner, *_ = of_way.operators(view, chosen)
        matvec = damped_ggn(view.ggn, damping)
        how = {"num_steps": num_steps, "preconditioner": preconditioner, "unroll": num_steps <= 4}
        direction, residual, info = pcg(matvec, gradient, view.direction, **how)
        l_p = preconditioner_loss(direction, residual, gradient)
        found[name] = (l_p, info.residual_norm / optax.tree.norm(gradient))
    reference = found[CONFIGURATIONS[0].name][0]
    return {name: (l_p / reference, residual) for name, (l_p, residual) in found.items()}
