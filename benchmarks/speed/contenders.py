"""What ``step_time.py`` and ``meta_step_time.py`` time: networks, steps of optimizers, and parts of them."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mlhf_optax import (
    gauss_newton,
    ggn_matvec,
    hessian_free,
    init_meta_params,
    layer_types,
    load_pretrained,
    mlhf,
)
from mlhf_optax.controllers.coordinate_lstm import run_network
from mlhf_optax.controllers.lstm import init_carry
from mlhf_optax.controllers.lstm_settings import Inputs
from mlhf_optax.curvature_batch import CurvatureBatch, curvature_subset
from mlhf_optax.tasks import MLP, ConvNet, Dataset, Task, image_task, mini_resnet

NUM_CG_STEPS = 4
# LSTMs per coordinate know dense layers, convolutions and norms.
_ATTENTION = {r"(query|key|value|out)/kernel": "dense_kernel", r"(query|key|value|out)/bias": "dense_bias"}
_types = functools.partial(layer_types, rules={**_ATTENTION, "position": "dense_kernel"})


class _Transformer(nn.Module):
    """Two layers with normalisation before attention, on sequences (N, length, features)."""

    width: int = 64

    @nn.compact
    def __call__(self, sequences: jax.Array) -> jax.Array:
        x = nn.Dense(self.width)(sequences)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[-2:])
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), axis=1))


# Network, shape of an example, batch sizes.
NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
    "digits-mlp": (MLP((32,)), (8, 8, 1), (128,)),
    "mlp-784-512x3-10": (MLP((512, 512, 512)), (28, 28, 1), (128, 1024)),
    "cuda-convnet": (ConvNet(), (32, 32, 3), (128, 512)),
    "transformer": (_Transformer(), (32, 32), (128,)),
    "resnet9": (mini_resnet(), (32, 32, 3), (128,)),
    "tiny-convnet": (ConvNet((4,), ()), (8, 8, 3), (16,)),
}


class Contender(NamedTuple):
    """A function ``advance(state, batch) -> state`` and where it starts.

    As every call needs the result of the one before, calls can be timed without waiting for each.
    """

    advance: Callable[[Any, Any], Any]
    state: Any


class Runner:
    """Calls a contender again and again, each time on what it returned last."""

    def __init__(self, contender: Contender, batch: Any):
        self.jitted: Any = jax.jit(contender.advance, donate_argnums=0)
        # Copies, as a donated buffer may not be used twice.
        self.state = jax.tree.map(jnp.copy, contender.state)
        self.batch = batch
        start = time.perf_counter()
        jax.block_until_ready(self())
        self.first_seconds = time.perf_counter() - start

    def __call__(self) -> Any:
        """Takes one step; returns the new state without waiting for it."""
        self.state = self.jitted(self.state, self.batch)
        return self.state


def make_task(name: str) -> Task:
    """Returns the task, without data, of a name in :data:`NETWORKS`."""
    model, shape, _ = NETWORKS[name]
    return image_task(name, "", model, shape, load_data=lambda: Dataset({}, {}, {}), num_classes=10)


def draw_batch(name: str, *leading: int) -> dict[str, jax.Array]:
    """Returns a random batch for the task of a name, with any leading axes."""
    keys = jax.random.split(jax.random.key(1))
    image = jax.random.normal(keys[0], (*leading, *NETWORKS[name][1]))
    return {"image": image, "label": jax.random.randint(keys[1], leading, 0, 10)}


def loss(task: Task, params: Any, batch: Any) -> jax.Array:
    """Returns the mean loss on a batch."""
    return task.loss_fn(task.predict_fn(params, batch), batch)


def training_step(task: Task, params: Any, optimizer: optax.GradientTransformation) -> Contender:
    """Returns a training step: gradient, update and its application."""
    tx = optax.with_extra_args_support(optimizer)

    def advance(state, batch):
        params, opt_state = state
        gradient = jax.grad(functools.partial(loss, task))(params, batch)
        updates, opt_state = tx.update(gradient, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state

    return Contender(advance, (params, tx.init(params)))


def step_contenders(task: Task, params: Any) -> dict[str, Contender]:
    """Returns a training step of every optimizer that is installed."""
    model = (task.predict_fn, task.loss_fn)
    meta_params = init_meta_params(jax.random.key(2))
    per_coordinate: dict[str, Any] = {"num_cg_steps": NUM_CG_STEPS, "layer_types_fn": _types}
    general = load_pretrained("general")
    cheap = {name: general.recommended[name] for name in ("num_cg_steps", "curvature_batch_size")}
    optimizers = {
        "sgd": optax.sgd(0.01, momentum=0.9),
        "adam": optax.adam(1e-3),
        "muon": optax.contrib.muon(1e-3),
        "general": general.optimizer(*model),
        "gauss-newton-diagonal": gauss_newton(1.0, *model, metric="diagonal", **cheap),
        "mlhf": mlhf(meta_params, *model, **per_coordinate),
        "mlhf-quarter": mlhf(meta_params, *model, curvature_batch_size=0.25, **per_coordinate),
        # Unrolled as MLHF is, and all 20 steps whatever the tolerance.
        "hessian-free-20": hessian_free(0.1, *model, damping=1.0, tolerance=0.0, early_exit=False),
    }
    contenders = {name: training_step(task, params, optimizer) for name, optimizer in optimizers.items()}
    somax = somax_step(task, params)
    return contenders if somax is None else {**contenders, f"somax-ggn-cg{NUM_CG_STEPS}": somax}


def somax_step(task: Task, params: Any) -> Contender | None:
    """Returns a step of python-somax's GGN method with as many CG steps as MLHF, if it is installed.

    Constant damping, no preconditioner, no telemetry, no line search; a warm start as in MLHF, so K + 1
    products too. With a tolerance of zero its loop never ends early.
    """
    try:
        import somax
    except ImportError:
        return None
    predict_fn = lambda p, image: task.predict_fn(p, {"image": image})
    keys = {"x_key": "image", "y_key": "label"}
    cg = {"maxiter": NUM_CG_STEPS, "tol": 0.0, "warm_start": True, "record_cg_stats": False}
    method = somax.sgn_ce(predict_fn=predict_fn, learning_rate=0.1, lam0=1.0, **keys, **cg)

    def advance(state, batch):
        params, method_state = state
        # The key is for methods that draw random numbers; this one draws none.
        return method.step(params, batch, method_state, jax.random.key(0))[:2]

    return Contender(advance, (params, method.init(params)))


def part_contenders(task: Task, params: Any) -> dict[str, Contender]:
    """Returns the parts of a step of ``mlhf``, and the products of one of ``general``.

    The one product of ``one_product`` makes a difference of K.
    """

    def gradient(state, batch):
        return state[0], jax.grad(functools.partial(loss, task))(_after(*state), batch)

    def multiply(times: int, share: CurvatureBatch = None):
        def advance(state, batch):
            params = _after(*state)
            part = curvature_subset(task.predict_fn, params, batch, share, loss_fn=task.loss_fn)
            vector, matvec = params, ggn_matvec(task.predict_fn, task.loss_fn, params, part)
            for _ in range(times):
                # As with a damping of one: products alone would shrink to nothing.
                vector = jax.tree.map(jnp.add, vector, matvec(vector))
            return params, vector

        return advance

    meta_params, general = init_meta_params(jax.random.key(2)), load_pretrained("general").recommended
    types = _types(params)

    def lstm(state, _):
        (direction, residual, gradient), *carries = state
        # Three distinct trees: what is made of equal ones would be computed only once.
        inputs = Inputs(direction, residual, gradient)
        networks = zip((meta_params.damping, meta_params.preconditioner), carries, strict=True)
        run = lambda network, carry: run_network(network, meta_params.settings, types, carry, inputs)
        (s_out, s_carry), (p_out, p_carry) = (run(network, carry) for network, carry in networks)
        return (s_out, p_out, gradient), s_carry, p_carry

    carry = init_carry(params, meta_params.units)
    return {
        "gradient": Contender(gradient, (params, params)),
        "products": Contender(multiply(NUM_CG_STEPS + 1), (params, params)),
        "one_product": Contender(multiply(1), (params, params)),
        "general_products": Contender(
            multiply(general["num_cg_steps"] + 1, general["curvature_batch_size"]), (params, params)
        ),
        "lstm": Contender(lstm, ((params, params, params), carry, carry)),
    }


def _after(params: Any, previous: Any) -> Any:
    """Returns ``params``, but not before ``previous`` is there."""
    return jax.lax.optimization_barrier((params, previous))[0]
