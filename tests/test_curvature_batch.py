"""The part of a batch on which curvature is taken."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import SoftmaxCrossEntropy, SquaredError, gauss_newton, load_pretrained
from mlhf_optax.curvature_batch import ShareOrAll, check_curvature_batch, curvature_subset

PARAMS = jnp.ones((2, 3))
SIZED = ("x", "y")


def squared(outputs, batch):
    return jnp.mean((outputs - batch["y"][:, None]) ** 2)


def full_batch(**others):
    return {"x": jnp.arange(16.0).reshape(8, 2), "y": jnp.arange(8.0), **others}


def subset(part, batch, per_example=None, predict_fn=lambda p, b: b["x"] @ p, loss_fn=squared):
    return curvature_subset(predict_fn, PARAMS, batch, part, per_example, loss_fn=loss_fn)


@pytest.mark.parametrize(("part", "count"), [(None, 8), (3, 3), (8, 8), (0.25, 2), (1.0, 8), (0.01, 1)])
def test_part_of_a_batch_is_at_even_distances_and_what_is_not_named_is_kept_whole(part, count):
    taken = [0, 4] if part == 0.25 else list(range(count))
    state = {"mean": jnp.ones(8), "key": jax.random.key(0), "n": 5, "mode": "train", "none": None}
    unnamed, named = (
        subset(part, full_batch()),
        subset(part, full_batch(state=state, mask=None), ["x", "y", "mask"]),
    )
    for small in (unnamed, named, jax.jit(lambda batch: subset(part, batch))(full_batch())):
        for name in SIZED:
            np.testing.assert_array_equal(small[name], full_batch()[name][jnp.array(taken)])
    assert named["state"] == state
    assert named["mask"] is None
    every_other = lambda batch: {"x": batch["x"][::2]}
    np.testing.assert_array_equal(subset(every_other, full_batch())["x"], full_batch()["x"][::2])


class Pair(NamedTuple):
    x: jax.Array
    y: jax.Array
    scale: jax.Array


@pytest.mark.parametrize(
    ("make", "names"), [(Pair, ("x", "y")), (lambda *leaves: leaves, (0, 1))], ids=["NamedTuple", "tuple"]
)
def test_names_are_fields_of_a_named_tuple_or_positions(make, names):
    batch = make(jnp.ones((8, 2)), jnp.ones(8), jnp.ones(8))
    predict_fn = lambda p, b: b[0] @ p * jnp.sum(b[2])
    loss_fn = lambda z, b: jnp.mean((z - b[1][:, None]) ** 2)
    small = subset(2, batch, names, predict_fn, loss_fn)
    assert [leaf.shape for leaf in small] == [(2, 2), (2,), (8,)]
    assert isinstance(small, type(batch))


def test_examples_of_several_positions_may_give_flat_outputs_if_they_are_named():
    batch = {"x": jnp.ones((4, 3, 2)), "y": jnp.ones((4, 3))}
    predict_fn = lambda p, b: b["x"].reshape(-1, 2) @ p
    loss_fn = lambda z, b: jnp.mean((z - b["y"].reshape(-1, 1)) ** 2)
    assert subset(0.5, batch, SIZED, predict_fn, loss_fn)["x"].shape == (2, 3, 2)
    with pytest.raises(
        ValueError, match=r"'x' of shape \(4, 3, 2\) does not begin with the 12 examples of the"
    ):
        subset(0.5, batch, None, predict_fn, loss_fn)


def test_a_model_may_work_on_groups_of_examples():
    predict_fn = lambda p, b: (b["x"].reshape(-1, 4, 2) - b["x"].reshape(-1, 4, 2).mean(1, keepdims=True)) @ p
    grouped = lambda p, b: predict_fn(p, b).reshape(-1, 3)
    assert subset(4, full_batch(), predict_fn=grouped)["x"].shape == (4, 2)


NORMED = lambda p, b: (b["x"] @ p)[..., None] * b["scale"][None, None]  # outputs of shape (8, 3, 8)
NORMED_LOSS = lambda z, b: jnp.mean((z - b["y"][:, None, None]) ** 2)
HIDDEN = lambda p, b: jnp.tanh(b["x"] @ jnp.ones((2, 8)) - b["mean"][None]) @ jnp.ones((8, 3)) * p.sum()
REMEDY = r".*per_example=\(\"image\", \"label\"\)"


@pytest.mark.parametrize("part", [1, 0.5])
@pytest.mark.parametrize(
    ("others", "predict_fn", "loss_fn", "message"),
    [
        ({"state": {"mean": jnp.ones(3)}}, None, squared, r"'state/mean' of shape \(3,\) does not begin"),
        ({"n": 5}, None, squared, r"'n' of shape \(\) does not begin with the 8 examples of the outputs"),
        # Model state that is as long as the batch, which a part of one example would broadcast.
        ({"mean": jnp.ones(8)}, HIDDEN, squared, "model or the loss does not work"),
        ({"scale": jnp.ones(8)}, NORMED, NORMED_LOSS, "gives other than as many more outputs"),
        # Tables that are read at indices: shorter ones are read past their end.
        ({"weight": jnp.ones(8)}, None, lambda z, b: squared(z, b) * b["weight"][b["y"].astype(int)].mean(),
         r"'weight' of shape \(8,\) is as long as the batch, but model and loss"),
        ({"table": jnp.ones((8, 3))}, lambda p, b: b["x"] @ p + b["table"][b["y"].astype(int)], squared,
         r"'table' of shape \(8, 3\) is as long as the batch"),
        ({"bank": jnp.ones((8, 2))}, lambda p, b: b["x"] @ p * b["bank"].sum(), squared,
         r"'bank' of shape \(8, 2\) is as long as the batch"),
    ],
)  # fmt: skip
def test_model_state_that_would_be_cut_is_an_error_unless_names_say_what_is(
    others, predict_fn, loss_fn, message, part
):
    predict_fn, batch = predict_fn or (lambda p, b: b["x"] @ p), full_batch(**others)
    cut = lambda batch: subset(part, batch, None, predict_fn, loss_fn)
    for function in (cut, jax.jit(cut)):
        with pytest.raises(ValueError, match=message + REMEDY):
            function(batch)
    small = subset(part, batch, SIZED, predict_fn, loss_fn)
    jax.tree.map(np.testing.assert_array_equal, {name: small[name] for name in others}, others)
    assert small["x"].shape[0] == small["y"].shape[0] < 8


def test_a_forgotten_name_and_a_name_too_many_are_errors():
    with pytest.raises(ValueError, match="a per-example array is not named" + REMEDY):
        subset(1, full_batch(), ("x",))
    with pytest.raises(ValueError, match="model or the loss does not work" + REMEDY):
        subset(1, full_batch(mean=jnp.ones(8)), ("x", "y", "mean"), HIDDEN)
    with pytest.raises(ValueError, match=r"'z' of shape \(3,\) does not begin with the 8 examples of other"):
        subset(1, full_batch(z=jnp.ones(3)), ("x", "y", "z"))
    with pytest.raises(ValueError, match=r"'key' of shape \(\) does not begin with"):
        subset(1, {**full_batch(), "key": jax.random.key(0)}, ("key", "x"))
    with pytest.raises(ValueError, match=r"`per_example` names image, label, but the batch has x, y"):
        subset(1, full_batch(), ("image", "label", "x"))


def test_an_error_of_the_model_itself_is_not_dressed_up():
    with pytest.raises(KeyError, match="missing"):
        subset(2, full_batch(), predict_fn=lambda p, b: b["missing"])


@pytest.mark.parametrize("predict_fn", [lambda p, b: jnp.sum(b["x"]), lambda p, b: (b["x"], b["y"][:2])])
def test_part_of_a_batch_needs_a_leading_dimension(predict_fn):
    with pytest.raises(ValueError, match=r"share one leading batch dimension.*pass a function"):
        subset(0.5, full_batch(), predict_fn=predict_fn, loss_fn=None)


def test_part_of_a_batch_larger_than_the_batch_is_an_error():
    with pytest.raises(ValueError, match=r"`curvature_batch_size`=9 is larger than the batch of 8"):
        subset(9, full_batch())


def test_part_of_a_batch_out_of_range_or_of_another_type_is_an_error():
    for part in (0, -1, 0.0, 1.5, 2.0, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"`curvature_batch_size`.*got {part}"):
            check_curvature_batch(part)
    for part in (True, "half", np.array([1])):
        with pytest.raises(TypeError, match=f"`curvature_batch_size` must be .* got {type(part).__name__}"):
            check_curvature_batch(part)


@pytest.mark.parametrize(
    ("part", "names", "error", "message"),
    [
        (0.5, "image", TypeError, r"`per_example` must be names such as .*, got 'image'"),
        (0.5, 3, TypeError, "`per_example` must be names such as .*, got 3"),
        (0.5, (), ValueError, "`per_example` names nothing"),
        (lambda batch: batch, ("image",), ValueError, "`per_example` has no effect"),
    ],
)  # fmt: skip
def test_names_that_are_none_are_errors(part, names, error, message):
    with pytest.raises(error, match=message):
        check_curvature_batch(part, names)
    check_curvature_batch(None, ("image",))


# Even distances.


@pytest.mark.parametrize("size", [100, 101, 569, 1797, 7])
@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.6])
def test_a_fraction_is_spread_evenly_over_batches_of_any_size(size, fraction):
    """Of 101 ordered points the first quarter is another function than the whole."""
    batch = {"x": jnp.ones((size, 2)), "label": jnp.arange(size)}
    predict_fn, loss_fn = lambda p, b: (b["x"] @ p)[:, 0], SquaredError()
    taken = np.asarray(curvature_subset(predict_fn, PARAMS, batch, fraction, loss_fn=loss_fn)["label"])
    assert taken.size == round(fraction * size)
    assert taken[0] == 0
    gaps = np.diff([*taken, size])
    assert gaps.max() - gaps.min() <= 1
    assert abs(gaps.mean() - 1 / fraction) < 0.5 / fraction


def test_ordered_points_train_as_well_in_prime_numbers_as_in_round_ones():
    def last_loss(size):
        x = jnp.linspace(-2.0, 2.0, size)[:, None]
        batch = {"x": x, "label": jnp.sin(3.0 * x)}
        predict_fn = lambda p, b: jnp.tanh(b["x"] @ p["w"] + p["b"]) @ p["v"]
        loss_fn = SquaredError()
        keys = jax.random.split(jax.random.key(0))
        params = {"w": 2 * jax.random.normal(keys[0], (1, 16)), "b": jnp.zeros((1, 16))}
        params["v"] = 0.25 * jax.random.normal(keys[1], (16, 1))
        tx = gauss_newton(1.0, predict_fn, loss_fn, damping=0.1, curvature_batch_size=0.25)

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (jax.tree.map(jnp.add, params, updates), state), loss

        return jax.jit(lambda c: jax.lax.scan(step, c, None, 60))((params, tx.init(params)))[1][-1]

    assert last_loss(101) < 3 * last_loss(100)


# Batches that are no list of examples.


def contrastive(p, b):
    z = b["x"] @ p
    return z @ z.T


CANNOT_BE_CUT = {
    "two sets of points": (
        {"inside": jnp.ones((12, 2)), "edge": jnp.ones((5, 2))},
        lambda p, b: (b["inside"] @ p, b["edge"] @ p),
        lambda z, b: sum(jnp.mean(part**2) for part in z),
    ),
    "graph": (
        {"nodes": jnp.ones((6, 2)), "senders": jnp.zeros(9, int), "receivers": jnp.arange(9) % 6},
        lambda p, b: jax.ops.segment_sum((b["nodes"] @ p)[b["senders"]], b["receivers"], 6),
        lambda z, b: jnp.mean(z**2),
    ),
    "parameters among the outputs": (
        {"x": jnp.ones((8, 2))},
        lambda p, b: {"logits": b["x"] @ p, "weights": p},
        lambda z, b: jnp.mean(z["logits"] ** 2) + 1e-3 * jnp.sum(z["weights"] ** 2),
    ),
    "contrastive logits": ({"x": jnp.ones((8, 2))}, contrastive, lambda z, b: jnp.mean(jnp.exp(z))),
    "empty": ((), lambda p, b: p - 3.0, lambda z, b: jnp.mean(z**2)),
    "sum": ({"x": jnp.ones((8, 2))}, lambda p, b: b["x"] @ p, lambda z, b: jnp.sum(z**2)),
}


@pytest.mark.parametrize("case", CANNOT_BE_CUT)
def test_with_the_default_a_batch_that_cannot_be_cut_gives_curvature_on_all_of_it(case):
    batch, predict_fn, loss_fn = CANNOT_BE_CUT[case]
    cut = lambda part: curvature_subset(predict_fn, PARAMS, batch, part, loss_fn=loss_fn)
    with pytest.warns(UserWarning, match=r"on the whole batch.*`curvature_batch_size`=0.25.*=None"):
        whole = cut(ShareOrAll(0.25))
    jax.tree.map(np.testing.assert_array_equal, whole, batch)
    with pytest.raises(ValueError, match=r"None`? for the whole batch$"):
        cut(0.25)
    assert cut(None) is batch


@pytest.mark.parametrize("case", CANNOT_BE_CUT)
def test_the_optimizer_of_the_shelf_trains_on_such_a_batch_and_warns_once(case):
    batch, predict_fn, loss_fn = CANNOT_BE_CUT[case]
    tx = load_pretrained().optimizer(predict_fn, loss_fn)
    params, losses = 0.5 * PARAMS, []
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return params + updates, state, loss

    with pytest.warns(UserWarning, match="on the whole batch"):
        compiled = step.lower(params, state).compile()
    for _ in range(5):
        params, state, loss = compiled(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="None"):
        load_pretrained().optimizer(predict_fn, loss_fn, curvature_batch_size=0.25).update(
            params, state, params, batch=batch
        )


def test_a_loss_that_is_a_mean_passes_whatever_it_reads():
    batch = full_batch(weight=jnp.ones(8), label=jnp.arange(8) % 3)
    predict_fn = lambda p, b: b["x"] @ p + 0 * b["y"][:, None]
    weighted = lambda z, b: jnp.sum(b["weight"][:, None] * z**2) / jnp.sum(b["weight"])
    for loss_fn in (weighted, SoftmaxCrossEntropy()):
        assert subset(0.5, batch, tuple(batch), predict_fn, loss_fn)["x"].shape == (4, 2)
    with pytest.raises(ValueError, match="`loss_fn` adds up over the examples"):
        subset(0.5, batch, tuple(batch), predict_fn, lambda z, b: jnp.sum(b["weight"][:, None] * z**2))


# Sizes that are symbols.


@pytest.mark.parametrize("part", [0.25, None, 2])
def test_a_step_is_exported_for_batches_of_any_size(part):
    predict_fn, loss_fn = lambda p, b: jnp.tanh(b["x"] @ p), SoftmaxCrossEntropy()
    tx = gauss_newton(1.0, predict_fn, loss_fn, curvature_batch_size=part)

    def direction(params, batch):
        grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    (size,) = jax.export.symbolic_shape("size")
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    batch = {"x": shape(size, 2), "label": shape(size, dtype=jnp.int32)}
    exported = jax.export.export(jax.jit(direction))(shape(2, 3), batch)
    for examples in (8, 12):
        x = jax.random.normal(jax.random.key(examples), (examples, 2))
        given = {"x": x, "label": jnp.arange(examples, dtype=jnp.int32) % 3}
        np.testing.assert_allclose(
            exported.call(PARAMS, given), direction(PARAMS, given), rtol=1e-4, atol=1e-6
        )


def test_a_fraction_that_no_symbol_can_be_cut_to_is_an_error_that_names_it():
    (size,) = jax.export.symbolic_shape("size")
    cut = lambda batch: subset(0.3, batch)
    batch = {"x": jax.ShapeDtypeStruct((size, 2), float), "y": jax.ShapeDtypeStruct((size,), float)}
    with pytest.raises(ValueError, match=r"`curvature_batch_size`=0.3 of a batch whose size is not known"):
        jax.export.export(jax.jit(cut))(batch)
