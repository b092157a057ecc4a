"""Spreads many trainings over the devices of a mesh, which may belong to several processes."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.support.placement import AxisName, axis_names


class Spread(NamedTuple):
    """Equal pieces of work, the first axis of arrays, spread evenly over devices (:func:`make_spread`).

    Attributes:
      mesh: the devices.
      axis_name: the axes of the mesh over which the work is spread.
    """

    mesh: jax.sharding.Mesh
    axis_name: tuple[Hashable, ...]

    @property
    def cut(self) -> jax.NamedSharding:
        """For arrays with one entry for each piece of work."""
        return jax.NamedSharding(self.mesh, self._cut)

    @property
    def whole(self) -> jax.NamedSharding:
        """For what all devices have."""
        return jax.NamedSharding(self.mesh, jax.P())

    @property
    def _cut(self) -> jax.P:
        first, *others = self.axis_name
        # A tuple of one name means the same, but the cache of compiled programs tells them apart.
        return jax.P(self.axis_name if others else first)

    def per_device(self, function: Callable, is_cut: Sequence[bool], is_result_cut: Any) -> Callable:
        """Returns the function as one that each device calls on its own pieces of work.

        Args:
          function: any function of arrays; it may sum over ``axis_name``.
          is_cut: for each argument, whether it has one entry for each piece; else all devices get all of it.
          is_result_cut: the same for the result, or for each of a tuple of results.
        """
        spec = lambda cut: self._cut if cut else jax.P()
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(map(spec, is_cut)),
            out_specs=jax.tree.map(spec, is_result_cut),
            # Loops of models and optimizers begin at constants, and JAX refuses them where it checks what
            # differs from device to device.
            check_vma=False,
        )

    def put_fields(self, state: Any, cut: Sequence[str]) -> Any:
        """Returns a named tuple with the named fields cut, and the others on all devices."""
        shardings = self.of_fields(type(state), cut)
        return type(state)(*map(self.put, state, shardings))

    def of_fields(self, kind: Any, cut: Sequence[str]) -> Any:
        """Returns the sharding of every field, as a named tuple of that kind."""
        return kind(*(self.cut if name in cut else self.whole for name in kind._fields))

    def put(self, tree: Any, sharding: jax.NamedSharding) -> Any:
        """Returns arrays with that sharding. Each of several processes gives all and keeps its part."""

        def place(leaf: Any) -> Any:
            if getattr(leaf, "sharding", None) == sharding:
                return leaf
            if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
                return jax.device_put(leaf, sharding)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(place(jax.random.key_data(leaf)))
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

        return jax.tree.map(place, tree)


def make_spread(mesh: jax.sharding.Mesh | None, axis_name: AxisName, count: int, name: str) -> Spread | None:
    """Returns how so many pieces of work are spread over a mesh; None without one.

    Args:
      mesh: the devices, or None.
      axis_name: axis of the mesh, or several; all of them if None. Along others every device does the same.
      count: number of pieces.
      name: what error messages call this number.

    Raises:
      TypeError: for a mesh of another type.
      ValueError: for an axis that the mesh does not have or that is given without a mesh, and if the work
        cannot be spread evenly.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> make_spread(mesh, None, 8, "num_pairs").axis_name
      ('data',)
    """
    if mesh is None:
        if axis_name is not None:
            raise ValueError(f"`axis_name`={axis_name!r} is an axis of a mesh; pass `mesh`, too")
        return None
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"`mesh` must be a `jax.sharding.Mesh` of devices, got {type(mesh).__name__}")
    names = mesh.axis_names if axis_name is None else axis_names(axis_name)
    if unknown := [own for own in names if own not in mesh.axis_names]:
        raise ValueError(
            f"`axis_name` must be among the axes of `mesh`, {mesh.axis_names}, got {unknown[0]!r}"
        )
    size = math.prod(mesh.shape[own] for own in names)
    if count % size:
        along = ", ".join(map(str, names))
        raise ValueError(
            f"`{name}`={count} must be a multiple of the {size} devices along {along} of `mesh`; "
            f"{math.ceil(count / size) * size} fits"
        )
    # A mesh with automatic axes, whose arrays may be used with others whatever the axes of `mesh` are.
    return Spread(jax.sharding.Mesh(mesh.devices, mesh.axis_names), tuple(names))
