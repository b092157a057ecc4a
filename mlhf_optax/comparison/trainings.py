"""Many trainings of one task that advance together: E settings of an optimizer times S seeds.

For a seed, the initial parameters, the order of the mini-batches and their augmentation are the same
whatever the optimizer, so that differences between curves are differences between optimizers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.comparison.feeds import draw, make_feed
from mlhf_optax.comparison.inner_training import (
    Hyperparameters,
    MakeOptimizer,
    accuracy,
    augmentation_key,
    evaluation_state,
    init_training,
    mean_loss,
    training_step,
)
from mlhf_optax.meta_training import runs_in_sequence
from mlhf_optax.tasks import Examples, Task, in_memory, num_examples

_EVALUATION_CHUNK = 2048  # examples a forward pass, to bound the memory of an evaluation


class _Ready(NamedTuple):
    """A network that is ready to be evaluated."""

    params: Any
    model_state: Any


class Program:
    """The compiled functions of E x S trainings; made once, it serves any settings and seeds.

    Trainings run side by side under ``vmap``, or one after the other where that is faster
    (:func:`mlhf_optax.meta_training.runs_in_sequence`). Then they are apart also for the compiler, since
    XLA on CPUs is slow at the derivatives of convolutions within its loops.

    Args:
      task: what to train; mini-batches have its ``batch_size``.
      make_optimizer: returns the optimizer for given hyperparameters; its ``update`` gets ``batch=``.
      sequential: run trainings one after the other; where that is faster if None.

    Example:
      >>> import optax
      >>> from mlhf_optax.tasks import get_task
      >>> program = Program(get_task("digits-mlp"), optax.adam)
      >>> trainings = Trainings(program, {"learning_rate": np.array([1e-2, 1e-3])}, seeds=[0], num_steps=3)
      >>> trainings.step()
      >>> trainings.train_loss().shape
      (2, 1)
    """

    def __init__(self, task: Task, make_optimizer: MakeOptimizer, sequential: bool | None = None):
        self.task = task
        self.is_sequential = runs_in_sequence(task) if sequential is None else sequential

        def init(setting, seed, _):
            return init_training(task, make_optimizer, setting[1], jax.random.key(seed["seed"]))

        # The data are arguments, not constants of the compiled program, which would copy them.
        def step(setting, seed, state, examples, number):
            key = augmentation_key(jax.random.key(seed["seed"]), number)
            batch = task.augment_fn(key, draw(examples, seed["fed"]))
            return training_step(task, make_optimizer, setting[1], batch, state)

        def ready(setting, seed, state, examples):
            return _Ready(state.params, evaluation_state(task, state.params, examples))

        self.init = self.over_runs(init)
        self.step = self.over_runs(step, donate=True)
        self.ready = self.over_runs(ready)
        self.loss = self.over_runs(lambda _, __, run, x: mean_loss(task, run.params, x, run.model_state))
        self.accuracy = self.over_runs(lambda _, __, run, x: accuracy(task, run.params, x, run.model_state))

    def over_runs(self, one: Callable, donate: bool = False, jit: bool = True) -> Callable:
        """Maps ``one(setting, per_seed, run, *shared)`` over settings (E), per_seed (S) and runs (E, S).

        Args:
          one: works on a single training; a setting is its number and its hyperparameters.
          donate: the runs may be overwritten.
          jit: compile ``one``; only sequential programs can do without.

        Returns:
          The function of all.
        """
        donated = 2 if donate else ()
        if self.is_sequential:
            compiled = jax.jit(one, donate_argnums=donated) if jit else one
            pick = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)

            def in_sequence(settings, per_seed, runs, *shared):
                return [
                    [
                        compiled(pick(settings, e), pick(per_seed, s), run, *shared)
                        for s, run in enumerate(row)
                    ]
                    for e, row in enumerate(runs)
                ]

            return in_sequence

        def side_by_side(settings, per_seed, runs, *shared):
            of_seed = lambda setting, seed, run: one(setting, seed, run, *shared)
            of_setting = jax.vmap(of_seed, (None, 0, 0))
            return jax.vmap(of_setting, (0, None, 0))(settings, per_seed, runs)

        return jax.jit(side_by_side, donate_argnums=donated)


class Trainings:
    """E x S trainings of a :class:`Program`, from their start.

    Args:
      program: the compiled functions.
      hyperparameters: arguments of ``make_optimizer``, arrays of shape (E,) for E settings; empty for a
        function without arguments, E = 1.
      seeds: S seeds of the initial parameters, the order of the batches and their augmentation.
      num_steps: length of every training.

    Attributes:
      state: pytree of arrays, all that changes; can be saved, and set to go on from there.
      steps_done: number of steps taken; to be set with ``state``.

    Raises:
      ValueError: if there are no seeds, the hyperparameters are of several lengths, or the batch is
        larger than the training part.

    Example:
      See :class:`Program`.
    """

    def __init__(
        self,
        program: Program,
        hyperparameters: Hyperparameters | None,
        seeds: Sequence[int],
        num_steps: int,
    ):
        if len(seeds) < 1:
            raise ValueError("`seeds` is empty; give at least one seed")
        task, self._program = program.task, program
        values = {name: np.asarray(value, np.float32) for name, value in (hyperparameters or {}).items()}
        lengths = {len(value) for value in values.values()} or {1}
        if len(lengths) > 1:
            raise ValueError(f"`hyperparameters` must be arrays of one length, got lengths {sorted(lengths)}")
        self.num_settings, self.num_seeds = lengths.pop(), len(seeds)
        # Without hyperparameters, numbers stand for the settings, so that there is something to map over.
        self._settings = (np.arange(self.num_settings), values)
        self._seeds = {"seed": np.asarray(seeds, np.int32)}
        self._feed = make_feed(task, seeds, num_steps)
        self._train = self._feed.examples or jax.tree.map(jnp.asarray, in_memory(task.data.train))
        self._test = jax.tree.map(jnp.asarray, task.data.test)
        nothing = [[None] * self.num_seeds] * self.num_settings if program.is_sequential else None
        self.state = program.init(self._settings, self._seeds, nothing)
        self.steps_done = 0

    def step(self) -> None:
        """Takes the next step of every training."""
        seeds = {**self._seeds, "fed": self._feed(self.steps_done)}
        number = np.int32(self.steps_done)
        self.state = self._program.step(self._settings, seeds, self.state, self._feed.examples, number)
        self.steps_done += 1

    def train_loss(self) -> np.ndarray:
        """Returns the loss on the training part (the sample in memory of a stream), in nats, shape (E, S)."""
        return self._mean(self._program.loss, self._train)

    def loss_on(self, examples: Examples) -> np.ndarray:
        """Returns the loss on examples, such as a sample of a part, in nats, shape (E, S)."""
        return self._mean(self._program.loss, examples)

    def test_accuracy(self) -> np.ndarray:
        """Returns the accuracy on the test part, in [0, 1], shape (E, S)."""
        return self._mean(self._program.accuracy, self._test)

    def wait(self) -> None:
        """Waits until the steps that were taken are computed: one that is only dispatched is not done."""
        jax.block_until_ready(self.state)

    def _mean(self, measure: Callable, examples: Examples) -> np.ndarray:
        ready = self._program.ready(self._settings, self._seeds, self.state, self._train)
        total = num_examples(examples)
        mean = np.zeros((self.num_settings, self.num_seeds))
        for start in range(0, total, _EVALUATION_CHUNK):
            chunk = jax.tree.map(lambda leaf: leaf[start : start + _EVALUATION_CHUNK], examples)  # noqa: B023
            value = measure(self._settings, self._seeds, ready, chunk)
            mean += np.asarray(jax.device_get(value)) * (num_examples(chunk) / total)
        return mean


__all__ = ["Program", "Trainings"]
