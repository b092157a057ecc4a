"""Trainings of a comparison. A run is the training of one network from one seed: its start, step, judgement.

A :class:`RunGrid` advances many runs together, E settings of an optimizer times S seeds. For a seed, the
initial parameters, the order of the mini-batches and their augmentation are the same whatever the optimizer,
so differences between curves are differences between optimizers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlhf_optax.meta_training import runs_in_sequence
from mlhf_optax.tasks import Examples, Task, epoch_indices, num_examples, take

MakeOptimizer = Callable[..., optax.GradientTransformation]  # make_optimizer(**hyperparameters)
EvalParams = Callable[[Any, Any], Any]  # eval_params(opt_state, params) -> the parameters to be judged
Hyperparameters = Mapping[str, Any]

_EVALUATION_CHUNK = 2048  # examples per forward pass, to bound the memory of an evaluation


class RunState(NamedTuple):
    """What a run carries from step to step."""

    params: Any
    opt_state: Any


def start_params(task: Task, key: chex.PRNGKey) -> Any:
    """Returns the parameters with which the run with ``key`` starts, whatever the optimizer."""
    return task.init_fn(jax.random.fold_in(key, 0))


def init_run(
    task: Task, make_optimizer: MakeOptimizer, hyperparameters: Hyperparameters, key: chex.PRNGKey
) -> RunState:
    """Returns the state of a run before its first step; ``key`` decides the parameters."""
    params = start_params(task, key)
    return RunState(params, make_optimizer(**hyperparameters).init(params))


def draw_order(task: Task, key: chex.PRNGKey, num_steps: int) -> jax.Array:
    """Returns the mini-batches of a run as numbers of examples, shape (num_steps, B)."""
    size = num_examples(task.data.train)
    return epoch_indices(jax.random.fold_in(key, 1), size, task.batch_size, num_steps)


def augmentation_key(key: chex.PRNGKey, step: int | jax.Array) -> chex.PRNGKey:
    """Returns the key for the augmentation at a step, counted from 0, of the run with ``key``."""
    return jax.random.fold_in(jax.random.fold_in(key, 2), step)


def draw_batch(task: Task, examples: Examples, indices: jax.Array, key: chex.PRNGKey) -> Examples:
    """Returns the examples with numbers ``indices``, of any shape, augmented."""
    return task.augment_fn(key, take(examples, indices))


def run_step(
    task: Task,
    make_optimizer: MakeOptimizer,
    hyperparameters: Hyperparameters,
    batch: Examples,
    state: RunState,
) -> RunState:
    """Takes one step of a run on a mini-batch; an optimizer that asks for it gets the loss as ``value=``."""
    optimizer = optax.with_extra_args_support(make_optimizer(**hyperparameters))
    loss = lambda params: task.loss_fn(task.predict_fn(params, batch), batch)
    value, grads = jax.value_and_grad(loss)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, batch=batch, value=value)
    return RunState(optax.apply_updates(state.params, updates), opt_state)


def evaluation_state(task: Task, params: Any, examples: Examples) -> Any:
    """Returns the model state of a network from a sample of the training part, None if it has no state."""
    return None if task.model_state_fn is None else task.model_state_fn(params, examples)


def mean_loss(task: Task, params: Any, examples: Examples, model_state: Any = None) -> jax.Array:
    """Returns the loss over all examples, taken at once, in nats.

    Without ``model_state``, from :func:`evaluation_state`, batch normalisation normalises by these examples.
    """
    return task.loss_fn(task.predict_fn(params, _with_state(examples, model_state)), examples)


def accuracy(task: Task, params: Any, examples: Examples, model_state: Any = None) -> jax.Array:
    """Returns the share of examples whose largest logit is that of the label; what is not finite is wrong.

    NaN for a task without classes.
    """
    if task.num_classes is None:
        return jnp.full((), jnp.nan)
    outputs = task.predict_fn(params, _with_state(examples, model_state))
    is_right = jnp.argmax(outputs, axis=-1) == examples["label"]
    return jnp.mean(is_right & jnp.all(jnp.isfinite(outputs), axis=-1))


def _with_state(examples: Examples, model_state: Any) -> Examples:
    return examples if model_state is None else {**examples, "model_state": model_state}


class Program:
    """The compiled functions of E x S runs; made once, it serves any settings and seeds.

    Trainings run side by side under ``vmap``, or one after the other where that is faster
    (:func:`mlhf_optax.meta_training.runs_in_sequence`). Then they are apart also for the compiler, since
    XLA on CPUs is slow at the derivatives of convolutions within its loops.

    Args:
      task: what to train; mini-batches have its ``batch_size``.
      make_optimizer: returns the optimizer for given hyperparameters; its ``update`` gets ``batch=`` and the
        loss of the batch as ``value=``.
      sequential: run trainings one after the other; where that is faster if None.
      like: a program of the same task: what does not depend on the optimizer is taken from it, and so is
        compiled once.
      eval_params: ``eval_params(opt_state, params)`` returns the parameters that are judged in the place of
        those that are trained, for optimizers that average; None for others.
    """

    def __init__(
        self,
        task: Task,
        make_optimizer: MakeOptimizer,
        sequential: bool | None = None,
        like: "Program | None" = None,
        eval_params: EvalParams | None = None,
    ):
        self.task = task
        self.is_sequential = runs_in_sequence(task) if sequential is None else sequential

        def init(setting, seed, _):
            return RunState(seed["params"], make_optimizer(**setting[1]).init(seed["params"]))

        # The data are arguments, not constants of the compiled program, which would copy them.
        def step(setting, seed, state, examples, number):
            key = augmentation_key(jax.random.key(seed["seed"]), number)
            batch = draw_batch(task, examples, seed["batch"], key)
            return run_step(task, make_optimizer, setting[1], batch, state)

        def ready(setting, seed, params, examples):
            return params, evaluation_state(task, params, examples)

        def judge(measure):
            return self.over_runs(lambda setting, seed, run, part: measure(task, run[0], part, run[1]))

        self.init = self.over_runs(init)
        self.step = self.over_runs(step, donate=True)
        self.judged = None
        if eval_params is not None:
            self.judged = self.over_runs(lambda _, seed, run: eval_params(run.opt_state, run.params))
        if like is not None and like.is_sequential == self.is_sequential:
            self.start, self.ready, self.loss, self.accuracy = (
                like.start,
                like.ready,
                like.loss,
                like.accuracy,
            )
            return
        # Parameters of all seeds, leaves (S, ...).
        self.start = jax.jit(jax.vmap(lambda seed: start_params(task, jax.random.key(seed))))
        self.ready, self.loss, self.accuracy = self.over_runs(ready), judge(mean_loss), judge(accuracy)

    def over_runs(self, one: Callable, donate: bool = False, jit: bool = True) -> Callable:
        """Maps ``one(setting, per_seed, run, *shared)`` over settings (E), per_seed (S) and runs (E, S).

        A setting is its number and its hyperparameters. With ``donate`` the runs may be overwritten. Only
        sequential programs can do without ``jit``.
        """
        donated = 2 if donate else ()
        if self.is_sequential:
            compiled = jax.jit(one, donate_argnums=donated) if jit else one
            pick = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)

            def in_sequence(settings, per_seed, runs, *shared):
                of = lambda e, s, run: compiled(pick(settings, e), pick(per_seed, s), run, *shared)
                return [[of(e, s, run) for s, run in enumerate(row)] for e, row in enumerate(runs)]

            return in_sequence

        def side_by_side(settings, per_seed, runs, *shared):
            of_seed = lambda setting, seed, run: one(setting, seed, run, *shared)
            of_setting = jax.vmap(of_seed, (None, 0, 0))
            return jax.vmap(of_setting, (0, None, 0))(settings, per_seed, runs)

        return jax.jit(side_by_side, donate_argnums=donated)


class RunGrid:
    """E x S runs of a :class:`Program`, from their start.

    Args:
      program: the compiled functions.
      hyperparameters: arguments of ``make_optimizer``, arrays of shape (E,) for E settings; empty for a
        function without arguments, E = 1.
      seeds: S seeds of the initial parameters, the order of the batches and their augmentation.
      num_steps: length of every run.

    Attributes:
      state: pytree of arrays, all that changes; set it with ``steps_done`` to go on from there.
      steps_done: number of steps taken.

    Raises:
      ValueError: if there are no seeds, the hyperparameters are of several lengths, or the batch is
        larger than the training part.
    """

    def __init__(
        self, program: Program, hyperparameters: Hyperparameters | None, seeds: Sequence[int], num_steps: int
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
        self._train = jax.tree.map(jnp.asarray, task.data.train)
        self._test = jax.tree.map(jnp.asarray, task.data.test)
        # Only numbers of examples are handed over; the examples lie on the device.
        self._orders = np.stack([draw_order(task, jax.random.key(seed), num_steps) for seed in seeds])
        nothing = [[None] * self.num_seeds] * self.num_settings if program.is_sequential else None
        starts = {**self._seeds, "params": program.start(self._seeds["seed"])}
        self.state = program.init(self._settings, starts, nothing)
        self.steps_done = 0

    def step(self) -> None:
        """Takes the next step of every run."""
        seeds = {**self._seeds, "batch": self._orders[:, self.steps_done]}
        number = np.int32(self.steps_done)
        self.state = self._program.step(self._settings, seeds, self.state, self._train, number)
        self.steps_done += 1

    def train_loss(self, examples: Examples | None = None) -> np.ndarray:
        """Returns the loss in nats, shape (E, S), on the training part or some of it."""
        return self._mean(self._program.loss, self._train if examples is None else examples)

    def test_loss(self) -> np.ndarray:
        """Returns the loss on the test part in nats, shape (E, S)."""
        return self._mean(self._program.loss, self._test)

    def test_accuracy(self) -> np.ndarray:
        """Returns the accuracy on the test part, in [0, 1], shape (E, S)."""
        return self._mean(self._program.accuracy, self._test)

    def wait(self) -> None:
        """Waits until the steps that were taken are computed: one that is only dispatched is not done."""
        jax.block_until_ready(self.state)

    def _mean(self, measure: Callable, examples: Examples) -> np.ndarray:
        # Only numbers of settings are told: how it is judged does not depend on the optimizer.
        settings = (self._settings[0], {})
        if self._program.judged is not None:
            params = self._program.judged(settings, self._seeds, self.state)
        else:
            is_run = lambda x: isinstance(x, RunState)
            params = jax.tree.map(lambda run: run.params, self.state, is_leaf=is_run)
        ready = self._program.ready(settings, self._seeds, params, self._train)
        total = num_examples(examples)
        mean = np.zeros((self.num_settings, self.num_seeds))
        for start in range(0, total, _EVALUATION_CHUNK):
            chunk = jax.tree.map(lambda leaf: leaf[start : start + _EVALUATION_CHUNK], examples)  # noqa: B023
            value = measure(settings, self._seeds, ready, chunk)
            mean += np.asarray(jax.device_get(value)) * (num_examples(chunk) / total)
        return mean
