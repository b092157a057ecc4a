"""Entry point of ``mlhf-optax``; it can be imported, and explains itself, without the extras."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Args:
      arguments: what follows ``mlhf-optax``; those of this process if None.

    Raises:
      SystemExit: always, with status 0 if all went well.

    Example:
      >>> main(["train", "--seeds", "0"])
      Traceback (most recent call last):
      SystemExit: 2
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        from mlhf_optax.cli.commands import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("mlhf_optax"):
            raise
        remedy = "run `pip install 'mlhf-optax[experiments]'`"
        print(f"mlhf-optax needs {error.name}, which is not installed; {remedy}", file=sys.stderr)
        sys.exit(1)
    sys.exit(run(arguments))
