#!/usr/bin/env bash
# keras 3.15.1 on jax 0.10.2: a Variable works in `variable + 1` and `jnp.stack`, but in no jitted function of
# `jax.numpy`; and `optax.apply_updates` takes it where `optax.adam(...).init` does not.
#
# The class has `__jax_array__`, which JAX no longer calls when it finds the types of the arguments of a jitted
# function, and most of `jax.numpy` is jitted. Functions that make an array first still call it. `zeros_like`
# never comes so far: it reads the attribute `dtype`, a string, and its error puts the blame on that string, which
# is the name of a type. We guessed that all or none would work. `variable.value` always does.
#
# Seen with Python 3.11:
#   jnp.asarray, jnp.stack, variable + 1, array @ variable, optax.apply_updates: arrays
#   jnp.sin, jnp.add, jnp.sum, an own jitted function: ValueError, Triggering __jax_array__() during abstractification is no longer supported
#   jnp.zeros_like, optax.adam(...).init: ValueError, Could not convert <Variable ...> to a NumPy dtype
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cd "$work"
JAX_PLATFORMS=cpu venv/bin/python - <<'END'
import os

os.environ["KERAS_BACKEND"] = "jax"
import jax
import jax.numpy as jnp
import keras
import optax

variable = keras.Variable(jnp.ones(3))
works = {
    "jnp.asarray": lambda v: jnp.asarray(v),
    "jnp.stack": lambda v: jnp.stack([v, v]),
    "variable + 1": lambda v: v + 1,
    "array @ variable": lambda v: jnp.ones(3) @ v,
    "optax.apply_updates": lambda v: optax.apply_updates([v], [jnp.ones(3)])[0],
}
fails = {
    "jnp.sin": (jnp.sin, "Triggering __jax_array__()"),
    "jnp.add": (lambda v: jnp.add(v, v), "Triggering __jax_array__()"),
    "jnp.sum": (jnp.sum, "Triggering __jax_array__()"),
    "an own jitted function": (jax.jit(lambda v: v + 1), "Triggering __jax_array__()"),
    "jnp.zeros_like": (jnp.zeros_like, "to a NumPy dtype"),
    "optax.adam(...).init": (lambda v: optax.adam(1e-3).init([v]), "to a NumPy dtype"),
}
for name, function in works.items():
    assert isinstance(function(variable), jax.Array), name
    print(f"{name}: an array")
for name, (function, message) in fails.items():
    function(variable.value)  # of the value all of them work
    try:
        function(variable)
    except ValueError as error:
        print(f"{name}: ValueError, {str(error).splitlines()[0]}")
        assert message in str(error), name
    else:
        raise AssertionError(f"{name} works now")
END
