"""Streams of examples, and ImageNet made of them, on a few random images."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from mlhf_optax.tasks import imagenet
from mlhf_optax.tasks.imagenet import Stretch, central_crop, random_crop
from mlhf_optax.tasks.streaming import Stream


class Numbers:
    """Examples that are their own number."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return {"x": index}


def draw(example, rng):
    return {"x": np.int32(example["x"]), "random": np.int32(rng.integers(1 << 30))}


def stream(count=10, **options):
    return Stream(Numbers(count), draw, sample={}, **options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(batches, others):
    return all(
        np.array_equal(a[key], b[key])
        for a, b in zip(batches, others, strict=True)
        for key in ("x", "random")
    )


def test_every_epoch_holds_every_example_once_in_another_order():
    batches = take(stream().batches(seed=0, batch_size=5), 4)
    epochs = [np.concatenate([batch["x"] for batch in batches[i : i + 2]]).tolist() for i in (0, 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_the_rest_of_an_epoch_is_dropped():
    batches = take(stream(11).batches(seed=0, batch_size=4), 40)
    for i in range(0, 40, 2):
        assert len(set(np.concatenate([batch["x"] for batch in batches[i : i + 2]]).tolist())) == 8


def test_random_numbers_are_new_for_every_example_and_epoch():
    batches = take(stream().batches(seed=0, batch_size=5), 6)
    assert len({int(number) for batch in batches for number in batch["random"]}) == 30


def test_a_stream_can_go_on_anywhere():
    whole = take(stream().batches(seed=3, batch_size=4), 9)
    for start in (1, 2, 5):
        assert same(take(stream().batches(seed=3, batch_size=4, start=start), 9 - start), whole[start:])


def test_seeds_decide():
    first, again, other = (take(stream().batches(seed=s, batch_size=5), 2) for s in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_worker_processes_change_nothing():
    alone, helped = stream(), stream(num_workers=1)
    for start in (0, 3):
        batches = take(helped.batches(seed=0, batch_size=4, start=start), 3)
        assert same(batches, take(alone.batches(seed=0, batch_size=4, start=start), 3))


@pytest.mark.parametrize(("batch_size", "start"), [(0, 0), (11, 0), (5, -1)])
def test_arguments_are_checked(batch_size, start):
    with pytest.raises(ValueError, match="`batch_size` must lie between 1 and the number of examples, 10"):
        stream().batches(seed=0, batch_size=batch_size, start=start)


def test_missing_grain_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[data\]'"):
        stream().batches(seed=0, batch_size=5)


# ImageNet.


def coordinates(height, width):
    """An image whose pixels are their own row and column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def test_the_middle_is_cut_out():
    example = central_crop({"image": coordinates(64, 96), "label": 7}, 32)
    assert example["label"] == 7
    assert example["image"].shape == (32, 32, 3)
    # 56 of 64 rows from the fourth on, 56 of 96 columns from the twentieth on.
    np.testing.assert_allclose(example["image"][[0, -1], 0, 0], [4, 59], atol=1)
    np.testing.assert_allclose(example["image"][0, [0, -1], 1], [20, 75], atol=1)


def test_random_parts_have_the_area_and_the_shape_that_they_should():
    rng = np.random.default_rng(0)
    images = [random_crop({"image": coordinates(120, 100), "label": 0}, rng, 20)["image"] for _ in range(300)]
    spans = np.array([[np.ptp(image[:, 0, 0]), np.ptp(image[0, :, 1])] for image in images]) / 0.95
    areas, ratios = spans.prod(axis=1) / 12000, spans[:, 1] / spans[:, 0]
    assert 0.06 < areas.min() < 0.15
    assert 0.6 < areas.max() < 1.1
    assert 0.65 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.5
    assert len({image.tobytes() for image in images}) > 290


def test_images_that_no_part_fits_are_cut_in_the_middle():
    image = coordinates(2, 200)
    part = random_crop({"image": image, "label": 0}, np.random.default_rng(0), 4)["image"]
    np.testing.assert_array_equal(part, central_crop({"image": image, "label": 0}, 4, 1.0)["image"])


class Pictures:
    """Pictures of one colour and of several sizes; the colour is the label."""

    def __init__(self, count, first):
        self._count, self._first = count, first

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        label = self._first + index
        return {"image": np.full((20 + index % 5, 25, 3), label, np.uint8), "label": label}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A prepared dataset of 40 and 9 images; returns how often it was opened."""
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    (tmp_path / "imagenet2012" / "5.1.0" / "dataset_info.json").write_text("{}")
    sources = {"train": Pictures(40, 0), "validation": Pictures(9, 100)}
    monkeypatch.setattr(imagenet, "open_sources", lambda name, folder: sources)
    imagenet._load.cache_clear()
    yield tmp_path
    imagenet._load.cache_clear()


def load(folder: Path, **options):
    return imagenet.imagenet(folder, folder / "cache", image_size=8, num_held=4, num_workers=0, **options)


def test_parts_are_disjoint_and_the_rest_is_streamed(prepared):
    data = load(prepared)
    assert data.meta_train["label"].tolist() == [0, 1, 2, 3]
    assert data.train.sample["label"].tolist() == [4, 5, 6, 7]
    assert data.test["label"].tolist() == [100, 101, 102, 103]
    assert data.test["image"].shape == (4, 8, 8, 3)
    assert (data.test["image"] == data.test["label"][:, None, None, None]).all()
    assert len(data.train) == 36
    batches = take(data.train.batches(seed=0, batch_size=12), 3)
    assert sorted(np.concatenate([batch["label"] for batch in batches]).tolist()) == list(range(4, 40))
    assert batches[0]["image"].shape == (12, 8, 8, 3)
    assert (batches[0]["image"] == batches[0]["label"][:, None, None, None]).all()


def test_what_is_held_is_decoded_once(prepared, monkeypatch):
    first = load(prepared)
    imagenet._load.cache_clear()
    monkeypatch.setattr(imagenet, "_all_of", None)
    np.testing.assert_array_equal(load(prepared).test["image"], first.test["image"])


def test_too_few_images_are_refused(prepared):
    with pytest.raises(ValueError, match="must have more than 10 examples in validation"):
        imagenet.imagenet(prepared, prepared / "cache", num_held=5)


@pytest.mark.parametrize("source", [[{"image": np.zeros((9, 9, 3), np.uint8), "label": 1000}] * 9, [{}] * 9])
def test_damaged_images_are_refused(source, prepared):
    crop = functools.partial(central_crop, image_size=8)
    with pytest.raises(ValueError, match=r"the dataset 'imagenet2012' in .* (is damaged|has labels out of)"):
        imagenet._all_of(Stretch(source, 0, 2), crop, prepared)


def test_missing_data_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared dataset 'imagenet2012' .*download_and_prepare"):
        imagenet.imagenet(tmp_path)
