"""Fixtures that the tests share."""

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision inside the test, for comparisons of numerics."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_ranks():
    """No silent broadcasting between ranks inside the test, for the kernels."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_programs_of_other_files():
    """Compiled programs of a file are of no use to the next, and all of them would take gigabytes."""
    yield
    jax.clear_caches()
