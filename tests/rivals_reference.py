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
