"""Optimizers for those who tune nothing, each with the settings that its documentation gives."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import runpy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from optax import contrib
from rivals import LEARNED_RIVALS, knows_layers, name_and_label, rival_contender

from mlhf_optax import load_pretrained
from mlhf_optax.experiments import Contender, default_adam, learned_contender
from mlhf_optax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Untuned:
    """An optimizer that is not tuned.

    Attributes:
      label: what tables call it.
      make: returns it for a training of so many steps, which only schedules look at.
      setting: what to record.
      package: what has to be installed for it; None for optax.
      eval_params: see :class:`mlhf_optax.experiments.Contender`.
      has_schedule: whether the number of steps counts.
    """

    label: str
    make: Callable[[int], optax.GradientTransformation]
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    package: str | None = None
    eval_params: Callable[[Any, Any], Any] | None = None
    has_schedule: bool = False

    def contender(self, name: str, length: int) -> Contender:
        """Returns it as a contender for trainings of so many steps."""
        setting = self.setting | ({"num_steps": length} if self.has_schedule else {})
        return Contender(
            name,
            (name,),
            (setting,),
            lambda: self.make(length),
            labels=(self.label,),
            eval_params=self.eval_params,
        )


def _nadamw(length: int) -> optax.GradientTransformation:
    # A warm-up of no step at all would be no schedule of optax.
    rate = optax.warmup_cosine_decay_schedule(0.0, _NADAMW["learning_rate"], max(1, length // 10), length)
    return optax.nadamw(rate, **{name: _NADAMW[name] for name in ("b1", "b2", "weight_decay")})


def _kron(length: int) -> optax.GradientTransformation:
    del length
    import psgdax

    found = psgdax.kron()

    def init(params: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes
            return found.init(params)

    # It calls itself one that takes more arguments, and refuses them.
    return optax.GradientTransformation(init, found.update)


@functools.cache
def _soap_file() -> dict[str, Any]:
    """Returns what is in the file of SOAP; the package around it would load a world of finite elements."""
    package = importlib.util.find_spec("jno")
    folder = next(iter(package.submodule_search_locations or [""])) if package else ""
    return runpy.run_path(f"{folder}/optimizers/soap.py")


_NADAMW = {"learning_rate": 1.908e-3, "b1": 0.909, "b2": 0.9989, "weight_decay": 0.0812, "warm_up": 0.1}
UNTUNED = {
    "schedule-free": Untuned(
        "schedule-free AdamW",
        lambda _: contrib.schedule_free_adamw(),
        eval_params=contrib.schedule_free_eval_params,
    ),
    "prodigy": Untuned("Prodigy", lambda _: contrib.prodigy()),
    "d-adapt": Untuned("D-adapted AdamW", lambda _: contrib.dadapt_adamw()),
    "momo": Untuned("MoMo-Adam", lambda _: contrib.momo_adam()),
    "cocob": Untuned("COCOB", lambda _: contrib.cocob()),
    # Its documentation gives the rate inside: 1, whose scale it learns.
    "mechanic": Untuned(
        "Mechanic of Adam", lambda _: contrib.mechanize(optax.adam(1.0)), {"inner_rate": 1.0}
    ),
    "nadamw": Untuned("NadamW of AlgoPerf", _nadamw, _NADAMW, has_schedule=True),
    "muon-0.02": Untuned("Muon at 0.02", lambda _: contrib.muon(0.02), {"learning_rate": 0.02}),
    "psgd-kron": Untuned("PSGD Kron", _kron, {"learning_rate": 1e-3}, "psgdax"),
    "soap": Untuned("SOAP", lambda _: _soap_file()["soap"](), {"learning_rate": 3e-3}, "jno"),
}
"""By name, at the defaults of optax or of the package named."""
DEFAULT_ADAM = "adam"
SHELF = LEARNED_RIVALS
NAMES = (DEFAULT_ADAM, *UNTUNED, *SHELF)
"""All of them: Adam at its defaults, those above, and the learned optimizers of the literature."""


def own_contender(task: Task, meta_params: str, **changes: Any) -> Contender:
    """Returns MLHF with general meta-parameters, as its record and a task's documentation recommend."""
    return learned_contender(task, load_pretrained(meta_params), source=meta_params, **changes)


def rivals_of(task: Task, names: Sequence[str], length: int) -> tuple[list[Contender], dict[str, str]]:
    """Returns the rivals that can train a task for so many steps, and why others cannot, by their labels."""
    found, left_out = [], {}
    for name in names:
        if name in UNTUNED:
            one = UNTUNED[name]
            if problem := _problem(task, one, length):
                left_out[one.label] = problem
            else:
                found.append(one.contender(name, length))
        elif name == DEFAULT_ADAM:
            found.append(default_adam())
        elif knows_layers(name, task):
            found.append(rival_contender(task, name))
        else:
            left_out[name_and_label(name)[1]] = "does not know the layers"
    return found, left_out


def _problem(task: Task, one: Untuned, length: int) -> str:
    """Returns why an optimizer cannot train a task, which is a limit of its package; empty if it can."""
    if one.package is None:
        return ""
    if importlib.util.find_spec(one.package) is None:
        return f"{one.package} is not installed"

    try:
        # Not within the trace: packages make arrays when they are loaded.
        optimizer = optax.with_extra_args_support(one.make(length))
        step = lambda params: optimizer.update(params, optimizer.init(params), params)
        jax.eval_shape(step, jax.eval_shape(task.init_fn, jax.random.key(0)))
    except Exception as error:  # of whatever kind
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
