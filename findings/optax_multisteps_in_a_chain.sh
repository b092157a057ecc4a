#!/usr/bin/env bash
# optax 0.2.8: `MultiSteps(tx, k).gradient_transformation()` hands extra arguments on to `tx`, until it stands in a chain.
#
# `MultiSteps.update` takes extra arguments, but `gradient_transformation()` puts it into a plain
# `GradientTransformation`. `chain` sees by that type that no extra arguments are taken, and leaves them out. So
# the same accumulation gets `value=3.0` alone and nothing in `optax.chain(...)`, without an error. Around the
# object `MultiSteps` itself a chain does the same. We guessed that a chain of one is what it contains.
#
# Seen with jax 0.10.2, Python 3.11:
#   alone: value is passed on
#   gradient_transformation() in a chain: nothing is passed on
#   MultiSteps in a chain: nothing is passed on
#   made a GradientTransformationExtraArgs by hand, in a chain: value is passed on
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu venv/bin/python - <<'END'
import jax.numpy as jnp
import optax

given = []


def update(updates, state, params=None, **extra):
    given.append(sorted(extra))
    return updates, state


asks = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
params = {"w": jnp.ones(2)}


def reaches(name, tx):
    given.clear()
    tx.update(params, tx.init(params), params, value=3.0)
    found = {name for names in given for name in names}
    print(f"{name}: {' and '.join(found) or 'nothing'} is passed on")
    return found


steps = optax.MultiSteps(asks, every_k_schedule=2)
plain = steps.gradient_transformation()
remade = optax.GradientTransformationExtraArgs(plain.init, plain.update)
assert reaches("alone", plain) == {"value"}
assert reaches("gradient_transformation() in a chain", optax.chain(plain)) == set()
assert reaches("MultiSteps in a chain", optax.chain(steps)) == set()
assert reaches("made a GradientTransformationExtraArgs by hand, in a chain", optax.chain(remade)) == {"value"}
END
