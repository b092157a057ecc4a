"""Tensors in one array against NumPy, and both packings against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.support.packing import LANES, Packing, Unpacked, _packing, join, packing_of, split

SHAPES = {
    "bias": (3,),
    "scalar": (),
    "kernel": (5, 3),
    "twin": (5, 3),
    "wide": (4, 385),
    "tall": (400, 6),
    "huge": (3, 2100),
    "conv": (3, 3, 2, 4),
    "full": (8, 8),
}


def tree(seed=0, shapes=None, dtype=np.float32):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in (shapes or SHAPES).items()}


def both(params, block=128):
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return [_packing(kind, shapes, treedef, block) for kind in (Packing, Unpacked)]


def dense_sides(packing, factors):
    """The two block-diagonal matrices of every matrix, by its place among the leaves."""
    found = {}
    for group in packing.groups:
        for which, tensor in enumerate(group.tensors):
            sides = []
            for side in (group.left, group.right):
                matrix = np.zeros((side.parts * side.size,) * 2)
                for part in range(side.parts):
                    at = slice(part * side.size, (part + 1) * side.size)
                    block = factors[side.which][side.start + which * side.parts + part]
                    matrix[at, at] = np.asarray(block)
                sides.append(matrix)
            found[tensor] = sides
    return found


def test_a_tree_comes_back_as_it_was():
    params = tree() | {"half": jnp.ones(7, jnp.bfloat16)}
    for packing in both(params):
        back = packing.unpack(packing.pack(params))
        jax.tree.map(np.testing.assert_array_equal, back, params)
        assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in params.items()}
        wide = packing.unpack(packing.pack(params), is_wide=True)
        assert {leaf.dtype for leaf in wide.values()} == {np.dtype("float32")}


def test_matrices_of_one_shape_lie_side_by_side_and_rows_are_filled_with_zeros():
    params = tree()
    packing = packing_of(params, 128)
    assert isinstance(packing, Packing)
    vector = packing.pack(params)
    assert vector.shape == (sum(-(-leaf.size // LANES) for leaf in params.values()), LANES)
    np.testing.assert_array_equal(jnp.sum(packing.filling), sum(leaf.size for leaf in params.values()))
    np.testing.assert_array_equal(vector * packing.filling, vector)
    tensors = [group.tensors for group in packing.groups if group.shape == (5, 3)]
    names = list(jax.tree.leaves({name: name for name in params}))
    assert [[names[i] for i in own] for own in tensors] == [["kernel", "twin"]]


def test_sums_and_spreads_are_those_of_the_tensors():
    params = tree()
    for packing in both(params):
        vector = packing.pack(params)
        want = np.array([np.sum(leaf) for leaf in jax.tree.leaves(params)])
        got = packing.sums(vector, jax.tree.map(jnp.square, vector))
        np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)
        want = np.array([np.sum(np.square(leaf)) for leaf in jax.tree.leaves(params)])
        np.testing.assert_allclose(got[1], want, rtol=1e-5)
        numbers = jnp.arange(1.0, 1 + len(want))
        twice, once = packing.spread(2 * numbers, numbers)
        product = packing.unpack(jax.tree.map(lambda a, b, v: (a - b) * v, twice, once, vector))
        for i, (a, b) in enumerate(zip(jax.tree.leaves(product), jax.tree.leaves(params), strict=True)):
            np.testing.assert_allclose(a, (i + 1) * b, rtol=1e-6)


@pytest.mark.parametrize("block", [128, 100, 2])
def test_outer_products_and_sandwiches_are_those_of_dense_matrices(block):
    params = tree()
    random = np.random.default_rng(1)
    for packing in both(params, block):
        vector = packing.pack(params)
        outer = split(packing.blocks, jax.jit(packing.outer)(vector))
        factors = [random.normal(size=own.shape) for own in outer]
        factors = [jnp.asarray(own + own.swapaxes(1, 2), jnp.float32) for own in factors]
        product = packing.unpack(jax.jit(packing.sandwich)(join(factors), vector))
        jax.tree.map(np.testing.assert_array_equal, split(packing.blocks, join(factors)), factors)
        sides, sums = dense_sides(packing, factors), dense_sides(packing, outer)
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(product), strict=True)
        for tensor, (leaf, got) in enumerate(leaves):
            if tensor not in sides:
                np.testing.assert_array_equal(got, leaf)
                continue
            shape = next(group.shape for group in packing.groups if tensor in group.tensors)
            x = np.asarray(leaf, np.float64).reshape(shape)
            left, right = (side[:n, :n] for side, n in zip(sides[tensor], shape, strict=True))
            want = (left @ x @ right).reshape(leaf.shape)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
            for summed, whole in zip(sums[tensor], (x @ x.T, x.T @ x), strict=True):
                is_kept = summed[: len(whole), : len(whole)] != 0
                np.testing.assert_allclose(summed[: len(whole), : len(whole)], whole * is_kept, atol=2e-3)
                assert not np.any(summed[len(whole) :])
                assert np.count_nonzero(is_kept) >= len(whole) * min(block, len(whole)) // 2


def test_sides_are_cut_evenly_where_that_takes_few_blocks_more():
    packing = packing_of(
        {"w": jnp.ones((784, 100)), "e": jnp.ones((500, 16)), "p": jnp.ones((257, 130))}, 128
    )
    parts = {group.shape: (group.left.parts, group.left.size) for group in packing.groups}
    # 257 is a prime number: three blocks, the last of them filled up.
    assert parts == {(784, 100): (7, 112), (500, 16): (4, 125), (257, 130): (3, 86)}


def test_tensors_of_more_numbers_than_float32_counts_are_counted_exactly():
    many = 2**24 + 1  # float32 holds 2**24
    params = {"w": jax.ShapeDtypeStruct((many,), jnp.float32)}
    (packing, _) = both(params)
    filled = lambda tree: packing.filling * packing.pack(tree)
    assert jax.eval_shape(filled, params).shape == (2**24 // LANES + 1, LANES)


def test_vectors_alone_and_nothing_at_all_have_no_blocks():
    for params in ({"b": jnp.ones(3)}, [jnp.ones(()), jnp.ones((1, 5))]):
        packing = packing_of(params, 128)
        assert packing.blocks == []
        none = packing.outer(packing.pack(params))
        assert none.shape == (0,)
        np.testing.assert_array_equal(packing.sandwich(none, packing.pack(params)), packing.pack(params))


def test_under_vmap_and_grad():
    params = tree()
    packing = packing_of(params, 128)

    def norm(p):
        vector = packing.pack(p)
        (scale,) = packing.spread(jnp.sqrt(packing.sums(vector * vector)[0]))
        return jnp.sum(packing.unpack(scale * vector)["kernel"])

    of_kernel = lambda p: jnp.sum(jnp.sqrt(jnp.sum(p["kernel"] ** 2)) * p["kernel"])
    got, want = jax.grad(norm)(params), jax.grad(of_kernel)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    many = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, tree(3))
    np.testing.assert_allclose(jax.vmap(norm)(many), [norm(params), norm(tree(3))], rtol=1e-5)
