"""What trains on a loss without noise: this library, and whatever else is at hand."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from mlhf_optax import gauss_newton, hessian_free, load_pretrained
from mlhf_optax.curvature import ggn_matvec

DAMPINGS = (1.0, 0.3, 0.1, 0.03, 0.01)
RATES = (1e-3, 1e-2)
NUM_CG_STEPS = 40


class Contender(NamedTuple):
    """Something that trains.

    Attributes:
      advance: from a state to the next, one step.
      state: the first state.
      params_of: the parameters in a state.
    """

    advance: Callable[[Any], Any]
    state: Any
    params_of: Callable[[Any], Any]


def from_optax(problem: Any, params: Any, tx: Any) -> Contender:
    """Returns the contender of a transformation of gradients."""
    loss = lambda p, batch=problem.batch: problem.loss_fn(problem.predict_fn(p, batch), batch)
    tx = optax.with_extra_args_support(tx)

    def advance(state: Any) -> Any:
        params, state = state
        value, grads = jax.value_and_grad(loss)(params)
        more = {"batch": problem.batch, "value": value, "grad": grads, "value_fn": loss}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    return Contender(advance, (params, tx.init(params)), lambda state: state[0])


def dense_levenberg_marquardt(problem: Any, params: Any) -> Contender:
    """Returns the method as it stands in a textbook, with a Jacobian as cheap as that of this library."""
    flat, unravel = ravel_pytree(params)
    loss = lambda v: problem.loss_fn(problem.predict_fn(unravel(v), problem.batch), problem.batch)

    def advance(state: Any) -> Any:
        v, damping, before = state
        ggn = ggn_matvec(problem.predict_fn, problem.loss_fn, unravel(v), problem.batch)
        matrix = ggn.rows.jacobian.T @ ggn.rows.curved + damping * jnp.eye(v.size, dtype=v.dtype)
        new = v - jnp.linalg.solve(matrix, ggn.slope @ ggn.rows.jacobian)
        after = loss(new)
        is_lower = after < before
        damping = jnp.where(is_lower, damping / 3, damping * 2).clip(1e-16, 1e8)
        return jnp.where(is_lower, new, v), damping, jnp.where(is_lower, after, before)

    state = (flat, jnp.asarray(1e-2, flat.dtype), loss(flat))
    return Contender(advance, state, lambda state: unravel(state[0]))


def from_optimistix(problem: Any, params: Any) -> Contender | None:
    """Returns Levenberg and Marquardt's method of optimistix, or None where it is not installed."""
    try:
        optimistix = importlib.import_module("optimistix")
    except ImportError:
        return None
    solver = optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0)

    def residuals(params: Any, args: Any) -> tuple[Any, None]:
        del args
        outputs = problem.predict_fn(params, problem.batch)
        return jax.tree.map(lambda leaf: leaf * (2 / leaf.size) ** 0.5, outputs), None

    struct = jax.eval_shape(lambda: residuals(params, None)[0])
    state = solver.init(residuals, params, None, {}, struct, None, frozenset())
    equinox = importlib.import_module("equinox")
    arrays, static = equinox.partition(state, equinox.is_array)

    def advance(state: Any) -> Any:
        params, arrays = state
        whole = equinox.combine(arrays, static)
        params, whole, _ = solver.step(residuals, params, None, {}, whole, frozenset())
        return params, equinox.partition(whole, equinox.is_array)[0]

    return Contender(advance, (params, arrays), lambda state: state[0])


def makers(horizon: Callable[[float], int]) -> dict[str, Callable[[Any, Any], Contender | None]]:
    """Returns how each contender is made from a problem and parameters, by label.

    Those that are tried with several settings have labels with a colon: the best of them counts.

    Args:
      horizon: from seconds per step to the number of steps of a schedule.
    """
    optax_of = lambda make: lambda problem, params: from_optax(problem, params, make(problem))
    model = lambda problem: (problem.predict_fn, problem.loss_fn)
    found: dict[str, Callable[[Any, Any], Contender | None]] = {
        "full_batch=True": optax_of(lambda p: load_pretrained().optimizer(*model(p), full_batch=True)),
        "dense LM": dense_levenberg_marquardt,
        "optimistix LM": from_optimistix,
        "L-BFGS": optax_of(lambda p: optax.lbfgs()),
        "hessian_free": optax_of(lambda p: hessian_free(1.0, *model(p), num_cg_steps=NUM_CG_STEPS)),
    }
    for damping in DAMPINGS:
        options = {"damping": damping, "num_cg_steps": NUM_CG_STEPS, "unroll": False}
        found[f"gauss_newton: {damping:g}"] = optax_of(lambda p, o=options: gauss_newton(1.0, *model(p), **o))
    for rate in RATES:
        cosine = lambda rate=rate: optax.cosine_decay_schedule(rate, horizon(1e-3))
        found[f"Adam: {rate:g}"] = optax_of(lambda p, cosine=cosine: optax.adam(cosine()))
    found["Muon: 0.02"] = optax_of(
        lambda p: optax.contrib.muon(optax.cosine_decay_schedule(0.02, horizon(2e-3)))
    )
    for label, name in (("SSBroyden", "ssbroyden"), ("SOAP", "soap")):
        try:
            function = getattr(importlib.import_module(f"jno.optimizers.{name}"), name)
        except (ImportError, AttributeError):
            continue
        options_of = lambda p, name=name: {"qr_dtype": p.dtype} if name == "soap" else {}
        found[label] = optax_of(lambda p, f=function, o=options_of: f(**o(p)))
    return found
