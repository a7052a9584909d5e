"""The bench that models are measured on: held-out tasks, one engine whose weights are exchanged, sandboxes.

Used by the stage `evaluate` for every model of a run. Episodes are those of training (pipeline.experts), so nothing is
measured that the model was not meant to do.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from qcn_jax.agents.running import attempt_seed
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.services import Services
from qcn_jax.chat.encoder import Encoder
from qcn_jax.config import EvaluateConfig, ModelConfig
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import SUSPECTED_EXPLOIT
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import GREEDY, Sampling
from qcn_jax.pipeline.evaluate.baseline import Baseline
from qcn_jax.pipeline.experts import headline, metrics
from qcn_jax.pipeline.experts.expert import Conversation, Expert, Prompt
from qcn_jax.pipeline.experts.feedback import feedback
from qcn_jax.pipeline.rl.episodes import make_engine
from qcn_jax.pipeline.rl.records import Outcome, RolloutRecord
from qcn_jax.pipeline.rl.rollout import acts_here, rollout
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel

BASELINE_THREADS = 8  # each waits for a sandbox; the pool decides how many really run


@dataclasses.dataclass
class Bench:
    """What it takes to measure models on `tasks`.

    Attributes:
      tasks: held-out tasks in a fixed order.
      experts: whose episodes are played; one is the headline.
      scaffold: how tasks are presented.
      templates: tool-call templates for experts that ask for one.
      unseen: likewise those that no model of the run was trained on.
      config: sampling and limits.
      encoder: text to tokens and back.
      services: sandboxes.
      seed: of the sampled episodes.
      log: takes progress lines.
      parallel: the mesh to act on; None is one device. Several hosts share the episodes out, and all get all numbers.
    """

    tasks: Sequence[Task]
    experts: Sequence[Expert]
    scaffold: Scaffold
    templates: Sequence[str]
    config: EvaluateConfig
    encoder: Encoder
    services: Services
    seed: int
    log: Callable[[str], None]
    parallel: Parallel | None = None
    unseen: Sequence[str] = ()
    _engine: Engine | None = None

    def model(self, name: str, model_config: ModelConfig, params: Any) -> dict[str, Any]:
        """All numbers of one model, and its greedy conversations under `messages`, with what they left as `patches`.

        Every model must have the same configuration: the compiled functions are shared.
        """
        engine, first = self._with_weights(model_config, params), headline(self.experts)
        others = [expert for expert in self.experts if expert is not first]
        # All at once, the long episodes first: a decoding step costs the same however few of the slots are in use.
        trained = [prompt for prompt in self._prompts(first) if not prompt.unseen]
        sampled = trained[: self.config.pass_k_tasks] if self.config.samples else []
        (greedy, messages), *played, (samples, _) = self._play(
            engine, [self._prompts(expert) for expert in (first, *others)], sampled)
        own = first.metrics(greedy)
        # Numbers of a model as a whole are of templates that it was trained on.
        seen = [index for index, row in enumerate(greedy) if not row.get("unseen")]
        greedy, messages = [greedy[index] for index in seen], [messages[index] for index in seen]
        result = metrics.greedy(greedy) | metrics.sampled(samples) | {"feedback": feedback(greedy, samples)}
        more = {key: value for key, value in own.pop(first.name, {}).items() if key not in result}
        result |= own | ({first.name: more} if more else {})
        for expert, (rows, _) in zip(others, played, strict=True):
            result |= expert.metrics(rows)
        result |= _shown(greedy, messages)
        rates = [f"{expert.column or expert.name} {expert.rate(result):.1%}" for expert in others]
        self.log(", ".join([f"{name}: {result['resolved']}/{result['attempted']} resolved", *rates]))
        return result

    def baseline(self, baseline: Baseline) -> dict[str, Any]:
        """The same numbers for what plays without a model; what it cannot do (sample, other experts) is absent."""
        own = self.own_tasks()
        prompts = [prompt for prompt in self._prompts(headline(self.experts)) if prompt.task.instance_id not in own]
        conversations = [self._conversation(prompt) for prompt in prompts]

        def play(conversation: Any) -> Outcome:
            baseline.play(conversation.episode)
            return conversation.outcome(False)

        with concurrent.futures.ThreadPoolExecutor(BASELINE_THREADS, "baseline") as threads:
            outcomes = list(threads.map(play, conversations))
        rows = [_row(prompt.task, outcome, len(conversation.episode.turns), 0, prompt.task.kind)
                for prompt, conversation, outcome in zip(prompts, conversations, outcomes, strict=True)]
        result = metrics.greedy(rows) | {"pass_at_8": None}
        result |= _shown(rows, [plain_messages(conversation.messages) for conversation in conversations])
        self.log(f"{baseline.name}: {result['resolved']}/{result['attempted']} resolved")
        return result

    def own_tasks(self) -> dict[str, Task]:
        """What experts bring along beside `tasks`, by id."""
        return {task.instance_id: task for expert in self.experts for task in expert.own_tasks()}

    def _prompts(self, expert: Expert) -> list[Prompt]:
        return expert.prompts(self.tasks, self.scaffold, self.templates, self.unseen)

    def _with_weights(self, model_config: ModelConfig, params: Any) -> Engine:
        if self.parallel is None:
            params = jax.device_put(params)
        if self._engine is None:
            self._engine = make_engine(model_config, params, self.encoder, self.config.rollout,
                                       parallel=self.parallel)
        self._engine.params = params
        return self._engine

    def _conversation(self, prompt: Prompt) -> Conversation:
        # Rewards are not looked at here, only verdicts, hence no penalty.
        return prompt.expert.conversation(prompt, self.encoder, self.services, redraws=self.config.redraws,
                                          max_turns=self.config.rollout.max_turns)

    def _play(
        self, engine: Engine, greedy: Sequence[Sequence[Prompt]], sampled: Sequence[Prompt]
    ) -> list[tuple[list[dict[str, Any]], list[list[dict[str, str]]]]]:  # fmt: skip
        """Rows and messages of one greedy episode for each prompt, list by list, and of those of `sampled`."""
        samples, drawn = self.config.samples, self.config.rollout
        sampling = Sampling(self.config.temperature, drawn.top_p, drawn.top_k)
        parts = [greedy[0], sampled, *greedy[1:]]
        groups, seeds, draws = [], [], []
        for part in parts:
            for prompt in part:
                count = samples if part is sampled else 1
                groups.append([self._conversation(prompt) for _ in range(count)])
                seeds.append([attempt_seed(self.seed, prompt.task, sample) for sample in range(count)])
                draws.append(sampling if part is sampled else GREEDY)
        records = rollout(engine, groups, seeds, sampling=draws, again=sampling)
        said = {index: [plain_messages(conversation.messages) for conversation in group]
                for index, group in enumerate(groups) if acts_here(index)}
        said = dict(itertools.chain.from_iterable(found.items() for found in distributed.exchanged("messages", said)))
        results, first = [], 0
        for part in parts:
            held = range(first, first + len(part))
            rows = [_recorded(part[record.prompt - first], record) for record in records if record.prompt in held]
            results.append((rows, [messages for index in held for messages in said[index]]))
            first += len(part)
        return [results[0], *results[2:], results[1]]


def balanced(tasks: Iterable[Task], count: int, seed: int) -> list[Task]:
    """At most `count` tasks, in turn from every kind of bug, so that no kind crowds out the others."""
    by_kind: dict[str, list[Task]] = collections.defaultdict(list)
    for task in sorted(tasks, key=lambda task: task.instance_id):
        by_kind[task.kind].append(task)
    rng = random.Random(seed)
    for group in by_kind.values():
        rng.shuffle(group)
    chosen: list[Task] = []
    queues = [by_kind[kind] for kind in sorted(by_kind)]
    while queues and len(chosen) < count:
        queues = [queue for queue in queues if queue]
        chosen += [queue.pop() for queue in queues][: count - len(chosen)]
    return chosen


def plain_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages as role and text: contents made of parts are joined."""
    plain = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        plain.append({"role": message["role"], "content": content})
    return plain


def _shown(rows: Sequence[Mapping[str, Any]], messages: Sequence[Any]) -> dict[str, Any]:
    """Conversations and patches by task."""
    names = [row["instance_id"] for row in rows]
    return {"messages": dict(zip(names, messages, strict=True)),
            "patches": {row["instance_id"]: row["patch"] for row in rows}}


def _recorded(prompt: Prompt, record: RolloutRecord) -> dict[str, Any]:
    broken = sum(turn.malformed for turn in record.turns)
    row = _row(prompt.task, record.outcome, len(record.turns), broken, prompt.template or prompt.task.kind)
    row |= {"failing": sum(turn.failing for turn in record.turns),
            "repeated": sum(turn.repeated for turn in record.turns),
            "redrawn": sum(turn.redrawn for turn in record.turns)}
    return row | ({"unseen": True} if prompt.unseen else {})


def _row(task: Task, outcome: Outcome, turns: int, malformed: int, kind: str) -> dict[str, Any]:
    """An episode as pipeline.experts.metrics reads it."""
    return {"instance_id": task.instance_id, "kind": kind, "solved": outcome.solved,
            "infrastructure": outcome.infrastructure, "turns": turns,
            "suspected_exploit": outcome.detail.get("outcome") == SUSPECTED_EXPLOIT, "malformed": malformed,
            "attempts": outcome.detail.get("attempts", 0), "runs": outcome.detail.get("runs", []),
            "reason": outcome.detail.get("reason", "unknown"), "guard": outcome.detail.get("guard", {}),
            "patch": outcome.detail.get("patch", "")} | (
                {"call": outcome.detail["call"]} if "call" in outcome.detail else {})
