"""How :mod:`mlhf_optax.tasks.convolution` computes on CPUs: with convolutions in the canonical layout alone.

Measured at batch 128, and the reason for what is done here: the gradient of a kernel taken over 8 images
at a time is 2.5 to 4 times faster than over the whole batch, which leaves the cache; 3 channels padded
to 4 are 3 times faster, as they fill vector registers; as a matrix product, a 1x1 convolution has a
kernel gradient 4 times faster. A matrix product with copies of the images for every position of the
kernel is up to 3 times faster while the copies stay in the cache, and 3 to 7 times slower where they do not;
sums of shifted matrix products are 2 to 5 times slower.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
_IMAGES_AT_ONCE = 8
_CHANNEL_MULTIPLE = 4
_SMALL = 2**18  # numbers in all copies of the images, 1 MB in float32


class Geometry(NamedTuple):
    """What the shapes of two arrays do not say about the third."""

    image: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    precision: Any

    @property
    def outputs(self) -> tuple[int, int]:
        """Height and width of the outputs."""
        padded = [size + low + high for size, (low, high) in zip(self.image, self.pads, strict=True)]
        sides = zip(padded, self.window, self.strides, strict=True)
        height, width = ((size - side) // stride + 1 for size, side, stride in sides)
        return height, width


def contract_on_cpu(first: jax.Array, second: jax.Array, *, wanted: str, geometry: Geometry) -> jax.Array:
    """Contracts with convolutions in the canonical layout alone, group by group."""
    one = {"outputs": _outputs_on_cpu, "images": _images_on_cpu, "kernel": _kernel_on_cpu}[wanted]
    if first.shape[0] == 1:
        return one(first[0], second[0], geometry)[None]
    return lax.map(lambda pair: one(*pair, geometry), (first, second))


def _canonical(
    images: jax.Array, kernel: jax.Array, geometry: Geometry, strides, pads, **dilation
) -> jax.Array:
    missing = -images.shape[-1] % _CHANNEL_MULTIPLE
    if missing and kernel.shape[0] * kernel.shape[1] > 1:
        images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, missing)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0)))
    how = {"dimension_numbers": LAYOUT, "precision": geometry.precision, **dilation}
    return lax.conv_general_dilated(images, kernel, strides, pads, **how)


def _outputs_on_cpu(images: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    if _is_small(images.shape[0], kernel, geometry):
        flat = kernel.reshape(-1, kernel.shape[-1])
        return jnp.matmul(_copies(images, geometry), flat, precision=geometry.precision)
    return _canonical(images, kernel, geometry, geometry.strides, geometry.pads)


def _images_on_cpu(kernel: jax.Array, outputs: jax.Array, geometry: Geometry) -> jax.Array:
    if _is_small(outputs.shape[0], kernel, geometry):
        copies = jnp.matmul(outputs, kernel.reshape(-1, kernel.shape[-1]).T, precision=geometry.precision)
        images = jax.ShapeDtypeStruct((outputs.shape[0], *geometry.image, kernel.shape[2]), outputs.dtype)
        return jax.linear_transpose(lambda x: _copies(x, geometry), images)(copies)[0]
    # The convolution of the outputs, spread out by the strides, with the kernel turned around.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    pads = []
    for axis in range(2):
        low = geometry.window[axis] - 1 - geometry.pads[axis][0]
        spread = (outputs.shape[1 + axis] - 1) * geometry.strides[axis] + 1
        pads.append((low, geometry.image[axis] + geometry.window[axis] - 1 - spread - low))
    return _canonical(outputs, turned, geometry, (1, 1), pads, lhs_dilation=geometry.strides)


def _is_small(num_images: int, kernel: jax.Array, geometry: Geometry) -> bool:
    height, width = geometry.outputs
    return num_images * height * width * math.prod(kernel.shape[:3]) <= _SMALL


def _copies(images: jax.Array, geometry: Geometry) -> jax.Array:
    """Joins copies of the images, one for every position in the window, to (B, H', W', h * w * I)."""
    padded = jnp.pad(images, ((0, 0), *geometry.pads, (0, 0)))
    spans = [(size - 1) * stride + 1 for size, stride in zip(geometry.outputs, geometry.strides, strict=True)]
    copies = [
        padded[:, i : i + spans[0] : geometry.strides[0], j : j + spans[1] : geometry.strides[1]]
        for i in range(geometry.window[0])
        for j in range(geometry.window[1])
    ]
    return jnp.concatenate(copies, axis=-1)


def _kernel_on_cpu(images: jax.Array, outputs: jax.Array, geometry: Geometry) -> jax.Array:
    if geometry.window == (1, 1) and geometry.pads == ((0, 0), (0, 0)):
        # Without strides: `convolve` has picked the pixels that count.
        product = jnp.einsum("bhwi,bhwo->io", images, outputs, precision=geometry.precision)
        return product[None, None]
    pads = []
    for axis in range(2):
        low = geometry.pads[axis][0]
        spread = (outputs.shape[1 + axis] - 1) * geometry.strides[axis] + 1
        pads.append((low, geometry.window[axis] + spread - 1 - geometry.image[axis] - low))

    def of_some(images: jax.Array, outputs: jax.Array) -> jax.Array:
        # Channels are the batch and images the channels: (I, H, W, B) with (H', W', B, O) to (I, h, w, O).
        turned = images.transpose(3, 1, 2, 0), outputs.transpose(1, 2, 0, 3)
        return _canonical(*turned, geometry, (1, 1), pads, rhs_dilation=geometry.strides)

    size = images.shape[0]
    if size <= _IMAGES_AT_ONCE:
        return of_some(images, outputs).transpose(1, 2, 0, 3)
    pieces = [_pieces(array) for array in (images, outputs)]
    zeros = jnp.zeros((images.shape[-1], *geometry.window, outputs.shape[-1]), images.dtype)
    total = lax.scan(lambda sum_, pair: (sum_ + of_some(*pair), None), zeros, tuple(pieces))[0]
    return total.transpose(1, 2, 0, 3)


def _pieces(array: jax.Array) -> jax.Array:
    """Cuts the leading axis into pieces, the last one filled up with zeros."""
    missing = -array.shape[0] % _IMAGES_AT_ONCE
    padded = jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))) if missing else array
    return padded.reshape(-1, _IMAGES_AT_ONCE, *array.shape[1:])
