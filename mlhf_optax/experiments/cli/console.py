"""What all commands share: how an error looks, and the exit status of a stop."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

STOPPED = 130  # the exit status of a program that Ctrl-C ended


@contextlib.contextmanager
def errors_explained(*others: type[Exception]) -> Iterator[None]:
    """Prints an error that a user can mend as one line, and exits with status 2.

    ``others`` are more kinds of errors: a TypeError is a user's only where arguments are checked.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, *others) as error:
        # The number of a system error says nothing to most people.
        text = error.strerror if isinstance(error, OSError) and not error.filename else None
        line = Text(f"error: {text or error}", style="red")
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)
        raise SystemExit(2) from error
