"""Metrics against dense matrices, and what they owe to gradients that are zero, constant or long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax import SquaredError, gauss_newton
from mlhf_optax.controllers.metrics import diagonal, get_metric, kronecker
from mlhf_optax.support.packing import matrix_shape


def gradients(shape, count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) * np.geomspace(0.1, 10.0, shape[-1]) for _ in range(count)]


def updated(metric, grads):
    state = metric.init(jax.tree.map(jnp.asarray, grads[0]))
    for g in grads:
        state = metric.update(jax.tree.map(jnp.asarray, g), state)
    return state


def dense(times, shape):
    """The matrix of a linear map, column by column."""
    size = int(np.prod(shape))
    columns = [times(jnp.asarray(row.reshape(shape), jnp.float32)) for row in np.eye(size)]
    return np.stack([np.asarray(c, np.float64).ravel() for c in columns], axis=1)


def naive_power(mean, power, floor):
    """A power of a symmetric matrix in units of its mean eigenvalue, mean eigenvalue 1 again."""
    values, vectors = np.linalg.eigh(mean * len(mean) / np.trace(mean))
    powers = (np.maximum(values, 0) + floor) ** power
    return vectors @ np.diag(powers / powers.mean()) @ vectors.T


def running_mean(terms, decay):
    mean = np.zeros_like(terms[0])
    for term in terms:
        mean = decay * mean + (1 - decay) * term
    return mean


@pytest.mark.parametrize("power", [0.25, 0.5, 0.7])
def test_kronecker_is_the_kronecker_product_of_powers_of_running_means(power):
    grads = gradients((4, 3), 8)
    metric = kronecker(power, decay=0.9, floor=0.05)
    state = updated(metric, grads)  # step 8 is one at which the powers are taken anew
    left = naive_power(running_mean([g @ g.T for g in grads], 0.9), power, 0.05)
    right = naive_power(running_mean([g.T @ g for g in grads], 0.9), power, 0.05)
    expected = np.kron(left, right)
    got = dense(lambda v: metric.times(state, v), (4, 3))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    inverse = dense(lambda v: metric.times(state, v, inverse=True), (4, 3))
    np.testing.assert_allclose(inverse @ got, np.eye(12), atol=1e-3)
    np.testing.assert_allclose(np.trace(got) / 12, 1.0, rtol=1e-5)


def test_a_long_side_is_cut_into_blocks_that_know_nothing_of_each_other():
    grads = gradients((5, 2), 4)
    metric = kronecker(0.5, block=2, decay=0.5, floor=0.1)
    state = updated(metric, grads)
    mean = running_mean([g @ g.T for g in grads], 0.5)
    padded = np.zeros((6, 6))
    padded[:5, :5] = mean
    blocks = np.stack([padded[i : i + 2, i : i + 2] for i in (0, 2, 4)])
    # All blocks are measured in the mean eigenvalue of all.
    blocks /= np.trace(padded) / 6
    powers = []
    for block in blocks:
        values, vectors = np.linalg.eigh(block)
        powers.append((vectors, (np.maximum(values, 0) + 0.1) ** 0.5))
    scale = np.mean([values for _, values in powers])
    left = np.zeros((6, 6))
    for index, (vectors, values) in enumerate(powers):
        part = slice(2 * index, 2 * index + 2)
        left[part, part] = vectors @ np.diag(values / scale) @ vectors.T
    right = naive_power(running_mean([g.T @ g for g in grads], 0.5), 0.5, 0.1)
    got = dense(lambda v: metric.times(state, v), (5, 2))
    np.testing.assert_allclose(got, np.kron(left[:5, :5], right), atol=2e-5)


def test_vectors_and_scalars_have_a_diagonal_of_their_own():
    grads = [{"b": np.array([1.0, 3.0]), "s": np.array(2.0)}] * 3
    metric = kronecker(floor=0.0)
    got = metric.times(updated(metric, grads), {"b": jnp.ones(2), "s": jnp.ones(())})
    np.testing.assert_allclose(got["b"], [0.5, 1.5], rtol=1e-5)
    np.testing.assert_allclose(got["s"], 1.0, rtol=1e-5)


def test_the_diagonal_is_the_corrected_root_of_the_running_mean_over_its_mean():
    grads = [
        {"a": np.array([1.0, 2.0]), "b": np.array([[4.0]])},
        {"a": np.array([3.0, 1.0]), "b": np.array([[2.0]])},
    ]
    metric = diagonal(decay=0.9, floor=0.01)
    flat = [np.concatenate([g["a"], g["b"].ravel()]) for g in grads]
    mean = running_mean([f**2 for f in flat], 0.9) / (1 - 0.9**2)
    expected = np.sqrt(mean) / np.sqrt(mean).mean() + 0.01
    got = metric.values(updated(metric, grads), grads[0])
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"].ravel()]), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["diagonal", "kronecker"])
def test_zero_gradients_and_dead_inputs_give_finite_products_of_bounded_size(name):
    metric = get_metric(name)
    zeros = [{"k": np.zeros((4, 3)), "b": np.zeros(3)}] * 10
    half = [{"k": g * (np.arange(4) < 2)[:, None], "b": g[0]} for g in gradients((4, 3), 20)]
    vector = {"k": jnp.ones((4, 3)), "b": jnp.ones(3)}
    for grads in (zeros, half):
        state = updated(metric, grads)
        for inverse in (False, True):
            got = metric.times(state, vector, inverse=inverse)
            largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(got))
            assert np.isfinite(largest)
            assert largest < 1e4


def test_powers_are_taken_anew_at_steps_1_2_4_8_and_every_tenth():
    metric, changed, before = kronecker(), [], None
    state = metric.init(jnp.zeros((3, 2)))
    update = jax.jit(metric.update)
    for step, g in enumerate(gradients((3, 2), 30), start=1):
        state = update(jnp.asarray(g, jnp.float32), state)
        power = np.asarray(state.factors.power)
        if before is None or not np.array_equal(power, before):
            changed.append(step)
        before = power
    assert changed == [1, 2, 4, 8, 10, 20, 30]
    assert update._cache_size() == 1


def test_under_vmap_each_training_has_its_own_powers_also_at_other_steps():
    metric = kronecker(refresh_every=4)
    series = jnp.asarray(np.stack([gradients((3, 2), 6, seed) for seed in (1, 2)]), jnp.float32)
    alone = []
    for member, steps in enumerate((6, 5)):  # the second is one step behind
        state = metric.init(series[0, 0])
        for g in series[member, :steps]:
            state = metric.update(g, state)
        alone.append(state)
    states = [metric.init(series[0, 0]), metric.init(series[0, 0])]
    states[0] = metric.update(series[0, 0], states[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    rest = jnp.stack([series[0, 1:6], series[1, :5]])
    step = lambda state, g: (jax.vmap(metric.update)(g, state), None)
    stacked, _ = jax.jit(lambda s: jax.lax.scan(step, s, rest.swapaxes(0, 1)))(stacked)
    for member in range(2):
        own = jax.tree.map(lambda leaf: leaf[member], stacked)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), own, alone[member])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 16, 32), (144, 32)),
        ((7,), None),
        ((), None),
        ((1, 7), None),
        ((6, 2, 3), (6, 6)),
        ((5, 4), (5, 4)),
    ],
)
def test_tensors_are_matrices_split_where_they_are_nearest_to_a_square(shape, expected):
    assert matrix_shape(shape) == expected


@pytest.mark.parametrize("metric", ["identity", "diagonal", "kronecker"])
def test_it_is_a_damped_gauss_newton_step_in_the_metric(metric):
    """Against the dense system at the second step, where all are known."""
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
        "label": jnp.asarray(rng.normal(size=(6, 2))),
    }
    batch = jax.tree.map(lambda x: x.astype(jnp.float32), batch)
    predict_fn, loss_fn = lambda w, b: b["x"] @ w, SquaredError()
    loss = lambda w: loss_fn(predict_fn(w, batch), batch)
    rule = get_metric(metric)
    # The linear part is solved to the end, so that the start does not matter.
    tx = gauss_newton(
        1.0, predict_fn, loss_fn, damping=0.3, metric=metric, num_cg_steps=12, max_update_ratio=None
    )
    w = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
    state, own = tx.init(w), rule.init(w)
    initial_rms = np.sqrt(np.mean(np.square(np.asarray(w))))
    for _ in range(2):
        g = jax.grad(loss)(w)
        own = rule.update(g, own)
        updates, state = tx.update(g, state, w, batch=batch)
        ggn = np.kron(np.asarray(batch["x"]).T @ np.asarray(batch["x"]) / 12, np.eye(2))
        scale = 0.3 * np.sqrt(np.mean(np.square(np.asarray(g)))) / initial_rms
        system = ggn + scale * dense(lambda v: rule.times(own, v), (3, 2))  # noqa: B023
        expected = -np.linalg.solve(system, np.asarray(g, np.float64).ravel())
        np.testing.assert_allclose(np.ravel(updates), expected, rtol=2e-3, atol=1e-5)
        w = w + updates


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: kronecker(power=0.0), r"`power` must be in \(0, 1\]"),
        (lambda: kronecker(block=0), "`block` must be at least 1"),
        (lambda: kronecker(refresh_every=0), "`refresh_every` must be at least 1"),
        (lambda: diagonal(decay=1.0), "`decay` must be in"),
        (lambda: diagonal(floor=-1.0), "`floor` must be a number >= 0"),
        (lambda: get_metric("shampoo"), "`metric` must be one of 'identity', 'diagonal', 'kronecker'"),
    ],
)
def test_wrong_numbers_and_names_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_many_decompositions_in_a_loop_of_trainings_side_by_side_end():
    """On a CPU with one thread they waited for each other for ever; CI runs with one thread."""
    metric, params = kronecker(refresh_every=2), {name: jnp.ones((24, 20)) for name in "abc"}

    def run(key):
        def step(state, k):
            keys = dict(zip("abc", jax.random.split(k, 3), strict=True))
            g = {name: jax.random.normal(own, (24, 20)) for name, own in keys.items()}
            state = metric.update(g, state)
            return state, jnp.sum(metric.times(state, g, inverse=True)["a"])

        return jax.lax.scan(step, metric.init(params), jax.random.split(key, 5))[1]

    assert np.isfinite(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4))).all()


def test_it_may_solve_for_the_running_mean_of_gradients_in_a_unit_that_small_gradients_do_not_shrink():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 3))
    batch = {"x": jnp.asarray(x, jnp.float32), "label": jnp.zeros(6)}
    predict_fn, loss_fn = lambda w, b: b["x"] @ w, SquaredError()
    options = {"damping": 0.5, "num_cg_steps": 12, "max_update_ratio": None}
    tx = gauss_newton(1.0, predict_fn, loss_fn, gradient_decay=0.8, unit_decay=0.9, **options)
    w = jnp.asarray(rng.normal(size=3), jnp.float32)
    rms = lambda g: np.sqrt(np.mean(np.square(g)))
    # The second gradient is as one of a mini-batch that is solved already.
    first, second = rng.normal(size=3), 1e-3 * rng.normal(size=3)
    _, state = tx.update(jnp.asarray(first, jnp.float32), tx.init(w), w, batch=batch)
    np.testing.assert_allclose(state[0].info.damping_mean, 0.5 * rms(first) / rms(np.asarray(w)), rtol=1e-5)
    updates, state = tx.update(jnp.asarray(second, jnp.float32), state, w, batch=batch)
    running = np.sqrt((0.9 * rms(first) ** 2 + rms(second) ** 2) * 0.1 / (1 - 0.9**2))
    damping = 0.5 * running / rms(np.asarray(w))
    np.testing.assert_allclose(state[0].info.damping_mean, damping, rtol=1e-5)
    mean = (0.8 * first + second) * 0.2 / (1 - 0.8**2)
    expected = -np.linalg.solve(x.T @ x / 6 + damping * np.eye(3), mean)
    np.testing.assert_allclose(updates, expected, rtol=2e-3, atol=1e-5)
    for name in ("gradient_decay", "unit_decay"):
        with pytest.raises(ValueError, match=rf"`{name}` must be in \[0, 1\)"):
            gauss_newton(1.0, predict_fn, loss_fn, **{name: 1.0})
