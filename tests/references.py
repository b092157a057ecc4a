"""Slow and plain second implementations of the mathematics, for the tests to compare with.

Everything here works on flat vectors and dense matrices, in NumPy and float64, and uses neither
JAX's derivatives nor the package (the one exception, :func:`dense_ggn`, uses dense Jacobians of
JAX where a model is too large to write down twice). Derivatives come from the complex step
``f'(x) = Im f(x + ih) / h``, which has no cancellation and is exact to rounding for the analytic
functions used here.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

# --- curvature


def dense_ggn(predict_fn, loss_fn, params, batch) -> np.ndarray:
    """J^T H_l J as a matrix, from the full Jacobian and the full Hessian of the loss."""
    flat_params, unravel = ravel_pytree(params)

    @jax.jit
    def jacobian_and_hessian(flat_params):
        flat_outputs, unravel_outputs = ravel_pytree(predict_fn(params, batch))
        jacobian = jax.jacobian(lambda w: ravel_pytree(predict_fn(unravel(w), batch))[0])(flat_params)
        return jacobian, jax.hessian(lambda z: loss_fn(unravel_outputs(z), batch))(flat_outputs)

    jacobian, hessian = map(np.asarray, jacobian_and_hessian(flat_params))
    return jacobian.T @ hessian @ jacobian


def columns(matvec, example) -> np.ndarray:
    """The matrix of a linear function on pytrees shaped like `example`, one column at a time."""
    flat, unravel = ravel_pytree(example)
    product = jax.jit(lambda v: ravel_pytree(matvec(unravel(v)))[0])
    units = np.eye(flat.size, dtype=flat.dtype)
    return np.stack([np.asarray(product(unit)) for unit in units], axis=1)


def complex_step_jacobian(function: Callable, x: np.ndarray) -> np.ndarray:
    """d function(x) / dx as a matrix, for a complex-analytic function of a real vector."""
    step = 1e-30
    result = []
    for i in range(x.size):
        moved = x.astype(complex)
        moved[i] += 1j * step
        result.append(np.imag(function(moved)) / step)
    return np.stack(result, axis=-1)


# --- preconditioned conjugate gradient


def naive_pcg(matrix, b, x0, inverse_preconditioner, num_steps):
    """The paper's supplementary Algorithm 1 with a dense matrix; returns x and the residual."""
    x = x0.copy()
    r = b - matrix @ x
    y = inverse_preconditioner * r
    p = y
    for _ in range(num_steps):
        alpha = (r @ y) / (p @ matrix @ p)
        x = x + alpha * p
        r_next = r - alpha * (matrix @ p)
        y_next = inverse_preconditioner * r_next
        beta = (r_next @ y_next) / (r @ y)
        p = y_next + beta * p
        r, y = r_next, y_next
    return x, r


# --- the LSTM of one coordinate


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def naive_lstm(weights, carry, inputs):
    """One step of the LSTM on one coordinate.

    `weights` has `layers` of (kernel, bias) with gates i, f, g, o, `output_kernel` and
    `output_bias`; `carry` is a list of (cell, hidden); `inputs` is a vector of features.
    """
    hidden = np.asarray(inputs)
    next_carry = []
    for layer, (old_cell, old_hidden) in zip(weights.layers, carry, strict=True):
        kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
        units = len(old_cell)
        seen = np.concatenate([hidden, old_hidden])
        gate = [
            kernel[k * units : (k + 1) * units] @ seen + bias[k * units : (k + 1) * units] for k in range(4)
        ]
        cell = sigmoid(gate[1]) * old_cell + sigmoid(gate[0]) * np.tanh(gate[2])
        hidden = sigmoid(gate[3]) * np.tanh(cell)
        next_carry.append((cell, hidden))
    return float(np.asarray(weights.output_kernel) @ hidden + np.asarray(weights.output_bias)), next_carry


# --- a tiny model


class Model(NamedTuple):
    """A dense network of 3-4-2 units on flat parameters, in the order of its sorted names."""

    inputs: int = 3
    hidden: int = 4
    outputs: int = 2

    @property
    def layer_types(self) -> list[str]:
        """The layer type of every coordinate: both layers have their bias before their kernel."""
        kernels = self.inputs * self.hidden, self.hidden * self.outputs
        return (
            ["dense_bias"] * self.hidden
            + ["dense_kernel"] * kernels[0]
            + ["dense_bias"] * self.outputs
            + ["dense_kernel"] * kernels[1]
        )

    def predict(self, w, batch):
        """Logits of shape (B, outputs)."""
        sizes = [self.hidden, self.inputs * self.hidden, self.outputs, self.hidden * self.outputs]
        bias_0, kernel_0, bias_1, kernel_1 = np.split(w, np.cumsum(sizes)[:-1])
        hidden = np.tanh(np.asarray(batch["image"]) @ kernel_0.reshape(self.inputs, self.hidden) + bias_0)
        return hidden @ kernel_1.reshape(self.hidden, self.outputs) + bias_1

    def loss(self, w, batch):
        """Mean softmax cross-entropy."""
        return softmax_cross_entropy(self.predict(w, batch), batch["label"])

    def gradient(self, w, batch) -> np.ndarray:
        """The gradient of the loss."""
        return complex_step_jacobian(lambda v: self.loss(v, batch), w)

    def ggn(self, w, batch) -> np.ndarray:
        """J^T H_l J as a matrix."""
        logits = self.predict(w, batch)
        jacobian = complex_step_jacobian(lambda v: self.predict(v, batch).reshape(-1), w)

        def loss_gradient(z):
            exps = np.exp(z.reshape(logits.shape))
            probs = exps / exps.sum(axis=1, keepdims=True)
            return ((probs - np.eye(self.outputs)[batch["label"]]) / len(logits)).reshape(-1)

        loss_hessian = complex_step_jacobian(loss_gradient, logits.reshape(-1))
        return jacobian.T @ loss_hessian @ jacobian


class LinearModel(Model):
    """The same without a hidden layer and a bias: `Model.hidden` means nothing."""

    @property
    def layer_types(self) -> list[str]:
        """The layer type of every coordinate."""
        return ["dense_kernel"] * (self.inputs * self.outputs)

    def predict(self, w, batch):
        """Logits of shape (B, outputs)."""
        return np.asarray(batch["image"]) @ w.reshape(self.inputs, self.outputs)


def softmax_cross_entropy(logits, labels):
    """Mean over the rows of `logits`; analytic, so that the complex step works."""
    rows = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)]
    return sum(rows) / len(rows)


# --- MLHF, Algorithm 1


class Step(NamedTuple):
    """Everything of one step of Algorithm 1, as flat vectors and dense matrices."""

    w: np.ndarray  # w^t
    gradient: np.ndarray  # g^t
    damping: np.ndarray  # s^t
    preconditioner: np.ndarray  # P^t
    matrix: np.ndarray  # H^t including the damping
    direction: np.ndarray  # d_n^t
    residual: np.ndarray  # r_n^t
    w_next: np.ndarray  # w^(t+1)
    loss: float  # l(x^t, w^t)
    loss_after: float  # l(x^t, w^(t+1))
    loss_next: float | None  # l(x^(t+1), w^(t+1)); None after the last batch
    loss_next_before: float | None  # l(x^(t+1), w^t); None after the last batch
    damping_carry: list  # state of RNN_s after the step, by coordinate
    preconditioner_carry: list  # state of RNN_p


def naive_mlhf(
    meta_params,
    model: Model,
    w: np.ndarray,
    batches: Sequence[dict],
    *,
    learning_rate: float,
    num_cg_steps: int = 4,
    max_update_ratio: float | None = None,
    num_steps: int | None = None,
) -> list[Step]:
    """Algorithm 1 with dense matrices and a loop over coordinates.

    Takes one step a batch, or `num_steps` of them; a batch more than steps gives the `loss_next`
    of the last step, which the meta-losses need.
    """
    settings = meta_params.settings
    s_carry, p_carry = _fresh_carry(meta_params, model), _fresh_carry(meta_params, model)
    w0, d0, r0 = w, np.zeros_like(w), np.zeros_like(w)
    steps = []
    for t in range(len(batches) if num_steps is None else num_steps):
        batch = batches[t]
        g = model.gradient(w, batch)
        ggn = model.ggn(w, batch)
        s_out, s_carry = _run_network(meta_params.damping, settings, model, s_carry, (d0, r0, g))
        s = _damping(settings, s_out, g, w0)
        matrix = ggn + np.diag(s)
        seen = g - matrix @ d0 if settings.sees_current_residual else r0
        p_out, p_carry = _run_network(meta_params.preconditioner, settings, model, p_carry, (d0, seen, g))
        preconditioner = _preconditioner(settings, p_out, g, w0, s)
        d, r = _solve(settings, matrix, g, d0, preconditioner, num_cg_steps)
        w_next = w + _bounded(-learning_rate * d, w, max_update_ratio)
        has_next = t + 1 < len(batches)
        losses = [model.loss(w, batch), model.loss(w_next, batch)]
        losses += [model.loss(v, batches[t + 1]) if has_next else None for v in (w_next, w)]
        steps.append(Step(w, g, s, preconditioner, matrix, d, r, w_next, *losses, s_carry, p_carry))
        w, d0, r0 = w_next, d, r
    return steps


def _fresh_carry(meta_params, model):
    units = [len(layer.bias) // 4 for layer in next(iter(meta_params.damping.values())).layers]
    return [[(np.zeros(n), np.zeros(n)) for n in units] for _ in model.layer_types]


def _damping(settings, s_out, g, w0):
    return _value(settings, s_out, settings.initial_damping, g, w0) + settings.damping_floor


def _preconditioner(settings, p_out, g, w0, damping):
    values = _value(settings, p_out, settings.initial_preconditioner, g, w0)
    return values + damping if _kind(settings.preconditioner) == "Jacobi" else values


def _solve(settings, matrix, g, d0, preconditioner, num_cg_steps):
    inverse = preconditioner if _kind(settings.preconditioner) == "Multiply" else 1.0 / preconditioner
    return naive_pcg(matrix, g, d0, inverse, num_cg_steps)


def _bounded(update, w, max_update_ratio):
    if max_update_ratio is None:
        return update
    size = max(np.linalg.norm(w), 1e-3 * math.sqrt(w.size))
    return update * min(1.0, max_update_ratio * size / np.linalg.norm(update))


def _run_network(network, settings, model, carries, quantities):
    """One LSTM on every coordinate, with the weights of the coordinate's layer type."""
    outputs, next_carries = [], []
    for i, name in enumerate(model.layer_types):
        output, carry = naive_lstm(network[name], carries[i], _features(settings, quantities, i))
        outputs.append(output)
        next_carries.append(carry)
    return np.array(outputs), next_carries


def _features(settings, quantities, i):
    if _kind(settings.features) == "TanhFeatures":
        return [math.tanh(q[i]) for q in quantities]
    log_range = settings.features.log_range
    smallest = math.exp(-log_range)

    def log_magnitude(x):
        return min(1.0, math.log(max(abs(x), smallest)) / log_range)

    features = []
    for q in quantities:
        features.append(log_magnitude(q[i]))
        features.append(min(1.0, max(-1.0, q[i] / smallest)))
    if settings.features.has_shared:
        features += [log_magnitude(math.sqrt(np.mean(q**2))) for q in quantities]
    return features


def _value(settings, outputs, initial, g, w0):
    unit = unit_of_damping(g, w0, **dataclasses.asdict(settings.unit))
    scaled = settings.output.scale * outputs
    if _kind(settings.output) == "Exponential":
        return unit * np.exp(np.clip(scaled + math.log(initial), -30.0, 30.0))
    return unit * np.log1p(np.exp(scaled + math.log(math.exp(initial) - 1.0)))


def unit_of_damping(g, w0, gradient_power=1.0, parameter_power=1.0, gradient_floor=0.0, parameter_floor=0.0):
    """rms(g)^gradient_power / rms(w0)^parameter_power, with floors on both root mean squares."""
    size = max(math.sqrt(np.mean(g**2)), gradient_floor) ** gradient_power
    return size / max(math.sqrt(np.mean(w0**2)), parameter_floor) ** parameter_power


def _kind(setting) -> str:
    """The name of the setting's class: the settings are all that is read of the package."""
    return type(setting).__name__


# --- Gauss-Newton damped by a constant


def naive_gauss_newton(
    model,
    w,
    batches,
    *,
    learning_rate,
    damping,
    metric,
    num_cg_steps,
    unit_decay=None,
    decay=0.98,
    floor=1e-3,
):
    """Yields w after each step and its direction; None for the number of CG steps solves exactly.

    The damping is `damping` rms(g) / rms(w0) times the metric, which is "identity" or "diagonal". With
    `unit_decay`, rms(g) is at least the root of its running mean square.
    """
    w0, d, mean_square, running = w, np.zeros_like(w), np.zeros_like(w), 0.0
    for t, batch in enumerate(batches, 1):
        g = model.gradient(w, batch)
        mean_square = decay * mean_square + (1 - decay) * g**2
        diagonal = np.ones_like(w)
        if metric == "diagonal":
            root = np.sqrt(mean_square / (1 - decay**t))
            diagonal = root / root.mean() + floor
        unit = unit_of_damping(g, w0)
        if unit_decay is not None:
            running = unit_decay * running + (1 - unit_decay) * np.mean(g**2)
            unit *= max(1.0, np.sqrt(running / (1 - unit_decay**t) / np.mean(g**2)))
        s = damping * unit * diagonal
        matrix = model.ggn(w, batch) + np.diag(s)
        if num_cg_steps is None:
            d = np.linalg.solve(matrix, g)
        else:
            d, _ = naive_pcg(matrix, g, d, 1.0 / s, num_cg_steps)
        w = w - learning_rate * d
        yield w, d


# --- the meta-losses, as functions of a trajectory


def preconditioner_loss(steps: Sequence[Step]) -> float:
    """l_p of the paper, section 3.1: mean over t of -<d, g> / sqrt(<d, H d>)."""
    return float(
        np.mean([-(s.direction @ s.gradient) / np.sqrt(s.direction @ s.matrix @ s.direction) for s in steps])
    )


def damping_losses(
    steps: Sequence[Step],
    step_loss: str = "difference",
    epsilon: float = 1e-6,
    same_batch_weight: float = 1.0,
) -> np.ndarray:
    """l_s^t for every step, equation 4 or in another scale; needs a batch more than steps."""
    return np.array(
        [_gain(s, s.loss_next, s.loss_after, step_loss, epsilon, same_batch_weight) for s in steps]
    )


def damping_loss(steps: Sequence[Step], **options) -> float:
    """l_s, equation 5: the average of l_s^t weighted with its own softmax."""
    terms = damping_losses(steps, **options)
    return float(np.sum(_softmax(terms) * terms))


def frozen_meta_losses(
    meta_params,
    model: Model,
    steps: Sequence[Step],
    batches: Sequence[dict],
    *,
    learning_rate: float,
    num_cg_steps: int,
    max_update_ratio: float | None,
    step_loss: str = "difference",
    epsilon: float = 1e-6,
    same_batch_weight: float = 1.0,
    cut_carries: bool = False,
) -> tuple[float, float]:
    """l_p and l_s as functions of the meta-parameters, with all that the paper cuts held constant.

    Constants from `steps`: w, g, d0, r0 (also where it is the residual of the current step), what
    depends on w^t alone, and the softmax weights. The LSTM states run on; `cut_carries` takes them
    from `steps` too.
    """
    settings = meta_params.settings
    s_carry, p_carry = _fresh_carry(meta_params, model), _fresh_carry(meta_params, model)
    w0 = steps[0].w
    d0, r0 = np.zeros_like(w0), np.zeros_like(w0)
    l_p, l_s = [], []
    for t, step in enumerate(steps):
        g = step.gradient
        s_out, s_carry = _run_network(meta_params.damping, settings, model, s_carry, (d0, r0, g))
        seen = g - step.matrix @ d0 if settings.sees_current_residual else r0
        p_out, p_carry = _run_network(meta_params.preconditioner, settings, model, p_carry, (d0, seen, g))
        s = _damping(settings, s_out, g, w0)
        matrix = step.matrix - np.diag(step.damping) + np.diag(s)
        d, _ = _solve(settings, matrix, g, d0, _preconditioner(settings, p_out, g, w0, s), num_cg_steps)
        w_next = step.w + _bounded(-learning_rate * d, step.w, max_update_ratio)
        l_p.append(-(d @ g) / np.sqrt(d @ matrix @ d))
        next_loss, same_loss = model.loss(w_next, batches[t + 1]), model.loss(w_next, batches[t])
        l_s.append(_gain(step, next_loss, same_loss, step_loss, epsilon, same_batch_weight))
        d0, r0 = step.direction, step.residual
        if cut_carries:
            s_carry, p_carry = step.damping_carry, step.preconditioner_carry
    weights = _softmax(damping_losses(steps, step_loss, epsilon, same_batch_weight))
    return float(np.mean(l_p)), float(weights @ np.array(l_s))


def _gain(step: Step, next_loss, same_loss, step_loss, epsilon, same_batch_weight):
    if step_loss == "difference":
        gains = [next_loss - step.loss, same_loss - step.loss]
    else:
        pairs = (next_loss, step.loss_next_before), (same_loss, step.loss)
        relative = lambda after, before: (after - before) / (before + epsilon)
        log = lambda after, before: math.log((after + epsilon) / (before + epsilon))
        gains = [(relative if step_loss == "relative" else log)(*pair) for pair in pairs]
    return gains[0] + same_batch_weight * gains[1]


def _softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()
