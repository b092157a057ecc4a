"""Parameters or activations of 16 bits, and losses that are scaled, against float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlhf_optax import SoftmaxCrossEntropy, gauss_newton, ggn_matvec, load_pretrained

pytestmark = pytest.mark.usefixtures("unoptimised")

LOSS = SoftmaxCrossEntropy()
STEPS = 10


def layer(rng, m, n):
    return {
        "kernel": jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(m), jnp.float32),
        "bias": jnp.zeros(n),
    }


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"Dense_0": layer(rng, 16, 32), "Dense_1": layer(rng, 32, 8)}
    return jax.tree.map(lambda w: w.astype(dtype), params)


def examples(size=64):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(size, 16)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray((image @ rng.normal(size=(16, 8))).argmax(1))}


BATCH = examples()


def model(dtype):
    """A network that computes in a dtype, whatever that of its parameters."""

    def predict_fn(params, batch):
        x, params = batch["image"].astype(dtype), jax.tree.map(lambda w: w.astype(dtype), params)
        x = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]

    return predict_fn


def scaled_loss(outputs, batch):
    return batch["scale"] * LOSS(outputs, batch)


def general(predict_fn, loss_fn):
    return load_pretrained().optimizer(predict_fn, loss_fn, curvature_batch_size=None)


def newton(predict_fn, loss_fn):
    return gauss_newton(1.0, predict_fn, loss_fn, unroll=1)


def kronecker(predict_fn, loss_fn):
    return gauss_newton(
        1.0, predict_fn, loss_fn, metric="kronecker", damping=10, gradient_decay=0.86, num_cg_steps=2
    )


@functools.cache
def optimizer_and_step(make, dtype):
    predict_fn = model(dtype)
    tx = make(predict_fn, scaled_loss)

    @jax.jit
    def step(params, state, batch):
        loss_of = lambda p: scaled_loss(predict_fn(p, batch), batch)
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss, updates

    return tx, step


def run(make, params_dtype=jnp.float32, dtype=jnp.float32, scale=1.0):
    """The first update, the state and the loss before every step, over the scale."""
    tx, step = optimizer_and_step(make, dtype)
    params, batch = start(params_dtype), {**BATCH, "scale": jnp.float32(scale)}
    state, losses, first = tx.init(params), [], None
    for _ in range(STEPS):
        params, state, loss, updates = step(params, state, batch)
        losses.append(float(loss) / scale)
        first = updates if first is None else first
    return first, state, np.array(losses)


def distance(tree, other):
    """Norm of the difference as a share of the norm of the other."""
    difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), tree, other)
    return float(optax.tree.norm(difference) / optax.tree.norm(other))


@pytest.mark.parametrize("make", [newton, kronecker, general])
def test_bfloat16_is_close_to_float32_and_a_scaled_loss_changes_nothing(make):
    first, _, losses = run(make)
    assert losses[-1] < 0.8 * losses[0]
    # bfloat16 has 8 bits: a rounding is up to 0.4 %, and a direction is made of some in a row. The first
    # steps of the learned controller have little damping, which makes more of an error of flat directions.
    tolerance = 0.25 if make is general else 0.1
    for params_dtype, dtype in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.bfloat16)):
        low_first, state, low_losses = run(make, params_dtype, dtype)
        assert distance(low_first, first) < tolerance
        np.testing.assert_allclose(low_losses, losses, rtol=0.05)
        info = optax.tree.get(state, "info")
        assert int(info.skipped_steps) == 0
        assert {leaf.dtype for leaf in info} == {jnp.dtype("float32"), jnp.dtype("int32")}
        kept = [getattr(state[0], name) for name in ("direction", "residual")]
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(params_dtype)}
    for scale in (2.0**-12, 2.0**12):
        scaled_first, _, scaled_losses = run(make, scale=scale)
        assert distance(scaled_first, first) < 1e-5
        np.testing.assert_allclose(scaled_losses, losses, rtol=1e-3)


def test_products_in_float16_are_lost_below_its_range_unless_the_loss_is_scaled():
    batch, params = examples(4096), start()
    vector = jax.tree.map(lambda w: 1e-4 * jnp.ones_like(w), params)
    want = ggn_matvec(model(jnp.float32), LOSS, params, batch)(vector)

    def error(dtype, scale):
        scaled_batch = {**batch, "scale": scale}
        product = ggn_matvec(model(dtype), scaled_loss, params, scaled_batch)(vector)
        return distance(jax.tree.map(lambda v: v / scale, product), want)

    assert error(jnp.float16, 1.0) > 0.5
    assert error(jnp.float16, 2.0**14) < 0.02
    assert error(jnp.bfloat16, 1.0) < 0.05
