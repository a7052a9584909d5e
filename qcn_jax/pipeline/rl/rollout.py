"""Rollouts: a policy acts in many conversations at once, and everything that training needs is written down.

All conversations that are open take a turn together: the engine generates until most of them have ended theirs
(the others go on next time), then the environments answer, tool calls running side by side in worker processes,
then the answers go into the caches. A slow answer is not waited for: its conversation sits out.
The samples of one prompt share the prefill of their opening. Conversations beyond the engine's slots wait for
free ones. What a conversation samples depends on its own seed and tokens, so results do not depend on the
schedule. Of several hosts each acts on prompts of its own, with the same calls of the engine; in the end all have all
episodes. The order of it all is rl.orchestrator's.

Nothing here knows tasks or text: a conversation is anything that gives tokens and takes tokens
(pipeline.experts has those that are trained on).
"""

import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import GREEDY, Sampling
from qcn_jax.pipeline.rl.groups import Group
from qcn_jax.pipeline.rl.orchestrator import Orchestrator
from qcn_jax.pipeline.rl.plan import Plan, host_of
from qcn_jax.pipeline.rl.records import Conversation, RolloutRecord, Stop, never
from qcn_jax.sharding import distributed

THREADS = 128  # each only waits for a worker process; how many tools really run at once is the pool's choice


class Threads:
    """Environments in threads of this process, see rl.plan.Workers; a context that ends when all calls have."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="rollout")

    def submit(self, call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Begins a call in a thread."""
        return self._pool.submit(call)

    def wait(self, futures: Iterable[concurrent.futures.Future[Any]], seconds: float | None, everything: bool) -> None:
        """Returns when one of `futures`, or everything, is done, or so many seconds have passed."""
        when = concurrent.futures.ALL_COMPLETED if everything else concurrent.futures.FIRST_COMPLETED
        concurrent.futures.wait(list(futures), timeout=seconds, return_when=when)

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Returns when the calls under way have ended; others are not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def sampled(sampling: Sampling, greedy_turns: Sequence[int] = (), again: Sampling | None = None) -> dict[str, Any]:
    """Arguments `draw`, `greedy` and `again` of a rl.groups.Group.

    Args:
      sampling: how to draw tokens.
      greedy_turns, again: see `rollout`.
    """
    turns = tuple(greedy_turns) or (0,)
    greedy = lambda sample: turns[sample % len(turns)]
    draw = lambda sample, turn: GREEDY if turn < greedy(sample) else sampling
    return {"greedy": greedy, "draw": draw, "again": again}


def acts_here(prompt: int) -> bool:
    """Whether the conversations of a prompt, by its index, are held on this host."""
    host, hosts = distributed.place()
    return host_of(prompt, hosts) == host


def rollout(
    engine: Engine,
    groups: Sequence[Sequence[Conversation]],
    seeds: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling],
    greedy_turns: Sequence[int] = (),
    again: Sampling | None = None,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Stop = never,
) -> list[RolloutRecord]:
    """Runs every conversation to its end.

    Args:
      engine: whose slots are free; they are free again afterwards.
      groups: conversations by prompt; those of one prompt have the same opening.
      seeds: one for each conversation, in the same nesting.
      sampling: how to draw tokens, for all or for each prompt.
      greedy_turns: how many turns at their start the samples of a prompt take greedily, in turn; none by default.
        Such samples begin where the greedy policy would be, its first mistakes made, and go on by `sampling`.
      again: how turns are drawn that conversations do not take (Reply.again); None: as before, from another stream.
      max_new_tokens: of one turn (None: the engine's own limit).
      progress: called with (finished, all) conversations after every turn.
      stop: asked after every turn whether to give up.

    Returns:
      Records in the order of `groups`, samples in order within.

    Raises:
      Stopped: `stop` said so; tests under way have ended.
    """
    draws = [sampling] * len(groups) if isinstance(sampling, Sampling) else sampling
    given = [
        Group(len(group), group.__getitem__, streams.__getitem__, **sampled(draw, greedy_turns, again))
        for group, streams, draw in zip(groups, seeds, draws, strict=True)
    ]
    host, hosts = distributed.place()
    plan = Plan(len(given), max_new_tokens or engine.max_new_tokens, host=host, hosts=hosts)
    total = sum(group.size for number, group in enumerate(given) if acts_here(number))
    tell = None if progress is None else lambda done: progress(done, total)
    with Threads() as threads:
        acting = Orchestrator(engine, threads, given.__getitem__, plan, total=len(given))
        with contextlib.closing(acting):
            acting.begin(0)
            records = acting.collect(stop, tell)
    if progress is not None:
        progress(total, total)
    everywhere = itertools.chain.from_iterable(distributed.exchanged("episodes", records))
    return sorted(everywhere, key=lambda record: (record.prompt, record.sample))
