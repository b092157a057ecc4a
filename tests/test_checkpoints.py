"""Checkpoints: what they hold, and that a damaged one is told from a whole one."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.meta_training.checkpoints import list_checkpoints, load_last_checkpoint, save_checkpoint

ABOUT = {"seed": 0, "config": {"steps": (1, 2)}}


def tree(value):
    """More than ten leaves, of all dtypes there are in a state."""
    return {
        "weights": [jnp.full((2, i), value, jnp.float32) for i in range(12)],
        "low": jnp.full(3, value, jnp.bfloat16),
        "count": jnp.asarray(value, jnp.int32),
        "key": jnp.full(2, value, jnp.uint32),
        "mask": jnp.array([True, False]),
    }


TEMPLATE = tree(0)


def saved(folder, *iterations, **kwargs):
    for iteration in iterations:
        path = save_checkpoint(folder, iteration, tree(iteration), ABOUT, **kwargs)
    return path


def assert_loads(folder, iteration):
    found, loaded = load_last_checkpoint(folder, TEMPLATE, ABOUT)
    assert found == iteration
    expected = tree(iteration)
    assert jax.tree.map(jnp.result_type, loaded) == jax.tree.map(jnp.result_type, expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def names(folder):
    return sorted(os.listdir(folder))


def test_what_is_saved_is_loaded(tmp_path):
    assert load_last_checkpoint(tmp_path / "none", TEMPLATE, ABOUT) is None
    saved(tmp_path / "deep" / "folder", 7)
    assert_loads(tmp_path / "deep" / "folder", 7)


def test_the_newest_is_loaded_and_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 5, 10, 15, 100)
    assert names(tmp_path) == [f"checkpoint-{n:08d}.msgpack" for n in (10, 15, 100)]
    assert_loads(tmp_path, 100)
    saved(tmp_path, 101, keep=1)  # a damaged one needs a predecessor
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_save_that_is_cut_off_leaves_the_old_ones_and_no_litter_for_long(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 2)
    assert_loads(tmp_path, 1)
    litter = tmp_path / ".checkpoint-00000002.msgpack.123.tmp"  # what a kill leaves
    litter.write_bytes(b"half")
    assert_loads(tmp_path, 1)
    saved(tmp_path, 3)
    assert not litter.exists()


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "does not match its digest"),
        (flip, "does not match its digest"),
        (lambda data: data[:30], "does not match its digest"),
        (lambda data: b"", "not a checkpoint of mlhf_optax"),
        (lambda data: b"PK" + data, "not a checkpoint of mlhf_optax"),
    ],
    ids=["cut short", "a bit flipped", "only a head", "empty", "foreign"],
)
def test_a_damaged_one_is_reported_and_the_one_before_is_used(tmp_path, damage, reason):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"checkpoint-00000002.msgpack is damaged \(.*{reason}.*one before"):
        assert_loads(tmp_path, 1)


def test_if_all_are_damaged_each_is_reported_and_none_is_loaded(tmp_path):
    saved(tmp_path, 1, 2)
    for path in list_checkpoints(tmp_path):
        path.write_bytes(cut(path.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_last_checkpoint(tmp_path, TEMPLATE, ABOUT) is None
    assert len(caught) == 2


def test_other_settings_are_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    other = {"seed": 1, "config": {"steps": (1, 2)}, "task": "mine"}
    message = r"belongs to a meta-training with other settings \(seed: 0 there, 1 now, task: None there"
    with pytest.raises(ValueError, match=message):
        load_last_checkpoint(tmp_path, TEMPLATE, other)


@pytest.mark.parametrize(
    "template",
    [
        {**TEMPLATE, "count": jnp.zeros(())},
        {**TEMPLATE, "low": jnp.zeros(4, jnp.bfloat16)},
        {**TEMPLATE, "more": jnp.zeros(())},
        {name: leaf for name, leaf in TEMPLATE.items() if name != "mask"},
    ],
    ids=["dtype", "shape", "a leaf more", "a leaf less"],
)
def test_a_state_of_another_make_is_refused(tmp_path, template):
    saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"does not fit this meta-training .* use another output folder"):
        load_last_checkpoint(tmp_path, template, ABOUT)
