"""Cards of the shipped meta-parameters, from the records in their files, so that no card can go stale."""

from importlib import resources
from pathlib import Path
from typing import Any

import jax

from mlhf_optax import list_pretrained, load_pretrained
from mlhf_optax.learned import get_learned

# What a record does not know: where its data came from, by the task that it names.
_DIGITS = (
    "Optical recognition of handwritten digits (E. Alpaydin, C. Kaynak, 1998), UCI repository, CC BY 4.0; "
    "the copy that scikit-learn ships."
)
_CIFAR10 = (
    "CIFAR-10 (A. Krizhevsky, 2009). Its authors name no licence and ask for a citation of their report."
)
_MNIST = "MNIST (Y. LeCun, C. Cortes, C. Burges), CC BY-SA 3.0."
_SOURCES = {
    "digits": _DIGITS,
    "cifar10": _CIFAR10,
    "mnist": _MNIST,
    "tiny tasks": f"Made-up data, drawn anew for each training, and: {_DIGITS}",
}

# What each learned optimizer is good for, and not.
_LIMITS = {
    "mlhf_general": "Any network, any layer. See [limits](limits.md): losses that are convex and "
    "means, inputs of about 1.",
    "mlhf": "Networks whose layers are of the types it was trained on, data like its own, the first 30 to "
    "100 steps. On other networks it falls behind or goes to chance. Another layer type is an error.",
    "hierarchical": "For comparisons. It diverges on most held-out tasks after some hundred steps.",
}
_RIVAL = "For comparisons: meta-trained for far shorter than in its paper."


def write(folder: Path) -> None:
    """Writes `cards.md`: a table of all sets, and a card for each.

    Args:
      folder: where to; it is made if it is not there.
    """
    folder.mkdir(exist_ok=True)
    names = sorted(list_pretrained(), key=lambda name: (name != "general", name))
    (folder / "cards.md").write_text("\n".join(map(card, names)), encoding="utf-8")


def source(task: str) -> str:
    """Returns where the data of a task come from.

    Args:
      task: the name in a record.

    Returns:
      One sentence with the licence.

    Raises:
      ValueError: for a task of which nothing is known: add its data here.
    """
    for beginning, text in _SOURCES.items():
        if task.startswith(beginning):
            return text
    raise ValueError(f"docs/cards.py knows no source of the data of {task!r}; add it to `_SOURCES`")


def card(name: str) -> str:
    """Returns the card of one set, in Markdown.

    Args:
      name: a key of :func:`mlhf_optax.list_pretrained`.

    Returns:
      A heading and a table.
    """
    loaded = load_pretrained(name)
    record, family = loaded.record, get_learned(loaded.record["optimizer"])
    numbers = sum(leaf.size for leaf in jax.tree.leaves(loaded.meta_params))
    size = len((resources.files("mlhf_optax.pretrained") / f"{name}.safetensors").read_bytes())
    machine = record["machine"]
    rows = {
        "what": f"{family.description} (`{family.name}`)",
        "size": f"{numbers:,} numbers (float32), {size / 1000:.0f} kB on disk with the record",
        "used with": _code(loaded.recommended),
        "meta-trained on": record["trained_on"],
        "data": source(record["task"]),
        "limits": _LIMITS.get(family.name, _RIVAL),
        "licence": "Apache 2.0, as the code",
        "made by": f"`{record['command']}`",
        "at": f"commit `{record['commit'][:12]}`, {record['date']}, {machine['cpu']}, "
        f"cores: {machine['cores']}, {record['seconds'] / 60:.0f} minutes; jax {record['versions']['jax']}",
        "kept": f"the parameters of meta-iteration {record['best_iteration']}",
        "after that": " ".join(
            record[key] for key in ("after_meta_training", "max_update_ratio_reason", "note") if key in record
        ),
    }
    lines = [f"## `{name}`", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join([*lines, ""])


def _code(arguments: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in arguments.items()) or "no arguments"
