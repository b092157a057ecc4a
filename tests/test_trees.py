"""Norms whose derivatives stay finite, finiteness, selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.support import trees

pytestmark = pytest.mark.usefixtures("strict_ranks")

SIZES = {"norm": (trees.norm, 5.0), "root_mean_square": (trees.root_mean_square, 2.5)}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_over_all_numbers_of_the_tree_and_have_the_derivatives_of_a_norm(name):
    function, expected = SIZES[name]
    tree = {"a": jnp.array([[3.0, 0.0]]), "b": (jnp.array(-4.0), jnp.zeros(1))}
    value, slope = jax.value_and_grad(function)(tree)
    np.testing.assert_allclose(value, expected)
    share = expected / 25.0  # d sqrt(c sum x^2) / dx = c x / size
    jax.tree.map(lambda s, x: np.testing.assert_allclose(s, share * x, rtol=1e-6), slope, tree)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-22, 1e-15])
def test_derivatives_at_and_near_zero_are_at_most_one(name, size):
    function, _ = SIZES[name]
    tree = {"a": jnp.full(3, size), "b": jnp.zeros((2, 2))}
    for derivative in (jax.grad(function), jax.jit(jax.grad(function))):
        slope = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(derivative(tree))])
        assert np.isfinite(slope).all()
        assert np.linalg.norm(slope) <= 1.0 + 1e-6
    assert np.isfinite(function(tree))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scalars_are_kept_in_float32(dtype):
    tree = {"a": jnp.full(1000, 300.0, dtype)}  # the sum of squares is above the range of float16
    for got, want in (
        (trees.norm(tree), 300.0 * 1000**0.5),
        (trees.root_mean_square(tree), 300.0),
        (trees.vdot(tree, tree), 9e7),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=5e-3)


@pytest.mark.parametrize("run", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("missing", ["d", "a"])
def test_an_inner_product_of_trees_of_other_structure_is_an_error(run, missing):
    tree = {name: jnp.ones(2) for name in "abcd"}
    other = {name: leaf for name, leaf in tree.items() if name != missing}
    with pytest.raises(ValueError, match=r"[Dd]ict key"):
        run(trees.vdot)(tree, other)


def test_a_tree_without_leaves_has_no_size():
    assert float(trees.root_mean_square({})) == float(trees.norm({})) == trees.size({}) == 0
    assert trees.is_finite({})


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_number_makes_a_tree_not_finite(value):
    tree = {"a": jnp.ones((2, 2)), "b": (jnp.zeros(3), jnp.array(1))}
    assert trees.is_finite(tree)
    assert not trees.is_finite({**tree, "a": tree["a"].at[1, 0].set(value)})


def test_one_number_makes_a_tree_not_zero():
    tree = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    assert not trees.is_any_nonzero(tree)
    assert trees.is_any_nonzero({**tree, "b": tree["b"].at[2].set(-1e-30)})


def test_selection_keeps_the_dtypes_of_the_second_tree():
    new, old = {"a": jnp.ones(2)}, {"a": jnp.zeros(2, jnp.bfloat16)}
    for condition, want in ((True, 1.0), (False, 0.0)):
        got = trees.select(jnp.asarray(condition), new, old)["a"]
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(float), [want, want])


def test_zeros_take_the_place_of_what_is_not_finite():
    tree = {"a": jnp.array([jnp.nan, jnp.inf])}
    np.testing.assert_array_equal(trees.zero_unless(jnp.asarray(False), tree)["a"], np.zeros(2))
    assert not np.isfinite(trees.zero_unless(jnp.asarray(True), tree)["a"]).any()


def test_whole_numbers_count_among_what_is_finite_and_what_is_not_zero():
    tree = {"count": jnp.array([0, -3]), "flags": jnp.array([False, False]), "empty": jnp.zeros(0)}
    assert trees.is_finite(tree)
    assert trees.is_any_nonzero(tree)
    assert not trees.is_any_nonzero(tree | {"count": jnp.array([0, 0])})
    assert not trees.is_finite(tree | {"loss": jnp.array(jnp.nan)})
