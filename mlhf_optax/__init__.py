"""Meta-Learning with Hessian-Free (MLHF) as an optax gradient transformation."""

from typing import TYPE_CHECKING

from mlhf_optax.controllers.coordinate_lstm import MetaParams as MetaParams
from mlhf_optax.controllers.coordinate_lstm import extend_meta_params as extend_meta_params
from mlhf_optax.controllers.coordinate_lstm import init_meta_params as init_meta_params
from mlhf_optax.controllers.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from mlhf_optax.controllers.lstm_settings import AUTHORS_SETTINGS as AUTHORS_SETTINGS
from mlhf_optax.controllers.lstm_settings import PAPER_SETTINGS as PAPER_SETTINGS
from mlhf_optax.controllers.lstm_settings import Settings as Settings
from mlhf_optax.curvature import ggn_matvec as ggn_matvec
from mlhf_optax.curvature_batch import ShareOrAll as ShareOrAll
from mlhf_optax.damped_step import DampedStepState as DampedStepState
from mlhf_optax.damped_step import scale_by_damped_step as scale_by_damped_step
from mlhf_optax.gauss_newton import gauss_newton as gauss_newton
from mlhf_optax.hessian_free import hessian_free as hessian_free
from mlhf_optax.hessian_free import scale_by_hessian_free as scale_by_hessian_free
from mlhf_optax.losses import NegativeLogLikelihood as NegativeLogLikelihood
from mlhf_optax.losses import SigmoidCrossEntropy as SigmoidCrossEntropy
from mlhf_optax.losses import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from mlhf_optax.losses import SquaredError as SquaredError
from mlhf_optax.micro_batches import over_micro_batches as over_micro_batches
from mlhf_optax.mlhf import mlhf as mlhf
from mlhf_optax.mlhf import scale_by_mlhf as scale_by_mlhf
from mlhf_optax.model import Model as Model
from mlhf_optax.pcg import pcg as pcg
from mlhf_optax.plots import plot_info as plot_info
from mlhf_optax.pretrained import list_pretrained as list_pretrained
from mlhf_optax.pretrained import load_pretrained as load_pretrained
from mlhf_optax.pretrained.files import load_meta_params as load_meta_params
from mlhf_optax.pretrained.files import save_meta_params as save_meta_params
from mlhf_optax.pretrained.loaded import Pretrained as Pretrained
from mlhf_optax.step_info import StepInfo as StepInfo
from mlhf_optax.support.layer_types import layer_types as layer_types
from mlhf_optax.support.lazy import lazy_names
from mlhf_optax.transforms import limit_growth as limit_growth
from mlhf_optax.transforms import limit_update_ratio as limit_update_ratio

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlhf_optax.learned.literature.lodo import LODOState as LODOState
    from mlhf_optax.learned.literature.lodo import lodo as lodo
    from mlhf_optax.train_state import TrainState as TrainState

# One needs Flax, which is slow to import; the others are for comparisons.
__getattr__, __dir__ = lazy_names(
    globals(),
    {
        "LODOState": "mlhf_optax.learned.literature.lodo",
        "TrainState": "mlhf_optax.train_state",
        "lodo": "mlhf_optax.learned.literature.lodo",
    },
)
