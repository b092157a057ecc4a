"""Small models, batches and meta-parameters that several test files use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlhf_optax import PAPER_SETTINGS, SoftmaxCrossEntropy, SquaredError, init_meta_params

LOSS = SoftmaxCrossEntropy()


def mlp(params, batch):
    """The network of `references.Model` on Flax-like names."""
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = jnp.tanh(batch["image"] @ first["kernel"] + first["bias"][None])
    return hidden @ second["kernel"] + second["bias"][None]


def mlp_loss(params, batch):
    return LOSS(mlp(params, batch), batch)


def linear(params, batch):
    """The smallest network there is, for tests of what does not depend on the network."""
    return batch["image"] @ params["kernel"]


def linear_loss(params, batch):
    return LOSS(linear(params, batch), batch)


def linear_params(seed=0, dtype=None):
    return {"kernel": jnp.asarray(0.5 * np.random.default_rng(seed).normal(size=(3, 2)), dtype)}


def mlp_params(seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    layer = lambda m, n: {
        "bias": jnp.asarray(0.1 * rng.normal(size=n), dtype),
        "kernel": jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(m), dtype),
    }
    return {"Dense_0": layer(3, 4), "Dense_1": layer(4, 2)}


def batches(num_batches, seed=1, size=8):
    """NumPy batches of float64 inputs and labels that the network can learn."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(num_batches, size, 3))
    labels = (images[..., 0] + 0.5 * images[..., 1] ** 2 > 0.2).astype(np.int32)
    return [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)]


def batch(seed=1, size=8):
    """One batch as JAX arrays of the default float type."""
    return jax.tree.map(jnp.asarray, batches(1, seed, size)[0])


def random_meta_params(settings=PAPER_SETTINGS, seed=0, units=(4, 4), scale=0.3):
    """Meta-parameters whose output maps are not zero, so that every path through the LSTMs counts."""
    meta_params = init_meta_params(jax.random.key(seed), settings, units=units)
    leaves, treedef = jax.tree.flatten(meta_params)
    rng = np.random.default_rng(seed)
    # The sums are NumPy's, which compiles nothing.
    moved = [
        np.asarray(leaf) + np.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves
    ]
    return treedef.unflatten(map(jnp.asarray, moved))


def flat(tree):
    """All leaves as one NumPy vector, in the order of `references.Model`."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def stack(trees):
    """One tree with a leading axis from a list of trees, as arrays of the default types."""
    return jax.tree.map(
        lambda *leaves: jnp.asarray(np.stack([np.asarray(x) for x in leaves]), jnp.result_type(leaves[0])),
        *trees,
    )


def training_steps(tx, params, batches, loss_fn=linear_loss):
    """Trains; yields parameters and optimizer state after each step, and the loss before it."""

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for batch in batches:
        params, state, loss = step(params, state, batch)
        yield params, state, float(loss)


def rescaled_direction(build, scale):
    """The first direction of `build(predict_fn)`, in units of the plain network, on one whose parameters
    are `scale` times smaller and multiplied by as much before they are used."""
    params, data = linear_params(dtype=float), batch()
    predict_fn = lambda p, b: linear(jax.tree.map(lambda x: x * scale, p), b)
    scaled = jax.tree.map(lambda x: x / scale, params)
    tx = build(predict_fn)

    @jax.jit
    def update(scaled):
        grads = jax.grad(lambda p: LOSS(predict_fn(p, data), data))(scaled)
        return tx.update(grads, tx.init(scaled), scaled, batch=data)[0]

    found = update(scaled)
    return flat(jax.tree.map(lambda x: x * scale, found))


OTHER_UNITS = ((1, 30, 1, 1), (1, 1, 1, 30), (0.1, 0.1, 4, 8))


def losses_in_units(build, steps=60):
    """Trains a tanh network whose tensors b1, W1, b2, W2 are in units of their own.

    Returns the last loss in usual units, and an array of those in `OTHER_UNITS`. ``build(predict_fn)`` makes
    the optimizer. The function at the start is the same for all units.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (128, 5))
    batch = {"x": x, "label": jnp.tanh(x @ jax.random.normal(keys[1], (5, 3)))}
    first, second = jax.random.normal(keys[2], (5, 16)), jax.random.normal(keys[3], (16, 3))
    usual = [jnp.zeros(16), first / 5**0.5, jnp.zeros(3), second / 16**0.5]

    def last_loss(units):
        def predict_fn(params, batch):
            b1, w1, b2, w2 = (unit * p for unit, p in zip(units, params, strict=True))
            return jnp.tanh(batch["x"] @ w1 + b1) @ w2 + b2

        tx, loss_fn = build(predict_fn), SquaredError()

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), loss

        params = [p / unit for unit, p in zip(units, usual, strict=True)]
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1][-1]

    losses = jax.jit(jax.vmap(last_loss))(jnp.array([(1, 1, 1, 1), *OTHER_UNITS], jnp.float32))
    return losses[0], losses[1:]
