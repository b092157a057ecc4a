"""Learned optimizers by name. Each is one file and one line here; everything else reads this registry."""

import importlib
from collections.abc import Iterator, MutableMapping

from mlhf_optax.learned.family import LearnedFamily as LearnedFamily


class _Registry(MutableMapping[str, LearnedFamily]):
    """Records by name, imported when they are read: most users need one of them, or none."""

    def __init__(self, places: dict[str, str]):
        self._entries: dict[str, str | LearnedFamily] = dict(places)

    def __getitem__(self, name: str) -> LearnedFamily:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, constant = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), constant)
        return entry

    def __setitem__(self, name: str, family: LearnedFamily) -> None:
        self._entries[name] = family

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


LEARNED: MutableMapping[str, LearnedFamily] = _Registry(
    {
        "mlhf": "mlhf_optax.learned.mlhf:MLHF",
        "mlhf_general": "mlhf_optax.learned.mlhf_general:MLHF_GENERAL",
        "adam_rates": "mlhf_optax.learned.adam_rates:ADAM_RATES",
        "rnnprop": "mlhf_optax.learned.literature.rnnprop:RNNPROP",
        "l2l": "mlhf_optax.learned.literature.l2l:L2L_FAMILY",
        "hyperadam": "mlhf_optax.learned.literature.hyperadam:HYPERADAM",
        "variational_hyperadam": "mlhf_optax.learned.literature.variational_hyperadam:VARIATIONAL_HYPERADAM",
        "hierarchical": "mlhf_optax.learned.literature.hierarchical:HIERARCHICAL",
    }
)
"""The learned optimizers there are; ``LEARNED["mine"] = family`` adds one for the running process."""


def get_learned(name: str) -> LearnedFamily:
    """Returns a learned optimizer by name.

    Args:
      name: a key of :data:`LEARNED`.

    Returns:
      Its record.

    Raises:
      ValueError: if there is none of that name; it lists those there are.

    Example:
      >>> get_learned("mlhf").label
      'MLHF'
    """
    if name not in LEARNED:
        raise ValueError(f"there is no learned optimizer {name!r}; there are {', '.join(LEARNED)}")
    return LEARNED[name]
