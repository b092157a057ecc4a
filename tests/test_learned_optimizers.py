"""The script that repeats the protocol of the learned optimizers of the literature, on a little noise."""

import json

import jax
import jax.numpy as jnp
import learned_optimizers
import numpy as np
import optax
import pytest

from mlhf_optax import load_meta_params
from mlhf_optax.tasks import Dataset, mnist, mnist_mlp
from mlhf_optax.tasks.data import freeze

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(autouse=True)
def noise(monkeypatch):
    """A few examples of two classes that can be told apart, in the place of MNIST."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300).astype(np.int32)

    def load(data_dir, cache_dir, size):
        images = 0.5 * rng.random((300, size, size, 1), np.float32)
        images[:, 0, 0, 0] += labels
        part = freeze(image=images, label=labels)
        return Dataset(part, part, part)

    monkeypatch.setattr(mnist, "load_mnist", load)


def test_the_protocol_evaluates_the_last_parameters_on_the_mini_batches_of_the_training():
    task = mnist_mlp(size=1, batch_size=4)
    examples = jax.tree.map(jnp.asarray, task.data.train)
    tx = optax.with_extra_args_support(optax.sgd(0.5))
    keys = jax.random.split(jax.random.key(0), 2)
    finals, losses = learned_optimizers.protocol(task, tx, 3)(examples, keys)
    assert (finals.shape, losses.shape) == ((2,), (2, 3))
    init_key, data_key = jax.random.split(keys[1])
    params = task.init_fn(init_key)
    rows = jax.random.randint(data_key, (3, 4), 0, 300)
    loss = jax.jit(
        lambda p, chosen: (lambda b: task.loss_fn(task.predict_fn(p, b), b))(
            jax.tree.map(lambda x: x[chosen], examples)
        )
    )
    for chosen, want in zip(rows, losses[1], strict=True):
        value, grads = jax.value_and_grad(loss)(params, chosen)
        np.testing.assert_allclose(value, want, rtol=1e-4)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    np.testing.assert_allclose(finals[1], np.mean([loss(params, r) for r in rows]), rtol=1e-4)


def test_a_run_prints_a_table_beside_the_published_one_and_goes_on_after_a_stop(tmp_path, capsys):
    options = f"--quick --optimizers adam --activations sigmoid tanh --output {tmp_path}".split()
    learned_optimizers.main(options)
    first = json.loads((tmp_path / "results.json").read_text())
    assert [row["activation"] for row in first["rows"]] == ["sigmoid", "tanh"]
    assert all(row["curve"][-1] < row["curve"][0] and row["diverged"] == 0 for row in first["rows"])
    assert (tmp_path / "figure.png").exists()
    assert "final loss (published)" in capsys.readouterr().out
    path = tmp_path / "adam-tanh-20.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": 0.125}))
    learned_optimizers.main([*options, "--resume"])
    assert "0.125" in capsys.readouterr().out


def test_it_meta_trains_with_the_recipe(tmp_path):
    arguments = f"--quick --meta-train l2l --num-tasks 1 --image-size 4 --start l2l --output {tmp_path}"
    learned_optimizers.main(arguments.split())
    record = load_meta_params(tmp_path / "meta_params").record
    assert (record["optimizer"], record["task"]) == ("l2l", "mnist-mlp-4x4")
    assert record["meta_training"]["config"]["max_age"] == 100
