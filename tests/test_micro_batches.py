"""Micro-batches, rematerialised and scanned layers: the values are those of the plain computation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import nnx

from mlhf_optax import TrainState, gauss_newton, ggn_matvec, mlhf, over_micro_batches
from mlhf_optax.controllers.tensor_network import init_tensor_lstm

pytestmark = pytest.mark.usefixtures("unoptimised")

COUNT = 4
WHOLE = problems.batch(size=8 * COUNT)
MICRO = jax.tree.map(lambda x: x.reshape(COUNT, 8, *x.shape[1:]), WHOLE)
PLAIN = problems.mlp, problems.LOSS
PARAMS = problems.mlp_params(dtype=jnp.float32)
VECTOR = problems.mlp_params(seed=3, dtype=jnp.float32)


def close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def plain_loss(outputs, batch):
    """A loss without curvature in closed form."""
    return problems.LOSS(outputs, batch)


def quick(predict_fn, loss_fn, **kwargs):
    """The optimizer that compiles fastest."""
    return gauss_newton(1.0, predict_fn, loss_fn, damping=0.1, num_cg_steps=2, unroll=1, **kwargs)


def general(predict_fn, loss_fn):
    meta_params = init_tensor_lstm(jax.random.key(0))
    return mlhf(meta_params, predict_fn, loss_fn, num_cg_steps=2)


def gradient_of(model, params, batch):
    predict_fn, loss_fn = model
    return jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)


def steps_of(tx, params, batches, grads_of, count=2):
    """Parameters after some steps, each of several calls with a batch."""

    @jax.jit
    def call(params, state, gradient_batch, batch):
        updates, state = tx.update(grads_of(params, gradient_batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(count):
        for gradient_batch, batch in batches:
            params, state = call(params, state, gradient_batch, batch)
    return params


def micro(index):
    return jax.tree.map(lambda x: x[index], MICRO)


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("loss_fn", [problems.LOSS, plain_loss], ids=["closed form", "differentiated"])
def test_loss_gradient_and_product_of_micro_batches_are_those_of_the_whole_batch(loss_fn, remat):
    several = over_micro_batches(problems.mlp, loss_fn, remat=remat)
    whole = problems.mlp, loss_fn
    close(several[1](several[0](PARAMS, MICRO), MICRO), loss_fn(problems.mlp(PARAMS, WHOLE), WHOLE))
    close(gradient_of(several, PARAMS, MICRO), gradient_of(whole, PARAMS, WHOLE))
    close(ggn_matvec(*several, PARAMS, MICRO)(VECTOR), ggn_matvec(*whole, PARAMS, WHOLE)(VECTOR))


@pytest.mark.parametrize("make", [quick, general])
def test_steps_over_micro_batches_are_those_of_the_whole_batch(make):
    several = over_micro_batches(*PLAIN)
    got = steps_of(make(*several), PARAMS, [(MICRO, MICRO)], lambda p, b: gradient_of(several, p, b))
    want = steps_of(make(*PLAIN), PARAMS, [(WHOLE, WHOLE)], lambda p, b: gradient_of(PLAIN, p, b))
    close(got, want, 1e-3, 1e-4)


@pytest.mark.parametrize("make", [quick, general])
def test_multi_steps_takes_curvature_on_all_micro_batches_if_it_gets_them(make):
    several = over_micro_batches(*PLAIN)
    calls = [(micro(index), MICRO) for index in range(COUNT)]
    grads_of = lambda p, b: gradient_of(PLAIN, p, b)
    got = steps_of(optax.MultiSteps(make(*several), COUNT), PARAMS, calls, grads_of)
    want = steps_of(make(*PLAIN), PARAMS, [(WHOLE, WHOLE)], grads_of)
    close(got, want, 1e-3, 1e-4)


def test_multi_steps_takes_curvature_of_the_general_optimizer_on_the_last_micro_batch():
    calls = [(micro(index), micro(index)) for index in range(COUNT)]
    grads_of = lambda p, b: gradient_of(PLAIN, p, b)
    got = steps_of(optax.MultiSteps(general(*PLAIN), COUNT), PARAMS, calls, grads_of)
    want = steps_of(general(*PLAIN), PARAMS, [(WHOLE, micro(COUNT - 1))], grads_of)
    close(got, want, 1e-3, 1e-4)


@pytest.mark.parametrize(("part", "taken"), [(2, slice(0, 2)), (0.5, slice(0, None, 2))])
def test_the_size_of_the_curvature_batch_counts_micro_batches(part, taken):
    several = over_micro_batches(*PLAIN)
    part = quick(*several, curvature_batch_size=part)
    first = jax.tree.map(lambda x: x[taken], MICRO)
    grads = gradient_of(several, PARAMS, MICRO)
    got = part.update(grads, part.init(PARAMS), PARAMS, batch=MICRO)[0]
    tx = quick(*several)
    close(got, tx.update(grads, tx.init(PARAMS), PARAMS, batch=first)[0])


def test_what_all_micro_batches_share_is_named():
    shift = lambda params, batch: problems.mlp(params, batch) + batch["stats"]["shift"]
    stats = {"stats": {"shift": jnp.array([0.5, -0.5])}}
    several = over_micro_batches(shift, problems.LOSS, shared=("stats",))
    got = ggn_matvec(*several, PARAMS, {**MICRO, **stats})(VECTOR)
    close(got, ggn_matvec(shift, problems.LOSS, PARAMS, {**WHOLE, **stats})(VECTOR))
    with pytest.raises(ValueError, match="`shared` names stats, but the batch is image, label"):
        several[0](PARAMS, MICRO)
    with pytest.raises(ValueError, match="must begin with the axis of micro-batches, got shapes"):
        over_micro_batches(*PLAIN)[0](PARAMS, {**MICRO, "scale": jnp.ones(3)})
    with pytest.raises(TypeError, match="`shared` must be names"):
        over_micro_batches(*PLAIN, shared="stats")


def test_only_one_micro_batch_is_in_the_model_at_a_time():
    """Memory that a gradient and a GGN product take beside their arguments, in a network of wide layers."""

    def model(params, batch):
        x = batch["x"]
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    params = [jnp.zeros((64, 64))] * 6
    batch = {"x": jnp.zeros((16, 64, 64)), "label": jnp.zeros((16, 64), int)}

    def memory(remat):
        predict_fn, loss_fn = over_micro_batches(model, problems.LOSS, remat=remat)

        def both(params, batch):
            grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
            return grads, ggn_matvec(predict_fn, loss_fn, params, batch)(params)

        return jax.jit(both).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert memory(True) < 0.5 * memory(False)


# Layers that are recomputed or scanned.


class Deep(nn.Module):
    """Three equal layers, plain, recomputed, or as one that is scanned."""

    kind: str

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.kind == "remat" else Layer
        if self.kind == "scan":
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(layer, length=3, **axes)(name="layers")(x, None)
        else:
            for number in range(3):
                x, _ = layer(name=f"layer_{number}")(x, None)
        return nn.Dense(2, name="last")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(3)(x)), None


def state_of(kind, params, make=quick):
    model = Deep(kind)
    predict_fn = lambda params, batch: model.apply({"params": params}, batch["image"])
    return predict_fn, TrainState.create(
        apply_fn=model.apply, params=params, tx=make(predict_fn, problems.LOSS)
    )


def stacked(params):
    """The parameters of separate layers as those of scanned ones."""
    layers = [params[f"layer_{number}"] for number in range(3)]
    return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), "last": params["last"]}


def trained(kind, params, make=quick):
    predict_fn, state = state_of(kind, params, make)

    @jax.jit
    def step(state, batch):
        grads = gradient_of((predict_fn, problems.LOSS), state.params, batch)
        return state.apply_gradients(grads=grads, batch=batch)

    for _ in range(2):
        state = step(state, WHOLE)
    return state.params


START = Deep("plain").init(jax.random.key(0), WHOLE["image"])["params"]


@pytest.mark.parametrize("make", [quick, general])
def test_recomputed_layers_take_the_steps_of_plain_ones(make):
    close(trained("remat", START, make), trained("plain", START, make), 1e-3, 1e-5)


def test_scanned_layers_take_the_steps_of_plain_ones():
    close(trained("scan", stacked(START)), stacked(trained("plain", START)), 1e-3, 1e-5)


def test_the_general_optimizer_trains_scanned_layers():
    predict_fn, _ = state_of("scan", stacked(START))
    loss = lambda params: problems.LOSS(predict_fn(params, WHOLE), WHOLE)
    assert loss(trained("scan", stacked(START), general)) < 0.98 * loss(stacked(START))


def test_nnx_takes_multi_steps():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(jnp.copy, params)  # the optimizer changes the model's own
    predict_fn = lambda params, batch: nnx.merge(graphdef, params)(batch["image"])
    tx = quick(predict_fn, problems.LOSS)
    optimizer = nnx.Optimizer(model, optax.MultiSteps(tx, COUNT), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(lambda m: problems.LOSS(m(batch["image"]), batch))(model)
        optimizer.update(model, grads, batch=batch)

    for index in range(COUNT):
        step(model, optimizer, micro(index))
    grads = gradient_of((predict_fn, problems.LOSS), params, WHOLE)
    updates, _ = tx.update(grads, tx.init(params), params, batch=micro(COUNT - 1))
    close(nnx.state(model, nnx.Param), optax.apply_updates(params, updates), 1e-4)
