"""A linear classifier of three blobs: a task that is trained in the blink of an eye."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.experiments import grid_contenders
from mlhf_optax.losses import SoftmaxCrossEntropy
from mlhf_optax.tasks import Dataset, Task


def blobs(num_examples, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, num_examples).astype(np.int32)
    image = (np.eye(3)[label] + 0.3 * rng.normal(size=(num_examples, 3))).astype(np.float32)
    return {"image": image, "label": label}


def jitter(key, batch):
    return {**batch, "image": batch["image"] + 0.1 * jax.random.normal(key, batch["image"].shape)}


def init(key, kernel_shape=(3, 3)):
    return {"kernel": jax.random.normal(key, (3, 3)).reshape(kernel_shape), "bias": jnp.zeros(3)}


TASK = Task(
    name="blobs",
    description="three blobs",
    init_fn=init,
    predict_fn=lambda params, batch: batch["image"] @ params["kernel"].reshape(3, 3) + params["bias"],
    loss_fn=SoftmaxCrossEntropy(),
    load_data=lambda: Dataset(blobs(40, 0), blobs(30, 1), blobs(20, 2)),
    num_classes=3,
    batch_size=8,
    augment_fn=jitter,
)
# The same by a kernel of rank 4, as of convolutions, whose trainings run one after the other on a CPU.
SEQUENTIAL = dataclasses.replace(TASK, init_fn=functools.partial(init, kernel_shape=(1, 1, 3, 3)))
SGD = grid_contenders(["sgd"], batch_size=8)[0]
