"""Tasks that no meta-training of general meta-parameters has met, sized for two processor cores."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mlhf_optax import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from mlhf_optax.tasks import MLP, ConvNet, Dataset, Task, cifar10_convnet, digits_mlp, image_task
from mlhf_optax.tasks.data import freeze
from mlhf_optax.tasks.mnist import decode_mnist
from mlhf_optax.tasks.prepared import data_folder, open_sources

Folders = tuple[Path | None, Path | None]  # of data, and of decoded data
_SEQUENCE = 32  # characters that a network reads at a time


def load_mnist(data_dir: Path | None, cache_dir: Path | None) -> Dataset:
    """Returns MNIST: 60,000 examples to train on, 10,000 to test on, none for meta-training."""
    parts = decode_mnist(data_dir, cache_dir)
    return without_meta_training(parts["train"], parts["test"])


def read_shakespeare(data_dir: Path | None) -> dict[str, np.ndarray]:
    """Returns the parts of Tiny Shakespeare as characters by number, int32; 0 is the end of a line."""
    sources = open_sources("tiny_shakespeare", data_folder(data_dir))
    texts = {name: bytes(next(iter(source))["text"]) for name, source in sources.items()}
    known = np.unique(np.frombuffer(texts["train"], np.uint8))
    number = np.zeros(256, np.int32)
    number[known] = np.arange(len(known))
    return {name: number[np.frombuffer(text, np.uint8)] for name, text in texts.items()}


def load_shakespeare(data_dir: Path | None, cache_dir: Path | None) -> Dataset:
    """Returns Tiny Shakespeare: 32 characters by number and those that follow them, int32 (N, 32) each."""
    del cache_dir
    texts = read_shakespeare(data_dir)
    return without_meta_training(*(text_rows(texts[name]) for name in ("train", "test")))


def text_rows(text: np.ndarray) -> Any:
    """Returns a text cut into rows of 32 characters, and those that follow them."""
    rows = (len(text) - 1) // _SEQUENCE
    starts = np.arange(rows)[:, None] * _SEQUENCE
    both = text[starts + np.arange(_SEQUENCE + 1)]
    return freeze(image=both[:, :-1], label=both[:, 1:])


def load_diabetes() -> Dataset:
    """Returns scikit-learn's diabetes data: 342 patients to train on, 100 to test on; all standardised."""
    from sklearn import datasets

    inputs, targets = datasets.load_diabetes(return_X_y=True)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(inputs))
    standard = lambda x: ((x - x.mean(0)) / x.std(0)).astype(np.float32)[order]
    x, y = standard(inputs), standard(targets[:, None])
    return without_meta_training(*(freeze(image=x[s], target=y[s]) for s in (np.s_[:342], np.s_[342:])))


def poisson_points() -> Dataset:
    """Returns random points of the square [-1, 1]^2: 1,024 to train on, 1,024 to test on."""
    return _random_points(1, -1, 1)


def burgers_points() -> Dataset:
    """Returns random points (x, t) of [-1, 1] x [0, 1]: 1,024 to train on, 1,024 to test on."""
    return _random_points(2, (-1, 0), (1, 1))


def _random_points(seed: int, lowest: Any, highest: Any) -> Dataset:
    random = np.random.Generator(np.random.PCG64(seed))
    points = lambda: freeze(
        image=random.uniform(lowest, highest, (1024, 2)).astype(np.float32),
        target=np.zeros((1024, 1), np.float32),
    )
    return without_meta_training(points(), points())


def quadratic_minima() -> Dataset:
    """Returns minima for ``quadratic_deep``, with deviation 0.6: 1,000 to train on, 1,000 to test on."""
    minima = lambda seed: np.random.RandomState(seed).normal(0, 0.6, (1000, 100)).astype(np.float32)
    parts = (freeze(image=minima(seed), target=np.zeros((1000, 100), np.float32)) for seed in (42, 43))
    return without_meta_training(*parts)


def without_meta_training(train: Any, test: Any) -> Dataset:
    """Returns data with no part for meta-training."""
    return Dataset({name: np.empty_like(array[:0]) for name, array in train.items()}, train, test)


class _LSTM(nn.Module):
    """Characters -> embedding -> LSTM -> logits."""

    width: int
    characters: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        x = nn.Embed(self.characters, self.width)(text)
        return nn.Dense(self.characters)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x))


class Transformer(nn.Module):
    """A causal transformer with normalisation before attention."""

    width: int
    characters: int
    layers: int = 2

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns logits of shape (B, T, characters) for characters by number, (B, T)."""
        x = nn.Embed(self.characters, self.width)(text)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[-2:])
        mask = nn.make_causal_mask(text)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.characters)(nn.LayerNorm()(x))


class _GroupNormNet(nn.Module):
    """Convolutions that halve height and width, each with group normalisation."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for channels in self.channels:
            x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(channels, (3, 3), strides=(2, 2))(x)))
        return nn.Dense(10)(x.reshape(len(x), -1))


class _VariationalAutoencoder(nn.Module):
    """Image (N, 784) and noise (N, 8) -> pixels, means and deviations' logarithms of the code, (N, 800)."""

    channels: int

    @nn.compact
    def __call__(self, images: jax.Array, noise: jax.Array) -> jax.Array:
        bend = lambda x: nn.leaky_relu(x, 0.3)
        conv = lambda stride: nn.Conv(self.channels, (4, 4), strides=(stride, stride))
        spread = lambda stride: nn.ConvTranspose(self.channels, (4, 4), strides=(stride, stride))
        x = images.reshape(-1, 28, 28, 1)
        for stride in (2, 2, 1):
            x = bend(conv(stride)(x))
        mean, log_deviation = jnp.split(nn.Dense(16)(x.reshape(len(x), -1)), 2, axis=1)
        x = mean + noise * jnp.exp(log_deviation)
        x = bend(nn.Dense(49)(bend(nn.Dense(24)(x)))).reshape(-1, 7, 7, 1)
        for stride in (2, 1, 1):
            x = nn.relu(spread(stride)(x))
        pixels = nn.sigmoid(nn.Dense(784)(x.reshape(len(x), -1)))
        return jnp.concatenate([pixels, mean, log_deviation], axis=1)


def _diabetes() -> Task:
    model = MLP((32, 32), 1, "tanh")
    loss_fn = SquaredError(targets="target")
    return flax_task("diabetes", model, jnp.zeros((1, 10)), loss_fn, load_diabetes, 64)


def mnist_task(name: str, model: Any, folders: Folders, batch_size: int = 128) -> Task:
    """Returns a task of classifying MNIST by a network."""
    load = functools.partial(load_mnist, *folders)
    shape = (28, 28, 1)
    return image_task(
        name, f"MNIST, {name}", model, shape, load_data=load, num_classes=10, batch_size=batch_size
    )


def flax_task(
    name: str, model: nn.Module, example: Any, loss_fn: Any, load: Callable, batch_size: int
) -> Task:
    return Task(
        name=name,
        description=name,
        init_fn=lambda key: model.init(key, example)["params"],
        predict_fn=lambda params, batch: model.apply({"params": params}, batch["image"]),
        loss_fn=loss_fn,
        load_data=load,
        num_classes=None,
        batch_size=batch_size,
    )


def _characters(name: str, make: Callable[..., nn.Module], width: int, folders: Folders) -> Task:
    load = functools.partial(load_shakespeare, *folders)
    text = jnp.zeros((1, _SEQUENCE), jnp.int32)
    return flax_task(name, make(width, 65), text, SoftmaxCrossEntropy(), load, 64)


def _autoencoder(name: str, widths: tuple[int, ...], folders: Folders) -> Task:
    """A deep autoencoder as that of Hinton and Salakhutdinov (2006), with widths from pixels to code."""

    def load() -> Dataset:
        data = load_mnist(*folders)
        to_pixels = lambda part: freeze(
            image=part["image"],
            target=grey(part["image"].reshape(len(part["image"]), 784)),
        )
        return Dataset(*map(to_pixels, (data.meta_train, data.train, data.test)))

    model = MLP((*widths, *widths[-2::-1]), 784, "tanh")
    task = mnist_task(name, model, folders)
    return dataclasses.replace(
        task, load_data=load, loss_fn=SigmoidCrossEntropy(targets="target"), num_classes=None
    )


def _vae(folders: Folders) -> Task:
    """``mnist_vae`` of DeepOBS with a quarter of its channels and without dropout.

    The loss is squared error plus Kullback-Leibler divergence, both summed, per image: convex in the outputs.
    Every image has its own noise. In the trainings here it is met once, as noise that is drawn anew would be.
    """

    def load() -> Dataset:
        data = load_mnist(*folders)
        draw = np.random.Generator(np.random.PCG64(0)).standard_normal
        with_noise = lambda part: freeze(
            image=part["image"].reshape(-1, 784), noise=draw((len(part["image"]), 8), np.float32)
        )
        return Dataset(*map(with_noise, (data.meta_train, data.train, data.test)))

    def loss_fn(outputs: jax.Array, batch: Any) -> jax.Array:
        pixels, mean, log_deviation = jnp.split(outputs, (784, 792), axis=1)
        error = jnp.sum(jnp.square(pixels - grey(batch["image"])), axis=1)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(2 * log_deviation) - 1) - log_deviation
        return jnp.mean(error + jnp.sum(divergence, axis=1))

    model = _VariationalAutoencoder(16)
    example = jnp.zeros((1, 784)), jnp.zeros((1, 8))
    return Task(
        name="mnist-vae",
        description="mnist_vae of DeepOBS",
        init_fn=lambda key: model.init(key, *example)["params"],
        predict_fn=lambda params, batch: model.apply(
            {"params": params}, grey(batch["image"]), batch["noise"]
        ),
        loss_fn=loss_fn,
        load_data=load,
        num_classes=None,
        batch_size=64,
    )


def grey(pixels: Any) -> Any:
    """Returns pixels of eight bits as float32 within [0, 1]."""
    return pixels.astype(np.float32) / 255


def _poisson() -> Task:
    """A network u(x) with -lap u = f in a square and 0 at its edge; the outputs are the residuals.

    f is such that the solution is sin(pi x) sin(pi y). A factor makes u vanish at the edge.
    """
    model = MLP((32, 32), 1, "tanh")
    task = flax_task(
        "poisson", model, jnp.zeros((1, 2)), SquaredError(targets="target"), poisson_points, 1024
    )

    def predict_fn(params: Any, batch: Any) -> jax.Array:
        edge = lambda x: (1 - x[0] ** 2) * (1 - x[1] ** 2)
        u = lambda x: edge(x) * model.apply({"params": params}, x[None])[0, 0]
        laplacian = lambda x: jnp.trace(jax.hessian(u)(x))
        f = lambda x: 2 * jnp.pi**2 * jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])
        return jax.vmap(lambda x: (laplacian(x) + f(x)) / 10)(batch["image"])[:, None]

    return dataclasses.replace(task, predict_fn=predict_fn)


def _burgers() -> Task:
    """A network u(x, t) with u_t + u u_x = nu u_xx, nu = 0.01 / pi; the outputs are the residuals.

    u(x, 0) = -sin(pi x), and 0 at the edges x = -1 and 1: by a factor on the network. A shock grows at x = 0.
    """
    model = MLP((32, 32), 1, "tanh")
    task = flax_task(
        "burgers", model, jnp.zeros((1, 2)), SquaredError(targets="target"), burgers_points, 1024
    )

    def predict_fn(params: Any, batch: Any) -> jax.Array:
        network = lambda point: model.apply({"params": params}, point[None])[0, 0]
        u = lambda point: -jnp.sin(jnp.pi * point[0]) + point[1] * (1 - point[0] ** 2) * network(point)

        def residual(point: jax.Array) -> jax.Array:
            u_x, u_t = jax.grad(u)(point)
            u_xx = jax.hessian(u)(point)[0, 0]
            return u_t + u(point) * u_x - 0.01 / jnp.pi * u_xx

        return jax.vmap(residual)(batch["image"])[:, None]

    return dataclasses.replace(task, predict_fn=predict_fn)


def _quadratic_deep() -> Task:
    """``quadratic_deep`` of DeepOBS (Schneider, Balles, Hennig 2019): 100 numbers, noise on the minimum.

    ``0.5 (w - x)^T H (w - x)``, the mean over x; 90 eigenvalues of H lie in [0, 1], 10 in [30, 60].
    """
    random = np.random.RandomState(42)
    eigenvalues = np.concatenate([random.uniform(0, 1, 90), random.uniform(30, 60, 10)])
    rotation = np.linalg.qr(random.normal(size=(100, 100)))[0]
    # The loss is a mean over the 100 outputs of every example.
    root = jnp.asarray(10 * np.sqrt(eigenvalues)[:, None] * rotation.T, jnp.float32)
    return Task(
        name="quadratic-deep",
        description="quadratic_deep of DeepOBS",
        init_fn=lambda key: {"w": jnp.ones(100)},
        predict_fn=lambda params, batch: (params["w"] - batch["image"]) @ root.T,
        loss_fn=SquaredError(targets="target"),
        load_data=quadratic_minima,
        num_classes=None,
        batch_size=128,
    )


BATCH_SIZES = {f"mnist-mlp-{size}": size for size in (64, 256, 1024, 4096)}  # for when second order pays
AUTOENCODERS = {
    "mnist-autoencoder": (125, 62, 31, 12),
    "mnist-autoencoder-full": (1000, 500, 250, 30),  # as published; 2.8 million parameters
}
TASKS: dict[str, Callable[[Folders], Task]] = {
    "digits-mlp": lambda folders: digits_mlp(hidden=(64, 64)),
    "mnist-mlp": lambda folders: mnist_task("mnist-mlp", MLP((100, 100)), folders),
    **{
        name: functools.partial(mnist_task, name, MLP((100, 100)), batch_size=size)
        for name, size in BATCH_SIZES.items()
    },
    "mnist-conv": lambda folders: mnist_task("mnist-conv", ConvNet((8, 16), (32,)), folders),
    "mnist-groupnorm": lambda folders: mnist_task("mnist-groupnorm", _GroupNormNet((8, 16)), folders),
    "cifar10-conv": lambda folders: cifar10_convnet(
        (8, 16), (16,), data_dir=folders[0], cache_dir=folders[1]
    ),
    **{name: functools.partial(_autoencoder, name, widths) for name, widths in AUTOENCODERS.items()},
    "mnist-vae": _vae,
    "shakespeare-lstm": lambda folders: _characters("shakespeare-lstm", _LSTM, 48, folders),
    "shakespeare-transformer": lambda folders: _characters(
        "shakespeare-transformer", Transformer, 32, folders
    ),
    "diabetes": lambda folders: _diabetes(),
    "poisson": lambda folders: _poisson(),
    "burgers": lambda folders: _burgers(),
    "quadratic-deep": lambda folders: _quadratic_deep(),
}
"""A function of folders for every task, by name."""


LENGTHS = {
    "digits-mlp": 3000,
    "mnist-mlp": 1000,
    **dict.fromkeys(BATCH_SIZES, 300),
    "mnist-conv": 300,
    "mnist-groupnorm": 1000,
    "cifar10-conv": 300,
    **dict.fromkeys(AUTOENCODERS, 300),
    "mnist-vae": 300,
    "shakespeare-lstm": 300,
    "shakespeare-transformer": 300,
    "diabetes": 3000,
    "poisson": 300,
    "burgers": 300,
    "quadratic-deep": 1000,
}
"""Steps of a training of every task."""
