"""Claim: conversations of several turns go faster through the engine than through transformers, with the same tokens.

    python benchmarks/engine_turns.py --conversations=1,16,64

A random model of 31M parameters (float32) plays conversations of four turns: prompts of 40 to 300 tokens, 24 generated
tokens a turn (greedy, no stop), observations of 10 to 120 tokens, all drawn with a seed. Rows of one run:

  engine        keeps its sequences from turn to turn; prefill in one shape
  shapes        the same with several shapes of prefill calls
  again         every turn is prefilled from its first token, in several shapes
  transformers  generate() on a left-padded batch, whose cache it keeps from turn to turn

Tokens in and out a second, the median of `--repeats` runs after one that compiles; the last column is the ratio to
transformers. How many tokens of prompts and observations the first form prefills a second is beside what a forward pass
without a cache of 16 x 64 tokens takes in.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from qcn_jax import hub
from qcn_jax.config import ModelConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import GREEDY
from qcn_jax.model import Qwen3Next, parameter_count

CONVERSATIONS = flags.DEFINE_list("conversations", ["1", "16", "64"], "How many side by side.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each.")
TURNS, NEW, LENGTH = 4, 24, 1024
MODEL = ModelConfig(
    vocab_size=8192, hidden_size=384, num_hidden_layers=8, full_attention_interval=4, num_attention_heads=6,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=LENGTH, linear_num_key_heads=4, linear_key_head_dim=48,
    linear_num_value_heads=8, linear_value_head_dim=48, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128,
    shared_expert_intermediate_size=128, dtype="float32", chunk_size=64,
)  # fmt: skip
Talks = list[list[list[int]]]  # of every conversation, what comes before each turn


def talks(count: int) -> Talks:
    """Prompts and observations."""
    rng = np.random.default_rng(0)
    text = lambda least, most: rng.integers(8, MODEL.vocab_size, rng.integers(least, most + 1)).tolist()
    return [[text(40, 300)] + [text(10, 120) for _ in range(TURNS - 1)] for _ in range(count)]


def by_engine(engine: Engine, given: Talks, again: bool) -> tuple[list[list[int]], float]:
    """What is generated in all, and the seconds that went into prefill."""
    slots, held = range(len(given)), [[] for _ in given]
    made, seconds = [[] for _ in given], 0.0
    engine.reset(slots)
    for turn in range(TURNS):
        began = time.perf_counter()
        if again:
            engine.reset(slots)
        added = {slot: (held[slot] if again else []) + given[slot][turn] for slot in slots}
        engine.extend(added)
        jax.block_until_ready(engine._logits)
        seconds += time.perf_counter() - began
        for slot, one in zip(slots, engine.generate(slots, seeds=slots, sampling=GREEDY, max_new_tokens=NEW)):
            held[slot] = held[slot] + given[slot][turn] + one.tokens
            made[slot] += one.tokens
    return made, seconds


def by_transformers(model, given: Talks) -> list[list[int]]:
    """The same by generate(); padding stands to the left of every turn's tokens."""
    import torch

    count, made, cache = len(given), [[] for _ in given], None
    ids, mask = torch.zeros(count, 0, dtype=torch.long), torch.zeros(count, 0, dtype=torch.long)
    for turn in range(TURNS):
        width = max(len(talk[turn]) for talk in given)
        rows = [[0] * (width - len(talk[turn])) + talk[turn] for talk in given]
        real = [[0] * (width - len(talk[turn])) + [1] * len(talk[turn]) for talk in given]
        ids, mask = torch.cat([ids, torch.tensor(rows)], 1), torch.cat([mask, torch.tensor(real)], 1)
        out = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=NEW, min_new_tokens=NEW,
                             do_sample=False, use_cache=True, return_dict_in_generate=True, pad_token_id=0)
        new = out.sequences[:, ids.shape[1]:]
        # The cache lacks the last token, which the next call gives it.
        ids, cache = out.sequences, out.past_key_values
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        made = [old + row.tolist() for old, row in zip(made, new)]
    return made


def median(run: Callable[[], object]) -> float:
    """Seconds of a run."""
    run()
    found = []
    for _ in range(REPEATS.value):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main(_) -> None:
    """Prints the tables."""
    import torch
    import transformers

    params = jax.jit(Qwen3Next(MODEL).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    with tempfile.TemporaryDirectory() as folder:
        hub.save(f"{folder}/model", MODEL, params)
        theirs = transformers.Qwen3NextForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    forward = jax.jit(lambda tokens: Qwen3Next(MODEL).apply({"params": params}, tokens, with_logits=False).hidden)
    seconds = median(lambda: jax.block_until_ready(forward(jnp.zeros((16, 64), jnp.int32))))
    print(f"{parameter_count(MODEL) / 1e6:.1f} M parameters; transformers {transformers.__version__}; a forward pass "
          f"takes in {1024 / seconds:,.0f} tokens/s")
    for count in map(int, CONVERSATIONS.value):
        given = talks(count)
        taken = sum(len(text) for talk in given for text in talk)
        total = taken + count * TURNS * NEW
        rates, made, prefill = {}, {}, 0.0
        for name, again, several in (("engine", False, False), ("shapes", False, True), ("again", True, True)):
            engine = Engine(MODEL, params, slots=count, max_length=LENGTH, max_new_tokens=NEW, several_shapes=several)
            kept = {}
            rates[name] = total / median(lambda: kept.update(zip(("made", "prefill"), by_engine(engine, given, again))))
            made[name] = kept["made"]
            prefill = kept["prefill"] if name == "shapes" else prefill
        with torch.no_grad():
            rates["transformers"] = total / median(lambda: made.update(transformers=by_transformers(theirs, given)))
        alike = sum(a == b for a, b in zip(made["shapes"], made["transformers"]))
        print(f"{count} conversations, {taken:,} tokens in, {count * TURNS * NEW:,} out; prefill {taken / prefill:,.0f} "
              f"tokens/s; {alike} as transformers wrote them")
        for name, rate in rates.items():
            print(f"  {name:<14}{rate:>9,.0f} tokens/s  {rate / rates['transformers']:.2f}x")


if __name__ == "__main__":
    app.run(main)
