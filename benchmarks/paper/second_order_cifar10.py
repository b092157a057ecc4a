"""Section 4.2 of the paper: MLHF against second-order optimizers, CUDA-convnet on CIFAR-10 at batch 512.

Trains the network with MLHF, with Hessian-free at a fixed damping (16 settings of the paper's grid), with
Hessian-free and Levenberg-Marquardt (64 settings), both with 20 CG steps, and with K-FAC (48). Records
loss and accuracy by epochs and by time (figure 3).

    python benchmarks/paper/second_order_cifar10.py --data-dir DIR --output runs/second_order_cifar10

K-FAC comes from kfac-jax, which does not keep pace with jax, so it has an environment of its own.
Train it there first, into the same folder; then ``--resume`` with ``--kfac`` finds its results:

    python benchmarks/paper/second_order_cifar10.py --kfac --only kfac --data-dir DIR
    python benchmarks/paper/second_order_cifar10.py --kfac --resume --data-dir DIR

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
In a run of n steps a decay of the damping near one changes it by a factor of decay^-n at most, so short
runs need only some of the decays (``--decays 0.667 0.9``): the others are hardly more than HF(Fixed).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from experiment import ConvnetOptions, learned_contenders, run_experiment
from kfac import kfac_contender

from mlhf_optax import LevenbergMarquardt, hessian_free
from mlhf_optax.experiments import Comparison, Contender
from mlhf_optax.experiments.results import best_at
from mlhf_optax.experiments.scripts import Table, command_line, parse_options
from mlhf_optax.experiments.tables import bold_ratio, format_loss
from mlhf_optax.support.checks import require
from mlhf_optax.tasks import Task

LEARNING_RATES = DAMPINGS = (1.0, 0.1, 0.01, 0.001)
DECAYS = (2 / 3, 0.9, 0.99, 0.999)
TITLES = {"hf-fixed": "HF(Fixed)", "hf-lm": "HF(LM)", "kfac": "K-FAC"}


@dataclasses.dataclass(frozen=True)
class Options(ConvnetOptions):
    """Options of this script."""

    batch_size: int = 512
    """Examples per mini-batch."""
    kfac: bool = False
    """Compare with K-FAC, too."""
    decays: tuple[float, ...] = DECAYS
    """Decays of the damping that HF(LM) is trained with, 16 settings each; 0.667 stands for 2/3."""
    output: Path = Path("runs/second_order_cifar10")
    """Folder for all that is written."""

    def __post_init__(self):
        super().__post_init__()
        exact = tuple(next((d for d in DECAYS if abs(d - given) < 1e-3), None) for given in self.decays)
        require(None not in exact, "decays", "among 0.667, 0.9, 0.99 and 0.999", self.decays)
        object.__setattr__(self, "decays", exact)


def fixed_contender(task: Task) -> Contender:
    """Returns HF(Fixed), 16 settings."""
    pairs = itertools.product(LEARNING_RATES, DAMPINGS)
    settings = [{"learning_rate": rate, "damping": damping} for rate, damping in pairs]
    make = functools.partial(hessian_free, predict_fn=task.predict_fn, loss_fn=task.loss_fn)
    return Contender.of_settings("hf-fixed", settings, make)


def adapted_contender(task: Task, decay: float) -> Contender:
    """Returns HF(LM) with one decay, 16 settings."""
    pairs = itertools.product(LEARNING_RATES, DAMPINGS)
    settings = [{"learning_rate": rate, "initial_damping": x, "decay": decay} for rate, x in pairs]

    def make(learning_rate, initial_damping):
        rule = LevenbergMarquardt(decay=decay)
        tx = hessian_free(learning_rate, task.predict_fn, task.loss_fn, damping=rule)
        # Set in the state rather than in the rule, which checks its numbers, it may be a traced one.
        start = jnp.asarray(initial_damping, jnp.float32)
        return tx._replace(init=lambda params: optax.tree.set(tx.init(params), damping=start))

    found = Contender.of_settings("hf-lm", settings, make)
    stacked = {name: values for name, values in found.stacked.items() if name != "decay"}
    return dataclasses.replace(found, stacked=stacked)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    options = parse_options(Options, __doc__, arguments)
    # kfac-jax recognises layers by the operations of jax.
    convolution = jax.lax.conv_general_dilated if options.only == ("kfac",) else None
    task = options.make_task((2048, 2048, 512), convolution=convolution)
    contenders = [
        *learned_contenders(task, options),
        fixed_contender(task),
        *(adapted_contender(task, decay) for decay in options.decays),
        *([kfac_contender()] if options.kfac else []),
    ]
    command = command_line(__file__, arguments)
    run_experiment(task, contenders, options.shortened(), "Second-order optimizers", command)


def table(found: Comparison, longer: Comparison) -> Table:
    """Returns rows for each MLHF and for the best setting of each family at the end of the run.

    In brackets are the loss and the time of MLHF over those of the best setting of all.

    Args:
      found: the comparison, in which all were timed in turns.
      longer: a longer run with ``--only mlhf``, as its steps take less time.
    """
    curves, last = found.curves(), found.curves()[0].steps[-1]
    others = [curve for curve in curves if not curve.is_learned]
    first = best_at(others, last)
    rows = [["", "steps", "training loss", "test accuracy", "seconds in all"]]
    followed = {curve.optimizer: curve for curve in longer.curves()}
    for curve in (one for one in curves if one.is_learned):
        much = followed.get(curve.optimizer, curve)
        for step, loss, accuracy in zip(much.steps, much.train_loss, much.test_accuracy, strict=True):
            seconds, its = step * curve.seconds_per_step, last * first.seconds_per_step
            shown = f"{format_loss(loss)} ({bold_ratio(loss, first.loss_at(last))})", f"{accuracy:.1%}"
            rows.append([curve.label, f"{step}", *shown, f"{seconds:.0f} ({bold_ratio(seconds, its)})"])
    for family in dict.fromkeys(curve.family for curve in others):
        members = [curve for curve in others if curve.family == family]
        best, lost = best_at(members, last), sum(math.isinf(curve.loss_at(last)) for curve in members)
        setting = best.label.removeprefix(f"{family} ")
        name = f"{TITLES[family]}, best of {len(members)}, {lost} diverged: {setting}"
        seconds = f"{last * best.seconds_per_step:.0f}"
        rows.append([name, f"{last}", format_loss(best.loss_at(last)), f"{best.accuracy:.1%}", seconds])
    record = found.about
    note = (
        f"`{record['task']}`, {record['num_train']} images, batch {record['batch_size']}, seeds: "
        f"{first.seeds}; in brackets over the best of all settings. The losses of MLHF are of a run of their "
        "own with `--epochs 3 --only mlhf`."
    )
    return Table(rows, note, record)


def _shipped(folder: Path) -> Table:
    names = ("second_order_cifar10", "second_order_cifar10_mlhf")
    return table(*(Comparison.load(folder / f"{name}.json") for name in names))


TABLES = {"second_order_cifar10": _shipped}

if __name__ == "__main__":
    main()
