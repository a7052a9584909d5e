"""The engine against one teacher-forced pass of the same model over the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.inference import engine as engine_module
from qcn_jax.inference import shapes
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import History, Sampling
from qcn_jax.model import Qwen3Next
from tests.inference.test_sampling import reference_adjusted

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, full_attention_interval=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=256, linear_num_key_heads=2, linear_key_head_dim=8, linear_num_value_heads=4,
    linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, initializer_range=0.3, dtype="float32", chunk_size=8,
)  # fmt: skip
SLOTS, LENGTH, NEW = 6, 96, 12
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    return make_params(CONFIG)


def make_params(config: ModelConfig):
    return jax.jit(Qwen3Next(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="module")
def shared(params):
    """Attention reads 48 or all 96 of the cached tokens, so that tests pass through several limits."""
    limit = pytest.MonkeyPatch()
    limit.setattr(engine_module, "FIRST_KEY_LIMIT", 48)
    yield make_engine(params)
    limit.undo()


def make_engine(params) -> Engine:
    return Engine(
        CONFIG, params, slots=SLOTS, max_length=LENGTH, max_new_tokens=NEW, stop_ids=(7,), prefill_rows=2,
        prefill_chunk=16, snapshots=3, with_routes=True,
    )  # fmt: skip


@pytest.fixture
def engine(shared, params):
    """The module's engine, emptied; compiling another for every test would cost most of the suite's time."""
    shared.params = params
    shared.reset(range(SLOTS))
    return shared


@pytest.fixture(scope="module")
def logits_of(params):
    """Teacher-forced logits [T, V] of a token list in one pass without a cache."""
    apply = jax.jit(Qwen3Next(CONFIG).apply)

    def run(tokens, params=params):
        padded = jnp.asarray([tokens + [0] * (LENGTH - len(tokens))])
        segments = (jnp.arange(LENGTH) < len(tokens)).astype(jnp.int32)[None]
        return np.asarray(apply({"params": params}, padded, segment_ids=segments).logits[0, : len(tokens)])

    return run


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(8, 61, length).tolist()


def test_a_cleared_engine_begins_anew(engine) -> None:
    def run():
        engine.extend({2: prompt(5, 20)})
        return engine.generate([2], seeds=[3], sampling=Sampling(1.0))[0].tokens

    first = run()
    for leaf in jax.tree.leaves(engine._memory.cache):  # as a call that failed may leave them
        leaf.delete()
    engine.clear()
    assert engine.length(2) == 0 and run() == first


def test_routes_are_those_of_one_pass_over_everything(engine, params) -> None:
    """Of prompts, observations and sampled tokens, through copies and states that were put back."""
    apply = jax.jit(lambda tokens: Qwen3Next(CONFIG).apply({"params": params}, tokens, with_routes=True).routes)
    held = {0: prompt(3, 21), 4: prompt(5, 9)}
    engine.extend(held)
    engine.save({0: 1})
    engine.fork({0: [1], 4: [5]})
    more = engine.generate([0, 1, 4], seeds=[1, 2, 3], sampling=Sampling(1.0), max_new_tokens=6)
    held = {slot: held.get(slot, held[0]) + one.tokens for slot, one in zip((0, 1, 4), more)} | {5: held[4]}
    engine.restore({0: 1})
    held[0] = held[0][:21]
    for slot, length in ((0, 18), (1, 3)):
        engine.extend({slot: prompt(slot, length)})
        held[slot] = held[slot] + prompt(slot, length)
    for slot, tokens in held.items():
        padded = jnp.asarray([tokens + [0] * (LENGTH - len(tokens))])
        want = np.moveaxis(np.asarray(apply(padded))[:, 0, : len(tokens)], 0, 1)
        found = engine.routes(slot)
        assert found.shape == want.shape == (len(tokens), CONFIG.num_hidden_layers, CONFIG.num_experts_per_tok)
        same = (np.sort(found, -1) == np.sort(want, -1)).all((1, 2))
        assert same.mean() > 0.9  # two orders of summation may disagree where two experts are as good as each other
    engine.reset([0])
    assert engine.routes(0).shape[0] == 0


def check(logits_of, before: list[int], generation, greedy: bool = True, **kwargs) -> None:
    """The generated tokens are what one pass over everything says."""
    logits = logits_of(before + generation.tokens, **kwargs)[len(before) - 1 : -1]
    scores = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    chosen = scores[np.arange(len(generation.tokens)), generation.tokens]
    np.testing.assert_allclose(generation.logprobs, chosen, atol=2e-4)
    if greedy:
        assert generation.tokens == logits.argmax(-1).tolist()


def test_greedy_is_the_teacher_forced_argmax_for_prompts_of_all_lengths(engine, logits_of) -> None:
    prompts = {slot: prompt(slot, length) for slot, length in enumerate([1, 15, 16, 17, 50, 33])}
    engine.extend(prompts)
    results = engine.generate(range(SLOTS), seeds=[0] * SLOTS, sampling=GREEDY)
    for slot, generation in enumerate(results):
        check(logits_of, prompts[slot], generation)
        assert engine.length(slot) == len(prompts[slot]) + len(generation.tokens)
        stopped = generation.tokens[-1] == 7
        assert generation.finish == ("stop" if stopped else "length") and 7 not in generation.tokens[:-1]
        assert stopped or len(generation.tokens) == NEW


def test_slot_mates_and_slot_number_do_not_matter(engine) -> None:
    mine = prompt(1, 20)
    engine.extend({2: mine})
    greedy = engine.generate([2], seeds=[5], sampling=GREEDY)[0]
    engine.reset([2])
    engine.extend({2: mine})
    drawn = engine.generate([2], seeds=[5], sampling=Sampling(1.0))[0]
    engine.reset(range(SLOTS))
    engine.extend({slot: prompt(slot + 50, 3 * slot + 1) for slot in range(4)} | {4: mine, 5: mine})
    results = engine.generate([5, 0, 4, 3], seeds=[5, 1, 5, 9], sampling=[Sampling(1.0)] * 2 + [GREEDY] * 2)
    assert results[0].tokens == drawn.tokens and results[2].tokens == greedy.tokens
    np.testing.assert_allclose(results[0].logprobs, drawn.logprobs, atol=1e-5)


def test_penalties_biases_and_alternatives_are_those_of_a_plain_loop(engine, logits_of) -> None:
    mine, other = prompt(1, 20), prompt(4, 9)
    draw = Sampling(0.0, 1.0, 0, 0.0, 0.7, 0.4, 1.3, ((mine[0], 1.5), (12, -100.0)), alternatives=3)
    engine.extend({1: mine, 4: other})
    plain = engine.generate([4], seeds=[0], sampling=GREEDY, max_new_tokens=8)[0]
    engine.reset([4])
    engine.extend({4: other})
    made, beside = [], []
    for count in (5, 3):  # the second piece knows of the first
        histories = [History(mine, made), History(other, plain.tokens[: len(made)])]
        one, two = engine.generate([1, 4], seeds=[0, 0], sampling=[draw, GREEDY], max_new_tokens=count, histories=histories)
        made, beside = made + one.tokens, beside + one.alternatives
        assert two.tokens == plain.tokens[len(made) - len(one.tokens) :][: len(two.tokens)] and two.alternatives == []
        check(logits_of, mine + made[: -len(one.tokens)], one, greedy=False)
    logits = logits_of(mine + made)[len(mine) - 1 : -1]
    for at, token in enumerate(made):
        want = reference_adjusted(logits[at], draw, set(mine), made[:at])
        assert want[token] >= want.max() - 1e-3 and token != 12
        scores = logits[at] - np.log(np.exp(logits[at].astype(np.float64)).sum())
        best = np.argsort(-scores)[:3]
        np.testing.assert_allclose([value for _, value in beside[at]], scores[best], atol=2e-4)
        assert {id_ for id_, _ in beside[at]} == set(best.tolist()) or np.diff(np.sort(-scores)[:4]).min() < 1e-3
    assert len(set(made)) > 4  # they were kept from repeating themselves
    with pytest.raises(ValueError, match="histories: none, where sampling has penalties"):
        engine.generate([1], seeds=[0], sampling=draw)


def test_prefill_in_several_shapes_is_the_same_and_wastes_less(params, logits_of) -> None:
    calls = []
    engine = Engine(CONFIG, params, slots=SLOTS, max_length=LENGTH, max_new_tokens=NEW, stop_ids=(7,), prefill_rows=4,
                    prefill_chunk=16, several_shapes=True)
    run = engine.programs.run
    engine.programs.run = lambda name, *given, **more: calls.append(more.get("shape")) or run(name, *given, **more)
    held = {slot: prompt(slot, length) for slot, length in enumerate([30, 17, 16, 3, 20])}
    engine.extend(held)
    engine.extend({2: prompt(9, 3)})
    held[2] = held[2] + prompt(9, 3)
    assert set(calls) == {(4, 16), (1, 16), (4, 4), (1, 4)} & set(calls) and len(set(calls)) > 1
    assert sum(rows * chunk for rows, chunk in calls) < 1.6 * sum(map(len, held.values()))
    for slot, generation in enumerate(engine.generate(range(5), seeds=[0] * 5, sampling=GREEDY, max_new_tokens=3)):
        check(logits_of, held[slot], generation)


def test_the_shape_is_what_takes_in_most_for_its_cost() -> None:
    rows, chunks = (16, 4, 1), (64, 16)
    assert shapes.best([[64] * 16], rows, chunks) == (16, 64)
    assert shapes.best([[300]], rows, chunks) == (1, 64)
    assert shapes.best([[200, 180, 170, 90]], rows, chunks) == (4, 64)
    assert shapes.best([[9]], rows, chunks) == (1, 16)
    assert shapes.best([[300], []], rows, chunks) == (1, 64)  # of two parts one has nothing to do
    assert shapes.palette(64, True) == (64, 16) and shapes.palette(1, True) == shapes.palette(1, False) == (1,)
    assert shapes.lanes(96, True, in_proportion=True) == (96, 48, 24, 12, 1) and shapes.lanes(16, True, False) == (16, 4, 1)
    assert shapes.lanes(2, True, True) == (2, 1) and shapes.lanes(96, False, True) == (96,)


def test_turns_continue_as_one_pass(engine, logits_of) -> None:
    """Several turns of both kinds of slots, one of them paused for a turn, equal one pass over all tokens."""
    history = {0: prompt(2, 10), 3: prompt(3, 21)}
    engine.extend(history)
    for turn in range(3):
        slots = [0, 3] if turn != 1 else [3]
        for slot, generation in zip(slots, engine.generate(slots, seeds=slots, sampling=GREEDY, max_new_tokens=5)):
            check(logits_of, history[slot], generation)
            history[slot] = history[slot] + generation.tokens
        observation = {slot: prompt(10 * turn + slot, 4 + turn) for slot in slots}
        engine.extend(observation)
        history = {slot: tokens + observation.get(slot, []) for slot, tokens in history.items()}
    assert engine.length(0) == len(history[0]) and engine.length(3) == len(history[3])


def test_a_slot_cut_back_to_a_saved_state_goes_on_as_if_nothing_had_come_behind(engine, logits_of) -> None:
    begins = {slot: prompt(20 + slot, 17 + slot) for slot in range(4)}
    engine.extend(begins)
    engine.save({0: 2, 1: 0, 3: 1})
    engine.generate(range(4), seeds=range(4), sampling=Sampling(1.0))
    engine.extend({0: prompt(9, 30), 3: prompt(8, 3)})
    engine.fork({1: [4, 5]})
    engine.restore({0: 2, 4: 0, 3: 1, 1: 0})  # in the slot itself, and in a copy
    assert [engine.length(slot) for slot in (0, 1, 3, 4)] == [17, 18, 20, 18]
    results = engine.generate([0, 1, 3, 4], seeds=[0] * 4, sampling=GREEDY, max_new_tokens=5)
    for slot, origin, generation in zip((0, 1, 3, 4), (0, 1, 3, 1), results, strict=True):
        check(logits_of, begins[origin], generation)
    engine.restore({0: 2})
    engine.extend({0: prompt(7, 20)})  # other tokens over what had been there
    check(logits_of, begins[0] + prompt(7, 20), engine.generate([0], seeds=[0], sampling=GREEDY)[0])
    for wrong, line in (({0: 3}, "entry 3: there are 3"), ({9: 0}, "slot 9"), ({2: 2, 5: 2}, "named twice")):
        with pytest.raises(ValueError, match=line):
            engine.save(wrong)
    engine.reset([2])
    with pytest.raises(ValueError, match="slot 2 holds 0 tokens; entry 2 is of 17"):
        engine.restore({2: 2})
    with pytest.raises(ValueError, match="save needs slots that hold tokens"):
        engine.save({2: 0})


def test_fork_equals_own_prefill(engine) -> None:
    shared_prompt = prompt(4, 37)
    engine.extend({0: shared_prompt, 1: prompt(5, 9)})
    engine.fork({0: [2, 3, 4]})
    seeds = [11, 12, 13, 14]
    forked = engine.generate([0, 2, 3, 4], seeds=seeds)
    engine.reset(range(SLOTS))
    engine.extend({slot: shared_prompt for slot in range(4)})
    own = engine.generate(range(4), seeds=seeds)
    assert [g.tokens for g in forked] == [g.tokens for g in own]
    assert len({tuple(g.tokens) for g in forked}) > 1  # seeds make the samples of a group differ


def test_sampling_is_reproducible_and_logprobs_are_the_policys(engine, logits_of) -> None:
    runs = []
    for _ in range(2):
        engine.reset(range(SLOTS))
        engine.extend({slot: prompt(6, 12) for slot in range(SLOTS)})
        runs.append(engine.generate(range(SLOTS), seeds=range(100, 106), sampling=Sampling(0.7, top_p=0.9, top_k=20)))
    assert [g.tokens for g in runs[0]] == [g.tokens for g in runs[1]]
    for generation in runs[0]:
        check(logits_of, prompt(6, 12), generation, greedy=False)
        tempered = logits_of(prompt(6, 12) + generation.tokens)[11:-1].astype(np.float64) / 0.7
        scores = tempered - np.log(np.exp(tempered).sum(-1, keepdims=True))
        chosen = scores[np.arange(len(generation.tokens)), generation.tokens]
        np.testing.assert_allclose(generation.drawn_logprobs, chosen, atol=3e-4)


def test_new_weights_act_at_once_without_compiling(engine, params, logits_of) -> None:
    engine.extend({0: prompt(7, 18)})
    engine.generate([0], seeds=[0], sampling=GREEDY)
    compiled = engine.compilations()
    changed = jax.tree.map(lambda x: x * 1.3, params)
    engine.params = changed
    engine.reset([0])
    engine.extend({0: prompt(7, 18)})
    generation = engine.generate([0], seeds=[0], sampling=GREEDY)[0]
    check(logits_of, prompt(7, 18), generation, params=changed)
    assert engine.compilations() == compiled


def test_limits(engine) -> None:
    engine.extend({0: prompt(8, LENGTH - 3), 1: prompt(9, 5)})
    full, short = engine.generate([0, 1], seeds=[0, 0], max_new_tokens=[10, 2])
    assert len(full.tokens) <= 3 and len(short.tokens) <= 2
    with pytest.raises(ValueError, match="slot 0"):
        engine.extend({0: prompt(1, LENGTH)})
    with pytest.raises(ValueError, match="prompt"):
        engine.generate([5], seeds=[0])


def test_what_is_no_slot_or_no_size_is_refused_and_changes_nothing(engine, params) -> None:
    engine.extend({0: prompt(1, 3)})
    for call, line in (
        (lambda: engine.extend({-1: [9]}), "slot -1: there are slots 0 to 5"),
        (lambda: engine.extend({0: [9], 6: [9]}), "slot 6"),
        (lambda: engine.extend({0: [9], 1: [9] * (LENGTH + 1)}), "slot 1 holds 0 tokens"),
        (lambda: engine.reset([0, 0]), "slot 0 is named twice"),
        (lambda: engine.fork({0: [1, 1]}), "slot 1 is named twice"),
        (lambda: engine.fork({0: [-2]}), "slot -2"),
        (lambda: engine.generate([0, 0], seeds=[1, 2]), "slot 0 is named twice"),
        (lambda: engine.generate([0], seeds=[1], enough=1), "enough: 1"),
        (lambda: engine.generate([1], seeds=[1]), "hold a prompt"),
        (lambda: Engine(CONFIG, params, slots=0, max_length=8), "slots: 0"),
        (lambda: Engine(CONFIG, params, slots=1, max_length=8, prefill_chunk=0), "prefill_chunk: 0"),
    ):
        with pytest.raises(ValueError, match=line):
            call()
    assert [engine.length(slot) for slot in range(SLOTS)] == [3, 0, 0, 0, 0, 0]


def test_a_slot_forgets_a_nan(engine, params, logits_of) -> None:
    engine.params = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    engine.extend({1: prompt(3, 40)})
    with pytest.raises(UserError, match="not finite"):
        engine.generate([1], seeds=[0], sampling=GREEDY)
    engine.params = params
    engine.reset([1])
    mine = prompt(4, 9)
    engine.extend({1: mine})
    check(logits_of, mine, engine.generate([1], seeds=[0], sampling=GREEDY)[0])


def test_scanned_layers_and_tied_embeddings() -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    params = make_params(config)
    engine = Engine(
        config, params, slots=2, max_length=32, max_new_tokens=4, prefill_rows=2, prefill_chunk=8, unrolled=False
    )
    engine.extend({0: prompt(1, 11)})
    generation = engine.generate([0], seeds=[0], sampling=GREEDY)[0]
    whole = jnp.asarray([prompt(1, 11) + generation.tokens])
    logits = np.asarray(jax.jit(Qwen3Next(config).apply)({"params": params}, whole).logits[0])
    assert generation.tokens == logits[10:-1].argmax(-1).tolist()


def test_kernels_continue_from_caches_as_the_plain_forms_do(params, logits_of) -> None:
    """Prefill in pieces of different lengths, fork, and decoding, by the TPU kernels in interpretation."""
    config = dataclasses.replace(CONFIG, attention="splash", delta_rule="pallas", chunk_size=16)
    engine = Engine(config, params, slots=3, max_length=LENGTH, max_new_tokens=4, prefill_rows=2, prefill_chunk=24)
    prompts = {0: prompt(1, 41), 1: prompt(2, 5)}
    engine.extend(prompts)
    engine.fork({0: [2]})
    found = engine.generate([0, 1, 2], seeds=[0, 1, 2], sampling=GREEDY)
    for slot, generation in zip((0, 1, 0), found, strict=True):
        tokens = prompts[slot] + generation.tokens
        logits = logits_of(tokens)[len(prompts[slot]) - 1 : -1]
        assert generation.tokens == logits.argmax(-1).tolist()
        expected = logits.max(-1) - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) - logits.max(-1)
        np.testing.assert_allclose(generation.logprobs, expected, atol=1e-4)


def test_pausing_for_stragglers_changes_nothing(engine) -> None:
    lengths, limits = [5, 30, 12, 8], [2, 12, 3, 9]
    engine.extend({slot: prompt(slot, length) for slot, length in enumerate(lengths)})
    whole = engine.generate(range(4), seeds=range(4), max_new_tokens=limits)
    engine.reset(range(4))
    engine.extend({slot: prompt(slot, length) for slot, length in enumerate(lengths)})
    first = engine.generate(range(4), seeds=range(4), max_new_tokens=limits, enough=2)
    paused = [slot for slot in range(4) if first[slot].finish == "paused"]
    assert 1 <= len(paused) <= 2 and all(len(first[s].tokens) < len(whole[s].tokens) for s in paused)
    rest = engine.generate(
        paused, seeds=paused, max_new_tokens=[limits[s] - len(first[s].tokens) for s in paused]
    )
    joined = {slot: generation.tokens for slot, generation in enumerate(first)}
    for slot, generation in zip(paused, rest):
        joined[slot] = joined[slot] + generation.tokens
        assert generation.finish == whole[slot].finish
    assert joined == {slot: generation.tokens for slot, generation in enumerate(whole)}
