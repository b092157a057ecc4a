#!/usr/bin/env bash
# optimistix 0.1.0 on jax 0.10.2: with `RecursiveCheckpointAdjoint` the second derivative of a root can be had by
# `jax.hessian`, though the first cannot by `jax.jvp`, nor the second by `jacrev` of `jacrev`.
#
# Its loop is a `jax.custom_vjp`: no forward mode. But the backward pass is a plain loop, which has a forward mode and no
# reverse one. So of the four ways to two derivatives just one works, forward over reverse, and that is `jax.hessian`.
# The default, `ImplicitAdjoint`, has all four. We guessed that what has no `jvp` has no `hessian`; diffrax 0.7.2, with an
# adjoint of the same name, has neither.
#
# Seen with equinox 0.13.8, lineax 0.1.1, diffrax 0.7.2, Python 3.11:
#   ImplicitAdjoint: jvp, hessian, jacrev(jacrev), jacrev(jacfwd), jacfwd(jacfwd) work
#   RecursiveCheckpointAdjoint: hessian work
#   diffrax, RecursiveCheckpointAdjoint: none work
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check optimistix==0.1.0 diffrax==0.7.2 equinox==0.13.8 lineax==0.1.1 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu venv/bin/python - <<'END'
import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx

WAYS = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (1.0,))[1],
    "hessian": lambda f, x: jax.hessian(f)(x),
    "jacrev(jacrev)": lambda f, x: jax.jacrev(jax.jacrev(f))(x),
    "jacrev(jacfwd)": lambda f, x: jax.jacrev(jax.jacfwd(f))(x),
    "jacfwd(jacfwd)": lambda f, x: jax.jacfwd(jax.jacfwd(f))(x),
}


def root(adjoint):
    def function(a):
        equation = lambda y, a: y - jnp.tanh(a * y + 1)
        return optx.root_find(equation, optx.Newton(1e-6, 1e-6), 0.0, args=a, adjoint=adjoint).value

    return function


def final(rate):
    term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, 1.0, args=rate, max_steps=16).ys[0]


def working(name, function):
    values = {}
    for way, derivative in WAYS.items():
        try:
            values[way] = float(derivative(function, 0.5))
        except (TypeError, ValueError, NotImplementedError):
            pass
    print(f"{name}: {', '.join(values) or 'none'} work")
    return values


implicit = working("ImplicitAdjoint", root(optx.ImplicitAdjoint()))
checkpointed = working("RecursiveCheckpointAdjoint", root(optx.RecursiveCheckpointAdjoint()))
assert set(implicit) == set(WAYS)
assert set(checkpointed) == {"hessian"}
assert abs(checkpointed["hessian"] - implicit["hessian"]) < 1e-4
assert working("diffrax, RecursiveCheckpointAdjoint", final) == {}
END
