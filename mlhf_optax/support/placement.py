"""Where arrays lie when there are several devices: state beside its parameters, small things on all.

Code runs on several devices in two ways. Under ``jax.jit`` arrays lie on a mesh, and the program is that of
all devices together. In ``jax.shard_map`` and ``jax.pmap`` it is that of one device, and ``axis_name`` names
the axis that it is mapped over.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

AxisName = Hashable | Sequence[Hashable] | None


def zeros_like(param: Any, dtype: Any = None, leading: tuple[int, ...] = ()) -> jax.Array:
    """Returns zeros that lie on the devices as a parameter does.

    Args:
      param: the parameter, an array or what ``jit`` traces.
      dtype: dtype of the zeros; that of the parameter if None.
      leading: sizes of axes that the zeros have before those of the parameter; these are on every device.

    Returns:
      Zeros of shape ``(*leading, *param.shape)``, in a buffer of their own.

    Example:
      >>> zeros_like(jnp.ones((3, 2)), leading=(4,)).shape
      (4, 3, 2)
    """
    # Weakly typed arrays, such as `jnp.full(n, 0.0)`, have strongly typed zeros, as a step returns them.
    dtype = jnp.result_type(param) if dtype is None else dtype
    if not isinstance(param, Tracer):
        # Said, as JAX forgets where a weakly typed array lies.
        zeros = jnp.zeros_like(param, dtype, device=_sharding_on_mesh(param))
        return jnp.broadcast_to(zeros, (*leading, *jnp.shape(param))) if leading else zeros
    like = jnp.broadcast_to(param, (*leading, *param.shape))
    zeros = jnp.zeros_like(like, dtype)
    # A constant depends on nothing, so by itself the compiler would put all of it on every device. With
    # explicit axes `jit` would drop the parameter, and not know the devices at all.
    return zeros if _mesh_of(like) is None else _beside(like, zeros)


def placed_like(old: Any, new: Any) -> Any:
    """Returns the next state with each array on the devices where the old one lies.

    Otherwise the compiler chooses, and a step whose state lies elsewhere is compiled again.

    Args:
      old: the state that a step got.
      new: the state that it returns, of the same shapes.
    """

    def one(before: Any, after: Any) -> Any:
        is_traced = isinstance(before, Tracer) and isinstance(after, Tracer)
        if not is_traced or after.ndim == 0 or before.shape != after.shape:
            return after
        return _placed_as(before, after)

    return jax.tree.map(one, old, new)


def _placed_as(like: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the values, traced, on the devices as an array of the same shape lies."""
    mesh = _mesh_of(like)
    if mesh is None:
        return values
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return _constrained(values, mesh, jax.typeof(like).sharding.spec)
    return _beside(like, values)


def _beside(like: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the values, by a choice between them and the other array that is always the same."""
    # XLA places both branches of a choice alike, and learns only later that the condition is constant: the
    # choice costs nothing.
    always = lax.optimization_barrier(jnp.array(True))
    return jnp.where(always, values, lax.stop_gradient(like).astype(values.dtype))


def copied_to_mesh_of(params: chex.ArrayTree, state: Any) -> Any:
    """Returns the state, of which arrays on no mesh are copied to every device of the parameters' mesh.

    A step returns all of its state on the mesh. If a counter began elsewhere, the second step would be
    compiled again.

    Args:
      params: the parameters. Nothing is done unless they are arrays on one mesh.
      state: arrays made from them.

    Raises:
      ValueError: if the parameters lie on different meshes.
    """
    leaves = jax.tree.leaves(params)
    placed = [x.sharding for x in leaves if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    meshes: list[Any] = list(dict.fromkeys(s.mesh for s in placed if isinstance(s, jax.NamedSharding)))
    if not meshes:
        return state
    if len({tuple(mesh.devices.flat) for mesh in meshes}) > 1:
        raise ValueError(
            f"`params` lie on meshes of different devices, {' and '.join(map(str, meshes))}; put all of them "
            "on one mesh with `jax.device_put(params, shardings)`"
        )
    everywhere = jax.NamedSharding(meshes[0], jax.P())

    def place(leaf: Any) -> Any:
        is_placed = isinstance(getattr(leaf, "sharding", None), jax.NamedSharding)
        return leaf if is_placed else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, state)


def num_shards(array: Any) -> int:
    """Returns over how many shards the first axis of an array is cut, 1 where that is not known.

    Under ``jit`` it is known only on meshes with explicit axes.
    """
    if not isinstance(array, jax.Array):
        return 1
    sharding = jax.typeof(array).sharding if isinstance(array, Tracer) else array.sharding
    if not isinstance(sharding, jax.NamedSharding) or not sharding.spec or not sharding.spec[0]:
        return 1
    names = sharding.spec[0]
    return math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def first_entries(array: Any, count: int) -> Any:
    """Returns the first entries along the first axis.

    Those that cannot be cut evenly over the shards are whole on every device of a mesh with explicit axes,
    where JAX refuses the slice; on others the compiler decides.

    Example:
      >>> first_entries(jnp.arange(4), 2)
      Array([0, 1], dtype=int32)
    """
    first = lambda entries: entries[:count]
    return placed_by_compiler(first, array) if count % num_shards(array) else first(array)


def is_on_mesh(array: jax.Array) -> bool:
    """Returns whether an array, traced by ``jit`` or not, is known to lie on several devices of a mesh.

    One device of a mesh with explicit axes counts as several: JAX asks of both where each result lies.
    """
    own = _sharding_on_mesh(array)
    mesh = own.mesh if own is not None and not isinstance(array, Tracer) else _mesh_of(array)
    if mesh is None or mesh.empty:
        return False
    return mesh.size > 1 or jax.sharding.AxisType.Explicit in mesh.axis_types


def replicated(array: jax.Array) -> jax.Array:
    """Returns the array whole on every device of its mesh, unchanged if its mesh is not known.

    A small array costs less on every device than gathered wherever it is used.

    Example:
      >>> replicated(jnp.ones(3))
      Array([1., 1., 1.], dtype=float32)
    """
    mesh = _mesh_of(array)
    return array if mesh is None else _constrained(array, mesh, jax.P())


def placed_by_compiler(function: Callable[..., Any], *arguments: Any, like: jax.Array | None = None) -> Any:
    """Returns ``function(*arguments)``, in which the compiler says where each array lies.

    On a mesh with explicit axes JAX refuses reshapes and products for which it cannot tell where the result
    lies. On other meshes, and without one, the function is just called.

    Args:
      function: of arrays; it must get all of them as arguments.
      *arguments: trees of arrays.
      like: the result lies as this array, of the same number of axes; whole on every device if None.

    Example:
      >>> placed_by_compiler(jnp.ravel, jnp.eye(2))
      Array([1., 0., 0., 1.], dtype=float32)
    """
    meshes = [_explicit_mesh_of(leaf) for leaf in jax.tree.leaves(arguments)]
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None:
        return function(*arguments)
    spec = jax.P() if like is None else jax.typeof(like).sharding.spec
    return jax.sharding.auto_axes(function, out_sharding=jax.NamedSharding(mesh, spec))(*arguments)


def split_over_devices(
    function: Callable[[jax.Array], Any], pieces: jax.Array, axis_name: AxisName = None
) -> Any:
    """Returns ``function(pieces)``, to which each device contributes its own share of the pieces.

    Under ``jit`` the devices are those of the mesh that the pieces lie on, which their type tells. In
    ``jax.shard_map`` and ``jax.pmap`` only ``axis_name`` can tell that devices have the same pieces. Where
    neither is known, the function is called on all pieces.

    Args:
      function: maps an array of shape (m, ...) to arrays with m entries along their first axes, piece by
        piece, for any m. It must work on zeros, with which shares are filled up.
      pieces: shape (n, ...), the same on all devices.
      axis_name: the axis, or axes, along which code is mapped and the pieces are the same.

    Returns:
      What the function returns, with n entries, whole on every device.

    Example:
      >>> split_over_devices(jnp.linalg.inv, jnp.array([[[2.0]], [[4.0]]])).ravel()
      Array([0.5 , 0.25], dtype=float32)
    """
    if axis_name is not None:
        return _split_over_axis(axis_name, function, pieces)
    mesh = _mesh_of(pieces)
    return function(pieces) if mesh is None or mesh.size == 1 else _split_over_mesh(mesh, function, pieces)


def _split_over_axis(axis_name: AxisName, function: Callable[[jax.Array], Any], pieces: jax.Array) -> Any:
    padded = _padded(pieces, lax.axis_size(axis_name))
    share = padded.shape[0] // lax.axis_size(axis_name)
    first = lax.axis_index(axis_name) * share

    def gathered(part: jax.Array) -> jax.Array:
        # A sum, since its type says that it is the same on all devices; that of gathered parts does not.
        own = mark_varying(jnp.zeros((padded.shape[0], *part.shape[1:]), part.dtype), axis_name)
        own = lax.dynamic_update_slice_in_dim(own, part, first, 0)
        return sum_over(own, axis_name)[: pieces.shape[0]]

    return jax.tree.map(gathered, function(lax.dynamic_slice_in_dim(padded, first, share)))


def _split_over_mesh(
    mesh: jax.sharding.AbstractMesh, function: Callable[[jax.Array], Any], pieces: jax.Array
) -> Any:
    cut = jax.P(mesh.axis_names)
    # Whole first: XLA would otherwise cut what comes before, too, and move it from device to device.
    padded = _padded(_constrained(pieces, mesh, jax.P()), mesh.size)
    parts = jax.shard_map(function, mesh=mesh, in_specs=cut, out_specs=cut)(_constrained(padded, mesh, cut))
    return jax.tree.map(lambda part: _constrained(part, mesh, jax.P())[: pieces.shape[0]], parts)


def _padded(pieces: jax.Array, size: int) -> jax.Array:
    """Returns the pieces, with zeros at the end that make their number a multiple of ``size``."""
    return jnp.pad(pieces, [(0, -pieces.shape[0] % size)] + [(0, 0)] * (pieces.ndim - 1))


def _mesh_of(array: Any) -> jax.sharding.AbstractMesh | None:
    """Returns the mesh of what ``jit`` traces; None if there is none, or code is mapped over axes of it."""
    mesh = getattr(jax.typeof(array).sharding, "mesh", None)
    if not isinstance(array, Tracer) or mesh is None or mesh.empty:
        return None
    return None if jax.sharding.AxisType.Manual in mesh.axis_types else mesh


def _explicit_mesh_of(array: Any) -> jax.sharding.AbstractMesh | None:
    """Returns the mesh in the type of an array, traced or not, if the type says where the array lies."""
    mesh = getattr(jax.typeof(array).sharding, "mesh", None)
    kinds = () if mesh is None or mesh.empty else mesh.axis_types
    is_explicit = jax.sharding.AxisType.Explicit in kinds and jax.sharding.AxisType.Manual not in kinds
    return mesh if is_explicit else None


def _sharding_on_mesh(array: Any) -> jax.NamedSharding | None:
    sharding = getattr(array, "sharding", None)
    return sharding if isinstance(sharding, jax.NamedSharding) else None


def _constrained(array: jax.Array, mesh: jax.sharding.AbstractMesh, spec: jax.P) -> jax.Array:
    sharding = jax.NamedSharding(mesh, spec)
    # With explicit axes the type of an array says where it lies, and a constraint would only check that.
    is_explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    return (jax.sharding.reshard if is_explicit else lax.with_sharding_constraint)(array, sharding)


def check_axis(axis_name: AxisName) -> None:
    """Raises ValueError unless the axis is one that the code is mapped over."""
    if axis_name is None:
        return
    try:
        lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"`axis_name`={axis_name!r} is no axis that this code is mapped over; call `update` inside "
            "`jax.shard_map` or `jax.pmap` with that axis, or leave `axis_name` out, as for `jax.jit` on "
            "sharded arrays"
        ) from error


def check_averaged(gradient: chex.ArrayTree, axis_name: AxisName) -> None:
    """Raises ValueError if it is known that gradients differ along the axis."""
    if any(_varying_axes(leaf, axis_name) for leaf in jax.tree.leaves(gradient)):
        raise ValueError(
            f"the gradients differ along `axis_name`={axis_name!r}; average them first, "
            f"`grads = jax.lax.pmean(grads, {axis_name!r})`"
        )


def mark_varying(tree: Any, axis_name: AxisName) -> Any:
    """Returns the tree marked as different along the axis, so that derivatives by it are local."""
    if axis_name is None:
        return tree

    def mark(leaf):
        missing = tuple(name for name in axis_names(axis_name) if name not in _varying_axes(leaf, axis_name))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def mean_over(tree: Any, axis_name: AxisName) -> Any:
    """Returns the mean over the axis, the tree itself if there is none."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def sum_over(tree: Any, axis_name: AxisName) -> Any:
    """Returns the sum over the axis, the tree itself if there is none."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def axis_names(axis_name: AxisName) -> tuple:
    """Returns the names of one axis or of several."""
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _varying_axes(leaf: Any, axis_name: AxisName) -> set:
    kind = jax.typeof(leaf)
    # Versions of JAX differ in where the type of an array says it.
    varying = kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ())
    return set(axis_names(axis_name)) & set(varying or ()) if axis_name is not None else set()
