"""What an update would have been on the very same episodes and weights: under other settings, and without a group."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax import syntax
from qcn_jax.config import ExpertsConfig, ModelConfig, from_config_dict
from qcn_jax.config_values import refusals
from qcn_jax.errors import UserError
from qcn_jax.pipeline.rl import episodes, lessons
from qcn_jax.pipeline.rl.policy import Batches, make_trainer
from qcn_jax.pipeline.rl.records import RolloutRecord
from qcn_jax.pipeline.rl.settings import ACTED
from qcn_jax.pipeline.train.step import Params
from qcn_jax.sharding.parallel import Parallel

# Settings of config.experts that an update reads when its episodes are there already.
FIELDS = ("objective", "average", "routing", "negative_weight", "clip_low", "clip_high", "ratio_cap", "ratio_bounds",
          "negative_bound", "advantage_baseline", "advantage_scale", "kl_coef", "malformed_penalty", "repeat_penalty")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings in place of the run's, and their words: `objective=gspo,clip_low=0.001`."""

    name: str
    config: ExpertsConfig

    @classmethod
    def parse(cls, words: str, config: ExpertsConfig, with_routes: bool) -> "Variant":
        """Reads NAME=VALUE pairs with commas between.

        Args:
          words: the pairs; names are those of FIELDS.
          config: the run's.
          with_routes: whether its journal holds the experts of every token.

        Raises:
          UserError: names the pair, and what is allowed.
        """
        flag, values = f"--instead={words}", dataclasses.asdict(config)
        for pair in re.split(r",(?![^(\[]*[)\]])", words):
            name, equals, text = pair.partition("=")
            if not equals or name not in FIELDS:
                raise UserError(f"{flag}: {pair!r} is not NAME=VALUE of {', '.join(FIELDS)}")
            try:
                values[name] = syntax.literal(text)
            except (ValueError, SyntaxError):
                values[name] = text
        found = from_config_dict(ExpertsConfig, values, "--instead")
        for line in refusals(found, "--instead"):
            raise UserError(line)
        if found.routing in ACTED and not with_routes:
            raise UserError(f"{flag}: the run's journal holds no routes (--config.experts.routing=free); allowed: free")
        if found.routing == "auto" != config.routing:
            raise UserError(f"{flag}: 'auto' says nothing here; allowed: free, replay, frozen, first")
        return cls(words, found)


class Gradients:
    """Gradients of updates under one configuration.

    An update with several moves of the optimizer is taken as the sum of their gradients at the weights before it.
    """

    def __init__(self, model: ModelConfig, config: ExpertsConfig, parallel: Parallel | None, reference: Params) -> None:
        """Prepares; nothing is compiled before it is used.

        Args:
          model, parallel: see policy.make_trainer.
          config: see there.
          reference: the parameters that a KL term holds the policy to.
        """
        self._trainer = make_trainer(model, config, parallel)
        self._batches = Batches(self._trainer, config)
        self._config = self._batches.config
        self._frozen = (self._trainer.place_params(reference),) * self._trainer.frozen
        self._gradient = jax.jit(lambda *given: self._trainer.gradient(*given)[0])

    def of(self, params: Params, records: Sequence[RolloutRecord], step: int) -> tuple[Params, float]:
        """The gradient of the update behind `step` others, and its weight in tokens; (zeros, 0) where none teaches."""
        total, weight = _zeros(params), 0.0
        for part in lessons.parts(lessons.learnable(records, step, self._config), self._config):
            rows = lessons.rows(part, self._config)
            total = _plus(total, self._gradient(params, self._batches.of(params, rows), self._frozen))
            weight += float(rows["weights"].sum())
        return total, weight

    def shares(self, params: Params, records: Sequence[RolloutRecord], step: int, whole: Params
               ) -> list[dict[str, Any]]:
        """How far each group moved the weights along the update's gradient `whole`; all shares sum to one.

        A group's part of the gradient is that of its tokens alone, times their share of the weight of all.

        Returns:
          {"group", "episodes", "reward", "share", "norm"} of each group that taught something; `norm` of its part over
          the norm of the whole.
        """
        found, length = [], _product(whole, whole)
        for part in lessons.parts(lessons.learnable(records, step, self._config), self._config):
            documents = lessons.documents(part, self._config)
            heavy = sum(float(document["weights"].sum()) for group in documents for document in group)
            for group, own in zip(part, documents, strict=True):
                rows = episodes.pack_rows(own, self._config.sequence_length, self._config.rows)
                gradient = self._gradient(params, self._batches.of(params, rows), self._frozen)
                scale = float(rows["weights"].sum()) / heavy
                found.append({
                    "group": group[0].prompt, "episodes": len(group),
                    "reward": sum(record.outcome.reward for record in group) / len(group),
                    "share": float(scale * _product(gradient, whole) / jnp.maximum(length, 1e-30)),
                    "norm": float(scale * jnp.sqrt(_product(gradient, gradient) / jnp.maximum(length, 1e-30)))})
        return found


def compared(gradient: Params, other: Params) -> dict[str, float]:
    """Cosine of two gradients, and the length of the second over that of the first; 0 where one is zero."""
    both, own, its = _product(gradient, other), _product(gradient, gradient), _product(other, other)
    lengths = jnp.sqrt(own * its)
    return {"cosine": float(jnp.where(lengths > 0, both / jnp.maximum(lengths, 1e-30), 0.0)),
            "norm": float(jnp.where(own > 0, jnp.sqrt(its / jnp.maximum(own, 1e-30)), 0.0))}


@jax.jit
def _product(one: Params, other: Params) -> jax.Array:
    """The scalar product of two trees, float32."""
    terms = jax.tree.map(lambda a, b: jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32)), one, other)
    return jnp.asarray(sum(jax.tree.leaves(terms)))


@jax.jit
def _zeros(tree: Params) -> Params:
    return jax.tree.map(jnp.zeros_like, tree)


@jax.jit
def _plus(one: Params, other: Params) -> Params:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), one, other)
