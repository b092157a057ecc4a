"""Every shipped optimizer in every mode of JAX: the losses of the default mode, and dtypes that stay."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from mlhf_optax import (
    LevenbergMarquardt,
    gauss_newton,
    hessian_free,
    list_pretrained,
    load_pretrained,
    lodo,
    mlhf,
)
from mlhf_optax.solvers import Exact

pytestmark = pytest.mark.usefixtures("unoptimised")


def affine(params, batch):
    """One layer, with a matrix and a vector."""
    return problems.linear(params, batch) + params["bias"][None]


def affine_params(dtype):
    return {**problems.linear_params(dtype=dtype), "bias": jnp.asarray([0.1, -0.2], dtype)}


def loss_of(params, batch):
    return problems.LOSS(affine(params, batch), batch)


MODEL = (affine, problems.LOSS)
META_PARAMS = problems.random_meta_params(units=(2,))
NUM_STEPS = 4  # factors are refreshed in steps 1, 2 and 4, and not in step 3


def shipped(name: str) -> Callable[[], optax.GradientTransformation]:
    pretrained = load_pretrained(name)
    few = {"num_cg_steps": 2, "unroll": 1} if "num_cg_steps" in pretrained.family.arguments else {}
    return lambda: pretrained.optimizer(*MODEL, **few)


def of_the_paper(**arguments) -> Callable[[], optax.GradientTransformationExtraArgs]:
    return lambda: mlhf(META_PARAMS, *MODEL, num_cg_steps=2, **arguments)


def with_metric(metric: str) -> Callable[[], optax.GradientTransformationExtraArgs]:
    return lambda: gauss_newton(
        0.5,
        *MODEL,
        metric=metric,
        gradient_decay=0.8,
        unit_decay=0.9,
        num_cg_steps=2,
        curvature_batch_size=0.5,
    )


# Every optimizer that ships; one that is new in `list_pretrained()` is asked as well.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    **{name: shipped(name) for name in list_pretrained()},
    "lodo": lambda: lodo(0.1, num_layers=2),
    **{f"gauss_newton {m}": with_metric(m) for m in ("identity", "diagonal", "kronecker")},
    "hessian_free": lambda: hessian_free(0.5, *MODEL, num_cg_steps=3),
    "hessian_free LM": lambda: hessian_free(0.5, *MODEL, damping=LevenbergMarquardt(0.5), num_cg_steps=3),
    "hessian_free exact": lambda: hessian_free(
        0.5, *MODEL, damping=LevenbergMarquardt.without_noise(), solver=Exact()
    ),
    "mlhf": of_the_paper(momentum=0.5, weight_decay=1e-3, max_growth=1.0),
    "mlhf schedule": of_the_paper(learning_rate=lambda count: 0.5 - 0.1 * count.astype(jnp.float32)),
}


class Mode(NamedTuple):
    """How a training runs."""

    settings: tuple[Callable[[], contextlib.AbstractContextManager], ...]
    is_jitted: bool = True
    dtype: str = "float32"
    rtol: float = 1e-5


STRICT = (lambda: jax.numpy_rank_promotion("raise"), lambda: jax.numpy_dtype_promotion("strict"))
FINITE = (lambda: jax.debug_nans(True), lambda: jax.debug_infs(True))
X64 = (lambda: jax.enable_x64(True),)
# Settings that cannot hide each other's errors share a mode: each says by itself what it refuses.
MODES = {
    "strict promotion": Mode(STRICT),
    "finite": Mode(FINITE),
    "finite without jit": Mode(FINITE, is_jitted=False, rtol=1e-3),
    "jit disabled": Mode((lambda: jax.disable_jit(),), rtol=1e-3),
    "x64, parameters of float32": Mode((*X64, *STRICT), rtol=1e-3),
    "x64, parameters of float64": Mode(X64, dtype="float64", rtol=1e-3),
}


def train(make, mode: Mode) -> tuple[np.ndarray, list]:
    """Returns the losses, and the kinds of parameters and state at the start and after every step."""
    with contextlib.ExitStack() as stack:
        for setting in mode.settings:
            stack.enter_context(setting())
        tx = optax.with_extra_args_support(make())
        params = affine_params(mode.dtype)
        batch = {
            "image": jnp.asarray(problems.batches(1)[0]["image"], mode.dtype),
            "label": problems.batch()["label"],
        }

        def step(params, state):
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return optax.apply_updates(params, updates), state, loss

        step, state, losses = jax.jit(step) if mode.is_jitted else step, tx.init(params), []
        dtypes = [kinds((params, state))]
        for _ in range(NUM_STEPS):
            params, state, loss = step(params, state)
            losses.append(float(loss))
            dtypes.append(kinds((params, state)))
        return np.array([*losses, loss_of(params, batch)]), dtypes


def kinds(tree):
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]


@functools.cache
def in_the_default_mode(name: str):
    return train(OPTIMIZERS[name], Mode(()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_in_every_mode(name, mode):
    losses, dtypes = train(OPTIMIZERS[name], MODES[mode])
    want, usual_dtypes = in_the_default_mode(name)
    np.testing.assert_allclose(losses, want, rtol=MODES[mode].rtol)
    assert all(later == dtypes[0] for later in dtypes[1:])
    if MODES[mode].dtype == "float32":
        assert dtypes == usual_dtypes


# Without jit, step by step.


@contextlib.contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """Yields a list that grows by an entry whenever a program is compiled."""
    compiled = []

    def listen(event: str, *_, **__) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_second_step_without_jit_compiles_nothing_and_keeps_nothing(name):
    """Factors are refreshed in steps 1, 2, 4, 8 and 10, and not in the others."""
    tx = optax.with_extra_args_support(OPTIMIZERS[name]())
    params, batch = affine_params("float32"), problems.batch()
    batch = {**batch, "image": batch["image"].astype(jnp.float32)}
    state, compiled, alive = tx.init(params), [], []
    for _ in range(11):
        with counting_compilations() as programs:
            _, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            params = optax.apply_updates(params, updates)
        compiled.append(len(programs))
        gc.collect()
        alive.append(len(jax.live_arrays()))
    with counting_compilations() as programs:
        jax.jit(lambda x: x + 1)(1.0)
    assert programs
    assert compiled[1:] == [0] * 10
    assert alive[-1] <= alive[2]  # what earlier tests have left may go meanwhile
