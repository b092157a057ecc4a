"""Checks of meta-training on eight devices, which `test_sharding.py` runs in a process that has them."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from many_devices import (
    CENTRE,
    COMPILATIONS,
    LEARNED_MOMENTUM,
    LONG,
    LOSS,
    MESH,
    TASK,
    assert_close,
    collectives,
    pairs_of_batches,
    run_long,
    sizes_of_collectives,
)

from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.experiments.meta_train_long import meta_train_on_tiny_tasks
from mlhf_optax.learned import LEARNED
from mlhf_optax.meta_training import (
    LongHorizonConfig,
    MetaTrainingConfig,
    Schedule,
    make_long_horizon_step,
    make_meta_step,
)
from mlhf_optax.meta_training.long_horizon.step import _compile as compile_programs
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.support.spread import make_spread
from mlhf_optax.tasks import tiny


@pytest.mark.parametrize(
    ("changes", "axes", "axis_name"),
    [
        ({"task_axis": "sequential"}, (8,), None),
        ({"num_pairs": 4, "average_decay": 0.9}, (4, 2), "pairs"),
        ({}, (4, 2), ("pairs", "other")),
    ],
    ids=["in sequence", "one axis of two", "both axes"],
)
def test_long_horizon_meta_training_on_a_mesh_equals_one_device(changes, axes, axis_name):
    config = dataclasses.replace(LONG, **changes)
    mesh = jax.make_mesh(axes, ("pairs", "other")[: len(axes)])
    spread, seen = run_long(config, LEARNED_MOMENTUM, CENTRE, mesh=mesh, axis_name=axis_name)
    one, seen_by_one = run_long(config, LEARNED_MOMENTUM, CENTRE)
    assert int(one.counts["fresh"]) > 0
    for name in ("fresh", "diverged", "dropped_gradients"):
        assert int(spread.counts[name]) == int(one.counts[name])
    np.testing.assert_array_equal(spread.pairs[0].horizon, one.pairs[0].horizon)
    np.testing.assert_array_equal(spread.key, one.key)
    assert_close(
        (spread.meta_params, spread.pairs[0].params, seen),
        (one.meta_params, one.pairs[0].params, seen_by_one),
    )
    own = config.num_pairs // (math.prod(axes) if axis_name != "pairs" else axes[0])
    for leaf in jax.tree.leaves(spread.pairs):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(own, *leaf.shape[1:])}


def test_long_horizon_meta_training_of_the_general_optimizer_equals_one_device():
    family = LEARNED["mlhf_general"]
    learned = family.learned(family.options())
    config, meta_params = dataclasses.replace(LONG, num_pairs=8), init_tensor_lstm(jax.random.key(0))
    task = SimpleNamespace(
        init_fn=lambda key: {"kernel": jax.random.normal(key, (16, 8))},
        predict_fn=lambda params, batch: batch["image"] @ params["kernel"],
        loss_fn=LOSS,
    )
    spread, seen = run_long(config, learned, meta_params, 2, task=task, mesh=MESH)
    one, seen_by_one = run_long(config, learned, meta_params, 2, task=task)
    assert_close((spread.centre, seen), (one.centre, seen_by_one), 1e-3)


def test_a_meta_step_on_a_mesh_equals_one_device():
    config = MetaTrainingConfig(num_tasks=8, unroll_length=2, replay_capacity=8, keep_probability=0.5)
    unrolls = dataclasses.replace(LONG, num_pairs=8)  # batches of as many steps as an unroll has
    states, seen = [], []
    for mesh in (MESH, None):
        init, step = make_meta_step(TASK, LEARNED_MOMENTUM, config, optax.sgd(0.05), mesh=mesh)
        state = init(jax.random.key(0), CENTRE)
        for number in range(3):
            state, metrics = step(state, pairs_of_batches(unrolls, number))
        states.append(state)
        seen.append(metrics)
    spread, one = states
    assert int(one.counts["replayed"]) > 0
    np.testing.assert_array_equal(spread.trainings.age, one.trainings.age)
    assert_close((spread._replace(key=()), seen[0]), (one._replace(key=()), seen[1]))
    for leaf in jax.tree.leaves(spread.trainings):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(1, *leaf.shape[1:])}
    with pytest.raises(ValueError, match=r"`num_tasks`=4 must be a multiple of the 8 devices"):
        make_meta_step(TASK, LEARNED_MOMENTUM, MetaTrainingConfig(num_tasks=4), mesh=MESH)


def test_no_training_leaves_its_device():
    spread = make_spread(MESH, None, LONG.num_pairs, "num_pairs")
    programs = compile_programs(TASK, LEARNED_MOMENTUM, LONG, spread)
    keys, over = jax.random.split(jax.random.key(0), LONG.num_pairs), np.arange(LONG.num_pairs) < 3
    pairs = programs.start(keys, CENTRE)
    batches = spread.put(pairs_of_batches(LONG, 0), spread.cut)
    advance = programs.advance.lower(CENTRE, pairs, batches).compile()
    assert set(collectives(advance)) == {"all-reduce"}
    # One array: the gradient of two meta-parameters, the meta-loss, the age, and two counts.
    assert sizes_of_collectives(advance) == [6]
    assert not collectives(programs.replace.lower(pairs, pairs, over).compile())
    assert not collectives(programs.start.lower(keys, CENTRE).compile())


def test_long_horizon_meta_training_goes_on_on_other_devices_and_compiles_nothing_after_its_first_steps():
    whole, _ = run_long(LONG, LEARNED_MOMENTUM, CENTRE, 2, mesh=MESH)
    half = jax.device_get(run_long(LONG, LEARNED_MOMENTUM, CENTRE, 1)[0])
    init, step = make_long_horizon_step([TASK], LEARNED_MOMENTUM, LONG, optax.sgd(0.05), mesh=MESH)
    del init
    state, _ = step(half, [pairs_of_batches(LONG, 1)])
    assert_close(state.meta_params, whole.meta_params)
    for number in range(2, 6):  # until fresh pairs have begun, too
        state, _ = step(state, [pairs_of_batches(LONG, number)])
    before = COMPILATIONS.count
    for number in range(6, 10):
        state, _ = step(state, [pairs_of_batches(LONG, number)])
    assert COMPILATIONS.count == before


def test_meta_training_on_tiny_tasks_goes_on_on_more_devices(tmp_path):
    family, tasks = LEARNED["adam_rates"], [tiny._regression("regression")]
    config = LongHorizonConfig(num_pairs=4, truncation=2, horizons=(2, 4))

    def run(folder, count, **schedule):
        schedule = Schedule(2, validate_every=2, **schedule)
        mesh = jax.make_mesh((count,), ("pairs",), devices=jax.devices()[:count]) if count > 1 else None
        arguments = (tasks, tasks, family, family.options(), tmp_path / folder, schedule, config)
        path = meta_train_on_tiny_tasks(*arguments, validation_steps=(1, 2), resume=True, mesh=mesh)
        return load_pretrained(path).meta_params

    run("parts", 1, stop_after=1)
    assert_close(run("parts", 4), run("whole", 1), 1e-6)


def test_pairs_that_cannot_be_spread_evenly_and_axes_that_are_not_there_are_errors():
    make = functools.partial(make_long_horizon_step, [TASK], LEARNED_MOMENTUM)
    with pytest.raises(ValueError, match=r"`num_pairs`=12 must be a multiple of the 8 devices.*; 16 fits"):
        make(dataclasses.replace(LONG, num_pairs=12), mesh=MESH)
    with pytest.raises(
        ValueError, match=r"`axis_name` must be among the axes of `mesh`, \('data',\), got 'x'"
    ):
        make(LONG, mesh=MESH, axis_name="x")
    with pytest.raises(ValueError, match=r"`axis_name`='x' is an axis of a mesh; pass `mesh`, too"):
        make(LONG, axis_name="x")
    with pytest.raises(TypeError, match=r"`mesh` must be a `jax.sharding.Mesh` of devices, got int"):
        make(LONG, mesh=8)
