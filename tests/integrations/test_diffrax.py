"""Diffrax: a neural ODE needs an adjoint with both a forward and a reverse mode, `DirectAdjoint`."""

import functools

import jax
import jax.numpy as jnp
import pytest
from race import assert_ahead_of_adamw, plain_training

from mlhf_optax import SquaredError, load_pretrained

diffrax = pytest.importorskip("diffrax")

pytestmark = pytest.mark.usefixtures("unoptimised")

LOSS = SquaredError(targets="path")
TIMES = jnp.linspace(0.0, 2.0, 6)


def initial():
    keys = jax.random.split(jax.random.key(0))
    return {
        "in": jax.random.normal(keys[0], (2, 12)) / 2,
        "bias": jnp.zeros(12),
        "out": jax.random.normal(keys[1], (12, 2)) / 12,
    }


def solve(field, args, start, adjoint):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=2.0,
        dt0=0.2,
        y0=start,
        args=args,
        saveat=diffrax.SaveAt(ts=TIMES),
        max_steps=16,
        adjoint=adjoint,
    )
    return solution.ys


def predict_fn(params, batch, adjoint=None):
    def field(t, y, params):
        return jnp.tanh(y @ params["in"] + params["bias"]) @ params["out"]

    adjoint = diffrax.DirectAdjoint() if adjoint is None else adjoint
    return jax.vmap(lambda start: solve(field, params, start, adjoint))(batch["start"])


def data():
    start = jax.random.normal(jax.random.key(1), (16, 2))
    turn = lambda t: jnp.array([[jnp.cos(t), jnp.sin(t)], [-jnp.sin(t), jnp.cos(t)]])
    return {"start": start, "path": jnp.swapaxes(jax.vmap(lambda t: start @ turn(t))(TIMES), 0, 1)}


def test_a_neural_ode_with_the_direct_adjoint():
    batch = data()

    train = plain_training(predict_fn, LOSS, initial(), batch)
    assert_ahead_of_adamw(train, load_pretrained().optimizer(predict_fn, LOSS))


@pytest.mark.parametrize("name", ["RecursiveCheckpointAdjoint", "ForwardMode", "BacksolveAdjoint"])
def test_adjoints_without_both_modes_are_errors_that_name_the_one_that_has_them(name):
    adjoint = getattr(diffrax, name)()
    tx = load_pretrained().optimizer(functools.partial(predict_fn, adjoint=adjoint), LOSS)
    params, batch = initial(), data()
    with pytest.raises(ValueError, match=r"`predict_fn`.*diffrax.DirectAdjoint\(\)"):
        jax.eval_shape(functools.partial(tx.update, batch=batch), params, tx.init(params), params)
