"""Matrix-product FLOPs of the model, by part: the one place that utilisation and `qcn compile` count from.

A product of [m, k] and [k, n] counts 2 m k n. Norms, softmax, routing, convolution and recomputation do not count.
"""

import dataclasses

from qcn_jax.config import ModelConfig

# Backward is two products for every one of the forward pass.
_FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token's forward pass by part, over all layers."""

    delta_projections: float
    delta_rule: float
    attention_projections: float
    attention: float
    experts: float  # or the MLP of a model without them
    router: float
    head: float

    @property
    def forward(self) -> float:
        """All parts."""
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """Forward and backward."""
        return _FORWARD_AND_BACKWARD * self.forward


def token_flops(config: ModelConfig, context: int, mtp: bool = False) -> TokenFlops:
    """FLOPs per token of rows of `context` tokens, each one document.

    Args:
      config: the model.
      context: tokens that attention may see; a token sees half of them on average.
      mtp: count the multi-token-prediction block and its head.
    """
    width = config.hidden_size
    extra = int(mtp and config.num_nextn_predict_layers > 0)
    full = config.num_hidden_layers // config.full_attention_interval + extra
    layers = config.num_hidden_layers + extra
    linear = layers - full
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    qkvz, ba, out = width * (2 * keys + 2 * values), width * 2 * config.linear_num_value_heads, values * width
    queries, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    if config.num_experts:
        inner = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    return TokenFlops(
        delta_projections=2.0 * linear * (qkvz + ba + out),
        delta_rule=linear * _delta_rule(config),
        attention_projections=2.0 * (full * width * (2 * queries + 2 * shared + queries) + extra * 2 * width * width),
        attention=full * 2.0 * 2 * queries * context / 2,
        experts=2.0 * layers * 3 * width * inner,
        router=2.0 * layers * width * config.num_experts,
        head=2.0 * (1 + extra) * width * config.vocab_size,
    )


def _delta_rule(config: ModelConfig) -> float:
    """Per token and layer, chunked form: products with the state and within a chunk of C, for each value head.

    Per token: K K^T and Q K^T once a key head (2 C dk each); T V (C dv), T K (C dk), A U (C dv); and W S, Q S and
    K^T U with the state (dk dv each). The triangular inverse is C^2 / 3 a token.
    """
    chunk, dk, dv = config.chunk_size, config.linear_key_head_dim, config.linear_value_head_dim
    per_key_head = 2.0 * 2 * chunk * dk
    per_value_head = 2.0 * (chunk * (2 * dv + dk) + 3 * dk * dv) + 2.0 * chunk**2 / 3
    return config.linear_num_key_heads * per_key_head + config.linear_num_value_heads * per_value_head
