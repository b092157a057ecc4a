"""Fits to measurements with certified answers: NIST's Statistical Reference Datasets, nonlinear regression.

27 problems from two starts each, with 2 to 9 parameters. Numbers and models are in the public domain
(https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

exp, sin, cos = jnp.exp, jnp.sin, jnp.cos


def _enso(x: Any, *b: Any) -> Any:
    wave = lambda period, c, s: c * cos(2 * math.pi * x / period) + s * sin(2 * math.pi * x / period)
    return b[0] + wave(12, b[1], b[2]) + wave(b[3], b[4], b[5]) + wave(b[6], b[7], b[8])


def _gauss(x: Any, *b: Any) -> Any:
    hill = lambda height, at, width: height * exp(-((x - at) ** 2) / width**2)
    return b[0] * exp(-b[1] * x) + hill(*b[2:5]) + hill(*b[5:8])


def _chwirut(x: Any, a: Any, b: Any, c: Any) -> Any:
    return exp(-a * x) / (b + c * x)


def _lanczos(x: Any, *b: Any) -> Any:
    return b[0] * exp(-b[1] * x) + b[2] * exp(-b[3] * x) + b[4] * exp(-b[5] * x)


def _cubic(x: Any, *b: Any) -> Any:
    top = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return top / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


MODELS: dict[str, Callable[..., Any]] = {
    "Bennett5": lambda x, a, b, c: a * (b + x) ** (-1 / c),
    "BoxBOD": lambda x, a, b: a * (1 - exp(-b * x)),
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda x, a, b: a * x**b,
    "ENSO": _enso,
    "Eckerle4": lambda x, a, b, c: a / b * exp(-0.5 * ((x - c) / b) ** 2),
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubic,
    "Kirby2": lambda x, a, b, c, d, e: (a + b * x + c * x**2) / (1 + d * x + e * x**2),
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "MGH09": lambda x, a, b, c, d: a * (x**2 + x * b) / (x**2 + x * c + d),
    "MGH10": lambda x, a, b, c: a * exp(b / (x + c)),
    "MGH17": lambda x, a, b, c, d, e: a + b * exp(-x * d) + c * exp(-x * e),
    "Misra1a": lambda x, a, b: a * (1 - exp(-b * x)),
    "Misra1b": lambda x, a, b: a * (1 - (1 + b * x / 2) ** -2),
    "Misra1c": lambda x, a, b: a * (1 - (1 + 2 * b * x) ** -0.5),
    "Misra1d": lambda x, a, b: a * b * x / (1 + b * x),
    "Nelson": lambda x, a, b, c: a - b * x[:, 0] * exp(-c * x[:, 1]),  # of log(y)
    "Rat42": lambda x, a, b, c: a / (1 + exp(b - c * x)),
    "Rat43": lambda x, a, b, c, d: a / (1 + exp(b - c * x)) ** (1 / d),
    "Roszman1": lambda x, a, b, c, d: a - b * x - jnp.arctan(c / (x - d)) / math.pi,
    "Thurber": _cubic,
}


class Fit(NamedTuple):
    """A fit to measurements.

    Attributes:
      predict_fn: ``predict_fn(params, batch)``, residuals.
      batch: measurements.
      certified: the certified parameters.
      starts: two starts, each a dict with one number per parameter.
      sum_of_squares: the certified sum of squared residuals.
    """

    predict_fn: Callable[[Any, Any], jax.Array]
    batch: dict[str, jax.Array]
    certified: dict[str, jax.Array]
    starts: tuple[dict[str, jax.Array], dict[str, jax.Array]]
    sum_of_squares: float


def load() -> dict[str, Fit]:
    """Returns all problems, by name, in double precision."""
    content = json.loads(Path(__file__).with_name("nist_strd.json").read_text())
    return {name: _fit(name, record) for name, record in content.items()}


def _fit(name: str, record: dict[str, Any]) -> Fit:
    data = jnp.asarray(record["data"], "float64")
    y, x = data[:, 0], data[:, 1:]
    batch = {"x": x if name == "Nelson" else x[:, 0], "y": jnp.log(y) if name == "Nelson" else y}
    named = lambda values: {f"b{i}": jnp.asarray(v, "float64") for i, v in enumerate(values, 1)}
    predict_fn = lambda params, batch: MODELS[name](batch["x"], *params.values()) - batch["y"]
    starts = (named(record["start_1"]), named(record["start_2"]))
    return Fit(predict_fn, batch, named(record["certified"]), starts, record["sum_of_squares"])


def loss_fn(residuals: jax.Array, batch: Any) -> jax.Array:
    """Returns the sum of squares."""
    del batch
    return jnp.sum(residuals**2)


def is_right(found: float, certified: float, digits: int = 6) -> bool:
    """Whether a sum of squares is the certified one to so many digits, or zero to rounding where that is."""
    return found <= max(certified * (1 + 0.5 * 10.0**-digits), 1e-20)
