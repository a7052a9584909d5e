"""Losses of next-token training. RL's and distillation's are in pipeline.rl.objectives.

Axes: B rows, T positions, D model width, V vocabulary. Position t predicts tokens[t + 1] with weight weights[t].
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax.model import head_kernel
from qcn_jax.moe.losses import balance_loss, max_violation, overflow
from qcn_jax.moe.router import RouterStatistics
from qcn_jax.pipeline.train.head import over_vocabulary, project

Batch = Mapping[str, jax.Array]


def next_tokens(tokens: jax.Array, steps: int = 1) -> jax.Array:
    """[B, T] -> [B, T]: the token `steps` positions later; zero at the end, where nothing may count."""
    return jnp.pad(tokens[:, steps:], ((0, 0), (0, steps)))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in float32 whatever the logits' dtype: [..., V], [...] -> [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def predicted(kernels: tuple[jax.Array], hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of each target, and whether it is the likeliest token: [n] float32 twice; a HeadFunction."""
    logits = project(hidden, kernels[0])
    return cross_entropy(logits, targets), (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def mtp_weights(weights: jax.Array, segment_ids: jax.Array, step: int) -> jax.Array:
    """Loss weights of step `step` (from 0) of multi-token prediction: position t predicts tokens[t + 2 + step].

    It counts as much as predicting that token from the position before it does, and only where the two
    positions are of one document (weights end with their segment, so the target then is as well).
    """
    same = functools.reduce(operator.and_, (
        next_tokens(segment_ids, ahead) == next_tokens(segment_ids, ahead + 1) for ahead in range(step + 1)))
    return next_tokens(weights, step + 1) * same


def _drafts(model: Any, mtp_coef: float, mtp_steps: int) -> int:
    """Tokens that multi-token prediction is trained to predict ahead; 0 without it."""
    return mtp_steps if mtp_coef > 0 and model.config.num_nextn_predict_layers > 0 else 0


def _apply(model: Any, params: Any, batch: Batch, drafts: int) -> Any:
    ahead = [next_tokens(batch["tokens"], 1 + step) for step in range(drafts)]
    return model.apply({"params": params}, batch["tokens"], positions=batch["positions"],
                       segment_ids=batch["segment_ids"], mtp_tokens=jnp.stack(ahead, axis=-1) if drafts else None,
                       with_logits=False)


def routing(model: Any, mtp_coef: float = 0.0, mtp_steps: int = 1) -> Callable[[Any, Batch], RouterStatistics]:
    """(params, batch) -> how the batch's tokens are routed; the `whole` of train.step.make_step for the loss below."""
    drafts = _drafts(model, mtp_coef, mtp_steps)
    return lambda params, batch: _apply(model, params, batch, drafts).aux


def _balance(routed: RouterStatistics, batch: Batch) -> dict[str, jax.Array]:
    """The balance loss of a batch, or a slice's share of it, and what it is to keep small."""
    whole, fraction = batch.get("whole"), batch["fraction"]
    balance = fraction * balance_loss(routed) if whole is None else balance_loss(routed, whole)
    routed = routed if whole is None else whole
    return {"balance": balance, "load_violation": fraction * jnp.max(max_violation(routed)),
            "overflow": fraction * overflow(routed)}


def language_model_loss(model: Any, mtp_coef: float = 0.0, mtp_steps: int = 1
                        ) -> Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]:
    """Next-token, router-balance and multi-token-prediction loss as the loss of train.step.make_step.

    Args:
      model: qcn_jax.model.Qwen3Next; its config gives the balance coefficient.
      mtp_coef: weight of the multi-token-prediction loss; ignored by a model without that block.
      mtp_steps: tokens predicted ahead beyond the next; above one the block is fed its own output, as it is
        when it drafts.
    Returns:
      (params, batch) -> (loss, {ce, accuracy[, balance, load_violation, overflow][, mtp]}), those in the middle of a
      model with experts. ce and mtp are per weighted token of the global batch (`batch["weight_sum"]`); balance equals
      top-k when the experts are balanced. What depends on routing is that of the global batch where a slice is given
      its sums (`batch["whole"]`, of `routing`), else a mean over slices.
    """
    config, drafts = model.config, _drafts(model, mtp_coef, mtp_steps)

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens, segments = batch["tokens"], batch["segment_ids"]
        weights = batch["weights"] / batch["weight_sum"]
        targets = next_tokens(tokens)
        out = _apply(model, params, batch, drafts)
        kernels = (head_kernel(config, params),)
        predict = lambda hidden, targets: over_vocabulary(predicted, kernels, hidden, targets, parallel=model.parallel)
        losses, right = predict(out.hidden, targets)
        ce = jnp.sum(weights * losses)
        loss, metrics = ce, {"ce": ce, "accuracy": jnp.sum(weights * right)}
        if out.aux is not None:
            metrics |= _balance(out.aux, batch)
            loss += config.router_aux_loss_coef * metrics["balance"]
        if drafts:
            metrics["mtp"] = sum(
                jnp.sum(mtp_weights(weights, segments, step)
                        * predict(out.mtp_hidden[step], next_tokens(tokens, 2 + step))[0])
                for step in range(drafts)) / drafts
            loss += mtp_coef * metrics["mtp"]
        return loss, metrics

    return loss_fn
