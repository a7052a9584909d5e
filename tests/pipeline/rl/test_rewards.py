"""Domains and rewards: episodes played by hand on a real repository in real sandboxes, judged by its tests."""

import concurrent.futures
import dataclasses
import threading
import time

import numpy as np
import pytest

from qcn_jax.config import ExpertsConfig
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.recipes.nano.spans import MAX_LINE_TOKENS, line_token
from qcn_jax.chat import templates
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.pipeline.rl import rewards
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.pipeline.experts.domains import Once, Prompt, Services, TaskConversation, make_prompts, provider_services
from qcn_jax.pipeline.rl.rollout import Outcome, RolloutRecord, Turn
from qcn_jax.pipeline.data.splits import split_tasks
from tests.agents import tiny

ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<function=", "</function>", "<parameter=", "</parameter>", *(line_token(n + 1) for n in range(MAX_LINE_TOKENS)),
)  # fmt: skip
VIEW, TESTS, SUBMIT = ToolCall("view", {}), ToolCall("run_tests", {}), ToolCall("submit", {})
RIGHT = ToolCall("edit", {"line": "<|5|>", "old": ">", "new": "<"})
WRONG = ToolCall("edit", {"line": "<|3|>", "old": "<=", "new": ">="})


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(Tokenizer.train([tiny.GOOD, tiny.TESTS], 256 + len(ADDED) + 60, ADDED))


@pytest.fixture(scope="module")
def services() -> Services:
    return provider_services(tiny.provider()).remembering()


def play(encoder, services, task, turns, *, domain="swe", template="", close=True, truncated=False, max_turns=6):
    """Plays turns (lists of calls, or text) and returns the outcome, the tokens and the malformed flags."""
    prompt = Prompt(domain, task, template)
    conversation = TaskConversation(prompt, encoder, services, max_turns=max_turns, unfinished_penalty=0.25)
    tokens, flags = conversation.opening(), []
    for turn in turns:
        text = turn if isinstance(turn, str) else templates.render(template or templates.NATIVE, "", turn)
        said = [*encoder.tokenizer.encode(text), *([encoder.end] if close else [])]
        reply = conversation.reply(said, close)
        tokens += said + ([] if reply.done else list(reply.tokens))
        flags.append(reply.malformed)
        if reply.done:
            break
    return conversation.outcome(truncated), tokens, flags


def test_a_repaired_function_earns_one(encoder, services) -> None:
    outcome, tokens, flags = play(encoder, services, tiny.make_task(), [[VIEW], [RIGHT, TESTS], [SUBMIT]])
    assert outcome.reward == 1.0 and outcome.solved and outcome.finished and not any(flags)
    text = encoder.tokenizer.decode(tokens)
    assert "<|5|>    if value > low:" in text and "ok" in text
    assert encoder.tokenizer.encode(text) == tokens  # here nothing untrusted spells an added token


def test_reward_vanishes_when_the_tests_are_broken(encoder, services) -> None:
    """The same right edit, on a task whose deciding test cannot pass any more, is worth nothing."""
    task = tiny.make_task()
    broken = dataclasses.replace(
        task, instance_id="broken", FAIL_TO_PASS=(*task.FAIL_TO_PASS, "tests/test_core.py::test_missing")
    )
    outcome, _, _ = play(encoder, services, broken, [[VIEW], [RIGHT], [SUBMIT]])
    assert outcome.reward == 0.0 and not outcome.solved and outcome.finished
    sabotage = tiny.make_diff(
        {"tests/test_core.py": tiny.TESTS}, {"tests/test_core.py": tiny.TESTS.replace("5, 1, 10) == 5", "5, 1, 10) == 6")}
    )
    sabotaged = dataclasses.replace(task, instance_id="sabotaged", bug_patch=task.bug_patch + sabotage)
    outcome, _, _ = play(encoder, services, sabotaged, [[VIEW], [RIGHT], [SUBMIT]])
    assert outcome.reward == 0.0 and outcome.detail["outcome"] == "unresolved"


def test_what_earns_nothing_and_what_is_penalised(encoder, services) -> None:
    task = tiny.make_task()
    wrong, _, _ = play(encoder, services, task, [[VIEW], [WRONG, TESTS], [SUBMIT]])
    assert wrong.reward == 0.0 and wrong.finished
    empty, _, _ = play(encoder, services, task, [[SUBMIT]])
    assert empty.reward == 0.0 and empty.detail["outcome"] == "empty_patch"
    limit, _, _ = play(encoder, services, task, [[VIEW]] * 6)
    assert limit.reward == -0.25 and not limit.finished and limit.detail["reason"] == "turn_limit"
    late, _, _ = play(encoder, services, task, [[VIEW], [RIGHT]], truncated=True)
    assert late.reward == 0.75 and late.solved and late.detail["reason"] == "length_limit"


def test_malformed_turns_are_flagged_one_by_one(encoder, services) -> None:
    unknown, nothing = ToolCall("reboot", {}), "I think the sign is wrong."
    _, _, flags = play(encoder, services, tiny.make_task(), [[VIEW], [unknown], nothing, [RIGHT], [SUBMIT]])
    assert flags == [False, True, True, False, False]


def test_a_turn_that_was_cut_off_is_not_executed(encoder, services) -> None:
    conversation = TaskConversation(
        Prompt("swe", tiny.make_task()), encoder, services, max_turns=6, unfinished_penalty=0.25
    )
    conversation.opening()
    said = encoder.tokenizer.encode(templates.render(templates.NATIVE, "", [RIGHT, SUBMIT]))
    reply = conversation.reply(said, stopped=False)
    assert reply.malformed and not reply.done and reply.tokens[0] == encoder.end
    after = conversation.reply([*encoder.tokenizer.encode(templates.render(templates.NATIVE, "", [SUBMIT])),
                                encoder.end], True)  # fmt: skip
    assert after.done and conversation.outcome(False).detail["outcome"] == "empty_patch"
    ended = TaskConversation(
        Prompt("swe", tiny.make_task()), encoder, services, max_turns=6, unfinished_penalty=0.25
    )
    ended.opening()  # the document ends instead of the turn: not an end of the turn either
    assert ended.reply([*said, encoder.tokenizer.id("<|endoftext|>")], True).malformed


def test_single_turn(encoder, services) -> None:
    task = tiny.make_task()
    outcome, tokens, _ = play(encoder, services, task, [[RIGHT]], domain="single_turn")
    assert outcome.reward == 1.0 and outcome.finished
    assert "<|3|>" in encoder.tokenizer.decode(tokens[: len(tokens) // 2])  # the function is in the prompt
    outcome, _, _ = play(encoder, services, task, [[WRONG], [RIGHT]], domain="single_turn")
    assert outcome.reward == 0.0


def test_format_asks_for_its_template_and_still_for_the_tests(encoder, services) -> None:
    task = tiny.make_task()
    run = lambda turns: play(encoder, services, task, turns, domain="tool_format", template="hermes")[0]
    assert run([[RIGHT]]).reward == 1.0
    other = run([[WRONG]])
    assert other.reward == 0.5 and other.solved and not other.detail["resolved"]
    native = run([templates.render(templates.NATIVE, "", [RIGHT])])
    assert native.reward == 0.0 and not native.solved
    nowhere = run([[ToolCall("edit", {"line": "2", "old": "no such text", "new": "x"})]])
    assert nowhere.reward == 0.0  # readable, but it could not be executed


def test_a_sandbox_that_fails_is_nobodys_fault(encoder, services) -> None:
    def fails(*_):
        raise SandboxError("gone")

    broken = Services(services.files, fails, services.grade)
    outcome, _, _ = play(encoder, broken, tiny.make_task(), [[VIEW], [RIGHT, TESTS], [SUBMIT]])
    assert outcome.infrastructure and outcome.reward == 0.0


def test_equal_work_is_done_once(encoder) -> None:
    plain = provider_services(tiny.provider())
    calls = []
    services = Services(
        plain.files, lambda *a: calls.append("tests") or plain.run_tests(*a),
        lambda *a: calls.append("grade") or plain.grade(*a),
    ).remembering()  # fmt: skip
    turns = [[VIEW], [RIGHT, TESTS], [SUBMIT]]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: play(encoder, services, tiny.make_task(), turns), range(4)))
    assert all(outcome == results[0][0] and tokens == results[0][1] for outcome, tokens, _ in results)
    assert calls.count("grade") == 1 and calls.count("tests") == 2  # F2P first, then the rest


def test_once() -> None:
    once, started = Once(keep=lambda value: value >= 0), threading.Event()

    def slow():
        started.set()
        time.sleep(0.05)
        return 5

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: once.get("key", slow), range(8))) == [5] * 8
    assert once.computed == 1 and once.get("key", lambda: 6) == 5
    assert once.get("bad", lambda: -1) == -1 and once.get("bad", lambda: 3) == 3

    def fails():
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            once.get("error", fails)
    assert once.get("error", lambda: 1) == 1
    small = Once(limit=2)
    assert [small.get(n, lambda n=n: n) for n in (1, 2, 3, 3, 1)] == [1, 2, 3, 3, 1] and small.computed == 4


def record(prompt: int, reward: float, solved: bool, infrastructure: bool = False, malformed=(False,)):
    turns = tuple(Turn(2 + 3 * i, 4 + 3 * i, flag, True) for i, flag in enumerate(malformed))
    n = 1 + 3 * len(malformed)
    sampled = np.zeros(n, bool)
    for turn in turns:
        sampled[turn.start : turn.stop] = True
    outcome = Outcome(reward, solved, finished=reward >= 0, infrastructure=infrastructure)
    return RolloutRecord(prompt, 0, np.arange(n, dtype=np.int32), sampled, np.zeros(n, np.float32), turns, outcome)


def test_groups_that_teach() -> None:
    records = [
        record(0, 1, True), record(0, -0.2, False), record(1, 1, True), record(1, 1, True), record(2, 0, False),
        record(2, -0.2, False), record(3, 1, True), record(3, 0, False, infrastructure=True),
    ]  # fmt: skip
    assert list(rewards.informative_groups(records)) == [0]
    summary = rewards.summarize(records)
    assert summary["infrastructure"] == 1 and summary["episodes"] == 7
    assert summary["pass_rate"] == pytest.approx(4 / 7) and summary["reward"] == pytest.approx(3.6 / 7)
    assert rewards.summarize([])["reward"] == 0.0


def test_only_the_tokens_of_malformed_turns_are_penalised() -> None:
    config = ExpertsConfig(malformed_penalty=0.5)
    got = rewards.token_advantages(record(0, 1, True, malformed=(False, True)), 2.0, config)
    np.testing.assert_array_equal(got, [0, 0, 2, 2, 0, 1.5, 1.5])


def test_refuted_turns_are_never_reinforced() -> None:
    good, bad = record(0, 1, True, malformed=(False, False)), record(0, 0, False, malformed=(False, False))
    for episode, advantage, want in ((good, 2.0, [0, 0, 0, 0, 0, 2, 2]), (bad, -1.0, [0, 0, -1, -1, 0, -1, -1])):
        first, *rest = episode.turns
        refuted = dataclasses.replace(episode, turns=(dataclasses.replace(first, refuted=True), *rest))
        np.testing.assert_array_equal(rewards.token_advantages(refuted, advantage, ExpertsConfig()), want)


def test_repeating_what_tests_refuted_is_penalised() -> None:
    episode = record(0, 1, True, malformed=(False, False))
    first, second = (dataclasses.replace(turn, refuted=True) for turn in episode.turns)
    episode = dataclasses.replace(episode, turns=(first, dataclasses.replace(second, repeated=True)))
    got = rewards.token_advantages(episode, 1.0, ExpertsConfig(repeat_penalty=0.5))
    np.testing.assert_array_equal(got, [0, 0, 0, 0, 0, -0.5, -0.5])


def test_failing_tests_refute_a_turn(encoder, services) -> None:
    prompt = Prompt("swe", tiny.make_task())
    conversation = TaskConversation(prompt, encoder, services, max_turns=6, unfinished_penalty=0.25)
    conversation.opening()
    say = lambda calls: [*encoder.tokenizer.encode(templates.render(templates.NATIVE, "", calls)), encoder.end]
    undo = ToolCall("undo", {})
    turns = [[VIEW], [WRONG, TESTS], [undo, WRONG, TESTS], [undo, RIGHT, TESTS], [SUBMIT]]
    replies = [conversation.reply(say(calls), True) for calls in turns]
    assert [reply.refuted for reply in replies] == [False, True, True, False, False]
    assert [reply.repeated for reply in replies] == [False, False, True, False, False]


def test_prompts_and_splits() -> None:
    functions = [f"f{n // 2}" for n in range(40)]
    tasks = [dataclasses.replace(tiny.make_task(), instance_id=str(n), function=f) for n, f in enumerate(functions)]
    imitation, reward = split_tasks(tasks, 0)
    assert len(imitation) + len(reward) == 40 and min(len(imitation), len(reward)) > 8
    assert not {task.function for task in imitation} & {task.function for task in reward}
    assert split_tasks(tasks, 0) == (imitation, reward) != split_tasks(tasks, 1)
    prompts = make_prompts("tool_format", tasks, ["hermes", "toolace", "react"])
    assert [prompt.template for prompt in prompts[:4]] == ["hermes", "toolace", "react", "hermes"]
    assert prompts[0].scaffold.template == "hermes" and make_prompts("swe", tasks)[0].scaffold.name == "nano"
