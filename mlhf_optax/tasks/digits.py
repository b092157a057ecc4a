"""The 8x8 handwritten digits of scikit-learn: data that every installation has, for tiny networks."""

import functools
from collections.abc import Sequence

import numpy as np

from mlhf_optax.tasks.data import Dataset, freeze
from mlhf_optax.tasks.models import MLP, ConvNet
from mlhf_optax.tasks.task import Task, image_task

FRACTIONS = (0.4, 0.4, 0.2)  # meta-training, training, test
SPLIT_SEED = 0


@functools.cache
def load_digits() -> Dataset:
    """Returns scikit-learn's 1797 handwritten digits, 8x8 pixels, 10 classes.

    The parts hold 40 % (meta-training), 40 % (training) and 20 % (test) of every class, the same
    examples in every version and on every machine. Loaded once, then cached; read-only.

    Images are float32 of shape (N, 8, 8, 1) in [0, 1], labels int32 (N,).

    Raises:
      ImportError: if scikit-learn is missing.

    Example:
      >>> load_digits().meta_train["image"].shape, len(load_digits().test["label"])
      ((719, 8, 8, 1), 359)
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; run "
            "`pip install 'mlhf-optax[experiments]'`"
        ) from error
    pixels, targets = datasets.load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = np.asarray(targets, np.int32)
    parts = stratified_split(labels, FRACTIONS, SPLIT_SEED)
    return Dataset(*(freeze(image=images[part], label=labels[part]) for part in parts))


def stratified_split(labels: np.ndarray, fractions: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Splits example numbers, shuffled, into disjoint parts with the same share of every class.

    The order follows from raw bits, whose stream NumPy guarantees in every version and on every machine.
    """
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    bounds = np.cumsum(fractions)[:-1]
    part_of = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        cuts = np.round(bounds * len(members)).astype(int)
        for number, chunk in enumerate(np.split(members, cuts)):
            part_of[chunk] = number
    return [order[part_of[order] == number] for number in range(len(fractions))]


def digits_mlp(
    hidden: Sequence[int] = (32,), activation: str = "relu", batch_size: int = 128, meta_batch_size: int = 128
) -> Task:
    """Returns the task of classifying 8x8 handwritten digits with dense layers.

    Args:
      hidden: width of every hidden layer.
      activation: ``"relu"``, ``"sigmoid"`` or ``"tanh"``.
      batch_size: examples per mini-batch when networks are trained.
      meta_batch_size: examples per mini-batch in meta-training.

    Returns:
      The task. Variants carry what differs in their name, as in ``"digits-mlp-16-16-tanh"``.

    Raises:
      ValueError: for an unknown ``activation`` or a width below one.

    Example:
      >>> digits_mlp(hidden=(16, 16), activation="tanh").name
      'digits-mlp-16-16-tanh'
    """
    hidden = tuple(hidden)
    name = "digits-mlp"
    if hidden != (32,):
        name += "".join(f"-{width}" for width in hidden) or "-linear"
    name += "" if activation == "relu" else f"-{activation}"
    about = f"dense layers {'-'.join(map(str, (64, *hidden, 10)))}, {activation}"
    return _digits_task(name, about, MLP(hidden, 10, activation), "digits", batch_size, meta_batch_size)


def digits_convnet(batch_size: int = 128, meta_batch_size: int = 128) -> Task:
    """Returns the same task for a small convolutional network; for the arguments see :func:`digits_mlp`.

    Example:
      >>> digits_convnet().num_classes
      10
    """
    model = ConvNet(channels=(8, 16), hidden=(32,), kernel_size=3)
    about = "3x3 convolutions 8 and 16, dense 32 and 10"
    return _digits_task("digits-convnet", about, model, "digits_convnet", batch_size, meta_batch_size)


def _digits_task(name, about, model, pretrained, batch_size, meta_batch_size) -> Task:
    return image_task(
        name,
        f"handwritten digits (8x8, 10 classes), {about}",
        model,
        (8, 8, 1),
        load_data=load_digits,
        num_classes=10,
        batch_size=batch_size,
        meta_batch_size=meta_batch_size,
        pretrained=pretrained,
    )
