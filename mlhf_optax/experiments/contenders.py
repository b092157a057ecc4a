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

from mlhf_optax.experiments.runs import EvalParams, MakeOptimizer, Program
from mlhf_optax.gauss_newton import gauss_newton
from mlhf_optax.pretrained.loaded import Pretrained
from mlhf_optax.support.checks import FROM_ONE, check_number
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
      eval_params: for optimizers that average: ``eval_params(opt_state, params)`` returns the parameters that
        are judged in the place of those that are trained.

    Example:
      ``Contender("sgd", ("sgd",), ({},), lambda: optax.sgd(0.1))``
    """

    family: str
    names: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]
    make_optimizer: MakeOptimizer
    stacked: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    program: Callable[[Task], Program] | None = None
    clock: Callable[[Task], float] | None = None
    eval_params: EvalParams | None = None

    def __post_init__(self):
        if not self.labels:
            object.__setattr__(self, "labels", self.names)

    @classmethod
    def of_settings(
        cls,
        family: str,
        settings: Sequence[dict[str, float]],
        make_optimizer: MakeOptimizer,
        fixed: Mapping[str, Any] = types.MappingProxyType({}),
        **how: Any,
    ) -> "Contender":
        """Returns one contender for a list of settings, all with the same names of hyperparameters.

        Args:
          family: of all, the start of their names.
          settings: the hyperparameters of each.
          make_optimizer: takes them by name.
          fixed: what else to record.
          **how: other fields.
        """
        short = {"learning_rate": "lr", "initial_damping": "damping"}
        texts = (" ".join(f"{short.get(key, key)}={x:.3g}" for key, x in one.items()) for one in settings)
        names = tuple(f"{family} {text}" for text in texts)
        stacked = {name: np.array([one[name] for one in settings], np.float32) for name in settings[0]}
        return cls(family, names, tuple({**one, **fixed} for one in settings), make_optimizer, stacked, **how)


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

    Example:
      >>> from mlhf_optax import load_pretrained
      >>> from mlhf_optax.tasks import get_task
      >>> task, learned = get_task("digits-mlp"), load_pretrained("digits")
      >>> learned_contender(task, learned, name="CG 2", num_cg_steps=2).labels
      ('MLHF CG 2',)
    """
    family = pretrained.family
    optimizer = pretrained.optimizer(task.predict_fn, task.loss_fn, **changes)
    # Two files of one name may hold other numbers: what is kept must tell them apart.
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(pretrained.meta_params))
    origin = {"meta_params": source, "meta_params_digest": hashlib.sha256(content).hexdigest()[:12]}
    settings = {**pretrained.recommended, **changes, **origin}
    names = (f"{family.name} {name}".strip(),)
    labels = (f"{family.label} {name}".strip(),)
    return Contender(family.name, names, (settings,), lambda: optimizer, labels=labels)


CONSTANT = "gauss_newton"


def constant_contender(task: Task, dampings: Sequence[float] = (1.0, 3.0, 10.0), **options: Any) -> Contender:
    """Returns Gauss-Newton damped by a constant, the control that everything learned has to beat.

    Args:
      task: the task to be trained.
      dampings: the constants, one optimizer each.
      **options: arguments of :func:`mlhf_optax.gauss_newton`; ``learning_rate`` is 1 by default.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> constant_contender(get_task("digits-mlp"), [1.0, 3.0], metric="diagonal").names
      ('gauss_newton damping=1', 'gauss_newton damping=3')
    """
    chosen: dict[str, Any] = {"learning_rate": 1.0} | options

    def make(damping):
        return gauss_newton(predict_fn=task.predict_fn, loss_fn=task.loss_fn, damping=damping, **chosen)

    return Contender.of_settings(CONSTANT, [{"damping": damping} for damping in dampings], make, chosen)


class Family(NamedTuple):
    """A hand-made optimizer and what may be tuned of it."""

    make: Callable[..., optax.GradientTransformation]
    fixed: Mapping[str, float] = types.MappingProxyType({})  # arguments unless they are tuned
    paper: tuple[str, ...] = ()  # arguments in the paper's grid beside the learning rate


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
    if unknown := sorted(set(families) - set(known)):
        raise ValueError(f"`families` must be among {known}, got {unknown}")
    for name, size in (("batch_size", batch_size), ("baseline_batch_size", baseline_batch_size)):
        check_number(name, size, FROM_ONE)
    if rates is not None and not len(rates):
        raise ValueError("`rates` is empty; give at least one learning rate, or None for the paper's grid")
    scaled = [rate * batch_size / baseline_batch_size for rate in PAPER_RATES]
    contenders = []
    for name in families:
        make, fixed, tuned = FAMILIES[name]
        if rates is not None:
            settings = [{"learning_rate": rate} for rate in rates]
            contenders.append(Contender.of_settings(name, settings, _with(make, fixed)))
            continue
        values = itertools.product(scaled, *[PAPER_DECAYS] * len(tuned))
        settings = [dict(zip(("learning_rate", *tuned), each, strict=True)) for each in values]
        contenders.append(Contender.of_settings(name, settings, make))
    return contenders


def _with(make: Callable, fixed: Mapping[str, float]) -> Callable:
    return lambda **tuned: make(**tuned, **fixed)


def rates_per_decade(lowest: float, highest: float, count: int = 3) -> list[float]:
    """Returns learning rates evenly spaced in the logarithm, ``count`` steps per decade.

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
