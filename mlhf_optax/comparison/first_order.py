"""The first-order optimizers that MLHF is compared with: the grid of the paper's Table 1."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax


def sgd(learning_rate: float | jax.Array, momentum: float | jax.Array) -> optax.GradientTransformation:
    """Returns stochastic gradient descent with momentum."""
    return optax.sgd(learning_rate, momentum)


def rmsprop(learning_rate: float | jax.Array, decay: float | jax.Array) -> optax.GradientTransformation:
    """Returns RMSprop without momentum."""
    return optax.rmsprop(learning_rate, decay)


def adam(
    learning_rate: float | jax.Array, b1: float | jax.Array, b2: float | jax.Array
) -> optax.GradientTransformation:
    """Returns Adam."""
    return optax.adam(learning_rate, b1, b2)


FAMILIES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adam": adam,
}

_LEARNING_RATES = (0.1, 0.01, 0.001)
_DECAYS = (0.9, 0.99, 0.999)
_DECAY_NAMES = {"sgd": ("momentum",), "rmsprop": ("decay",), "adam": ("b1", "b2")}
_SHORT = {"learning_rate": "lr"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer of the grid.

    Attributes:
      family: a key of :data:`FAMILIES`.
      hyperparameters: keyword arguments of the function registered there.

    Example:
      >>> Entry("sgd", {"learning_rate": 0.1, "momentum": 0.9}).name
      'sgd lr=0.1 momentum=0.9'
    """

    family: str
    hyperparameters: dict[str, float]

    @property
    def name(self) -> str:
        """Family and hyperparameters in one short line, unique within the grid."""
        values = " ".join(f"{_SHORT.get(key, key)}={value:g}" for key, value in self.hyperparameters.items())
        return f"{self.family} {values}"

    def make(self) -> optax.GradientTransformation:
        """Returns the optax transformation."""
        return FAMILIES[self.family](**self.hyperparameters)


def grid(
    batch_size: int = 128, families: Sequence[str] | None = None, *, baseline_batch_size: int = 128
) -> list[Entry]:
    """Returns the 45 first-order optimizers of the paper's search.

    Learning rates 0.1, 0.01 and 0.001, each times ``batch_size / baseline_batch_size``; SGD with momentum
    and the decay of RMSprop in 0.9, 0.99 and 0.999; Adam with both decays in the same set.

    Args:
      batch_size: examples a mini-batch in the trainings to come.
      families: names of :data:`FAMILIES`, in the order wanted; all if None.
      baseline_batch_size: 128 in the paper's section 4.1, 256 in 4.4.

    Returns:
      One :class:`Entry` an optimizer, family by family.

    Raises:
      ValueError: for an unknown family or a batch size below one.

    Example:
      >>> len(grid()), grid(families=["adam"])[0].name
      (45, 'adam lr=0.1 b1=0.9 b2=0.9')

    Source: paper, supplement, Table 1.
    """
    for name, size in (("batch_size", batch_size), ("baseline_batch_size", baseline_batch_size)):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
    wanted = list(FAMILIES if families is None else families)
    unknown = sorted(set(wanted) - set(FAMILIES))
    if unknown:
        raise ValueError(f"`families` must be among {list(FAMILIES)}, got {unknown}")
    entries = []
    for family in wanted:
        names = ("learning_rate", *_DECAY_NAMES[family])
        rates = [rate * batch_size / baseline_batch_size for rate in _LEARNING_RATES]
        for values in itertools.product(rates, *[_DECAYS] * (len(names) - 1)):
            entries.append(Entry(family, dict(zip(names, values, strict=True))))
    return entries


def stack_hyperparameters(entries: Sequence[Entry]) -> dict[str, jax.Array]:
    """Stacks the hyperparameters of entries of one family, to be mapped over with ``jax.vmap``.

    Args:
      entries: entries of one family.

    Returns:
      Arrays of shape (len(entries),), float32, by name.

    Raises:
      ValueError: if there are no entries or they are of several families.

    Example:
      >>> {name: x.shape for name, x in stack_hyperparameters(grid(families=["sgd"])).items()}
      {'learning_rate': (9,), 'momentum': (9,)}
    """
    families = sorted({entry.family for entry in entries})
    if len(families) != 1:
        raise ValueError(f"`entries` must be of exactly one family, got {families}")
    names = entries[0].hyperparameters
    return {name: jnp.array([e.hyperparameters[name] for e in entries], jnp.float32) for name in names}


__all__ = ["FAMILIES", "Entry", "adam", "grid", "rmsprop", "sgd", "stack_hyperparameters"]
