"""Losses without noise: which optimizer has the smallest error, by time and by steps?

Eight differential equations (two of them also in float32), two regressions on all data, and NIST's fits to
measurements, for ``load_pretrained().optimizer(..., full_batch=True)`` and rivals, in the same process.
Nothing is retuned from problem to problem, but of `gauss_newton`, Adam and Muon the best of several settings
counts, by problem. Packages that are missing are left out: `optimistix`, and `jax-numerical-operators` for
SSBroyden and SOAP.

    python benchmarks/deterministic/deterministic.py --json deterministic.json --figure deterministic.png

Each training has so many seconds of the process, without compiling and without measuring its error. On one
core: ``XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"``. ``--quick``: two
problems, one second each.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import nist
import opponents
from equations import PROBLEMS
from jax import lax

from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.scripts import (
    BenchmarkOptions,
    Table,
    command_line,
    draw_panels,
    finite_or_none,
    parse_options,
    saved,
)
from mlhf_optax.support.checks import POSITIVE, check_choice, check_fields

OURS = "full_batch=True"
FITS = "nist"
FIT_STEPS = 300


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    repeats: int = 1
    """Starts."""
    seconds: float = 10.0
    """Seconds of the process for each training."""
    problems: tuple[str, ...] = (*PROBLEMS, FITS)
    """Problems; "nist" are the fits to measurements."""
    optimizers: tuple[str, ...] = ()
    """Labels of optimizers, without their settings; all by default."""

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, POSITIVE, "seconds")
        for name in self.problems:
            check_choice("problems", name, (*PROBLEMS, FITS))


def train(problem: Any, contender: opponents.Contender, seconds: float) -> dict[str, Any]:
    """Trains for so many seconds; returns steps, seconds and errors at times that grow by a quarter."""
    many = sum(leaf.size for leaf in jax.tree.leaves(contender.params_of(contender.state))) > 1000
    block = 1 if many else 5
    run = jax.jit(lambda state: lax.scan(lambda s, _: (contender.advance(s), None), state, length=block)[0])
    error = jax.jit(lambda state: problem.error(contender.params_of(state)))
    loss = jax.jit(
        lambda state: problem.loss_fn(
            problem.predict_fn(contender.params_of(state), problem.batch), problem.batch
        )
    )
    start = time.perf_counter()
    jax.block_until_ready((run(contender.state), error(contender.state), loss(contender.state)))
    found = {"compile_seconds": time.perf_counter() - start, "steps": [], "seconds": [], "errors": []}
    found |= {"losses": []}
    state, used, steps, due = contender.state, 0.0, 0, 0.0
    while used < seconds:
        start = time.process_time()
        state = jax.block_until_ready(run(state))
        used, steps = used + time.process_time() - start, steps + block
        if used >= due or used >= seconds:
            due = 1.25 * used
            found["steps"].append(steps)
            found["seconds"].append(round(used, 5))
            found["errors"].append(finite_or_none(float(error(state))))
            found["losses"].append(finite_or_none(float(loss(state))))
    return found


def measure(name: str, options: Options) -> Iterator[dict[str, Any]]:
    """Yields a row per optimizer and start."""
    problem, seconds = PROBLEMS[name](), options.seconds
    for label, make in opponents.makers(lambda step: max(1, int(seconds / step))).items():
        if options.optimizers and label.split(":")[0] not in options.optimizers:
            continue
        for start in range(options.repeats):
            contender = make(problem, problem.init(jax.random.key(start)))
            if contender is None:
                continue
            row = {"problem": name, "optimizer": label, "start": start}
            try:
                row |= train(problem, contender, seconds)
            except jax.errors.JaxRuntimeError as error:  # want of memory
                row |= {"failed": str(error)[:200], "steps": [], "seconds": [], "errors": [], "losses": []}
            yield row


def fits(options: Options) -> Iterator[dict[str, Any]]:
    """Yields a row per optimizer: how many of the fits to measurements have the certified sum of squares."""
    wanted = (OURS, "optimistix LM", "hessian_free", "gauss_newton: 0.1", "SSBroyden", "L-BFGS")
    for label, make in opponents.makers(lambda step: FIT_STEPS).items():
        if label not in wanted or (options.optimizers and label.split(":")[0] not in options.optimizers):
            continue
        right, problems, tried = [], nist.load(), 0
        for name, fit in list(problems.items())[: 2 if options.quick else None]:
            for number, start in enumerate(fit.starts, 1):
                problem = FitProblem(fit.predict_fn, fit.batch)
                contender = make(problem, start)
                if contender is None:  # a package that is missing
                    continue
                tried += 1
                advance = contender.advance
                state = jax.jit(
                    lambda s, advance=advance: lax.scan(lambda s, _: (advance(s), None), s, length=FIT_STEPS)
                )(contender.state)[0]
                outputs = fit.predict_fn(contender.params_of(state), fit.batch)
                found = float(nist.loss_fn(outputs, fit.batch))
                if nist.is_right(found, fit.sum_of_squares):
                    right.append(f"{name} {number}")
        if tried:
            yield {"problem": FITS, "optimizer": label, "right": right, "of": 2 * len(problems)}


@dataclasses.dataclass(frozen=True)
class FitProblem:
    """A fit as the rivals take problems."""

    predict_fn: Any
    batch: Any
    loss_fn: Any = nist.loss_fn


def _of(rows: Sequence[dict[str, Any]], problem: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of a problem by optimizer, of several settings those of the best at the end."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["problem"] == problem:
            by_label.setdefault(row["optimizer"], []).append(row)
    best: dict[str, list[dict[str, Any]]] = {}
    for label, own in by_label.items():
        name = label.split(":")[0]
        if name not in best or _end(own) < _end(best[name]):
            best[name] = own
    return best


def _end(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the median over starts of the error at the end."""
    ends = [row["errors"][-1] if row.get("errors") else None for row in rows]
    return statistics.median(math.inf if end is None else end for end in ends) if ends else math.inf


def table(content: dict[str, Any]) -> Table:
    """Returns a row per problem with the errors after the time there was."""
    rows = content["rows"]
    labels = list(dict.fromkeys(row["optimizer"].split(":")[0] for row in rows))
    lines = [["", *labels]]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        if problem == FITS:
            counts = {row["optimizer"].split(":")[0]: row for row in rows if row["problem"] == FITS}
            cells = [f"{len(counts[label]['right'])}" if label in counts else "" for label in labels]
            lines.append([f"NIST's fits, right of {next(iter(counts.values()))['of']}", *cells])
            continue
        ends = {label: _end(own) for label, own in _of(rows, problem).items()}
        least = min(ends.values())
        cell = lambda end, least=least: f"**{end:.1e}**" if end == least else f"{end:.1e}"
        written = {label: cell(end) for label, end in ends.items() if math.isfinite(end)}
        lines.append([problem, *(written.get(label, "") for label in labels)])
    starts = 1 + max((row.get("start", 0) for row in rows), default=0)
    note = (
        "Relative L2 error, for `diabetes` and `teacher` the loss, after "
        f"{content['seconds']:g} s without compiling, median of {starts} "
        f"start{'s' * (starts > 1)}; NIST: six digits within {FIT_STEPS} steps. Best of "
        f"{len(opponents.DAMPINGS)} dampings of `gauss_newton` and {len(opponents.RATES)} rates of Adam "
        "by problem; Adam and Muon with a cosine."
    )
    return Table(lines, note, content)


TABLES = {"deterministic": lambda folder: table(*saved(folder, "deterministic"))}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the error against seconds and against steps, a panel each per problem."""
    panels: dict[str, dict[str, Any]] = {}
    for problem in dict.fromkeys(row["problem"] for row in content["rows"]):
        if problem == FITS:
            continue
        own = {label: of[0] for label, of in _of(content["rows"], problem).items() if of[0]["errors"]}
        for unit in ("seconds", "steps"):
            panels[f"{problem}, by {unit}"] = {
                label: (row[unit], row["errors"]) for label, row in own.items()
            }
    for axes in draw_panels(figure, panels, yscale="log", xscale="log"):
        axes.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        problems = tuple(name for name in options.problems if name in ("heat", FITS))
        options = dataclasses.replace(options, seconds=min(1.0, options.seconds), problems=problems)
    rows: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        for name in options.problems:
            for row in fits(options) if name == FITS else measure(name, options):
                rows.append(row)
                if options.json:  # what was measured is kept if the rest is not waited for
                    so_far = {"rows": rows, "seconds": options.seconds}
                    write_json(options.json, with_origin(command_line(__file__, arguments), **so_far))
                end = f"{len(row['right'])} of {row['of']}" if name == FITS else f"{_end([row]):.1e}"
                print(f"{name}, {row['optimizer']}: {end}", flush=True)
    options.report(command_line(__file__, arguments), table, draw, rows=rows, seconds=options.seconds)


if __name__ == "__main__":
    main()
