"""The solver against NumPy, and its gradients against finite differences, mostly in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from mlhf_optax.controllers import Quotient, Scale
from mlhf_optax.pcg import pcg, pcg_from_direction

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")

N = 6


def system(seed=0, n=N, condition=50.0):
    """A random symmetric positive definite matrix, a right-hand side, a start and a preconditioner."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    eigenvalues = np.geomspace(1.0, condition, n)
    return (q * eigenvalues) @ q.T, rng.normal(size=n), rng.normal(size=n), rng.uniform(0.3, 3.0, size=n)


@functools.partial(jax.jit, static_argnames=("num_steps", "operator", "kwargs"))
def solve(matrix, b, x0=None, values=None, *, num_steps, operator=Quotient, kwargs=()):
    preconditioner = None if values is None else operator(values)
    return pcg(
        lambda v: matrix @ v, b, x0, num_steps=num_steps, preconditioner=preconditioner, **dict(kwargs)
    )


@pytest.mark.parametrize("seed", range(3))
def test_n_steps_solve_a_system_of_n_unknowns(seed):
    matrix, b, x0, preconditioner = system(seed)
    want = np.linalg.solve(matrix, b)
    for start, scale in ((None, None), (x0, None), (x0, preconditioner)):
        x, residual, info = solve(matrix, b, start, scale, num_steps=N)
        np.testing.assert_allclose(x, want, rtol=1e-6)
        np.testing.assert_allclose(residual, np.zeros(N), atol=1e-5)
        assert int(info.steps) == N


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_every_step_is_that_of_the_textbook(num_steps):
    matrix, b, x0, preconditioner = system()
    ones = np.ones(N)
    cases = [
        (None, None, Quotient, np.zeros(N), ones),
        (x0, None, Quotient, x0, ones),
        (x0, preconditioner, Quotient, x0, 1 / preconditioner),
        (x0, preconditioner, Scale, x0, preconditioner),
    ]
    for start, values, operator, start_vector, inverse in cases:
        x, residual, info = solve(matrix, b, start, values, num_steps=num_steps, operator=operator)
        want_x, want_residual = references.naive_pcg(matrix, b, start_vector, inverse, num_steps)
        np.testing.assert_allclose(x, want_x, rtol=1e-7)
        np.testing.assert_allclose(residual, want_residual, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(residual, b - matrix @ x, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(info.residual_norm, np.linalg.norm(want_residual), rtol=1e-6)
        assert int(info.steps) == num_steps


def test_the_preconditioner_may_be_any_function_and_the_exact_one_needs_one_step():
    matrix, b, x0, _ = system()
    exact = lambda r: jnp.linalg.solve(matrix, r)
    x, _, info = jax.jit(lambda: pcg(lambda v: matrix @ v, b, x0, num_steps=4, preconditioner=exact))()
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-9)
    assert int(info.steps) <= 2  # the second one corrects rounding, if anything


@pytest.mark.parametrize("unroll", [False, 2])
def test_the_loop_may_be_rolled(unroll):
    matrix, b, x0, preconditioner = system()
    want = solve(matrix, b, x0, preconditioner, num_steps=4)
    got = solve(matrix, b, x0, preconditioner, num_steps=4, kwargs=(("unroll", unroll),))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9), got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_steps_past_convergence_change_nothing_any_more(dtype):
    matrix, b, x0, preconditioner = (jnp.asarray(x, dtype) for x in system())
    x, residual, info = solve(matrix, b, x0, preconditioner, num_steps=60, kwargs=(("unroll", False),))
    precision = 1e-4 if dtype == jnp.float32 else 1e-10
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=precision)
    np.testing.assert_allclose(residual, np.zeros(N), atol=precision)
    assert int(info.steps) < 30


def test_a_zero_right_hand_side_needs_no_step_from_zero_and_returns_to_zero_from_elsewhere():
    matrix, _, x0, _ = system()
    x, residual, info = solve(matrix, np.zeros(N), num_steps=4)
    assert not x.any()
    assert not residual.any()
    assert int(info.steps) == 0
    np.testing.assert_allclose(solve(matrix, np.zeros(N), x0, num_steps=N)[0], np.zeros(N), atol=1e-9)


def test_a_start_at_the_solution_stays_there_and_a_singular_but_consistent_system_is_solved():
    matrix = np.diag([1.0, 2.0, 4.0])
    x, _, info = solve(matrix, matrix @ np.ones(3), np.ones(3), num_steps=10)
    np.testing.assert_array_equal(x, np.ones(3))
    assert int(info.steps) == 0
    matrix = np.diag([1.0, 3.0, 0.0])
    x, residual, _ = solve(matrix, np.array([2.0, 3.0, 0.0]), num_steps=10)
    np.testing.assert_allclose(x, [2.0, 1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(residual, np.zeros(3), atol=1e-12)


def test_negative_curvature_ends_the_steps_without_harm():
    matrix = np.diag([1.0, 2.0, -3.0])
    x, residual, info = solve(matrix, np.array([1.0, 1.0, 0.1]), num_steps=10)
    assert np.isfinite(x).all()
    assert np.isfinite(residual).all()
    assert int(info.steps) < 10
    np.testing.assert_array_equal(solve(-np.eye(3), np.ones(3), num_steps=3)[0], np.zeros(3))


def test_trees_are_one_vector():
    matrix, b, x0, preconditioner = system()
    split = lambda v: {"a": v[:4].reshape(2, 2), "b": (v[4:],)}
    join = lambda t: jnp.concatenate([t["a"].reshape(-1), t["b"][0]])

    @jax.jit
    def solve_tree(b, x0, values):
        return pcg(lambda t: split(matrix @ join(t)), b, x0, num_steps=3, preconditioner=Quotient(values))

    x, residual, info = solve_tree(*map(split, (b, x0, preconditioner)))
    want = solve(matrix, b, x0, preconditioner, num_steps=3)
    np.testing.assert_allclose(join(x), want[0], rtol=1e-10)
    np.testing.assert_allclose(join(residual), want[1], rtol=1e-10)
    np.testing.assert_allclose(info.residual_norm, want[2].residual_norm, rtol=1e-6)


def test_no_product_is_spent_on_what_is_known():
    matrix, b, x0, _ = system()
    calls = []

    def counted(v):
        calls.append(1)
        return matrix @ v

    def products(*args, **kwargs):
        calls.clear()
        x = jax.jit(lambda: pcg(counted, *args, num_steps=3, **kwargs)[0])()
        return len(calls), x

    # The loop body is traced once, so one call stands for the three steps.
    assert products(b)[0] == 1
    assert products(b, x0)[0] == 2
    count, x = products(b, x0, initial_residual=b - matrix @ x0)
    assert count == 1
    np.testing.assert_allclose(x, products(b, x0)[1], rtol=1e-10)


def test_a_shift_whose_inverse_preconditions_needs_no_product_in_a_step():
    matrix, b, x0, values = system()
    calls = []

    def shift(v):
        calls.append(1)
        return values * v

    inverse, after = lambda r: 0.5 * r / values, lambda r: 0.5 * r
    x, r, info = pcg(
        lambda v: matrix @ v,
        b,
        x0,
        num_steps=3,
        preconditioner=inverse,
        shift=shift,
        shift_after_preconditioner=after,
    )
    whole = pcg(lambda v: matrix @ v + values * v, b, x0, num_steps=3, preconditioner=inverse)
    assert len(calls) == 1
    np.testing.assert_allclose(x, whole[0], rtol=1e-10)
    np.testing.assert_allclose(r, whole[1], atol=1e-10)
    np.testing.assert_allclose(info.shifted, values * x, rtol=1e-10)


# From the direction of the step before.


def naive_from_direction(matrix, b, first, longest, inverse, num_steps):
    """NumPy: an exact step along ``first``, then CG from there that knows nothing of it."""
    x = np.zeros_like(b)
    if first.any():
        x = np.clip(first @ b / (first @ matrix @ first), 0, longest) * first
    return references.naive_pcg(matrix, b, x, inverse, num_steps)


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("case", ["fits", "too long", "leads up", "none"])
def test_from_a_direction_each_step_has_its_exact_length(case, unroll):
    matrix, b, _, values = system()
    whole = matrix + np.diag(values)
    solution = np.linalg.solve(whole, b)
    first = {"fits": 1.5 * solution, "too long": 0.1 * solution, "leads up": -solution, "none": 0 * b}[case]
    calls = []

    def inverse(r):
        calls.append(1)
        return 0.5 * r / values

    @jax.jit
    def solve(first):
        return pcg_from_direction(
            lambda v: matrix @ v,
            b,
            first,
            longest=0.9,
            num_steps=2,
            preconditioner=inverse,
            shift=lambda v: values * v,
            shift_after_preconditioner=lambda r: 0.5 * r,
            unroll=unroll,
        )

    x, r, info = solve(first)
    want_x, want_r = naive_from_direction(whole, b, first, 0.9, 0.5 / values, 2)
    np.testing.assert_allclose(x, want_x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(r, want_r, atol=1e-9)
    np.testing.assert_allclose(info.shifted, values * x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(info.residual_norm, np.linalg.norm(want_r), rtol=1e-5, atol=1e-9)
    assert int(info.steps) == {"fits": 1, "too long": 3}.get(case, 2)
    assert len(calls) == 1
    assert float(x @ b) > 0
    # The last residual needs no direction.
    with jax.disable_jit():
        calls.clear()
        np.testing.assert_allclose(solve(first)[0], x, rtol=1e-9)
        assert len(calls) == 2


def test_from_any_direction_the_solution_leads_down_and_lowers_the_quadratic_model():
    random = np.random.default_rng(1)
    for seed in range(20):
        matrix, b, first, values = system(seed)
        whole = matrix + np.diag(values)
        same = lambda r, values=values: r / values
        x, _, _ = pcg_from_direction(
            lambda v, matrix=matrix: matrix @ v,
            b,
            10 ** random.uniform(-3, 3) * first,
            longest=1.0,
            num_steps=1,
            preconditioner=same,
            shift=lambda v, values=values: values * v,
            shift_after_preconditioner=lambda r: r,
        )
        assert x @ b > 0
        assert 0.5 * x @ whole @ x - x @ b < 0


def test_from_a_direction_derivatives_are_those_of_finite_differences():
    matrix, b, first, values = system()

    @jax.jit
    def outcome(numbers):
        scale, longest = numbers
        x, r, _ = pcg_from_direction(
            lambda v: matrix @ v,
            b,
            first * jnp.sign(first @ b),
            longest=longest,
            num_steps=2,
            preconditioner=lambda r: r / (scale * values),
            shift=lambda v: scale * values * v,
            shift_after_preconditioner=lambda r: r,
            unroll=False,
        )
        return jnp.sum(x**2) + jnp.sum(r * b)

    for at in ((0.7, 0.01), (0.7, 50.0)):
        at = jnp.array(at)
        steps = 1e-6 * jnp.eye(2)
        want = [(outcome(at + e) - outcome(at - e)) / 2e-6 for e in steps]
        np.testing.assert_allclose(jax.grad(outcome)(at), want, rtol=1e-5, atol=1e-7)


# Tolerance.


@pytest.mark.parametrize("early_exit", [False, True])
def test_no_step_is_taken_once_the_residual_is_below_the_tolerance(early_exit):
    matrix, b, _, _ = system()
    norms = [np.linalg.norm(references.naive_pcg(matrix, b, np.zeros(N), np.ones(N), k)[1]) for k in range(N)]
    tolerance = 0.5 * (norms[2] + norms[3])
    assert all(norm > tolerance for norm in norms[:3])
    kwargs = (("tolerance", tolerance), ("early_exit", early_exit))
    x, _, info = solve(matrix, b, num_steps=20, kwargs=kwargs)
    assert int(info.steps) == 3
    np.testing.assert_allclose(x, solve(matrix, b, num_steps=3)[0], rtol=1e-10)


def test_leaving_early_and_idling_to_the_end_agree_also_under_vmap():
    systems = [system(seed, condition=condition) for seed, condition in enumerate([1.01, 3.0, 1e2])]
    matrices, bs, x0s, preconditioners = (np.stack(x) for x in zip(*systems, strict=True))
    results = []
    for early_exit in (True, False):
        one = lambda *args, e=early_exit: solve(
            *args, num_steps=8, kwargs=(("tolerance", 0.1), ("early_exit", e))
        )
        results.append(jax.vmap(one)(matrices, bs, x0s, preconditioners))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), *results)
    steps = results[0][2].steps
    assert len(set(steps.tolist())) > 1
    for i, (matrix, b, x0, preconditioner) in enumerate(systems):
        alone = solve(matrix, b, x0, preconditioner, num_steps=8, kwargs=(("tolerance", 0.1),))
        np.testing.assert_allclose(results[0][0][i], alone[0], rtol=1e-5, atol=1e-5)
        assert int(steps[i]) == int(alone[2].steps)


def test_the_tolerance_may_be_traced():
    matrix, b, _, _ = system()
    traced = jax.jit(lambda t: pcg(lambda v: matrix @ v, jnp.asarray(b), num_steps=8, tolerance=t)[2].steps)
    assert int(traced(1e3)) == 0
    assert int(traced(0.0)) >= N


# Gradients.


def finite_difference(function, x, direction, step=1e-5):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


@pytest.mark.parametrize(
    ("num_steps", "operator"), [(1, Scale), (3, Quotient), (N, Scale), (N + 1, Quotient), (20, Quotient)]
)
def test_gradients_below_at_and_past_convergence(num_steps, operator):
    arguments = system(1, condition=20.0)
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(2, N))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    def outcome(*arguments):
        # Rolled where it is long, which compiles faster.
        options = {"num_steps": num_steps, "operator": operator, "kwargs": (("unroll", num_steps == 3),)}
        x, residual, _ = solve(*arguments, **options)
        return jnp.sum(weights[0] * x) + jnp.sum(weights[1] * residual)

    value = lambda *moved: outcome(*moved)[0]
    _, gradients = outcome(*arguments)
    for i, gradient in enumerate(gradients):
        assert np.isfinite(gradient).all()
        direction = rng.normal(size=np.shape(gradient))
        if i == 0:
            direction = direction + direction.T  # stay symmetric
        along = lambda x, i=i: value(*arguments[:i], x, *arguments[i + 1 :])
        want = finite_difference(along, arguments[i], direction)
        np.testing.assert_allclose(np.sum(gradient * direction), want, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_steps_taken_not_of_the_solution():
    """The implicit derivative of a converged solver is another number after two steps."""
    matrix, b, _, _ = system(1)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(solve(matrix, b, num_steps=2)[0])))(b)
    implicit = np.linalg.solve(matrix, np.ones(N))
    assert np.abs(gradient - implicit).max() > 0.01


@jax.jit
def all_gradients(*arguments):
    def outcome(*arguments):
        x, residual, _ = solve(*arguments, num_steps=6)
        return jnp.sum(jnp.sin(x)) + jnp.sum(residual)

    return jax.grad(outcome, argnums=(0, 1, 2, 3))(*arguments)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_gradient_is_nan_where_a_division_would_be_zero_by_zero(dtype):
    diagonal = np.arange(1.0, 4.0)
    for b in (np.zeros(3), np.ones(3)):
        for x0 in (np.zeros(3), np.arange(3.0), b / diagonal):
            gradients = all_gradients(*(x.astype(dtype) for x in (np.diag(diagonal), b, x0, np.ones(3))))
            assert all(np.isfinite(g).all() for g in gradients)


def test_gradients_of_tiny_right_hand_sides_do_not_underflow_into_nan():
    """The solution is linear in b, so its derivative with respect to P scales with b."""
    matrix, b, x0, preconditioner = (np.asarray(x, np.float32) for x in system())

    @jax.jit
    @jax.grad
    def gradient(preconditioner, b, x0):
        return jnp.sum(solve(matrix, b, x0, preconditioner, num_steps=3)[0])

    want = gradient(preconditioner, b, x0)
    for scale in np.float32([1e-8, 1e-12, 1e-25]):
        got = gradient(preconditioner, scale * b, scale * x0)
        if scale < 1e-20:  # the squares in the inner products are below float32
            want = np.zeros(N)
        np.testing.assert_allclose(got / scale, want, rtol=1e-2, atol=1e-4)


def test_gradients_flow_through_a_scan_of_solves_with_warm_starts():
    matrix, b, x0, preconditioner = system(2, condition=10.0)

    def outcome(scale):
        def body(x, _):
            x, residual, _ = solve(matrix, scale * b, x, preconditioner, num_steps=2)
            return x, jnp.sum(residual**2)

        x, losses = jax.lax.scan(body, x0, None, length=3)
        return jnp.sum(losses) + jnp.sum(x)

    outcome = jax.jit(jax.value_and_grad(outcome))
    want = finite_difference(lambda scale: outcome(scale)[0], 1.3, 1.0)
    np.testing.assert_allclose(outcome(1.3)[1], want, rtol=1e-6)


# Low precision.


def test_bfloat16_vectors_stay_bfloat16_and_their_scalars_do_not():
    matrix, b, x0, preconditioner = system(condition=5.0)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (b, x0, preconditioner)]
    matvec = lambda v: (jnp.asarray(matrix, jnp.float32) @ v.astype(jnp.float32)).astype(v.dtype)
    for early_exit in (False, True):
        options = {"num_steps": 4, "tolerance": 1e-3, "early_exit": early_exit}
        x, residual, info = pcg(matvec, *low[:2], preconditioner=Quotient(low[2]), **options)
        assert (x.dtype, residual.dtype, info.residual_norm.dtype) == (
            jnp.bfloat16,
            jnp.bfloat16,
            jnp.float32,
        )
        exact, _ = references.naive_pcg(matrix, b, x0, 1 / preconditioner, 4)
        np.testing.assert_allclose(x.astype(float), exact, atol=0.05)


# Errors.


def test_a_number_of_steps_that_is_negative_or_no_int_is_an_error():
    for num_steps in (2.0, "2", None, True, np.array(2)):
        with pytest.raises(TypeError, match=r"`num_steps` must be a Python int, got .*`static_args`"):
            pcg(lambda v: v, jnp.ones(2), num_steps=num_steps)
    for num_steps in (-1, 10**22):
        with pytest.raises(ValueError, match=rf"`num_steps` must be from 0 to 2\*\*31 - 1, got {num_steps}"):
            pcg(lambda v: v, jnp.ones(2), num_steps=num_steps)
