"""Speed of the generation engine: prefill and decoding tokens a second, by slots and cache size.

    python benchmarks/engine.py --config=configs/nano.py --slots=32,64 --max_length=768

Random weights (speed does not depend on them), prompts of 120 random tokens, 64 sampled tokens a slot, no stop token.
Each row is the median of `--repeats` runs after one that compiles.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from qcn_jax.cli import parsing
from qcn_jax.config import ModelConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next, parameter_count

PROMPT, NEW = 120, 64


def measure(model: ModelConfig, params: dict, slots: int, max_length: int, repeats: int) -> tuple[float, float, float]:
    """(prefill tokens a second, decoded tokens a second, seconds to compile)."""
    engine = Engine(model, params, slots=slots, max_length=max_length, max_new_tokens=NEW)
    rng = np.random.default_rng(0)
    prompts = {slot: rng.integers(0, model.vocab_size, PROMPT).tolist() for slot in range(slots)}
    prefill, decode, compiling = [], [], 0.0
    for run in range(repeats + 1):
        engine.reset(range(slots))
        began = time.perf_counter()
        engine.extend(prompts)
        engine.generate(range(slots), seeds=range(slots), max_new_tokens=1)  # waits for the prefill
        middle = time.perf_counter()
        count = sum(len(g.tokens) for g in engine.generate(range(slots), seeds=range(slots), max_new_tokens=NEW - 1))
        end = time.perf_counter()
        if run == 0:
            compiling = end - began
            continue
        prefill.append(slots * PROMPT / (middle - began))
        decode.append(count / (end - middle))
    return statistics.median(prefill), statistics.median(decode), compiling


def main() -> None:
    """Parses flags and prints the table."""
    values = flags.FlagValues()
    flags.DEFINE_list("slots", ["32", "64"], "Numbers of slots.", flag_values=values)
    flags.DEFINE_integer("max_length", 768, "Cache size of a slot.", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "Timed runs.", flag_values=values)
    arguments = ["--config=configs/nano.py", *sys.argv[1:]]  # the last one counts
    config = parsing.define_config(values, arguments)
    parsing.parse(values, "engine", __doc__, arguments)
    model = config().model
    params = jax.jit(Qwen3Next(model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    print(f"{parameter_count(model) / 1e6:.1f} M parameters, {jax.devices()[0].device_kind}, {len(jax.devices())} device(s)")
    print(f"{'slots':>6} {'prefill tok/s':>14} {'decode tok/s':>13} {'first run s':>12}")
    for slots in map(int, values.slots):
        prefill, decode, compiling = measure(model, params, slots, values.max_length, values.repeats)
        print(f"{slots:>6} {prefill:>14,.0f} {decode:>13,.0f} {compiling:>12.1f}")


if __name__ == "__main__":
    main()
