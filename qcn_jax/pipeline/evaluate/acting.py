"""A checkpoint's episodes on tasks, tokens to tokens on the engine, written down as an endpoint's (agents.running)."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence

from qcn_jax import hub
from qcn_jax.agents import records, running
from qcn_jax.agents.episode import EndReason
from qcn_jax.agents.records import Record
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.services import Services
from qcn_jax.chat.encoder import Encoder
from qcn_jax.chat.template_encoder import encoder_of
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MeshConfig, RolloutConfig
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.inference.checkpoint import load_to_act
from qcn_jax.inference.sampling import Sampling
from qcn_jax.pipeline.chat_template import fitted, stopping
from qcn_jax.pipeline.evaluate import settings
from qcn_jax.pipeline.experts.conversation import TaskConversation
from qcn_jax.pipeline.rl.episodes import make_engine
from qcn_jax.pipeline.rl.records import Outcome, Reply
from qcn_jax.pipeline.rl.rollout import rollout


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How tokens are drawn, and how many a turn and an episode may have.

    redraws, redraw_temperature: how often a turn that comes again to files on which tests failed is drawn once more.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    max_length: int = 1024
    redraws: int = 0
    redraw_temperature: float = 1.0


class Recorded(TaskConversation):
    """An episode that is graded and written down when it ends."""

    def __init__(self, task: Task, scaffold: Scaffold, encoder: Encoder, services: Services, attempt: int,
                 max_turns: int, redraws: int, write: Callable[["Recorded", Record], None]) -> None:
        super().__init__(task, scaffold, encoder, services, max_turns=max_turns, reward=None, redraws=redraws)
        self._attempt, self._write = attempt, write
        self._prompt = self._written = 0
        self._started = time.monotonic()

    def opening(self) -> list[int]:
        """As TaskConversation."""
        tokens = super().opening()
        self._prompt, self._started = len(tokens), time.monotonic()
        return tokens

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        """As TaskConversation."""
        self._written += len(tokens)
        return super().reply(tokens, stopped)

    def outcome(self, truncated: bool) -> Outcome:
        """Grades the patch and writes the episode down."""
        episode = self.episode
        if truncated:
            episode.end(EndReason.LENGTH_LIMIT)
        try:
            result = episode.result()
        finally:
            episode.executor.close()
        broken = result.reason is EndReason.INFRASTRUCTURE
        verdict = None if broken else self._services.grade(self._task, result.patch)
        record = Record(
            self._task.instance_id, self._attempt,
            records.INFRASTRUCTURE if verdict is None else records.outcome_of(verdict, result),
            result.reason.value, result.patch, result.turns, sum(result.malformed),
            round(time.monotonic() - self._started, 3), self._prompt, self._written,
            guard=dict(episode.guard.counts) if episode.guard else {}, verdict=verdict and verdict.to_json(),
            detail=verdict.detail if verdict else "the sandbox failed")
        self._write(self, record)
        return Outcome(0.0, record.resolved, result.reason is EndReason.SUBMITTED, not record.counts)


def speaking(checkpoint: str | os.PathLike[str], scaffold: Scaffold) -> tuple[Encoder, Scaffold]:
    """The encoder of a folder, and the scaffold as the folder's template writes it; reads no weights.

    Raises:
      UserError: the folder holds no checkpoint, or its template cannot play the scaffold.
    """
    hub.inspect(checkpoint)
    encoder = stopping(encoder_of(checkpoint, Tokenizer.from_folder(checkpoint)), checkpoint)
    return encoder, fitted(scaffold, encoder, "--scaffold")


def run(checkpoint: str | os.PathLike[str], mesh: MeshConfig | None, tasks: Sequence[Task], scaffold: Scaffold,
        services: Services, plan: running.Plan, drawing: Drawing, folder: running.Folder,
        progress: Callable[[Record], None], blocks: Mapping[str, int]) -> list[Record]:
    """Plays every attempt that `folder` lacks; see `agents.running.run`.

    Args:
      blocks: fields of RolloutConfig about lanes and blocks, where they are not its own.
    """
    missing = running.missing(tasks, plan, folder)
    if missing:
        model, params, parallel = load_to_act(checkpoint, mesh)
        if (stored := settings.read(checkpoint)) is not None:
            model = dataclasses.replace(model, dtype=stored.dtype, chunk_size=stored.chunk_size)
        limits = RolloutConfig(max_turns=plan.limits.turns, max_new_tokens=drawing.max_new_tokens,
                               max_length=drawing.max_length, slots=plan.parallel, **blocks)
        encoder, scaffold = speaking(checkpoint, scaffold)
        engine = make_engine(model, params, encoder, limits, parallel=parallel)

        def write(conversation: Recorded, record: Record) -> None:
            folder.add(record, conversation.episode, str(checkpoint))
            progress(record)

        make = functools.partial(Recorded, scaffold=scaffold, encoder=encoder, services=services,
                                 max_turns=plan.limits.turns, redraws=drawing.redraws, write=write)
        by_task: dict[str, list[tuple[Task, int]]] = {}
        for task, attempt in missing:
            by_task.setdefault(task.instance_id, []).append((task, attempt))
        groups = [[make(task, attempt=attempt) for task, attempt in one] for one in by_task.values()]
        seeds = [[running.attempt_seed(plan.seed, task, attempt) for task, attempt in one] for one in by_task.values()]
        drawn = lambda temperature: Sampling(temperature, drawing.top_p, drawing.top_k)
        rollout(engine, groups, seeds, sampling=drawn(drawing.temperature), again=drawn(drawing.redraw_temperature))
    return running.ordered(tasks, plan, folder)
