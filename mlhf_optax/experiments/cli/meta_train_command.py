"""``mlhf-optax meta-train`` and ``mlhf-optax meta-train-long``."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from mlhf_optax import meta_training as mt
from mlhf_optax.experiments.cli.console import STOPPED, errors_explained
from mlhf_optax.experiments.cli.options import DEFAULT_GENERAL, DEFAULT_OPTIMIZER, TaskOptions, joined
from mlhf_optax.experiments.meta_train import meta_train_task, shown_losses
from mlhf_optax.experiments.meta_train_long import RECIPE, meta_train_on_tiny_tasks
from mlhf_optax.experiments.progress import progress_bar
from mlhf_optax.learned import LEARNED
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.support.checks import SEED, check_fields, require
from mlhf_optax.tasks import TASKS, get_task, tiny_tasks, tiny_validation_tasks

OptimizerName = Annotated[str, arg(metavar="|".join(LEARNED))]

_SCHEDULE = mt.Schedule(iterations=1000)
_LONG_SCHEDULE = mt.Schedule(iterations=2000, validate_every=250)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MetaTraining:
    """What both kinds of meta-training need."""

    optimizer: OptimizerName
    """The learned optimizer; each has options of its own, which --help shows below."""
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for checkpoints, metrics and the result; by default runs/TASK."""
    schedule: OmitArgPrefixes[mt.Schedule]
    validation_steps: tuple[int, ...] = (10, 30, 100, 300)
    """Steps after which a validation takes the loss of its trainings."""
    start: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Meta-parameters to go on from, which may bring settings of their own."""
    seed: int = 0
    """Decides everything that is random."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    optimizer_options: Any
    # An instance of the learned optimizer's own class of options, whose fields become options beside these.

    def __post_init__(self):
        steps = self.validation_steps
        is_ascending = steps[0] >= 1 and steps == tuple(sorted(set(steps)))
        require(is_ascending, "validation_steps", "ascending numbers, like 10,30,100", joined(steps))
        check_fields(self, SEED, "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTrain(_MetaTraining, TaskOptions):
    """Meta-train a learned optimizer on the part of a task's data that `mlhf-optax train` never uses.

    It can be stopped at any time and continued with --resume. The result is a file that
    --meta-params of `mlhf-optax train` takes.
    """

    optimizer: OptimizerName = DEFAULT_OPTIMIZER
    schedule: OmitArgPrefixes[mt.Schedule] = _SCHEDULE
    config: OmitArgPrefixes[mt.MetaTrainingConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTrainLong(_MetaTraining):
    """Meta-train a learned optimizer over long horizons, on tiny tasks of many kinds.

    Needs CIFAR-10, of which only the part for meta-training is used. It can be stopped at any time and
    continued with --resume. The result is a file that --meta-params of `mlhf-optax train` takes.
    """

    optimizer: OptimizerName = DEFAULT_GENERAL
    output: Annotated[Path, arg(metavar="DIR")] = Path("runs/long")
    """Folder for checkpoints, metrics and the result."""
    data_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where CIFAR-10 lies; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    only: tuple[str, ...] = ()
    """Names of the tiny tasks to train on, separated by commas; all by default."""
    devices: int = 1
    """Devices over which the pairs of a task are spread; must divide their number."""
    schedule: OmitArgPrefixes[mt.Schedule] = _LONG_SCHEDULE
    validation_steps: tuple[int, ...] = (10, 30, 100, 300, 1000)
    config: OmitArgPrefixes[mt.LongHorizonConfig] = RECIPE


def meta_train(options: MetaTrain, command: str) -> int:
    """Meta-trains on a task, says where the result is and how to use it; returns the exit status."""
    with errors_explained(TypeError):
        task = get_task(options.task, **options.task_options("meta_batch_size"))
    train = functools.partial(meta_train_task, task)
    return _meta_train(options, train, options.output or Path("runs") / options.task, options.task, command)


def meta_train_long(options: MetaTrainLong, command: str) -> int:
    """Meta-trains over long horizons; says and returns what :func:`meta_train` does."""
    with errors_explained(TypeError):
        known = tiny_tasks(options.data_dir)
        names = [task.name for task in known]
        unknown = sorted(set(options.only) - set(names))
        require(not unknown, "only", f"among {', '.join(names)}", ", ".join(unknown))
        validation = tiny_validation_tasks(options.data_dir)
        mesh = _mesh(options.devices)
    chosen = [task for task in known if task.name in (options.only or names)]
    train = functools.partial(meta_train_on_tiny_tasks, chosen, validation, mesh=mesh)
    return _meta_train(options, train, options.output, next(iter(TASKS)), command)


def _meta_train(
    options: MetaTrain | MetaTrainLong, train: Callable[..., Path], output: Path, task: str, command: str
) -> int:
    """Calls ``train`` with what both meta-trainings take, and shows its progress and its end.

    ``task`` is one to try the result on. Returns the exit status.
    """
    console = Console(highlight=False, soft_wrap=True)
    schedule = options.schedule

    def on_progress(iteration: int, metrics: dict[str, float]) -> None:
        losses = "  ".join(f"{name} {value:.3g}" for name, value in shown_losses(metrics).items())
        update(completed=iteration, total=schedule.last, loss=losses.replace("_loss", " loss"))

    try:
        with progress_bar("meta-training") as update, errors_explained():
            path = train(
                LEARNED[options.optimizer],
                options.optimizer_options,
                output,
                schedule,
                dataclasses.replace(options.config, decay_iterations=schedule.iterations),
                start=options.start,
                validation_steps=options.validation_steps,
                seed=options.seed,
                resume=options.resume,
                command=command,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        again = f"the same command with --resume goes on from the last checkpoint in {output}"
        console.print(f"Stopped: {again}.", markup=False)
        return STOPPED
    best = load_pretrained(path).record["best_iteration"]
    where = f"iteration {best} of {schedule.last}, in {path}"
    console.print(f"best meta-parameters by validation: {where}", markup=False)
    use = f"--optimizers {options.optimizer},adam --meta-params {path}"
    console.print(f"try them: mlhf-optax train {task} {use}", markup=False)
    return 0


def _mesh(count: int) -> jax.sharding.Mesh | None:
    """Returns a mesh of so many devices, with axes of which JAX decides what lies where; None for one."""
    available = len(jax.devices())
    if not 1 <= count <= available:
        raise ValueError(f"`devices` must lie between 1 and {available}, the number there is, got {count}")
    return None if count == 1 else jax.sharding.Mesh(jax.devices()[:count], ("pairs",))
