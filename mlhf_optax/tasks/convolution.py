"""A convolution that is as fast in loops and under ``vmap`` as outside them, on CPUs too.

XLA on CPUs only recognises convolutions in one canonical layout, and brings others into it everywhere
but in the bodies of loops. The derivatives that JAX makes of a convolution are in other layouts, so
inside ``lax.scan`` or ``lax.fori_loop`` they run 20 to 300 times slower than outside. :func:`convolve`
is a primitive of its own whose derivatives, on CPUs, are written in the canonical layout: a GGN product
then takes 0.86 to 1.01 times as long inside a loop as outside, with that of ``lax`` 2.1 to 17 times.

It is one trilinear form of images, kernel and outputs: given two of them, contracting gives the third.
Forward pass, gradient of the images and gradient of the kernel are its three cases; the derivatives of
each are the other two.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from mlhf_optax.tasks.cpu_convolution import LAYOUT, Geometry, contract_on_cpu

# Every array has a leading axis of groups, each a convolution of its own, for `vmap` over both
# operands: images (groups, B, H, W, I), kernel (groups, h, w, I, O), outputs (groups, B, H', W', O).
_ROLES = ("images", "kernel", "outputs")
# The axis that two of the arrays, but not the third, share: a batch of one of them can be folded into it.
_SHARED_AXIS = {
    **dict.fromkeys((("images", "outputs"), ("outputs", "images")), 1),  # examples
    **dict.fromkeys((("kernel", "outputs"), ("outputs", "kernel")), 4),  # channels of the outputs
    **{("images", "kernel"): 4, ("kernel", "images"): 3},  # channels of the images
}


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Computes what ``jax.lax.conv_general_dilated`` does, fast in loops and under ``vmap``.

    Pass it to a Flax layer: ``nn.Conv(8, (3, 3), conv_general_dilated=convolve)``. Arguments and errors are
    those of ``jax.lax.conv_general_dilated``. In the layout of Flax images are (B, height, width,
    in_channels), the kernel is (kernel_height, kernel_width, in_channels, out_channels) and the result
    (B, out_height, out_width, out_channels).

    Its own way is taken for two-dimensional convolutions in that layout without groups and dilation; all
    others are handed to ``jax.lax.conv_general_dilated``, and so are negative padding and convolutions of or
    to empty arrays (a kernel larger than the padded images). On other machines than CPUs the two are the
    same program, but that strided 1x1 convolutions pick their pixels first.

    Example:
      >>> import jax.numpy as jnp
      >>> images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> convolve(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (1, 2, 2, 5)
    """
    groups = (feature_group_count, batch_group_count)
    dilations = (lhs_dilation, rhs_dilation)
    options = (*dilations, dimension_numbers, *groups, precision, preferred_element_type)
    plain = lambda x, k: lax.conv_general_dilated(x, k, window_strides, padding, *options)
    jax.eval_shape(plain, images, kernel)  # lets it raise its errors
    is_special = any(number != 1 for some in (groups, *dilations) for number in some or ())
    is_special |= preferred_element_type is not None or _is_typed_by_mesh(images, kernel)
    if is_special or not _is_flax_layout(images, kernel, dimension_numbers):
        return plain(images, kernel)
    strides = (int(window_strides[0]), int(window_strides[1]))
    image, window = images.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image, window, strides, padding)
    top, left = ((int(low), int(high)) for low, high in padding)
    geometry = Geometry((image[0], image[1]), (window[0], window[1]), strides, (top, left), precision)
    if min(*top, *left) < 0 or min(*images.shape, *kernel.shape, *geometry.outputs) < 1:
        return plain(images, kernel)
    if window == (1, 1) and (top, left) == ((0, 0), (0, 0)):
        # Which pixels count is decided here, once for all products that share these images.
        images = images[:, :: strides[0], :: strides[1]]
        geometry = geometry._replace(image=geometry.outputs, strides=(1, 1))
    return _convolution_p.bind(images[None], kernel[None], wanted="outputs", geometry=geometry)[0]


def _is_flax_layout(images: jax.Array, kernel: jax.Array, dimension_numbers: Any) -> bool:
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        return False
    asked = lax.conv_dimension_numbers(images.shape, kernel.shape, dimension_numbers)
    return asked == lax.conv_dimension_numbers(images.shape, kernel.shape, LAYOUT)


def _is_typed_by_mesh(*arrays: jax.Array) -> bool:
    """Whether types tell how arrays lie on devices (``shard_map``, explicit meshes): JAX knows the rules."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    return any(kind != jax.sharding.AxisType.Auto for mesh in meshes for kind in mesh.axis_types)


def _given(wanted: str) -> list[str]:
    """Returns the roles of the two operands, in their order."""
    return [role for role in _ROLES if role != wanted]


def _contract_one(first: jax.Array, second: jax.Array, wanted: str, geometry: Geometry) -> jax.Array:
    """Contracts arrays without the axis of groups as JAX would, for machines where that is fast."""
    how = {"dimension_numbers": LAYOUT, "precision": geometry.precision}
    forward = lambda x, k: lax.conv_general_dilated(x, k, geometry.strides, geometry.pads, **how)
    if wanted == "outputs":
        return forward(first, second)
    if wanted == "images":
        shape, of_target = (second.shape[0], *geometry.image, first.shape[2]), lambda x: forward(x, first)
    else:
        shape = (*geometry.window, first.shape[-1], second.shape[-1])
        of_target = lambda k: forward(first, k)
    return jax.linear_transpose(of_target, jax.ShapeDtypeStruct(shape, first.dtype))(second)[0]


def _contract(first: jax.Array, second: jax.Array, *, wanted: str, geometry: Geometry) -> jax.Array:
    if first.shape[0] == 1:
        return _contract_one(first[0], second[0], wanted, geometry)[None]
    return jax.vmap(lambda a, b: _contract_one(a, b, wanted, geometry))(first, second)


def _abstract(first: Any, second: Any, *, wanted: str, geometry: Geometry) -> Any:
    shape = {  # axes of the operands are looked up only where they are there
        "images": lambda: (second.shape[1], *geometry.image, first.shape[3]),
        "kernel": lambda: (*geometry.window, first.shape[4], second.shape[4]),
        "outputs": lambda: (first.shape[1], *geometry.outputs, second.shape[4]),
    }[wanted]()
    return ShapedArray((first.shape[0], *shape), first.dtype)


def _transpose(target: int, cotangent, first, second, *, wanted: str, geometry: Geometry):
    """Contracts the cotangent with the operand that is not the target."""
    roles = _given(wanted)
    known = {wanted: cotangent, roles[1 - target]: (first, second)[1 - target]}
    operands = (known[role] for role in _given(roles[target]))
    return _convolution_p.bind(*operands, wanted=roles[target], geometry=geometry)


def _batch(operands, axes, *, wanted: str, geometry: Geometry):
    """Batches both operands by more groups, one of them by more of the axis that only the result shares."""
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    roles = _given(wanted)
    bind = lambda *pair: _convolution_p.bind(*pair, wanted=wanted, geometry=geometry)
    if None not in axes:
        moved = [jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
        result = bind(*(x.reshape(-1, *x.shape[2:]) for x in moved))
        return result.reshape(size, -1, *result.shape[1:]), 0
    position = axes.index(None)
    batched = 1 - position
    fold, unfold = _SHARED_AXIS[roles[batched], wanted], _SHARED_AXIS[wanted, roles[batched]]
    moved = jnp.moveaxis(operands[batched], axes[batched], fold)
    folded = moved.reshape(*moved.shape[:fold], -1, *moved.shape[fold + 2 :])
    pair = (folded, operands[position]) if batched == 0 else (operands[position], folded)
    result = bind(*pair)
    shape = result.shape
    return result.reshape(*shape[:unfold], size, -1, *shape[unfold + 1 :]), unfold


_convolution_p = core.Primitive("mlhf_convolution")
_convolution_p.def_impl(jax.jit(_convolution_p.bind, static_argnames=("wanted", "geometry")))
_convolution_p.def_abstract_eval(_abstract)
ad.defbilinear(
    _convolution_p,
    lambda cotangent, x, y, **options: _transpose(0, cotangent, x, y, **options),
    lambda cotangent, x, y, **options: _transpose(1, cotangent, x, y, **options),
)
batching.primitive_batchers[_convolution_p] = _batch
mlir.register_lowering(_convolution_p, mlir.lower_fun(_contract, multiple_results=False))
mlir.register_lowering(
    _convolution_p, mlir.lower_fun(contract_on_cpu, multiple_results=False), platform="cpu"
)
