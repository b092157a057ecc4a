"""Settings of a meta-training, checked when they are made."""

import dataclasses
import math
from typing import Literal

from mlhf_optax.meta_training.unrolled.replay import Sampling


@dataclasses.dataclass(frozen=True)
class MetaTrainingConfig:
    """How inner trainings are run, kept, replaced and learned from.

    Args:
      num_tasks: inner trainings side by side.
      unroll_length: steps T of an unroll (paper: 10).
      task_axis: ``"vmap"`` runs the trainings at once, ``"sequential"`` one after another, which
        is faster for convolutions on a CPU; ``"auto"`` is sequential on a CPU for models with
        parameters of rank 4 or more.
      meta_learning_rate: peak rate of the meta-optimizer, Adam.
      decay_iterations: the rate falls along a cosine to ``final_rate_share`` of its peak over so many
        meta-iterations; None keeps it constant (paper).
      final_rate_share: share of the peak rate that is left at the end.
      meta_gradient_clip: bound on the global norm of the meta-gradient; None for none (paper).
      meta_weight_decay: L2 on all meta-parameters (authors' code: 2e-7, paper: 0).
      keep_probability: chance that a healthy inner training goes on after an unroll (authors: 0.3
        for the convnet, 0.5 for the ResNet). Not used where ``age_scale`` is given.
      age_scale: steps a0; a healthy training of age a then goes on with chance ``(a + a0) / (a + a0 + T)``,
        so few end late and ages spread evenly in ``log(a + a0)``, as far as ``max_age``. A constant
        chance knows one order of magnitude of ages only: at 0.5 and T = 10 one training in a thousand
        gets older than 100 steps.
      fresh_probability: chance that one which does not go on is replaced by a fresh network rather
        than by a replayed state.
      store_probability: chance that a healthy state is stored for replay after an unroll; one that has
        not got anywhere yet never is.
      replay_capacity: states kept for replay (authors: 200).
      replay_sampling: ``"uniform"``, or ``"rank"`` by the priority ``l_s`` of the last unroll.
      replay_opt_state: replay optimizer states too, instead of starting them anew (paper: anew).
      max_age: steps after which an inner training is replaced; None for never.
      horizons: a curriculum of ``max_age``, each for ``horizon_iterations`` meta-iterations and the last for
        all that follow; none by default.
      horizon_iterations: meta-iterations of every horizon.
      random_scaling: random factors of all parameters, between ``exp(-r)`` and ``exp(r)``; see
        :func:`mlhf_optax.meta_training.with_tricks`.
      companion_size: coordinates of a convex function that is trained beside every network; see there.
      divergence_ratio: an inner training whose loss exceeds this multiple of its first loss has diverged.
      stuck_patience: steps after which a training must have got anywhere.
      stuck_ratio: one whose loss is still above this share of its first loss by then is stuck.
      vanishing_ratio: one whose gradient norm fell below this share of its first value, while its
        loss is still above a tenth of its first one, is stuck too.

    Raises:
      ValueError: for a value out of range, naming it.

    Example:
      >>> MetaTrainingConfig(num_tasks=2).unroll_length
      10
    """

    num_tasks: int = 8
    unroll_length: int = 10
    task_axis: Literal["auto", "vmap", "sequential"] = "auto"
    meta_learning_rate: float = 1e-2
    decay_iterations: int | None = None
    final_rate_share: float = 0.01
    meta_gradient_clip: float | None = 1.0
    meta_weight_decay: float = 0.0
    keep_probability: float = 0.9
    age_scale: float | None = None
    fresh_probability: float = 0.5
    store_probability: float = 0.3
    replay_capacity: int = 200
    replay_sampling: Sampling = "uniform"
    replay_opt_state: bool = False
    max_age: int | None = None
    horizons: tuple[int, ...] = ()
    horizon_iterations: int = 1000
    random_scaling: float = 0.0
    companion_size: int = 0
    divergence_ratio: float = 3.0
    stuck_patience: int = 50
    stuck_ratio: float = 0.97
    vanishing_ratio: float = 1e-5

    def __post_init__(self):
        for name in ("num_tasks", "unroll_length", "replay_capacity", "stuck_patience", "horizon_iterations"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("keep_probability", "fresh_probability", "store_probability", "final_rate_share"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        for name in ("meta_learning_rate", "divergence_ratio", "stuck_ratio"):
            self._require(name, getattr(self, name) > 0.0, "positive")
        for name in ("meta_gradient_clip", "decay_iterations", "max_age", "age_scale"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "positive or None")
        for name in ("random_scaling", "companion_size"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number >= 0")
        is_rising = self.horizons == tuple(sorted({h for h in self.horizons if h >= 1}))
        self._require("horizons", is_rising, "ascending numbers of steps")
        self._require("max_age", self.max_age is None or not self.horizons, "None beside `horizons`")
        self._require(
            "task_axis", self.task_axis in ("auto", "vmap", "sequential"), "auto, vmap or sequential"
        )
        self._require("replay_sampling", self.replay_sampling in ("uniform", "rank"), "uniform or rank")
        self._require("replay_capacity", self.replay_capacity >= self.num_tasks, "at least num_tasks")

    def _require(self, name: str, is_met: bool, wanted: str) -> None:
        if not is_met:
            raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)!r}")
