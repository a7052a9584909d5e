"""Which published tensor is which part of the parameter tree, a table for each family of checkpoints.

Published: linear weights (out, in), one tensor per layer. Here: layers stacked for the scan, experts stacked for the
grouped matmul, kernels (in, out). The tree is the same for all families, so that layers, kernels, sharding rules and
optimizers know one order of heads; it is Qwen3-Next's, grouped by key head, since that is how heads are split over
devices. A family with another order is a table of runs of rows, copied on the way in and out, bit for bit:

  qwen3_next          a tensor per expert; projections of Gated DeltaNet grouped by key head
  qwen3_5_moe_text    all experts of a layer in two tensors; four projections, each in the order of its heads
  qwen3_5_text        an MLP instead of experts; projections as before
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from qcn_jax.config import ModelConfig

Shape = tuple[int, ...]
Path = tuple[str, ...]
Part = tuple[str, Shape, str]  # of a layer: name, published shape, and a kind of Tensor or a key of _RUNS


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One published tensor, or a run of its rows, and where it is in the parameter tree.

    Attributes:
      name: of the tensor, as published.
      shape: of the run, as published.
      leaf: path of the array in the parameter tree that holds it.
      index: where in that array's leading (stacking) axes.
      kind: "same", "matrix" (out, in) <-> (in, out), or "conv" (channels, 1, taps) <-> (taps, channels).
      row: where the run begins, in rows of `shape`'s inner dimensions.
      column: where it begins in the array, along its last axis; of a "matrix" alone.
      whole: shape of the whole tensor; None where the run is all of it.
    """

    name: str
    shape: Shape
    leaf: Path
    index: Shape
    kind: str
    row: int = 0
    column: int = 0
    whole: Shape | None = None

    @property
    def published(self) -> Shape:
        """Shape of the whole published tensor."""
        return self.whole or self.shape

    @property
    def extent(self) -> Shape:
        """Shape that the leaf, without its stacking axes, must have at least to hold the run."""
        if self.kind == "matrix":
            return (self.shape[1], self.column + self.shape[0])
        return self.shape if self.kind == "same" else self.shape[::-2]

    def box(self, start: int, stop: int) -> tuple[slice, ...]:
        """Where the run's rows start .. stop lie in the leaf, without its stacking axes."""
        rows = slice(self.column + start, self.column + stop)
        if self.kind == "same":
            return (rows, *(slice(0, size) for size in self.shape[1:]))
        return (slice(0, self.extent[0]), rows)

    def rows_to_body(self, rows: np.ndarray) -> np.ndarray:
        """A view of published rows [n, ...] in the leaf's axis order."""
        return rows if self.kind == "same" else rows.reshape(rows.shape[0], -1).T

    def body_to_rows(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `rows_to_body`."""
        return part if self.kind == "same" else part.T.reshape(-1, *self.shape[1:])


def leaf_shapes(config: ModelConfig) -> dict[Path, Shape]:
    """Shape of every array of the parameter tree."""
    sizes: dict[Path, list[int]] = {}
    for tensor in tensors(config):
        needed = (*(i + 1 for i in tensor.index), *tensor.extent)
        shape = sizes.setdefault(tensor.leaf, list(needed))
        shape[:] = map(max, shape, needed)
    return {leaf: tuple(shape) for leaf, shape in sizes.items()}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of `config`, in published order (embedding, layers, norm, head, MTP).

    Names are those of a model of text alone; see `stored.text_name`.
    """
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
        if form in _RUNS:
            yield from _RUNS[form](config, prefix, name, shape, leaf, index)
        elif form == "scalars":  # A_log and dt_bias carry no ".weight"
            yield Tensor(prefix + name, shape, (*leaf, *path), index, "same")
        else:
            last = "weight" if form == "same" else "kernel"
            yield Tensor(f"{prefix}{name}.weight", shape, (*leaf, *path, last), index, form)


def _linear(config: ModelConfig) -> list[Part]:
    width, heads = config.hidden_size, config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    if config.model_type == "qwen3_next":
        projections = [("linear_attn.in_proj_qkvz", (2 * keys + 2 * values, width), "matrix"),
                       ("linear_attn.in_proj_ba", (2 * heads, width), "matrix")]
    else:
        projections = [("linear_attn.in_proj_qkv", (2 * keys + values, width), "by_head"),
                       ("linear_attn.in_proj_z", (values, width), "by_head"),
                       ("linear_attn.in_proj_b", (heads, width), "by_head"),
                       ("linear_attn.in_proj_a", (heads, width), "by_head")]
    return [
        *projections, ("linear_attn.conv1d", (2 * keys + values, 1, config.linear_conv_kernel_dim), "conv"),
        ("linear_attn.A_log", (heads,), "scalars"), ("linear_attn.dt_bias", (heads,), "scalars"),
        ("linear_attn.norm", (config.linear_value_head_dim,), "same"),
        ("linear_attn.out_proj", (width, values), "matrix"), *_shared(config)]


def _full(config: ModelConfig) -> list[Part]:
    width, size = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    return [
        ("self_attn.q_proj", (2 * queries, width), "matrix"), ("self_attn.k_proj", (keys, width), "matrix"),
        ("self_attn.v_proj", (keys, width), "matrix"), ("self_attn.o_proj", (width, queries), "matrix"),
        ("self_attn.q_norm", (size,), "same"), ("self_attn.k_norm", (size,), "same"), *_shared(config)]


def _shared(config: ModelConfig) -> list[Part]:
    """What layers of both kinds have: norms, and an MLP or a mixture of experts."""
    width = config.hidden_size
    norms = [("input_layernorm", (width,), "same"), ("post_attention_layernorm", (width,), "same")]
    if not config.num_experts:
        return norms + _mlp("mlp", config.intermediate_size, width, "matrix")
    experts, inner = config.num_experts, config.moe_intermediate_size
    if config.model_type == "qwen3_next":
        routed = _mlp("mlp.experts", inner, width, "expert")
    else:
        routed = [("mlp.experts.gate_up_proj", (experts, 2 * inner, width), "experts"),
                  ("mlp.experts.down_proj", (experts, width, inner), "experts")]
    return [*norms, ("mlp.gate", (experts, width), "matrix"),
            *_mlp("mlp.shared_expert", config.shared_expert_intermediate_size, width, "matrix"),
            ("mlp.shared_expert_gate", (1, width), "matrix"), *routed]


def _mlp(name: str, inner: int, width: int, form: str) -> list[Part]:
    return [(f"{name}.gate_proj", (inner, width), form), (f"{name}.up_proj", (inner, width), form),
            (f"{name}.down_proj", (width, inner), form)]


def _tensor_per_expert(config: ModelConfig, prefix: str, name: str, shape: Shape, leaf: Path, index: Shape
                       ) -> Iterator[Tensor]:
    *path, last = name.split(".")
    for expert in range(config.num_experts):
        yield Tensor(f"{prefix}{'.'.join(path)}.{expert}.{last}.weight", shape, (*leaf, *path, last), (*index, expert),
                     "matrix")


def _all_experts(config: ModelConfig, prefix: str, name: str, shape: Shape, leaf: Path, index: Shape
                 ) -> Iterator[Tensor]:
    """Runs of a tensor [E, rows, columns]; of gate_up_proj an expert's gate rows come first."""
    *path, last = name.split(".")
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    run = (shape[1] // len(parts), shape[2])
    for expert in range(config.num_experts):
        for number, part in enumerate(parts):
            row = expert * shape[1] + number * run[0]
            yield Tensor(prefix + name, run, (*leaf, *path, part), (*index, expert), "matrix", row, whole=shape)


def _by_head(config: ModelConfig, prefix: str, name: str, shape: Shape, leaf: Path, index: Shape) -> Iterator[Tensor]:
    """Runs of a projection whose rows are all queries, then all keys, then all values, each of one key head.

    Here the columns of a key head lie together: query, key, its value heads and their gates z; b of its value heads and
    their a.
    """
    heads, key = config.linear_num_key_heads, config.linear_key_head_dim
    repeats = config.linear_num_value_heads // heads
    values = repeats * config.linear_value_head_dim
    group = {"in_proj_qkvz": 2 * key + 2 * values, "in_proj_ba": 2 * repeats}
    # The array, and for every kind of channel: the first row, a key head's number of rows, their place in its group.
    kernel, kinds = {
        "in_proj_qkv": ("in_proj_qkvz", ((0, key, 0), (heads * key, key, key), (2 * heads * key, values, 2 * key))),
        "in_proj_z": ("in_proj_qkvz", ((0, values, 2 * key + values),)),
        "in_proj_b": ("in_proj_ba", ((0, repeats, 0),)),
        "in_proj_a": ("in_proj_ba", ((0, repeats, repeats),)),
    }[name.rpartition(".")[2]]
    for first, rows, place in kinds:
        for head in range(heads):
            yield Tensor(f"{prefix}{name}.weight", (rows, shape[1]), (*leaf, "linear_attn", kernel, "kernel"), index,
                         "matrix", first + head * rows, head * group[kernel] + place, shape)


_LAYER_PARTS = {"linear": _linear, "full": _full}
_RUNS = {"expert": _tensor_per_expert, "experts": _all_experts, "by_head": _by_head}
