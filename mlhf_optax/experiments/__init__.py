"""Comparisons: train a task with many optimizers, record curves, show them in a table and a figure."""

from typing import TYPE_CHECKING

from mlhf_optax.support.lazy import lazy_names

if TYPE_CHECKING:
    from mlhf_optax.experiments.contenders import Contender as Contender
    from mlhf_optax.experiments.contenders import constant_contender as constant_contender
    from mlhf_optax.experiments.contenders import default_adam as default_adam
    from mlhf_optax.experiments.contenders import grid_contenders as grid_contenders
    from mlhf_optax.experiments.contenders import learned_contender as learned_contender
    from mlhf_optax.experiments.contenders import rates_per_decade as rates_per_decade
    from mlhf_optax.experiments.engine import Progress as Progress
    from mlhf_optax.experiments.engine import compare as compare
    from mlhf_optax.experiments.engine import epoch_steps as epoch_steps
    from mlhf_optax.experiments.engine import log_steps as log_steps
    from mlhf_optax.experiments.figures import save_figure as save_figure
    from mlhf_optax.experiments.results import Comparison as Comparison
    from mlhf_optax.experiments.tables import comparison_markdown as comparison_markdown
    from mlhf_optax.experiments.tables import comparison_table as comparison_table
    from mlhf_optax.experiments.timing import interleaved as interleaved
    from mlhf_optax.experiments.timing import seconds_per_step as seconds_per_step

# The command line explains itself without the extras that these need.
_MODULES = {
    "Contender": "mlhf_optax.experiments.contenders",
    "constant_contender": "mlhf_optax.experiments.contenders",
    "default_adam": "mlhf_optax.experiments.contenders",
    "grid_contenders": "mlhf_optax.experiments.contenders",
    "learned_contender": "mlhf_optax.experiments.contenders",
    "rates_per_decade": "mlhf_optax.experiments.contenders",
    "Progress": "mlhf_optax.experiments.engine",
    "compare": "mlhf_optax.experiments.engine",
    "epoch_steps": "mlhf_optax.experiments.engine",
    "log_steps": "mlhf_optax.experiments.engine",
    "save_figure": "mlhf_optax.experiments.figures",
    "Comparison": "mlhf_optax.experiments.results",
    "comparison_markdown": "mlhf_optax.experiments.tables",
    "comparison_table": "mlhf_optax.experiments.tables",
    "interleaved": "mlhf_optax.experiments.timing",
    "seconds_per_step": "mlhf_optax.experiments.timing",
}
__getattr__, __dir__ = lazy_names(globals(), _MODULES)
