"""Keys and values in blocks: who holds which, alone and by an engine whose slots are more than its blocks and lanes."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax import testing
from qcn_jax.errors import UserError
from qcn_jax.inference.blocks import Blocks
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.memory import Budget
from qcn_jax.inference.sampling import Sampling
from qcn_jax.testing.engine_events import Life

SIZE, COUNT, MOST = 4, 7, 24  # tokens of a block, blocks, tokens of a sequence


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 9)), max_size=40))
def test_every_sequence_finds_its_own_tokens(swaps, steps) -> None:
    """A device of plain lists beside the index: what a slot's table points to is what was written for it."""
    blocks, device, held = Blocks(COUNT, SIZE, swaps), [[None] * SIZE for _ in range(COUNT)], {}

    def write(slot: int, added: list) -> None:
        start = len(held[slot])
        moves = blocks.hold({slot: (start, start + len(added))})
        data = [(block, list(device[index])) for block, index in moves.out]
        for block, content in data:
            block.data = content
        for block in moves.into:
            device[block.index], block.data = list(block.data), None
        for source, target in moves.copies:
            device[target] = list(device[source])
        held[slot] = held[slot] + added
        table = blocks.table(slot, MOST // SIZE)
        for at in range(start, start + len(added)):
            device[table[at // SIZE]][at % SIZE] = held[slot][at]

    for number, (slot, kind, count) in enumerate(steps):
        if kind == 0:
            blocks.cut(slot, 0)
            held[slot] = []
        elif kind == 1 and slot in held:
            other = (slot + count) % 4
            if other != slot:
                blocks.share(slot, other)
                held[other] = list(held[slot])
        elif kind == 2 and slot in held:
            held[slot] = held[slot][: count * 2]
            blocks.cut(slot, len(held[slot]))
        elif slot in held and len(held[slot]) + count <= MOST:
            if slot in blocks.dropped:
                again, held[slot] = held[slot], []
                blocks.cut(slot, 0)
                write(slot, again)
            write(slot, [(number, at) for at in range(count)])
            table = blocks.table(slot, MOST // SIZE)
            assert [device[table[at // SIZE]][at % SIZE] for at in range(len(held[slot]))] == held[slot]
    for slot in held:
        blocks.cut(slot, 0)
    assert len(blocks.fitting({9: (0, COUNT * SIZE)}, 1)) == 1 and not blocks.fitting({9: (0, COUNT * SIZE + 1)}, 1)
    blocks.hold({9: (0, COUNT * SIZE)})  # nothing was lost
    assert sorted(blocks.table(9, COUNT)) == list(range(COUNT))


def test_a_budget_that_cannot_hold_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="num_blocks: 10, 5 of 16 tokens on each device; allowed: at least 14, for"):
        Budget.of(2, 4, 96, 16, 10)
    with pytest.raises(ValueError, match="block_size: 0"):
        Budget.of(1, 4, 96, 0, None)
    with pytest.raises(ValueError, match="preemption: 'lose', must be swap or recompute"):
        Budget.of(1, 4, 96, 16, None, "lose")
    assert Budget.of(1, 4, 96, None, None) == Budget(4, 96, 1, True)


def test_who_makes_room_does_not_depend_on_what_was_held_before() -> None:
    """A copy counts as just used, as what is prefilled does: otherwise a resumed run gives up others than the first did."""
    for before in ((), (0, 1, 2), (2, 1, 0)):
        blocks = Blocks(3, SIZE, swaps=False)
        for slot in before:
            blocks.hold({slot: (0, 1)})
        for slot in before:
            blocks.cut(slot, 0)
        blocks.hold({0: (0, SIZE)})
        blocks.hold({2: (0, SIZE)})
        blocks.share(0, 1)
        blocks.cut(0, 0)
        blocks.hold({3: (0, 2 * SIZE)})
        assert blocks.dropped == {2}, before


def test_nothing_is_dropped_for_nothing() -> None:
    """Who shares all blocks with others frees none of them; where all share, all who hold what is needed are dropped."""
    blocks = Blocks(3, SIZE, swaps=False)
    blocks.hold({0: (0, SIZE)})
    blocks.share(0, 1)
    blocks.hold({2: (0, SIZE)})
    blocks.hold({3: (0, 2 * SIZE)})
    assert blocks.dropped == {2} and blocks.counts["dropped"] == 1
    blocks.cut(2, 0)
    blocks.cut(3, SIZE)
    blocks.hold({4: (0, 2 * SIZE)}, beside=[3])
    assert blocks.dropped == {0, 1}


@pytest.fixture(scope="module", name="params")
def _params():
    return jax.device_put(jax.tree.map(lambda leaf: leaf * leaf.dtype.type(0.2), testing.random_params(testing.TINY)))


@pytest.mark.slow
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_nothing_is_wrong_after_hundreds_of_events(params, preemption) -> None:
    """Admissions, copies, turns, new weights, cancellations in a budget of three sequences for twelve slots."""
    engine = Engine(testing.TINY, params, slots=12, max_length=64, max_new_tokens=6, stop_ids=(7,), prefill_rows=4,
                    prefill_chunk=16, snapshots=3, with_routes=True, max_num_seqs=3, block_size=8, num_blocks=25,
                    preemption=preemption)
    life = Life(engine, testing.TINY, params, seed=0, check=0.2)
    for _ in range(300):
        life.step()
    counts, before = engine.counts(), len(jax.live_arrays())
    assert life.counted.checked > 30 and life.counted.worst < 1e-3
    assert counts["copied"] > 0 and counts["swapped_in" if preemption == "swap" else "recomputed_tokens"] > 100
    for _ in range(30):
        life.step()
    assert len(jax.live_arrays()) <= before + 1  # the weights of an update
    engine.reset(range(12))
    played = _played(engine)
    engine.clear()
    assert _played(engine) == played and any(played[1].values())  # bit for bit, as where a killed run goes on with an engine of its own


def _played(engine):
    """What samples of two prompts say in three turns, to the last bit, and what it cost."""
    before, made, slots = engine.counts(), [], (3, 4, 5, 8, 9, 10)
    engine.extend({4: list(range(100, 127))})
    engine.extend({5: list(range(40, 67))})
    engine.fork({4: [9, 3, 8]})
    for slot, length in ((6, 60), (7, 60), (10, 16)):  # the last of which has others make room
        engine.extend({slot: list(range(slot, slot + length))})
    for turn in range(3):
        turns = engine.generate(slots, seeds=slots, sampling=Sampling(1.0), max_new_tokens=4)
        made += [(one.tokens, np.asarray(one.logprobs).tobytes()) for one in turns]
        engine.extend({slot: [50 + turn] * (1 + slot % 4) for slot in slots})
    return made, {name: count - before[name] for name, count in engine.counts().items()}


@pytest.mark.slow
def test_many_short_conversations_and_a_long_one_share_a_budget(params) -> None:
    """Sixty-four of two blocks and one of thirty, where as many slots of the longest would take thirteen times as many."""
    few = {"max_num_seqs": 16, "block_size": 16, "num_blocks": 64 * 2 + 32}
    engine = Engine(testing.TINY, params, slots=65, max_length=512, max_new_tokens=4, prefill_rows=16,
                    prefill_chunk=64, **few)
    plain = Engine(testing.TINY, params, slots=2, max_length=512, max_new_tokens=4, prefill_rows=2, prefill_chunk=64)
    rng = np.random.default_rng(0)
    held = {slot: rng.integers(0, 320, 480 if slot == 40 else 10 + slot % 12).tolist() for slot in range(65)}
    engine.extend(held)
    made = engine.generate(range(65), seeds=range(65), sampling=Sampling(1.0))
    assert engine.counts()["swapped_out"] == 0 and 65 * 32 >= 13 * few["num_blocks"]
    for slot in (0, 40, 63):
        plain.reset([0])
        plain.extend({0: held[slot]})
        alone = plain.generate([0], seeds=[slot], sampling=Sampling(1.0))[0]
        assert made[slot].tokens == alone.tokens
        np.testing.assert_allclose(made[slot].logprobs, alone.logprobs, atol=1e-4)
