"""Prompts taken up where a slot holds their beginning: the index alone, and answers that nobody could tell from others."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.inference.engine import Engine
from qcn_jax.inference.prefixes import LEAST, Hit, Prefixes
from qcn_jax.inference.sampling import Sampling
from qcn_jax.inference.scheduler import Request, Scheduler
from tests.inference.test_engine import CONFIG, make_params, prompt


def test_the_next_turn_goes_where_its_conversation_is() -> None:
    index, first = Prefixes(3, 1, 2), list(range(100))
    slot, hit = index.find(first, range(3))
    assert (slot, hit) == (0, None)
    index.take(0, first, hit)
    assert index.save(0, 100) == 0 and index.save(0, 100) is None  # once is enough
    index.extended(0, first + [5, 6])
    assert index.find(first + [5, 6, 7], range(3)) == (0, Hit(0, 102, None))
    # Another answer to the same prompt spares the first, as long as there is room.
    assert index.find(first + [9], range(3)) == (1, Hit(0, 100, 0))
    assert index.find(first + [9], [0]) == (0, Hit(0, 100, 0))
    assert index.find([4] * 100, range(3)) == (1, None)


def test_where_prompts_part_a_state_is_saved_for_the_third() -> None:
    index, shared = Prefixes(4, 1, 8), list(range(200))
    ask = lambda number: shared + [1000 + number] * 80
    index.take(0, ask(0), None)
    index.save(0, 280)
    slot, hit = index.find(ask(1), [1, 2, 3])
    assert (slot, hit) == (1, Hit(-1, 0, None, 200))
    index.take(1, ask(1), hit)
    assert index.save(1, 200) is not None and index.save(1, 280) is not None
    slot, hit = index.find(ask(2), [2, 3])
    assert (slot, hit.source, hit.length, hit.parted) == (2, 1, 200, 0)
    assert index.find(shared[:LEAST - 1] + [7], [2, 3])[1] is None  # too little to be worth it


def test_entries_are_taken_from_whom_nobody_asked_for_longest() -> None:
    index = Prefixes(4, 1, 2)
    ask = lambda number: [number] * 100
    for slot in range(3):
        index.take(slot, ask(slot), None)
        index.save(slot, 100)
    assert index.find(ask(0) + [9], [3]) == (3, Hit(-1, 0, None, 100))  # its state is gone, its place is known
    assert index.find(ask(2) + [9], [3])[1].entry == 0
    index.take(2, [5], None)  # slot 2 is another's now
    assert index.find(ask(2) + [9], [3]) == (3, None) and index.save(3, 100) == 0


def test_parts_have_nothing_to_do_with_each_other() -> None:
    index = Prefixes(4, 2, 2)
    index.take(0, [1] * 100, None)
    index.save(0, 100)
    index.extended(0, [1] * 100 + [2])
    assert index.find([1] * 100 + [3], [2, 3]) == (2, None)
    assert index.find([1] * 100 + [3], [1, 2, 3]) == (1, Hit(0, 100, 0))


@pytest.fixture(scope="module")
def engine():
    return Engine(CONFIG, make_params(CONFIG), slots=4, max_length=192, max_new_tokens=8, stop_ids=(7,), prefill_rows=2,
                  prefill_chunk=32, snapshots=3)


def ask(scheduler: Scheduler, requests: list[tuple[list[int], int, int]]) -> list[list[int]]:
    """What the scheduler makes of (prompt, seed, tokens), all submitted at once."""
    ended, made = threading.Event(), [[] for _ in requests]
    left = [len(requests)]

    def emit(index):
        def take(piece):
            assert not (piece.finish or "").startswith("error"), piece.finish
            made[index] += piece.tokens
            if piece.finish is not None:
                left[0] -= 1
                if not left[0]:
                    ended.set()

        return take

    assert scheduler.submit([Request(tokens, Sampling(1.0), most, seed, emit(index))
                             for index, (tokens, seed, most) in enumerate(requests)])
    assert ended.wait(600)
    return made


def test_conversations_that_share_and_part_and_go_on_are_answered_as_alone(engine) -> None:
    """Turns, other answers to one prompt, cut histories, shared instructions, more conversations than slots."""
    reusing, rng, system = Scheduler(engine), np.random.default_rng(0), prompt(0, 80)
    talks = [system + prompt(number, 5 + number) for number in range(6)]
    events, answers = [], []
    for turn in range(3):
        requests = [(talk, turn, int(rng.integers(1, 9))) for talk in talks]
        made = ask(reusing, requests)
        events += requests
        answers += made
        talks = [talk + (one if number % 3 else one[:-1]) + prompt(100 * turn + number, 3 + turn)
                 for number, (talk, one) in enumerate(zip(talks, made))]
        if turn == 1:
            talks[0] = talks[0][:90] + prompt(77, 12)  # history was rewritten
    again = [(events[2][0], 5, 6)] * 3
    events, answers = events + again, answers + ask(reusing, again)
    assert reusing.reused > 300 and reusing.prefilled + reusing.reused == sum(len(tokens) for tokens, *_ in events)
    reusing.close()
    engine.clear()
    for number, (tokens, seed, most) in enumerate(events):  # each in an engine that knows of nothing
        engine.reset([number % 4])
        engine.extend({number % 4: tokens})
        alone = engine.generate([number % 4], seeds=[seed], sampling=Sampling(1.0), max_new_tokens=most)[0]
        assert answers[number] == alone.tokens, number


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 130), st.booleans()), max_size=30))
def test_what_the_index_promises_is_there(steps) -> None:
    """A plain model of slots and pools beside it: every hit's tokens, and its state's, are the prompt's beginning."""
    index, slots, pool, active = Prefixes(4, 2, 2), {}, {}, set()
    for talk, cut, length, ends in steps:
        tokens = [talk % 2] * 70 + [talk] * cut * 30 + [9] * length
        if len(active) == 4 or (ends and active):
            slot = min(active)
            active.discard(slot)
            slots[slot] = slots[slot] + [3, 3]
            index.extended(slot, slots[slot])
            continue
        slot, hit = index.find(tokens, set(range(4)) - active)
        if hit is not None and hit.length:
            assert slots[hit.source][: hit.length] == tokens[: hit.length] and index.part(hit.source) == index.part(slot)
            if hit.entry is None:
                assert hit.source == slot and len(slots[slot]) == hit.length
            else:
                assert pool[index.part(slot), hit.entry] == tokens[: hit.length]
        index.take(slot, tokens, hit)
        slots[slot] = tokens
        active.add(slot)
        for length in ([hit.parted] if hit is not None and hit.parted else []) + [len(tokens)]:
            entry = index.save(slot, length)
            if entry is not None:
                pool[index.part(slot), entry] = tokens[:length]
