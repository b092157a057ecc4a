"""The digits and their split; drawing of batches and their limits."""

import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets

from mlhf_optax.tasks import check_batch_size, digits_mlp, epoch_indices, load_digits, sample_batches
from mlhf_optax.tasks.digits import FRACTIONS, SPLIT_SEED, stratified_split

PARTS = ("meta_train", "train", "test")


def test_digits_are_each_in_exactly_one_part_with_the_same_share_of_every_class():
    images, labels = datasets.load_digits(return_X_y=True)
    split = stratified_split(labels, FRACTIONS, SPLIT_SEED)
    assert sorted(np.concatenate(split).tolist()) == list(range(1797))
    for name, members, fraction in zip(PARTS, split, FRACTIONS, strict=True):
        part = getattr(load_digits(), name)
        assert part["image"].shape == (len(members), 8, 8, 1)
        assert (part["image"].dtype, part["label"].dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(part["image"].reshape(-1, 64) * 16, images[members])
        np.testing.assert_array_equal(part["label"], labels[members])
        assert np.all(np.abs(np.bincount(part["label"]) - fraction * np.bincount(labels)) <= 1)
    rows = [{row.tobytes() for row in getattr(load_digits(), part)["image"]} for part in PARTS]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1797, "no image occurs twice"


def test_the_split_never_changes():
    """Shipped meta-parameters were trained on one part: another split would leak it into the others."""
    sums = [zlib.crc32(getattr(load_digits(), part)["image"].tobytes()) for part in PARTS]
    assert sums == [905672736, 3617226291, 2580515216]


def test_digits_cannot_be_written_into():
    with pytest.raises(ValueError, match="read-only"):
        load_digits().train["label"][0] = 3


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[experiments\]'"):
        load_digits.__wrapped__()


def test_other_seeds_split_otherwise():
    labels = np.arange(40) % 4
    first, second = (stratified_split(labels, (0.5, 0.5), seed)[0] for seed in (0, 1))
    assert set(first.tolist()) != set(second.tolist())


def test_epochs_go_through_the_data_without_repeats():
    indices = np.asarray(epoch_indices(jax.random.key(0), 12, 4, num_steps=7))
    assert indices.shape == (7, 4)
    assert indices.dtype == np.int32
    epochs = [indices[:3].ravel().tolist(), indices[3:6].ravel().tolist()]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


def test_the_rest_of_an_epoch_is_dropped_and_differs():
    indices = np.asarray(epoch_indices(jax.random.key(1), 10, 4, num_steps=40)).reshape(20, 8)
    assert all(len(set(epoch.tolist())) == 8 for epoch in indices)
    assert set(indices.ravel().tolist()) == set(range(10))


def test_epochs_under_jit_and_vmap():
    keys = jax.random.split(jax.random.key(2), 2)
    draw = lambda key: epoch_indices(key, 10, 3, 5)
    mapped = jax.jit(jax.vmap(draw))(keys)
    np.testing.assert_array_equal(mapped, jnp.stack([draw(key) for key in keys]))
    assert not np.array_equal(mapped[0], mapped[1])


def test_steps_may_be_none_but_not_fewer():
    assert epoch_indices(jax.random.key(0), 10, 3, 0).shape == (0, 3)
    with pytest.raises(ValueError, match="`num_steps` must be a number >= 0, got -1"):
        epoch_indices(jax.random.key(0), 10, 2, -1)


def test_sampled_batches_keep_images_and_labels_together():
    data = {"image": np.arange(50.0).reshape(5, 10), "label": np.arange(5)}
    batches = jax.jit(lambda key: sample_batches(data, key, (200, 3)))(jax.random.key(0))
    assert batches["image"].shape == (200, 3, 10)
    np.testing.assert_array_equal(batches["image"][..., 0], 10.0 * batches["label"])
    assert np.bincount(batches["label"].ravel()).min() > 80, "600 uniform draws of 5 examples"


def test_a_batch_of_all_examples_holds_each_once():
    data = {"image": np.arange(10.0).reshape(5, 2), "label": np.arange(5)}
    batches = sample_batches(data, jax.random.key(0), (3, 5))
    for name, part in data.items():
        np.testing.assert_array_equal(batches[name], np.stack([part] * 3))


@pytest.mark.parametrize("data", [{}, {"x": np.zeros(3), "y": np.zeros(4)}, {"x": np.float32(1)}])
def test_data_must_be_arrays_of_one_length(data):
    with pytest.raises(ValueError, match="`data` must be arrays with the examples first"):
        sample_batches(data, jax.random.key(0), (2,))


# Batches larger than the data; the large ones would take hundreds of gigabytes if they were drawn.


@pytest.mark.parametrize("batch_size", [0, 11, 10**11])
def test_batches_must_fit_the_data(batch_size):
    got = f"must be between 1 and the number of examples, 10, got {batch_size}; take smaller"
    with pytest.raises(ValueError, match=f"`batch_size` {got}"):
        epoch_indices(jax.random.key(0), 10, batch_size, 1)
    with pytest.raises(ValueError, match=rf"`shape\[-1\]` {got}"):
        sample_batches({"x": np.zeros((10, 64))}, jax.random.key(0), (8, 3, batch_size))


@pytest.mark.parametrize("batch_size", [0, 720, 10**11])
def test_tasks_are_checked_before_anything_is_drawn(batch_size):
    task = digits_mlp(batch_size=batch_size)
    check_batch_size(task, "meta_train")
    message = f"`batch_size` must .* number of training examples of 'digits-mlp', 719, got {batch_size}"
    with pytest.raises(ValueError, match=message):
        check_batch_size(task)
    task = digits_mlp(meta_batch_size=batch_size)
    check_batch_size(task)
    with pytest.raises(ValueError, match=f"`meta_batch_size` .* meta-training .* 719, got {batch_size}"):
        check_batch_size(task, "meta_train")
