"""Group-relative policy optimisation from execution rewards: the loss, and what an update is made of.

For every update the policy acts several times on each of a few prompts. An episode's advantage is its reward's
standard score within its prompt's group (GRPO); the loss is DAPO's: clipped with separate bounds, averaged over
all sampled tokens alike (or as GRPO does, over groups, episodes and tokens in turn: failures are longer, and a small
policy that is mostly told what not to do loses its format); prompts whose samples earned the same are left out; a
turn that broke the tool format has its own tokens penalised. The policy is softmax(logits / temperature) on both sides:
the one that acted, the one that is moved, and the one it is held to. The router's balance loss plays no part: a few
thousand tokens of one domain should not be spread evenly over experts.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax import files
from qcn_jax.config import ExpertsConfig, ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next, head_kernel
from qcn_jax.pipeline.rl import episodes, lessons, objectives
from qcn_jax.pipeline.rl.advantages import informative_groups, staleness, summarize
from qcn_jax.pipeline.rl.events import Events
from qcn_jax.pipeline.rl.groups import Group
from qcn_jax.pipeline.rl.orchestrator import Orchestrator
from qcn_jax.pipeline.rl.plan import Plan
from qcn_jax.pipeline.rl.records import Conversation, RolloutRecord, Stop, Stopped, never, sequence_seed
from qcn_jax.pipeline.rl.rollout import Threads, rollout, sampled
from qcn_jax.pipeline.train.fingerprint import fingerprint
from qcn_jax.pipeline.train.head import over_vocabulary, project
from qcn_jax.pipeline.train.loop import Work
from qcn_jax.pipeline.train.losses import next_tokens
from qcn_jax.pipeline.train.step import BatchShape, LossFn, TrainState
from qcn_jax.pipeline.train.trainer import Trainer
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel

AVERAGES = ("token", "episode")
ROUTINGS = ("free", "replay")
ADVANTAGE_BASELINES, ADVANTAGE_SCALES = ("mean", "leave_one_out"), ("std", "none")
LOST = ("stale_groups", "given_up_groups", "refilled", "put_back")  # what orchestrators count
PROBE = 1_000_003  # takes the place of the update's number in the seeds of the prompt filter


def policy_loss(model: ModelConfig, config: ExpertsConfig, parallel: Parallel | None = None) -> LossFn:
    """The loss of packed rows, a weighted mean over the tokens of the whole batch.

    All log-probabilities, and so ratio, divergence and entropy, are at the rollouts' temperature. The returned function
    takes (params, batch, reference) where batch has, besides tokens, segment_ids, positions, weights and weight_sum,
    `advantages` and `old_logprobs` [B, T], and `routes` [B, T, L, k] where `config.routing` is replay. `reference` is
    the parameter tree that `config.kl_coef` holds the policy to; there is none where that is 0.
    """
    network = Qwen3Next(model, parallel=parallel)
    objective = objectives.OBJECTIVES.resolve(config.objective, "--config.experts.objective")

    def statistics(
        kernels: tuple[jax.Array, ...], hidden: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return objectives.token_statistics(project(hidden, kernels[0]), targets, config.rollout.temperature)

    def logprobs_of(params: Any, batch: dict[str, jax.Array], routes: jax.Array | None = None
                    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        out = network.apply(
            {"params": params}, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"],
            with_logits=False, routes=routes, with_routes=routes is not None,
        )  # fmt: skip
        kernels = (head_kernel(model, params),)
        targets = next_tokens(batch["tokens"])
        return over_vocabulary(statistics, kernels, out.hidden, targets, parallel=parallel), out.routes

    def loss(params: Any, batch: dict[str, jax.Array], reference: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        routes = jnp.moveaxis(batch["routes"].astype(jnp.int32), 2, 0) if config.routing == "replay" else None
        (logprobs, entropy), chosen = logprobs_of(params, batch, routes)
        weights, old = batch["weights"] / batch["weight_sum"], batch["old_logprobs"]
        tokens = objectives.PolicyTokens(
            logprobs, old, batch["advantages"], batch["weights"] > 0, batch["segment_ids"])
        losses, clipped = objective(tokens, config)
        means = {
            "entropy": jnp.sum(weights * entropy),
            "clipped": jnp.sum(weights * clipped),
            # Of the policy that acted from the one being moved; not zero before the first step where decoding and
            # training round differently.
            "kl_old": jnp.sum(weights * objectives.kl_estimate(old, logprobs)),
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
    if config.routing == "replay" and not model.num_experts:
        raise UserError("--config.experts.routing: 'replay', but the model has no experts; allowed: free")
    each = (model.num_hidden_layers, model.num_experts_per_tok)
    most = -(-config.prompts // config.minibatches) * config.group_size
    shape = BatchShape(-(-most // config.rows), config.rows, config.sequence_length,
                       ("weights", "advantages", "old_logprobs"), padded=True,
                       routes=each if config.routing == "replay" else ())
    return Trainer.build(model, policy_loss(model, config, parallel), config.optimizer,
                         config.updates * config.minibatches, shape, parallel, field="experts",
                         frozen=int(config.kl_coef > 0))


def lesson(records: Sequence[RolloutRecord], step: int, config: ExpertsConfig, trainer: Trainer,
           metrics: Mapping[str, float]) -> Work:
    """What the update behind `step` others learns from `records`, with `metrics` among its own.

    Without an informative group it has no rows.
    """
    records = lessons.learnable(records, step, config)
    parts = lessons.parts(records, config)
    rows = [lessons.rows(part, config) for part in parts]
    groups = sum(map(len, parts))
    return Work([trainer.place(arrays) for arrays in rows], sum(arrays["tokens"].size for arrays in rows),
                summarize(records) | staleness(records, step)
                | {"groups": groups, "informative": groups / config.prompts} | dict(metrics))


@dataclasses.dataclass
class Learner:
    """The feed of one expert's updates; see train.loop.

    Attributes:
      config: the stage's configuration.
      seed: of this expert; everything random follows from it and the update's number.
      engine: generates; holds the newest parameters during rollouts.
      trainer: see `make_trainer`.
      prompts: what to train on.
      converse: prompt -> a fresh conversation.
      journal: folder of this host's journal of episodes; None keeps none.
      log: takes a line.
      acting: what is under way; None before the first update.
      threads: those of its environments.
    """

    config: ExpertsConfig
    seed: int
    engine: Engine
    trainer: Trainer
    prompts: Sequence[Any]
    converse: Callable[[Any], Conversation]
    journal: files.Path | None = None
    log: Callable[[str], None] = lambda line: None
    acting: Orchestrator | None = None
    threads: Threads | None = None
    stream = None  # what is learned from follows from the seed, the update's number and the journal

    def act(
        self, params: Any, update: int, prompts: Sequence[Any], samples: int, stop: Stop = never,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RolloutRecord]:
        """`samples` episodes on each of `prompts`; `progress` and `stop` are rollout's."""
        self.engine.params = params
        groups = [[self.converse(prompt) for _ in range(samples)] for prompt in prompts]
        seeds = [[sequence_seed(self.seed, update, g, i) for i in range(samples)] for g in range(len(prompts))]
        sampling = episodes.sampling_of(self.config.rollout)
        return rollout(self.engine, groups, seeds, sampling=sampling, greedy_turns=self.config.greedy_turns,
                       progress=progress, stop=stop)

    def next(self, step: int, state: TrainState, stop: Stop = never) -> Work | None:
        """Collects episodes and their rewards; see train.loop.Feed and `lesson`."""
        began = time.perf_counter()
        self.engine.params = state.params
        acting = self._acting_at(step)
        acting.begin(step, weights := fingerprint(state.params))
        counts = acting.counts.copy()
        try:
            own = acting.collect(stop)
        except Stopped:
            return None
        seconds = {"seconds_rollout": time.perf_counter() - began, "seconds_waited": acting.seconds_waited}
        if acting.weights not in ("", weights):
            self.log(f"update {step + 1}: the weights are not those that the journal tells of")
        lost = {name: acting.counts[name] - counts[name] for name in LOST}
        everywhere = distributed.exchanged("episodes", (own, lost))
        records = [record for own, _ in everywhere for record in own]
        seconds |= {name: float(sum(lost[name] for _, lost in everywhere)) for name in LOST}
        return lesson(records, step, self.config, self.trainer, seconds)

    def _acting_at(self, step: int) -> Orchestrator:
        """The orchestrator, behind `step` updates."""
        if self.acting is None or self.acting.version + 1 != step:
            self.close()
            self.threads = Threads()
            config, (host, hosts) = self.config, distributed.place()
            plan = Plan(
                config.prompts, self.engine.max_new_tokens, max_staleness=config.max_staleness, stale=config.stale,
                caches=config.caches, refills=config.refills, burst=config.burst if config.max_staleness else 0,
                host=host, hosts=hosts)  # fmt: skip
            self.acting = Orchestrator(
                self.engine, self.threads, self._group, plan, log=self.log,
                events=None if self.journal is None else Events(self.journal),
                exchange=lambda value: distributed.exchanged("groups", value),
                head={"greedy_turns": list(config.greedy_turns)})  # fmt: skip
            self.acting.resume(step)
        return self.acting

    def _group(self, number: int) -> Group:
        """The group of a number: its prompt's, the next of the shuffled order."""
        (prompt,) = episodes.choose(self.prompts, 1, number, self.seed)
        place = divmod(number, self.config.prompts)
        return Group(
            self.config.group_size, lambda sample: self.converse(prompt),
            lambda sample: sequence_seed(self.seed, *place, sample),
            **sampled(episodes.sampling_of(self.config.rollout), self.config.greedy_turns))  # fmt: skip

    def close(self) -> None:
        """Gives up the episodes that are open."""
        if self.acting is not None and self.threads is not None:
            self.acting.close()
            self.threads.close()
            self.acting = self.threads = None

    def useful(self, params: Any, samples: int, progress: Callable[[int, int], None] | None = None) -> list[int]:
        """Indices of the prompts on which the given policy earns more and less in `samples` tries."""
        records = self.act(params, PROBE, self.prompts, samples, progress=progress)
        return sorted(informative_groups(records))
