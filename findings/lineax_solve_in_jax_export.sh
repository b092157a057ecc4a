#!/usr/bin/env bash
# lineax 0.1.1, optimistix 0.1.0 and diffrax 0.7.2 with `jax.export` (jax 0.10.2): a compiled solve runs under `jit` but
# cannot be exported, not even a dense 2 x 2 one, unless `throw=False`.
#
# By default each solve checks its result at run time and raises an error of Python, for which the compiled program holds
# a callback to the host. A program with one cannot be written down. We guessed that only iterative solvers, which
# can run out of steps, would have one; `lineax.LU` has it, too. With `throw=False` also a number of systems that is not known
# yet is exported.
#
# Seen with equinox 0.13.8, Python 3.11:
#   lineax LU, optimistix Newton, diffrax Tsit5:  NotImplementedError, serialization of host_callbacks is not yet implemented
#   each of them with throw=False: exported, and the same value
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check lineax==0.1.1 optimistix==0.1.0 diffrax==0.7.2 equinox==0.13.8 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu venv/bin/python - <<'END'
import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax import export


def lineax_solve(a, throw):
    operator = lx.MatrixLinearOperator(jnp.array([[2.0, 1.0], [1.0, 3.0]]) * a)
    return lx.linear_solve(operator, jnp.ones(2), solver=lx.LU(), throw=throw).value[0]


def optimistix_root(a, throw):
    equation = lambda y, a: y - jnp.tanh(a * y + 1)
    return optx.root_find(equation, optx.Newton(1e-6, 1e-6), 0.0, args=a, throw=throw).value


def diffrax_end(a, throw):
    term = diffrax.ODETerm(lambda t, y, a: -a * y)
    solver = diffrax.Tsit5()
    return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.1, 1.0, args=a, max_steps=16, throw=throw).ys[0]


for solve in (lineax_solve, optimistix_root, diffrax_end):
    jitted = jax.jit(lambda a, solve=solve: solve(a, True))
    expected = jitted(0.5)
    try:
        export.export(jitted)(0.5)
    except NotImplementedError as error:
        print(f"{solve.__name__}: NotImplementedError, {error}")
        assert "host_callbacks" in str(error)
    else:
        raise AssertionError(f"{solve.__name__} with throw=True is exported now")
    quiet = jax.jit(lambda a, solve=solve: solve(a, False))
    assert abs(export.export(quiet)(0.5).call(0.5) - expected) < 1e-6
    print(f"{solve.__name__} with throw=False: exported, and the same value")
some = jax.ShapeDtypeStruct(export.symbolic_shape("n"), jnp.float32)
many = export.export(jax.jit(jax.vmap(lambda a: lineax_solve(a, False))))(some)
assert many.call(jnp.ones(3)).shape == (3,)
END
