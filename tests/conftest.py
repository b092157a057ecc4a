"""Fixtures that the tests share, and one folder for what they compile."""

import contextlib
import os
import tempfile

import jax
import pytest

CACHE = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


def pytest_configure(config):
    """All processes of a run, and files one after the other, share what they compile: it is most of the time.

    Set `JAX_COMPILATION_CACHE_DIR` to keep it from one run to the next, which then takes a third of the time.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="compiled-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name  # of workers and other processes to come
        jax.config.update("jax_compilation_cache_dir", folder.name)
    for name, value in CACHE.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)
    config.pluginmanager.register(_Examples())


@contextlib.contextmanager
def _without_costly_passes():
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


class _Examples:
    """LLVM leaves out its costly passes for examples in docstrings, too, which no fixture here reaches."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if not isinstance(item, pytest.DoctestItem):
            return (yield)
        with _without_costly_passes():
            return (yield)


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


@pytest.fixture(scope="module")
def unoptimised():
    """LLVM leaves out its costly passes, which halves the time to compile.

    For files whose tests are of what is run, written and shown, or of how steps and trainings behave. Those
    of kernels, products and metrics run what users run.
    """
    with _without_costly_passes():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_programs_of_other_files():
    """All compiled programs in memory would take gigabytes; what a file needs again comes from the folder."""
    yield
    jax.clear_caches()
