"""Rollouts of toy conversations with a real engine: schedules do not matter, records say what happened."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import GREEDY, Sampling
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl.records import Reply, sequence_seed
from qcn_jax.pipeline.rl.rollout import rollout
from tests.pipeline.micro import MODEL, STOP, Echo, micro_params

SLOTS, LENGTH = 4, 48


@pytest.fixture(scope="module")
def params():
    return micro_params()


@pytest.fixture(scope="module")
def engine(params):
    return Engine(
        MODEL, params, slots=SLOTS, max_length=LENGTH, max_new_tokens=6, stop_ids=(STOP,), prefill_rows=2,
        prefill_chunk=8,
    )  # fmt: skip


def make_groups() -> tuple[list[list[Echo]], list[list[int]]]:
    """Groups of one, six (more than there are slots), two and three samples, of one to three turns."""
    sizes = [1, 6, 2, 3]
    groups = [[Echo([3 + g] * (2 + 5 * g), 1 + (g + i) % 3) for i in range(n)] for g, n in enumerate(sizes)]
    return groups, [[sequence_seed(9, g, i) for i in range(n)] for g, n in enumerate(sizes)]


def test_records_equal_those_of_every_conversation_alone(engine) -> None:
    groups, seeds = make_groups()
    together = rollout(engine, groups, seeds, sampling=Sampling(1.0))
    assert [(r.prompt, r.sample) for r in together] == [(g, i) for g, n in enumerate([1, 6, 2, 3]) for i in range(n)]
    alone_groups, _ = make_groups()
    for record in together:
        conversation = alone_groups[record.prompt][record.sample]
        alone = rollout(engine, [[conversation]], [[seeds[record.prompt][record.sample]]], sampling=Sampling(1.0))[0]
        assert alone.tokens.tolist() == record.tokens.tolist() and alone.turns == record.turns
        np.testing.assert_allclose(alone.logprobs, record.logprobs, atol=1e-5)
        assert alone.outcome == record.outcome
    samples = {tuple(r.tokens.tolist()) for r in together if r.prompt == 1}
    assert len(samples) > 1


def test_records_hold_what_was_said_and_its_log_probability(engine, params) -> None:
    groups, seeds = make_groups()
    apply = jax.jit(Qwen3Next(MODEL).apply)
    for record in rollout(engine, groups, seeds, sampling=Sampling(1.0)):
        conversation = groups[record.prompt][record.sample]
        said, at = list(conversation.start), len(conversation.start)
        assert len(record.turns) == conversation.turns
        for number, (turn, tokens) in enumerate(zip(record.turns, conversation.taken), 1):
            assert (turn.start, turn.stop) == (at, at + len(tokens))
            assert turn.malformed == (tokens[0] % 2 == 1) and turn.stopped == (tokens[-1] == STOP)
            said += tokens + ([10 + number, 20 + len(tokens)] if number < conversation.turns else [])
            at = len(said)
        assert record.tokens.tolist() == said
        sampled = [i for turn in record.turns for i in range(turn.start, turn.stop)]
        assert np.flatnonzero(record.sampled).tolist() == sampled
        padded = jnp.asarray([said + [0] * (LENGTH - len(said))])
        segments = (jnp.arange(LENGTH) < len(said)).astype(jnp.int32)[None]
        scores = jax.nn.log_softmax(apply({"params": params}, padded, segment_ids=segments).logits[0])
        want = [float(scores[i - 1, said[i]]) if i in sampled else 0.0 for i in range(len(said))]
        np.testing.assert_allclose(record.logprobs, want, atol=1e-4)


def test_first_turns_taken_greedily_are_those_of_the_greedy_policy(engine) -> None:
    talk = lambda: [[Echo([3, 4], 3) for _ in range(3)]]
    greedy = rollout(engine, talk(), [[1, 2, 3]], sampling=GREEDY)[0]
    records = rollout(engine, talk(), [[1, 2, 3]], sampling=Sampling(2.0), greedy_turns=(0, 1, 2))
    free = rollout(engine, talk(), [[1, 2, 3]], sampling=Sampling(2.0))
    assert records[0].tokens.tolist() == free[0].tokens.tolist() != greedy.tokens.tolist()
    for record, count in zip(records, (0, 1, 2), strict=True):
        end = greedy.turns[count - 1].stop if count else 2
        assert record.tokens[:end].tolist() == greedy.tokens[:end].tolist()
        assert not record.sampled[:end].any() and record.sampled.sum() == sum(t.stop - t.start for t in record.turns[count:])
    assert records[2].tokens.tolist() != greedy.tokens.tolist()


def test_every_prompt_may_be_drawn_in_its_own_way(engine) -> None:
    talk = lambda: [[Echo([3, 4], 2) for _ in range(2)], [Echo([5], 3)], [Echo([3, 4], 2) for _ in range(3)]]
    seeds = [[1, 2], [3], [4, 5, 6]]
    draws = [Sampling(2.0), GREEDY, Sampling(0.5)]
    together = rollout(engine, talk(), seeds, sampling=draws)
    apart = [record for group, streams, sampling in zip(talk(), seeds, draws, strict=True)
             for record in rollout(engine, [group], [streams], sampling=sampling)]
    assert [record.tokens.tolist() for record in together] == [record.tokens.tolist() for record in apart]


def test_conversations_that_grow_too_long_are_unfinished(engine) -> None:
    endless = Echo([4] * 30, 1000)
    stuffed = Echo([4] * LENGTH, 1000)  # no room for a single token
    records = rollout(engine, [[endless], [stuffed]], [[1], [2]], sampling=Sampling(1.0))
    assert [r.outcome.finished for r in records] == [False, False]
    assert len(records[0].tokens) <= LENGTH and len(records[0].turns) >= 1
    assert records[1].turns == () and records[1].tokens.tolist() == [4] * LENGTH
    after = rollout(engine, [[Echo([5], 1)]], [[1]], sampling=Sampling(1.0))  # its slots are free again
    assert after[0].outcome.finished


def test_limit_of_new_tokens(engine) -> None:
    record = rollout(engine, [[Echo([4], 3)]], [[1]], sampling=Sampling(1.0), max_new_tokens=2)[0]
    assert all(turn.stop - turn.start <= 2 for turn in record.turns)


def test_errors_of_an_environment_come_through(engine) -> None:
    class Broken(Echo):
        def reply(self, tokens: list[int], stopped: bool) -> Reply:
            raise RuntimeError("sandbox is gone")

    with pytest.raises(RuntimeError, match="sandbox is gone"):
        rollout(engine, [[Broken([3], 1)]], [[1]], sampling=Sampling(1.0))


def test_progress_counts_to_the_end(engine) -> None:
    seen = []
    groups, seeds = make_groups()
    rollout(engine, groups, seeds, sampling=Sampling(1.0), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12) and seen == sorted(seen)


class Picky(Echo):
    """Takes no turn of which the first token is `refused`."""

    refused = -1

    def reply(self, tokens, stopped):
        return Reply(again=True) if tokens[0] == self.refused else super().reply(tokens, stopped)


def test_a_turn_that_is_not_taken_leaves_nothing_behind(engine) -> None:
    """The greedy policy says the refused token until it is drawn otherwise; what follows is as if it had never been said."""
    (greedy,) = rollout(engine, [[Echo([3, 4], 3)]], [[1]], sampling=GREEDY)
    talk, other = Picky([3, 4], 3), Picky([9], 3)
    talk.refused = int(greedy.tokens[greedy.turns[1].start])
    record, beside = rollout(engine, [[talk], [other]], [[1], [2]], sampling=GREEDY, again=Sampling(3.0))
    turn = record.turns[1]
    assert record.tokens[: turn.start].tolist() == greedy.tokens[: turn.start].tolist() and turn.redrawn >= 1
    assert talk.refused != record.tokens[turn.start] and record.turns[0].redrawn == 0
    # The turn behind it is greedy again, on what was said.
    spoken = record.tokens[: record.turns[2].start].tolist()
    (after,) = rollout(engine, [[Echo(spoken, 1)]], [[5]], sampling=GREEDY)
    assert record.turns[2].redrawn or after.tokens.tolist() == record.tokens.tolist()
    assert beside.tokens.tolist() == rollout(engine, [[Echo([9], 3)]], [[2]], sampling=GREEDY)[0].tokens.tolist()
