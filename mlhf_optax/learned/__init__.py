"""Learned optimizers by name. Each is one file and one line here; everything else reads this registry."""

from mlhf_optax.learned.adam_rates import ADAM_RATES
from mlhf_optax.learned.family import LearnedFamily as LearnedFamily
from mlhf_optax.learned.literature.hierarchical import HIERARCHICAL
from mlhf_optax.learned.literature.hyperadam import HYPERADAM
from mlhf_optax.learned.literature.l2l import L2L_FAMILY
from mlhf_optax.learned.literature.rnnprop import RNNPROP
from mlhf_optax.learned.literature.variational_hyperadam import VARIATIONAL_HYPERADAM
from mlhf_optax.learned.mlhf import MLHF
from mlhf_optax.learned.mlhf_general import MLHF_GENERAL

LEARNED: dict[str, LearnedFamily] = {
    family.name: family
    for family in (
        MLHF,
        MLHF_GENERAL,
        ADAM_RATES,
        RNNPROP,
        L2L_FAMILY,
        HYPERADAM,
        VARIATIONAL_HYPERADAM,
        HIERARCHICAL,
    )
}


def get_learned(name: str) -> LearnedFamily:
    """Returns a learned optimizer by name.

    Args:
      name: a key of :data:`LEARNED`.

    Returns:
      Its record.

    Raises:
      ValueError: if there is none of that name; it lists those there are.

    Example:
      >>> get_learned("mlhf").label
      'MLHF'
    """
    if name not in LEARNED:
        raise ValueError(f"there is no learned optimizer {name!r}; there are {', '.join(LEARNED)}")
    return LEARNED[name]
