"""Problems without noise: eight differential equations, regression on all data, and where their answer is."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = list[tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss without noise.

    Attributes:
      sizes: of the layers of a tanh network.
      batch: all of the data.
      predict_fn: residuals, for the optimizers.
      loss_fn: the loss of the residuals.
      error: ``error(params)``, what the figure shows: the relative L2 error of the solution on points apart,
        or the loss where there is no solution.
      dtype: of parameters and data.
    """

    sizes: tuple[int, ...]
    batch: Any
    predict_fn: Callable[[Any, Any], Any]
    loss_fn: Callable[[Any, Any], jax.Array]
    error: Callable[[Any], jax.Array]
    dtype: str = "float64"

    def init(self, key: jax.Array) -> Params:
        """Returns parameters; entries of a matrix have the variance of one over its inputs."""
        params = []
        for m, n in zip(self.sizes[:-1], self.sizes[1:], strict=True):
            key, matrix, bias = jax.random.split(key, 3)
            weights = jax.random.normal(matrix, (n, m)) / m**0.5
            params.append((weights, 0.1 * jax.random.normal(bias, (n,))))
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)


def network(params: Params, x: jax.Array) -> jax.Array:
    """Returns the output of a tanh network at one point."""
    for weights, bias in params[:-1]:
        x = jnp.tanh(weights @ x + bias)
    weights, bias = params[-1]
    return (weights @ x + bias)[0]


Field = Callable[[jax.Array], jax.Array]


def _second(u: Field, x: jax.Array, axis: int) -> jax.Array:
    along = lambda y: jax.jvp(u, (y,), (jnp.eye(x.size, dtype=x.dtype)[axis],))[1]
    return jax.jvp(along, (x,), (jnp.eye(x.size, dtype=x.dtype)[axis],))[1]


def _laplacian(u: Field, x: jax.Array) -> jax.Array:
    return sum((_second(u, x, axis) for axis in range(x.size)), jnp.zeros((), x.dtype))


def _equation(
    sizes: tuple[int, ...],
    inside: Callable[[Field, jax.Array], jax.Array],
    points: Any,
    test: tuple[np.ndarray, np.ndarray],
    *,
    values: tuple[Any, Any] | None = None,
    periods: tuple[Any, Any] | None = None,
    dtype: str = "float64",
) -> Problem:
    """Returns the problem of an equation, with a loss of mean squares.

    Args:
      sizes: of the network.
      inside: ``inside(u, x)``, the residual at a point.
      points: where the equation has to hold.
      test: points apart and the solution there.
      values: points and what u has to be there.
      periods: pairs of points where u has to be the same.
      dtype: of all.
    """
    cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
    batch = {"inside": points}
    batch |= {} if values is None else {"at": values[0], "value": values[1]}
    batch |= {} if periods is None else {"left": periods[0], "right": periods[1]}

    def predict_fn(params: Params, batch: Any) -> dict[str, jax.Array]:
        u = lambda x: network(params, x)
        outputs = {"inside": jax.vmap(lambda x: inside(u, x))(batch["inside"])}
        if "at" in batch:
            outputs["value"] = jax.vmap(u)(batch["at"]) - batch["value"]
        if "left" in batch:
            outputs["period"] = jax.vmap(u)(batch["left"]) - jax.vmap(u)(batch["right"])
        return outputs

    def error(params: Params) -> jax.Array:
        x, solution = cast(test)
        difference = jax.vmap(lambda point: network(params, point))(x) - solution
        return jnp.sqrt(jnp.mean(difference**2) / jnp.mean(solution**2))

    def loss_fn(outputs: Any, batch: Any) -> jax.Array:
        del batch
        return jnp.sum(jnp.stack([jnp.mean(leaf**2) for leaf in jax.tree.leaves(outputs)]))

    return Problem(sizes, cast(batch), predict_fn, loss_fn, error, dtype)


def _grid(first: Any, second: Any) -> np.ndarray:
    return np.stack(np.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)


def _edges(low: float, high: float, count: int) -> np.ndarray:
    """Returns points on the boundary of a square."""
    line = np.linspace(low, high, count)
    sides = [_grid(line, [low]), _grid(line, [high]), _grid([low], line[1:-1]), _grid([high], line[1:-1])]
    return np.concatenate(sides)


def _sides(start: Callable[[np.ndarray], np.ndarray], x: np.ndarray, t: np.ndarray) -> tuple[Any, Any]:
    """Returns points at the start and on both ends, where u is zero, with the values there."""
    ends = np.concatenate([_grid([x[0]], t[1:]), _grid([x[-1]], t[1:])])
    at = np.concatenate([_grid(x, [t[0]]), ends])
    return at, np.concatenate([start(x), np.zeros(len(ends))])


def poisson(*hidden: int, dtype: str = "float64") -> Problem:
    """-Laplace u = 2 pi^2 sin(pi x) sin(pi y) on the unit square, u = 0 on its boundary."""
    solution = lambda x: np.prod(np.sin(np.pi * x), -1)
    line, edge, test = np.linspace(0, 1, 30), _edges(0, 1, 30), _grid(*2 * [np.linspace(0, 1, 101)])
    force = lambda x: 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))
    inside = lambda u, x: _laplacian(u, x) + force(x)
    values, points = (edge, np.zeros(len(edge))), _grid(line, line)
    return _equation((2, *hidden, 1), inside, points, (test, solution(test)), values=values, dtype=dtype)


def poisson_5d() -> Problem:
    """-Laplace u = pi^2 sum_i sin(pi x_i) on the unit cube in five dimensions, 10,065 parameters."""
    rng = np.random.default_rng(0)
    solution = lambda x: np.sum(np.sin(np.pi * x), -1)
    inside = lambda u, x: _laplacian(u, x) + jnp.pi**2 * jnp.sum(jnp.sin(jnp.pi * x))
    edge = rng.random((500, 5))
    edge[np.arange(500), rng.integers(5, size=500)] = rng.integers(2, size=500)
    test = rng.random((4000, 5))
    sizes = (5, 64, 64, 48, 48, 1)
    points, values = rng.random((3000, 5)), (edge, solution(edge))
    return _equation(sizes, inside, points, (test, solution(test)), values=values)


def heat(dtype: str = "float64") -> Problem:
    """u_t = u_xx / 4, u = sin(pi x) at the start, 0 at both ends."""
    solution = lambda z: np.exp(-(np.pi**2) * z[:, 1] / 4) * np.sin(np.pi * z[:, 0])
    inside = lambda u, z: jax.grad(u)(z)[1] - _second(u, z, 0) / 4
    line, test = np.linspace(0, 1, 30), _grid(*2 * [np.linspace(0, 1, 101)])
    values = _sides(lambda x: np.sin(np.pi * x), line, line)
    points = _grid(line, line)
    return _equation((2, 32, 1), inside, points, (test, solution(test)), values=values, dtype=dtype)


def helmholtz() -> Problem:
    """Laplace u + u = q on (-1, 1)^2 with the solution sin(pi x) sin(4 pi y)."""
    solution = lambda x: np.sin(np.pi * x[:, 0]) * np.sin(4 * np.pi * x[:, 1])
    wave = lambda x: jnp.sin(jnp.pi * x[0]) * jnp.sin(4 * jnp.pi * x[1])
    inside = lambda u, x: _laplacian(u, x) + u(x) + (17 * jnp.pi**2 - 1) * wave(x)
    test, edge = _grid(*2 * [np.linspace(-1, 1, 101)]), _edges(-1, 1, 30)
    points = _grid(np.linspace(-1, 1, 25), np.linspace(-1, 1, 50))
    values = (edge, np.zeros(len(edge)))
    return _equation((2, 32, 32, 1), inside, points, (test, solution(test)), values=values)


def convection(speed: float = 30.0) -> Problem:
    """u_t + 30 u_x = 0, periodic in x, u = sin(x) at the start."""
    solution = lambda z: np.sin(z[:, 0] - speed * z[:, 1])

    def inside(u: Field, z: jax.Array) -> jax.Array:
        slopes = jax.grad(u)(z)
        return slopes[1] + speed * slopes[0]

    x, t = np.linspace(0, 2 * np.pi, 31), np.linspace(0, 1, 31)
    test = _grid(np.linspace(0, 2 * np.pi, 101), np.linspace(0, 1, 101))
    values, periods = (_grid(x, [0.0]), np.sin(x)), (_grid([0.0], t), _grid([2 * np.pi], t))
    points = _grid(x, t)
    return _equation((2, 32, 32, 1), inside, points, (test, solution(test)), values=values, periods=periods)


def burgers() -> Problem:
    """u_t + u u_x = 0.01 / pi u_xx, u = -sin(pi x) at the start, 0 at both ends."""
    nu = 0.01 / np.pi

    def inside(u: Field, z: jax.Array) -> jax.Array:
        slopes = jax.grad(u)(z)
        return slopes[1] + u(z) * slopes[0] - nu * _second(u, z, 0)

    test = _grid(np.linspace(-1, 1, 101), np.linspace(0, 1, 51))
    x, t = np.linspace(-1, 1, 51), np.linspace(0, 1, 26)
    values = _sides(lambda x: -np.sin(np.pi * x), x, t)
    return _equation((2, 24, 24, 1), inside, _grid(x, t), (test, _cole_hopf(test, nu)), values=values)


def _cole_hopf(z: np.ndarray, nu: float) -> np.ndarray:
    """Returns the solution of Burgers' equation, an integral of Gaussian weight.

    Source: Basdevant and others, Spectral and finite difference solutions of the Burgers equation, 1986.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    x, t = z[:, :1], z[:, 1:]
    y = x - nodes * np.sqrt(4 * nu * t)
    log_density = -np.cos(np.pi * y) / (2 * np.pi * nu)
    density = weights * np.exp(log_density - log_density.max(1, keepdims=True))
    return -(density * np.sin(np.pi * y)).sum(1) / density.sum(1)


def allen_cahn() -> Problem:
    """u_t = 1e-4 u_xx + 5 (u - u^3), periodic in x, u = x^2 cos(pi x) at the start."""
    start = lambda x: x**2 * np.cos(np.pi * x)

    def inside(u: Field, z: jax.Array) -> jax.Array:
        value = u(z)
        return jax.grad(u)(z)[1] - 1e-4 * _second(u, z, 0) - 5 * (value - value**3)

    x, t = np.linspace(-1, 1, 51), np.linspace(0, 1, 26)
    values, periods = (_grid(x, [0.0]), start(x)), (_grid([-1.0], t), _grid([1.0], t))
    grid, times, solution = _allen_cahn_solution(start)
    test = (_grid(grid, times), solution.T.reshape(-1))
    return _equation((2, 24, 24, 1), inside, _grid(x, t), test, values=values, periods=periods)


def _allen_cahn_solution(start: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, ...]:
    """Returns points, times and values, by a Fourier series in x and steps of fourth order in t."""
    x, steps = np.linspace(-1, 1, 512, endpoint=False), 2000
    decay = -1e-4 * (np.pi * np.fft.rfftfreq(512, 1 / 512)) ** 2
    half = np.exp(decay / (2 * steps))  # the linear part is solved exactly
    force = lambda v: 5 * np.fft.rfft((u := np.fft.irfft(v)) - u**3) / steps
    v, found = np.fft.rfft(start(x)), []
    for step in range(steps + 1):
        if step % (steps // 50) == 0:
            found.append(np.fft.irfft(v)[::4])
        a = force(v)
        b = force(half * (v + a / 2))
        c = force(half * v + b / 2)
        d = force(half**2 * v + half * c)
        v = half**2 * v + (half**2 * a + 2 * half * (b + c) + d) / 6
    return x[::4], np.linspace(0, 1, 51), np.stack(found)


def regression(sizes: tuple[int, ...], x: np.ndarray, y: np.ndarray) -> Problem:
    """Returns a regression on all examples; its error is the loss."""
    batch = {"x": jnp.asarray(x, "float64"), "y": jnp.asarray(y, "float64")}
    predict_fn = lambda params, batch: jax.vmap(lambda x: network(params, x))(batch["x"]) - batch["y"]
    loss_fn = lambda outputs, batch: jnp.mean(outputs**2)
    return Problem(sizes, batch, predict_fn, loss_fn, lambda p: loss_fn(predict_fn(p, batch), batch))


def diabetes() -> Problem:
    """The diabetes data of scikit-learn, 442 examples, standardised."""
    from sklearn import datasets

    x, y = datasets.load_diabetes(return_X_y=True)
    scaled = lambda a: (a - a.mean(0)) / a.std(0)
    return regression((10, 32, 1), scaled(np.asarray(x)), scaled(np.asarray(y)))


def teacher() -> Problem:
    """A network 100-64-64-1 that learns 2,000 values of another."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 100))
    hidden = np.tanh(np.tanh(x @ rng.normal(size=(100, 64)) / 10) @ rng.normal(size=(64, 64)) / 8)
    return regression((100, 64, 64, 1), x, hidden @ rng.normal(size=64) / 8)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "poisson": lambda: poisson(32),
    "poisson-deep": lambda: poisson(32, 32),
    "heat": heat,
    "helmholtz": helmholtz,
    "allen-cahn": allen_cahn,
    "burgers": burgers,
    "convection": convection,
    "poisson-5d": poisson_5d,
    "poisson-float32": lambda: poisson(32, dtype="float32"),
    "heat-float32": lambda: heat("float32"),
    "diabetes": diabetes,
    "teacher": teacher,
}
