"""Section 4.1 of the paper: MLHF against tuned first-order optimizers, CUDA-convnet on CIFAR-10.

Trains the network on the last 2/5 of the training set of CIFAR-10 with MLHF, and with every entry of
the paper's grid of SGD with momentum, RMSprop and Adam (Table 1: 45 settings). Loss on the training
part, accuracy on the test set, by epochs and by time (figure 2). MLHF runs twice, with the whole batch
and with a quarter of it for its curvature.

    python benchmarks/first_order_cifar10.py --data-dir DIR --output runs/first_order_cifar10

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import sys
from collections.abc import Sequence

from mlhf_optax.comparison.comparison import grid_contenders
from mlhf_optax.comparison.experiment import run_experiment
from mlhf_optax.comparison.experiment_options import (
    add_network_options,
    apply_quick,
    experiment_parser,
    limit_data,
    network_options,
)
from mlhf_optax.comparison.mlhf_contenders import mlhf_contenders
from mlhf_optax.tasks import cifar10_convnet


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    parser = experiment_parser(__doc__, "first_order_cifar10", batch_size=128)
    add_network_options(parser)
    options = parser.parse_args(arguments)
    apply_quick(options)
    task = cifar10_convnet(
        batch_size=options.batch_size,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        **network_options(options),
    )
    if options.quick:
        task = limit_data(task, 2000, 2000, 500)
    contenders = [*mlhf_contenders(task, options), *grid_contenders(task.batch_size)]
    run_experiment(task, contenders, options, "First-order optimizers", "first_order_cifar10.py")


if __name__ == "__main__":
    sys.exit(main())
