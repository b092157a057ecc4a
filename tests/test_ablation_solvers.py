"""The solvers of the ablation against dense systems, for a linear classifier, whose Hessian is its GGN."""

import ablation_solvers as script
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blobs import TASK
from jax.flatten_util import ravel_pytree
from references import naive_pcg

from mlhf_optax import Settings, init_meta_params, layer_types, meta_training
from mlhf_optax.controls import damping_values, preconditioner_values
from mlhf_optax.curvature import ggn_matvec
from mlhf_optax.mlhf_step import mlhf_step, start_vector

pytestmark = pytest.mark.usefixtures("x64")


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
    optimizer = meta_training.mlhf_optimizer().build(meta_params, TASK)
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
    g, d0 = (np.asarray(ravel_pytree(tree)[0]) for tree in (gradient, start_vector(state)))
    hessian = np.asarray(jax.hessian(lambda x: loss(unravel(x)))(flat))
    ggn = ggn_matvec(TASK.predict_fn, TASK.loss_fn, params, batch)
    step = mlhf_step(meta_params, layer_types(params), ggn, gradient, state, 1)
    settings, silence = meta_params.settings, jax.tree.map(jnp.zeros_like, gradient)
    s = damping_values(settings, step.controls.damping, step.unit)
    learned, silent = (
        np.asarray(ravel_pytree(preconditioner_values(settings, output, step.unit, s))[0])
        for output in (step.controls.preconditioner, silence)
    )
    damping = np.asarray(ravel_pytree(s)[0])
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
