"""Tiny-ImageNet from a folder of a few random images, through its file to arrays."""

import sys

import numpy as np
import pytest
from PIL import Image

from mlhf_optax.tasks import load_tiny_imagenet, pack_tiny_imagenet, tiny_imagenet

WNIDS = ("n01", "n02", "n03")


@pytest.fixture
def packed(tmp_path):
    """The file made of a folder with five training images and one test image per class."""
    folder, lines = tmp_path / "tiny-imagenet-200", []
    for number, wnid in enumerate(WNIDS):
        for index in range(5):
            path = folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG"
            save(path, 40 * number + 5 * index, "L" if index == 0 else "RGB")
        save(folder / "val" / "images" / f"val_{number}.JPEG", 200 + number)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    tiny_imagenet._load.cache_clear()
    yield pack_tiny_imagenet(folder, tmp_path / "tiny_imagenet3.npz")
    tiny_imagenet._load.cache_clear()


def save(path, level, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (64, 64), level if mode == "L" else (level, level, level)).save(path, "JPEG")


def load(file, num_classes=None):
    return load_tiny_imagenet(file, file.parent / "cache", num_classes)


def test_classes_take_turns_and_the_first_fifth_is_for_meta_training(packed):
    data = load(packed)
    expected = {
        "meta_train": ([0, 1, 2], [0, 40, 80]),
        "train": ([0, 1, 2] * 4, [5 * i + 40 * c for i in (1, 2, 3, 4) for c in range(3)]),
        "test": ([2, 1, 0], [202, 201, 200]),
    }
    for name, (labels, levels) in expected.items():
        part = getattr(data, name)
        assert part["label"].tolist() == labels
        assert part["image"].mean(axis=(1, 2, 3)) == pytest.approx(levels, abs=1)
        assert part["image"].shape[1:] == (64, 64, 3)
        assert (part["image"].dtype, part["label"].dtype) == (np.uint8, np.int32)
        assert not any(array.flags.writeable for array in part.values())


def test_a_folder_may_be_given_and_decoding_is_done_once(packed, monkeypatch):
    first = load(packed)
    tiny_imagenet._load.cache_clear()
    monkeypatch.setattr(tiny_imagenet, "_decode", None)
    again = load_tiny_imagenet(packed.parent, packed.parent / "cache")
    np.testing.assert_array_equal(again.train["image"], first.train["image"])


def test_fewer_classes_can_be_kept(packed):
    data = load(pack_tiny_imagenet(packed.parent / "tiny-imagenet-200", packed.parent / "two.npz", 2))
    assert set(data.train["label"]) == set(data.test["label"]) == {0, 1}


def test_the_number_of_classes_must_be_that_of_the_task(packed):
    assert load(packed, num_classes=3) is load(packed)
    with pytest.raises(ValueError, match="holds 3 classes, but `num_classes` is 200; set it to 3"):
        load(packed, num_classes=200)


def test_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not tiny-imagenet-200 unpacked"):
        pack_tiny_imagenet(tmp_path, tmp_path / "x.npz")


def test_one_of_several_files_must_be_chosen(packed):
    packed.with_name("tiny_imagenet9.npz").write_bytes(packed.read_bytes())
    with pytest.raises(ValueError, match="holds several files"):
        load_tiny_imagenet(packed.parent)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"y_test": None}, "y_test"),
        ({"y_test": np.array([0, 1, 3])}, "labels of test do not fit"),
        ({"y_test": np.array([0, -1, 1])}, "labels of test do not fit"),
        ({"y_test": np.array([0, 1])}, "labels of test do not fit"),
        ({"test_jpeg": np.zeros(10, np.uint8)}, "image 0 of test"),
    ],
)
def test_damaged_files_are_refused(packed, changes, problem):
    with np.load(packed) as arrays:
        content = dict(arrays) | changes
    np.savez(packed, **{name: array for name, array in content.items() if array is not None})
    with pytest.raises(ValueError, match=rf"is not a whole file of Tiny-ImageNet \(.*{problem}"):
        load(packed)


def test_half_a_file_is_refused(packed):
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole file of Tiny-ImageNet"):
        load(packed)


def test_missing_pillow_is_explained(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[data\]'"):
        load(packed)
    assert not (packed.parent / "cache").exists()
