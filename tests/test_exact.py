"""The exact solver, and the Levenberg-Marquardt rule for losses without noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

from mlhf_optax import (
    LevenbergMarquardt,
    Model,
    SquaredError,
    hessian_free,
    scale_by_damped_step,
    scale_by_hessian_free,
)
from mlhf_optax.controllers import Control, Controller, Operators, Product, scheduled
from mlhf_optax.controllers.protocol import PerTensor, accept
from mlhf_optax.curvature import ggn_matvec
from mlhf_optax.solvers import Exact
from mlhf_optax.support.packing import packing_of

pytestmark = pytest.mark.usefixtures("x64")


def direction_of(tx, params, batch):
    grads = jax.jit(jax.grad(problems.mlp_loss))(params, batch)
    direction, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
    return problems.flat(direction), state, problems.flat(grads)


def test_the_matrix_is_that_of_dense_jacobians():
    params, batch = problems.mlp_params(), problems.batch()
    want = references.Model().ggn(problems.flat(params), jax.tree.map(np.asarray, batch))
    for wrap in (lambda f: f, jax.jit):
        got = wrap(lambda p: ggn_matvec(problems.mlp, problems.LOSS, p, batch).matrix)(params)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_the_direction_solves_the_damped_system_to_rounding():
    params, batch = problems.mlp_params(), problems.batch()
    model = Model(problems.mlp, problems.LOSS)
    direction, state, gradient = direction_of(
        scale_by_damped_step(scheduled(1e-6), model, solver=Exact()), params, batch
    )
    matrix = references.Model().ggn(problems.flat(params), jax.tree.map(np.asarray, batch))
    want = np.linalg.solve(matrix + 1e-6 * np.eye(gradient.size), gradient)
    np.testing.assert_allclose(direction, want, rtol=1e-6, atol=1e-9)
    assert float(state.info.cg_residual_norm) < 1e-12
    assert int(state.info.cg_steps) == 1


def test_a_controller_on_vectors_is_told_damping_times_direction():
    """Matrices are written out in the space of trees; what a controller on vectors sees is packed again."""
    seen = []

    def operators(view, signal):
        times = lambda v: 2.0 * v
        sizes = jnp.asarray(view.packing.sizes)
        return Operators(
            Product(PerTensor(jnp.full(len(sizes), 2.0), sizes), times),
            Product(PerTensor(jnp.full(len(sizes), 0.5), sizes), lambda v: v / 2),
            damping_after_preconditioner=lambda r: r,
        )

    def observe(view, outcome, state):
        seen.append([view.packing.unpack(v) for v in (outcome.direction, outcome.damped)])
        return accept(view, outcome, state)

    controller = Controller(
        lambda params: (),
        lambda view, state: Control((), state),
        operators,
        observe,
        packing=lambda params: packing_of(params, 128),
    )
    params, batch = problems.mlp_params(), problems.batch()
    tx = scale_by_damped_step(controller, Model(problems.mlp, problems.LOSS), solver=Exact())
    grads = jax.grad(problems.mlp_loss)(params, batch)
    direction, _ = tx.update(grads, tx.init(params), params, batch=batch)
    matrix = references.Model().ggn(problems.flat(params), jax.tree.map(np.asarray, batch))
    want = np.linalg.solve(matrix + 2 * np.eye(len(matrix)), problems.flat(grads))
    np.testing.assert_allclose(problems.flat(direction), want, rtol=1e-9, atol=1e-12)
    ((kept, damped),) = seen
    np.testing.assert_allclose(problems.flat(kept), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(problems.flat(damped), 2 * want, rtol=1e-9, atol=1e-12)


def test_too_many_parameters_are_an_error_that_says_the_sizes():
    params, batch = problems.mlp_params(), problems.batch()
    count = problems.flat(params).size
    for solver, limit in (
        (Exact(max_parameters=count - 1, space="parameters"), "parameters"),
        (Exact(max_outputs=15), "outputs"),
    ):
        tx = scale_by_hessian_free(Model(problems.mlp, problems.LOSS), solver=solver)
        with pytest.raises(
            ValueError, match=f"26 parameters and 16 outputs; use `PCG`, or raise `max_{limit}`"
        ):
            direction_of(tx, params, batch)
    with pytest.raises(ValueError, match="`max_parameters` must be at least 1"):
        Exact(0)


# Problems with known minima (More, Garbow, Hillstrom 1981): residuals, start, sum of squares at the minimum.

PROBLEMS = {
    "Rosenbrock": (lambda x: [10 * (x[1] - x[0] ** 2), 1 - x[0]], [-1.2, 1.0], 0.0),
    "Freudenstein and Roth": (
        lambda x: [
            -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
            -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1],
        ],
        [0.5, -2.0],
        48.98425,
    ),
    "Powell, badly scaled": (
        lambda x: [1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001],
        [0.0, 1.0],
        0.0,
    ),
    "Brown, badly scaled": (lambda x: [x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2], [1.0, 1.0], 0.0),
    "helical valley": (
        lambda x: [
            10 * (x[2] - 10 * jnp.arctan2(x[1], x[0]) / (2 * jnp.pi)),
            10 * (jnp.sqrt(x[0] ** 2 + x[1] ** 2) - 1),
            x[2],
        ],
        [-1.0, 1e-9, 0.0],
        0.0,
    ),
    "Powell, singular": (
        lambda x: [
            x[0] + 10 * x[1],
            5**0.5 * (x[2] - x[3]),
            (x[1] - 2 * x[2]) ** 2,
            10**0.5 * (x[0] - x[3]) ** 2,
        ],
        [3.0, -1.0, 0.0, 1.0],
        0.0,
    ),
    "Wood": (
        lambda x: [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            10**-0.5 * (x[1] - x[3]),
        ],
        [-3.0, -1.0, -3.0, -1.0],
        0.0,
    ),
    "Brown, almost linear": (
        lambda x: [x[0] + sum(x) - 5, x[1] + sum(x) - 5, x[2] + sum(x) - 5, jnp.prod(jnp.stack(x)) - 1],
        [0.5, 0.5, 0.5, 0.5],
        0.0,
    ),
}


def fit(residuals, start, rule, steps=200):
    """Returns sums of squares before every step, and the last state."""
    predict_fn = lambda p, batch: jnp.stack(residuals([p[name] for name in sorted(p)]))
    loss_fn = lambda z, batch: 0.5 * jnp.sum(z**2)
    tx = hessian_free(1.0, predict_fn, loss_fn, damping=rule, solver=Exact())
    params = {f"x{i}": jnp.asarray(value) for i, value in enumerate(start)}

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, ()), ()))(params)
        updates, state = tx.update(grads, state, params, batch=())
        return (optax.apply_updates(params, updates), state), 2 * loss

    carry, losses = jax.jit(lambda c: jax.lax.scan(step, c, None, steps))((params, tx.init(params)))
    return np.asarray(losses), carry[1][0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_with_known_minima_are_solved_with_nothing_set(name):
    residuals, start, minimum = PROBLEMS[name]
    losses, state = fit(residuals, start, LevenbergMarquardt.without_noise())
    assert losses[-1] <= minimum * (1 + 1e-6) + 1e-15
    # A step that raises the loss is refused, so it never rises, but for the rounding of residuals.
    assert np.all(np.diff(losses) <= np.finfo(float).eps ** 2 * losses[0])
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), state.controller))


def test_a_singular_system_makes_the_damping_grow_until_there_is_a_step():
    """The gradient is finite and nothing is solved: without growth every step would be skipped."""
    residuals = lambda x: [1e3 * (x[0] + x[1] - 1), jnp.sin(x[0] + x[1])]
    rule = LevenbergMarquardt.without_noise(initial_damping=1e-18, min_damping=1e-18)  # lost beside 1
    losses, state = fit(residuals, [3.0, 0.0], rule, steps=100)
    assert losses[1] == losses[0]  # nothing was solved
    assert int(state.count) > 0
    np.testing.assert_allclose(losses[-1], np.sin(1.0) ** 2, rtol=1e-5)  # the sum is 1 but for 1e-6


def test_marquardts_scaling_does_not_depend_on_the_units_of_the_parameters():
    residuals, start, _ = PROBLEMS["Wood"]
    units = [1.0, 1e3, 1e-2, 10.0]
    scaled = lambda x: residuals([value * unit for value, unit in zip(x, units, strict=True)])
    rule = LevenbergMarquardt.without_noise()
    usual, _ = fit(residuals, start, rule, 20)
    other, _ = fit(scaled, [value / unit for value, unit in zip(start, units, strict=True)], rule, 20)
    np.testing.assert_allclose(other, usual, rtol=1e-5, atol=1e-12)


def test_a_refused_step_leaves_the_parameters_and_raises_the_damping():
    predict_fn = lambda p, batch: jnp.arctan(batch["x"] * p)  # from here Gauss-Newton overshoots
    loss_fn, batch = SquaredError(), {"x": jnp.ones(1), "label": jnp.zeros(1)}
    rule = LevenbergMarquardt.without_noise(initial_damping=1e-6)
    tx = hessian_free(1.0, predict_fn, loss_fn, damping=rule, solver=Exact())
    params = jnp.full((1,), 3.0)
    grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
    updates, state = tx.update(grads, tx.init(params), params, batch=batch)
    np.testing.assert_array_equal(updates, 0.0)
    assert float(state[0].controller["damping"]) == pytest.approx(2e-6)
    bold = hessian_free(1.0, predict_fn, loss_fn, damping=1e-6, solver=Exact())
    taken, _ = bold.update(grads, bold.init(params), params, batch=batch)
    assert float(loss_fn(predict_fn(params + taken, batch), batch)) > float(
        loss_fn(predict_fn(params, batch), batch)
    )
