"""Section 4.2 of the paper: MLHF against other second-order optimizers, CUDA-convnet on CIFAR-10.

The task of section 4.1 at batch 512, with MLHF and the paper's grids (Table 1) of Hessian-free with
fixed damping (16 settings) and with the Levenberg-Marquardt rule (64), both with 20 CG steps, and of
K-FAC (48). Loss on the training part, accuracy on the test set, by epochs and by time on a logarithmic
axis (figure 3).

    python benchmarks/second_order_cifar10.py --data-dir DIR --output runs/second_order_cifar10

K-FAC comes from kfac-jax, which does not keep pace with jax, so it has an environment of its own.
Train it there first, into the same folder; then ``--resume`` with ``--kfac`` finds its results:

    python benchmarks/second_order_cifar10.py --kfac --only kfac --data-dir DIR
    python benchmarks/second_order_cifar10.py --kfac --resume --data-dir DIR

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
In a run of n steps a decay of the damping near one changes it by a factor of decay^-n at most, so short
runs need only some of the decays (``--decays 2/3 0.9``): the others are hardly more than HF(Fixed).
"""

import argparse
import fractions
import functools
import itertools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from kfac import kfac_contender

from mlhf_optax import LevenbergMarquardt, hessian_free
from mlhf_optax.comparison.comparison import Contender
from mlhf_optax.comparison.experiment import run_experiment
from mlhf_optax.comparison.experiment_options import (
    add_network_options,
    apply_quick,
    experiment_parser,
    limit_data,
    network_options,
)
from mlhf_optax.comparison.mlhf_contenders import mlhf_contenders
from mlhf_optax.tasks import Task, cifar10_convnet

LEARNING_RATES = DAMPINGS = (1.0, 0.1, 0.01, 0.001)
DECAYS = (2 / 3, 0.9, 0.99, 0.999)


def fixed_contender(task: Task) -> Contender:
    """Returns HF(Fixed), 16 settings."""
    settings = [
        {"learning_rate": rate, "damping": damping}
        for rate, damping in itertools.product(LEARNING_RATES, DAMPINGS)
    ]

    def make(learning_rate, damping):
        return hessian_free(learning_rate, task.predict_fn, task.loss_fn, damping=damping)

    names = tuple(f"hf-fixed lr={s['learning_rate']:g} damping={s['damping']:g}" for s in settings)
    return Contender("hf-fixed", names, tuple(settings), make, _stack(settings))


def adapted_contender(task: Task, decay: float) -> Contender:
    """Returns HF(LM) with one decay, 16 settings."""
    settings = [
        {"learning_rate": rate, "initial_damping": damping}
        for rate, damping in itertools.product(LEARNING_RATES, DAMPINGS)
    ]

    def make(learning_rate, initial_damping):
        rule = LevenbergMarquardt(decay=decay)
        tx = hessian_free(learning_rate, task.predict_fn, task.loss_fn, damping=rule)
        # Set in the state rather than in the rule, which checks its numbers, it may be a traced one.
        start = jnp.asarray(initial_damping, jnp.float32)
        return tx._replace(init=lambda params: optax.tree.set(tx.init(params), damping_value=start))

    names = tuple(
        f"hf-lm lr={s['learning_rate']:g} damping={s['initial_damping']:g} decay={decay:.3g}"
        for s in settings
    )
    about = tuple({**setting, "decay": decay} for setting in settings)
    return Contender("hf-lm", names, about, make, _stack(settings))


def parse_decay(text: str) -> float:
    """Returns a decay of the paper's grid, written as a number or a fraction.

    Raises:
      argparse.ArgumentTypeError: if it is not in the grid.
    """
    try:
        value = float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = None
    if value not in DECAYS:
        raise argparse.ArgumentTypeError(f"must be one of 2/3, 0.9, 0.99 and 0.999, got {text!r}")
    return value


def _stack(settings: Sequence[dict[str, float]]) -> dict[str, jax.Array]:
    return {name: jnp.array([setting[name] for setting in settings], jnp.float32) for name in settings[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    parser = experiment_parser(__doc__, "second_order_cifar10", batch_size=512)
    parser.add_argument("--kfac", action="store_true", help="compare with K-FAC, too")
    about = "those of the damping that HF(LM) is trained with, 16 settings each; by default all four"
    parser.add_argument("--decays", type=parse_decay, nargs="+", default=DECAYS, metavar="DECAY", help=about)
    add_network_options(parser)
    options = parser.parse_args(arguments)
    apply_quick(options)
    make_task = functools.partial(
        cifar10_convnet,
        batch_size=options.batch_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        # kfac-jax recognises layers by the operations of jax.
        convolution=jax.lax.conv_general_dilated if options.only == ["kfac"] else None,
        **network_options(options),
    )
    task = limit_data(make_task(), 2048, 2048, 512) if options.quick else make_task()
    contenders = [
        *mlhf_contenders(task, options),
        fixed_contender(task),
        *(adapted_contender(task, decay) for decay in options.decays),
        *([kfac_contender()] if options.kfac else []),
    ]
    about = {"decays": list(options.decays)}
    script = "second_order_cifar10.py"
    run_experiment(task, contenders, options, "Second-order optimizers", script, about)


if __name__ == "__main__":
    sys.exit(main())
