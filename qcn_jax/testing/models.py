"""Models of a few thousand parameters that still have every kind of layer, with random weights."""

import pathlib
from typing import Any

import jax
import numpy as np

from qcn_jax import files, hub
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from qcn_jax.config import ModelConfig
from qcn_jax.model import abstract_params

# One Gated DeltaNet layer and one of gated attention, each with sparse experts.
TINY = ModelConfig(
    vocab_size=320, hidden_size=32, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_num_value_heads=4, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, initializer_range=0.2, dtype="float32", chunk_size=16,
)  # fmt: skip
_TEXT = ("def clamp(value, low, high):\n    return max(low, min(value, high))\n",)


def random_params(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> Any:
    """Returns standard normal numpy arrays in the shapes of `config`'s parameters; no layer's output is degenerate."""
    rng = np.random.default_rng(seed)
    normal = lambda leaf: rng.normal(size=leaf.shape).astype(jax.numpy.dtype(dtype))
    return jax.tree.map(normal, abstract_params(config))


def tiny_tokenizer(vocab_size: int = TINY.vocab_size) -> Tokenizer:
    """Returns a byte-level BPE of at most `vocab_size` entries (262 at least) with the chat template's tokens."""
    return Tokenizer.train(_TEXT, vocab_size, [END_OF_TEXT, "<|im_start|>", TURN_END, "<tool_call>", "</tool_call>"])


def save_tiny(folder: files.Path, config: ModelConfig = TINY, seed: int = 0) -> pathlib.Path:
    """Writes a Hugging Face folder: config.json, random weights scaled to `config.initializer_range`, a tokenizer."""
    params = jax.tree.map(lambda leaf: leaf * config.initializer_range, random_params(config, seed))
    hub.save(folder, config, params, tiny_tokenizer(config.vocab_size))
    return pathlib.Path(folder)
