"""The solvers of the ablation against dense systems, for a linear classifier, whose Hessian is its GGN."""

import ablation_preconditioner as report
import ablation_solvers as script
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blobs import TASK
from jax.flatten_util import ravel_pytree
from references import naive_pcg

from mlhf_optax import Model, Settings, init_meta_params, mlhf
from mlhf_optax.controllers.coordinate_lstm import coordinate_lstm
from mlhf_optax.damped_step import linearize

pytestmark = pytest.mark.usefixtures("x64", "unoptimised")


@pytest.fixture(name="system")
def _system():
    """Parameters, batch, gradient and state in the middle of a training with LSTMs that say something."""
    settings = Settings(initial_damping=0.1, initial_preconditioner=0.3)
    types = ["dense_kernel", "dense_bias"]
    meta_params = init_meta_params(jax.random.key(0), settings, layer_types=types)
    noise = lambda leaf, key: leaf + jax.random.normal(key, leaf.shape)
    leaves, treedef = jax.tree.flatten(meta_params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    meta_params = treedef.unflatten([noise(*pair) for pair in zip(leaves, keys, strict=True)])
    batch = jax.tree.map(jnp.asarray, TASK.data.train)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), TASK.init_fn(jax.random.key(2)))
    optimizer = mlhf(meta_params, TASK.predict_fn, TASK.loss_fn)
    loss = lambda p: TASK.loss_fn(TASK.predict_fn(p, batch), batch)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    return meta_params, params, batch, jax.grad(loss)(params), state[0], loss


def test_every_solver_finds_what_its_dense_twin_finds(system):
    meta_params, params, batch, gradient, state, loss = system
    found = script.solve_in_every_way(TASK, meta_params, params, batch, gradient, state)
    flat, unravel = ravel_pytree(params)
    flat_of = lambda tree: np.asarray(ravel_pytree(tree)[0])
    g, d0 = flat_of(gradient), flat_of(state.direction)
    hessian = np.asarray(jax.hessian(lambda x: loss(unravel(x)))(flat))
    controller = coordinate_lstm(meta_params)
    view = linearize(controller, state, Model(TASK.predict_fn, TASK.loss_fn), params, gradient, batch)
    signal = controller.control(view, state.controller).signal
    silence = signal._replace(preconditioner=jax.tree.map(jnp.zeros_like, gradient))
    operators = [controller.operators(view, outputs) for outputs in (signal, silence)]
    learned, silent = (flat_of(one.preconditioner.values) for one in operators)
    damping = flat_of(operators[0].damping.values)
    assert damping.max() / damping.min() > 1.2  # else damping alone would be no preconditioner
    matrix = hessian + np.diag(damping)
    twins = {
        "without LSTM_p, 20 CG steps": (np.ones_like(g), 20),
        "without LSTM_p, 4 CG steps": (np.ones_like(g), 4),
        "with LSTM_p, 2 CG steps": (learned, 2),
        "mlhf": (learned, 4),
        script.DAMPING_ALONE: (silent, 4),
    }
    assert found.keys() == twins.keys()
    l_p, residuals = {}, {}
    for name, (divided_by, num_steps) in twins.items():
        d = naive_pcg(matrix, g, d0, 1 / divided_by, num_steps)[0]
        l_p[name] = -(d @ g) / np.sqrt(d @ matrix @ d)
        residuals[name] = np.linalg.norm(g - matrix @ d) / np.linalg.norm(g)
    best = np.linalg.solve(matrix, g)
    np.testing.assert_allclose(l_p["without LSTM_p, 20 CG steps"], -np.sqrt(best @ g), rtol=1e-9)
    for name, (ratio, residual) in found.items():
        np.testing.assert_allclose(ratio, l_p[name] / -np.sqrt(best @ g), rtol=1e-7)
        np.testing.assert_allclose(residual, residuals[name], rtol=1e-5, atol=1e-9)
    assert len({round(float(ratio), 9) for ratio, _ in found.values()}) == 5


def test_means_are_taken_over_the_steps_of_a_training(system):
    found = script.compare_solvers(TASK, system[0], num_steps=3, batch_size=8)
    assert found.keys() == {*script.TITLES, script.DAMPING_ALONE}
    assert found["without LSTM_p, 20 CG steps"]["l_p_ratio"] == 1.0
    for ratios in found.values():
        assert 0 < ratios["l_p_ratio"] < 1.001
        assert 0 <= ratios["residual_ratio"] < np.inf


# Curves of the ablation: means over stretches and seeds, and what cannot be averaged.


def lines(losses):
    return [
        {"l_p": loss, "residual_norm": 2.0 * abs(loss), "inner_loss": 1.0, "seconds": number}
        for number, loss in enumerate(losses)
    ]


def test_curves_are_means_over_seeds_and_stretches():
    first, *_, last = script.CONFIGURATIONS
    summary = report.summarise(first, [lines([1, 2, 3, 4]), lines([3, 4, 5, 6])], points=2)
    assert summary["iterations"] == [2, 4]
    assert summary["l_p"] == [2.5, 4.5]
    assert summary["residual_norm"] == [5.0, 9.0]
    assert summary["seconds_per_iteration"] == 1.5
    assert (summary["name"], summary["num_cg_steps"]) == (first.name, 20)
    assert report.summarise(first, [lines([1, 2, 3])])["iterations"] == [1, 2, 3]
    metrics = lines([1.0, 3.0])
    metrics[0]["l_p"] = None  # as JSON has what was not finite
    assert report.summarise(last, [metrics], points=1)["l_p"] == [3.0]
