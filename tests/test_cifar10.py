"""CIFAR-10 from files as tensorflow-datasets writes them, of a few random images; the cache of arrays."""

import sys
from pathlib import Path

import numpy as np
import pytest
from prepared import write_cifar10

from mlhf_optax.tasks import cifar10, prepared

SIZES = {"train": 10, "test": 4}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A prepared dataset of ten and four images, in a folder beside an empty cache."""
    monkeypatch.setattr(cifar10, "SIZES", SIZES)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    cifar10._load.cache_clear()
    yield tmp_path, write_cifar10(tmp_path / "data", SIZES)
    cifar10._load.cache_clear()


def load(folder):
    return cifar10.load_cifar10(folder / "data", folder / "cache")


def test_the_split_follows_the_published_order_and_reading_needs_no_tensorflow(small):
    folder, written = small
    data, (images, labels) = load(folder), written["train"]
    expected = ((images[:6], labels[:6]), (images[6:], labels[6:]), written["test"])
    for part, (image, label) in zip((data.meta_train, data.train, data.test), expected, strict=True):
        np.testing.assert_array_equal(part["image"], image)
        np.testing.assert_array_equal(part["label"], label)
        assert (part["image"].dtype, part["label"].dtype) == (np.uint8, np.int32)
        with pytest.raises(ValueError, match="read-only"):
            part["label"][0] = 3
    assert "tensorflow" not in sys.modules


def test_the_second_time_nothing_is_decoded(small, monkeypatch):
    folder, _ = small
    first = load(folder)
    cifar10._load.cache_clear()
    monkeypatch.setattr(prepared, "decode_split", None)
    np.testing.assert_array_equal(load(folder).train["image"], first.train["image"])
    assert load(folder) is load(folder)


def test_the_environment_says_where_the_data_are(small, monkeypatch):
    folder, written = small
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "data"))
    data = cifar10.load_cifar10(cache_dir=folder / "cache")
    np.testing.assert_array_equal(data.test["label"], written["test"][1])
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(folder))
    assert prepared.data_folder() == folder / "tensorflow_datasets"


def test_too_few_examples_are_refused(small, monkeypatch):
    monkeypatch.setattr(cifar10, "SIZES", {"train": 50, "test": 4})
    message = r"must have {'train': 50, 'test': 4} .* has {'train': 10, 'test': 4}"
    with pytest.raises(ValueError, match=message):
        load(small[0])


@pytest.mark.parametrize("name", ["cifar10-train*", "dataset_info.json"])
def test_damaged_files_are_refused_with_the_remedy(small, name):
    folder, _ = small
    (path,) = (folder / "data").glob(f"cifar10/*/{name}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = r"'cifar10' in .* is damaged or not in the array_record format .*; delete .* and prepare it"
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("shape", "dtype", "label"),
    [((2, 3, 3), "uint8", 0), ((2, 2, 3), "float32", 0), *(((2, 2, 3), "uint8", x) for x in (4, -1, None))],
)
def test_examples_of_another_form_are_refused(shape, dtype, label):
    example = {"image": np.zeros(shape, dtype), "label": label}
    with pytest.raises(ValueError, match=r"the dataset 'odd' in /data is damaged"):
        prepared.decode_split([example], "odd", Path("/data"), (2, 2, 3), 4)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "PIL"])
def test_missing_packages_are_explained(small, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'mlhf-optax\[data\]'"):
        load(small[0])


def test_a_damaged_cache_is_refused(small):
    folder, _ = small
    load(folder)
    cifar10._load.cache_clear()
    (path,) = (folder / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10-.*\.npz is damaged .* delete it"):
        load(folder)


def test_the_cache_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        prepared.cached_arrays("x", lambda: {"x": np.ones(2)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_where_the_system_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepared.cache_folder() == tmp_path / "mlhf_optax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepared.cache_folder() == tmp_path / ".cache" / "mlhf_optax"
