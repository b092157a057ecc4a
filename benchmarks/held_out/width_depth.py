"""The same general meta-parameters on networks from narrow to wide and from shallow to deep.

Dense networks with tanh and with ReLU on MNIST, and transformers on Shakespeare, all on the same few
thousand examples: widths with two layers, depths with a width of 64. A network counts with its training loss
after the last step over that of the best of three rates of Adam, chosen for each network anew. A training
diverges where its loss is not finite or ends above that of equal probabilities.

Targets: MLHF diverges on none, and has the lower loss on each.

    python benchmarks/held_out/width_depth.py --data-dir DIR --output runs/width_depth

Deep and wide networks take their time: name fewer with ``--widths``, ``--depths`` and ``--kinds``. What is
finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from tasks import Folders, Transformer, flax_task, load_mnist, load_shakespeare
from untuned_rivals import own_contender

from mlhf_optax import SoftmaxCrossEntropy
from mlhf_optax.experiments import compare, grid_contenders
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.experiments.scripts import (
    Table,
    command_line,
    draw_panels,
    finite_or_none,
    parse_options,
    save_drawing,
    saved,
)
from mlhf_optax.experiments.tables import bold_ratio, format_loss
from mlhf_optax.support.checks import FROM_ONE, check_choice, check_fields, require
from mlhf_optax.tasks import Dataset, Task, image_task
from mlhf_optax.tasks.data import freeze

Kind = Literal["tanh", "relu", "transformer"]
RATES = (3e-4, 1e-3, 3e-3)
_EXAMPLES = 4096
_WIDTH, _DEPTH = 64, 2  # of what does not vary


class _Dense(nn.Module):
    """Layers of one width, started as textbooks say for their activation."""

    width: int
    depth: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        is_relu = self.activation is nn.relu
        start = nn.initializers.he_normal() if is_relu else nn.initializers.lecun_normal()
        x = images.reshape(len(images), -1)
        for _ in range(self.depth):
            x = self.activation(nn.Dense(self.width, kernel_init=start)(x))
        return nn.Dense(10)(x)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    kinds: tuple[Kind, ...] = ("tanh", "relu", "transformer")
    """Kinds of networks."""
    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    """Widths, with two layers; of transformers those up to the greatest width."""
    depths: tuple[int, ...] = (2, 6, 12, 24, 48)
    """Numbers of layers, with a width of 64; of transformers those up to the greatest depth."""
    greatest_width: int = 512
    """Of transformers."""
    greatest_depth: int = 12
    """Of transformers, whose every layer has sixteen tensors to compile for."""
    meta_params: str = "general"
    """Shipped name or path."""
    steps: int = 100
    """Length of every training."""
    seeds: int = 1
    """Trainings of every optimizer."""
    data_dir: Path | None = None
    """Where MNIST and Shakespeare lie; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    output: Path = Path("runs/width_depth")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder."""
    quick: bool = False
    """10 steps of two narrow networks with tanh."""

    def __post_init__(self):
        for name in self.kinds:
            check_choice("kinds", name, get_args(Kind))
        for name in ("widths", "depths"):
            given = getattr(self, name)
            # Attention has four heads.
            step = 4 if name == "widths" else 1
            is_fine = all(one >= 1 and one % step == 0 for one in given)
            require(is_fine, name, f"numbers from 1 on, multiples of {step}", given)
        check_fields(self, FROM_ONE, "steps", "seeds", "greatest_width", "greatest_depth")


def network(kind: str, width: int, depth: int, folders: Folders) -> Task:
    """Returns the task of training one network on the first examples of its data."""
    name = f"{kind}-{width}x{depth}"
    load = functools.partial(_few, load_shakespeare if kind == "transformer" else load_mnist, folders)
    if kind == "transformer":
        model, text = Transformer(width, 65, depth), jnp.zeros((1, 32), jnp.int32)
        return flax_task(name, model, text, SoftmaxCrossEntropy(), load, 64)
    model = _Dense(width, depth, nn.tanh if kind == "tanh" else nn.relu)
    return image_task(name, name, model, (28, 28, 1), load_data=load, num_classes=10, batch_size=128)


def _few(load: Callable[..., Dataset], folders: Folders) -> Dataset:
    data = load(*folders)
    first = lambda part: freeze(**{name: array[:_EXAMPLES].copy() for name, array in part.items()})
    return Dataset({}, first(data.train), first(data.test))


def networks(options: Options) -> list[tuple[str, str, int, int]]:
    """Returns what varies, kind, width and depth of every network."""
    found = []
    for kind in options.kinds:
        limits = (options.greatest_width, options.greatest_depth)
        width, depth = limits if kind == "transformer" else (math.inf, math.inf)
        found += [("width", kind, one, _DEPTH) for one in options.widths if one <= width]
        found += [("depth", kind, _WIDTH, one) for one in options.depths if one <= depth]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints a table, writes ``results.json`` and ``figure.png``."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        small = {"kinds": ("tanh",), "widths": (64, 128), "depths": (), "steps": min(10, options.steps)}
        options = dataclasses.replace(options, **small)
    command, rows, trained = command_line(__file__, arguments), [], {}
    steps = [step for step in (10, 30, 100, 300) if step < options.steps] + [options.steps]
    for varies, kind, width, depth in networks(options):
        task = network(kind, width, depth, (options.data_dir, options.cache_dir))
        # A network may be in both series.
        trained[task.name] = trained.get(task.name) or run(task, options, steps, command)
        if trained[task.name] is None:
            print("Stopped: --resume goes on from here; results and figure come at the end.")
            return
        about = {"varies": varies, "kind": kind, "width": width, "depth": depth}
        rows.append(about | trained[task.name])
        print(f"{task.name}: MLHF {rows[-1]['own'][-1]}, Adam {rows[-1]['adam'][-1]}", flush=True)
    content = with_origin(command, rows=rows, rates=RATES)
    print("", *table(content).markdown(), sep="\n")
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)


def run(task: Task, options: Options, steps: Sequence[int], command: str) -> dict[str, Any] | None:
    """Trains one network with MLHF and with Adam; returns their losses, None if it was stopped."""
    contenders = [own_contender(task, options.meta_params), grid_contenders(["adam"], rates=RATES)[0]]
    with comparison_bar() as on_progress:
        found = compare(
            task,
            contenders,
            steps,
            seeds=range(options.seeds),
            folder=options.output / task.name,
            resume=options.resume,
            timed=False,
            group_size=1,  # side by side, wide networks would need much memory
            command=command,
            on_progress=on_progress,
        )
    if not found.is_complete:
        return None
    own, *adams = found.curves()
    best = min(adams, key=lambda curve: curve.train_loss[-1])
    return {
        "steps": list(steps),
        "num_parameters": found.about["num_parameters"],
        "chance": math.log(65 if task.num_classes is None else 10),
        "own": [finite_or_none(loss) for loss in own.train_loss],
        "adam": [finite_or_none(loss) for loss in best.train_loss],
        "adam_rate": best.setting["learning_rate"],
    }


def _end(losses: Sequence[float | None]) -> float:
    return math.inf if losses[-1] is None else losses[-1]


def table(content: dict[str, Any]) -> Table:
    """Returns a row per network: losses after the last step, their ratio, the rate of the best Adam."""
    rows = [["network", "parameters", "MLHF", "best Adam", "MLHF / best Adam", "its rate"]]
    ratios, diverged = [], []
    for row in {(row["kind"], row["width"], row["depth"]): row for row in content["rows"]}.values():
        own, adam = _end(row["own"]), _end(row["adam"])
        name = f"{row['kind']}, width {row['width']:,}, {row['depth']} layers"
        ratios.append(own / adam if math.isfinite(own) else math.inf)
        diverged += [name] * (not own <= row["chance"])
        cells = [f"{row['num_parameters']:,}", format_loss(own), format_loss(adam), bold_ratio(ratios[-1])]
        rows.append([name, *cells, f"{row['adam_rate']:g}"])
    ahead = sum(ratio < 1 for ratio in ratios)
    note = (
        f"After {content['rows'][0]['steps'][-1]} steps. MLHF diverges on {', '.join(diverged) or 'none'} "
        f"and is ahead on {ahead} of {len(ratios)}; the targets are none and all."
    )
    return Table(rows, note, content)


TABLES = {
    name: lambda folder, name=name: table(*saved(folder, name))
    for name in ("width_depth",)
    if (Path(__file__).parent / "results" / f"{name}.json").exists()  # a table comes with its results
}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the losses after the last step against width and against depth, an axis per kind."""
    panels: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        lines = panels.setdefault(f"{row['kind']}, by {row['varies']}", {})
        for label, losses in (("MLHF", row["own"]), ("best of three Adams", row["adam"])):
            sizes, values = lines.setdefault(label, ([], []))
            sizes.append(row[row["varies"]])
            values.append(losses[-1])
    for axes in draw_panels(figure, panels, xscale="log", yscale="log", ylabel="training loss"):
        axes.set_xlabel("width" if axes.get_title().endswith("width") else "layers")


if __name__ == "__main__":
    main()
