"""Entry point of ``mlhf-optax``; it can be imported, and explains itself, without the extras."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line with what follows ``mlhf-optax`` (None: of this process) and exits.

    Example:
      >>> main(["train", "--seeds", "0"])
      Traceback (most recent call last):
      SystemExit: 2
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        from mlhf_optax.experiments.cli.commands import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("mlhf_optax"):
            raise
        package = error.name.partition(".")[0]
        remedy = "run `pip install 'mlhf-optax[experiments]'`"
        print(f"mlhf-optax needs {package}, which is not installed; {remedy}", file=sys.stderr)
        sys.exit(1)
    sys.exit(run(arguments))
