"""Settings, fresh meta-parameters, and the maps into and out of the LSTMs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import (
    AUTHORS_SETTINGS,
    PAPER_SETTINGS,
    MetaParams,
    Settings,
    coordinate_lstm,
    extend_meta_params,
    init_meta_params,
)
from mlhf_optax.controls import Inputs, control_unit, output_to_value, run_network
from mlhf_optax.layer_types import PAPER_LAYER_TYPES

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")


@pytest.mark.parametrize(("features", "count"), [("tanh", 3), ("log", 6), ("log-global", 9)])
def test_the_lstms_have_as_many_inputs_as_there_are_features(features, count):
    settings = Settings(input_features=features)
    assert settings.num_inputs == count
    weights = init_meta_params(jax.random.key(0), settings, layer_types=["a"], units=(5,))
    assert weights.damping["a"].layers[0].kernel.shape == (20, count + 5)
    inputs = Inputs(*[{"w": jnp.ones((2, 3))}] * 3)
    carry = coordinate_lstm.init_carry({"w": jnp.ones((2, 3))}, (5,))
    outputs, carry = run_network(weights.damping, settings, {"w": "a"}, carry, inputs)
    assert outputs["w"].shape == (2, 3)
    assert carry[0].cell["w"].shape == (5, 2, 3)


def test_the_two_named_settings_are_those_of_paper_and_code():
    assert PAPER_SETTINGS.input_features == "tanh"
    assert PAPER_SETTINGS.output_map == "softplus"
    assert PAPER_SETTINGS.preconditioner_form == "divide"
    assert PAPER_SETTINGS.preconditioner_residual == "previous"
    assert PAPER_SETTINGS.damping_floor == 0
    # softplus(x + offset) with an offset of zero
    np.testing.assert_allclose(
        output_to_value(PAPER_SETTINGS, jnp.arange(3.0), PAPER_SETTINGS.initial_damping),
        np.log1p(np.exp(np.arange(3.0))),
        rtol=1e-12,
    )
    changed = {
        field.name
        for field in dataclasses.fields(Settings)
        if getattr(PAPER_SETTINGS, field.name) != getattr(AUTHORS_SETTINGS, field.name)
    }
    assert changed == {"damping_floor", "preconditioner_form", "preconditioner_residual"}


@pytest.mark.parametrize("output_map", ["softplus", "exp"])
@pytest.mark.parametrize("initial", [1e-6, 0.1, 1.0, 50.0])
def test_a_zero_output_stands_for_the_initial_value_and_all_values_are_positive(output_map, initial):
    settings = Settings(output_map=output_map, output_scale=2.0)
    np.testing.assert_allclose(output_to_value(settings, jnp.zeros(()), initial), initial, rtol=1e-9)
    values = output_to_value(settings, jnp.linspace(-8, 8, 9), initial)
    assert np.all(values > 0)
    assert np.all(np.diff(values) > 0)


def test_exponential_outputs_are_bounded():
    values = output_to_value(Settings(), jnp.array([-1e9, 1e9], jnp.float32), 1.0)
    np.testing.assert_allclose(np.log(values), [-30.0, 30.0], rtol=1e-5)


def test_fresh_meta_parameters_are_those_of_two_different_lstms_a_layer_type():
    meta_params = init_meta_params(jax.random.key(0))
    assert meta_params.layer_types == tuple(sorted(PAPER_LAYER_TYPES))
    assert meta_params.units == (4, 4)
    kernels = [
        w.layers[0].kernel for net in (meta_params.damping, meta_params.preconditioner) for w in net.values()
    ]
    assert len(kernels) == 12
    for i, kernel in enumerate(kernels):
        assert all(not np.allclose(kernel, other) for other in kernels[:i])


def test_meta_parameters_are_a_tree_of_arrays_with_static_settings():
    meta_params = init_meta_params(jax.random.key(0), PAPER_SETTINGS, layer_types=["a"], units=(2, 3))
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(meta_params)
    assert isinstance(doubled, MetaParams)
    assert doubled.settings == PAPER_SETTINGS
    assert doubled.units == (2, 3)
    assert jax.tree.structure(meta_params) != jax.tree.structure(
        dataclasses.replace(meta_params, settings=AUTHORS_SETTINGS)
    )


def test_log_features_tell_small_from_tiny_where_tanh_does_not():
    """The reason for the log features: late in training everything is small."""
    features = {}
    for name in ("tanh", "log"):
        settings = Settings(input_features=name, log_range=10.0)
        weights = init_meta_params(jax.random.key(0), settings, layer_types=["a"], units=(1,)).damping
        unit = weights["a"]._replace(output_kernel=jnp.ones(1))
        for size in (1e-3, 1e-4):
            inputs = Inputs(*[jnp.array([size])] * 3)
            carry = coordinate_lstm.init_carry(jnp.zeros(1), (1,), float)
            features[name, size] = run_network({"a": unit}, settings, "a", carry, inputs)[0]
    assert abs(features["tanh", 1e-3] - features["tanh", 1e-4]) < 1e-2 * abs(
        features["log", 1e-3] - features["log", 1e-4]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_features", "raw"),
        ("output_map", "relu"),
        ("preconditioner_form", "inverse"),
        ("preconditioner_residual", "next"),
    ],
)
def test_an_unknown_choice_is_an_error_that_lists_the_choices(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be one of \(.*\), got '{value}'"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", ["output_scale", "initial_damping", "initial_preconditioner", "log_range"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1"])
def test_a_number_that_is_not_positive_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive number, got"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", ["damping_floor", "gradient_power", "parameter_power"])
@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
def test_a_negative_floor_or_power_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number >= 0, got"):
        Settings(**{name: value})


def test_the_unit_is_made_of_the_sizes_of_gradient_and_parameters_and_of_floors():
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    unit = lambda **settings: float(control_unit(Settings(**settings), gradient, jnp.array(0.25)))
    assert unit(gradient_power=0.0) == 1.0
    assert unit(gradient_power=1.0) == pytest.approx(2.5)
    assert unit(gradient_power=0.5, parameter_power=2.0) == pytest.approx(2.5**0.5 / 0.25**2)
    assert unit(gradient_floor=10.0) == 10.0
    assert unit(gradient_power=0.0, parameter_power=1.0, parameter_floor=0.5) == 2.0


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_layer_types_must_be_distinct(names):
    with pytest.raises(ValueError, match="`layer_types` must be distinct names, at least one"):
        init_meta_params(jax.random.key(0), layer_types=names)


def test_extended_meta_params_keep_what_they_know_and_start_the_rest_untrained():
    known = init_meta_params(jax.random.key(0), PAPER_SETTINGS, layer_types=["a", "b"], units=(2, 3))
    found = extend_meta_params(jax.random.key(1), known, ["b", "c"])
    assert (found.layer_types, found.units, found.settings) == (("a", "b", "c"), (2, 3), PAPER_SETTINGS)
    fresh = init_meta_params(jax.random.key(1), PAPER_SETTINGS, layer_types=["c"], units=(2, 3))
    for part in ("damping", "preconditioner"):
        expected = getattr(known, part) | getattr(fresh, part)
        jax.tree.map(np.testing.assert_array_equal, getattr(found, part), expected)
    assert extend_meta_params(jax.random.key(1), known, ["a"]) is known
    with pytest.raises(ValueError, match="distinct names"):
        extend_meta_params(jax.random.key(1), known, ["c", "c"])
