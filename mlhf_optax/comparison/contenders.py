"""What a comparison trains with: learned optimizers, and grids of hand-made ones."""

import dataclasses
import hashlib
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from optax import contrib

from mlhf_optax.comparison.run import MakeOptimizer
from mlhf_optax.comparison.run_grid import Program
from mlhf_optax.gauss_newton import gauss_newton
from mlhf_optax.learned import LEARNED
from mlhf_optax.pretrained.files import Pretrained
from mlhf_optax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Contender:
    """Optimizers that differ in numbers only, so that one compilation serves them all.

    Attributes:
      family: a key of :data:`mlhf_optax.learned.LEARNED` or of :data:`FAMILIES`, or a name of your own.
      names: one name per optimizer, E of them, unique in a comparison.
      settings: what to record of each, JSON.
      make_optimizer: returns an optimizer for given values of ``stacked``.
      stacked: arguments of ``make_optimizer``, arrays of shape (E,); empty if it takes none.
      labels: what tables and figures call each; ``names`` if empty.
      program: for optimizers that are no optax transformations: returns what takes the steps.
      clock: the same: returns the seconds of one step of one run.

    Example:
      >>> Contender("sgd", ("sgd",), ({},), lambda: optax.sgd(0.1)).labels
      ('sgd',)
    """

    family: str
    names: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]
    make_optimizer: MakeOptimizer
    stacked: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    program: Callable[[Task], Program] | None = None
    clock: Callable[[Task], float] | None = None

    def __post_init__(self):
        if not self.labels:
            object.__setattr__(self, "labels", self.names)


def is_learned(family: str) -> bool:
    """Whether optimizers of a family are learned ones."""
    return family in LEARNED


def learned_contender(
    task: Task, pretrained: Pretrained, *, name: str = "", source: str = "", **changes: Any
) -> Contender:
    """Returns a learned optimizer as a contender.

    Args:
      task: the task to be trained.
      pretrained: meta-parameters and their record.
      name: added to the name of the family where several of it compete, such as ``"CG 2"``.
      source: where the meta-parameters came from, for the record.
      **changes: arguments of the optimizer that take the place of those that the record recommends.

    Returns:
      The contender.

    Example:
      >>> from mlhf_optax import load_pretrained
      >>> from mlhf_optax.tasks import get_task
      >>> task, learned = get_task("digits-mlp"), load_pretrained("digits")
      >>> learned_contender(task, learned, name="CG 2", num_cg_steps=2).labels
      ('MLHF CG 2',)
    """
    family = pretrained.family
    optimizer = pretrained.optimizer(task.predict_fn, task.loss_fn, **changes)
    settings = {**pretrained.recommended, **changes, "meta_params": source}
    # Two files of one name may hold other numbers: what is kept must tell them apart.
    settings["meta_params_digest"] = meta_params_digest(pretrained.meta_params)
    names = (f"{family.name} {name}".strip(),)
    labels = (f"{family.label} {name}".strip(),)
    return Contender(family.name, names, (settings,), lambda: optimizer, labels=labels)


def constant_contender(task: Task, dampings: Sequence[float] = (1.0, 3.0, 10.0), **options: Any) -> Contender:
    """Returns Gauss-Newton damped by a constant, the control that everything learned has to beat.

    Args:
      task: the task to be trained.
      dampings: the constants, one optimizer each.
      **options: arguments of :func:`mlhf_optax.gauss_newton`; ``learning_rate`` is 1 by default.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> constant_contender(get_task("digits-mlp"), [1.0, 3.0], metric="diagonal").names
      ('constant damping=1', 'constant damping=3')
    """
    chosen: dict[str, Any] = {"learning_rate": 1.0} | options

    def make(damping):
        return gauss_newton(predict_fn=task.predict_fn, loss_fn=task.loss_fn, damping=damping, **chosen)

    settings = [{"damping": damping} for damping in dampings]
    about = tuple({**setting, **chosen} for setting in settings)
    return Contender("constant", names_of("constant", settings), about, make, stack_settings(settings))


def meta_params_digest(meta_params: Any) -> str:
    """Returns 12 hexadecimal digits that differ for meta-parameters that differ."""
    leaves = jax.tree.leaves(meta_params)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()[:12]


class Family(NamedTuple):
    """A hand-made optimizer and what may be tuned of it.

    Attributes:
      make: function of optax.
      fixed: arguments that stay as they are.
      paper: arguments in the paper's grid beside the learning rate.
    """

    make: Callable[..., optax.GradientTransformation]
    fixed: Mapping[str, float] = types.MappingProxyType({})
    paper: tuple[str, ...] = ()


FAMILIES = {
    "sgd": Family(optax.sgd, {"momentum": 0.9}, ("momentum",)),
    "rmsprop": Family(optax.rmsprop, {}, ("decay",)),
    "adam": Family(optax.adam, {}, ("b1", "b2")),
    "muon": Family(contrib.muon),
}
PAPER_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.paper)
PAPER_RATES = (0.1, 0.01, 0.001)
PAPER_DECAYS = (0.9, 0.99, 0.999)


def grid_contenders(
    families: Sequence[str] = PAPER_FAMILIES,
    rates: Sequence[float] | None = None,
    *,
    batch_size: int = 128,
    baseline_batch_size: int = 128,
) -> list[Contender]:
    """Returns grids of hand-made optimizers, one contender per family.

    Args:
      families: keys of :data:`FAMILIES`, in the order wanted.
      rates: learning rates; all else is as usual (momentum 0.9, defaults of optax). If None, the paper's
        grid: 45 optimizers, learning rates 0.1, 0.01 and 0.001, each times ``batch_size`` over
        ``baseline_batch_size``; momentum of SGD, decay of RMSprop and both of Adam in 0.9, 0.99, 0.999.
      batch_size: examples per mini-batch in the trainings to come.
      baseline_batch_size: 128 in the paper's section 4.1, 256 in 4.4.

    Returns:
      The contenders.

    Raises:
      ValueError: for an unknown family, one that the paper's grid does not have, no rate, or a batch size
        below one.

    Example:
      >>> [len(contender.names) for contender in grid_contenders()]
      [9, 9, 27]
      >>> grid_contenders(["muon"], rates=rates_per_decade(0.01, 0.1))[0].names
      ('muon lr=0.01', 'muon lr=0.0215', 'muon lr=0.0464', 'muon lr=0.1')

    Source: paper, supplement, Table 1.
    """
    known = list(PAPER_FAMILIES if rates is None else FAMILIES)
    unknown = sorted(set(families) - set(known))
    if unknown:
        raise ValueError(f"`families` must be among {known}, got {unknown}")
    for name, size in (("batch_size", batch_size), ("baseline_batch_size", baseline_batch_size)):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
    if rates is not None:
        if not len(rates):
            raise ValueError(
                "`rates` is empty; give at least one learning rate, or None for the paper's grid"
            )
        return [_grid(name, [{"learning_rate": rate} for rate in rates]) for name in families]
    scaled = [rate * batch_size / baseline_batch_size for rate in PAPER_RATES]
    contenders = []
    for family in families:
        tuned = FAMILIES[family].paper
        values = itertools.product(scaled, *[PAPER_DECAYS] * len(tuned))
        names = ("learning_rate", *tuned)
        contenders.append(_grid(family, [dict(zip(names, each, strict=True)) for each in values]))
    return contenders


def rates_per_decade(lowest: float, highest: float, count: int = 3) -> list[float]:
    """Returns learning rates that are evenly spaced in the logarithm.

    Args:
      lowest: the first one.
      highest: the last one; a whole number of steps above ``lowest``.
      count: steps per decade.

    Example:
      >>> [f"{rate:.3g}" for rate in rates_per_decade(0.1, 1.0)]
      ['0.1', '0.215', '0.464', '1']
    """
    steps = round(count * np.log10(highest / lowest))
    return (lowest * 10.0 ** (np.arange(steps + 1) / count)).tolist()


def default_adam() -> Contender:
    """Returns Adam as somebody has it who tunes nothing: learning rate 0.001 and the defaults of optax."""
    name, rate = "adam defaults", 1e-3
    return Contender(name, (name,), ({"learning_rate": rate},), lambda: optax.adam(rate))


def _grid(family: str, settings: Sequence[dict[str, float]]) -> Contender:
    fixed = {key: value for key, value in FAMILIES[family].fixed.items() if key not in settings[0]}

    def make(**tuned):
        return FAMILIES[family].make(**tuned, **fixed)

    return Contender(family, names_of(family, settings), tuple(settings), make, stack_settings(settings))


def names_of(family: str, settings: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """Returns one name per setting: family and hyperparameters in one short line.

    Example:
      >>> names_of("sgd", [{"learning_rate": 0.1, "momentum": 0.9}])
      ('sgd lr=0.1 momentum=0.9',)
    """
    short = {"learning_rate": "lr", "initial_damping": "damping"}
    texts = (" ".join(f"{short.get(key, key)}={x:.3g}" for key, x in one.items()) for one in settings)
    return tuple(f"{family} {text}" for text in texts)


def stack_settings(settings: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Returns the values of settings by name, arrays of shape (E,), float32."""
    return {name: np.array([one[name] for one in settings], np.float32) for name in settings[0]}
