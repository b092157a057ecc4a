"""What meta-training needs to know of a task and of a learned optimizer, and nothing else.

Everything around the meta-gradient (replay, health, validation, driver) needs only these two interfaces. To
join, a learned optimizer gives its own :class:`LearnedOptimizer`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax


class TaskLike(Protocol):
    """A network and a loss. Anything with these three attributes is a task.

    Two more are optional, for optimizers that use curvature: ``curvature_batch_size``, the part of a batch
    for it, and ``per_example``, what of the batch has one entry per example (:func:`mlhf_optax.mlhf`).
    """

    @property
    def init_fn(self) -> Callable[[chex.PRNGKey], chex.ArrayTree]:
        """``init_fn(key) -> params``, fresh parameters."""
        ...

    @property
    def predict_fn(self) -> Callable[[chex.ArrayTree, Any], Any]:
        """``predict_fn(params, batch) -> outputs``."""
        ...

    @property
    def loss_fn(self) -> Callable[[Any, Any], jax.Array]:
        """``loss_fn(outputs, batch) -> scalar``."""
        ...


class MetaGradient(NamedTuple):
    """Result of one unroll of T steps.

    Attributes:
      gradient: gradient of the meta-loss(es), shaped like the meta-parameters.
      meta_losses: named values of the meta-losses, scalars.
      params: parameters after T steps.
      opt_state: optimizer state after T steps.
      inner_losses: shape (T + 1,), the loss on mini-batch t before step t, for t = 1..T+1.
      gradient_norm: norm of the gradient after T steps.
    """

    gradient: chex.ArrayTree
    meta_losses: dict[str, jax.Array]
    params: Any
    opt_state: Any
    inner_losses: jax.Array
    gradient_norm: jax.Array


class LearnedOptimizer(NamedTuple):
    """A learned optimizer as meta-training sees it.

    Attributes:
      build: ``build(meta_params, task) -> optax.GradientTransformationExtraArgs``, the whole
        optimizer, learning rate included, as it will be used.
      meta_gradient: ``meta_gradient(meta_params, task, params, opt_state, batches, key) ->``
        :class:`MetaGradient`; ``batches`` has leaves (T + 1, B, ...), ``opt_state`` comes from
        ``build(meta_params, task).init(params)`` or from the previous unroll.
      init: ``init(key, task) -> meta_params``, untrained ones; ``task`` says what kinds of parameters
        there are. None if whoever meta-trains brings them.
    """

    build: Callable[[Any, TaskLike], optax.GradientTransformationExtraArgs]
    meta_gradient: Callable[..., MetaGradient]
    init: Callable[[chex.PRNGKey, TaskLike], Any] | None = None


class Trajectory(NamedTuple):
    """What a differentiated unroll leaves for a meta-loss.

    Attributes:
      losses: shape (T + 1,), the loss on mini-batch t at the parameters before step t.
      next_losses: shape (T,), the loss on mini-batch t at the parameters after step t.
    """

    losses: jax.Array
    next_losses: jax.Array


META_LOSSES: dict[str, Callable[[Trajectory], jax.Array]] = {
    "last": lambda trajectory: trajectory.losses[-1],
    "mean": lambda trajectory: jnp.mean(trajectory.losses[1:]),
    "mean_after": lambda trajectory: jnp.mean(trajectory.next_losses),
    "sum": lambda trajectory: jnp.sum(trajectory.losses),
    # Asks for progress late in a training as much as early.
    "log": lambda trajectory: jnp.mean(jnp.log(trajectory.losses[1:] + 1e-6)),
}
"""Meta-losses by name.

The first loss of an unroll, at the parameters where it starts, counts in ``"sum"`` alone, as in its source:
nothing that is learned changes it. Sources: ``last`` Lv et al. 2017, ``mean`` Wang et al. 2019,
``mean_after`` Wang et al. 2022, ``sum`` Andrychowicz et al. 2016, ``log`` Wichrowska et al. 2017.
"""


def task_loss(task: TaskLike, params: Any, batch: Any) -> jax.Array:
    """Returns ``loss_fn(predict_fn(params, batch), batch)``."""
    return task.loss_fn(task.predict_fn(params, batch), batch)


def runs_in_sequence(task: TaskLike) -> bool:
    """Returns whether several trainings of a task are faster one after the other than under ``vmap``.

    Convolutions on a CPU are: one training keeps the processor busy, and ``vmap`` turns several into grouped
    convolutions, which are several times slower.

    Args:
      task: the task. Parameters of rank 4 or more count as kernels of convolutions.

    Returns:
      True for convolutions on a CPU.

    Example:
      >>> from types import SimpleNamespace
      >>> runs_in_sequence(SimpleNamespace(init_fn=lambda key: {"kernel": jnp.zeros((64, 10))}))
      False
    """
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    return jax.default_backend() == "cpu" and any(leaf.ndim >= 4 for leaf in jax.tree.leaves(params))


def map_trainings(task: TaskLike, function: Callable[[Any], Any], inputs: Any, axis: str = "auto") -> Any:
    """Calls a function for each of several trainings of a task.

    Args:
      task: the task.
      function: maps the inputs of one training to a pytree of arrays.
      inputs: pytree with a leading axis of trainings.
      axis: ``"vmap"`` runs the trainings at once, ``"sequential"`` one after another; ``"auto"`` is
        sequential where that is faster (:func:`runs_in_sequence`).

    Returns:
      What the function returned, with a leading axis of trainings.
    """
    is_sequential = runs_in_sequence(task) if axis == "auto" else axis == "sequential"
    return lax.map(function, inputs) if is_sequential else jax.vmap(function)(inputs)


def unrolled_optimizer(
    build: Callable[[Any, TaskLike], optax.GradientTransformationExtraArgs],
    meta_loss: Callable[[Trajectory], jax.Array],
    *,
    init: Callable[[chex.PRNGKey, TaskLike], Any] | None = None,
    second_derivatives: bool = False,
    remat: bool = False,
    penalty: Callable[[Any], jax.Array] | None = None,
) -> LearnedOptimizer:
    """Makes a learned optimizer whose meta-gradient is back-propagation through the unroll.

    This is the general way (Andrychowicz et al. 2016), for any optimizer and any meta-loss. MLHF has losses
    of its own, and where they stop gradients a cheaper way is exact:
    :func:`mlhf_optax.meta_training.mlhf_optimizer`.

    Args:
      build: how meta-parameters become an optimizer.
      meta_loss: scalar to minimise, a function of the :class:`Trajectory`.
      init: ``init(key, task) -> meta_params``, untrained ones.
      second_derivatives: differentiate through the gradients that the optimizer gets, too.
      remat: recompute each step in the backward pass; memory for T carries instead of T steps.
      penalty: ``penalty(opt_state) -> scalar``, whose mean over the states after the steps of the unroll is
        added to the meta-loss.

    Returns:
      The learned optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> learned = unrolled_optimizer(
      ...     lambda log_rate, task: optax.with_extra_args_support(optax.sgd(jnp.exp(log_rate))),
      ...     lambda trajectory: jnp.mean(trajectory.losses[1:]))
      >>> learned.build(jnp.log(0.5), None).update(jnp.ones(2), (optax.EmptyState(),) * 2)[0]
      Array([-0.5, -0.5], dtype=float32)
    """

    def meta_gradient(meta_params, task, params, opt_state, batches, key) -> MetaGradient:
        del key

        def unroll(meta):
            optimizer = build(meta, task)

            def step(carry, batch):
                w, state = carry
                loss, gradient = jax.value_and_grad(lambda p: task_loss(task, p, batch))(w)
                seen = gradient if second_derivatives else lax.stop_gradient(gradient)
                updates, state = optimizer.update(seen, state, w, batch=batch)
                w = optax.apply_updates(w, updates)
                cost = jnp.zeros(()) if penalty is None else penalty(state)
                return (w, state), (loss, task_loss(task, w, batch), cost)

            body = jax.checkpoint(step) if remat else step
            used = jax.tree.map(lambda x: x[:-1], batches)
            last = jax.tree.map(lambda x: x[-1], batches)
            (w, state), (losses, next_losses, costs) = lax.scan(body, (params, opt_state), used)
            final, gradient = jax.value_and_grad(lambda p: task_loss(task, p, last))(w)
            trajectory = Trajectory(jnp.append(losses, final), next_losses)
            value = meta_loss(trajectory) + jnp.mean(costs)
            return value, (trajectory.losses, w, state, optax.tree.norm(gradient))

        (value, (losses, w, state, norm)), gradient = jax.value_and_grad(unroll, has_aux=True)(meta_params)
        return MetaGradient(gradient, {"meta_loss": value}, w, state, losses, norm)

    return LearnedOptimizer(build, meta_gradient, init)
