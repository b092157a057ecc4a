"""The digits and their split; drawing of batches."""

import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from mlhf_optax.tasks import datasets

PARTS = ("meta_train", "train", "test")


def test_digits_have_the_promised_form():
    data = datasets.digits()
    for part in PARTS:
        examples = getattr(data, part)
        assert examples["image"].shape == (len(examples["label"]), 8, 8, 1)
        assert examples["image"].dtype == np.float32
        assert examples["image"].min() == 0
        assert examples["image"].max() == 1
        assert examples["label"].dtype == np.int32


def test_digits_are_each_in_exactly_one_part():
    images, labels = load_digits(return_X_y=True)
    split = datasets.stratified_split(labels, datasets.DIGITS_FRACTIONS, datasets.DIGITS_SPLIT_SEED)
    assert sorted(np.concatenate(split).tolist()) == list(range(1797))
    for name, members in zip(PARTS, split, strict=True):
        examples = getattr(datasets.digits(), name)
        np.testing.assert_array_equal(examples["image"].reshape(-1, 64) * 16, images[members])
        np.testing.assert_array_equal(examples["label"], labels[members])


def test_no_image_occurs_in_two_parts():
    rows = [{row.tobytes() for row in getattr(datasets.digits(), part)["image"]} for part in PARTS]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1797


def test_every_class_has_its_share_in_every_part():
    totals = np.bincount(load_digits(return_X_y=True)[1])
    for part, fraction in zip(PARTS, datasets.DIGITS_FRACTIONS, strict=True):
        counts = np.bincount(getattr(datasets.digits(), part)["label"])
        assert np.all(np.abs(counts - fraction * totals) <= 1)


def test_the_split_never_changes():
    """Shipped meta-parameters were trained on one part: another split would leak it into the others."""
    sums = [zlib.crc32(getattr(datasets.digits(), part)["image"].tobytes()) for part in PARTS]
    assert sums == [905672736, 3617226291, 2580515216]


def test_digits_cannot_be_written_into():
    with pytest.raises(ValueError, match="read-only"):
        datasets.digits().train["label"][0] = 3


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[experiments\]'"):
        datasets.digits.__wrapped__()


def test_other_seeds_split_otherwise():
    labels = np.arange(40) % 4
    first, second = (datasets.stratified_split(labels, (0.5, 0.5), seed)[0] for seed in (0, 1))
    assert set(first.tolist()) != set(second.tolist())


@pytest.mark.parametrize("fractions", [(0.5, 0.6), (1.5, -0.5), (1.0, 0.0)])
def test_fractions_must_make_sense(fractions):
    with pytest.raises(ValueError, match="`fractions` must be positive and sum to one"):
        datasets.stratified_split(np.zeros(4, int), fractions, 0)


def test_epochs_go_through_the_data_without_repeats():
    indices = np.asarray(datasets.epoch_indices(jax.random.key(0), 12, 4, num_steps=7))
    assert indices.shape == (7, 4)
    assert indices.dtype == np.int32
    epochs = [indices[:3].ravel(), indices[3:6].ravel()]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_rest_of_an_epoch_is_dropped_and_differs():
    indices = np.asarray(datasets.epoch_indices(jax.random.key(1), 10, 4, num_steps=40)).reshape(20, 8)
    assert all(len(set(epoch.tolist())) == 8 for epoch in indices)
    assert set(indices.ravel().tolist()) == set(range(10))


def test_epochs_under_jit_and_vmap():
    keys = jax.random.split(jax.random.key(2), 2)
    draw = lambda key: datasets.epoch_indices(key, 10, 3, 5)
    mapped = jax.jit(jax.vmap(draw))(keys)
    np.testing.assert_array_equal(mapped, jnp.stack([draw(key) for key in keys]))
    assert not np.array_equal(mapped[0], mapped[1])


def test_no_steps_give_no_batches():
    assert datasets.epoch_indices(jax.random.key(0), 10, 3, 0).shape == (0, 3)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batches_must_fit_the_data(batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` must lie between 1 and .* 10, got {batch_size}"):
        datasets.epoch_indices(jax.random.key(0), 10, batch_size, 1)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="`num_steps` must be at least 0, got -1"):
        datasets.epoch_indices(jax.random.key(0), 10, 2, -1)


def test_sampled_batches_keep_images_and_labels_together():
    data = {"image": np.arange(50.0).reshape(5, 10), "label": np.arange(5)}
    batches = jax.jit(lambda key: datasets.sample_batches(data, key, (200, 3)))(jax.random.key(0))
    assert batches["image"].shape == (200, 3, 10)
    np.testing.assert_array_equal(batches["image"][..., 0], 10.0 * batches["label"])
    counts = np.bincount(batches["label"].ravel())
    assert counts.min() > 80, "600 uniform draws of 5 examples"


@pytest.mark.parametrize("data", [{}, {"x": np.zeros(3), "y": np.zeros(4)}, {"x": np.float32(1)}])
def test_data_must_be_arrays_of_one_length(data):
    with pytest.raises(ValueError, match="`data` must be arrays with the examples first"):
        datasets.sample_batches(data, jax.random.key(0), (2,))
