"""Where a non-finite value began: a parameter, a layer of the forward pass, or a gradient.

Used once, when training stops for it. The layer is found by running the model cut off after 1, 2, ... layers
(bisection), which works for any kernel and compiled form because a shorter model is only a smaller tree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax.config import ModelConfig
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.train.optimizer import parameter_name
from qcn_jax.pipeline.train.step import SECTION
from qcn_jax.sharding.parallel import Parallel

Params = dict[str, Any]


def truncated(config: ModelConfig, params: Params, layers: int) -> tuple[ModelConfig, Params]:
    """The model of the first `layers` layers (at least one), with embedding, norm and head as they are."""
    interval = config.full_attention_interval
    blocks, rest = divmod(layers, interval)
    cut = {name: tree for name, tree in params.items() if name not in ("blocks", "tail", "mtp")}
    if blocks:
        cut["blocks"] = jax.tree.map(lambda leaf: leaf[:blocks], params["blocks"])
    if rest and blocks < config.num_hidden_layers // interval:
        cut["tail"] = jax.tree.map(lambda leaf: leaf[blocks, :rest], params["blocks"]["linear"])
    elif rest:
        cut["tail"] = jax.tree.map(lambda leaf: leaf[:rest], params["tail"])
    return dataclasses.replace(config, num_hidden_layers=layers, num_nextn_predict_layers=0), cut


def first_bad_layer(
    config: ModelConfig, params: Params, batch: Mapping[str, jax.Array], parallel: Parallel | None = None
) -> int | None:
    """Index of the first layer whose output is not finite at a real token; None where all are finite."""

    def finite(layers: int) -> bool:
        smaller, cut = truncated(config, params, layers)
        forward = jax.jit(lambda params, tokens, positions, segments: Qwen3Next(smaller, parallel=parallel).apply(
            {"params": params}, tokens, positions=positions, segment_ids=segments, with_logits=False).hidden)
        hidden = forward(cut, batch["tokens"], batch["positions"], batch["segment_ids"])
        return bool(jnp.all(jnp.isfinite(hidden) | (batch["segment_ids"] == 0)[..., None]))

    if finite(config.num_hidden_layers):
        return None
    low, high = 0, config.num_hidden_layers  # the first `low` layers are finite, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if finite(middle) else (low, middle)
    return high - 1


def explain(
    config: ModelConfig, loss: Callable[..., Any], parallel: Parallel | None = None, frozen: tuple[Params, ...] = ()
) -> Callable[[Params, Mapping[str, jax.Array]], str]:  # fmt: skip
    """The `explain` of train.loop: one clause that names where the first non-finite value is.

    Args:
      config, parallel: the model and its mesh.
      loss: see train.step.LossFn.
      frozen: the frozen parameters that the step was given.
    """

    def clause(params: Params, batch: Mapping[str, jax.Array]) -> str:
        if bad := _first_bad_leaf(params):
            return f"parameter {bad} holds a non-finite value"
        total = jnp.maximum(jnp.sum(batch["weights"]), 1e-6)
        parts = [{name: array[i] for name, array in batch.items()} for i in range(len(batch["weights"]))]
        parts = [part for part in parts if bool(jnp.any(part["weights"] > 0))]
        for part in parts:
            layer = first_bad_layer(config, params, part, parallel)
            if layer is not None:
                kind = "attention" if (layer + 1) % config.full_attention_interval == 0 else "DeltaNet"
                return f"layer {layer} ({kind}) is the first whose output is not finite"
        gradient = jax.jit(jax.grad(lambda p, b, *held: loss(p, b, *held)[0]))
        for part in parts:
            held = frozen if len(frozen) < 2 else (frozen[int(part.pop(SECTION))],)
            part |= {"weight_sum": total, "fraction": jnp.float32(1 / len(parts))}
            if bad := _first_bad_leaf(gradient(params, part, *held)):
                return f"the gradient of {bad} is not finite"
        return "head or loss: every layer's output is finite"

    return clause


def _first_bad_leaf(tree: Params) -> str | None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not bool(jnp.all(jnp.isfinite(leaf))):
            return parameter_name(path)
    return None
