"""Meta-parameters on disk: what is written comes back, and everything else is refused by name."""

import dataclasses
import inspect
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

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
from mlhf_optax.controllers.lstm_settings import LogFeatures, Multiply, Softplus, Unit
from mlhf_optax.curvature_batch import ShareOrAll
from mlhf_optax.learned import LEARNED
from mlhf_optax.support.files import pack_arrays, unpack_arrays

pytestmark = pytest.mark.usefixtures("unoptimised")

RECORD = {
    "optimizer": "mlhf",
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


def rewrite(path, arrays=(), drop=(), keep_digest=False, structure=None, **text):
    """Writes the file anew with other arrays and metadata, and with a digest that fits unless told not to."""
    data = path.read_bytes()
    old_arrays, old_text = unpack_arrays(data)
    if isinstance(structure, dict):
        structure = json.dumps(json.loads(old_text["structure"]) | structure)
    text |= {"structure": structure} if structure else {}
    new_arrays = {k: v for k, v in (old_arrays | dict(arrays)).items() if k not in drop}
    new = pack_arrays(new_arrays, old_text | text)
    if keep_digest:
        new = new.replace(*(digest_of(content) for content in (new, data)))
    path.write_bytes(new)


def digest_of(data):
    return re.search(rb'"sha256":"([0-9a-f]{64})"', data)[1]


def raw(header, body=b""):
    """A safetensors file with any header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + body


def entries(number):
    return {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(number)}


def assert_same(actual: MetaParams, expected: MetaParams):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert actual.settings == expected.settings
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bound", [0.25, None])
def test_what_is_saved_comes_back(tmp_path, meta_params, bound):
    record = {**RECORD, "max_update_ratio": bound}
    saved = save_meta_params(tmp_path / "mine", meta_params, record)
    assert saved == tmp_path / "mine.safetensors"
    for path in (saved, str(saved), tmp_path / "mine"):
        loaded = load_meta_params(path)
        assert_same(loaded.meta_params, meta_params)
        assert loaded.record == record
        assert loaded.learning_rate == 0.5
    assert load_pretrained(saved).record == record


@pytest.mark.parametrize("family", LEARNED.values(), ids=list(LEARNED))
def test_every_learned_optimizer_comes_back_from_a_file_and_trains(tmp_path, family):
    functions = (lambda p, b: b["x"] @ p["kernel"], mlhf_optax.SquaredError(targets="y"))
    params = {"kernel": jnp.ones((3, 1))}
    task = SimpleNamespace(init_fn=lambda key: params, predict_fn=functions[0], loss_fn=functions[1])
    options = family.options()
    learned = family.learned(options).init(jax.random.key(0), task)
    record = {"optimizer": family.name, "task": "mine", "batch_size": 8, **family.record(options)}
    loaded = load_meta_params(save_meta_params(tmp_path / "x", learned, record))
    assert jax.tree.structure(loaded.meta_params) == jax.tree.structure(learned)
    jax.tree.map(np.testing.assert_array_equal, loaded.meta_params, learned)
    assert loaded.family is family
    assert loaded.recommended == family.record(options)
    batch = {"x": jnp.eye(3), "y": jnp.zeros((3, 1))}
    both = loaded.optimizer(*functions), family.optimizer(learned, *functions, **loaded.recommended)
    update = lambda tx: jax.jit(tx.update)(params, tx.init(params), params, batch=batch)[0]["kernel"]
    updates = [update(tx) for tx in both]
    np.testing.assert_array_equal(*updates)
    assert np.all(updates[0] != 0)


def test_every_setting_comes_back(tmp_path):
    changed = Settings(
        LogFeatures(7 + 1 / 3, has_shared=False),
        Softplus(2 + 1 / 3),
        Unit(1 / 3, 2 / 3, 1e-4 / 3, 1e-2 / 3),
        Multiply(),
        initial_damping=1 / 3,
        initial_preconditioner=2 / 3,
        damping_floor=1 / 7,
        sees_current_residual=True,
    )
    for field in dataclasses.fields(Settings):
        assert getattr(changed, field.name) != getattr(Settings(), field.name)
    for settings in (changed, AUTHORS_SETTINGS, Settings()):
        path = save_meta_params(tmp_path / "set", init_meta_params(jax.random.key(0), settings), RECORD)
        assert load_meta_params(path).meta_params.settings == settings


def test_the_file_is_plain_and_its_bytes_repeat(tmp_path, meta_params, saved):
    with safetensors.safe_open(saved, "numpy") as file:
        text, kernel = file.metadata(), file.get_tensor("damping/dense_kernel/layers/0/kernel")
    np.testing.assert_array_equal(kernel, meta_params.damping["dense_kernel"].layers[0].kernel)
    assert json.loads(text["record"]) == RECORD
    structure = json.loads(text["structure"])
    assert structure["layer_types"] == ["dense_kernel", "my/own type"]
    assert (text["format"], text["version"]) == ("mlhf-optax meta-parameters", "2")
    # In a process of its own, where hashes and so the order of the library's metadata differ.
    code = "import sys, mlhf_optax as m; m.save_meta_params(sys.argv[2], *m.load_meta_params(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, saved, tmp_path / "again"], check=True)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "mine.safetensors"]


def test_the_optimizer_is_the_recorded_one_unless_changed(tmp_path):
    fresh = init_meta_params(jax.random.key(0), layer_types=["dense_kernel"], units=(2,))
    settings = {"num_cg_steps": 2, "max_update_ratio": 0.01, "momentum": 0.9, "curvature_batch_size": 2}
    loaded = load_meta_params(save_meta_params(tmp_path / "fresh", fresh, RECORD | settings))
    functions = (lambda p, b: b["x"] @ p["kernel"], mlhf_optax.SquaredError(targets="y"))
    batch = {"x": jnp.eye(3), "y": jnp.arange(3.0)[:, None]}
    params = {"kernel": jnp.full((3, 1), 0.5)}
    grads = jax.grad(lambda p: functions[1](functions[0](p, batch), batch))(params)

    def update(tx):
        step = jax.jit(tx.update)
        first, state = step(grads, tx.init(params), params, batch=batch)
        return step(first, state, params, batch=batch)[0]["kernel"]  # the second shows the momentum

    recommended = update(loaded.optimizer(*functions))
    np.testing.assert_array_equal(
        recommended, update(mlhf_optax.mlhf(fresh, *functions, learning_rate=0.5, **settings))
    )
    changes = {"learning_rate": lambda count: 0.25, "max_update_ratio": None, "weight_decay": 0.1}
    changes |= {"momentum": 0.0, "curvature_batch_size": None}
    other = mlhf_optax.mlhf(
        fresh, *functions, learning_rate=0.25, num_cg_steps=2, max_update_ratio=None, weight_decay=0.1
    )
    changed = update(loaded.optimizer(*functions, **changes))
    np.testing.assert_array_equal(changed, update(other))
    assert not np.allclose(changed, recommended)


def test_the_optimizer_shows_all_arguments_with_the_defaults_of_the_record_and_explains_them():
    for name, record in list_pretrained().items():
        optimizer = load_pretrained(name).optimizer
        shown = inspect.signature(optimizer).parameters
        own = list(inspect.signature(LEARNED[record["optimizer"]].optimizer).parameters)
        assert own == ["meta_params", *(argument for argument in shown if argument != "full_batch")]
        assert ("full_batch" in shown) == (record["optimizer"] == "mlhf_general")
        assert list(shown)[:2] == ["predict_fn", "loss_fn"]
        for argument, value in load_pretrained(name).recommended.items():
            if argument == "curvature_batch_size" and isinstance(value, float):
                value = ShareOrAll(value)  # a share that the user has not set
            assert shown[argument].default == value
            assert f"{argument}={value!r}" in " ".join(inspect.getdoc(optimizer).split())
        explained = re.findall(r"^  (\w+): ", optimizer.__doc__, re.MULTILINE)
        assert explained[: len(shown)] == list(shown)
        assert optimizer.__qualname__ == "Pretrained.optimizer"


def test_a_representation_takes_five_lines():
    for name, record in list_pretrained().items():
        text = repr(load_pretrained(name))
        assert len(text.splitlines()) == 5
        assert len(text) < 500
        for part in (LEARNED[record["optimizer"]].label, record["task"], record["date"], "learning_rate="):
            assert part in text
    assert "velo" in repr(load_pretrained()._replace(record={"optimizer": "velo"}))


@pytest.mark.parametrize(
    ("name", "arguments", "keywords", "words"),
    [
        ("general", (0.001,), {}, "`predict_fn` must be a function, got 0.001; call `optimizer"),
        ("rnnprop", (0.001,), {}, "`predict_fn` must be a function, got 0.001; call `optimizer"),
        ("general", (object(), len), {}, "`predict_fn` must be a function, got an object of type object"),
        ("general", (len,), {}, r"`loss_fn` is missing; call .*`loss_fn\(outputs, batch\) -> scalar`"),
        ("general", (), {}, r"`predict_fn` is missing; call .*`predict_fn\(params, batch\) -> outputs`"),
        ("general", (len, len, 0.1), {}, "got 3 arguments by position; .* by name, such as `learning_rate="),
        ("general", (len, len), {"lr": 0.1}, "has no argument `lr`; did you mean `learning_rate`?"),
        ("digits", (len, len), {"cg_steps": 1}, "has no argument `cg_steps`; did you mean `num_cg_steps`?"),
        ("l2l", (), {"momentum": 0.9}, "no argument `momentum`; it has predict_fn, loss_fn, learning_rate"),
    ],
)
def test_wrong_calls_of_the_optimizer_say_what_to_pass(name, arguments, keywords, words):
    with pytest.raises(TypeError, match=words):
        load_pretrained(name).optimizer(*arguments, **keywords)


def test_what_is_neither_name_nor_path_is_refused():
    with pytest.raises(TypeError, match="`name_or_path` must be a name or a path, got float; the model goes"):
        load_pretrained(0.1)


# Refused on loading -----------------------------------------------------------------------------


REMEDY = "if a newer mlhf_optax wrote the file, upgrade; otherwise restore it from a copy"


def refused(path, reason):
    with pytest.raises(ValueError, match=rf"mine\.safetensors: {reason}.*; {REMEDY}"):
        load_meta_params(path)


def test_a_truncated_file_is_refused(saved):
    data = saved.read_bytes()
    for share in (0.0, 0.0001, 0.01, 0.5, 0.99):
        saved.write_bytes(data[: int(share * len(data))])
        refused(saved, "it is damaged, cut short or of another format")


def test_every_flipped_byte_is_refused_or_harmless(saved, meta_params):
    data = saved.read_bytes()
    harmless = 0
    for position in range(0, len(data), 23):
        flipped = bytearray(data)
        flipped[position] ^= 0x01
        saved.write_bytes(flipped)
        try:
            loaded = load_meta_params(saved)
        except ValueError:
            continue
        # What stands for nothing, such as blanks at the end of the header.
        assert_same(loaded.meta_params, meta_params)
        assert loaded.record == RECORD
        harmless += 1
    assert harmless < 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"learning_rate = 1.0\n", "it is damaged, cut short or of another format"),
        (b"\x80\x04\x95 a pickle", "it is damaged, cut short or of another format"),
        (b"PK\x03\x04 a zip", "it is damaged, cut short or of another format"),
        (safetensors.numpy.save({"w": np.ones(2)}), "it has no digest"),
        (raw({"w": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}, b"0"), "it has no digest"),
        (pack_arrays({"w": np.ones(2)}, {"format": "other"}), "its format is 'other'"),
        # Files that claim too much, refused before they are decoded.
        (raw(b" " * (2**20 + 1)), "its header takes 1048577 bytes, more than the 1048576 allowed"),
        (raw(entries(2000)), "it has 2000 arrays, more than the 1000 allowed"),
        (raw(b"[" * 500_000), "it is damaged, cut short or of another format"),
        (raw({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"full"), "it is damaged"),
    ],
    ids=["text", "pickle", "zip", "no digest", "dtype", "format", "header", "arrays", "nesting", "shape"],
)
def test_other_kinds_of_files_are_refused(saved, content, reason):
    saved.write_bytes(content)
    refused(saved, reason)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(1, np.float32), r"has shape \(1,\), the structure asks for \(2,\)"),
        (np.ones(2, np.float64), "has dtype float64"),
        (np.array([1, np.nan], np.float32), "has values that are not finite"),
        (np.array([1, np.inf], np.float32), "has values that are not finite"),
    ],
)
def test_unusable_absent_and_surplus_arrays_are_refused_by_name(saved, array, words):
    name = "preconditioner/dense_kernel/output_kernel"
    rewrite(saved, arrays={name: array})
    refused(saved, f"'{name}' {words}")
    rewrite(saved, arrays={"damping/extra": array}, drop=[name])
    refused(saved, f".*absent.*{name}.*damping/extra")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({"keep_digest": True, **change}, "its content does not match its digest")
            for change in (
                {"arrays": {"damping/dense_kernel/output_bias": np.ones(1, np.float32)}},
                {"record": json.dumps({**RECORD, "learning_rate": 5.0})},
                {"structure": {"units": [3]}},
                {"more": "text"},
            )
        ),
        ({"version": "3"}, "it has format version '3', this mlhf_optax reads 2"),
        *(
            ({"structure": {key: value}}, "its structure is not one that 'mlhf' understands")
            for key, values in {
                "settings": (None, {"not_known": 0.9}),
                "layer_types": ([], 3),
                "units": ([3, 0], "x"),
            }.items()
            for value in values
        ),
    ],
)
def test_a_changed_text_is_refused(saved, change, words):
    rewrite(saved, **change)
    refused(saved, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "its record is not JSON"),
        ("[1]", "its record is not a JSON object"),
        ('{"loss": NaN}', "its record is not JSON.*NaN is not a finite number"),
        ('{"loss": 1e999}', "its record is not JSON.*1e999 is not a finite number"),
        ("{}", "its record cannot be used: it lacks .*'optimizer'"),
        (json.dumps({**RECORD, "optimizer": "velo"}), "its record .*no learned optimizer 'velo'"),
        (json.dumps({**RECORD, "learning_rate": "fast"}), ".*'learning_rate' must be a positive number"),
        (json.dumps({**RECORD, "optimizer": "adam_rates"}), "its structure asks for arrays that are absent"),
    ],
)
def test_an_unusable_record_is_refused(saved, text, words):
    rewrite(saved, record=text)
    refused(saved, words)


# What a file may claim --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["structure", "record"])
def test_deep_json_is_refused(saved, name):
    for depth in (40, 900, 100_000):
        rewrite(saved, **{name: '{"x": ' + "[" * depth + "]" * depth + "}"})
        refused(saved, f"its {name} is (nested more than 32 deep|not JSON, or nested too deep)")


@pytest.mark.parametrize(
    "values", [{"layer_types": [str(i) for i in range(2000)]}, {"units": [4] * 2000}, {"units": [10**9]}]
)
def test_a_structure_of_great_sizes_is_refused_before_it_is_built(saved, values, monkeypatch):
    family = dataclasses.replace(LEARNED["mlhf"], template=lambda structure: pytest.fail("built"))
    monkeypatch.setitem(LEARNED, "mlhf", family)
    rewrite(saved, structure=values)
    refused(saved, "its structure has more than 200 values or an integer beyond 1000000")


def test_a_file_that_is_too_large_is_not_read(saved, monkeypatch):
    with saved.open("ab") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: takes no space
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: pytest.fail("read"))
    refused(saved, "meta-parameters take at most 67108864 bytes")


def test_a_folder_is_not_a_file_of_meta_parameters():
    with pytest.raises(ValueError, match=r"^\.: this is a folder; give the file"):
        load_pretrained(".")


def test_an_old_pair_is_named_with_the_remedy(tmp_path):
    (tmp_path / "old.npz").write_bytes(b"PK")
    for name in ("old", "old.npz"):
        with pytest.raises(
            ValueError, match=r"old\.npz: an earlier mlhf_optax wrote this.*give its settings and arrays"
        ):
            load_pretrained(tmp_path / name)


def test_a_missing_file_is_named_with_the_shipped_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: there is no such file") as caught:
        load_pretrained(tmp_path / "nowhere")
    assert str(list(list_pretrained())) in str(caught.value)


# Refused on saving ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x * jnp.nan, "values that are not finite"),
        (lambda x: x.astype(jnp.bfloat16), "has dtype bfloat16, but must be float32"),
        (lambda x: x[None], r"has shape \(1,.* the structure asks for"),
    ],
)
def test_unusable_arrays_are_not_saved(tmp_path, meta_params, function, words):
    with pytest.raises(ValueError, match=f"`meta_params` cannot be saved: .*{words}"):
        save_meta_params(tmp_path / "x", jax.tree.map(function, meta_params), RECORD)
    with pytest.raises(TypeError, match="`meta_params` must be a MetaParams, got dict"):
        save_meta_params(tmp_path / "x", {}, RECORD)
    with pytest.raises(TypeError, match="not those of 'adam_rates', which `record` names"):
        save_meta_params(tmp_path / "x", {"log_rate": jnp.zeros(5)}, {**RECORD, "optimizer": "adam_rates"})
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
        ({"task": 3}, "'task' must be a name, got 3"),
        ({"task": ...}, r"it lacks \['task'\]"),
        ({"batch_size": True}, "'batch_size' must be a positive number, got True"),
        ({"optimizer": "velo"}, "no learned optimizer 'velo'; there are mlhf"),
    ],
)
def test_unusable_records_are_not_saved(tmp_path, meta_params, values, words):
    record = {name: value for name, value in (RECORD | values).items() if value is not ...}
    with pytest.raises(ValueError, match=f"`record` cannot be saved: .*{words}"):
        save_meta_params(tmp_path / "x", meta_params, record)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, meta_params, saved, monkeypatch):
    old = saved.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*mine.safetensors: disk full; .* unchanged"):
        save_meta_params(saved, jax.tree.map(lambda x: 2 * x, meta_params), RECORD)
    assert saved.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.safetensors"]


# Shipped ----------------------------------------------------------------------------------------


def test_shipped_meta_params_load_and_tell_how_they_were_made():
    assert load_pretrained("digits").record["task"] == "digits-mlp"
    for name, record in list_pretrained().items():
        pretrained = load_pretrained(name)
        assert pretrained.record == record
        assert pretrained.learning_rate == record["learning_rate"]
        for key in ("command", "commit", "date", "machine", "curves"):
            assert record[key], f"the record of {name} lacks {key}"
