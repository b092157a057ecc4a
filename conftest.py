"""Examples in docstrings compile without LLVM's costly passes: a third of their time."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _unoptimised_examples(request):
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
