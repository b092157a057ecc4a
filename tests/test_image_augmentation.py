"""Augmentation on the device against a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlhf_optax.tasks import augment_batch, augment_images, network_input, standardize


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def numpy_standardize(image):
    image = image.astype(np.float64)
    return (image - image.mean()) / max(image.std(), image.size**-0.5)


def numpy_variants(image, pad):
    """All that augmentation can make of an image, by row, column and whether it is mirrored."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[row : row + height, column : column + width]
            for is_mirrored in (False, True):
                yield (row, column, is_mirrored), numpy_standardize(crop[:, ::-1] if is_mirrored else crop)


def variant_of(augmented, image, pad):
    """Which variant of an image an augmented one is."""
    close = [name for name, v in numpy_variants(image, pad) if np.allclose(v, augmented, atol=1e-4)]
    assert len(close) == 1
    return close[0]


def test_standardised_images_are_those_of_numpy():
    images = random_images(3, 2, 5, 4, 3)
    expected = [[numpy_standardize(image) for image in row] for row in images]
    np.testing.assert_allclose(standardize(images), expected, atol=1e-5)
    of_one_colour = np.full((1, 4, 4, 3), 200, np.uint8)
    np.testing.assert_array_equal(standardize(of_one_colour), np.zeros((1, 4, 4, 3)))


def test_every_image_is_cropped_and_mirrored_in_its_own_way():
    images = random_images(400, 5, 4, 2)
    augmented = np.asarray(jax.jit(lambda k, x: augment_images(k, x, pad=1))(jax.random.key(0), images))
    assert augmented.dtype == np.float32
    seen = [variant_of(a, image, 1) for a, image in zip(augmented, images, strict=True)]
    counts = [seen.count(variant) for variant, _ in numpy_variants(images[0], 1)]
    assert min(counts) >= 7, "400 uniform draws of 18 variants"


def test_the_key_decides_and_leading_axes_do_not_matter():
    images = random_images(6, 8, 8, 3)
    flat, other = (augment_images(jax.random.key(seed), images) for seed in (0, 1))
    folded = augment_images(jax.random.key(0), images.reshape(2, 3, 8, 8, 3))
    np.testing.assert_array_equal(folded.reshape(6, 8, 8, 3), flat)
    assert not np.array_equal(flat, other)


def test_cropping_and_mirroring_can_be_left_out():
    images = random_images(40, 4, 4, 1)
    augment = lambda **options: augment_images(jax.random.key(0), images, **options)
    np.testing.assert_array_equal(augment(pad=0, flip=False), standardize(images))
    mirrored, cropped = augment(pad=0), augment(pad=1, flip=False)
    variants = {variant_of(a, i, 0) for a, i in zip(mirrored, images, strict=True)}
    assert variants == {(0, 0, False), (0, 0, True)}
    assert not any(variant_of(a, i, 1)[2] for a, i in zip(cropped, images, strict=True))


def test_a_batch_keeps_all_but_its_images():
    batch = {"image": random_images(4, 8, 8, 3), "label": jnp.arange(4), "weight": jnp.ones(4)}
    augmented = augment_batch(jax.random.key(0), batch)
    np.testing.assert_array_equal(augmented["image"], augment_images(jax.random.key(0), batch["image"]))
    assert augmented["label"] is batch["label"]
    assert augmented["weight"] is batch["weight"]


def test_networks_see_standardised_images_once():
    images = jnp.asarray(random_images(2, 4, 4, 3))
    seen = network_input(images)
    np.testing.assert_array_equal(seen, standardize(images))
    assert network_input(seen) is seen


@pytest.mark.parametrize(
    ("shape", "pad", "message"),
    [
        ((2, 4, 4, 3), -1, "`pad` must be a number >= 0, got -1"),
        ((4, 4), 1, r"`images` must be of shape \(..., height, width, channels\), got \(4, 4\)"),
    ],
)
def test_arguments_are_checked(shape, pad, message):
    with pytest.raises(ValueError, match=message):
        augment_images(jax.random.key(0), jnp.zeros(shape), pad)
