"""A convolution that stays fast on CPUs inside loops and under ``vmap``.

Written as a matrix product with shifted copies of the image. XLA on CPUs runs the derivatives of its
own convolution on a slow path inside ``lax.scan`` and ``lax.fori_loop`` (30 to 300 times slower), and a
``vmap`` over kernels turns it into a grouped convolution; matrix products suffer neither. The price is
memory: the image is copied once for every position of the kernel.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def matmul_convolution(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """Computes what ``jax.lax.conv_general_dilated`` does, for plain two-dimensional convolutions.

    Pass it to a Flax layer: ``nn.Conv(8, (3, 3), conv_general_dilated=matmul_convolution)``.

    Args:
      images: shape (B, height, width, in_channels).
      kernel: shape (kernel_height, kernel_width, in_channels, out_channels).
      window_strides: two strides.
      padding: ``"SAME"``, ``"VALID"`` or the pads before and after for height and width.
      lhs_dilation: ones or None.
      rhs_dilation: ones or None.
      dimension_numbers: what Flax passes; the layout is NHWC, HWIO to NHWC in any case.
      feature_group_count: one.
      **options: ``precision`` and ``preferred_element_type`` of the matrix product.

    Returns:
      Shape (B, out_height, out_width, out_channels).

    Raises:
      ValueError: for dilation, groups, or images or kernels that are not of rank 4.

    Example:
      >>> import jax.numpy as jnp
      >>> images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> matmul_convolution(images, kernel, (1, 1), "VALID").shape
      (1, 2, 2, 5)
    """
    del dimension_numbers
    dilations = [*(lhs_dilation or ()), *(rhs_dilation or ())]
    if feature_group_count != 1 or any(d != 1 for d in dilations) or images.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            "`matmul_convolution` knows neither groups nor dilation, and only two dimensions: got "
            f"feature_group_count={feature_group_count}, dilations {dilations}, images of shape "
            f"{images.shape} and a kernel of shape {kernel.shape}; use `jax.lax.conv_general_dilated`"
        )
    window = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], window, window_strides, padding)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    spans = [size - side + 1 for size, side in zip(padded.shape[1:3], window, strict=True)]
    copies = [
        padded[:, i : i + spans[0] : window_strides[0], j : j + spans[1] : window_strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
    patches = jnp.concatenate(copies, axis=-1)
    return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), **options)


__all__ = ["matmul_convolution"]
