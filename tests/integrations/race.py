"""The race in every file here: twenty steps with the defaults of the shelf, against AdamW with its own."""

from collections.abc import Callable

import optax

STEPS = 20

# A training: it takes an optimizer and returns the losses before, between and after its steps.
Training = Callable[[optax.GradientTransformationExtraArgs], list[float]]


def assert_ahead_of_adamw(train: Training, tx: optax.GradientTransformationExtraArgs) -> None:
    """Trains twice from the same start; the last loss has to be below AdamW's, and below the first."""
    ours = train(tx)
    adamw = train(optax.with_extra_args_support(optax.adamw(1e-3)))
    assert len(ours) == len(adamw) == STEPS + 1
    assert ours[0] == adamw[0], "both start at the same loss"
    assert ours[-1] < min(adamw[-1], ours[0]), f"AdamW ends at {adamw[-1]:.4g}, ours at {ours[-1]:.4g}"
