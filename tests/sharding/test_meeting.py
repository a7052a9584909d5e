"""Processes that run a program at one time, however long one of them takes to get there."""

import sys

PROGRAM = """
import sys, time
from qcn_jax.sharding import distributed
coordinator, number = sys.argv[1], int(sys.argv[2])
distributed.start(coordinator, 2, number)
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((2,), ("data",))
place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
scatter = jax.shard_map(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), mesh=mesh, in_specs=PartitionSpec(),
                        out_specs=PartitionSpec("data"), check_vma=False)
jitted = jax.jit(scatter, in_shardings=place(), out_shardings=place("data"))


class Slow:
    # The second process is late, once because it compiles.
    def lower(self, *arguments):
        time.sleep(2 * number)
        print("compiles", flush=True)
        return jitted.lower(*arguments)

    def __call__(self, *arguments):
        print("runs at", time.time(), flush=True)
        return jitted(*arguments)


program = distributed.met(Slow())
x = jax.make_array_from_callback((4,), place(), lambda index: np.arange(4.0)[index])
for late in (0, 2):
    time.sleep(late * number)
    print("arrives at", time.time(), flush=True)
    part = program(x).addressable_shards[0].data
    print("part", np.asarray(part).tolist(), flush=True)
"""


def test_no_process_runs_before_all_have_come_and_compiled(hosts):
    command = lambda coordinator, number: [sys.executable, "-c", PROGRAM, coordinator, str(number)]
    outputs = [output.splitlines() for output in hosts(command, devices=1).finish()]
    times = lambda word: [[float(line.split()[-1]) for line in lines if line.startswith(word)] for lines in outputs]
    for number, part in enumerate(([0.0, 2.0], [4.0, 6.0])):
        assert outputs[number].count("compiles") == 1 and outputs[number].count(f"part {part}") == 2
    for run, arrival in zip(zip(*times("runs at")), zip(*times("arrives at"))):
        assert min(run) >= max(arrival)
    assert min(one[0] for one in times("runs at")) >= times("arrives at")[1][0] + 2  # when it had compiled
