"""K-FAC for the comparison with second-order optimizers; needs kfac-jax and a jax that it works with."""

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlhf_optax.experiments import Contender
from mlhf_optax.experiments.runs import Program, RunGrid, RunState, augmentation_key
from mlhf_optax.tasks import Task, take

LEARNING_RATES = DAMPINGS = (1.0, 0.1, 0.01, 0.001)
DECAYS = (0.9, 0.99, 0.999)
MOMENTUM = 0.9


def kfac_contender() -> Contender:
    """Returns K-FAC with the paper's grid: 4 learning rates, 4 dampings, 3 decays of the averages.

    Momentum is 0.9, damping and learning rate are constant, inverses are taken every five steps.
    """
    settings = [
        {"learning_rate": rate, "damping": damping, "decay": decay}
        for decay, rate, damping in itertools.product(DECAYS, LEARNING_RATES, DAMPINGS)
    ]

    def clock(task: Task) -> float:
        """Returns the median over stretches of 25 steps, each with its five inversions."""
        first = {name: [value] for name, value in settings[0].items()}
        grid, times = RunGrid(KfacProgram(task), first, [0], num_steps=100), []
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(25):
                grid.step()
            grid.wait()
            times.append((time.perf_counter() - start) / 25)
        return statistics.median(times[1:])

    how = {"program": KfacProgram, "clock": clock}
    return Contender.of_settings("kfac", settings, _no_transformation, **how)


class KfacProgram(Program):
    """Trainings with K-FAC, one after the other: it decides outside of compiled code what a step does."""

    def __init__(self, task: Task):
        super().__init__(task, _no_transformation, sequential=True)
        self._optimizers: dict[float, Any] = {}
        key = lambda seed, number: augmentation_key(jax.random.key(seed), number)
        self._draw = jax.jit(
            lambda seed, fed, number, examples: task.augment_fn(key(seed, number), take(examples, fed))
        )
        self.init = self.over_runs(self._init, jit=False)
        self.step = self.over_runs(self._step, jit=False)

    def _init(self, setting, seed, _):
        key = jax.random.key(seed["seed"])
        params = jax.jit(self.task.init_fn)(jax.random.fold_in(key, 0))
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[: self.task.batch_size]), self.task.data.train)
        batch = self.task.augment_fn(key, batch)
        return RunState(params, self._optimizer(setting).init(params, key, batch))

    def _step(self, setting, seed, state, examples, number):
        batch = self._draw(seed["seed"], seed["batch"], number, examples)
        params, opt_state, _ = self._optimizer(setting).step(
            state.params,
            state.opt_state,
            jax.random.fold_in(jax.random.key(seed["seed"]), int(number)),
            batch=batch,
            global_step_int=int(number),
            learning_rate=jnp.asarray(setting[1]["learning_rate"]),
            damping=jnp.asarray(setting[1]["damping"]),
            momentum=jnp.asarray(MOMENTUM),
        )
        return RunState(params, opt_state)

    def _optimizer(self, setting) -> Any:
        decay = float(setting[1]["decay"])
        if decay not in self._optimizers:
            self._optimizers[decay] = _make_kfac(self.task, decay)
        return self._optimizers[decay]


def _make_kfac(task: Task, decay: float) -> Any:
    try:
        import kfac_jax
    except ImportError as error:
        raise ImportError(
            "K-FAC needs kfac-jax, best in an environment of its own: kfac-jax 0.0.8 works with jax 0.9.0"
        ) from error

    if jax.default_backend() == "cpu":
        _replace_moments_of_patches()

    def loss(params, batch):
        outputs = task.predict_fn(params, batch)
        kfac_jax.register_softmax_cross_entropy_loss(outputs, batch["label"])
        return task.loss_fn(outputs, batch)

    return kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        curvature_ema=decay,
        num_burnin_steps=0,
        inverse_update_period=5,
    )


def _replace_moments_of_patches() -> None:
    """Has kfac-jax multiply patches, not convolve in a loop: at batch 512 a step takes 0.7 s, not 28."""
    from kfac_jax._src import patches_second_moment

    patches_second_moment.patches_moments = moments_of_patches


def moments_of_patches(
    inputs: jax.Array,
    kernel_spatial_shape: tuple[int, int],
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    dim_numbers: jax.lax.ConvDimensionNumbers,
    weighting_array: jax.Array | None = None,
    data_format: None = None,
    precision: jax.lax.Precision | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns second and first moments, summed over images and positions, of what a kernel sees.

    Args are those of the function of kfac-jax: images ``(B, height, width, C)``, a kernel ``(h, w)``, and
    weights of the images, ``(B,)``, or of every position. The results are ``(h, w, C, h, w, C)`` and
    ``(h, w, C)``.
    """
    if dim_numbers.lhs_spec != (0, 3, 1, 2):
        raise ValueError(f"images must have their channels last, got dimensions {dim_numbers.lhs_spec}")
    padded = jnp.transpose(jnp.pad(inputs, ((0, 0), *padding, (0, 0))), (3, 0, 1, 2))
    rows, columns = (padded.shape[axis + 2] - kernel_spatial_shape[axis] + 1 for axis in (0, 1))
    seen = [
        padded[:, :, y : y + rows : strides[0], x : x + columns : strides[1]]
        for y, x in itertools.product(*map(range, kernel_spatial_shape))
    ]
    patches = jnp.concatenate(seen)  # (h * w * C, B, rows, columns): the product is fastest in long rows
    weighted = patches
    if weighting_array is not None:
        weights = weighting_array.reshape(weighting_array.shape + (1,) * (4 - weighting_array.ndim))
        weighted = patches * weights[..., 0]
    shape = (*kernel_spatial_shape, inputs.shape[-1])
    second = jnp.tensordot(patches, weighted, axes=((1, 2, 3), (1, 2, 3)), precision=precision)
    return second.reshape(shape + shape), jnp.sum(weighted, axis=(1, 2, 3)).reshape(shape)


def _no_transformation(**hyperparameters):
    raise TypeError("K-FAC is no optax transformation")
