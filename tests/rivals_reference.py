"""The learned optimizers of the literature, naively: NumPy, float64, one flat vector of coordinates.

Each is a class with ``update(gradient) -> update``; weights are the meta-parameters of the package.
"""

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))


def affine(dense, x):
    """Rows of `x` are coordinates."""
    return x @ np.asarray(dense.kernel, np.float64).T + np.asarray(dense.bias, np.float64)


class LSTM:
    """One layer; gates in the order input, forget, candidate, output."""

    def __init__(self, weights, count):
        self.kernel = np.asarray(weights.kernel, np.float64)
        self.bias = np.asarray(weights.bias, np.float64)
        self.cell = np.zeros((count, self.bias.size // 4))
        self.hidden = np.zeros_like(self.cell)

    def __call__(self, x):
        gates = np.concatenate([x, self.hidden], axis=1) @ self.kernel.T + self.bias
        i, f, g, o = np.split(gates, 4, axis=1)
        self.cell = sigmoid(f) * self.cell + sigmoid(i) * np.tanh(g)
        self.hidden = sigmoid(o) * np.tanh(self.cell)
        return self.hidden


class Stack:
    """Layers of LSTM and a linear map to one number."""

    def __init__(self, weights, count):
        self.layers = [LSTM(layer, count) for layer in weights.layers]
        self.kernel = np.asarray(weights.output_kernel, np.float64)
        self.bias = float(weights.output_bias)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x @ self.kernel + self.bias


class AdamFeatures:
    """Gradient and mean gradient over the root of the mean square, with corrected bias; shape (N, 2)."""

    def __init__(self, count):
        self.t, self.m, self.v = 0, np.zeros(count), np.zeros(count)

    def __call__(self, g):
        self.t += 1
        self.m = 0.95 * self.m + 0.05 * g
        self.v = 0.95 * self.v + 0.05 * g**2
        s = np.sqrt(self.v / (1 - 0.95**self.t)) + 1e-8
        return np.stack([g / s, self.m / (1 - 0.95**self.t) / s], axis=1)


class RNNProp:
    def __init__(self, weights, count, learning_rate=0.1):
        self.weights, self.rate = weights, learning_rate
        self.features, self.stack = AdamFeatures(count), Stack(weights.lstm, count)

    def update(self, g):
        z = elu(affine(self.weights.dense, self.features(g)))
        return -self.rate * np.tanh(self.stack(z))


class L2L:
    def __init__(self, weights, count, learning_rate=0.1):
        self.stack, self.rate = Stack(weights.lstm, count), learning_rate

    def update(self, g):
        is_large = np.abs(g) >= np.exp(-10.0)
        logs = np.log(np.where(is_large, np.abs(g), 1.0)) / 10.0
        first = np.where(is_large, logs, -1.0)
        second = np.where(is_large, np.sign(g), np.exp(10.0) * g)
        return self.rate * self.stack(np.stack([first, second], axis=1))


def over_norm(x):
    """Every column over its norm."""
    return x / np.sqrt((x**2).sum(axis=0) + 1e-16)


class HyperAdam:
    def __init__(self, weights, count, learning_rate=0.005):
        self.weights, self.rate = weights, learning_rate
        self.lstm = LSTM(weights.lstm, count)
        self.m, self.v, self.bh, self.gh = np.zeros((4, count, 20))

    def mean(self, g, features, mean_first):
        s = self.lstm(features)
        seen = [over_norm(s), over_norm(self.m)]
        seen = seen[::-1] if mean_first else seen
        decays = sigmoid(affine(self.weights.decays, np.concatenate(seen, axis=1)))
        beta, gamma = decays[:, :20], decays[:, 20:]
        self.m = beta * self.m + (1 - beta) * g[:, None]
        self.v = gamma * self.v + (1 - gamma) * g[:, None] ** 2
        self.bh = beta * self.bh + (1 - beta)
        self.gh = gamma * self.gh + (1 - gamma)
        proposed = self.m / (self.bh + 1e-24) / np.sqrt(self.v / (self.gh + 1e-24) + 1e-24)
        return (elu(affine(self.weights.weights, s)) * proposed).sum(axis=1)

    def update(self, g):
        features = elu(affine(self.weights.inputs, (g / np.sqrt((g**2).sum() + 1e-16))[:, None]))
        return -self.rate * self.mean(g, features, False)


class VariationalHyperAdam(HyperAdam):
    """`noise()` returns standard normal numbers for all coordinates; None takes the mean."""

    def __init__(self, weights, count, noise, learning_rate=0.001):
        super().__init__(weights, count, learning_rate)
        self.features, self.noise = AdamFeatures(count), noise

    def update(self, g):
        features = over_norm(elu(affine(self.weights.inputs, self.features(g))))
        self.lstm.hidden = over_norm(self.lstm.hidden)
        mean = self.mean(g, features, True)
        log_variance = affine(self.weights.log_variance, self.lstm.hidden)[:, 0]
        self.kl = 0.5 * (np.exp(log_variance) - 1 - log_variance)
        noise = 0.0 if self.noise is None else np.exp(log_variance / 2) * self.noise()
        return -self.rate * (mean + noise)


def gru(weights, state, inputs, shift):
    kernel, recurrent, bias = (np.asarray(x, np.float64) for x in weights)
    H = recurrent.shape[1]
    driven = inputs @ kernel.T + bias + shift
    u = sigmoid(driven[..., :H] + state @ recurrent[:H].T)
    r = sigmoid(driven[..., H : 2 * H] + state @ recurrent[H : 2 * H].T)
    c = np.tanh(driven[..., 2 * H :] + (r * state) @ recurrent[2 * H :].T)
    return u * state + (1 - u) * c


class Hierarchical:
    """`sizes` are those of the tensors, in the order of the coordinates."""

    def __init__(self, weights, sizes, initial_rate=1e-2):
        self.w, count = weights, sum(sizes)
        ends = np.cumsum(sizes)
        self.rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        repeat = lambda x, n: np.tile(np.asarray(x, np.float64), (n, 1))
        self.h = repeat(weights.param_start, count)
        self.tensors = repeat(weights.tensor_start, len(sizes))
        self.whole = np.asarray(weights.global_start, np.float64)
        self.means, self.squares = np.zeros((2, count, 4))
        self.decays = repeat(weights.outputs.bias[2:], count)
        self.log_rate = np.full(count, np.log(initial_rate))

    def update(self, g):
        w, powers = self.w, np.array([1.0, 0.5, 0.25, 0.125])
        d, s = (sigmoid(self.decays[:, [i]]) ** powers for i in (0, 1))
        self.means = d * self.means + (1 - d) * g[:, None]
        self.squares = s * self.squares + (1 - s) * self.means**2
        scaled = np.arcsinh(self.means / np.sqrt(self.squares + 1e-16))
        logs = np.log(self.squares + 1e-16)
        features = np.concatenate(
            [
                scaled,
                scaled[:, 1:] * scaled[:, :-1],
                logs - logs.mean(axis=1, keepdims=True),
                (self.log_rate - self.log_rate.mean())[:, None],
            ],
            axis=1,
        )
        update, tensors = np.zeros_like(g), []
        from_global, to_tensor = affine(w.global_to_param, self.whole), affine(w.global_to_tensor, self.whole)
        for rows, tensor in zip(self.rows, self.tensors, strict=True):
            shift = from_global + affine(w.tensor_to_param, tensor)
            self.h[rows] = gru(w.param_gru, self.h[rows], features[rows], shift)
            summary = np.concatenate([self.h[rows], features[rows]], axis=1).mean(axis=0)
            tensors.append(gru(w.tensor_gru, tensor, summary, to_tensor))
            out = affine(w.outputs, self.h[rows])
            direction = out[:, 0] + scaled[rows] @ np.asarray(w.shortcut, np.float64)
            direction /= np.sqrt((direction**2).mean() + 1e-16)
            self.log_rate[rows] += (1 - sigmoid(float(w.rate_momentum))) * out[:, 1]
            update[rows] = -np.exp(self.log_rate[rows] - float(w.rate_offset)) * direction
            self.decays[rows] = out[:, 2:]
        self.tensors = np.stack(tensors)
        self.whole = gru(w.global_gru, self.whole, self.tensors.mean(axis=0), 0.0)
        return update


class LODO:
    """With the matrix A written out, and its derivative by the chain rule on whole matrices."""

    def __init__(self, blocks, permutations, count, learning_rate, meta_learning_rate, momentum):
        self.blocks, self.permutations, self.count = blocks.copy(), permutations, count
        self.rate, self.meta_rate, self.momentum = learning_rate, meta_learning_rate, momentum
        self.m, self.t = np.zeros(count), 0
        self.first, self.second = np.zeros((2, *blocks.shape))

    def layers(self):
        """A square matrix for every layer, which multiplies columns."""
        width, k = self.permutations.shape[1], self.blocks.shape[-1]
        matrices = []
        for blocks, order in zip(self.blocks, self.permutations, strict=True):
            matrix = np.zeros((width, width))
            for b, block in enumerate(blocks):
                rows = slice(b * k, (b + 1) * k)
                matrix[rows, rows] = block.T
            matrices.append(matrix @ np.eye(width)[order])
        return matrices

    def hypergradient(self, g):
        layers, k = self.layers(), self.blocks.shape[-1]
        pad = lambda x: np.concatenate([x, np.zeros(self.permutations.shape[1] - x.size)])
        A = np.eye(self.permutations.shape[1])
        for layer in layers:
            A = layer @ A
        found, before = np.zeros_like(self.blocks), np.eye(len(A))
        for number, layer in enumerate(layers):
            after = np.eye(len(A))
            for later in layers[number + 1 :]:
                after = later @ after
            order = self.permutations[number]
            for x, y in ((g, self.m), (self.m, g)):
                entering, arriving = (before @ pad(x))[order], after.T @ A @ pad(y)
                for b in range(found.shape[1]):
                    rows = slice(b * k, (b + 1) * k)
                    found[number, b] -= self.rate * np.outer(entering[rows], arriving[rows])
            before = layer @ before
        return found

    def update(self, g):
        slope = self.hypergradient(g)
        self.t += 1
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.999 * self.second + 0.001 * slope**2
        root = np.sqrt(self.second / (1 - 0.999**self.t)) + 1e-7
        self.blocks -= self.meta_rate * self.first / (1 - 0.9**self.t) / root
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        A = np.eye(self.permutations.shape[1])
        for layer in self.layers():
            A = layer @ A
        A = A[:, : self.count]
        return -self.rate * A.T @ A @ self.m
