"""The controller with one LSTM per tensor: against a second implementation, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from tensor_lstm_reference import Reference

from mlhf_optax import SoftmaxCrossEntropy, SquaredError, gauss_newton, mlhf
from mlhf_optax.controllers.protocol import View
from mlhf_optax.controllers.tensor_lstm import tensor_lstm
from mlhf_optax.controllers.tensor_network import (
    CONSTANTS,
    OUTPUTS,
    TensorLSTM,
    bounded_controls,
    init_tensor_lstm,
)
from mlhf_optax.support import trees

pytestmark = pytest.mark.usefixtures("unoptimised")


def learned(seed=0, units=4) -> TensorLSTM:
    """Meta-parameters whose outputs depend on everything, as after meta-training."""
    start = init_tensor_lstm(jax.random.key(seed), units)
    keys = jax.random.split(jax.random.key(seed + 1), 3)
    normal = lambda key, like, scale: scale * jax.random.normal(key, like.shape)
    return start._replace(
        readout=normal(keys[0], start.readout, 0.3),
        linear=normal(keys[1], start.linear, 0.1),
        offset=normal(keys[2], start.offset, 0.1),
    )


def predict(params, batch):
    return batch["x"] @ params[1] + params[0]


def linear_problem(key=0, steps=14):
    random = np.random.default_rng(key)
    x = random.standard_normal((steps, 12, 5)).astype(np.float32)
    y = x @ random.standard_normal((5, 3)).astype(np.float32) + 0.3
    params = [
        np.float32(0.1) * np.ones(3, np.float32),
        random.standard_normal((5, 3)).astype(np.float32) * 0.3,
    ]
    return [jnp.asarray(p) for p in params], {"x": jnp.asarray(x), "label": jnp.asarray(y)}


def train(tx, params, batches, loss_fn=SquaredError(), predict_fn=predict):
    """Returns parameters and losses along a scan, and the last state."""

    def step(carry, batch):
        w, state = carry
        loss, g = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(w)
        updates, state = tx.update(g, state, w, batch=batch)
        return (optax.apply_updates(w, updates), state), loss

    return jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), batches))(params)


def test_steps_agree_with_numpy_float64():
    params, batches = linear_problem()
    meta_params = learned()
    tx = mlhf(meta_params, predict, SquaredError(), num_cg_steps=2)
    (w, state), losses = train(tx, params, batches)
    reference = Reference(meta_params, params)
    expected = [reference.step(x, y) for x, y in zip(batches["x"], batches["label"], strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    for got, wanted in zip(w, reference.w, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-4)
    controller = state[0].controller
    np.testing.assert_allclose(controller.damped_share, reference.share, rtol=5e-3)
    np.testing.assert_allclose(controller.hidden, reference.hidden, atol=2e-3)
    assert state[0].info.skipped_steps == 0
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_the_unit_of_the_loss_changes_nothing(scale):
    params, batches = linear_problem()
    results = []
    for factor in (1.0, scale):
        loss_fn = lambda z, b, factor=factor: factor * SquaredError()(z, b)
        tx = mlhf(learned(), predict, loss_fn, num_cg_steps=2)
        results.append(train(tx, params, batches, loss_fn)[0][0])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_the_unit_of_the_parameters_changes_nothing():
    params, batches = linear_problem()
    results = []
    for unit in (1.0, 8.0):
        scaled = lambda p, b, unit=unit: predict([unit * leaf for leaf in p], b)
        tx = mlhf(learned(), scaled, SquaredError(), num_cg_steps=2)
        w = train(tx, [p / unit for p in params], batches, predict_fn=scaled)[0][0]
        results.append([unit * leaf for leaf in w])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_untrained_it_says_the_constants_whatever_it_sees():
    params, batches = linear_problem()
    tx = mlhf(init_tensor_lstm(jax.random.key(0)), predict, SquaredError(), num_cg_steps=2)
    (_, state), losses = train(tx, params, batches)
    assert state[0].controller.rate == pytest.approx(1.0)
    np.testing.assert_allclose(state[0].controller.power, 0.7, rtol=1e-5)
    controller, info = state[0].controller, state[0].info
    units = jnp.array([jnp.sqrt(jnp.mean(v)) for v in controller.square]) / controller.initial_rms
    # Of each tensor in its unit, damping is the same.
    np.testing.assert_allclose(info.damping_max / info.damping_min, units.max() / units.min(), rtol=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def first_damping(params, gradient) -> np.ndarray:
    """Returns the damping of every tensor in the first step of the untrained controller."""
    controller = tensor_lstm(init_tensor_lstm(jax.random.key(0)))
    packing = controller.packing(params)
    view = View(
        params=packing.pack(params),
        gradient=packing.pack(gradient),
        direction=packing.pack(jax.tree.map(jnp.zeros_like, params)),
        residual=(),
        ggn=lambda v: v,
        loss=jnp.ones(()),
        loss_at=lambda w: jnp.ones(()),
        initial_rms=trees.root_mean_square(params),
        is_valid=jnp.array(True),
        packing=packing,
    )
    control = controller.control(view, controller.init(params))
    return np.array(controller.operators(view, control.signal).damping.values.numbers)


def test_damping_has_the_unit_of_its_tensor():
    """A layer counted in units of 1/8 has numbers 8 times as large, and curvature 1/64 as large."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = [0.1 * jax.random.normal(keys[0], (9, 5)), 0.3 * jax.random.normal(keys[1], (5, 4))]
    gradient = [jax.random.normal(keys[2], (9, 5)), 0.2 * jax.random.normal(keys[3], (5, 4))]
    damping = first_damping(params, gradient)
    rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))
    start = CONSTANTS.start_share * CONSTANTS.damping
    of_all = float(trees.root_mean_square(params))
    expected = [start * rms(gradient[0]) / of_all, start * rms(gradient[1]) / rms(params[1])]
    np.testing.assert_allclose(damping, expected, rtol=1e-5)
    other = first_damping([params[0], 8 * params[1]], [gradient[0], gradient[1] / 8])
    np.testing.assert_allclose(other[1], damping[1] / 64, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 1e-3])
def test_a_tensor_that_starts_near_zero_is_measured_by_the_size_of_all(factor):
    params = [jnp.ones((9, 5)), factor * jnp.ones((5, 4))]
    gradient = [jnp.ones((9, 5)), jnp.ones((5, 4))]
    of_large, of_small = first_damping(params, gradient)
    of_all = float(trees.root_mean_square(params))
    np.testing.assert_allclose([of_large, of_small], [2.0, 2.0 / of_all], rtol=1e-5)


def test_a_tensor_without_gradient_has_damping_above_zero():
    damping = first_damping([jnp.ones((9, 5)), jnp.ones((5, 4))], [jnp.ones((9, 5)), jnp.zeros((5, 4))])
    assert np.all(np.isfinite(1 / damping))
    nothing = first_damping([jnp.zeros(3), jnp.zeros(2)], [jnp.zeros(3), jnp.zeros(2)])
    assert np.all(np.isfinite(1 / nothing))


def test_layers_in_other_units_train_about_as_well():
    """With one unit of damping for all tensors the last of these ends with 25 times the loss."""
    build = lambda predict_fn: mlhf(
        init_tensor_lstm(jax.random.key(0)), predict_fn, SquaredError(), num_cg_steps=2
    )
    usual, others = problems.losses_in_units(build)
    assert np.all(others < 8 * usual)


def test_what_it_says_is_bounded_for_any_outputs():
    for sign in (1, -1):
        said = bounded_controls(jnp.full((2, OUTPUTS), sign * 1e3))
        for values in said:
            assert np.all(np.isfinite(values))
            assert np.all(values >= 0)
        assert 10 / 31 <= said.damping[0] <= 310
        assert 0 <= said.rate <= 1.5
        assert said.memory >= 1


def any_network(params, batch):
    """A scalar, a vector, a matrix, a stack of matrices used by a scan, and a tensor of rank 4."""
    x = jnp.einsum("bi,ijkl->bjkl", batch["x"], params["rank4"]).reshape(len(batch["x"]), -1)
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stacked"])
    return params["scalar"] * (x @ params["matrix"]) + params["vector"]


def any_params(key, dtype=jnp.float32):
    shapes = {"rank4": (5, 2, 2, 2), "stacked": (3, 8, 8), "matrix": (8, 3), "vector": (3,)}
    keys = jax.random.split(key, len(shapes))
    random = {n: 0.4 * jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return random | {"scalar": jnp.ones((), dtype)}


def test_it_trains_tensors_of_every_rank_under_vmap_as_alone():
    _, batches = linear_problem(steps=12)
    batches["label"] = jnp.argmax(batches["label"], -1)
    loss_fn = SoftmaxCrossEntropy()
    tx = mlhf(learned(), any_network, loss_fn, num_cg_steps=2, curvature_batch_size=0.5)
    run = lambda key: train(tx, any_params(key), batches, loss_fn, any_network)
    keys = jax.random.split(jax.random.key(3), 2)
    (w, state), losses = jax.vmap(run)(keys)
    alone, _ = run(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=2e-3, atol=1e-3), w, alone[0])
    assert np.all(state[0].info.skipped_steps == 0)
    assert np.all(losses[:, -1] < losses[:, 0])


@pytest.mark.parametrize(
    "build",
    [
        lambda predict_fn: mlhf(learned(), predict_fn, SquaredError(), num_cg_steps=2),
        lambda predict_fn: gauss_newton(1.0, predict_fn, SquaredError(), metric="kronecker"),
    ],
)
def test_parameters_without_a_matrix_train_under_vmap(build):
    batches = {"x": jnp.ones((30, 4, 1)), "label": jnp.arange(3.0) * jnp.ones((30, 4, 3))}
    tx = build(lambda w, batch: w * batch["x"])
    run = lambda w: train(tx, w, batches, predict_fn=lambda w, batch: w * batch["x"])[1]
    losses = jax.vmap(run)(jnp.ones((2, 3)) * jnp.array([[1.0], [2.0]]))
    assert np.all(losses[:, -1] < 0.2 * losses[:, 0])


def test_bfloat16_parameters_have_statistics_in_float32():
    params = any_params(jax.random.key(0), jnp.bfloat16)
    state = tensor_lstm(learned()).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    _, batches = linear_problem(steps=3)
    tx = mlhf(learned(), any_network, SquaredError(), num_cg_steps=2)
    (w, _), losses = train(tx, params, batches, predict_fn=any_network)
    assert {leaf.dtype for leaf in jax.tree.leaves(w)} == {jnp.dtype("bfloat16")}
    assert np.all(np.isfinite(losses))


def test_a_bad_gradient_is_skipped_and_leaves_the_state():
    params, batches = linear_problem()
    tx = mlhf(learned(), predict, SquaredError(), num_cg_steps=2)
    (w, state), _ = train(tx, params, batches)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    bad = [jnp.full_like(p, jnp.nan) for p in w]
    updates, after = tx.update(bad, state, w, batch=batch)
    assert all(np.all(u == 0) for u in updates)
    kept = lambda of: (of[0].controller, of[0].direction)
    jax.tree.map(np.testing.assert_array_equal, kept(after), kept(state))
    assert after[0].info.skipped_steps == 1


@pytest.mark.parametrize("field", TensorLSTM._fields)
def test_a_network_that_is_not_finite_moves_nothing_and_leaves_the_state(field):
    meta_params = learned()
    meta_params = meta_params._replace(**{field: getattr(meta_params, field).at[0].set(jnp.nan)})
    params, batches = linear_problem(steps=1)
    tx = mlhf(meta_params, predict, SquaredError(), num_cg_steps=2)
    end, (state, *_) = train(tx, params, batches)[0]
    assert int(state.info.skipped_steps) == 1
    before = tx.init(params)[0].controller
    jax.tree.map(np.testing.assert_array_equal, (end, state.controller), (params, before))


def test_a_schedule_bounds_the_learned_rate():
    params, batches = linear_problem()
    make = lambda rate: mlhf(learned(), predict, SquaredError(), learning_rate=rate, num_cg_steps=2)
    # All ones is no bound, as the number is.
    for one, other in zip(
        *(train(make(rate), params, batches)[0][0] for rate in (1.0, lambda t: 1.0)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    rate = float(train(make(1.0), params, batches)[0][1][0].controller.rate)
    before = jax.tree.map(lambda leaf: leaf[:13], batches)
    start = train(make(1.0), params, before)[0][0]
    for factor in (0.9 * rate, 0.1 * rate, 0.0):  # a rate is at most 1.5 times the schedule
        schedule = lambda t, factor=factor: jnp.where(t < 13, 1.0, factor)
        (w, state), _ = train(make(schedule), params, batches)
        assert state[0].controller.rate == pytest.approx(min(rate, 1.5 * factor), rel=1e-4)
        moved = [a - b for a, b in zip(w, start, strict=True)]
        expected = [-min(rate, 1.5 * factor) * d for d in state[0].direction]
        for one, other in zip(moved, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_no_unit_is_refused():
    with pytest.raises(ValueError, match="`units` must be at least 1, got 0"):
        init_tensor_lstm(jax.random.key(0), 0)
