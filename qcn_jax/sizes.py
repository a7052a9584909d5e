"""Published architectures by name, as their config.json has them; how they are computed is left to the caller.

  model = dataclasses.replace(SIZES["0.8b"], param_dtype="bfloat16")

Sources: the model cards and config.json files of Qwen/Qwen3.5-* and Qwen/Qwen3-Coder-Next. All of Qwen3.5 come with a
block for multi-token prediction, which a run may train on (num_nextn_predict_layers=1).
"""

from typing import Any

from qcn_jax.config import ModelConfig


def _qwen3_5(**fields: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 248_320, "rope_theta": 10_000_000.0, **fields})


def _dense(width: int, layers: int, heads: tuple[int, int], value_heads: int, inner: int, tied: bool) -> ModelConfig:
    """`heads` of attention: queries, keys and values; `value_heads` of DeltaNet, whose key heads are always 16."""
    return _qwen3_5(
        model_type="qwen3_5_text", hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], linear_num_value_heads=value_heads, intermediate_size=inner, num_experts=0,
        tie_word_embeddings=tied)


SIZES = {
    "0.8b": _dense(1024, 24, (8, 2), 16, 3584, tied=True),
    "2b": _dense(2048, 24, (8, 2), 16, 6144, tied=True),
    "4b": _dense(2560, 32, (16, 4), 32, 9216, tied=True),
    "9b": _dense(4096, 32, (16, 4), 32, 12_288, tied=False),
    "27b": _dense(5120, 64, (24, 4), 48, 17_408, tied=False),
    "35b-a3b": _qwen3_5(model_type="qwen3_5_moe_text", num_hidden_layers=40, num_experts=256, num_experts_per_tok=8),
    "80b-a3b": ModelConfig(),
}
