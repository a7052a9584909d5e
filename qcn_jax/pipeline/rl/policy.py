"""What an update minimises: the loss of packed rows, which experts its tokens go to, and what it is told beforehand.

Tokens were drawn by one policy, the one that acted; an update begins from another where it is asynchronous; and where
it has several minibatches, a third is moved. The loss corrects by the ratio of the last to the first, or, decoupled,
treats the two steps apart.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import ExpertsConfig, ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.model import Qwen3Next, head_kernel
from qcn_jax.pipeline.rl import objectives
from qcn_jax.pipeline.rl.settings import contradictions, needs_proximal, settled
from qcn_jax.pipeline.train import layout
from qcn_jax.pipeline.train.head import over_vocabulary, project
from qcn_jax.pipeline.train.losses import next_tokens
from qcn_jax.pipeline.train.step import Batch, BatchShape, LossFn
from qcn_jax.pipeline.train.trainer import Trainer
from qcn_jax.sharding.parallel import Parallel


def policy_loss(model: ModelConfig, config: ExpertsConfig, parallel: Parallel | None = None) -> LossFn:
    """The loss of packed rows, a weighted mean over the tokens of the whole batch.

    All log-probabilities, and so ratio, divergence and entropy, are at the rollouts' temperature. The returned function
    takes (params, batch, reference) where batch has, besides tokens, segment_ids, positions, weights and weight_sum,
    `advantages` and `old_logprobs` [B, T], `routes` [B, T, L, k] where `config.routing` is not free, and `proximal`
    [B, T] where the objective is decoupled. `reference` is the parameter tree that `config.kl_coef` holds the policy
    to; there is none where that is 0.
    """
    config = settled(config, model)
    logprobs_of = _logprobs_of(model, config, parallel)
    objective = objectives.OBJECTIVES.resolve(config.objective, "--config.experts.objective")

    def loss(params: Any, batch: dict[str, jax.Array], reference: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        routes = jnp.moveaxis(batch["routes"].astype(jnp.int32), 2, 0) if config.routing != "free" else None
        policy = _still(params) if config.routing == "frozen" else params
        (logprobs, entropy), chosen = logprobs_of(policy, batch, routes)
        weights, old = batch["weights"] / batch["weight_sum"], batch["old_logprobs"]
        tokens = objectives.PolicyTokens(
            logprobs, old, batch["advantages"], batch["weights"] > 0, batch["segment_ids"], batch.get("proximal"))
        losses, clipped = objective(tokens, config)
        ratio = jnp.where(tokens.counted, tokens.ratio, 0.0)
        means = {
            "entropy": jnp.sum(weights * entropy),
            "clipped": jnp.sum(weights * clipped),
            # Of the policy that acted from the one being moved; not zero before the first step where decoding and
            # training round differently.
            "kl_old": jnp.sum(weights * objectives.kl_estimate(old, logprobs)),
            "ratio": jnp.sum(weights * ratio), "ratio_squared": jnp.sum(weights * ratio**2),
        }
        if config.ratio_bounds or config.negative_bound:
            near = objectives.kept(tokens, config)
            losses, means["masked"] = jnp.where(near, losses, 0.0), jnp.sum(weights * ~near)
        if routes is not None:  # the share of tokens that some router would send elsewhere now
            means["rerouted"] = jnp.sum(weights * differ(routes, chosen))
        if config.kl_coef:
            held = objectives.kl_estimate(logprobs, jax.lax.stop_gradient(logprobs_of(reference, batch)[0][0]))
            losses = losses + config.kl_coef * held
            means["kl_reference"] = jnp.sum(weights * held)
        return jnp.sum(weights * losses), means

    return loss


def differ(routes: jax.Array, others: jax.Array) -> jax.Array:
    """Whether any layer sends a token to another set of experts: [L, ..., k] int32 twice -> [...].

    Negative routes are free ones, and never differ.
    """
    same = jnp.all(jnp.sort(routes, axis=-1) == jnp.sort(others, axis=-1), axis=-1) | (routes[..., 0] < 0)
    return ~jnp.all(same, axis=0)


def make_trainer(model: ModelConfig, config: ExpertsConfig, parallel: Parallel | None) -> Trainer:
    """Builds the step of experts' updates on `parallel`; room for every episode of a minibatch in a row of its own.

    Raises:
      UserError: rows that the mesh does not divide; routes to replay of a model without experts.
    """
    config = settled(config, model)
    for line in contradictions(config, model):
        raise UserError(line)
    each = (model.num_hidden_layers, model.num_experts_per_tok)
    most = -(-config.prompts // config.minibatches) * config.group_size
    shape = BatchShape(-(-most // config.rows), config.rows, config.sequence_length,
                       ("weights", "advantages", "old_logprobs", *(("proximal",) if needs_proximal(config) else ())),
                       padded=True, routes=each if config.routing != "free" else ())
    return Trainer.build(model, policy_loss(model, config, parallel), config.optimizer,
                         config.updates * config.minibatches, shape, parallel, field="experts",
                         frozen=int(config.kl_coef > 0), derive=effective_sample)


def _logprobs_of(model: ModelConfig, config: ExpertsConfig, parallel: Parallel | None) -> Callable[
        ..., tuple[tuple[jax.Array, jax.Array], jax.Array | None]]:
    """(params, rows, routes to replay or None, with_routes) -> (log-probabilities and entropies [B, T]), routes."""
    network = Qwen3Next(model, parallel=parallel)

    def statistics(
        kernels: tuple[jax.Array, ...], hidden: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return objectives.token_statistics(project(hidden, kernels[0]), targets, config.rollout.temperature)

    def logprobs_of(params: Any, batch: Batch, routes: jax.Array | None = None, with_routes: bool = False
                    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        out = network.apply(
            {"params": params}, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"],
            with_logits=False, routes=routes, with_routes=with_routes or routes is not None,
        )  # fmt: skip
        kernels = (head_kernel(model, params),)
        targets = next_tokens(batch["tokens"])
        return over_vocabulary(statistics, kernels, out.hidden, targets, parallel=parallel), out.routes

    return logprobs_of


def _still(params: Any) -> Any:
    """The same parameters, through whose routers no gradient flows."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.stop_gradient(leaf) if _of_router(path) else leaf, params)


def _of_router(path: tuple[Any, ...]) -> bool:
    names = [getattr(key, "key", None) for key in path]
    return any(pair == ("mlp", "gate") for pair in zip(names, names[1:], strict=False))


def effective_sample(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`effective_sample` in place of the ratios' moments: (sum w r)^2 / (sum w sum w r^2), 1 on policy (Kong 1992).

    Weights w, which sum to one, are those of tokens in the loss; r are ratios of the moved policy to the one that drew.
    """
    kept = dict(metrics)
    mean, square = kept.pop("ratio"), kept.pop("ratio_squared")
    return kept | {"effective_sample": mean**2 / jnp.maximum(square, 1e-30)}


class Batches:
    """Makes batches of packed rows for the loss, with what it must know of the weights before the update."""

    def __init__(self, trainer: Trainer, config: ExpertsConfig) -> None:
        """Prepares; nothing is compiled before it is used.

        Args:
          trainer: see `make_trainer`.
          config: that it was made with.
        """
        self.trainer, self.config = trainer, settled(config, trainer.model)
        self._proximal, self._routes = needs_proximal(self.config), self.config.routing == "first"
        shardings = None
        if trainer.parallel is not None:
            shardings = {name: layout.batch_sharding(trainer.parallel, len(size))
                         for name, (size, _) in trainer.shape.arrays().items() if name in ("proximal", "routes")}
        self._look = jax.jit(self._looked, out_shardings=shardings) if self._proximal or self._routes else None

    def of(self, params: Any, rows: Mapping[str, np.ndarray]) -> Batch:
        """Rows [n, T, ...] on the devices; `params` are the weights before the update.

        Where the objective is decoupled `proximal` [S, R, T] float32 are their log-probabilities, and with routing
        first `routes` [S, R, T, L, k] int16 the experts that they choose: one forward pass beside the update's three.
        """
        batch = self.trainer.place(rows)
        return batch if self._look is None else batch | self._look(params, batch)

    def _looked(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        logprobs_of = _logprobs_of(self.trainer.model, self.config, self.trainer.parallel)

        def one(rows: Batch) -> dict[str, jax.Array]:
            acted = rows.get("routes")
            routes = None if acted is None else jnp.moveaxis(acted.astype(jnp.int32), 2, 0)
            (logprobs, _), chosen = logprobs_of(params, rows, routes, self._routes)
            found = {"proximal": logprobs} if self._proximal else {}
            return found | ({"routes": jnp.moveaxis(chosen, 0, 2).astype(jnp.int16)} if self._routes else {})

        return jax.lax.map(one, dict(batch))
