"""Controllers choose damping and preconditioner of a damped Gauss-Newton step, one file each."""

from mlhf_optax.controllers.constant import constant as constant
from mlhf_optax.controllers.coordinate_lstm import coordinate_lstm as coordinate_lstm
from mlhf_optax.controllers.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from mlhf_optax.controllers.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from mlhf_optax.controllers.protocol import Control as Control
from mlhf_optax.controllers.protocol import Controller as Controller
from mlhf_optax.controllers.protocol import Observed as Observed
from mlhf_optax.controllers.protocol import Operators as Operators
from mlhf_optax.controllers.protocol import Outcome as Outcome
from mlhf_optax.controllers.protocol import Product as Product
from mlhf_optax.controllers.protocol import Quotient as Quotient
from mlhf_optax.controllers.protocol import Scale as Scale
from mlhf_optax.controllers.protocol import View as View
from mlhf_optax.controllers.scheduled import scheduled as scheduled
