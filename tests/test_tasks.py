"""The registry of tasks and what every task owes."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mlhf_optax.tasks.datasets import Dataset, in_memory

from mlhf_optax import layer_types, tasks
from mlhf_optax.comparison.run import draw_batch, evaluation_state, mean_loss
from mlhf_optax.comparison import Contender, compare
from mlhf_optax.layer_types import PAPER_LAYER_TYPES
from mlhf_optax.tasks import TASKS, digits_mlp, get_task, image_tasks, imagenet, imagenet_tasks
from mlhf_optax.tasks.resnet import ResNet
from mlhf_optax.tasks.streaming import Stream


def noise(count, side, num_classes):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, num_classes, count).astype(np.int32)}


@pytest.fixture
def no_files(monkeypatch):
    """Noise in the place of the datasets that are read from files."""
    data = Dataset(noise(9, 32, 10), noise(8, 32, 10), noise(7, 32, 10))
    monkeypatch.setattr(image_tasks, "cifar10", lambda data_dir, cache_dir: data)
    tiny = Dataset(noise(9, 64, 100), noise(8, 64, 100), noise(7, 64, 100))
    monkeypatch.setattr(imagenet_tasks, "tiny_imagenet", lambda data_dir, cache_dir, num_classes: tiny)
    train = [{"image": noise(1, 40, 9)["image"][0], "label": label} for label in range(8)]
    crop = functools.partial(imagenet.random_crop, image_size=64)
    large = Dataset(noise(9, 64, 1000), Stream(train, crop, noise(6, 64, 1000)), noise(7, 64, 1000))
    monkeypatch.setattr(imagenet_tasks, "imagenet", lambda *place, **options: large)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_trained_from_a_start_near_chance(name, no_files):
    # Networks for large images are narrowed, as their size is not the point here.
    options = {"channels": 2} if "resnet18" in name else {}
    options |= {"image_size": 64} if name == "imagenet-resnet18" else {}
    task = get_task(name, batch_size=4, **options)
    assert task.name.startswith(name)
    assert task.description
    params = jax.jit(task.init_fn)(jax.random.key(0))
    assert set(jax.tree.leaves(layer_types(params))) <= set(PAPER_LAYER_TYPES)
    batch = draw_batch(task, in_memory(task.data.train), jnp.arange(4), jax.random.key(1))
    assert batch["image"].dtype == jnp.float32

    @jax.jit
    def loss_and_outputs(p):
        outputs = task.predict_fn(p, batch)
        return task.loss_fn(outputs, batch), outputs

    (value, outputs), gradient = jax.value_and_grad(loss_and_outputs, has_aux=True)(params)
    assert outputs.shape == (4, task.num_classes)
    assert value == pytest.approx(task.chance_loss, rel=0.5)
    assert all(jnp.all(jnp.isfinite(g)) & jnp.any(g != 0) for g in jax.tree.leaves(gradient))


def test_networks_with_batch_norm_are_evaluated_by_statistics_of_the_training_part(no_files, monkeypatch):
    monkeypatch.setattr(image_tasks, "mini_resnet", lambda *options: ResNet(((1, 2), (1, 4)), 10))
    task = get_task("cifar10-resnet9")
    params = jax.jit(task.init_fn)(jax.random.key(0))
    state = evaluation_state(task, params, task.data.train)
    loss = jax.jit(lambda part, state: mean_loss(task, params, part, state))
    one, rest = (jax.tree.map(operator.itemgetter(rows), task.data.train) for rows in (slice(2), slice(2, 8)))
    parts = float(2 * loss(one, state) + 6 * loss(rest, state)) / 8
    # Statistics of the whole training part: the same loss as when it is normalised by itself.
    assert parts == pytest.approx(float(loss(task.data.train, None)), rel=1e-4)
    assert float(loss(one, None)) != pytest.approx(float(loss(one, state)), rel=1e-3)


def test_augmentation_can_be_left_out(no_files):
    task = get_task("cifar10-convnet", augment=False)
    batch = draw_batch(task, task.data.train, jnp.arange(4), jax.random.key(1))
    np.testing.assert_array_equal(batch["image"], task.data.train["image"][:4])


def test_data_are_looked_for_where_they_are_said_to_be(tmp_path):
    missing = {
        "cifar10-convnet": "'cifar10'",
        "cifar10-resnet9": "'cifar10'",
        "imagenet-resnet18": "'imagenet2012'",
        "tiny-imagenet-resnet18": "Tiny-ImageNet",
    }
    for name, data in missing.items():
        with pytest.raises(FileNotFoundError, match=f"{data} in {tmp_path}"):
            get_task(name, data_dir=tmp_path).data  # noqa: B018


def test_streamed_tasks_can_be_trained(no_files):
    task = get_task("imagenet-resnet18", channels=1, image_size=64, batch_size=4)
    sgd = Contender("sgd", ("sgd",), ({},), lambda: optax.sgd(0.01))
    found = compare(task, [sgd], [1, 2], seeds=[0], timed=False).frame
    assert np.isfinite(found["train_loss"].to_numpy()).all()


@pytest.mark.parametrize(
    ("name", "options", "expected", "size"),
    [
        ("cifar10-convnet", {}, "cifar10-convnet", 185_130),
        ("cifar10-convnet", {"channels": (8, 16), "hidden": (16,)}, "cifar10-convnet-8-16-dense-16", 20_394),
        (
            "cifar10-convnet",
            {"channels": [64, 64], "hidden": [384, 192]},
            "cifar10-convnet-64-64-dense-384-192",
            1_756_426,
        ),
        ("cifar10-resnet9", {}, "cifar10-resnet9", 272_282),
        ("cifar10-resnet9", {"channels": 4}, "cifar10-resnet9-4", 17_486),
        ("imagenet-resnet18", {}, "imagenet-resnet18", 11_687_720),
        (
            "imagenet-resnet18",
            {"image_size": 128, "stem": "small"},
            "imagenet-resnet18-small-stem-128px",
            11_680_040,
        ),
        ("tiny-imagenet-resnet18", {}, "tiny-imagenet-resnet18", 11_218_340),
        ("tiny-imagenet-resnet18", {"channels": 8, "num_classes": 200}, "tiny-imagenet-resnet18-8", 188_528),
    ],
)
def test_variants_of_the_image_tasks(name, options, expected, size):
    task = get_task(name, **options)
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    assert task.name == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


def test_digits_mlp_is_64_32_10():
    params = digits_mlp().init_fn(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "Dense_0": {"kernel": (64, 32), "bias": (32,)},
        "Dense_1": {"kernel": (32, 10), "bias": (10,)},
    }


@pytest.mark.parametrize(
    ("options", "name", "widths"),
    [
        ({}, "digits-mlp", [32, 10]),
        ({"hidden": (16,)}, "digits-mlp-16", [16, 10]),
        ({"hidden": [32, 32], "activation": "tanh"}, "digits-mlp-32-32-tanh", [32, 32, 10]),
        ({"hidden": (), "activation": "sigmoid"}, "digits-mlp-linear-sigmoid", [10]),
    ],
)
def test_variants_of_digits_mlp(options, name, widths):
    task = get_task("digits-mlp", **options)
    params = task.init_fn(jax.random.key(0))
    assert task.name == name
    assert [params[f"Dense_{index}"]["bias"].size for index in range(len(params))] == widths
    assert options.get("activation", "relu") in task.description


def test_the_activation_is_the_one_asked_for():
    batch = {"image": np.full((1, 8, 8, 1), 0.5, np.float32)}
    params = digits_mlp().init_fn(jax.random.key(0))
    outputs = [digits_mlp(activation=name).predict_fn(params, batch) for name in ("relu", "tanh", "sigmoid")]
    assert not np.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not np.allclose(outputs[1], outputs[2], atol=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_batch_sizes_can_be_chosen(name):
    task = get_task(name, batch_size=32, meta_batch_size=16)
    assert (task.batch_size, task.meta_batch_size) == (32, 16)


def test_data_are_loaded_once_and_only_when_looked_at():
    calls = []
    task = dataclasses.replace(digits_mlp(), load_data=lambda: calls.append(1) or tasks.datasets.digits())
    assert not calls
    assert task.data is task.data
    assert len(calls) == 1


def test_chance_loss_is_that_of_equal_probabilities():
    assert dataclasses.replace(digits_mlp(), num_classes=4).chance_loss == math.log(4)


def test_unknown_tasks_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"`name` must be one of 'digits-mlp', 'digits-convnet', .*, got 'digits'"
    ):
        get_task("digits")


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(
        TypeError, match="'digits-convnet' has no option 'hidden'; it has batch_size, meta_batch_size"
    ):
        get_task("digits-convnet", hidden=(3,))


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="`activation` must be one of"):
        get_task("digits-mlp", activation="swish")
