"""Meta-training of learned optimizers, on short unrolls or over long horizons; validation and a driver."""

from mlhf_optax.meta_training.driver import Progressed as Progressed
from mlhf_optax.meta_training.driver import Schedule as Schedule
from mlhf_optax.meta_training.driver import meta_train as meta_train
from mlhf_optax.meta_training.interface import META_LOSSES as META_LOSSES
from mlhf_optax.meta_training.interface import LearnedOptimizer as LearnedOptimizer
from mlhf_optax.meta_training.interface import MetaGradient as MetaGradient
from mlhf_optax.meta_training.interface import TaskLike as TaskLike
from mlhf_optax.meta_training.interface import Trajectory as Trajectory
from mlhf_optax.meta_training.interface import runs_in_sequence as runs_in_sequence
from mlhf_optax.meta_training.interface import unrolled_optimizer as unrolled_optimizer
from mlhf_optax.meta_training.long_horizon.config import LongHorizonConfig as LongHorizonConfig
from mlhf_optax.meta_training.long_horizon.step import LongHorizonState as LongHorizonState
from mlhf_optax.meta_training.long_horizon.step import make_long_horizon_step as make_long_horizon_step
from mlhf_optax.meta_training.meta_optimizer import meta_optimizer as meta_optimizer
from mlhf_optax.meta_training.unrolled.config import MetaTrainingConfig as MetaTrainingConfig
from mlhf_optax.meta_training.unrolled.mlhf_gradient import mlhf_optimizer as mlhf_optimizer
from mlhf_optax.meta_training.unrolled.mlhf_unroll import UnrollOptions as UnrollOptions
from mlhf_optax.meta_training.unrolled.step import MetaState as MetaState
from mlhf_optax.meta_training.unrolled.step import make_meta_step as make_meta_step
from mlhf_optax.meta_training.unrolled.tricks import with_tricks as with_tricks
from mlhf_optax.meta_training.validation import Validation as Validation
from mlhf_optax.meta_training.validation import make_validation as make_validation
from mlhf_optax.meta_training.validation import training_losses as training_losses
