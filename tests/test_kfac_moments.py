"""The moments of patches that K-FAC is given on CPUs, against patches cut out one by one."""

import jax
import numpy as np
import pytest
from kfac import moments_of_patches

CHANNELS_LAST = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.parametrize("weights", [None, (3,), (3, 1, 1, 1)], ids=["alike", "by image", "by position"])
@pytest.mark.parametrize(
    ("kernel", "strides", "padding"),
    [((3, 2), (1, 1), ((1, 1), (0, 1))), ((2, 3), (2, 3), ((0, 0), (2, 1)))],
    ids=["stride 1", "strides 2 and 3"],
)
def test_moments_are_those_of_patches_cut_out_one_by_one(kernel, strides, padding, weights):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 7, 6, 2)).astype(np.float32)
    weighting = None if weights is None else rng.uniform(0.5, 2, size=weights).astype(np.float32)
    padded = np.pad(images, ((0, 0), *padding, (0, 0)))
    height, width = kernel
    second = np.zeros((height * width * 2,) * 2)
    first = np.zeros(height * width * 2)
    for n in range(3):
        weight = 1.0 if weighting is None else weighting.reshape(3)[n]
        for y in range(0, padded.shape[1] - height + 1, strides[0]):
            for x in range(0, padded.shape[2] - width + 1, strides[1]):
                patch = padded[n, y : y + height, x : x + width].reshape(-1)
                second += weight * np.outer(patch, patch)
                first += weight * patch
    moments = jax.jit(moments_of_patches, static_argnums=(1, 2, 3, 4))
    found = moments(images, kernel, strides, padding, CHANNELS_LAST, weighting)
    np.testing.assert_allclose(found[0], second.reshape(*kernel, 2, *kernel, 2), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], first.reshape(*kernel, 2), rtol=1e-4, atol=1e-4)


def test_channels_that_are_not_last_are_refused():
    first = jax.lax.ConvDimensionNumbers((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(ValueError, match="channels last"):
        moments_of_patches(np.ones((1, 2, 4, 4)), (2, 2), (1, 1), ((0, 0), (0, 0)), first)
