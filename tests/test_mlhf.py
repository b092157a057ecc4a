"""The transformation against Algorithm 1 in NumPy, its options and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

from mlhf_optax import (
    PAPER_SETTINGS,
    Model,
    Settings,
    SquaredError,
    init_meta_params,
    layer_types,
    mlhf,
    scale_by_mlhf,
)
from mlhf_optax.controllers.lstm_settings import (
    Divide,
    Exponential,
    LogFeatures,
    Multiply,
    TanhFeatures,
    Unit,
)

# With those of test_mlhf_gradient.py they cover every kind of every setting.
SETTINGS = {
    "paper": PAPER_SETTINGS,
    "shared-multiply": Settings(
        features=LogFeatures(log_range=7.0),
        preconditioner=Multiply(),
        initial_preconditioner=0.1,
        damping_floor=1e-2,
        unit=Unit(gradient_power=0.5, parameter_power=0.7),
    ),
    "tanh-current": Settings(
        features=TanhFeatures(),
        initial_damping=10.0,
        output=Exponential(1.0),
        preconditioner=Divide(),
        sees_current_residual=True,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_steps_agree_with_algorithm_1_in_numpy(x64, name):
    max_update_ratio = 0.05 if name == "paper" else None
    meta_params = problems.random_meta_params(SETTINGS[name], units=(3, 2) if name == "paper" else (2,))
    meta_params = jax.tree.map(lambda x: x.astype(jnp.float64), meta_params)
    params, batches = problems.mlp_params(), problems.batches(10)
    expected = references.naive_mlhf(
        meta_params,
        references.Model(),
        problems.flat(params),
        batches,
        learning_rate=0.7,
        max_update_ratio=max_update_ratio,
    )
    tx = mlhf(
        meta_params,
        problems.mlp,
        problems.LOSS,
        learning_rate=0.7,
        max_update_ratio=max_update_ratio,
        carry_dtype=jnp.float64,
        unroll=1,
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5)  # the statistics are float32
    steps = problems.training_steps(tx, params, batches, problems.mlp_loss)
    for (params, state, loss), reference in zip(steps, expected, strict=True):
        own, info = state[0], state[0].info
        close(loss, reference.loss)
        close(problems.flat(own.direction), reference.direction)
        close(problems.flat(own.residual), reference.residual)
        close(problems.flat(params), reference.w_next)
        for field, values in (("damping", reference.damping), ("preconditioner", reference.preconditioner)):
            for statistic in ("min", "mean", "max"):
                near(getattr(info, f"{field}_{statistic}"), getattr(values, statistic)())
        near(info.loss, reference.loss)
        near(info.descent, reference.direction @ reference.gradient)
        near(info.cg_residual_norm, np.linalg.norm(reference.residual))
        assert (int(info.cg_steps), int(info.skipped_steps)) == (4, 0)
    assert int(state[0].count) == 10


# Options.


META_PARAMS = problems.random_meta_params(units=(2,))


def make(learning_rate=1.0, **kwargs):
    return mlhf(META_PARAMS, problems.linear, problems.LOSS, learning_rate=learning_rate, unroll=1, **kwargs)


def run(tx, num_steps=6, batch=None):
    """Parameters, last state and the losses of a training on one batch."""
    batches = [problems.batch() if batch is None else batch] * num_steps
    steps = problems.training_steps(tx, problems.linear_params(dtype=jnp.float32), batches)
    params, states, losses = zip(*steps, strict=True)
    return params[-1]["kernel"], states[-1], losses


def test_curvature_on_part_of_the_batch_is_that_of_the_part():
    batch = problems.batch()
    doubled = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)  # same gradient, same curvature
    whole, _, _ = run(make(), 3, batch)
    for part in (0.5, lambda b: jax.tree.map(lambda x: x[1::2], b)):
        half, _, _ = run(make(curvature_batch_size=part), 3, doubled)
        np.testing.assert_allclose(half, whole, rtol=1e-3)
    other, _, _ = run(make(curvature_batch_size=2), 3, doubled)
    assert not np.allclose(other, whole, rtol=1e-2)


def test_low_precision_carries_change_the_state_and_hardly_the_training():
    _, state, losses = run(make(carry_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].controller)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(losses, run(make())[2], rtol=0.05)


def test_weight_decay_is_added_to_the_direction():
    before = problems.linear_params(dtype=jnp.float32)["kernel"]
    plain, decayed = (run(make(0.5, weight_decay=x, max_update_ratio=None), 1)[0] for x in (0.0, 0.1))
    np.testing.assert_allclose(decayed, plain - 0.5 * 0.1 * before, rtol=1e-5)


def test_a_training_on_one_stiff_batch_is_not_stuck_after_a_skipped_step():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 20)) * np.geomspace(1.0, 100.0, 20)
    batch = {"x": jnp.asarray(features), "label": jnp.asarray(features @ rng.normal(size=(20, 1)))}
    predict_fn, loss_fn = lambda p, b: b["x"] @ p["kernel"], SquaredError()
    meta_params = problems.random_meta_params(seed=1)
    tx = mlhf(meta_params, predict_fn, loss_fn, max_update_ratio=None, unroll=1)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    params = {"kernel": jnp.zeros((20, 1))}
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=200))
    (_, state), losses = train((params, tx.init(params)))
    assert 0 < int(state[0].info.skipped_steps) < 100
    assert losses[-1] < 1e-3 * losses[20] < 1e-3 * losses[0]


def test_more_cg_steps_leave_less_of_the_residual():
    norms = [float(run(make(num_cg_steps=k), 1)[1][0].info.cg_residual_norm) for k in (1, 4)]
    assert norms[0] > 4 * norms[1]


def test_the_layer_types_may_be_given():
    params = {"table": jnp.full((3, 2), 0.1)}
    predict_fn = lambda p, batch: batch["image"] @ p["table"]
    batch = problems.batch()
    with pytest.raises(ValueError, match=r"parameter 'table' of shape \(3, 2\).*`layer_types_fn="):
        scale_by_mlhf(META_PARAMS, Model(predict_fn, problems.LOSS)).init(params)
    rules = functools.partial(layer_types, rules={"table": "dense_kernel"})
    tx = scale_by_mlhf(META_PARAMS, Model(predict_fn, problems.LOSS), layer_types_fn=rules, unroll=1)
    named = scale_by_mlhf(META_PARAMS, Model(problems.linear, problems.LOSS), unroll=1)
    update = lambda tx, params: jax.jit(tx.update)(params, tx.init(params), params, batch=batch)
    direction, _ = update(tx, params)
    want, _ = update(named, {"kernel": params["table"]})
    np.testing.assert_allclose(direction["table"], want["kernel"], rtol=1e-5)


def test_damping_of_the_dimension_of_curvature_does_not_depend_on_the_scale_of_the_parameters(x64):
    # Untrained LSTMs see nothing, so all that is left is the unit of s and P.
    settings = Settings(unit=Unit(parameter_power=1.0), initial_damping=4.0)
    meta_params = init_meta_params(jax.random.key(0), settings, layer_types=["dense_kernel"], units=(2,))
    build = lambda predict_fn: scale_by_mlhf(meta_params, Model(predict_fn, problems.LOSS), unroll=1)
    one, tenth = (problems.rescaled_direction(build, scale) for scale in (1.0, 0.1))
    np.testing.assert_allclose(tenth, one, rtol=1e-9)


# Errors.


def test_meta_parameters_that_do_not_know_a_layer_type_are_an_error():
    meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel", "conv_kernel"])
    message = r"layer types \['dense_bias'\].*trained for \['conv_kernel', 'dense_kernel'\].*`layer_types_fn="
    with pytest.raises(ValueError, match=message):
        scale_by_mlhf(meta_params, Model(problems.mlp, problems.LOSS)).init(problems.mlp_params())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"meta_params": {}}, TypeError, r"`meta_params` must be what `load_pretrained.*, got dict"),
        ({"predict_fn": "mlp"}, TypeError, "`predict_fn` must be a function, got str"),
        ({"loss_fn": None}, TypeError, "`loss_fn` must be a function, got NoneType"),
        ({"num_cg_steps": 4.0}, TypeError, "`num_cg_steps` must be a Python int"),
        ({"num_cg_steps": 0}, ValueError, "`num_cg_steps` must be at least 1"),
        ({"curvature_batch_size": 1.5}, ValueError, "`curvature_batch_size` as a fraction"),
        ({"max_update_ratio": 0.0}, ValueError, "`max_update_ratio` must be a positive number"),
        ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), or None, got 1.0"),
    ],
)
def test_an_argument_of_a_wrong_type_or_range_is_an_error_that_names_it(wrong, error, message):
    arguments = {"meta_params": META_PARAMS, "predict_fn": problems.mlp, "loss_fn": problems.LOSS}
    with pytest.raises(error, match=message):
        mlhf(**arguments | wrong)


def test_the_old_order_of_arguments_is_an_error_that_says_what_changed():
    predict_fn, loss_fn = problems.mlp, problems.LOSS
    for args, named in (
        ((1.0, None, predict_fn, loss_fn), {}),
        ((1.0,), {"meta_params": None, "predict_fn": predict_fn, "loss_fn": loss_fn}),
    ):
        with pytest.raises(TypeError, match="learning rate of `mlhf` is a keyword"):
            mlhf(*args, **named)
