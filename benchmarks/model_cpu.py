"""Speed of the model on CPU beside transformers: a training step, and cached decoding at batch 1 and 16.

    python benchmarks/model_cpu.py [--rounds=5] [--parts=decode,train] [--cores=1 --clock=cpu] [--skip_torch]

One process measures both, turn by turn (ours, theirs, ours, ...), so that a noisy machine is noisy for both, and
reports each side's fastest round. Run it on an otherwise idle machine: contention hits torch's thread pool
harder than ours and would flatter us; the load average is printed for that reason. With --cores=1 --clock=cpu both
sides have one core and are charged the processor time they used, which other programs on the machine hardly change.
Freed memory is kept by malloc for both, as `qcn` does. Training is forward, backward and AdamW on a batch of `rows` x
`length` random tokens with next-token and balance loss. The share of peak is model FLOPs (6 per active parameter and
token, embedding left out, plus attention and the delta rule) over the rate of a large float32 matrix product measured
in the same run.
"""

from qcn_jax.hostmemory import keep_freed_memory

keep_freed_memory()  # before JAX and torch start threads

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from qcn_jax import hub
from qcn_jax.config import ModelConfig
from qcn_jax.model import Qwen3Next, abstract_params, unroll
from qcn_jax.moe.losses import balance_loss

ROUNDS = flags.DEFINE_integer("rounds", 5, "Measured rounds of each side.")
ROWS = flags.DEFINE_integer("rows", 8, "Sequences of a training batch.")
LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a sequence.")
PROMPT, NEW = 64, 64  # tokens of the decoding measurement
CORES = flags.DEFINE_integer("cores", 0, "Cores and threads that both sides may use; 0: all.")
CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "Elapsed seconds, or processor seconds of all threads.")
PARTS = flags.DEFINE_list("parts", ["decode", "train"], "What to measure: decode, train.")
SKIP_TORCH = flags.DEFINE_boolean("skip_torch", False, "Measure ours alone.")

CONFIG = ModelConfig(
    vocab_size=8192, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    linear_num_key_heads=4, linear_key_head_dim=64, linear_num_value_heads=8, linear_value_head_dim=64, num_experts=32,
    num_experts_per_tok=4, moe_intermediate_size=128, shared_expert_intermediate_size=128, dtype="float32",
    chunk_size=32, scan_layers=False, rope_theta=10_000.0, max_position_embeddings=4096)


def active_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all, used by one token) parameters."""
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        routed = any(getattr(entry, "key", None) == "experts" for entry in path)
        total += leaf.size
        active += leaf.size * config.num_experts_per_tok // config.num_experts if routed else leaf.size
    return total, active


def forward_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of one token's forward pass in rows of `length`: products with weights, attention, delta rule."""
    weights = active_parameters(config)[1] - config.vocab_size * config.hidden_size
    full = config.num_hidden_layers // config.full_attention_interval
    attention = full * 4 * config.num_attention_heads * config.head_dim * (length + 1) / 2
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return 2 * weights + attention + (config.num_hidden_layers - full) * 6 * state


def random_params(config: ModelConfig) -> Any:
    """Weights of about the published initial scale, without compiling an initialiser."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), abstract_params(config))


def matmul_peak() -> float:
    """FLOP/s of a 2048^3 float32 product, fastest of ten."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    return 2 * 2048**3 / min(timed(lambda: product(a, a)) for _ in range(10))


def timed(function: Callable[[], Any]) -> float:
    """Seconds, by --clock, until the result of `function` is there."""
    clock = time.process_time if CLOCK.value == "cpu" else time.perf_counter
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


def our_training(config: ModelConfig, params: Any, tokens: np.ndarray) -> Callable[[], Any]:
    """A function that makes one training step."""
    model, optimizer = Qwen3Next(config), optax.adamw(1e-3)
    tokens = jnp.asarray(tokens)
    labels, counted = jnp.roll(tokens, -1, axis=1), jnp.ones(tokens.shape, bool).at[:, -1].set(False)

    def loss(params: Any) -> jax.Array:
        out = model.apply({"params": params}, tokens)
        # Labels are shifted and the last is left out, as transformers does: a slice of the logits would be a copy.
        picked = optax.softmax_cross_entropy_with_integer_labels(out.logits, labels)
        return jnp.mean(picked, where=counted) + config.router_aux_loss_coef * balance_loss(out.aux)

    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]

    def run() -> Any:
        held[0], held[1], value = compiled(*held)
        return value

    return run


def our_decoding(config: ModelConfig, params: Any, prompt: np.ndarray) -> Callable[[], Any]:
    """A function that decodes NEW tokens greedily after a prompt that is already cached."""
    model = Qwen3Next(config, unrolled=True)
    variables = {"params": unroll(config, params)}
    cache = model.init_cache(len(prompt), PROMPT + NEW)
    first = jax.jit(model.apply)(variables, jnp.asarray(prompt), cache=cache)

    @jax.jit
    def decode(variables: Any, cache: Any, token: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            cache, token = carry
            out = model.apply(variables, token[:, None], cache=cache)
            return (out.cache, jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32)), token

        return jax.lax.scan(step, (cache, token), None, length=NEW)[1]

    token = jnp.argmax(first.logits[:, -1], axis=-1).astype(jnp.int32)
    return lambda: decode(variables, first.cache, token)


def their_model(config: ModelConfig, params: Any) -> Any:
    """The same weights as a transformers model."""
    import tempfile

    import transformers

    with tempfile.TemporaryDirectory() as folder:
        hub.save(folder, config, params)
        return transformers.Qwen3NextForCausalLM.from_pretrained(folder, dtype="float32")


def their_training(model: Any, tokens: np.ndarray) -> Callable[[], Any]:
    """The same step in torch."""
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        optimizer.step()

    return run


def their_decoding(model: Any, prompt: np.ndarray) -> Callable[[], Any]:
    """The same decoding in torch: forward calls on a cache, without generate's overhead."""
    import copy

    import torch

    with torch.inference_mode():
        first = model(input_ids=torch.from_numpy(prompt.astype(np.int64)), use_cache=True)

    @torch.inference_mode()
    def run() -> None:
        cache = copy.deepcopy(first.past_key_values)
        token = first.logits[:, -1:].argmax(-1)
        for _ in range(NEW):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    return run


def compare(name: str, tokens: int, ours: Callable, theirs: Callable | None, goal: float) -> float:
    """Measures both turn by turn, prints a row, and returns our fastest time."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(ROUNDS.value + 1):  # the first round warms up
        seconds["ours"].append(timed(ours))
        if theirs is not None:
            seconds["theirs"].append(timed(theirs))
    rate = lambda side, pick: tokens / pick(seconds[side][1:])
    row = f"| {name} | {rate('ours', min):.0f} ({rate('ours', statistics.median):.0f}) |"
    if theirs is not None:
        ratio = rate("ours", min) / rate("theirs", min)
        row += f" {rate('theirs', min):.0f} ({rate('theirs', statistics.median):.0f}) | {ratio:.2f}x | {goal}x |"
    print(row, flush=True)
    return min(seconds["ours"][1:])


def limit_cores(count: int) -> int:
    """Keeps this process, whose threads have not started yet, on `count` cores (0: all); returns how many it has."""
    if count:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])
    return len(os.sched_getaffinity(0))


def main(_: list[str]) -> None:
    """Prints the table."""
    cores = limit_cores(CORES.value)
    if not SKIP_TORCH.value:
        import torch

        torch.set_num_threads(cores)
    rng = np.random.default_rng(0)
    params = random_params(CONFIG)
    total, active = active_parameters(CONFIG)
    peak = matmul_peak()
    print(f"{total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {cores} of {os.cpu_count()} cores; "
          f"load average {os.getloadavg()[0]:.2f}; measured matmul peak {peak / 1e9:.0f} GFLOP/s\n")
    model = None if SKIP_TORCH.value else their_model(CONFIG, params)
    heading = f"tokens/s ({CLOCK.value} time), fastest round (median)"
    print(f"| {heading} | ours | transformers | ratio | goal |\n|---|---|---|---|---|")
    for batch, goal in ((1, 3), (16, 5)) if "decode" in PARTS.value else ():
        prompt = rng.integers(0, CONFIG.vocab_size, (batch, PROMPT)).astype(np.int32)
        theirs = model and their_decoding(model, prompt)
        compare(f"decoding, batch {batch}", batch * NEW, our_decoding(CONFIG, params, prompt), theirs, goal)
    if "train" not in PARTS.value:
        return
    shape = (ROWS.value, LENGTH.value)
    tokens = rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32)
    theirs = model and their_training(model.train(), tokens)
    ours = our_training(CONFIG, params, tokens)
    seconds = compare(f"training, {shape[0]} x {shape[1]}", tokens.size, ours, theirs, 1.6)
    flops = 3 * forward_flops(CONFIG, shape[1]) * tokens.size
    print(f"\nTraining runs at {100 * flops / seconds / peak:.0f} % of the matmul peak (goal 60 %).")


if __name__ == "__main__":
    app.run(main)
