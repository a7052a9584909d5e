"""Episodes of many tasks, several attempts each, side by side.

Every one is written down as it ends, so that a killed run goes on where it stopped.

  FOLDER/settings.json                    what the episodes depend on; a run with others is refused
  FOLDER/episodes.jsonl                   records, by ID/ATTEMPT
  FOLDER/trajectories/ID/ATTEMPT.traj.json  what was said, in mini-swe-agent's form
  FOLDER/trajectories/ID/ATTEMPT.verified.json  the same to learn from (agents.trajectory), of clean ones that resolve
"""

import concurrent.futures
import dataclasses
import pathlib
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.agents import records
from qcn_jax.agents.acting import Limits, Model, Script, Stopped, Usage, play
from qcn_jax.agents.episode import EndReason, Episode
from qcn_jax.agents.records import Record
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.services import Services
from qcn_jax.agents.trajectory import of_episode
from qcn_jax.agents.trajectory_files import mini_swe_agent
from qcn_jax.chat.endpoint import ContextExceeded, EndpointError, EndpointFailed
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError
from qcn_jax.journal import Rows

TRIES = 3  # of an episode whose sandbox failed
PAUSE = 0.5  # seconds before the second, four times as long before the next
FAILURES = 8  # episodes in a row at which an endpoint failed, after which nobody asks it any more


@dataclasses.dataclass(frozen=True)
class Plan:
    """How tasks are played.

    Attributes:
      attempts: episodes for each task.
      seed: of the attempts' seeds.
      limits: of an episode.
      parallel: episodes side by side.
    """

    attempts: int = 1
    seed: int = 0
    limits: Limits = Limits()
    parallel: int = 8


class Folder:
    """Where the records and trajectories of a run stand.

    Args:
      path: made if missing.
      settings: JSON-ready values by the flag that gives them, on which the episodes depend.

    Raises:
      UserError: the folder holds episodes of other settings, or cannot be written.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._rows, self._lock = remember(path, "episodes.jsonl", settings, f"--out={path}"), threading.Lock()

    def records(self) -> dict[str, Record]:
        """What is known, by key."""
        return {key: Record.from_json(row) for key, row in self._rows.known.items()}

    def add(self, record: Record, episode: Episode | None, model: str) -> None:
        """Writes an episode down; safe for threads."""
        if episode is not None:
            files.write_json(self.trajectory(record), mini_swe_agent(episode, record, model))
            if record.clean:
                files.write_json(self.trajectory(record, "verified"), of_episode(episode, record.patch).to_json())
        with self._lock:
            self._rows.add(record.key, record.to_json())

    def trajectory(self, record: Record, kind: str = "traj") -> pathlib.Path:
        """Where the conversation of an episode stands; kind traj or verified."""
        return self.path / "trajectories" / record.instance_id / f"{record.attempt}.{kind}.json"

    def close(self) -> None:
        """Closes the journal."""
        self._rows.close()


def remember(path: pathlib.Path, name: str, settings: Mapping[str, Any], given: str) -> Rows:
    """Opens a journal in a folder whose contents depend on `settings`, JSON-ready values by the flag that gives them.

    Raises:
      UserError: it holds rows that were made with others, or cannot be written; the line begins with `given`, the flag
        that names the folder.
    """
    known = path / "settings.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{given}: cannot be written: {error.strerror}") from error
    before = files.read_object(known) if known.exists() else settings
    rows = Rows(path / name, durable=True)
    for flag in sorted({*before, *settings}) if rows.known else ():  # a command that came to nothing may be corrected
        if before.get(flag) != settings.get(flag):
            rows.close()
            raise UserError(f"{given}: holds what was made with --{flag}={before.get(flag)}, and now it is "
                            f"{settings.get(flag)}; name another, or give the same")
    files.write_json(known, dict(settings))
    return rows


def run(tasks: Sequence[Task], scaffold: Scaffold, services: Services, model: Model | Script, name: str, plan: Plan,
        folder: Folder, progress: Callable[[Record], None] = lambda record: None) -> list[Record]:
    """Plays every attempt that `folder` does not know, or knows as failed by the infrastructure.

    Args:
      tasks: to be played.
      scaffold: how they are presented.
      services: sandboxes.
      model: who plays.
      name: of the model, in trajectories.
      plan: attempts and limits.
      folder: where they are written down.
      progress: told of each episode that is over.

    Returns:
      Records of all attempts, by task and attempt.

    Raises:
      UserError: the endpoint refuses everything, or failed FAILURES times in a row; what ended before is kept.
    """
    player = _Player(scaffold, services, model, name, plan, folder)
    threads = concurrent.futures.ThreadPoolExecutor(plan.parallel, thread_name_prefix="episode")
    try:
        futures = [threads.submit(player.play, *one) for one in missing(tasks, plan, folder)]
        for future in concurrent.futures.as_completed(futures):
            progress(future.result())
    except BaseException:
        player.stop()
        raise
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
    return ordered(tasks, plan, folder)


def missing(tasks: Sequence[Task], plan: Plan, folder: Folder) -> list[tuple[Task, int]]:
    """(task, attempt) of what is to be played, first attempts first."""
    known = folder.records()
    return [(task, attempt) for attempt in range(plan.attempts) for task in tasks
            if (key := f"{task.instance_id}/{attempt}") not in known or not known[key].counts]


def ordered(tasks: Sequence[Task], plan: Plan, folder: Folder) -> list[Record]:
    """What `folder` knows of the attempts of a plan, by task and attempt."""
    known = folder.records()
    keys = (f"{task.instance_id}/{attempt}" for task in tasks for attempt in range(plan.attempts))
    return [known[key] for key in keys if key in known]


def attempt_seed(seed: int, task: Task, attempt: int) -> int:
    """The seed of one attempt, of 31 bits, whatever other tasks there are."""
    return zlib.crc32(f"{seed} {task.instance_id} {attempt}".encode()) & 0x7FFFFFFF


class _Player:
    """Plays episodes in several threads."""

    def __init__(self, scaffold: Scaffold, services: Services, model: Model | Script, name: str, plan: Plan,
                 folder: Folder) -> None:
        self._scaffold, self._services, self._model, self._name = scaffold, services, model, name
        self._plan, self._folder = plan, folder
        self._stopping = threading.Event()
        self._answered, self._failed, self._lock = False, 0, threading.Lock()

    def stop(self) -> None:
        """Has every thread give up soon: requests under way end."""
        self._stopping.set()
        close = getattr(self._model, "close", None)
        if close is not None:
            close()

    def play(self, task: Task, attempt: int) -> Record:
        """One episode, graded and written down."""
        record, episode = Record(task.instance_id, attempt, records.INFRASTRUCTURE), None
        for number in range(TRIES):
            if self._stopping.is_set():
                raise Stopped
            record, episode = self._try(task, attempt)
            if record.counts or record.reason != EndReason.INFRASTRUCTURE:
                break
            self._stopping.wait(PAUSE * 4**number)
        self._folder.add(record, episode, self._name)
        return record

    def _try(self, task: Task, attempt: int) -> tuple[Record, Episode | None]:
        started, episode, usage = time.monotonic(), None, Usage()
        blank = Record(task.instance_id, attempt, records.INFRASTRUCTURE)
        try:
            episode = self._services.episode(task, self._scaffold, self._plan.limits.turns)
            seed = attempt_seed(self._plan.seed, task, attempt)
            try:
                usage = play(episode, self._model, self._plan.limits, seed, self._stopping.is_set)
            except ContextExceeded:
                if not self._answered:
                    raise  # perhaps no task fits, because of how the endpoint was asked
                episode.end(EndReason.LENGTH_LIMIT)
            self._note(None)
            return self._graded(blank, episode, usage, time.monotonic() - started), episode
        except EndpointError as error:
            self._note(error)
            return dataclasses.replace(blank, detail=str(error), reason="endpoint",
                                       turns=len(episode.turns) if episode else 0), episode
        except SandboxError as error:
            return dataclasses.replace(blank, detail=str(error), reason=EndReason.INFRASTRUCTURE.value), episode
        except UserError as error:  # the task itself cannot be used
            return dataclasses.replace(blank, detail=str(error), reason="task"), episode
        finally:
            if episode is not None:
                episode.executor.close()

    def _note(self, error: EndpointError | None) -> None:
        """Counts how the endpoint behaves; raises where going on has no sense."""
        with self._lock:
            if error is None:
                self._answered, self._failed = True, 0
                return
            if self._stopping.is_set():
                raise Stopped
            if error.everywhere or not (self._answered or isinstance(error, EndpointFailed)):
                raise error
            self._failed += isinstance(error, EndpointFailed)
            if self._failed >= FAILURES:
                raise EndpointFailed(f"{error}; {FAILURES} episodes in a row failed so; what ended before is kept, and "
                                     "the same command goes on from there", everywhere=True)

    def _graded(self, blank: Record, episode: Episode, usage: Usage, seconds: float) -> Record:
        result = episode.result()
        facts: dict[str, Any] = dict(
            reason=result.reason.value, patch=result.patch, turns=result.turns, malformed=sum(result.malformed),
            seconds=round(seconds, 3), prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
            retries=usage.retries, guard=dict(episode.guard.counts) if episode.guard else {})
        if result.reason is EndReason.INFRASTRUCTURE:
            return dataclasses.replace(blank, **facts, detail="the sandbox failed")
        verdict: Verdict = self._services.grade(episode.task, result.patch)
        return dataclasses.replace(blank, **facts, outcome=records.outcome_of(verdict, result),
                                   verdict=verdict.to_json(), detail=verdict.detail)
