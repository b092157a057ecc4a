"""MLHF with one LSTM per tensor a second time: NumPy, float64, dense matrices, nothing clever."""

import numpy as np
from scipy.special import expit

from mlhf_optax.controllers.tensor_network import CONSTANTS as C

TINY = 1e-30


def rms(x):
    return np.sqrt(np.mean(np.square(x)) + TINY)


def rms_of_all(xs):
    return np.sqrt(sum(np.sum(np.square(x)) for x in xs) / sum(x.size for x in xs) + TINY)


def cosine(x, y):
    return np.sum(x * y) / (np.sqrt(np.sum(x * x) * np.sum(y * y)) + TINY)


def power_of(factor, exponent):
    values, vectors = np.linalg.eigh(factor / (np.trace(factor) / len(factor)))
    values = (np.maximum(values, 0) + C.floor) ** exponent
    return vectors @ np.diag(values / values.mean()) @ vectors.T


class Reference:
    """Takes steps on ``0.5 * mean((x @ w + b - y)^2)`` for params ``[b, w]``."""

    def __init__(self, meta_params, params):
        self.theta = [np.asarray(leaf, np.float64) for leaf in meta_params]
        units = len(self.theta[1]) // 4
        self.w = [np.asarray(p, np.float64) for p in params]
        self.w0 = rms_of_all(self.w)
        self.w0_of_tensors = [max(rms(w), self.w0) for w in self.w]
        zeros = lambda: [np.zeros_like(p) for p in self.w]
        self.d, self.mean, self.square = zeros(), zeros(), zeros()
        self.mean_weight = self.square_weight = self.largest = 0.0
        rows, columns = self.w[1].shape
        self.factors = [np.zeros((rows, rows)), np.zeros((columns, columns))]
        self.powers = [np.eye(rows), np.eye(columns)]
        self.residual, self.share = np.ones(2), np.ones(2)
        self.rate, self.last_power, self.count = C.rate, C.power, 0
        self.losses = None
        self.hidden, self.cell = np.zeros((2, units)), np.zeros((2, units))

    def step(self, x, y):
        """Takes a step; returns the loss before it."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = x @ self.w[1] + self.w[0] - y
        g = [error.sum(0) / error.size, x.T @ error / error.size]
        loss = 0.5 * np.mean(error**2)
        said = self.controls(g, loss)
        self.average(g, said)
        # The whole system, flat: b, then w row by row.
        columns = len(g[0])
        ones = np.hstack([np.ones((len(x), 1)), x])
        ggn = np.kron(ones.T @ ones, np.eye(columns)) / error.size
        damping = np.zeros_like(ggn)
        running = [v / self.square_weight for v in self.square]
        running_size = np.sqrt(sum(map(np.sum, running)) / sum(v.size for v in running))
        self.largest = max(self.largest, running_size)
        size = max(rms_of_all(g), running_size)
        size *= max(1, self.largest / size) ** 0.4 / running_size
        units = [size * rms(np.sqrt(v)) / w0 for v, w0 in zip(running, self.w0_of_tensors, strict=True)]
        metrics = [
            np.diag(self.diagonal(running[0], 0.5)),
            self.matrix_metric(running[1], said["diagonal"][1]),
        ]
        trust = np.concatenate([np.full(part.size, t) for part, t in zip(g, said["trust"], strict=True)])
        start = 0
        for metric, scale, unit in zip(metrics, said["damping"], units, strict=True):
            end = start + len(metric)
            damping[start:end, start:end] = scale * unit * metric
            start = end
        rhs = np.concatenate([m.ravel() / self.mean_weight for m in self.mean])
        first = np.concatenate([part.ravel() for part in self.d])
        inverse = trust[:, None] * np.linalg.inv(damping)
        d, r = self.solve(ggn + damping, inverse, rhs, first, said["warm"])
        s_d = damping @ d
        cut = lambda v: [v[:columns], v[columns:].reshape(self.w[1].shape)]
        self.d = cut(d)
        for i, (di, ri, bi, si) in enumerate(zip(self.d, cut(r), cut(rhs), cut(s_d), strict=True)):
            self.residual[i] = np.sqrt(np.sum(ri * ri) / np.sum(bi * bi))
            self.share[i] = np.clip(np.sum(di * si) / (np.sum(di * bi) - np.sum(di * ri)), 0, 1)
        self.rate, self.last_power = said["rate"], said["power"][1]
        self.count += 1
        update = [self.rate * part for part in self.d]
        shrink = min(
            1.0, 0.25 * np.sqrt(sum(np.sum(p * p) for p in self.w) / sum(np.sum(u * u) for u in update))
        )
        self.w = [p - shrink * u for p, u in zip(self.w, update, strict=True)]
        return loss

    @staticmethod
    def solve(matrix, inverse, b, first, longest, steps=2):
        d = np.zeros_like(b)
        if first.any():
            d = np.clip(first @ b / (first @ matrix @ first), 0, longest) * first
        r = b - matrix @ d
        y = inverse @ r
        p = y
        for _ in range(steps):
            rho = r @ y
            alpha = rho / (p @ matrix @ p)
            d, r = d + alpha * p, r - alpha * matrix @ p
            y = inverse @ r
            p = y + (r @ y) / rho * p
        return d, r

    @staticmethod
    def diagonal(square, exponent):
        h = (square / square.mean() + 1e-6) ** exponent
        return h / h.mean()

    def matrix_metric(self, square, share):
        half = np.sqrt(self.diagonal(square, 0.5 * share)).ravel()
        return half[:, None] * np.kron(*self.powers) * half

    def average(self, g, said):
        share = 1 / said["memory"]
        self.mean = [(1 - share) * m + share * x for m, x in zip(self.mean, g, strict=True)]
        self.mean_weight = (1 - share) * self.mean_weight + share
        for i, outer in enumerate((g[1] @ g[1].T, g[1].T @ g[1])):
            self.factors[i] = C.factor_decay * self.factors[i] + (1 - C.factor_decay) * outer
        if self.count + 1 in (1, 2, 4, 8, 16) or (self.count + 1) % 20 == 0:
            self.powers = [power_of(factor, self.last_power) for factor in self.factors]

    def controls(self, g, loss):
        b = C.square_decay
        self.square = [b * v + (1 - b) * x * x for v, x in zip(self.square, g, strict=True)]
        self.square_weight = b * self.square_weight + 1 - b
        now = np.log(loss)
        keep = np.array([0, 0.9, 0.99, 1])
        self.losses = np.full(4, now) if self.losses is None else keep * self.losses + (1 - keep) * now
        features = self.features(g)
        kernel, bias, readout, linear, offset = self.theta
        gates = np.hstack([features, self.hidden]) @ kernel + bias
        i, f, u, o = np.split(gates, 4, axis=1)
        self.cell = expit(f) * self.cell + expit(i) * np.tanh(u)
        self.hidden = expit(o) * np.tanh(self.cell)
        out = 2 * self.hidden @ readout + features @ linear + offset
        within = lambda v, top: np.exp(np.log(top) * np.tanh(v / np.log(top)))
        share = lambda v, at: expit(v + np.log(at / (1 - at)))
        mean = out.mean(0)
        return {
            "damping": C.damping
            * within(2 * out[:, 0], 30)
            * (0.2 + self.count / 10)
            / (1 + self.count / 10),
            "trust": within(-out[:, 1], 10),
            "power": share(out[:, 2], C.power),
            "diagonal": share(out[:, 3], C.diagonal),
            "rate": 1.5 * share(mean[4], 1 / 1.5),
            "memory": max(C.memory * within(mean[5], 10), 1),
            "warm": share(mean[6], C.warm_start_share),
        }

    def features(self, g):
        sat = lambda v, scale: np.tanh(v / scale)
        mean = [0.9 * m / max(self.mean_weight, 1e-3) + 0.1 * x for m, x in zip(self.mean, g, strict=True)]
        rms_v = np.array([np.sqrt(v.mean() / self.square_weight) for v in self.square])
        all_v = np.sqrt(sum(v.size * s * s for v, s in zip(g, rms_v, strict=True)) / sum(v.size for v in g))
        all_w, all_d, all_m = map(rms_of_all, (self.w, self.d, mean))
        started = float(self.count > 0)
        rows = []
        for i in range(2):
            w, d, m = self.w[i], self.d[i], mean[i]
            rows.append(
                [
                    sat(np.log(rms(m) / all_m), 3),
                    sat(np.log(rms_v[i] / all_v), 3),
                    sat(np.log(rms(m) / rms_v[i]) + 1, 1),
                    sat(np.log(rms(w) / all_w), 3),
                    started * sat(np.log(rms(d) / (rms(w) + 0.1 * all_w)) + 4, 3),
                    started * sat(np.log(rms(d) / all_d), 3),
                    cosine(g[i], d),
                    cosine(g[i], self.mean[i]),
                    cosine(m, d),
                    started * sat(np.log(self.residual[i]), 2),
                    started * (2 * self.share[i] - 1),
                    1.0 if i == 0 else -1.0,
                ]
            )
        t = self.count
        now, fast, slow, first = self.losses
        shared = [
            2 * t / (t + 10) - 1,
            2 * t / (t + 100) - 1,
            2 * t / (t + 1000) - 1,
            sat(first - fast, 2),
            sat(fast - slow, 0.3),
            sat(now - fast, 0.5),
            sat(np.log(rms_of_all(g) / all_v), 0.5),
            sat(np.log(all_m / all_v) + 1, 1),
            sat(np.log(all_w / self.w0), 1),
            sat(np.log(min(1.0, 0.25 / max(self.rate * all_d / all_w, TINY))), 1),
        ]
        return np.hstack([np.array(rows), np.tile(shared, (2, 1))])
