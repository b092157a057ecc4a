"""Settings, fresh meta-parameters, and the maps into and out of the LSTMs."""

import dataclasses
import json
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
    extend_meta_params,
    init_meta_params,
)
from mlhf_optax.controllers import Quotient, Scale, lstm
from mlhf_optax.controllers.coordinate_lstm import run_network
from mlhf_optax.controllers.lstm_settings import (
    Divide,
    Exponential,
    Inputs,
    Jacobi,
    LogFeatures,
    Multiply,
    Softplus,
    TanhFeatures,
    Unit,
)
from mlhf_optax.support.layer_types import PAPER_LAYER_TYPES

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")


@pytest.mark.parametrize(
    ("features", "count"), [(TanhFeatures(), 3), (LogFeatures(has_shared=False), 6), (LogFeatures(), 9)]
)
def test_the_lstms_have_as_many_inputs_as_there_are_features(features, count):
    assert features.count == count
    settings = Settings(features=features)
    weights = init_meta_params(jax.random.key(0), settings, layer_types=["a"], units=(5,))
    assert weights.damping["a"].layers[0].kernel.shape == (20, count + 5)
    inputs = Inputs(*[{"w": jnp.ones((2, 3))}] * 3)
    carry = lstm.init_carry({"w": jnp.ones((2, 3))}, (5,))
    outputs, carry = run_network(weights.damping, settings, {"w": "a"}, carry, inputs)
    assert outputs["w"].shape == (2, 3)
    assert carry[0].cell["w"].shape == (5, 2, 3)


def test_the_two_named_settings_are_those_of_paper_and_code():
    assert PAPER_SETTINGS.features == TanhFeatures()
    assert PAPER_SETTINGS.output == Softplus(scale=1.0)
    assert PAPER_SETTINGS.preconditioner == Divide()
    assert (PAPER_SETTINGS.unit.gradient_power, PAPER_SETTINGS.unit.parameter_power) == (0, 0)
    assert not PAPER_SETTINGS.sees_current_residual
    assert PAPER_SETTINGS.damping_floor == 0
    # softplus(x + offset) with an offset of zero
    np.testing.assert_allclose(
        PAPER_SETTINGS.output(jnp.arange(3.0), PAPER_SETTINGS.initial_damping),
        np.log1p(np.exp(np.arange(3.0))),
        rtol=1e-12,
    )
    differences = {"damping_floor": 2e-5, "preconditioner": Multiply(), "sees_current_residual": True}
    assert dataclasses.replace(PAPER_SETTINGS, **differences) == AUTHORS_SETTINGS


@pytest.mark.parametrize("output", [Softplus(2.0), Exponential(2.0)])
@pytest.mark.parametrize("initial", [1e-6, 0.1, 1.0, 50.0])
def test_a_zero_output_stands_for_the_initial_value_and_all_values_are_positive(output, initial):
    np.testing.assert_allclose(output(jnp.zeros(()), initial), initial, rtol=1e-9)
    values = output(jnp.linspace(-8, 8, 9), initial)
    assert np.all(values > 0)
    assert np.all(np.diff(values) > 0)


def test_exponential_outputs_are_bounded():
    values = Exponential()(jnp.array([-1e9, 1e9], jnp.float32), 1.0)
    np.testing.assert_allclose(np.log(values), [-30.0, 30.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "operator", "values"),
    [(Divide(), Quotient, [2.0, 4.0]), (Multiply(), Scale, [2.0, 4.0]), (Jacobi(), Quotient, [5.0, 14.0])],
)
def test_each_kind_of_preconditioner_is_an_operator(kind, operator, values):
    got = kind({"w": jnp.array([2.0, 4.0])}, {"w": jnp.array([3.0, 10.0])})
    assert isinstance(got, operator)
    np.testing.assert_allclose(got.values["w"], values)


def test_the_unit_is_made_of_the_sizes_of_gradient_and_parameters_and_of_floors():
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    unit = lambda **settings: float(Unit(**settings)(gradient, jnp.array(0.25)))
    assert unit(gradient_power=0.0) == 1.0
    assert unit() == unit(gradient_power=1.0) == pytest.approx(2.5)
    assert unit(gradient_power=0.5, parameter_power=2.0) == pytest.approx(2.5**0.5 / 0.25**2)
    assert unit(gradient_floor=10.0) == 10.0
    assert unit(gradient_power=0.0, parameter_power=1.0, parameter_floor=0.5) == 2.0


def test_fresh_meta_parameters_are_those_of_two_different_lstms_a_layer_type():
    meta_params = init_meta_params(jax.random.key(0))
    assert meta_params.layer_types == tuple(sorted(PAPER_LAYER_TYPES))
    assert meta_params.units == (4, 4)
    networks = (meta_params.damping, meta_params.preconditioner)
    kernels = {w.layers[0].kernel.tobytes() for network in networks for w in network.values()}
    assert len(kernels) == 12


def test_meta_parameters_are_a_tree_of_arrays_with_static_settings():
    meta_params = init_meta_params(jax.random.key(0), PAPER_SETTINGS, layer_types=["a"], units=(2, 3))
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(meta_params)
    assert isinstance(doubled, MetaParams)
    assert doubled.settings == PAPER_SETTINGS
    assert doubled.units == (2, 3)
    other = dataclasses.replace(meta_params, settings=AUTHORS_SETTINGS)
    assert jax.tree.structure(meta_params) != jax.tree.structure(other)


def test_log_features_tell_small_from_tiny_where_tanh_does_not():
    """The reason for the log features: late in training everything is small."""
    differences = []
    for features in (TanhFeatures(), LogFeatures(log_range=10.0, has_shared=False)):
        settings, outputs = Settings(features=features), []
        weights = init_meta_params(jax.random.key(0), settings, layer_types=["a"], units=(1,)).damping
        unit = weights["a"]._replace(output_kernel=jnp.ones(1))
        for size in (1e-3, 1e-4):
            inputs = Inputs(*[jnp.array([size])] * 3)
            carry = lstm.init_carry(jnp.zeros(1), (1,), float)
            outputs.append(run_network({"a": unit}, settings, "a", carry, inputs)[0])
        differences.append(abs(outputs[0] - outputs[1]))
    assert differences[0] < 1e-2 * differences[1]


def test_settings_come_back_from_json():
    features, unit = LogFeatures(7.0, has_shared=False), Unit(0.5, 2.0, 1e-4, 1e-2)
    other = Settings(features=features, unit=unit, damping_floor=0.1)
    for settings in (PAPER_SETTINGS, AUTHORS_SETTINGS, other):
        assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert Settings().to_json()["output"] == {"kind": "Exponential", "scale": 3.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": {"kind": "Relu"}}, ValueError, "no setting of the kind 'Relu'"),
        ({"output": {"scale": 1.0}}, ValueError, "no setting of the kind None"),
        ({"unit": {"kind": "Unit", "size": 1}}, TypeError, "size"),
        ({"colour": 1}, TypeError, "colour"),
        ({"features": {"kind": "Softplus"}}, TypeError, "`features` must be a TanhFeatures or LogFeatures"),
        ({"initial_damping": "1"}, ValueError, "`initial_damping` must be a positive number, got '1'"),
    ],
)
def test_json_that_makes_no_settings_is_an_error(change, error, message):
    with pytest.raises(error, match=message):
        Settings.from_json(Settings().to_json() | change)


# Wrong values.


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("features", "TanhFeatures or LogFeatures"),
        ("output", "Softplus or Exponential"),
        ("unit", "Unit"),
        ("preconditioner", "Divide or Multiply or Jacobi"),
    ],
)
def test_an_object_of_a_wrong_kind_is_an_error_that_lists_the_kinds(name, kinds):
    with pytest.raises(TypeError, match=f"`{name}` must be a {kinds}, got 'tanh'"):
        Settings(**{name: "tanh"})


POSITIVE = {
    Settings: ("initial_damping", "initial_preconditioner"),
    Unit: ("gradient_floor", "parameter_floor"),
    **{Softplus: ("scale",), Exponential: ("scale",), LogFeatures: ("log_range",)},
}
AT_LEAST_ZERO = {Settings: ("damping_floor",), Unit: ("gradient_power", "parameter_power")}


@pytest.mark.parametrize(
    ("kinds", "wanted", "values"),
    [
        (POSITIVE, "a positive number", [0.0, -1.0, math.inf, math.nan, "1", True]),
        (AT_LEAST_ZERO, "a number >= 0", [-1e-9, math.inf, math.nan]),
    ],
)
def test_a_number_out_of_range_is_an_error(kinds, wanted, values):
    for kind, name, value in ((kind, n, v) for kind, names in kinds.items() for n in names for v in values):
        with pytest.raises(ValueError, match=f"`{name}` must be {wanted}, got"):
            kind(**{name: value})


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
