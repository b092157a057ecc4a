"""What comes out of a comparison: one tidy frame, and what it is about."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from mlhf_optax.experiments.origin import write_json
from mlhf_optax.learned import LEARNED

SCHEMA = {
    "optimizer": pl.String,
    "family": pl.String,
    "label": pl.String,
    "setting": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    "epoch": pl.Float64,
    "train_loss": pl.Float64,
    "test_loss": pl.Float64,
    "test_accuracy": pl.Float64,
    "seconds_per_step": pl.Float64,
}
MEASURES = ("train_loss", "test_loss", "test_accuracy")


class Curve(NamedTuple):
    """Means over seeds of one optimizer, at R recorded steps.

    Attributes:
      optimizer: its name, unique in the comparison.
      family: a key of :data:`mlhf_optax.learned.LEARNED` or the name of a family of hand-made ones.
      label: what tables and figures call it.
      setting: its hyperparameters.
      seeds: number of seeds.
      steps: numbers of steps.
      train_loss: in nats, infinite where any seed diverged.
      test_loss: in nats, None where it was not measured.
      test_accuracy: in [0, 1], None where it was not measured.
      seconds_per_step: of a single run; None if it was not measured.
      steps_per_epoch: mini-batches per epoch, None for results that do not know it.
    """

    optimizer: str
    family: str
    label: str
    setting: dict[str, Any]
    seeds: int
    steps: list[int]
    train_loss: list[float]
    test_loss: list[float | None]
    test_accuracy: list[float | None]
    seconds_per_step: float | None
    steps_per_epoch: int | None

    @property
    def is_learned(self) -> bool:
        """Whether it is a learned optimizer."""
        return self.family in LEARNED

    @property
    def short_label(self) -> str:
        """The label without what it is equal to: "MLHF" of "MLHF = what gives it"."""
        return self.label.partition(" = ")[0]

    def loss_at(self, step: int) -> float:
        """Returns the training loss after ``step`` steps."""
        return self.train_loss[self.steps.index(step)]

    @property
    def accuracy(self) -> float:
        """The test accuracy after the last step."""
        last = self.test_accuracy[-1]
        return math.nan if last is None else last


def best_at(curves: Sequence[Curve], step: int) -> Curve:
    """Returns the curve of lowest training loss after ``step`` steps."""
    return min(curves, key=lambda curve: curve.loss_at(step))


def leaders(curves: Sequence[Curve], steps: Sequence[int]) -> list[Curve]:
    """Returns the curves that are best of all at one of the steps or more, in the order of the steps."""
    best = {best_at(curves, step).optimizer: best_at(curves, step) for step in steps}
    return list(best.values())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Results of a comparison.

    Attributes:
      frame: a row for every optimizer, seed and recorded step, with the columns of :data:`SCHEMA`. Losses
        are in nats, infinite where a run diverged; ``setting`` is JSON.
      about: task, sizes, machine, versions, command and date; JSON.
      is_complete: False if the comparison was stopped.

    Example:
      >>> from mlhf_optax.experiments import compare, grid_contenders
      >>> from mlhf_optax.tasks import get_task
      >>> sgd, = grid_contenders(["sgd"], rates=[0.1, 0.01])
      >>> comparison = compare(get_task("digits-mlp"), [sgd], [1, 2], seeds=[0, 1], timed=False)
      >>> comparison.frame.shape, len(comparison.curves())
      ((8, 11), 2)
    """

    frame: pl.DataFrame
    about: dict[str, Any]
    is_complete: bool = True

    def curves(self) -> list[Curve]:
        """Returns the mean over seeds of every optimizer, in the order in which they were trained."""
        keys = ("optimizer", "family", "label", "setting", "seconds_per_step")
        at_step = self.frame.group_by([*keys, "step"], maintain_order=True)
        means = at_step.agg(pl.col(MEASURES).mean(), seeds=pl.col("seed").len())
        lists = means.group_by(keys, maintain_order=True).agg(
            pl.col("seeds").first(), pl.col("step").alias("steps"), *MEASURES
        )
        counts, steps_per_epoch = self.about.get("num_seeds", {}), self.about.get("steps_per_epoch")
        curves = (Curve(**row, steps_per_epoch=steps_per_epoch) for row in lists.iter_rows(named=True))
        return [
            one._replace(setting=json.loads(str(one.setting)), seeds=counts.get(one.optimizer, one.seeds))
            for one in curves
        ]

    def last_losses(self, optimizer: str) -> list[float]:
        """Returns the last training loss of an optimizer, one number per seed."""
        if optimizer in self.about.get("last_losses", {}):
            return self.about["last_losses"][optimizer]
        own = self.frame.filter(pl.col("optimizer") == optimizer)
        return own.filter(pl.col("step") == pl.col("step").max())["train_loss"].to_list()

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``about`` and the frame as JSON; an infinite loss becomes null."""
        write_json(path, self.about | {"optimizers": _entries(self.frame)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Comparison":
        """Reads what :meth:`save` wrote, and files of version 0.1, which hold means over seeds only.

        Raises:
          ValueError: if the file is no comparison.
        """
        content = json.loads(Path(path).read_text())
        if "optimizers" not in content and "results" not in content:
            raise ValueError(f"{path} holds no comparison: it has neither 'optimizers' nor 'results'")
        if "results" in content:
            content = _from_version_0_1(content)
        entries = content.pop("optimizers")
        return cls(frame_of(entries, content.get("steps_per_epoch")), content)


def frame_of(entries: Sequence[Mapping[str, Any]], steps_per_epoch: int | None) -> pl.DataFrame:
    """Returns the tidy frame of entries, each of which holds the curves of one optimizer."""
    rows = []
    for entry in entries:
        about = {name: entry[name] for name in ("optimizer", "family", "label", "seconds_per_step")}
        about["setting"] = json.dumps(entry["setting"])
        for curve in entry["curves"]:
            for index, step in enumerate(entry["steps"]):
                epoch = step / steps_per_epoch if steps_per_epoch else None
                values = {name: curve[name][index] for name in MEASURES if name in curve}
                # JSON has no infinity: a loss that was measured and is null has diverged.
                values |= {key: math.inf for key, x in values.items() if x is None and key.endswith("loss")}
                rows.append(about | values | {"seed": curve["seed"], "step": step, "epoch": epoch})
    return pl.DataFrame(rows, schema=SCHEMA)


def _entries(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Returns what :func:`frame_of` makes the frame of."""
    entries = []
    for own in frame.partition_by("optimizer", maintain_order=True):
        first, curves = own.row(0, named=True), []
        for part in own.partition_by("seed", maintain_order=True):
            measured = [name for name in MEASURES if not part[name].is_null().all()]
            curves.append({"seed": part["seed"][0]} | {name: finite_or_none(part[name]) for name in measured})
        about = {key: first[key] for key in ("optimizer", "family", "label", "seconds_per_step")}
        steps = own["step"].unique(maintain_order=True).to_list()
        entries.append(about | {"setting": json.loads(first["setting"]), "steps": steps, "curves": curves})
    return entries


def finite_or_none(values: Iterable[float | None]) -> list[float | None]:
    """Returns values as JSON has them, which knows neither NaN nor infinity."""
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]


def _from_version_0_1(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a file of version 0.1 in today's form: means over seeds, without the seeds."""
    entries, counts, last = [], {}, {}
    for old in content.pop("results"):
        name, losses = old["name"], old["train_loss"]
        family = name.split()[0]
        counts[name] = old["seeds"]
        if "final_losses" in old:
            last[name] = [math.inf if loss is None else loss for loss in old["final_losses"]]
            content["steps_per_epoch"] = old["steps_per_epoch"]
        accuracies = old.get("test_curve", [None] * (len(losses) - 1) + [old["test_accuracy"]])
        curve = {"seed": None, "train_loss": losses, "test_accuracy": accuracies}
        label = name.replace(family, LEARNED[family].label, 1) if family in LEARNED else name
        about = {"optimizer": name, "family": family, "label": label, "setting": old["hyperparameters"]}
        numbers = {"steps": old["steps"], "seconds_per_step": old["seconds_per_step"]}
        entries.append({**about, **numbers, "curves": [curve]})
    return content | {"optimizers": entries, "num_seeds": counts, "last_losses": last}
