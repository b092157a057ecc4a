"""The registry of tasks and what every task owes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import tasks
from mlhf_optax.tasks import TASKS, digits_mlp, get_task


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_trained_from_a_start_near_chance(name):
    task = get_task(name)
    assert task.name == name
    assert task.description
    params = task.init_fn(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[: task.batch_size], task.data.train)
    outputs = task.predict_fn(params, batch)
    assert outputs.shape == (task.batch_size, task.num_classes)
    loss = lambda p: task.loss_fn(task.predict_fn(p, batch), batch)
    value, gradient = jax.value_and_grad(loss)(params)
    assert value == pytest.approx(task.chance_loss, rel=0.3)
    assert all(jnp.all(jnp.isfinite(g)) & jnp.any(g != 0) for g in jax.tree.leaves(gradient))


def test_digits_mlp_is_64_32_10():
    params = digits_mlp().init_fn(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "Dense_0": {"kernel": (64, 32), "bias": (32,)},
        "Dense_1": {"kernel": (32, 10), "bias": (10,)},
    }


@pytest.mark.parametrize(
    ("options", "name", "widths"),
    [
        ({}, "digits-mlp", [32, 10]),
        ({"hidden": (16,)}, "digits-mlp-16", [16, 10]),
        ({"hidden": [32, 32], "activation": "tanh"}, "digits-mlp-32-32-tanh", [32, 32, 10]),
        ({"hidden": (), "activation": "sigmoid"}, "digits-mlp-linear-sigmoid", [10]),
    ],
)
def test_variants_of_digits_mlp(options, name, widths):
    task = get_task("digits-mlp", **options)
    params = task.init_fn(jax.random.key(0))
    assert task.name == name
    assert [params[f"Dense_{index}"]["bias"].size for index in range(len(params))] == widths
    assert options.get("activation", "relu") in task.description


def test_the_activation_is_the_one_asked_for():
    batch = {"image": np.full((1, 8, 8, 1), 0.5, np.float32)}
    params = digits_mlp().init_fn(jax.random.key(0))
    outputs = [digits_mlp(activation=name).predict_fn(params, batch) for name in ("relu", "tanh", "sigmoid")]
    assert not np.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not np.allclose(outputs[1], outputs[2], atol=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_batch_sizes_can_be_chosen(name):
    task = get_task(name, batch_size=32, meta_batch_size=16)
    assert (task.batch_size, task.meta_batch_size) == (32, 16)


def test_data_are_loaded_once_and_only_when_looked_at():
    calls = []
    task = dataclasses.replace(digits_mlp(), load_data=lambda: calls.append(1) or tasks.datasets.digits())
    assert not calls
    assert task.data is task.data
    assert len(calls) == 1


def test_chance_loss_is_that_of_equal_probabilities():
    assert dataclasses.replace(digits_mlp(), num_classes=4).chance_loss == math.log(4)


def test_unknown_tasks_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="`name` must be one of 'digits-mlp', 'digits-convnet', got 'digits'"
    ):
        get_task("digits")


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(
        TypeError, match="'digits-convnet' has no option 'hidden'; it has batch_size, meta_batch_size"
    ):
        get_task("digits-convnet", hidden=(3,))


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="`activation` must be one of"):
        get_task("digits-mlp", activation="swish")
