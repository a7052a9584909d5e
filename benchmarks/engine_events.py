"""Thousands of random events in an engine with few blocks: no wrong token, and memory that stays as it was.

    python benchmarks/engine_events.py --events=20000 --preemption=swap

A tiny model in float32; 24 slots of 160 tokens, 4 lanes, blocks of 16 tokens for three whole sequences. Every tenth
answer is drawn again from a fresh forward pass (qcn_jax.testing.engine_events). Prints a line of JSON every thousand
events and exits with 1 where a token was wrong, a log-probability off by more than --bound, or memory grew.
"""

import json
import pathlib
import sys
import time

import jax
from absl import app, flags

from qcn_jax import testing
from qcn_jax.inference.engine import Engine
from qcn_jax.testing.engine_events import Life

_EVENTS = flags.DEFINE_integer("events", 20_000, "how many", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of them")
_PREEMPTION = flags.DEFINE_enum("preemption", "swap", ["swap", "recompute"], "of blocks that make room")
_CHECK = flags.DEFINE_float("check", 0.1, "share of answers that are checked")
_BOUND = flags.DEFINE_float("bound", 1e-3, "of differences between log-probabilities, in nats")
_EVERY, _GROWTH = 1000, 1.1  # of what was held after a quarter of all events, when everything had been compiled


def resident() -> int:
    """Bytes of memory that this process holds."""
    return next(int(line.split()[1]) << 10 for line in pathlib.Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmRSS:"))


def main(_: list[str]) -> int:
    """Plays the events."""
    params = jax.device_put(jax.tree.map(lambda leaf: leaf * leaf.dtype.type(0.2), testing.random_params(testing.TINY)))
    engine = Engine(testing.TINY, params, slots=24, max_length=160, max_new_tokens=8, stop_ids=(7,), prefill_rows=4,
                    prefill_chunk=32, snapshots=6, with_routes=True, max_num_seqs=4, block_size=16, num_blocks=33,
                    preemption=_PREEMPTION.value)
    life, began, first = Life(engine, testing.TINY, params, _SEED.value, _CHECK.value), time.monotonic(), None
    for event in range(1, _EVENTS.value + 1):
        life.step()
        if event % _EVERY and event != _EVENTS.value:
            continue
        arrays = sum(leaf.nbytes for leaf in jax.live_arrays())
        print(json.dumps({"events": event, "seconds": round(time.monotonic() - began), "checked": life.counted.checked,
                          "worst_nats": life.counted.worst, "resident_mb": resident() >> 20, "device_bytes": arrays,
                          **engine.counts()}), flush=True)
        if first is None and 4 * event >= _EVENTS.value:
            first = resident(), arrays
    print(json.dumps({"by_event": dict(life.counted.events), "preemption": _PREEMPTION.value}))
    grown = resident() > _GROWTH * first[0] or arrays > first[1]
    return int(life.counted.worst > _BOUND.value or grown)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
