#!/usr/bin/env bash
# numpyro 0.22.0 with optax 0.2.8: `SVI` takes any optax optimizer and hands it `value`, so those that watch the loss work
# (`polyak_sgd`, `reduce_on_plateau`), but `optax.lbfgs()` does not: it also needs `grad` and `value_fn`.
#
# The lack is found in the first step alone; `init` of the same object passes. We guessed that an optimizer that optax
# ships either runs or is refused when the `SVI` is made. `optax.lbfgs(linesearch=None)` needs neither, and runs.
#
# Seen with jax 0.10.2, Python 3.11:
#   adam, polyak_sgd, sgd with reduce_on_plateau, lbfgs without line search: run
#   lbfgs: init passes, update: TypeError, ... missing 2 required keyword-only arguments: grad and value_fn
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpyro==0.22.0 optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu venv/bin/python - <<'END'
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta


def model(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def svi(optimizer):
    return SVI(model, AutoDelta(model), optimizer, Trace_ELBO())


y = jnp.array([1.0, 2.0])
runs = {
    "adam": optax.adam(0.1),
    "polyak_sgd": optax.polyak_sgd(),
    "sgd with reduce_on_plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "lbfgs without line search": optax.lbfgs(0.1, linesearch=None),
}
for name, optimizer in runs.items():
    losses = svi(optimizer).run(jax.random.key(0), 5, y, progress_bar=False).losses
    assert jnp.all(jnp.isfinite(losses)), name
    print(f"{name}: runs")
inference = svi(optax.lbfgs())
state = inference.init(jax.random.key(0), y)
print("lbfgs: init passes")
try:
    inference.update(state, y)
except TypeError as error:
    print(f"update: TypeError, {error}")
    assert "'grad' and 'value_fn'" in str(error)
else:
    raise AssertionError("lbfgs works in SVI now")
END
