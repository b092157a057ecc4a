"""``python -m mlhf_optax`` is the command line."""

from mlhf_optax.experiments.cli import main

if __name__ == "__main__":
    main()
