"""Which published tensor is which part of the parameter tree.

Published: one tensor per layer and expert, linear weights (out, in). Here: layers stacked for the scan, experts
stacked for the grouped matmul, kernels (in, out). The order of columns inside a tensor is kept.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from qcn_jax.config import ModelConfig

Shape = tuple[int, ...]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One published tensor.

    Attributes:
      name: as published.
      shape: as published.
      leaf: path of the array in the parameter tree that holds it.
      index: where in that array's leading (stacking) axes.
      kind: "same", "matrix" (out, in) <-> (in, out), or "conv" (channels, 1, taps) <-> (taps, channels).
    """

    name: str
    shape: Shape
    leaf: Path
    index: Shape
    kind: str

    @property
    def body(self) -> Shape:
        """Shape within the leaf, without the stacking axes."""
        return {"same": self.shape, "matrix": self.shape[::-1], "conv": self.shape[::-2]}[self.kind]

    def box(self, start: int, stop: int) -> tuple[slice, ...]:
        """Where published rows start .. stop lie in the body."""
        rows = slice(start, stop)
        if self.kind == "same":
            return (rows, *(slice(0, size) for size in self.shape[1:]))
        return (slice(0, self.body[0]), rows)

    def rows_to_body(self, rows: np.ndarray) -> np.ndarray:
        """A view of published rows [n, ...] in the body's axis order."""
        return rows if self.kind == "same" else rows.reshape(rows.shape[0], -1).T

    def body_to_rows(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `rows_to_body`."""
        return part if self.kind == "same" else part.T.reshape(-1, *self.shape[1:])


def leaf_shapes(config: ModelConfig) -> dict[Path, Shape]:
    """Shape of every array of the parameter tree."""
    sizes: dict[Path, list[int]] = {}
    bodies: dict[Path, Shape] = {}
    for tensor in tensors(config):
        extent = sizes.setdefault(tensor.leaf, [0] * len(tensor.index))
        extent[:] = [max(old, i + 1) for old, i in zip(extent, tensor.index)]
        bodies[tensor.leaf] = tensor.body
    return {leaf: (*extent, *bodies[leaf]) for leaf, extent in sizes.items()}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of `config`, in published order (embedding, layers, norm, head, MTP)."""
    width, vocabulary = config.hidden_size, config.vocab_size
    yield Tensor("model.embed_tokens.weight", (vocabulary, width), ("embed_tokens", "embedding"), (), "same")
    interval = config.full_attention_interval
    blocks = config.num_hidden_layers // interval
    for layer in range(config.num_hidden_layers):
        block, within = divmod(layer, interval)
        leaf: Path
        index: Shape
        if block == blocks:
            kind, leaf, index = "linear", ("tail",), (within,)
        elif within == interval - 1:
            kind, leaf, index = "full", ("blocks", "full"), (block,)
        else:
            kind, leaf, index = "linear", ("blocks", "linear"), (block, within)
        yield from _layer(config, kind, f"model.layers.{layer}.", leaf, index)
    yield Tensor("model.norm.weight", (width,), ("norm", "weight"), (), "same")
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", (vocabulary, width), ("lm_head", "kernel"), (), "matrix")
    if config.num_nextn_predict_layers:
        yield Tensor("mtp.fc.weight", (width, 2 * width), ("mtp", "fc", "kernel"), (), "matrix")
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield Tensor(f"mtp.{name}.weight", (width,), ("mtp", name, "weight"), (), "same")
        yield from _layer(config, "full", "mtp.layers.0.", ("mtp", "layer"), ())


def _layer(config: ModelConfig, kind: str, prefix: str, leaf: Path, index: Shape) -> Iterator[Tensor]:
    for name, shape, form in _LAYER_PARTS[kind](config):
        path = name.split(".")
        if form == "expert":
            yield from (Tensor(f"{prefix}mlp.experts.{expert}.{path[-1]}.weight", shape,
                               (*leaf, "mlp", "experts", path[-1]), (*index, expert), "matrix")
                        for expert in range(config.num_experts))
        elif form == "scalars":  # A_log and dt_bias carry no ".weight"
            yield Tensor(prefix + name, shape, (*leaf, *path), index, "same")
        else:
            last = "weight" if form == "same" else "kernel"
            yield Tensor(f"{prefix}{name}.weight", shape, (*leaf, *path, last), index, form)


def _linear(config: ModelConfig) -> list[tuple[str, Shape, str]]:
    width, heads = config.hidden_size, config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    return [
        ("linear_attn.in_proj_qkvz", (2 * keys + 2 * values, width), "matrix"),
        ("linear_attn.in_proj_ba", (2 * heads, width), "matrix"),
        ("linear_attn.conv1d", (2 * keys + values, 1, config.linear_conv_kernel_dim), "conv"),
        ("linear_attn.A_log", (heads,), "scalars"), ("linear_attn.dt_bias", (heads,), "scalars"),
        ("linear_attn.norm", (config.linear_value_head_dim,), "same"),
        ("linear_attn.out_proj", (width, values), "matrix"), *_shared(config)]


def _full(config: ModelConfig) -> list[tuple[str, Shape, str]]:
    width, size = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    return [
        ("self_attn.q_proj", (2 * queries, width), "matrix"), ("self_attn.k_proj", (keys, width), "matrix"),
        ("self_attn.v_proj", (keys, width), "matrix"), ("self_attn.o_proj", (width, queries), "matrix"),
        ("self_attn.q_norm", (size,), "same"), ("self_attn.k_norm", (size,), "same"), *_shared(config)]


def _shared(config: ModelConfig) -> list[tuple[str, Shape, str]]:
    """What layers of both kinds have: norms and the mixture of experts."""
    width, expert, shared = config.hidden_size, config.moe_intermediate_size, config.shared_expert_intermediate_size
    return [
        ("input_layernorm", (width,), "same"), ("post_attention_layernorm", (width,), "same"),
        ("mlp.gate", (config.num_experts, width), "matrix"),
        ("mlp.shared_expert.gate_proj", (shared, width), "matrix"),
        ("mlp.shared_expert.up_proj", (shared, width), "matrix"),
        ("mlp.shared_expert.down_proj", (width, shared), "matrix"),
        ("mlp.shared_expert_gate", (1, width), "matrix"),
        ("mlp.experts.gate_proj", (expert, width), "expert"), ("mlp.experts.up_proj", (expert, width), "expert"),
        ("mlp.experts.down_proj", (width, expert), "expert")]


_LAYER_PARTS = {"linear": _linear, "full": _full}
