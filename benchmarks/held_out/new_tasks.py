"""Tasks that were never looked at when anything was chosen, each with something that others lack.

Embeddings of which most are rarely met, a loss that couples examples, a graph, a neural ODE, a normalising
flow, attention on images, sequences of many lengths, few parameters beside frozen ones, wrong labels, and
batches of eight. All are sized for two processor cores.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tasks import Folders, flax_task, grey, load_mnist, mnist_task, read_shakespeare, without_meta_training

from mlhf_optax import NegativeLogLikelihood, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from mlhf_optax.tasks import MLP, ConvNet, Dataset, Task, image_task, load_cifar10, num_examples
from mlhf_optax.tasks.data import freeze

_FIELDS, _VALUES = 8, 2000  # of clicks
_NODES, _CLASSES, _WORDS = 2000, 7, 200  # of the citation graph
_GROUP = 128  # images among which a contrastive network finds the other view
_LINE = 48  # characters of a line at most
_TIMES = np.linspace(0.0, 2.0, 9, dtype=np.float32)  # of the neural ODE


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


# Clicks.


def clicks() -> Dataset:
    """Returns made-up clicks: 8 fields of 2,000 values each, their frequencies by Zipf's law.

    Each value adds its own amount to the logit, and so do the values of two fields together.
    """
    random = _random(0)
    frequency = 1.0 / np.arange(1, _VALUES + 1) ** 1.1
    fields = random.choice(_VALUES, (48_000, _FIELDS), p=frequency / frequency.sum()).astype(np.int32)
    alone = random.normal(0, 0.5, (_FIELDS, _VALUES))
    codes = random.normal(0, 1, (_FIELDS, _VALUES, 3))
    found = codes[np.arange(_FIELDS), fields]
    pairs = 0.5 * (np.sum(found.sum(axis=1) ** 2, axis=1) - np.sum(found**2, axis=(1, 2))) / _FIELDS
    logit = alone[np.arange(_FIELDS), fields].sum(axis=1) + pairs - 1.5
    clicked = (random.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    parts = (freeze(image=fields[s], target=clicked[s]) for s in (np.s_[:40_000], np.s_[40_000:]))
    return without_meta_training(*parts)


class _Clicks(nn.Module):
    """Fields -> embeddings -> dense layers -> logit (B,)."""

    @nn.compact
    def __call__(self, fields: jax.Array) -> jax.Array:
        x = nn.Embed(_FIELDS * _VALUES, 8)(fields + _VALUES * jnp.arange(_FIELDS))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(1)(nn.relu(nn.Dense(32)(x)))[:, 0]


def _clicks(folders: Folders) -> Task:
    del folders
    example, loss_fn = jnp.zeros((1, _FIELDS), jnp.int32), SigmoidCrossEntropy(targets="target")
    return flax_task("clicks", _Clicks(), example, loss_fn, clicks, 256)


# A contrastive encoder.


def two_views(folders: Folders) -> Dataset:
    """Returns MNIST at 14 x 14 pixels, each image twice: shifted at random, with noise."""
    data = load_mnist(*folders)

    def views(part: Any, most: int, seed: int) -> Any:
        random, images = _random(seed), grey(part["image"][:most, ..., 0])
        # Whole groups only.
        images = images[: max(1, len(images) // _GROUP) * _GROUP]
        images = images.reshape(len(images), 14, 2, 14, 2).mean(axis=(2, 4))

        def view() -> np.ndarray:
            shifts = random.integers(-2, 3, (len(images), 2))
            moved = [np.roll(image, shift, (0, 1)) for image, shift in zip(images, shifts, strict=True)]
            return (np.stack(moved) + random.normal(0, 0.1, images.shape)).reshape(-1, 196).astype(np.float32)

        return freeze(image=view(), other=view())

    return without_meta_training(views(data.train, 160 * _GROUP, 0), views(data.test, 32 * _GROUP, 1))


class _Encoder(nn.Module):
    """Pixels -> code of length 1."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        code = nn.Dense(16)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(128)(pixels)))))
        return code * jax.lax.rsqrt(jnp.sum(code**2, axis=-1, keepdims=True) + 1e-6)


def _contrastive(folders: Folders) -> Task:
    """Finds the other view of an image among those of its group of 128: the logits are a matrix."""
    model, group = _Encoder(), lambda batch: min(_GROUP, batch["image"].shape[0])
    labels = lambda batch: jnp.arange(batch["image"].shape[0], dtype=jnp.int32) % group(batch)
    load, loss_fn = functools.partial(two_views, folders), SoftmaxCrossEntropy(labels=labels)
    task = flax_task("contrastive", model, jnp.zeros((1, 196)), loss_fn, load, _GROUP)

    def predict_fn(params: Any, batch: Any) -> jax.Array:
        left, right = (
            model.apply({"params": params}, batch[name]).reshape(-1, group(batch), 16)
            for name in ("image", "other")
        )
        logits = 10.0 * jnp.einsum("gid,gjd->gij", left, right)
        return logits.reshape(-1, group(batch))

    return dataclasses.replace(task, predict_fn=predict_fn)


# A graph.


@functools.cache
def citations() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns a made-up citation graph: words (N, W), subjects (N,), and both ends of its edges.

    A paper cites four of the earlier ones, mostly of its subject, and rather those that are cited much.
    """
    random = _random(0)
    subject = random.integers(0, _CLASSES, _NODES).astype(np.int32)
    likely = random.dirichlet(np.full(_WORDS, 0.2), _CLASSES)
    likely = 0.6 * likely[subject] + 0.4 / _WORDS
    words = (random.random((_NODES, _WORDS)) < 1 - np.exp(-12 * likely)).astype(np.float32)
    cited, edges = np.ones(_NODES), []
    for paper in range(8, _NODES):
        weight = cited[:paper] * np.where(subject[:paper] == subject[paper], 1.0, 0.04)
        for other in random.choice(paper, 4, replace=False, p=weight / weight.sum()):
            cited[other] += 1
            edges.append((paper, other))
    ends = np.array(edges)
    loops = np.arange(_NODES)
    senders = np.concatenate([ends[:, 0], ends[:, 1], loops])
    receivers = np.concatenate([ends[:, 1], ends[:, 0], loops])
    return words, subject, senders.astype(np.int32), receivers.astype(np.int32)


class _GraphNet(nn.Module):
    """Two graph convolutions; returns logits of all nodes."""

    @nn.compact
    def __call__(self, words: jax.Array, senders: Any, receivers: Any) -> jax.Array:
        degree = jnp.bincount(receivers, length=_NODES)
        scale = jax.lax.rsqrt(jnp.maximum(degree, 1.0))[:, None]
        gather = lambda x: scale * jax.ops.segment_sum((scale * x)[senders], receivers, _NODES)
        return gather(nn.Dense(_CLASSES)(nn.relu(gather(nn.Dense(32)(words)))))


def _graph(folders: Folders) -> Task:
    """A batch is some papers; the network sees all words and citations, and few subjects."""
    del folders
    words, subject, senders, receivers = citations()
    model, order = _GraphNet(), _random(1).permutation(_NODES).astype(np.int32)
    parts = lambda: without_meta_training(
        *(freeze(image=order[s], label=subject[order[s]]) for s in (np.s_[:1000], np.s_[1000:]))
    )

    def predict_fn(params: Any, batch: Any) -> jax.Array:
        return model.apply({"params": params}, words, senders, receivers)[batch["image"]]

    return Task(
        name="citations",
        description="citations",
        init_fn=lambda key: model.init(key, words, senders, receivers)["params"],
        predict_fn=predict_fn,
        loss_fn=SoftmaxCrossEntropy(),
        load_data=parts,
        num_classes=_CLASSES,
        batch_size=128,
    )


# A neural ODE.


def pendulums() -> Dataset:
    """Returns starts (N, 2) and paths (N, 9, 2) of pendulums with friction: 1,024 and 512 of them."""
    random = _random(0)
    start = random.uniform((-2.5, -1.5), (2.5, 1.5), (1536, 2))
    state, path, steps = start, [start], 20  # small steps between two times
    size = float(_TIMES[1] - _TIMES[0]) / steps
    speed = lambda y: np.stack([y[:, 1], -4 * np.sin(y[:, 0]) - 0.3 * y[:, 1]], axis=1)
    for _ in _TIMES[1:]:
        for _ in range(steps):
            half = state + size / 2 * speed(state)
            state = state + size * speed(half)
        path.append(state)
    paths = np.stack(path, axis=1).astype(np.float32)
    parts = (freeze(image=start[s].astype(np.float32), target=paths[s]) for s in (np.s_[:1024], np.s_[1024:]))
    return without_meta_training(*parts)


def _neural_ode(folders: Folders) -> Task:
    del folders
    import diffrax

    model = MLP((32, 32), 2, "tanh")
    loss_fn = SquaredError(targets="target")
    task = flax_task("neural-ode", model, jnp.zeros((1, 2)), loss_fn, pendulums, 128)

    def path(params: Any, start: jax.Array) -> jax.Array:
        field = lambda t, y, params: model.apply({"params": params}, y[None])[0]
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=2.0,
            dt0=0.25,
            y0=start,
            args=params,
            saveat=diffrax.SaveAt(ts=jnp.asarray(_TIMES)),
            max_steps=10,
            adjoint=diffrax.DirectAdjoint(),  # of both modes of differentiation
        ).ys

    predict_fn = lambda params, batch: jax.vmap(lambda start: path(params, start))(batch["image"])
    return dataclasses.replace(task, predict_fn=predict_fn)


# A normalising flow.


def moons() -> Dataset:
    """Returns points of two half circles with noise, (N, 2): 8,192 to train on, 2,048 to test on."""
    random = _random(0)
    angle, upper = random.uniform(0, np.pi, 10_240), random.random(10_240) < 0.5
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.where(upper[:, None], arc, np.array([1.0, 0.5]) - arc) - np.array([0.5, 0.25])
    points = (1.5 * points + random.normal(0, 0.1, points.shape)).astype(np.float32)
    return without_meta_training(freeze(image=points[:8192]), freeze(image=points[8192:]))


class _Flow(nn.Module):
    """Affine couplings from points to a normal distribution; returns log-probabilities (B,)."""

    couplings: int = 6

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        x, log_volume = points, 0.0
        for index in range(self.couplings):
            kept, moved = x[:, index % 2], x[:, 1 - index % 2]
            hidden = nn.tanh(nn.Dense(32)(nn.tanh(nn.Dense(32)(kept[:, None]))))
            shift, stretch = jnp.moveaxis(nn.Dense(2)(hidden), 1, 0)
            stretch = 2.0 * jnp.tanh(stretch)
            moved = moved * jnp.exp(stretch) + shift
            log_volume = log_volume + stretch
            x = jnp.stack([kept, moved] if index % 2 == 0 else [moved, kept], axis=1)
        return log_volume - 0.5 * jnp.sum(x**2, axis=1) - jnp.log(2 * jnp.pi)


def _flow(folders: Folders) -> Task:
    del folders
    return flax_task("flow", _Flow(), jnp.zeros((1, 2)), NegativeLogLikelihood(), moons, 256)


# Attention on images.


class _ViT(nn.Module):
    """Patches of 8 x 8 pixels -> a transformer of four layers -> the mean over patches -> logits."""

    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (8, 8), strides=(8, 8))(images)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[-2:])
        for _ in range(4):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), axis=1))


def _vit(folders: Folders) -> Task:
    load = functools.partial(load_cifar10, *folders)
    about = "CIFAR-10, vision transformer"
    return image_task(
        "vit", about, _ViT(), (32, 32, 3), load_data=load, num_classes=10, batch_size=128, augment=True, pad=4
    )


# Sequences of many lengths.


def lines(folders: Folders) -> Dataset:
    """Returns lines of Shakespeare of up to 48 characters, filled up with 0, and a mask of what is there."""
    texts = read_shakespeare(folders[0])

    def part(text: np.ndarray) -> Any:
        found = [line for line in np.split(text, np.flatnonzero(text == 0) + 1) if 2 <= len(line) <= _LINE]
        filled = np.zeros((len(found), _LINE + 1), np.int32)
        for row, line in zip(filled, found, strict=True):
            row[1 : len(line) + 1] = line
        length = np.array([len(line) for line in found], np.int32)
        mask = (np.arange(_LINE) < length[:, None]).astype(np.float32)
        return freeze(image=filled[:, :-1], label=filled[:, 1:], length=length, mask=mask)

    return without_meta_training(part(texts["train"]), part(texts["test"]))


class _Lines(nn.Module):
    """Characters -> embedding -> LSTM that stops at the end of each line -> logits."""

    @nn.compact
    def __call__(self, text: jax.Array, length: jax.Array) -> jax.Array:
        x = nn.Embed(65, 48)(text)
        return nn.Dense(65)(nn.RNN(nn.OptimizedLSTMCell(48))(x, seq_lengths=length))


def _lstm_lengths(folders: Folders) -> Task:
    model = _Lines()
    example = jnp.zeros((1, _LINE), jnp.int32), jnp.ones(1, jnp.int32)
    return Task(
        name="lstm-lengths",
        description="lstm-lengths",
        init_fn=lambda key: model.init(key, *example)["params"],
        predict_fn=lambda params, batch: model.apply({"params": params}, batch["image"], batch["length"]),
        loss_fn=SoftmaxCrossEntropy(mask="mask"),
        load_data=functools.partial(lines, folders),
        num_classes=None,
        batch_size=64,
    )


# Few parameters beside frozen ones.


@functools.cache
def _pretrained(folders: Folders, steps: int = 300) -> Any:
    """Returns a network that Adam has trained on MNIST as it is."""
    task = mnist_task("base", MLP((256, 256)), folders)
    examples, tx = task.data.train, optax.adam(1e-3)
    random, size = _random(0), min(128, num_examples(task.data.train))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(lambda p: task.loss_fn(task.predict_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = task.init_fn(jax.random.key(0))
    state = tx.init(params)
    for _ in range(steps):
        chosen = random.integers(0, num_examples(examples), size)
        params, state = step(params, state, jax.tree.map(lambda leaf: leaf[chosen], examples))  # noqa: B023
    return jax.tree.map(np.asarray, params)


def _lora(folders: Folders, rank: int = 4) -> Task:
    """A network for MNIST is taught to read it turned by 90 degrees and negative, by updates of rank 4."""

    def load() -> Dataset:
        data = load_mnist(*folders)
        turned = lambda part: freeze(image=255 - np.rot90(part["image"], axes=(1, 2)), label=part["label"])
        return without_meta_training(turned(data.train), turned(data.test))

    task = mnist_task("lora", MLP((256, 256)), folders)
    base = _pretrained(folders)

    def init_fn(key: Any) -> Any:
        def of_kernel(name: str, number: int) -> Any:
            rows, columns = base[name]["kernel"].shape
            down = jax.random.normal(jax.random.fold_in(key, number), (rows, rank)) / rows**0.5
            return {"down": down, "up": jnp.zeros((rank, columns))}

        return {name: of_kernel(name, number) for number, name in enumerate(base)}

    def predict_fn(params: Any, batch: Any) -> jax.Array:
        moved = {
            name: layer | {"kernel": layer["kernel"] + params[name]["down"] @ params[name]["up"]}
            for name, layer in base.items()
        }
        return task.predict_fn(moved, batch)

    return dataclasses.replace(task, init_fn=init_fn, predict_fn=predict_fn, load_data=load)


# Noise.


def _label_noise(folders: Folders) -> Task:
    """MNIST, of whose labels for training a fifth is drawn at random."""
    task = mnist_task("label-noise", MLP((100, 100)), folders)

    def load() -> Dataset:
        data, random = load_mnist(*folders), _random(0)
        label = np.array(data.train["label"])
        wrong = random.random(len(label)) < 0.2
        label[wrong] = random.integers(0, 10, wrong.sum())
        return without_meta_training(freeze(image=data.train["image"], label=label), data.test)

    return dataclasses.replace(task, load_data=load)


def _batch_of_8(folders: Folders) -> Task:
    return mnist_task("batch-of-8", ConvNet((8, 16), (32,)), folders, batch_size=8)


NEW_TASKS: dict[str, Callable[[Folders], Task]] = {
    "clicks": _clicks,
    "contrastive": _contrastive,
    "citations": _graph,
    "neural-ode": _neural_ode,
    "flow": _flow,
    "vit": _vit,
    "lstm-lengths": _lstm_lengths,
    "lora": _lora,
    "label-noise": _label_noise,
    "batch-of-8": _batch_of_8,
}
"""A function of folders for every task, by name."""

NEW_LENGTHS = dict.fromkeys(NEW_TASKS, 300) | dict.fromkeys(("flow", "citations", "batch-of-8"), 1000)
"""Steps of a training of every task."""

ARGUMENTS: dict[str, dict[str, Any]] = {"contrastive": {"curvature_batch_size": None}}
"""What the README's table of losses tells to pass to MLHF; nothing for most."""

_NEEDS = {"neural-ode": "diffrax"}


def problem(name: str) -> str:
    """Returns why a task cannot be trained here, empty if it can."""
    package = _NEEDS.get(name)
    is_there = package is None or importlib.util.find_spec(package) is not None
    return "" if is_there else f"{package} is not installed"
