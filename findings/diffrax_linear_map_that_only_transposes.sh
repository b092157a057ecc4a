#!/usr/bin/env bash
# diffrax 0.7.2 on jax 0.10.2: under the default adjoint `jax.linearize` succeeds, and what it returns can be
# transposed, but not called.
#
# `RecursiveCheckpointAdjoint` is a `jax.custom_vjp`. JAX linearizes it to an equation that holds only the transposed
# rule, so `linear_transpose` of the map is right while the map itself, or a `jvp` under `jit`, is an error. Neither
# `linearize`, `make_jaxpr` nor `eval_shape` finds it. We guessed that `linearize` would raise. `DirectAdjoint` does both.
#
# Seen with equinox 0.13.8, Python 3.11, for y(1) = exp(-k) at k = 1, derivative -0.3679:
#   RecursiveCheckpointAdjoint: linearize passes; eval_shape of a jvp passes; transpose -0.3679; call: TypeError, forward-mode
#   DirectAdjoint: linearize passes; eval_shape of a jvp passes; transpose -0.3679; call -0.3679
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check diffrax==0.7.2 equinox==0.13.8 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu venv/bin/python - <<'END'
import diffrax
import jax


def final(rate, adjoint):
    term = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    solution = diffrax.diffeqsolve(
        term, diffrax.Tsit5(), 0.0, 1.0, 0.1, 1.0, args=rate, max_steps=16, adjoint=adjoint
    )
    return solution.ys[0]


def found(adjoint):
    function = lambda rate: final(rate, adjoint)
    _, linear = jax.linearize(function, 1.0)
    jax.make_jaxpr(linear)(1.0)
    jax.eval_shape(lambda rate: jax.jvp(function, (rate,), (1.0,)), 1.0)
    transposed = float(jax.linear_transpose(linear, 1.0)(1.0)[0])
    assert abs(transposed + 0.36788) < 1e-4, transposed
    try:
        called = f"call {float(linear(1.0)):.4f}"
    except TypeError as error:
        called = f"call: TypeError, {error}"
    name = type(adjoint).__name__
    print(f"{name}: linearize passes; eval_shape of a jvp passes; transpose {transposed:.4f}; {called}")
    return called


assert "TypeError" in found(diffrax.RecursiveCheckpointAdjoint())
assert found(diffrax.DirectAdjoint()) == "call -0.3679"
END
