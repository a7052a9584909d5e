"""Group-relative policy optimisation from execution rewards: what an update is made of.

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

from qcn_jax import files
from qcn_jax.config import ExpertsConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.pipeline.rl import episodes, lessons
from qcn_jax.pipeline.rl.advantages import informative_groups, staleness, summarize
from qcn_jax.pipeline.rl.events import Events
from qcn_jax.pipeline.rl.groups import Group
from qcn_jax.pipeline.rl.orchestrator import Orchestrator
from qcn_jax.pipeline.rl.plan import Plan
from qcn_jax.pipeline.rl.policy import Batches
from qcn_jax.pipeline.rl.records import Conversation, RolloutRecord, Stop, Stopped, never, sequence_seed
from qcn_jax.pipeline.rl.rollout import Threads, rollout, sampled
from qcn_jax.pipeline.train.fingerprint import fingerprint
from qcn_jax.pipeline.train.loop import Work
from qcn_jax.pipeline.train.step import TrainState
from qcn_jax.pipeline.train.trainer import Trainer
from qcn_jax.sharding import distributed

LOST = ("stale_groups", "given_up_groups", "refilled", "put_back")  # what orchestrators count
PROBE = 1_000_003  # takes the place of the update's number in the seeds of the prompt filter


def lesson(records: Sequence[RolloutRecord], step: int, batches: Batches, params: Any,
           metrics: Mapping[str, float]) -> Work:
    """What the update behind `step` others, from the weights `params`, learns from `records`.

    Without an informative group it has no rows. `metrics` are among its own.
    """
    config = batches.config
    records = lessons.learnable(records, step, config)
    parts = lessons.parts(records, config)
    rows = [lessons.rows(part, config) for part in parts]
    groups = sum(map(len, parts))
    return Work([batches.of(params, arrays) for arrays in rows], sum(arrays["tokens"].size for arrays in rows),
                summarize(records) | staleness(records, step)
                | {"groups": groups, "informative": groups / config.prompts} | dict(metrics))


@dataclasses.dataclass
class Learner:
    """The feed of one expert's updates; see train.loop.

    Attributes:
      config: the stage's configuration.
      seed: of this expert; everything random follows from it and the update's number.
      engine: generates; holds the newest parameters during rollouts.
      trainer: see policy.make_trainer.
      prompts: what to train on.
      converse: prompt -> a fresh conversation.
      journal: folder of this host's journal of episodes; None keeps none.
      log: takes a line.
      acting: what is under way; None before the first update.
      threads: those of its environments.
      batches: makes them for `trainer`.
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
    batches: Batches | None = None
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
                       again=sampling, progress=progress, stop=stop)

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
        seconds = {"seconds_rollout": time.perf_counter() - began, "seconds_waited": acting.seconds_waited,
                   "ticks": acting.ticks}
        if acting.weights not in ("", weights):
            self.log(f"update {step + 1}: the weights are not those that the journal tells of")
        lost = {name: acting.counts[name] - counts[name] for name in LOST}
        everywhere = distributed.exchanged("episodes", (own, lost))
        records = [record for own, _ in everywhere for record in own]
        seconds |= {name: float(sum(lost[name] for _, lost in everywhere)) for name in LOST}
        self.batches = self.batches or Batches(self.trainer, self.config)
        return lesson(records, step, self.batches, state.params, seconds)

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
        place, sampling = divmod(number, self.config.prompts), episodes.sampling_of(self.config.rollout)
        return Group(
            self.config.group_size, lambda sample: self.converse(prompt),
            lambda sample: sequence_seed(self.seed, *place, sample),
            **sampled(sampling, self.config.greedy_turns, again=sampling))  # fmt: skip

    def close(self) -> None:
        """Gives up the episodes that are open."""
        if self.acting is not None and self.threads is not None:
            self.acting.close()
            self.threads.close()
            self.acting = self.threads = None

    def useful(self, params: Any, samples: int, progress: Callable[[int, int], None] | None = None) -> list[int]:
        """Indices of the prompts on which the given policy earns more and less in `samples` tries."""
        records = self.act(params, PROBE, self.prompts, samples, progress=progress)
        return sorted(informative_groups(records, self.config.attempt_discount))
