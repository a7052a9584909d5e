"""Stage `experts`: group-relative policy optimisation from execution rewards, one sub-run per expert.

For every update the policy acts several times on each of a few prompts. An episode's advantage is its reward's
standard score within its prompt's group (GRPO); the loss is DAPO's: clipped with separate bounds, averaged over
all sampled tokens alike (or over episodes alike: failures are longer, and a small policy that is mostly told what
not to do loses its format); prompts that are always or never solved are left out; a turn that broke the tool format
has its own tokens penalised. The router's balance loss plays no part: a few thousand tokens of one domain should
not be spread evenly over experts.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qcn_jax import files, hub
from qcn_jax.config import ModelConfig, ExpertsConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next, head_kernel
from qcn_jax.pipeline.rl import objectives, online
from qcn_jax.pipeline.context import StageContext
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.pipeline.experts.domains import Prompt, Services, TaskConversation, make_prompts, make_services
from qcn_jax.pipeline.train.head import over_vocabulary, project
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.optimizer import make_optimizer
from qcn_jax.pipeline.rl.rewards import informative_groups, summarize, token_advantages
from qcn_jax.pipeline.rl.rollout import Conversation, RolloutRecord, Stop, never, rollout, sequence_seed
from qcn_jax.pipeline.data.splits import split_tasks
from qcn_jax.pipeline.train.loop import TrainState
from qcn_jax.pipeline.train.update import Part, SumLoss, Updater
from qcn_jax.sharding.parallel import Parallel

AVERAGES = ("token", "episode")
PROBE = 1_000_003  # takes the place of the update's number in the seeds of the prompt filter


def policy_loss(model: ModelConfig, config: ExpertsConfig, parallel: Parallel | None = None) -> SumLoss:
    """The loss of packed rows, summed over tokens.

    The returned function takes (params, batch, reference) where batch has, besides tokens, segment_ids,
    positions and weights, `advantages` and `old_logprobs` [B, T]. `reference` is the parameter tree that
    `config.kl_coef` holds the policy to; None where that is 0.
    """
    network = Qwen3Next(model, parallel=parallel)
    statistics = lambda kernels, hidden, target: objectives.token_statistics(project(hidden, kernels[0]), target)

    def logprobs_of(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out = network.apply(
            {"params": params}, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"],
            with_logits=False,
        )  # fmt: skip
        kernels = (head_kernel(model, params),)
        return over_vocabulary(statistics, kernels, out.hidden, online.next_tokens(batch), parallel=parallel)

    def loss(params: Any, batch: dict[str, jax.Array], reference: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logprobs, entropy = logprobs_of(params, batch)
        weights, old = batch["weights"], batch["old_logprobs"]
        losses, clipped = objectives.clipped_policy_loss(
            logprobs, old, batch["advantages"], config.clip_low, config.clip_high
        )
        sums = {
            "entropy": jnp.sum(weights * entropy),
            "clipped": jnp.sum(weights * clipped),
            # Of the policy that acted from the one being moved; not zero before the first step where decoding and
            # training round differently.
            "kl_old": jnp.sum(weights * objectives.kl_estimate(old, logprobs)),
        }
        if config.kl_coef:
            held = objectives.kl_estimate(logprobs, jax.lax.stop_gradient(logprobs_of(reference, batch)[0]))
            losses = losses + config.kl_coef * held
            sums["kl_reference"] = jnp.sum(weights * held)
        return jnp.sum(weights * losses), sums

    return loss


@dataclasses.dataclass
class Learner:
    """Updates of one expert.

    Attributes:
      config: the stage's configuration.
      seed: of this expert; everything random follows from it and the update's number.
      engine: generates; holds the newest parameters during rollouts.
      updater: of `policy_loss`.
      prompts: what to train on.
      converse: prompt -> a fresh conversation.
      reference: parameters for the KL term, or None.
    """

    config: ExpertsConfig
    seed: int
    engine: Engine
    updater: Updater
    prompts: Sequence[Any]
    converse: Callable[[Any], Conversation]
    reference: Any = None

    def act(
        self, params: Any, update: int, prompts: Sequence[Any], samples: int, stop: Stop = never,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RolloutRecord]:
        """`samples` episodes on each of `prompts`; `progress` and `stop` are rollout's."""
        self.engine.params = params
        groups = [[self.converse(prompt) for _ in range(samples)] for prompt in prompts]
        seeds = [[sequence_seed(self.seed, update, g, i) for i in range(samples)] for g in range(len(prompts))]
        sampling = online.sampling_of(self.config.rollout)
        return rollout(self.engine, groups, seeds, sampling=sampling, greedy_turns=self.config.greedy_turns,
                       progress=progress, stop=stop)

    def step(self, update: int, state: TrainState, stop: Stop = never) -> tuple[TrainState, dict[str, Any]]:
        """One update: act, judge, learn. Without an informative group the state stays as it is."""
        clock = online.Clock()
        chosen = online.choose(self.prompts, self.config.prompts, update, self.seed)
        records = self.act(state.params, update, chosen, self.config.group_size, stop)
        clock.lap("rollout")
        groups = list(informative_groups(records).values())
        metrics: dict[str, float] = {}
        parts = [groups[i :: self.config.minibatches] for i in range(self.config.minibatches)]
        parts = [part for part in parts if part]
        for part in parts:
            state, values = self.updater(state, Part(self.rows(part), (self.reference,)))
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(parts)
        clock.lap("update")
        shares = {"groups": len(groups), "informative": len(groups) / len(chosen)}
        return state, summarize(records) | shares | metrics | clock.parts

    def rows(self, groups: Sequence[Sequence[RolloutRecord]]) -> dict[str, np.ndarray]:
        """Packed rows of the episodes of some groups, with advantages and old log-probabilities."""
        documents = []
        for group in groups:
            rewards = [record.outcome.reward for record in group]
            advantages = objectives.group_advantages(rewards, [0] * len(group), [True] * len(group))
            advantages *= np.where(advantages < 0, self.config.negative_weight, 1.0)
            if self.config.average == "episode":
                lengths = np.array([record.sampled.sum() for record in group])  # 0: taken greedily to its end
                advantages *= lengths[lengths > 0].mean() / np.maximum(lengths, 1) if lengths.any() else 1.0
            for record, advantage in zip(group, advantages, strict=True):
                documents.append(online.document(
                    record, advantages=token_advantages(record, float(advantage), self.config),
                    old_logprobs=record.logprobs,
                ))  # fmt: skip
        return online.pack_rows(documents, self.config.sequence_length, self.config.rows)

    def useful(self, params: Any, samples: int, progress: Callable[[int, int], None] | None = None) -> list[int]:
        """Indices of the prompts that the given policy solves sometimes, but not always, in `samples` tries."""
        records = self.act(params, PROBE, self.prompts, samples, progress=progress)
        return sorted(informative_groups(records))


def run_stage(context: StageContext) -> dict[str, Any]:
    """Trains every expert of `config.experts.names` from the SFT model.

    Returns:
      {"experts": {name: {"seconds", "prompts", "first", "last"}}} with the metrics of the first and last updates.
    """
    config = context.config.experts
    services = make_services(context)
    encoder = ChatEncoder(context.tokenizer())
    model, params = hub.load(context.model_path("sft"))
    engine = online.make_engine(model, params, encoder.tokenizer, config.rollout, config.sequence_length)
    optimizer = make_optimizer(config.optimizer, config.updates * config.minibatches)
    updater = Updater(policy_loss(model, config), optimizer, config.rows)
    results = {}
    for name in config.names:
        done = context.workdir / name / "DONE.json"
        if not done.exists():
            files.write_json(done, _train_expert(context, name, model, params, engine, updater, optimizer,
                                                 encoder, services))  # fmt: skip
        results[name] = files.read_json(done)
    line = ", ".join(f"{n} {r['first']['pass_rate']:.0%} to {r['last']['pass_rate']:.0%}" for n, r in results.items())
    return {"experts": results, "line": f"pass rate {line}"}


def _train_expert(
    context: StageContext, name: str, model: ModelConfig, params: Any, engine: Engine, updater: Updater,
    optimizer: optax.GradientTransformation, encoder: ChatEncoder, services: Services,
) -> dict[str, Any]:  # fmt: skip
    config, directory = context.config.experts, context.workdir / name
    log = lambda line: context.log(f"{name}: {line}")
    prompts = training_prompts(context, name)
    if all(prompt.scaffold.single_turn for prompt in prompts):  # taken greedily, the only turn would teach nothing
        config = dataclasses.replace(config, greedy_turns=())
    learner = Learner(
        config=config, seed=sequence_seed(context.config.seed, zlib.crc32(name.encode())), engine=engine,
        updater=updater, prompts=prompts, reference=params if config.kl_coef else None,
        converse=lambda prompt: TaskConversation(
            prompt, encoder, services, max_turns=config.rollout.max_turns,
            unfinished_penalty=config.unfinished_penalty,
        ),
    )  # fmt: skip
    if config.filter_samples:
        learner.prompts = _filtered(learner, params, directory / "prompts.json", log)
    state = online.run_updates(
        directory, TrainState.create(jax.tree.map(jnp.array, params), optimizer), learner.step, config.updates,
        log=log, line=_line, checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    hub.save(directory / "model", model, jax.device_get(state.params), encoder.tokenizer)
    rows = read_metrics(directory / "metrics.jsonl")
    return {
        "seconds": round(sum(row["seconds"] for row in rows), 2), "prompts": len(learner.prompts),
        "first": rows[0], "last": rows[-1],
    }  # fmt: skip


def _filtered(learner: Learner, params: Any, path: pathlib.Path, log: Callable[[str], None]) -> list[Any]:
    """The prompts that the SFT model solves sometimes; written down, so that a resumed run keeps the same."""
    if not path.exists():
        kept = learner.useful(params, learner.config.filter_samples, _every_tenth(log))
        files.write_json(path, {"of": len(learner.prompts), "kept": kept})
    kept = files.read_json(path)["kept"]
    log(f"{len(kept)} of {len(learner.prompts)} prompts are solved sometimes, but not always")
    return [learner.prompts[index] for index in kept]


def _every_tenth(log: Callable[[str], None]) -> Callable[[int, int], None]:
    """A progress callback that logs each time another tenth of the episodes has ended."""
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // max(total, 1) > shown:
            shown = done * 10 // max(total, 1)
            log(f"prompt filter: {done} of {total} episodes")

    return progress


def training_prompts(context: StageContext, domain: str) -> list[Prompt]:
    """Prompts of RL and distillation: tasks that SFT has not seen."""
    _, tasks = split_tasks(context.tasks("train"), context.config.seed)
    return make_prompts(domain, tasks, context.templates())


def _line(metrics: dict[str, Any]) -> str:
    return (
        f"reward {metrics['reward']:.2f}  solved {metrics['pass_rate']:.0%}  turns {metrics['turns']:.1f}  "
        f"malformed {metrics['malformed']:.0%}  repeated {metrics['repeated']:.0%}  groups {metrics['groups']}"
    )
