"""Streams of examples, and ImageNet made of them, on a few random images."""

import sys

import numpy as np
import pytest

from mlhf_optax.tasks import Stream, imagenet, load_imagenet
from mlhf_optax.tasks.imagenet import central_crop, random_crop

pytestmark = pytest.mark.usefixtures("unoptimised")


def draw(example, rng):
    return {"x": np.int32(example), "random": np.int32(rng.integers(1 << 30))}


def batches(count, size=10, *, seed=0, batch_size=5, start=0, num_workers=0):
    """The first mini-batches of a stream of numbers: the numbers and their random ones, stacked."""
    stream = Stream(range(size), draw, sample={}, num_workers=num_workers)
    iterator = stream.batches(seed, batch_size, start)
    drawn = [next(iterator) for _ in range(count)]
    return np.array([[batch["x"], batch["random"]] for batch in drawn])


def test_every_epoch_holds_every_example_once_in_another_order():
    epochs = batches(4)[:, 0].reshape(2, 10).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_the_rest_of_an_epoch_is_dropped():
    epochs = batches(40, 11, batch_size=4)[:, 0].reshape(20, 8)
    assert all(len(set(epoch.tolist())) == 8 for epoch in epochs)
    assert set(epochs.ravel().tolist()) == set(range(11))


def test_random_numbers_are_new_for_every_example_and_epoch():
    assert len(set(batches(6)[:, 1].ravel().tolist())) == 30


def test_a_stream_can_go_on_anywhere_and_the_seed_decides():
    whole = batches(9, seed=3, batch_size=4)
    for start in (1, 2, 5):
        rest = batches(9 - start, seed=3, batch_size=4, start=start)
        np.testing.assert_array_equal(rest, whole[start:])
    assert not np.array_equal(batches(9, batch_size=4), whole)


def test_worker_processes_change_nothing():
    helped = batches(3, batch_size=4, start=3, num_workers=1)
    np.testing.assert_array_equal(helped, batches(3, batch_size=4, start=3))


def test_the_start_must_not_be_negative():
    with pytest.raises(ValueError, match="`start` must be at least 0, got -1"):
        batches(1, start=-1)


def test_missing_grain_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[data\]'"):
        batches(1)


# ImageNet.


def coordinates(height, width):
    """An example whose pixels are their own row and column."""
    rows, columns = np.mgrid[:height, :width]
    return {"image": np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8), "label": 7}


def test_the_middle_is_cut_out():
    example = central_crop(coordinates(64, 96), 32)
    assert example["label"] == 7
    assert example["image"].shape == (32, 32, 3)
    # 56 of 64 rows from the fourth on, 56 of 96 columns from the twentieth on.
    np.testing.assert_allclose(example["image"][[0, -1], 0, 0], [4, 59], atol=1)
    np.testing.assert_allclose(example["image"][0, [0, -1], 1], [20, 75], atol=1)


def test_random_parts_have_the_area_and_the_shape_that_they_should():
    rng = np.random.default_rng(0)
    images = [random_crop(coordinates(120, 100), rng, 20)["image"] for _ in range(300)]
    spans = np.array([[np.ptp(image[:, 0, 0]), np.ptp(image[0, :, 1])] for image in images]) / 0.95
    areas, ratios = spans.prod(axis=1) / 12000, spans[:, 1] / spans[:, 0]
    assert 0.06 < areas.min() < 0.15
    assert 0.6 < areas.max() < 1.1
    assert 0.65 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.5
    assert len({image.tobytes() for image in images}) > 290


def test_images_that_no_part_fits_are_cut_in_the_middle():
    example = coordinates(2, 200)
    part = random_crop(example, np.random.default_rng(0), 4)["image"]
    np.testing.assert_array_equal(part, central_crop(example, 4, 1.0)["image"])


def pictures(count, first):
    """Pictures of one colour and of several sizes; the colour is the label."""
    return [
        {"image": np.full((20 + label % 5, 25, 3), label, np.uint8), "label": label}
        for label in range(first, first + count)
    ]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The splits of a prepared dataset of 40 and 9 images."""
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    (tmp_path / "imagenet2012" / "5.1.0" / "dataset_info.json").write_text("{}")
    sources = {"train": pictures(40, 0), "validation": pictures(9, 100)}
    monkeypatch.setattr(imagenet, "open_sources", lambda name, folder: sources)
    imagenet._load.cache_clear()
    yield sources
    imagenet._load.cache_clear()


def load(folder, num_held=4):
    return load_imagenet(folder, folder / "cache", image_size=8, num_held=num_held, num_workers=0)


def test_parts_are_disjoint_and_the_rest_is_streamed(sources, tmp_path):
    data = load(tmp_path)
    assert data.meta_train["label"].tolist() == [0, 1, 2, 3]
    assert data.train.sample["label"].tolist() == [4, 5, 6, 7]
    assert data.test["label"].tolist() == [100, 101, 102, 103]
    assert len(data.train) == 36
    iterator = data.train.batches(seed=0, batch_size=12)
    streamed = [next(iterator) for _ in range(3)]
    assert sorted(np.concatenate([batch["label"] for batch in streamed]).tolist()) == list(range(4, 40))
    for part in (data.test, *streamed):
        assert part["image"].shape == (len(part["label"]), 8, 8, 3)
        assert (part["image"] == part["label"][:, None, None, None]).all()


def test_too_few_images_are_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="must have more than 10 examples in validation"):
        load(tmp_path, num_held=5)


def test_damaged_images_are_refused(sources, tmp_path):
    sources["train"][5] = {"image": np.zeros((9, 9, 3), np.uint8), "label": 1000}
    with pytest.raises(ValueError, match=r"the dataset 'imagenet2012' in .* is damaged"):
        load(tmp_path)
