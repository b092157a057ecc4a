"""The command ``mlhf-optax meta-train``: its options, and what can be wrong with them."""

import enum
import math
from pathlib import Path
from typing import Annotated

from mlhf_optax.comparison.arguments import (
    BatchSize,
    Channels,
    CurvatureBatchSize,
    DataDir,
    Hidden,
    TaskName,
    errors_explained,
    given,
    option,
    parse_channels,
    parse_part,
    parse_steps,
    parse_widths,
)
from mlhf_optax.comparison.meta_train_start import SETTINGS, starting_point
from mlhf_optax.tasks import check_batch_size, get_task

StartingSettings = enum.StrEnum("StartingSettings", list(SETTINGS))


def meta_train(
    task: TaskName = "digits-mlp",
    output: Annotated[
        Path | None,
        option("Folder for checkpoints, metrics and the result, by default runs/TASK.", metavar="DIR"),
    ] = None,
    iterations: Annotated[int, option("Meta-iterations, each one unroll of every task.", min=1)] = 1000,
    stop_after: Annotated[
        int | None,
        option("Write the result after so many of them; --resume with a larger number goes on.", min=1),
    ] = None,
    num_tasks: Annotated[int, option("Networks in training side by side.", min=1)] = 8,
    unroll_length: Annotated[int, option("Steps of an unroll.", min=1)] = 10,
    batch_size: BatchSize = None,
    data_dir: DataDir = None,
    channels: Channels = None,
    hidden: Hidden = None,
    meta_learning_rate: Annotated[
        float, option("Peak learning rate of the meta-optimizer.", metavar="X")
    ] = 1e-2,
    learning_rate: Annotated[
        float,
        option(
            "Learning rate of the networks in training, kept in the record. Below 1 directions that the "
            "curvature of one mini-batch gets wrong do less harm, which no damping can do as well.",
            metavar="X",
        ),
    ] = 1.0,
    seed: Annotated[int, option("Decides everything that is random.")] = 0,
    resume: Annotated[
        bool, option("Go on from the last checkpoint in the folder.", "--resume", metavar="")
    ] = False,
    checkpoint_every: Annotated[int, option("Meta-iterations between checkpoints.", min=1)] = 50,
    validate_every: Annotated[int, option("Meta-iterations between validations.", min=1)] = 100,
    validation_steps: Annotated[
        str,
        option(
            "Steps after which a validation takes the loss of its three trainings; up to 300 it costs as "
            "much as 4 meta-iterations with 8 networks, or 30 with one.",
            metavar="N,N",
        ),
    ] = "10,30,100,300",
    start: Annotated[
        str | None,
        option(
            "Meta-parameters to go on from, which bring their settings; layer types that they do not know "
            "start untrained.",
            metavar="NAME|FILE",
        ),
    ] = None,
    settings: Annotated[
        StartingSettings | None,
        option(
            "What the LSTMs see and mean: ours, the default, ours with damping relative to the size of the "
            "parameters, which carries over to wider networks, the paper's or its authors' code's.",
            metavar="|".join(StartingSettings),
        ),
    ] = None,
    initial_damping: Annotated[
        float | None,
        option(
            "Damping of untrained LSTMs, with the default settings in units of the gradient's root mean "
            "square and 30, with 'relative' also over that of the parameters and 10. It has to train the "
            "task before any meta-training: raise it where the inner loss stays at chance.",
            metavar="X",
        ),
    ] = None,
    initial_preconditioner: Annotated[
        float | None, option("The same for the preconditioner.", metavar="X")
    ] = None,
    keep_probability: Annotated[
        float,
        option("Chance that a healthy inner training goes on after an unroll.", min=0, max=1, metavar="X"),
    ] = 0.95,
    age_scale: Annotated[
        float | None,
        option(
            "Instead, let it go on with chance (age + X) / (age + X + T), so that the LSTMs see ages of all "
            "orders of magnitude, and trainings of thousands of steps.",
            metavar="X",
        ),
    ] = None,
    replay_opt_state: Annotated[
        bool, option("Replay a training with its LSTM states.", "--replay-opt-state", metavar="")
    ] = False,
    same_batch_weight: Annotated[
        float,
        option(
            "Weight in l_s of the gain on the step's own mini-batch; 0 counts the gain on the next one "
            "alone, which is right where mini-batches are far from telling the whole loss.",
            min=0,
            metavar="X",
        ),
    ] = 1.0,
    curvature_batch_size: CurvatureBatchSize = None,
) -> None:
    """Meta-train MLHF on a task, on the part of its data that `mlhf-optax train` never uses.

    It can be stopped at any time and continued with `--resume`. The result is a file for
    `mlhf-optax train --meta-params FILE`.
    """
    from mlhf_optax.comparison.meta_train_command import run_meta_training

    with errors_explained():
        options = given(
            data_dir=data_dir, channels=parse_channels(channels), hidden=parse_widths(hidden, "hidden")
        )
        # Loads the data, so that what is wrong with them is said at once.
        check_batch_size(get_task(task, **options, **given(meta_batch_size=batch_size)), "meta_train")
        initial = given(initial_damping=initial_damping, initial_preconditioner=initial_preconditioner)
        starting_point(settings, start, initial)
        part, steps = parse_part(curvature_batch_size), parse_steps(validation_steps)
        positive = given(
            learning_rate=learning_rate, meta_learning_rate=meta_learning_rate, age_scale=age_scale
        )
        for name, number in positive.items():
            if not 0 < number < math.inf:
                raise ValueError(f"`--{name.replace('_', '-')}` must be a positive number, got {number}")
    run_meta_training(
        task=task,
        task_options=options,
        output=Path("runs") / task if output is None else output,
        iterations=iterations,
        num_tasks=num_tasks,
        unroll_length=unroll_length,
        batch_size=batch_size,
        meta_learning_rate=meta_learning_rate,
        learning_rate=learning_rate,
        seed=seed,
        resume=resume,
        checkpoint_every=checkpoint_every,
        validate_every=validate_every,
        validation_steps=steps,
        settings=settings,
        start=start,
        initial=initial,
        keep_probability=keep_probability,
        age_scale=age_scale,
        replay_opt_state=replay_opt_state,
        same_batch_weight=same_batch_weight,
        curvature_batch_size=part,
        stop_after=stop_after,
    )


__all__ = ["meta_train"]
