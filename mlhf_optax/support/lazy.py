"""Names of a package that are loaded when they are first asked for."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__getattr__`` and ``__dir__`` for a package's ``__init__``.

    Args:
      namespace: the ``globals()`` of the package.
      modules: the module that each name is in.

    Example:
      >>> namespace = {"__name__": "package"}
      >>> load, names = lazy_names(namespace, {"sqrt": "math"})
      >>> load("sqrt")(4.0), "sqrt" in names()
      (2.0, True)
    """

    def load(name: str) -> Any:
        if name in modules:
            value = namespace[name] = getattr(importlib.import_module(modules[name]), name)
            return value
        raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")

    return load, lambda: sorted({*namespace, *modules})
