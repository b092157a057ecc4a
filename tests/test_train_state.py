"""Flax training states: linen with `TrainState`, nnx with its own `Optimizer`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state as flax_train_state

from mlhf_optax import SoftmaxCrossEntropy, TrainState, gauss_newton

pytestmark = pytest.mark.usefixtures("unoptimised")

LOSS = SoftmaxCrossEntropy()
BATCH = {"image": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), "label": np.arange(8) % 2}


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.tanh(x))


def dense_state(make_optimizer):
    model = Dense()
    predict_fn = lambda params, batch: model.apply({"params": params}, batch["image"])
    params = model.init(jax.random.key(0), BATCH["image"])["params"]
    return predict_fn, TrainState.create(apply_fn=model.apply, params=params, tx=make_optimizer(predict_fn))


def ours(predict_fn):
    """An optimizer that needs the batch, the one that compiles fastest."""
    return gauss_newton(1.0, predict_fn, LOSS, damping=0.1, num_cg_steps=2, unroll=1)


OPTIMIZERS = {
    "ours": ours,
    "adam": lambda predict_fn: optax.adam(0.05),
    "ours in MultiSteps": lambda predict_fn: optax.MultiSteps(ours(predict_fn), 2),
    "ours in a MultiSteps transformation": lambda predict_fn: optax.MultiSteps(
        ours(predict_fn), 2
    ).gradient_transformation(),
    "adam in MultiSteps": lambda predict_fn: optax.MultiSteps(optax.adam(0.1), 2),
    "without extra arguments": lambda predict_fn: optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (optax.tree.scale(-0.5, updates), state)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_linen_training_with_any_optimizer_compiles_once_and_learns(name):
    predict_fn, state = dense_state(OPTIMIZERS[name])
    compilations = []

    @jax.jit
    def step(state, batch):
        compilations.append(1)
        loss, grads = jax.value_and_grad(lambda p: LOSS(predict_fn(p, batch), batch))(state.params)
        return state.apply_gradients(grads=grads, batch=batch), loss

    losses = []
    for _ in range(6):
        state, loss = step(state, BATCH)
        losses.append(float(loss))
    assert len(compilations) == 1
    assert int(state.step) == 6
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "ours" in name])
def test_the_steps_are_those_of_calling_the_optimizer_by_hand(name):
    _, state = dense_state(OPTIMIZERS[name])
    grads = jax.tree.map(jnp.ones_like, state.params)
    by_hand = jax.jit(lambda *arguments: state.tx.update(grads, *arguments, batch=BATCH))
    by_state = jax.jit(lambda state: state.apply_gradients(grads=grads, batch=BATCH))
    params, opt_state, got = state.params, state.opt_state, state
    for _ in range(2):
        updates, opt_state = by_hand(opt_state, params)
        params = optax.apply_updates(params, updates)
        got = by_state(got)
    # Two programs: their roundings may differ.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (got.params, got.opt_state), (params, opt_state))
    assert got.tx is state.tx
    assert got.apply_fn is state.apply_fn


def test_without_a_batch_it_is_the_state_of_flax():
    _, state = dense_state(OPTIMIZERS["adam"])
    grads = jax.tree.map(jnp.ones_like, state.params)
    fields = {"apply_fn": state.apply_fn, "params": state.params, "tx": state.tx}
    flax_state = flax_train_state.TrainState.create(**fields).apply_gradients(grads=grads)
    jax.tree.map(np.testing.assert_array_equal, state.apply_gradients(grads=grads).params, flax_state.params)
    with pytest.raises(TypeError, match=r"needs the batch.*`apply_gradients\(grads=grads, batch=batch\)`"):
        dense_state(OPTIMIZERS["ours"])[1].apply_gradients(grads=grads)


class NormedState(TrainState):
    batch_stats: Any
    batch: Any = None  # a field of this name must not swallow the batch


def test_batch_statistics_ride_in_the_batch_and_are_replaced_as_in_flax():
    model = Normed()
    variables = model.init(jax.random.key(0), BATCH["image"])

    def forward(params, batch):
        variables = {"params": params, **batch["model_state"]}
        return model.apply(variables, batch["image"], mutable=["batch_stats"])

    tx = ours(lambda params, batch: forward(params, batch)[0])
    state = NormedState.create(
        apply_fn=model.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"]
    )

    compilations = []

    @jax.jit
    def step(state, batch):
        compilations.append(1)
        batch = {**batch, "model_state": {"batch_stats": state.batch_stats}}

        def loss_fn(params):
            outputs, new_model_state = forward(params, batch)
            return LOSS(outputs, batch), new_model_state["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch=batch, batch_stats=batch_stats), loss

    losses = []
    for _ in range(6):
        state, loss = step(state, BATCH)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(state, NormedState)
    assert state.batch is None
    mean = state.batch_stats["BatchNorm_0"]["mean"]
    assert not np.allclose(mean, variables["batch_stats"]["BatchNorm_0"]["mean"])
    assert len(compilations) == 1


def test_a_replaced_optimizer_stays_replaced():
    _, state = dense_state(OPTIMIZERS["adam"])
    other = optax.sgd(0.1)
    grads = jax.tree.map(jnp.ones_like, state.params)
    assert state.apply_gradients(grads=grads, batch=BATCH, tx=other).tx is other


def test_parameters_that_are_overwritten_by_their_gradient_stay_out_of_the_optimizer():
    _, state = dense_state(OPTIMIZERS["ours"])
    params = {"params": state.params, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(2)}}
    grads = jax.tree.map(jnp.ones_like, state.params)
    whole = TrainState.create(apply_fn=state.apply_fn, params=params, tx=state.tx)
    whole_grads = {"params": grads, OVERWRITE_WITH_GRADIENT: {"scale": jnp.full(2, 7.0)}}
    apply = jax.jit(lambda state, grads: state.apply_gradients(grads=grads, batch=BATCH))
    new = apply(whole, whole_grads)
    np.testing.assert_array_equal(new.params[OVERWRITE_WITH_GRADIENT]["scale"], [7.0, 7.0])
    want = apply(state, grads).params
    jax.tree.map(np.testing.assert_array_equal, new.params["params"], want)


# nnx.


class NnxNet(nnx.Module):
    def __init__(self, rngs, *, norm):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs) if norm else None
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        return self.second(nnx.tanh(x if self.norm is None else self.norm(x)))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_the_nnx_optimizer_takes_the_batch_as_it_is(norm):
    model = NnxNet(nnx.Rngs(0), norm=norm)
    graphdef, _, _ = nnx.split(model, nnx.Param, ...)

    def predict_fn(params, batch):
        return nnx.merge(graphdef, params, batch["model_state"])(batch["image"])

    optimizer = nnx.Optimizer(model, ours(predict_fn), wrt=nnx.Param)
    compilations = []

    @nnx.jit
    def step(model, optimizer, batch):
        compilations.append(1)
        # The state before the forward pass, which moves the running averages on.
        model_state = nnx.state(model, nnx.Not(nnx.Param))
        model_state = jax.tree.map(lambda x: x, model_state)
        loss, grads = nnx.value_and_grad(lambda m: LOSS(m(batch["image"]), batch))(model)
        optimizer.update(model, grads, batch={**batch, "model_state": model_state})
        return loss

    losses = [float(step(model, optimizer, BATCH)) for _ in range(6)]
    assert len(compilations) == 1
    assert losses[-1] < 0.9 * losses[0]
    if norm:
        assert np.abs(model.norm.mean.get_value()).max() > 0
