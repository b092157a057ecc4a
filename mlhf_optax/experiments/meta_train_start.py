"""What a meta-training starts from: settings by name, untrained LSTMs or those of another one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mlhf_optax.meta_params import (
    AUTHORS_SETTINGS,
    PAPER_SETTINGS,
    MetaParams,
    Settings,
    extend_meta_params,
    init_meta_params,
)
from mlhf_optax.pretrained import load_pretrained

SETTINGS = {
    "default": Settings(),
    # Keeps its meaning across widths; starts where convolutional networks neither jump nor crawl.
    "relative": Settings(parameter_power=1.0, initial_damping=10.0, initial_preconditioner=10.0),
    "paper": PAPER_SETTINGS,
    "authors": AUTHORS_SETTINGS,
}
"""What the LSTMs see and mean, by name."""

FAITHFUL = {
    "default": {},
    "relative": {},
    "paper": {
        "max_update_ratio": None,
        "update_noise": 0.0,
        "step_loss": "difference",
        "damping_loss_scale": 1.0,
    },
    "authors": {"step_loss": "difference"},
}
"""Arguments of the optimizer in meta-training that go with them."""


def starting_point(
    key: jax.Array,
    types: Sequence[str],
    settings: str | None = None,
    start: str | None = None,
    starts: Mapping[str, float] | None = None,
) -> tuple[str, MetaParams]:
    """Returns what a meta-training starts from.

    Args:
      key: random key.
      types: layer types of the network.
      settings: a name in ``SETTINGS``; None for ``"default"``, or those of ``start``.
      start: name or path of meta-parameters to go on from.
      starts: ``initial_damping`` and ``initial_preconditioner``, where they are not those of the settings.

    Returns:
      The name of the settings, and the meta-parameters.

    Raises:
      FileNotFoundError: if there are no such meta-parameters.
      ValueError: for unknown settings, or if ``start`` has its own, which something here contradicts.

    Example:
      >>> name, meta_params = starting_point(jax.random.key(0), ["norm_scale"], start="digits")
      >>> name, meta_params.layer_types
      ('default', ('dense_bias', 'dense_kernel', 'norm_scale'))
    """
    if start is None:
        settings = settings or "default"
        if settings not in SETTINGS:
            raise ValueError(f"`settings` must be one of {', '.join(map(repr, SETTINGS))}, got {settings!r}")
        chosen = dataclasses.replace(SETTINGS[settings], **(starts or {}))
        return settings, init_meta_params(key, chosen, layer_types=types)
    found = load_pretrained(start)
    made = found.record.get("meta_training")
    own = made.get("settings", "default") if isinstance(made, Mapping) else "default"
    if own not in SETTINGS:
        known = ", ".join(map(repr, SETTINGS))
        raise ValueError(f"the record of {start!r} names settings {own!r}; it should be one of {known}")
    if starts or settings not in (None, own):
        asked = ", ".join([*(starts or {}), *(["settings"] if settings not in (None, own) else [])])
        raise ValueError(
            f"`start` {start!r} brings settings of its own, {own!r}; leave out {asked}, or start untrained"
        )
    return own, extend_meta_params(key, found.meta_params, types)


def learned_options(settings: str) -> dict[str, Any]:
    """Returns the arguments of :func:`mlhf_optax.meta_training.mlhf_optimizer` that go with a setting."""
    return {"max_update_ratio": 0.25, "step_loss": "relative"} | FAITHFUL[settings]


__all__ = ["FAITHFUL", "SETTINGS", "learned_options", "starting_point"]
