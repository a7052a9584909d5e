"""A model small enough to compile in seconds, and conversations over its bare token ids."""

import dataclasses

import jax
import jax.numpy as jnp

from qcn_jax.config import ModelConfig
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl.records import Outcome, Reply

STOP = 1
MODEL = ModelConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=128, linear_num_key_heads=1, linear_key_head_dim=8,
    linear_num_value_heads=2, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    shared_expert_intermediate_size=8, initializer_range=0.2, dtype="float32", chunk_size=8,
)  # fmt: skip


def micro_params(seed: int = 0):
    """Fresh parameters of MODEL."""
    return jax.jit(Qwen3Next(MODEL).init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


@dataclasses.dataclass
class Echo:
    """Plays `turns` turns; answers each with its number; rewards the share of even tokens.

    Every third turn's parity decides `malformed`, so that records have something to show.
    """

    start: list[int]
    turns: int
    taken: list[list[int]] = dataclasses.field(default_factory=list)
    broken: bool = False

    def opening(self) -> list[int]:
        return list(self.start)

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        self.taken.append(tokens)
        count = len(self.taken)
        return Reply([10 + count, 20 + len(tokens)], done=count == self.turns, malformed=tokens[0] % 2 == 1)

    def outcome(self, truncated: bool) -> Outcome:
        everything = [token for turn in self.taken for token in turn]
        share = sum(token % 2 == 0 for token in everything) / max(1, len(everything))
        return Outcome(share, share > 0.5, finished=not truncated, infrastructure=self.broken)

    def close(self) -> None:
        pass
