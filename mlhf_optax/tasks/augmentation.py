"""Augmentation of images on the device, from the 8-bit arrays that the datasets hold.

Images are padded, cropped back at random, mirrored at random and standardised one by one, as the
paper's authors do with CIFAR-10. Everything can be used under ``jit`` and ``vmap``.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mlhf_optax.support.checks import NOT_NEGATIVE, check_number, require


def standardize(images: jax.Array) -> jax.Array:
    """Gives every image, shape (..., height, width, channels), mean 0 and standard deviation 1, as float32.

    The deviation is taken as at least ``1 / sqrt(number of values)``, so that an image of one colour
    becomes zeros rather than noise.

    Example:
      >>> standardize(jnp.array([0, 100, 100, 0], jnp.uint8).reshape(2, 2, 1)).ravel()
      Array([-1.,  1.,  1., -1.], dtype=float32)
    """
    images = jnp.asarray(images, jnp.float32)
    axes = (-3, -2, -1)
    centred = images - jnp.mean(images, axis=axes, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centred**2, axis=axes, keepdims=True))
    num_values = images.shape[-3] * images.shape[-2] * images.shape[-1]
    return centred / jnp.maximum(deviation, num_values**-0.5)


def augment_images(key: chex.PRNGKey, images: jax.Array, pad: int = 4, flip: bool = True) -> jax.Array:
    """Crops, mirrors and standardises images, each in its own way.

    Args:
      key: random key; all images draw from it.
      images: shape (..., height, width, channels), of any type, with any leading axes.
      pad: zeros added on each side before a crop to the old size at a random place; 0 for no crop.
      flip: mirror every second image, at random.

    Returns:
      The same shape, float32, standardised after the crop.

    Raises:
      ValueError: if ``pad`` is negative or the images have fewer than three axes.

    Example:
      >>> augment_images(jax.random.key(0), jnp.zeros((5, 2, 32, 32, 3), jnp.uint8)).shape
      (5, 2, 32, 32, 3)
    """
    check_number("pad", pad, NOT_NEGATIVE)
    require(images.ndim >= 3, "images", "of shape (..., height, width, channels)", images.shape)
    crop_key, flip_key = jax.random.split(key)
    flat = images.reshape(-1, *images.shape[-3:])
    if pad:
        corners = jax.random.randint(crop_key, (len(flat), 2), 0, 2 * pad + 1)
        padded = jnp.pad(flat, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        crop = lambda image, corner: lax.dynamic_slice(image, (*corner, 0), images.shape[-3:])
        flat = jax.vmap(crop)(padded, corners)
    if flip:
        is_mirrored = jax.random.bernoulli(flip_key, shape=(len(flat), 1, 1, 1))
        flat = jnp.where(is_mirrored, flat[:, :, ::-1], flat)
    return standardize(flat).reshape(images.shape)


def augment_batch(
    key: chex.PRNGKey, batch: dict[str, Any], pad: int = 4, flip: bool = True
) -> dict[str, Any]:
    """Returns the batch with :func:`augment_images` applied to its ``"image"``.

    Example:
      >>> batch = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
      >>> augment_batch(jax.random.key(0), batch)["image"].dtype
      dtype('float32')
    """
    return {**batch, "image": augment_images(key, batch["image"], pad, flip)}


def network_input(images: jax.Array) -> jax.Array:
    """Returns what networks see: 8-bit images standardised, others, as augmentation leaves them, unchanged.

    Example:
      >>> float(network_input(jnp.full((2, 2, 1), 0.5)).sum())
      2.0
    """
    return standardize(images) if images.dtype == jnp.uint8 else images
