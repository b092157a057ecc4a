"""The registry of tasks and what every task owes."""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import layer_types
from mlhf_optax.experiments.runs import draw_batch, evaluation_state, mean_loss
from mlhf_optax.meta_training import runs_in_sequence
from mlhf_optax.support.layer_types import PAPER_LAYER_TYPES
from mlhf_optax.tasks import (
    TASKS,
    Dataset,
    ResNet,
    cifar10,
    digits_mlp,
    get_task,
    tiny_imagenet,
)
from mlhf_optax.tasks.data import freeze

pytestmark = pytest.mark.usefixtures("unoptimised")


def noise(count, side, num_classes):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, num_classes, count).astype(np.int32)}


@pytest.fixture
def small_task(monkeypatch):
    """A task on small noise in place of data from files, and with residual networks of two blocks."""
    for module, made in ((cifar10, "mini_resnet"), (tiny_imagenet, "resnet18")):
        small = lambda num_outputs, *_: ResNet(((1, 2), (1, 4)), num_outputs)
        monkeypatch.setattr(module, made, small)
    for module in (cifar10, tiny_imagenet):
        monkeypatch.setattr(module, "IMAGE_SHAPE", (8, 8, 3))
    return make_small_task


def make_small_task(name, **options):
    task, side = get_task(name, **{"batch_size": 4, **options}), 8
    if name.startswith("digits"):
        return task
    if name == "mnist-mlp":
        part = freeze(
            image=np.random.default_rng(0).random((9, 28, 28, 1), np.float32), label=noise(9, 1, 10)["label"]
        )
        return dataclasses.replace(task, load_data=lambda: Dataset(part, part, part))
    meta_train, train, test = (noise(count, side, task.num_classes) for count in (9, 8, 7))
    return dataclasses.replace(task, load_data=lambda: Dataset(meta_train, train, test))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_trained_from_a_start_near_chance(name, small_task):
    task = small_task(name)
    assert task.name.startswith(name)
    assert task.description
    assert runs_in_sequence(task) == (name not in ("digits-mlp", "mnist-mlp")), "the tests run on a CPU"
    params = jax.jit(task.init_fn)(jax.random.key(0))
    assert set(jax.tree.leaves(layer_types(params))) <= set(PAPER_LAYER_TYPES)
    batch = draw_batch(task, task.data.train, jnp.arange(4), jax.random.key(1))
    assert batch["image"].dtype == jnp.float32

    @jax.jit
    def loss_and_outputs(p):
        outputs = task.predict_fn(p, batch)
        return task.loss_fn(outputs, batch), outputs

    (value, outputs), gradient = jax.value_and_grad(loss_and_outputs, has_aux=True)(params)
    assert outputs.shape == (4, task.num_classes)
    assert value == pytest.approx(task.chance_loss, rel=0.5)
    assert all(jnp.all(jnp.isfinite(g)) & jnp.any(g != 0) for g in jax.tree.leaves(gradient))


def test_networks_with_batch_norm_are_evaluated_by_statistics_of_the_training_part(small_task):
    task = small_task("cifar10-resnet9")
    params = jax.jit(task.init_fn)(jax.random.key(0))
    state = evaluation_state(task, params, task.data.train)
    loss = jax.jit(lambda part, state: mean_loss(task, params, part, state))
    one, rest = (jax.tree.map(operator.itemgetter(rows), task.data.train) for rows in (slice(2), slice(2, 8)))
    parts = float(2 * loss(one, state) + 6 * loss(rest, state)) / 8
    # Statistics of the whole training part: the same loss as when it is normalised by itself.
    assert parts == pytest.approx(float(loss(task.data.train, None)), rel=1e-4)
    assert float(loss(one, None)) != pytest.approx(float(loss(one, state)), rel=1e-3)


def test_augmentation_can_be_left_out(small_task):
    task = small_task("cifar10-convnet", augment=False)
    batch = draw_batch(task, task.data.train, jnp.arange(4), jax.random.key(1))
    np.testing.assert_array_equal(batch["image"], task.data.train["image"][:4])


@pytest.mark.parametrize(
    ("name", "data", "remedy"),
    [
        ("mnist-mlp", "prepared dataset 'mnist'", "--data-dir.*download_and_prepare"),
        ("cifar10-convnet", "prepared dataset 'cifar10'", "--data-dir.*download_and_prepare"),
        ("cifar10-resnet9", "prepared dataset 'cifar10'", "download_and_prepare"),
        ("tiny-imagenet-resnet18", "Tiny-ImageNet", "import pack_tiny_imagenet"),
    ],
)
def test_missing_data_are_looked_for_where_they_should_be_and_explained(name, data, remedy, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no {data} in {tmp_path}.*{remedy}"):
        get_task(name, data_dir=tmp_path).data  # noqa: B018


@pytest.mark.parametrize(
    ("options", "variant", "size"),
    [
        ({}, "digits-mlp", 64 * 32 + 32 + 32 * 10 + 10),
        ({"hidden": (16,)}, "digits-mlp-16", 64 * 16 + 16 + 16 * 10 + 10),
        ({"hidden": [32, 32], "activation": "tanh"}, "digits-mlp-32-32-tanh", 2410 + 32 * 32 + 32),
        ({"hidden": (), "activation": "sigmoid"}, "digits-mlp-linear-sigmoid", 64 * 10 + 10),
        ({}, "digits-convnet", 9 * 8 + 8 + 72 * 16 + 16 + 64 * 32 + 32 + 32 * 10 + 10),
        ({}, "mnist-mlp", 15_910),
        ({"size": 7, "activation": "elu"}, "mnist-mlp-7x7-elu", 1_210),
        ({"hidden": (20, 20)}, "mnist-mlp-20-20", 16_330),
        ({}, "cifar10-convnet", 185_130),
        ({"channels": (8, 16), "hidden": (16,)}, "cifar10-convnet-8-16-dense-16", 20_394),
        ({"channels": [64, 64], "hidden": [384, 192]}, "cifar10-convnet-64-64-dense-384-192", 1_756_426),
        ({}, "cifar10-resnet9", 272_282),
        ({"channels": 4}, "cifar10-resnet9-4", 17_486),
        ({}, "tiny-imagenet-resnet18", 11_218_340),
        ({"stem": "imagenet"}, "tiny-imagenet-resnet18-imagenet-stem", 11_226_020),
        ({"channels": 8, "num_classes": 200}, "tiny-imagenet-resnet18-8", 188_528),
    ],
)
def test_variants_differ_in_name_and_size(options, variant, size):
    name = max((name for name in TASKS if variant.startswith(name)), key=len)
    task = get_task(name, batch_size=32, meta_batch_size=16, **options)
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    assert task.name == variant
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
    assert (task.batch_size, task.meta_batch_size) == (32, 16)


def test_the_activation_is_the_one_asked_for():
    batch = {"image": np.full((1, 8, 8, 1), 0.5, np.float32)}
    params = digits_mlp().init_fn(jax.random.key(0))
    tasks = [digits_mlp(activation=name) for name in ("relu", "tanh", "sigmoid")]
    outputs = [task.predict_fn(params, batch) for task in tasks]
    assert not np.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not np.allclose(outputs[1], outputs[2], atol=1e-3)
    assert "tanh" in tasks[1].description


def test_data_are_loaded_once_and_only_when_looked_at():
    calls = []
    task = dataclasses.replace(digits_mlp(), load_data=lambda: calls.append(1) or Dataset({}, {}, {}))
    assert not calls
    assert task.data is task.data
    assert len(calls) == 1


def test_chance_loss_is_that_of_equal_probabilities():
    assert dataclasses.replace(digits_mlp(), num_classes=4).chance_loss == math.log(4)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("digits", {}, ValueError, "must be one of 'digits-mlp', 'digits-convnet', .*, got 'digits'"),
        ("digits-convnet", {"hidden": (3,)}, TypeError, "has no option 'hidden'; it has batch_size, meta_"),
        ("digits-mlp", {"activation": "swish"}, ValueError, "`activation` must be one of"),
        ("cifar10-convnet", {"channels": 8}, TypeError, "`channels` must be one number per convolution"),
        ("cifar10-resnet9", {"channels": (8,)}, TypeError, "`channels` must be one number, those of"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        get_task(name, **options)
