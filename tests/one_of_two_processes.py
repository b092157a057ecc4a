"""One of the processes of `test_sharding.py`: trains on its devices, and writes or reads a checkpoint.

Arguments: port, number of processes, own number, devices per process, folder, and what to do: "write";
"read"; "die", which writes and has the last process killed before the second step; "meta", which takes three
meta-iterations; or "run", "resume" and "all", which meta-train with checkpoints until meta-iteration 2, from
there to 4, and from nothing to 4.
"""

import os
import pathlib
import signal
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P

RUNS = {"run": {"stop_after": 2}, "resume": {"resume": True}, "all": {}}


def main(port, processes, own, devices, folder, task):
    """Two steps, with a checkpoint between them, or three meta-iterations."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, own)
    import many_devices as checks  # makes a mesh of the devices, which are known only now

    def write(tree):
        """Writes arrays that all devices have."""
        if own == 0:
            leaves = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(tree)]
            np.savez(folder / f"{task}.npz", *leaves)

    if task == "meta":
        state, seen = checks.run_long(checks.LONG, checks.LEARNED_MOMENTUM, checks.CENTRE, mesh=checks.MESH)
        return write((state.centre, state.counts, state.key, seen))
    if task in RUNS:
        done = meta_train(checks, folder / "run", **RUNS[task])
        return write((done.state.centre, done.state.counts, done.best_meta_params, done.best_score))

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


def meta_train(checks, folder, stop_after=None, resume=False):
    """Four meta-iterations over all devices, with a checkpoint after every second."""
    from mlhf_optax import meta_training as mt  # only now, as it makes arrays

    algorithm = mt.make_long_horizon_step(
        [checks.TASK], checks.LEARNED_MOMENTUM, checks.LONG, optax.sgd(0.05), mesh=checks.MESH
    )
    batches = [checks.pairs_of_batches(checks.LONG, 0)]
    return mt.meta_train(
        None,
        None,
        checks.CENTRE,
        lambda key: jax.tree.map(lambda leaf: jax.random.permutation(key, leaf), batches),
        jax.jit(lambda m: mt.Validation(abs(m["rate"] + 1.02), m["rate"][None], m["sign"])),
        folder,
        mt.Schedule(iterations=4, checkpoint_every=2, validate_every=1, stop_after=stop_after),
        resume=resume,
        algorithm=algorithm,
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), pathlib.Path(sys.argv[5]), sys.argv[6])
