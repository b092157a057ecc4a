"""The meta-gradient of MLHF against NumPy and finite differences."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import references

from mlhf_optax import AUTHORS_SETTINGS, PAPER_SETTINGS, Settings
from mlhf_optax.controllers.lstm_settings import LogFeatures, Multiply, Unit
from mlhf_optax.meta_training import mlhf_optimizer

pytestmark = pytest.mark.usefixtures("unoptimised")

LEARNING_RATE = 0.7


def task(predict_fn):
    return SimpleNamespace(init_fn=None, predict_fn=predict_fn, loss_fn=problems.LOSS)


def to_double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def start(learned, meta_params, problem, params):
    """The optimizer state at a fresh start, with LSTM states in double precision."""
    own, after = learned.build(meta_params, problem).init(params)
    return own._replace(controller=to_double(own.controller)), after


# Five steps against NumPy. Together the cases cover every value of every setting and option; the bound
# on the update holds in some steps of the last two.


@dataclasses.dataclass(frozen=True)
class Case:
    settings: Settings
    model: references.Model
    units: tuple[int, ...]
    options: dict[str, Any]

    @property
    def is_linear(self):
        return isinstance(self.model, references.LinearModel)


CASES = {
    "paper": Case(
        PAPER_SETTINGS,
        references.Model(),
        (3,),
        {"max_update_ratio": None, "step_loss": "difference", "damping_loss_scale": 1.0},
    ),
    "default": Case(Settings(), references.LinearModel(), (2,), {}),
    "authors": Case(
        AUTHORS_SETTINGS,
        references.LinearModel(),
        (2, 2),
        {"step_loss": "difference", "max_update_ratio": 0.3, "same_batch_weight": 0.0},
    ),
    "log": Case(
        Settings(
            features=LogFeatures(has_shared=False),
            preconditioner=Multiply(),
            initial_damping=1.0,
            initial_preconditioner=0.1,
            unit=Unit(gradient_power=0.5, parameter_power=0.7),
        ),
        references.LinearModel(),
        (3,),
        {"step_loss": "log", "step_loss_epsilon": 1e-2, "max_update_ratio": 0.5, "same_batch_weight": 0.3},
    ),
}


@dataclasses.dataclass(frozen=True)
class Unroll:
    """An unroll of five steps and the same by the reference."""

    case: Case
    meta_params: Any
    result: Any
    steps: list[references.Step]
    batches: list[dict]

    @property
    def loss_options(self):
        options = self.case.options
        return {
            "step_loss": options.get("step_loss", "relative"),
            "epsilon": options.get("step_loss_epsilon", 1e-6),
            "same_batch_weight": options.get("same_batch_weight", 1.0),
        }

    def frozen_losses(self, meta_params, **kwargs):
        return references.frozen_meta_losses(
            meta_params,
            self.case.model,
            self.steps,
            self.batches,
            learning_rate=LEARNING_RATE,
            num_cg_steps=2,
            max_update_ratio=self.case.options.get("max_update_ratio", 0.25),
            **self.loss_options,
            **kwargs,
        )


@pytest.fixture(scope="module", params=CASES)
def unroll(request):
    case = CASES[request.param]
    # Inputs of this size make the problem so stiff that two CG steps are far from a solution.
    batches = [{**batch, "image": 4 * batch["image"]} for batch in problems.batches(6)]
    with jax.enable_x64(True):
        meta_params = to_double(problems.random_meta_params(case.settings, units=case.units))
        params = problems.linear_params() if case.is_linear else problems.mlp_params()
        problem = task(problems.linear if case.is_linear else problems.mlp)
        learned = mlhf_optimizer(LEARNING_RATE, num_cg_steps=2, update_noise=0.0, unroll=1, **case.options)
        opt_state = start(learned, meta_params, problem, params)
        run = jax.jit(functools.partial(learned.meta_gradient, task=problem))
        result = run(
            meta_params,
            params=params,
            opt_state=opt_state,
            batches=problems.stack(batches),
            key=jax.random.key(0),
        )
        result = jax.device_get(result)
    steps = references.naive_mlhf(
        jax.device_get(meta_params),
        case.model,
        problems.flat(params),
        batches,
        learning_rate=LEARNING_RATE,
        num_cg_steps=2,
        max_update_ratio=case.options.get("max_update_ratio", 0.25),
        num_steps=5,
    )
    return Unroll(case, jax.device_get(meta_params), result, steps, batches)


def test_five_steps_and_both_losses_agree_with_numpy(unroll):
    result, last = unroll.result, unroll.steps[-1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    close(result.meta_losses["l_p"], references.preconditioner_loss(unroll.steps))
    close(result.meta_losses["l_s"], references.damping_loss(unroll.steps, **unroll.loss_options))
    close(result.inner_losses, [*(step.loss for step in unroll.steps), last.loss_next])
    close(problems.flat(result.params), last.w_next)
    close(result.gradient_norm, np.linalg.norm(unroll.case.model.gradient(last.w_next, unroll.batches[-1])))
    own = result.opt_state[0]
    assert (int(own.count), int(own.info.skipped_steps)) == (5, 0)
    close(problems.flat(own.direction), last.direction)
    close(problems.flat(own.residual), last.residual)
    assert_carries_close(own.controller.damping_carry, last.damping_carry, close)
    assert_carries_close(own.controller.preconditioner_carry, last.preconditioner_carry, close)


def assert_carries_close(carry, expected, close):
    for number, layer in enumerate(carry):
        for trees, index in ((layer.cell, 0), (layer.hidden, 1)):
            leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(trees)]
            close(
                np.concatenate(leaves, axis=1),
                np.stack([coordinate[number][index] for coordinate in expected], axis=1),
            )


def directions(network, types):
    """For every array of the networks of these types, a tree that is random there and zero elsewhere."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(network)
    rng = np.random.default_rng(0)
    for path, _ in leaves:
        if path[0].key in types:
            changed = [rng.normal(size=leaf.shape) * (own == path) for own, leaf in leaves]
            yield treedef.unflatten(changed)


def slope(unroll, name, index, direction, **kwargs):
    """Central difference of one of the frozen losses along a direction of the weights of one network."""
    step = 1e-5
    network = getattr(unroll.meta_params, name)
    losses = []
    for sign in (1, -1):
        moved = jax.tree.map(lambda x, d: x + sign * step * d, network, direction)  # noqa: B023
        moved = dataclasses.replace(unroll.meta_params, **{name: moved})
        losses.append(unroll.frozen_losses(moved, **kwargs)[index])
    return (losses[0] - losses[1]) / (2 * step)


NETWORKS = {"preconditioner": 0, "damping": 1}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_has_the_gradient_of_its_own_loss_by_finite_differences(unroll, name):
    scale = unroll.case.options.get("damping_loss_scale", 10.0) if name == "damping" else 1.0
    gradient, used = getattr(unroll.result.gradient, name), set(unroll.case.model.layer_types)
    for direction in directions(getattr(unroll.meta_params, name), used):
        expected = scale * slope(unroll, name, NETWORKS[name], direction)
        got = sum(map(np.vdot, jax.tree.leaves(gradient), jax.tree.leaves(direction)))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-10)
    unused = [gradient[kind] for kind in gradient if kind not in used]
    assert not any(leaf.any() for leaf in jax.tree.leaves(unused))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_states_of_the_lstms_do_carry_gradient_through_time(unroll, name):
    scale = unroll.case.options.get("damping_loss_scale", 10.0) if name == "damping" else 1.0
    network, gradient = getattr(unroll.meta_params, name), getattr(unroll.result.gradient, name)
    kernel = lambda tree: tree["dense_kernel"].layers[0].kernel
    direction = jax.tree.map(np.zeros_like, network)
    kernel(direction)[...] = kernel(gradient)  # the steepest one: how long the gradient is
    cut = scale * slope(unroll, name, NETWORKS[name], direction, cut_carries=True)
    assert abs(cut / np.sum(kernel(gradient) ** 2) - 1) > 0.01
