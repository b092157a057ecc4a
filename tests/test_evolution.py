"""Evolution of meta-parameters on whole trainings."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlhf_optax.meta_training import (
    EvolutionConfig,
    Schedule,
    Validation,
    make_evolution_step,
    meta_train,
    unrolled_optimizer,
)

# A parabola of curvature 1 to 10 whose best learning rate lies near 0.2; the meta-parameter is its logarithm.
TASK = SimpleNamespace(
    init_fn=lambda key: jnp.ones(4) + 0.1 * jax.random.normal(key, (4,)),
    predict_fn=lambda w, batch: w,
    loss_fn=lambda w, batch: 0.5 * jnp.sum(batch * w**2),
)
LEARNED = unrolled_optimizer(
    lambda log_rate, task: optax.with_extra_args_support(optax.sgd(jnp.exp(log_rate["rate"]))),
    lambda trajectory: trajectory.losses[-1],
)
CURVATURE = jnp.array([1.0, 2.0, 5.0, 10.0])
BATCHES = (jnp.broadcast_to(CURVATURE, (10, 4)), CURVATURE)
CONFIG = EvolutionConfig(num_pairs=4, sigma=0.1, steps=(5, 10), learning_rate=0.1)


def evolve(start, num_iterations, config=CONFIG):
    init, step = make_evolution_step(TASK, LEARNED, config)
    state, scores = init(jax.random.key(0), {"rate": jnp.float32(start)}), []
    for _ in range(num_iterations):
        state, metrics = step(state, BATCHES)
        scores.append(float(metrics["score"]))
    return state, scores


def test_the_score_of_whole_trainings_falls_from_either_side():
    for start in (-5.0, -0.5):  # far too cautious; diverging, with losses that are still finite
        state, scores = evolve(start, 60)
        assert scores[-1] < scores[0] - 1.0
        assert 0.1 < float(jnp.exp(state.meta_params["rate"])) < 0.25
    assert int(state.iteration) == 60


def test_members_in_chunks_are_the_same_members():
    whole, in_chunks = (
        evolve(-2.0, 3, EvolutionConfig(num_pairs=4, steps=(5, 10), chunk=chunk)) for chunk in (None, 2)
    )
    np.testing.assert_allclose(whole[1], in_chunks[1], rtol=1e-5)
    np.testing.assert_allclose(whole[0].meta_params["rate"], in_chunks[0].meta_params["rate"], rtol=1e-5)


def test_members_that_diverge_are_counted_and_cannot_poison_the_search():
    state, scores = evolve(60.0, 2)
    assert int(state.counts["diverged"]) == 2 * 8
    assert np.isfinite(state.meta_params["rate"])
    np.testing.assert_allclose(scores, np.log(1000.0), rtol=1e-5)


def test_it_takes_the_place_of_the_meta_step_in_a_meta_training(tmp_path):
    def run(iterations, **kwargs):
        return meta_train(
            TASK,
            LEARNED,
            {"rate": jnp.float32(-5.0)},
            lambda key: BATCHES,
            lambda meta_params: Validation(meta_params["rate"], jnp.zeros(1), jnp.zeros(())),
            kwargs.pop("folder", tmp_path),
            Schedule(iterations, checkpoint_every=2),
            algorithm=make_evolution_step(TASK, LEARNED, CONFIG),
            **kwargs,
        )

    run(2)
    resumed = run(4, resume=True)
    alone = run(4, folder=tmp_path / "alone")
    np.testing.assert_array_equal(resumed.state.meta_params["rate"], alone.state.meta_params["rate"])
    assert float(alone.state.meta_params["rate"]) != -5.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_pairs", 0, "`num_pairs` must be positive, got 0"),
        ("sigma", 0.0, "`sigma` must be positive"),
        ("learning_rate", -1.0, "`learning_rate` must be positive"),
        ("steps", (5, 5), "`steps` must be increasing"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(name, value, message):
    with pytest.raises(ValueError, match=message):
        EvolutionConfig(**{name: value})
