"""What several tests share, so that they do not compile it again."""

import pytest

from mlhf_optax import meta_training
from mlhf_optax.meta_training import driver


def share(make):
    """Returns ``make``, but all calls get what the first one made."""
    made = []

    def shared(*args):
        if not made:
            made.append(make(*args))
        return made[0]

    return shared


@pytest.fixture(scope="module")
def one_compilation():
    """All meta-trainings of a module, which must be alike, run the same compiled functions."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((driver, "make_meta_step"), (meta_training, "make_validation")):
            patch.setattr(module, name, share(getattr(module, name)))
        yield
