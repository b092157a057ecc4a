"""Meta-parameters on disk: what is written comes back, and everything else is refused by name."""

import dataclasses
import io
import json
import math
import typing
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlhf_optax
from mlhf_optax import (
    AUTHORS_SETTINGS,
    MetaParams,
    Settings,
    init_meta_params,
    list_pretrained,
    load_meta_params,
    load_pretrained,
    save_meta_params,
)

RECORD = {
    "task": "two-moons",
    "learning_rate": 0.5,
    "batch_size": 64,
    "num_cg_steps": 4,
    "max_update_ratio": 0.25,
    "curves": {"meta_loss": [1.0, 0.5], "validation": [None, 0.25]},
}


@pytest.fixture(scope="module")
def meta_params():
    # Every number differs from every other, so that no two arrays can be exchanged unnoticed.
    blank = init_meta_params(jax.random.key(0), layer_types=["dense_kernel", "my/own type"], units=(3, 2))
    leaves, treedef = jax.tree.flatten(blank)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture
def saved(tmp_path, meta_params):
    return save_meta_params(tmp_path / "mine", meta_params, RECORD)


def rewrite(path, change):
    """Applies `change` to the dict of the archive's entries and writes a whole, valid archive."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def edit_header(path, **values):
    def change(entries):
        entries["header.json"] = json.dumps({**json.loads(entries["header.json"]), **values})

    rewrite(path, change)


def edit_array(path, name, function):
    def change(entries):
        buffer = io.BytesIO()
        np.save(buffer, function(np.load(io.BytesIO(entries[f"{name}.npy"]))))
        entries[f"{name}.npy"] = buffer.getvalue()

    rewrite(path, change)


def assert_same(actual: MetaParams, expected: MetaParams):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert actual.settings == expected.settings
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_is_saved_comes_back(tmp_path, meta_params, saved):
    assert saved == tmp_path / "mine.npz"
    for path in (saved, str(saved), tmp_path / "mine"):
        loaded = load_meta_params(path)
        assert_same(loaded.meta_params, meta_params)
        assert loaded.record == RECORD
        assert loaded.learning_rate == 0.5
    assert load_pretrained(saved).record == RECORD


def test_every_setting_comes_back(tmp_path):
    changed = {}
    for name, hint in typing.get_type_hints(Settings).items():
        value = getattr(Settings(), name)
        others = [choice for choice in typing.get_args(hint) if choice != value]
        changed[name] = others[0] if others else value + 1 / 3
    for settings in (Settings(**changed), AUTHORS_SETTINGS, Settings()):
        path = save_meta_params(tmp_path / "set", init_meta_params(jax.random.key(0), settings), RECORD)
        assert load_meta_params(path).meta_params.settings == settings


def test_the_file_is_plain_and_its_bytes_repeat(tmp_path, meta_params, saved):
    with np.load(saved, allow_pickle=False) as archive:
        kernel = archive["damping/dense_kernel/layers/0/kernel"]
        header = json.loads(archive["header.json"])
    np.testing.assert_array_equal(kernel, meta_params.damping["dense_kernel"].layers[0].kernel)
    assert header["settings"] == dataclasses.asdict(meta_params.settings)
    assert header["layer_types"] == ["dense_kernel", "my/own type"]
    assert header["units"] == [3, 2]
    again = save_meta_params(tmp_path / "again.npz", meta_params, RECORD)
    assert again.read_bytes() == saved.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.json",
        "again.npz",
        "mine.json",
        "mine.npz",
    ]


def test_no_bound_on_the_update_can_be_recorded(tmp_path, meta_params):
    path = save_meta_params(tmp_path / "free", meta_params, {**RECORD, "max_update_ratio": None})
    assert load_meta_params(path).record["max_update_ratio"] is None


def test_the_optimizer_is_the_recorded_one_unless_changed(tmp_path):
    fresh = init_meta_params(jax.random.key(0), layer_types=["dense_kernel"])
    record = {**RECORD, "num_cg_steps": 2, "max_update_ratio": 0.01, "momentum": 0.9}
    loaded = load_meta_params(save_meta_params(tmp_path / "fresh", fresh, record))
    functions = (lambda p, b: b["x"] @ p["kernel"], mlhf_optax.SquaredError(targets="y"))
    batch = {"x": jnp.eye(3), "y": jnp.arange(3.0)[:, None]}
    params = {"kernel": jnp.full((3, 1), 0.5)}
    grads = jax.grad(lambda p: functions[1](functions[0](p, batch), batch))(params)

    def update(tx):
        first, state = tx.update(grads, tx.init(params), params, batch=batch)
        return tx.update(first, state, params, batch=batch)[0]["kernel"]  # the second shows the momentum

    settings = {"num_cg_steps": 2, "max_update_ratio": 0.01, "momentum": 0.9}
    recommended = update(loaded.optimizer(*functions))
    np.testing.assert_array_equal(recommended, update(mlhf_optax.mlhf(0.5, fresh, *functions, **settings)))
    changes = {"learning_rate": lambda count: 0.25, "max_update_ratio": None, "weight_decay": 0.1}
    changes["momentum"] = 0.0
    other = mlhf_optax.mlhf(0.25, fresh, *functions, num_cg_steps=2, max_update_ratio=None, weight_decay=0.1)
    changed = update(loaded.optimizer(*functions, **changes))
    np.testing.assert_array_equal(changed, update(other))
    assert not np.allclose(changed, recommended)


def test_the_optimizer_takes_the_recorded_part_of_the_batch_for_its_curvature(tmp_path):
    fresh = init_meta_params(jax.random.key(0), layer_types=["dense_kernel"])
    loaded = load_meta_params(save_meta_params(tmp_path / "x", fresh, RECORD | {"curvature_batch_size": 0.5}))
    functions = (lambda p, b: b["x"] @ p["kernel"], mlhf_optax.SquaredError(targets="y"))
    batch = {"x": jnp.diag(jnp.arange(1.0, 5.0)), "y": jnp.arange(4.0)[:, None]}
    params = {"kernel": jnp.full((4, 1), 0.5)}
    grads = jax.grad(lambda p: functions[1](functions[0](p, batch), batch))(params)

    def update(**changes):
        tx = loaded.optimizer(*functions, **changes)
        return tx.update(grads, tx.init(params), params, batch=batch)[0]["kernel"]

    np.testing.assert_array_equal(update(), update(curvature_batch_size=2))
    assert not np.allclose(update(), update(curvature_batch_size=None))


# Refused on loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"mine\.npz: .*(damaged or cut short|not meta-parameters)"):
        load_meta_params(saved)


def test_a_flipped_byte_is_refused_or_harmless(saved, meta_params):
    data = saved.read_bytes()
    refused = harmless = 0
    positions = range(0, len(data), 37)
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        saved.write_bytes(flipped)
        try:
            loaded = load_meta_params(saved)
        except ValueError as error:
            refused += "mine.npz" in str(error)
        else:
            # A date or a flag of the archive, which stands for nothing.
            assert_same(loaded.meta_params, meta_params)
            harmless += 1
    assert refused + harmless == len(positions)
    assert refused > 0.6 * len(positions)


def test_a_changed_number_in_a_whole_archive_is_refused(saved):
    edit_array(saved, "damping/dense_kernel/output_kernel", lambda x: x + np.float32(1e-6))
    with pytest.raises(ValueError, match=r"mine\.npz: its content does not match its checksum"):
        load_meta_params(saved)


def test_a_changed_setting_in_a_whole_archive_is_refused(saved):
    edit_header(saved, settings=dataclasses.asdict(Settings(initial_damping=3.0)))
    with pytest.raises(ValueError, match=r"mine\.npz: its content does not match its checksum"):
        load_meta_params(saved)


@pytest.mark.parametrize(
    "content", [b"", b"learning_rate = 1.0\n", b"\x80\x04\x95 a pickle", b"PK\x03\x04 no zip"]
)
def test_other_kinds_of_files_are_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"mine\.npz: (not meta-parameters of mlhf_optax|the file is damaged)"
    ):
        load_meta_params(saved)


@pytest.mark.parametrize("header", [None, b"no json", b"[]", b'{"format": "another"}', b"\xff\xfe"])
def test_another_npz_is_refused(saved, header):
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("weights.npy", b"whatever")
        if header is not None:
            archive.writestr("header.json", header)
    with pytest.raises(
        ValueError, match=r"mine\.npz: (not meta-parameters of mlhf_optax|the file is damaged)"
    ):
        load_meta_params(saved)


class Trap:
    """An object whose unpickling runs code."""

    sprung = False

    def __reduce__(self):
        return spring, ()


def spring():
    Trap.sprung = True


def test_a_pickle_inside_is_refused_and_not_executed(saved):
    def change(entries):
        buffer = io.BytesIO()
        np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
        entries["damping/dense_kernel/output_bias.npy"] = buffer.getvalue()

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"mine\.npz: .*allow_pickle"):
        load_meta_params(saved)
    assert not Trap.sprung


def test_a_newer_version_is_refused_with_the_remedy(saved):
    edit_header(saved, version=2)
    with pytest.raises(ValueError, match=r"mine\.npz: .*version 2 .*upgrade mlhf_optax"):
        load_meta_params(saved)


def test_an_unknown_setting_is_refused_by_name(saved, meta_params):
    edit_header(saved, settings={**dataclasses.asdict(meta_params.settings), "momentum": 0.9})
    with pytest.raises(ValueError, match=r"mine\.npz: .*'momentum'.*upgrade yours"):
        load_meta_params(saved)


@pytest.mark.parametrize(
    "values",
    [
        {"settings": None},
        {"settings": {"output_map": "relu"}},
        {"layer_types": []},
        {"units": [3, 0]},
        {"units": "x"},
    ],
)
def test_an_invalid_header_is_refused(saved, values):
    edit_header(saved, **values)
    with pytest.raises(
        ValueError, match=r"mine\.npz: its header is not one that this mlhf_optax understands"
    ):
        load_meta_params(saved)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x[:-1], r"has shape \(1,\), the settings ask for \(2,\)"),
        (lambda x: x.astype(np.float64), "has dtype float64"),
        (lambda x: np.where([True, False], np.float32(np.nan), x), "has values that are not finite"),
        (lambda x: np.where([True, False], np.float32(np.inf), x), "has values that are not finite"),
    ],
)
def test_unusable_arrays_are_refused_by_name(saved, function, words):
    name = "preconditioner/dense_kernel/output_kernel"
    edit_array(saved, name, function)
    with pytest.raises(ValueError, match=rf"mine\.npz: '{name}' {words}"):
        load_meta_params(saved)


def test_absent_and_surplus_arrays_are_refused_by_name(saved):
    def change(entries):
        entries["damping/extra.npy"] = entries.pop("damping/dense_kernel/output_bias.npy")

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"mine\.npz: .*damping/dense_kernel/output_bias.*damping/extra"):
        load_meta_params(saved)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it is not a JSON object"),
        ("{}", "it lacks .*'learning_rate'"),
        (
            json.dumps({**RECORD, "learning_rate": "fast"}),
            "'learning_rate' must be a positive number, got 'fast'",
        ),
        (json.dumps(RECORD), "it is the record of other meta-parameters"),
    ],
)
def test_a_record_that_does_not_belong_is_refused(saved, text, words):
    saved.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.json: {words}"):
        load_meta_params(saved)


def test_exchanged_records_are_refused(tmp_path, saved):
    other = save_meta_params(tmp_path / "other", init_meta_params(jax.random.key(2)), RECORD)
    saved.with_suffix(".json").write_bytes(other.with_suffix(".json").read_bytes())
    with pytest.raises(ValueError, match=r"mine\.json: it is the record of other meta-parameters"):
        load_meta_params(saved)


def test_missing_files_are_named_with_the_shipped_names(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz: there is no such file") as caught:
        load_pretrained(tmp_path / "nowhere")
    assert str(list(list_pretrained())) in str(caught.value)
    saved.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"mine\.json: .*should hold the record"):
        load_meta_params(saved)


# Refused on saving ------------------------------------------------------------------------------


def test_only_meta_params_are_saved(tmp_path):
    with pytest.raises(TypeError, match="`meta_params` must be a MetaParams, got dict"):
        save_meta_params(tmp_path / "x", {}, RECORD)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x * jnp.nan, "values that are not finite"),
        (lambda x: x.astype(jnp.bfloat16), "has dtype bfloat16, but must be float32"),
        (lambda x: x[None], r"has shape \(1, "),
    ],
)
def test_unusable_arrays_are_not_saved(tmp_path, meta_params, function, words):
    with pytest.raises(ValueError, match=f"`meta_params` cannot be saved: .*{words}"):
        save_meta_params(tmp_path / "x", jax.tree.map(function, meta_params), RECORD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 0.0}, "'learning_rate' must be a positive number, got 0.0"),
        ({"num_cg_steps": True}, "'num_cg_steps' must be a positive number, got True"),
        ({"num_cg_steps": 2.5}, "'num_cg_steps' must be an int, got 2.5"),
        ({"curvature_batch_size": 1.5}, "`curvature_batch_size`.*1.5"),
        ({"momentum": 1.0}, r"'momentum' must be a number in \[0, 1\), got 1.0"),
        ({"momentum": True}, r"'momentum' must be a number in \[0, 1\), got True"),
        ({"max_update_ratio": math.inf}, "'max_update_ratio' must be a positive number, got inf"),
        ({"curves": [math.nan]}, "plain JSON without NaN"),
        ({"curves": np.ones(2)}, "plain JSON without NaN"),
    ],
)
def test_unusable_records_are_not_saved(tmp_path, meta_params, values, words):
    with pytest.raises(ValueError, match=f"`record` cannot be saved: .*{words}"):
        save_meta_params(tmp_path / "x", meta_params, {**RECORD, **values})
    assert not list(tmp_path.iterdir())


def test_a_record_without_a_needed_key_is_not_saved(tmp_path, meta_params):
    with pytest.raises(ValueError, match=r"`record` cannot be saved: it lacks \['task'\]"):
        save_meta_params(tmp_path / "x", meta_params, {k: v for k, v in RECORD.items() if k != "task"})


def test_a_write_that_fails_leaves_the_old_file(tmp_path, meta_params, saved, monkeypatch):
    old = saved.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_meta_params(saved, jax.tree.map(lambda x: 2 * x, meta_params), RECORD)
    assert saved.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.npz"]


# Shipped ----------------------------------------------------------------------------------------


def test_the_digits_are_shipped():
    assert load_pretrained("digits").record["task"] == "digits-mlp"


def test_shipped_meta_params_load_and_tell_how_they_were_made():
    for name, record in list_pretrained().items():
        pretrained = load_pretrained(name)
        assert pretrained.record == record
        assert pretrained.learning_rate == record["learning_rate"]
        for key in ("command", "commit", "date", "machine", "curves"):
            assert record[key], f"the record of {name} lacks {key}"
