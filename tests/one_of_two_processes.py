"""One of the processes of `test_sharding.py`: trains on its devices, and writes or reads a checkpoint.

Arguments: port, number of processes, own number, devices per process, folder, and "write", "read", "die",
which writes and has the last process killed before the second step, or "meta", which meta-trains.
"""

import os
import pathlib
import signal
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P


def main(port, processes, own, devices, folder, task):
    """Two steps, with a checkpoint between them, or three meta-iterations."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, own)
    import eight_devices as checks  # makes a mesh of the devices, which are known only now

    def write(tree):
        """Writes arrays that all devices have."""
        if own == 0:
            leaves = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(tree)]
            np.savez(folder / f"{task}.npz", *leaves)

    if task == "meta":
        state, seen = checks.run_long(checks.LONG, checks.LEARNED_MOMENTUM, checks.CENTRE, mesh=checks.MESH)
        return write((state.centre, state.counts, state.key, seen))

    def spread(tree):
        """Puts what every process has whole on the mesh, cut along the first axis."""
        sharding = jax.NamedSharding(checks.MESH, P("data"))
        host = jax.tree.map(np.asarray, tree)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), host)

    tx, params, batch = checks.diagonal(), spread(checks.start()), spread(checks.examples())
    state, step = jax.jit(tx.init)(params), jax.jit(checks.make_step(tx))
    with ocp.StandardCheckpointer() as checkpointer:
        if task != "read":
            params, state = step(params, state, batch)
            checkpointer.save(folder / "step_1", (params, state))
        else:
            shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            params, state = checkpointer.restore(folder / "step_1", jax.tree.map(shape, (params, state)))
            checks.check_follows(state, params)
    if task == "die" and own == processes - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    params, state = step(params, state, batch)
    whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(checks.MESH, P()))(params)
    return write(whole)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), pathlib.Path(sys.argv[5]), sys.argv[6])
