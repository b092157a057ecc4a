"""What a meta-training starts from: settings by name, untrained LSTMs or those of another one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from mlhf_optax.controllers.coordinate_lstm import MetaParams, extend_meta_params, init_meta_params
from mlhf_optax.controllers.lstm_settings import Settings
from mlhf_optax.learned.mlhf import SETTINGS
from mlhf_optax.pretrained import load_pretrained

_FAITHFUL = {
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


class StartingPoint(NamedTuple):
    """What a meta-training starts from.

    Attributes:
      name: of the settings, a name in ``SETTINGS``.
      settings: what the LSTMs see and mean.
      known: meta-parameters to go on from; None for untrained LSTMs.
    """

    name: str
    settings: Settings
    known: MetaParams | None = None

    def meta_params(self, key: jax.Array, types: Sequence[str]) -> MetaParams:
        """Returns meta-parameters for layer types; those that are not known start untrained."""
        if self.known is None:
            return init_meta_params(key, self.settings, layer_types=types)
        return extend_meta_params(key, self.known, types)


def starting_point(
    settings: str | None = None, start: str | None = None, initial: Mapping[str, float] | None = None
) -> StartingPoint:
    """Returns what a meta-training starts from; checks what is asked for, and initialises nothing.

    Args:
      settings: a name in ``SETTINGS``; None for ``"default"``, or those of ``start``.
      start: name or path of meta-parameters to go on from.
      initial: ``initial_damping`` and ``initial_preconditioner``, where they are not those of the settings.

    Returns:
      The starting point.

    Raises:
      FileNotFoundError: if there are no such meta-parameters.
      ValueError: for unknown settings, or if ``start`` has its own, which something here contradicts.

    Example:
      >>> point = starting_point(start="digits")
      >>> point.name, point.meta_params(jax.random.key(0), ["norm_scale"]).layer_types
      ('default', ('dense_bias', 'dense_kernel', 'norm_scale'))
    """
    initial, known = initial or {}, ", ".join(map(repr, SETTINGS))
    if start is None:
        name = settings or "default"
        if name not in SETTINGS:
            raise ValueError(f"`settings` must be one of {known}, got {settings!r}")
        return StartingPoint(name, dataclasses.replace(SETTINGS[name], **initial))
    found = load_pretrained(start)
    made = found.record.get("meta_training")
    own = made.get("settings", "default") if isinstance(made, Mapping) else "default"
    if own not in SETTINGS:
        raise ValueError(f"the record of {start!r} names settings {own!r}; it should be one of {known}")
    contradicting = [*initial, *([] if settings in (None, own) else ["settings"])]
    if contradicting:
        raise ValueError(
            f"`start` {start!r} brings settings of its own, {own!r}; leave out {', '.join(contradicting)}, "
            "or start untrained"
        )
    return StartingPoint(own, found.meta_params.settings, found.meta_params)


def learned_options(settings: str) -> dict[str, Any]:
    """Returns the arguments of :func:`mlhf_optax.meta_training.mlhf_optimizer` that go with a setting."""
    return {"max_update_ratio": 0.25, "step_loss": "relative"} | _FAITHFUL[settings]


__all__ = ["SETTINGS", "StartingPoint", "learned_options", "starting_point"]
