"""Layer types read off the trees of Flax linen and nnx, and of names as Haiku and Equinox give them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from mlhf_optax import layer_types
from mlhf_optax.support.layer_types import (
    check_params,
    check_whole_tree,
    distinct_layer_types,
)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(2, (3, 3))(x)))
        x = nn.GroupNorm(num_groups=1)(nn.ConvTranspose(2, (2, 2))(x))
        return nn.Dense(3)(nn.LayerNorm()(x.reshape(x.shape[0], -1)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.conv3d = nnx.Conv(1, 2, (1, 1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)])


PAPER_LAYERS = {
    "conv": {"kernel": "conv_kernel", "bias": "conv_bias"},
    "dense": {"kernel": "dense_kernel", "bias": "dense_bias"},
    "norm": {"scale": "norm_scale", "bias": "norm_bias"},
}


def test_linen_dicts():
    params = jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.ones((1, 4, 4, 1)))["params"]
    assert layer_types(params) == {
        "Conv_0": PAPER_LAYERS["conv"],
        "BatchNorm_0": PAPER_LAYERS["norm"],
        "ConvTranspose_0": PAPER_LAYERS["conv"],
        "GroupNorm_0": PAPER_LAYERS["norm"],
        "LayerNorm_0": PAPER_LAYERS["norm"],
        "Dense_0": PAPER_LAYERS["dense"],
    }


def test_nnx_states_with_and_without_their_variables():
    state = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param)
    want = {
        "conv": PAPER_LAYERS["conv"],
        "conv3d": PAPER_LAYERS["conv"],
        "norm": PAPER_LAYERS["norm"],
        "blocks": {0: PAPER_LAYERS["dense"], 1: PAPER_LAYERS["dense"]},
    }
    assert nnx.to_pure_dict(layer_types(state)) == want
    assert nnx.to_pure_dict(layer_types(nnx.as_pure(state))) == want


def test_haiku_names():
    params = {
        "net/~/conv2_d": {"w": jnp.ones((3, 3, 1, 2)), "b": jnp.ones(2)},
        "net/~/linear": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)},
        "net/~/layer_norm": {"scale": jnp.ones(2), "offset": jnp.ones(2)},
        "norm": {"gamma": jnp.ones(2), "beta": jnp.ones(2)},
    }
    assert layer_types(params) == {
        "net/~/conv2_d": {"w": "conv_kernel", "b": "conv_bias"},
        "net/~/linear": {"w": "dense_kernel", "b": "dense_bias"},
        "net/~/layer_norm": {"scale": "norm_scale", "offset": "norm_bias"},
        "norm": {"gamma": "norm_scale", "beta": "norm_bias"},
    }


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=[])
@dataclasses.dataclass
class Layer:
    """A layer as an Equinox module has it: a dataclass with `weight` and `bias`."""

    weight: jax.Array
    bias: jax.Array | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "norm"], meta_fields=[])
@dataclasses.dataclass
class Net:
    layers: list[Layer]
    norm: Layer


def test_equinox_modules():
    net = Net(
        layers=[Layer(jnp.ones((2, 1, 3, 3)), jnp.ones((2, 1, 1))), Layer(jnp.ones((3, 2)), None)],
        norm=Layer(jnp.ones(2), jnp.ones(2)),
    )
    types = layer_types(net)
    assert (types.layers[0].weight, types.layers[0].bias) == ("conv_kernel", "conv_bias")
    assert (types.layers[1].weight, types.layers[1].bias) == ("dense_kernel", None)
    assert (types.norm.weight, types.norm.bias) == ("norm_scale", "norm_bias")


def test_shapes_and_traced_arrays_do_as_well_as_arrays():
    params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    want = {"Dense_0": PAPER_LAYERS["dense"]}
    assert layer_types(jax.eval_shape(lambda: params)) == want
    seen = []
    jax.jit(lambda p: seen.append(layer_types(p)))(params)
    assert seen == [want]


def test_rules_come_first_and_the_first_that_matches_wins():
    params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "embedding": jnp.ones((5, 3))}
    types = layer_types(params, rules={"^head/kernel$": "head", "embed": "embedding", "head": "unused"})
    assert types == {"head": {"kernel": "head", "bias": "unused"}, "embedding": "embedding"}


def test_distinct_types_are_sorted_and_know_the_rules():
    params = {name: {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)} for name in ("b", "a")}
    assert distinct_layer_types(params) == ["dense_bias", "dense_kernel"]
    assert distinct_layer_types(params, rules={"^b/": "head"}) == ["dense_bias", "dense_kernel", "head"]


@pytest.mark.parametrize(
    ("params", "where"),
    [
        ({"a": {"table": jnp.ones((5, 3))}}, r"parameter 'a/table' of shape \(5, 3\)"),
        ({"conv1d": {"kernel": jnp.ones((3, 2, 2))}}, r"parameter 'conv1d/kernel' of shape \(3, 2, 2\)"),
        ({"lonely": {"bias": jnp.ones(2)}}, r"parameter 'lonely/bias'"),
        ({"conv1d": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2, 2))}}, r"parameter 'conv1d/bias'"),
        ([jnp.ones(2)], r"parameter '0' of shape \(2,\)"),
        (jnp.ones(7), r"a bare array without a name\) of shape \(7,\)"),
    ],
)
def test_an_unknown_parameter_is_an_error_with_its_path_and_the_remedy(params, where):
    with pytest.raises(
        ValueError, match=rf"{where}.*is of no known layer type; say what it is with `layer_types_fn="
    ):
        layer_types(params)


def test_a_kernel_and_a_weight_of_different_kinds_leave_their_bias_open():
    params = {"odd": {"kernel": jnp.ones((3, 2)), "w": jnp.ones((3, 3, 1, 2)), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match="parameter 'odd/bias'"):
        layer_types(params)


def test_a_tree_with_hidden_leaves_is_an_error_that_says_what_to_use():
    params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": optax.MaskedNode()}}
    for function in (check_whole_tree, layer_types, lambda tree: check_params(tree, "mlhf")):
        with pytest.raises(
            ValueError, match=r"optax.masked.*use `optax.chain\(optimizer, optax.freeze\(mask\)\)`"
        ):
            function(params)


class Variable:
    """As those of Keras: with shape and dtype, but no array."""

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, value.shape, str(value.dtype)


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (jnp.ones((0, 3)), ValueError, r"of dtype float32 and shape \(0, 3\): it is empty; leave it out"),
        (jnp.arange(3), TypeError, r"of dtype int32 and shape \(3,\): it has no gradient; keep it out of"),
        (jnp.array(True), TypeError, r"of dtype bool and shape \(\): it has no gradient"),
        (jax.random.key(0), TypeError, r"of dtype key<\w+> and shape \(\): it has no gradient"),
        (jnp.ones(2, complex), TypeError, r"of dtype complex64 and shape \(2,\): keep its real and its"),
        (0.5, TypeError, "it is a float, not an array; use `jnp.asarray`"),
        (
            Variable(jnp.ones(2)),
            TypeError,
            "it is a Variable, not an array; take the array that it holds.*for Keras",
        ),
    ],
)
def test_a_parameter_that_cannot_be_trained_is_named_with_the_remedy(leaf, error, message):
    with pytest.raises(error, match=rf"`mlhf` cannot train the parameter 'net/odd'.*{message}"):
        check_params({"net": {"kernel": jnp.ones((3, 2)), "odd": leaf}}, "mlhf")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_parameters_of_every_float_type_can_be_trained_and_so_can_shapes_and_placeholders(dtype):
    params = {"kernel": jnp.ones((3, 2), dtype)}
    check_params(params, "mlhf")
    check_params(jax.eval_shape(lambda: params), "mlhf")
    check_params({}, "mlhf")  # `optax.tree.map_params` calls `init` with a tree without leaves
