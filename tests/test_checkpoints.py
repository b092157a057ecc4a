"""Checkpoints: what they hold, and that a damaged one is told from a whole one."""

import errno
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.meta_training.checkpoints import list_checkpoints, load_last_checkpoint, save_checkpoint

ABOUT = {"seed": 0, "config": {"steps": (1, 2), "rate": 0.1}}


def tree(value):
    """Leaves of all dtypes and kinds of shapes there are in a state."""
    return {
        "weights": [jnp.full((2, i), value, jnp.float32) for i in range(12)],
        "turned": jnp.arange(6.0).reshape(2, 3).T + value,
        "low": jnp.full(3, value, jnp.bfloat16),
        "count": jnp.asarray(value, jnp.int32),
        "key": jnp.full(2, value, jnp.uint32),
        "mask": jnp.array([True, False]),
        "on_the_host": np.full(2, value, np.float64),
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
    assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def name(iteration):
    return f"checkpoint-{iteration:08d}.safetensors"


def damage(path):
    path.write_bytes(path.read_bytes()[:-3] + b"bad")


def test_what_is_saved_is_loaded(tmp_path):
    assert load_last_checkpoint(tmp_path / "none", TEMPLATE, ABOUT) is None
    saved(tmp_path / "deep" / "folder", 7)
    assert_loads(tmp_path / "deep" / "folder", 7)


def test_the_newest_is_loaded_and_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 5, 10, 15, 100)
    assert names(tmp_path) == [name(100), name(15), name(10)]
    assert_loads(tmp_path, 100)
    saved(tmp_path, 101, keep=1)  # a damaged one needs a predecessor
    assert names(tmp_path) == [name(101), name(100)]


def test_a_save_that_is_cut_off_leaves_the_old_ones_and_no_litter_for_long(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 2)
    assert_loads(tmp_path, 1)
    litter = tmp_path / f".{name(2)}.123.tmp"  # what a kill leaves
    litter.write_bytes(b"half")
    assert_loads(tmp_path, 1)
    saved(tmp_path, 3)
    assert not litter.exists()


def test_a_full_disk_is_reported_and_costs_no_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2, 3)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"cannot write .*{name(4)}: No space left on device; .* unchanged"):
        saved(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == [name(1), name(2), name(3)]
    assert_loads(tmp_path, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
        lambda data: data.replace(b'"seed\\": 0', b'"seed\\": 1'),
        lambda data: b"",
        lambda data: b"PK" + data,
    ],
    ids=["cut short", "a bit flipped", "settings changed", "empty", "foreign"],
)
def test_a_damaged_one_is_reported_and_the_one_before_is_used(tmp_path, change):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2)
    data = change(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"{name(2)} is damaged \(its? .*\); trying the one before"):
        assert_loads(tmp_path, 1)
    assert path.with_name(f"{name(2)}.damaged").read_bytes() == data  # set aside, not lost


def test_new_checkpoints_are_kept_where_damaged_ones_have_higher_numbers(tmp_path):
    saved(tmp_path, 1, 7, 8, 9, keep=4)
    for path in list_checkpoints(tmp_path)[:3]:
        damage(path)
    with pytest.warns(UserWarning, match="is damaged"):
        assert_loads(tmp_path, 1)
    saved(tmp_path, 2, 3)
    assert names(tmp_path) == [name(3), name(2), name(1)]
    assert_loads(tmp_path, 3)
    assert len(list(tmp_path.glob("*.damaged"))) == 3


def test_if_all_are_damaged_nothing_starts_anew_on_top_of_them(tmp_path):
    saved(tmp_path, 1, 2)
    for path in list_checkpoints(tmp_path):
        damage(path)
    for _ in range(2):  # whoever asks again gets the same answer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match=r"no checkpoint in .* can be read.* move that folder away"):
                load_last_checkpoint(tmp_path, TEMPLATE, ABOUT)
        assert len(caught) == 2
    assert len(names(tmp_path)) == 2


def test_other_settings_are_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    other = {"seed": 1, "config": {"steps": (1, 2), "rate": 0.2}, "task": "mine"}
    message = (
        r"other settings \(config.rate: 0.1 there, 0.2 now, seed: 0 there, 1 now, "
        r"task: None there, 'mine' now\); resume with the settings from there, or use another output folder"
    )
    with pytest.raises(ValueError, match=message):
        load_last_checkpoint(tmp_path, TEMPLATE, other)


def test_a_state_of_another_make_is_refused(tmp_path):
    saved(tmp_path, 1)
    changes = ({"count": jnp.zeros(())}, {"low": jnp.zeros(4, jnp.bfloat16)}, {"more": jnp.zeros(())})
    less = {name: leaf for name, leaf in TEMPLATE.items() if name != "mask"}
    for template in (*({**TEMPLATE, **change} for change in changes), less):
        with pytest.raises(ValueError, match=r"does not fit this run .* use another output folder"):
            load_last_checkpoint(tmp_path, template, ABOUT)
