"""The transformation against Algorithm 1 in NumPy, and what it does when something goes wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

from mlhf_optax import AUTHORS_SETTINGS, PAPER_SETTINGS, Settings, mlhf

# Together they cover every value of every setting.
SETTINGS = {
    "paper": PAPER_SETTINGS,
    "authors": AUTHORS_SETTINGS,
    "log-exp-jacobi": Settings(preconditioner_form="jacobi", damping_floor=1e-2, output_scale=2.0),
    "global-exp-multiply": Settings(
        input_features="log-global", preconditioner_form="multiply", initial_preconditioner=0.1, log_range=7.0
    ),
    "tanh-exp-current": Settings(
        input_features="tanh", initial_damping=10.0, output_scale=1.0, preconditioner_residual="current"
    ),
}


@pytest.mark.parametrize(("name", "max_update_ratio"), [*((n, None) for n in SETTINGS), ("paper", 0.05)])
def test_ten_steps_agree_with_algorithm_1_in_numpy(x64, name, max_update_ratio):
    meta_params = problems.random_meta_params(SETTINGS[name])
    meta_params = jax.tree.map(lambda x: x.astype(jnp.float64), meta_params)
    params = problems.mlp_params()
    batches = problems.batches(10)
    expected = references.naive_mlhf(
        meta_params,
        references.Model(),
        problems.flat(params),
        batches,
        learning_rate=0.7,
        max_update_ratio=max_update_ratio,
    )
    tx = mlhf(
        0.7,
        meta_params,
        problems.mlp,
        problems.LOSS,
        max_update_ratio=max_update_ratio,
        carry_dtype=jnp.float64,
    )

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(problems.mlp_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for batch, reference in zip(batches, expected, strict=True):
        params, state, loss = step(params, state, batch)
        own = state[0]
        close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
        close(loss, reference.loss)
        close(problems.flat(own.direction), reference.direction)
        close(problems.flat(own.residual), reference.residual)
        close(problems.flat(params), reference.w_next)
        info = own.info
        damping, preconditioner = reference.damping, reference.preconditioner
        # The statistics are float32.
        near = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5)
        near(info.damping_min, damping.min())
        near(info.damping_mean, damping.mean())
        near(info.damping_max, damping.max())
        near(info.preconditioner_min, preconditioner.min())
        near(info.preconditioner_mean, preconditioner.mean())
        near(info.preconditioner_max, preconditioner.max())
        near(info.descent, reference.direction @ reference.gradient)
        near(info.cg_residual_norm, np.linalg.norm(reference.residual))
    assert int(state[0].count) == 10
    assert int(state[0].info.skipped_steps) == 0
