"""``python -m mlhf_optax`` is the command line."""

from mlhf_optax.cli import main

if __name__ == "__main__":
    main()
