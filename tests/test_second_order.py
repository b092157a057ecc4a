"""The contenders of the comparison with second-order optimizers, on a linear classifier of three blobs."""

import jax
import jax.numpy as jnp
import optax
import pytest
import second_order_cifar10 as script
from blobs import TASK

from mlhf_optax import LevenbergMarquardt, hessian_free
from mlhf_optax.experiments.scripts import parse_options

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_the_grids_are_those_of_the_paper():
    contenders = [script.fixed_contender(TASK), *(script.adapted_contender(TASK, d) for d in script.DECAYS)]
    settings = [tuple(one.items()) for contender in contenders for one in contender.settings]
    assert (len(settings), len(set(settings))) == (16 + 64, 80)
    assert {dict(one)["decay"] for one in settings[16:]} == {2 / 3, 0.9, 0.99, 0.999}
    names = [name for contender in contenders for name in contender.names]
    assert len(set(names)) == 80
    assert names[16] == "hf-lm lr=1 damping=1 decay=0.667"


def test_an_adapted_contender_is_hessian_free_with_its_rule():
    contender = script.adapted_contender(TASK, 0.9)
    index = contender.settings.index({"learning_rate": 0.1, "initial_damping": 0.01, "decay": 0.9})
    ours = contender.make_optimizer(**{name: values[index] for name, values in contender.stacked.items()})
    rule = LevenbergMarquardt(0.01, decay=0.9)
    expected = hessian_free(0.1, TASK.predict_fn, TASK.loss_fn, damping=rule)
    params = TASK.init_fn(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, TASK.data.train)
    gradient = jax.grad(lambda p: TASK.loss_fn(TASK.predict_fn(p, batch), batch))(params)
    states = []
    for tx in (ours, expected):
        update, state = tx.update(gradient, tx.init(params), params, batch=batch)
        assert float(optax.tree.norm(update)) > 0
        states.append((update, optax.tree.get(state, "damping")))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert jnp.allclose(a, b, rtol=1e-6)
    assert float(states[0][1]) != pytest.approx(0.01)


def test_two_thirds_may_be_written_with_three_digits():
    parse = lambda *decays: parse_options(script.Options, None, ["--decays", *decays])
    assert parse("0.667", "0.9").decays == (2 / 3, 0.9)
