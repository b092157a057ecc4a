"""A linear classifier of three blobs: a task that is trained in the blink of an eye."""

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.comparison import grid_contenders
from mlhf_optax.losses import SoftmaxCrossEntropy
from mlhf_optax.tasks.datasets import Dataset
from mlhf_optax.tasks.task import Task


def blobs(num_examples, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, num_examples).astype(np.int32)
    image = (np.eye(3)[label] + 0.3 * rng.normal(size=(num_examples, 3))).astype(np.float32)
    return {"image": image, "label": label}


def jitter(key, batch):
    return {**batch, "image": batch["image"] + 0.1 * jax.random.normal(key, batch["image"].shape)}


TASK = Task(
    name="blobs",
    description="three blobs",
    init_fn=lambda key: {"kernel": jax.random.normal(key, (3, 3)), "bias": jnp.zeros(3)},
    predict_fn=lambda params, batch: batch["image"] @ params["kernel"] + params["bias"],
    loss_fn=SoftmaxCrossEntropy(),
    load_data=lambda: Dataset(blobs(40, 0), blobs(30, 1), blobs(20, 2)),
    num_classes=3,
    batch_size=8,
    augment_fn=jitter,
)
SGD = grid_contenders(["sgd"], batch_size=8)[0]
