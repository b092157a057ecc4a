"""The shelf of learned optimizers: what every entry owes, and the smallest entry there is."""

import dataclasses
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    LOSS,
    batch,
    linear,
    linear_loss,
    linear_params,
    mlp,
    mlp_loss,
    mlp_params,
    training_steps,
)

from mlhf_optax import list_pretrained, load_pretrained, lodo
from mlhf_optax.learned import LEARNED, get_learned
from mlhf_optax.learned.adam_rates import AdamRates, adam_rates
from mlhf_optax.learned.mlhf import MLHFOptions
from mlhf_optax.meta_training import MetaTrainingConfig, make_meta_step

pytestmark = pytest.mark.usefixtures("unoptimised")

TASK = SimpleNamespace(init_fn=lambda key: mlp_params(dtype=jnp.float32), predict_fn=mlp, loss_fn=LOSS)


def test_names_are_those_of_the_entries_and_an_unknown_one_is_explained():
    assert all(name == family.name for name, family in LEARNED.items())
    with pytest.raises(ValueError, match="'adamw'; there are mlhf, mlhf_general, adam_rates, rnnprop, l2l"):
        get_learned("adamw")


@pytest.mark.parametrize("family", LEARNED.values(), ids=list(LEARNED))
def test_an_entry_makes_meta_parameters_that_a_file_can_hold_and_an_optimizer_that_trains(family):
    meta_params = family.learned(family.options()).init(jax.random.key(0), TASK)
    template = family.template(family.structure(meta_params))
    assert jax.tree.structure(template) == jax.tree.structure(meta_params)
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert shapes(template) == shapes(meta_params)
    record = family.record(family.options())
    assert set(record) <= set(family.arguments)
    assert family.check_record(record) is None
    # Noise alone moves an untrained optimizer that samples its updates.
    samples = "deterministic" in inspect.signature(family.optimizer).parameters
    tx = family.optimizer(meta_params, linear, LOSS, **record, **({"deterministic": True} if samples else {}))
    losses = [loss for _, _, loss in training_steps(tx, linear_params(dtype=jnp.float32), [batch()] * 5)]
    assert losses[-1] < losses[0]


WRONG = [(jnp.arange(3), TypeError), (jnp.ones(2, complex), TypeError), (jnp.ones((0, 3)), ValueError)]
SHIPPED = [name for name in LEARNED if name in list_pretrained()]


@pytest.mark.parametrize("name", ["general", "adam_rates", "lodo", *SHIPPED])
def test_parameters_that_cannot_be_trained_are_refused(name):
    others = {"adam_rates": lambda: adam_rates(AdamRates(jnp.zeros(5))), "lodo": lodo}
    tx = others.get(name, lambda: load_pretrained(name).optimizer(linear, LOSS))()
    for odd, error in WRONG:
        with pytest.raises(error, match="cannot train the parameter 'net/odd'"):
            tx.init({"net": {"kernel": jnp.ones((3, 2)), "odd": odd}})


@pytest.mark.parametrize("family", LEARNED.values(), ids=list(LEARNED))
def test_options_are_frozen_with_a_default_for_every_field(family):
    assert dataclasses.is_dataclass(family.options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.options().anything = 1


def test_learned_rates_of_adam_are_adam_where_they_are_equal():
    params = mlp_params(dtype=jnp.float32)
    gradient = jax.jit(jax.grad(mlp_loss))(params, batch())
    own, its = adam_rates(AdamRates(jnp.full(5, jnp.log(0.03)))), optax.adam(0.03)
    own_state, its_state = own.init(params), its.init(params)
    for _ in range(3):
        own_update, own_state = own.update(gradient, own_state, params)
        its_update, its_state = its.update(gradient, its_state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), own_update, its_update)


def test_meta_training_improves_learned_rates_that_are_far_too_small():
    family = LEARNED["adam_rates"]
    learned = family.learned(family.options(learning_rate=1e-4))
    init, meta_step = make_meta_step(TASK, learned, MetaTrainingConfig(num_tasks=2, meta_learning_rate=0.3))
    state = init(jax.random.key(0), learned.init(jax.random.key(1), TASK))
    data = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 11, *x.shape)), batch())
    rates = []
    for _ in range(20):
        state, _ = meta_step(state, data)
        rates.append(1e-4 * float(jnp.exp(state.meta_params.log_rate[2])))
    assert rates[-1] > 10 * 1e-4


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            {"settings": "mine"},
            "`settings` must be one of 'default', 'relative', 'paper', 'authors', got 'mine'",
        ),
        ({"learning_rate": 0.0}, "`learning_rate` must be a positive number, got 0.0"),
        ({"initial_damping": -1.0}, "`initial_damping` must be a positive number, got -1.0"),
        ({"same_batch_weight": -1.0}, "`same_batch_weight` must be a number >= 0"),
        ({"curvature_batch_size": 2.0}, "must lie in"),
    ],
)
def test_wrong_options_of_mlhf_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        MLHFOptions(**wrong)


def test_mlhf_goes_on_from_others_with_untrained_lstms_for_new_layer_types_and_refuses_contradictions():
    family, start = LEARNED["mlhf"], load_pretrained("digits")
    conv = SimpleNamespace(init_fn=lambda key: {"kernel": jnp.ones((3, 3, 1, 2)), "bias": jnp.ones(2)})
    extended = family.learned(MLHFOptions(), start).init(jax.random.key(0), conv)
    assert extended.layer_types == ("conv_bias", "conv_kernel", "dense_bias", "dense_kernel")
    with pytest.raises(
        ValueError, match=r"`start` brings settings of its own, 'default'; leave out settings"
    ):
        family.learned(MLHFOptions(settings="paper"), start)
    odd = start._replace(record=start.record | {"meta_training": {"settings": "mine"}})
    with pytest.raises(ValueError, match="names settings 'mine'"):
        family.learned(MLHFOptions(), odd)


def test_a_shipped_optimizer_works_under_inject_hyperparams_with_an_injected_momentum_of_zero():
    learned, params, data = load_pretrained("digits"), linear_params(dtype=jnp.float32), batch()
    static = ("predict_fn", "loss_fn", "num_cg_steps")
    make = optax.inject_hyperparams(learned.optimizer, static_args=static)
    schedule = optax.linear_schedule(1.0, 0.5, 10)
    tx = make(linear, LOSS, learning_rate=schedule, momentum=0.0)
    plain = learned.optimizer(linear, LOSS, learning_rate=schedule, momentum=0.0)
    gradient = jax.grad(linear_loss)(params, data)
    got, state = jax.jit(tx.update)(gradient, tx.init(params), params, batch=data)
    want, _ = jax.jit(plain.update)(gradient, plain.init(params), params, batch=data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    fixed = learned.optimizer(linear, LOSS, learning_rate=1.0, momentum=0.0)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(fixed.init(params))
    assert float(state.hyperparams["momentum"]) == 0.0
