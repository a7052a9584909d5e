"""Experts: episodes played by hand on a real repository in real sandboxes, rewarded by its tests; and what names find."""

import concurrent.futures
import dataclasses

import pytest

from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT
from qcn_jax.agents.scaffolds.qwen_code import QWEN_CODE
from qcn_jax.agents.scaffolds.swe_agent import SWE_AGENT
from qcn_jax.agents.services import Services, check_shell, pool_services, provider_services
from qcn_jax.chat import templates, tool_frames
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.chat.folder_template import FolderTemplate
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.chat.template_encoder import TemplateEncoder
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.errors import UserError
from qcn_jax.pipeline.chat_template import fitted
from qcn_jax.pipeline.data.splits import split_tasks
from qcn_jax.pipeline.experts import EXPERTS, experts_of, headline
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.experts.single_turn import SINGLE_TURN
from qcn_jax.pipeline.experts.swe import SWE
from qcn_jax.pipeline.experts.tool_format import TOOL_FORMAT
from qcn_jax.pipeline.rl.records import Outcome
from qcn_jax.recipes.nano.scaffold import NANO
from qcn_jax.recipes.nano.spans import MAX_LINE_TOKENS, line_token
from tests.agents import tiny
from tests.chat import of_others

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


def begin(encoder, services, task, expert=SWE, template=templates.NATIVE, scaffold=NANO, **options):
    """A conversation of `expert` on `task`."""
    (prompt,) = expert.prompts([task], scaffold, [template])
    return expert.conversation(prompt, encoder, services, **{"max_turns": 6, "unfinished_penalty": 0.25} | options)


def play(encoder, services, task, turns, *, expert=SWE, template=templates.NATIVE, close=True, truncated=False, **options):
    """Plays turns (lists of calls, or text) and returns the outcome, the tokens and the malformed flags."""
    conversation = begin(encoder, services, task, expert, template, **options)
    tokens, flags = conversation.opening(), []
    for turn in turns:
        text = turn if isinstance(turn, str) else templates.render(template, "", turn)
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
    assert limit.reward == -limit.penalty == -0.25 and not limit.finished and limit.detail["reason"] == "turn_limit"
    late, _, _ = play(encoder, services, task, [[VIEW], [RIGHT]], truncated=True)
    assert late.reward == 0.75 and late.solved and late.detail["reason"] == "length_limit"


def test_malformed_turns_are_flagged_one_by_one(encoder, services) -> None:
    unknown, nothing = ToolCall("reboot", {}), "I think the sign is wrong."
    _, _, flags = play(encoder, services, tiny.make_task(), [[VIEW], [unknown], nothing, [RIGHT], [SUBMIT]])
    assert flags == [False, True, True, False, False]


def test_a_turn_that_was_cut_off_is_not_executed(encoder, services) -> None:
    conversation = begin(encoder, services, tiny.make_task())
    conversation.opening()
    said = encoder.tokenizer.encode(templates.render(templates.NATIVE, "", [RIGHT, SUBMIT]))
    reply = conversation.reply(said, stopped=False)
    assert reply.malformed and not reply.done and reply.tokens[0] == encoder.end
    after = conversation.reply([*encoder.tokenizer.encode(templates.render(templates.NATIVE, "", [SUBMIT])),
                                encoder.end], True)  # fmt: skip
    assert after.done and conversation.outcome(False).detail["outcome"] == "empty_patch"
    ended = begin(encoder, services, tiny.make_task())
    ended.opening()  # the document ends instead of the turn: not an end of the turn either
    assert ended.reply([*said, encoder.tokenizer.id("<|endoftext|>")], True).malformed


def test_single_turn(encoder, services) -> None:
    task = tiny.make_task()
    outcome, tokens, _ = play(encoder, services, task, [[RIGHT]], expert=SINGLE_TURN)
    assert outcome.reward == 1.0 and outcome.finished
    assert "<|3|>" in encoder.tokenizer.decode(tokens[: len(tokens) // 2])  # the function is in the prompt
    outcome, _, _ = play(encoder, services, task, [[WRONG], [RIGHT]], expert=SINGLE_TURN)
    assert outcome.reward == 0.0


def test_format_asks_for_its_template_and_still_for_the_tests(encoder, services) -> None:
    task = tiny.make_task()
    run = lambda turns: play(encoder, services, task, turns, expert=TOOL_FORMAT, template="hermes")[0]
    assert run([[RIGHT]]).reward == 1.0
    other = run([[WRONG]])
    assert other.reward == 0.5 and other.solved and not other.detail["resolved"]
    native = run([templates.render(templates.NATIVE, "", [RIGHT])])
    assert native.reward == 0.0 and not native.solved
    nowhere = run([[ToolCall("edit", {"line": "2", "old": "no such text", "new": "x"})]])
    assert nowhere.reward == 0.0  # readable, but it could not be executed


@pytest.mark.parametrize("template", ["deepseekv31", "harmony_xml", "qwen3_xml_mixed"])
def test_a_scaffold_in_a_template_has_all_of_its_axes(encoder, live, template) -> None:
    services, _ = live
    scaffold = QWEN_CODE.in_template(template)
    conversation = begin(encoder, services, tiny.make_task(), scaffold=scaffold, template=template)
    opening = encoder.tokenizer.decode(conversation.opening())
    assert "# qwen3" not in opening and opening.count("<|im_start|>system") == 1 and "FUNCTION_NAME" in opening
    assert "<function>\n<name>" not in opening  # Qwen3-Coder's own definitions are not there as well
    say = lambda *calls: conversation.reply(
        [*encoder.tokenizer.encode(templates.render(template, "", calls)), encoder.end], True)
    repair = ToolCall("edit", {"file_path": "/testbed/calc/core.py", "old_string": "value > low", "new_string": "value < low"})
    reply = say(repair)
    told = encoder.tokenizer.decode(list(reply.tokens))
    begun = tool_frames.joined(templates.respond(template, [("edit", "")]))[:8]
    assert not reply.malformed and told.startswith("\n<|im_start|>user\n" + begun)
    assert say(ToolCall("edit", {"file_path": "/testbed/calc/core.py"})).malformed  # violates its schema
    assert say(SUBMIT).done and conversation.outcome(False).solved


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


def test_failing_tests_refute_a_turn(encoder, services) -> None:
    conversation = begin(encoder, services, tiny.make_task())
    conversation.opening()
    say = lambda calls: [*encoder.tokenizer.encode(templates.render(templates.NATIVE, "", calls)), encoder.end]
    undo = ToolCall("undo", {})
    turns = [[VIEW], [WRONG, TESTS], [undo, WRONG, TESTS], [undo, RIGHT, TESTS], [SUBMIT]]
    replies = [conversation.reply(say(calls), True) for calls in turns]
    assert [reply.failing for reply in replies] == [False, True, True, False, False]
    assert [reply.repeated for reply in replies] == [False, False, True, False, False]


def test_a_turn_that_comes_again_to_what_failed_is_drawn_once_more(encoder, services) -> None:
    """It leaves no trace: not in the messages, the files, what can be taken back, or the count of turns."""
    conversation = begin(encoder, services, tiny.make_task(), redraws=2, max_turns=3)
    conversation.opening()
    say = lambda calls: [*encoder.tokenizer.encode(templates.render(templates.NATIVE, "", calls)), encoder.end]
    undo = ToolCall("undo", {})
    assert conversation.reply(say([WRONG, TESTS]), True).failing
    told, files = len(conversation.messages), conversation.episode.executor.diff()
    for calls in ([undo, WRONG, TESTS], [undo, undo, WRONG, TESTS]):
        assert conversation.reply(say(calls), True).again
        assert len(conversation.messages) == told and conversation.episode.executor.diff() == files
    taken = conversation.reply(say([undo, WRONG, TESTS]), True)  # so often and no more
    assert taken.repeated and not taken.again and len(conversation.episode.turns) == 2
    assert conversation.reply(say([undo, WRONG, TESTS]), True).again  # the last turn that there is, and it is there again
    last = conversation.reply(say([undo, RIGHT, TESTS]), True)
    assert last.done and not last.failing
    outcome = conversation.outcome(False)
    assert outcome.solved and outcome.detail["runs"] == [False, False, True] and outcome.detail["turns"] == 3


@pytest.fixture(name="live", scope="module")
def _live():
    """Services of a pool whose worker holds live sandboxes, and the pool."""
    arguments = {"kind": "local", "state_dir": tiny.provider().state_dir}
    with EnvPool(1, arguments, [tiny.spec()]) as pool:
        yield pool_services({"tiny==1": tiny.spec()}, tiny.provider(), pool), pool


def shell(*commands):
    """mini-swe-agent's turns."""
    return [MINI_SWE_AGENT.render("I look.", [ToolCall("bash", {"command": command})]) for command in commands]


MEND = "sed -i 's/if value > low/if value < low/' calc/core.py"
DONE = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def test_a_scaffold_with_a_shell_acts_in_a_live_sandbox(encoder, live) -> None:
    services, pool = live
    turns = shell("grep -n 'value >' calc/core.py", MEND, "git remote add o https://github.com/o/tiny && git fetch o", DONE)
    outcome, tokens, flags = play(encoder, services, tiny.make_task(), turns, scaffold=MINI_SWE_AGENT)
    assert outcome.reward == 1.0 and outcome.detail["resolved"] and flags == [False] * 4
    assert outcome.detail["guard"] == {"allowed": 3, "blocked": 1, "blocked/repository_link": 1}
    assert outcome.detail["blocked"] == 1 and outcome.detail["scaffold"] == "mini_swe_agent"
    said = encoder.tokenizer.decode(tokens)
    assert "if value > low:" in said and "This call was blocked" in said and "<returncode>0</returncode>" in said
    assert pool._open == [0]  # its sandbox was given back


def test_an_agent_acts_under_another_template(live) -> None:
    """Calls as its template writes them, with reasoning before; what cannot be done is one line before any work."""
    services, _ = live
    tokenizer = Tokenizer.train([tiny.GOOD, tiny.TESTS], 256 + len(of_others.ADDED) + 60, of_others.ADDED)
    under = lambda name: TemplateEncoder(tokenizer, FolderTemplate({"default": of_others.TEMPLATES[name]}, "F"))
    encoder = under("thinking")
    scaffold = fitted(QWEN_CODE, encoder, "--config.experts.scaffold")
    assert scaffold.template == "hermes"
    repair = ToolCall("edit", {"file_path": "/testbed/calc/core.py", "old_string": "value > low", "new_string": "value < low"})
    conversation = begin(encoder, services, tiny.make_task(), scaffold=scaffold, template="hermes")
    opening = tokenizer.decode(conversation.opening())
    assert '"name": "edit"' in opening and opening.endswith("<|im_start|>assistant\n<think>\n")
    said = "So.\n</think>\n\n" + templates.render("hermes", "", [repair])
    reply = conversation.reply([*tokenizer.encode(said), encoder.end], True)
    assert not reply.malformed and not reply.done
    assert tokenizer.decode(list(reply.tokens)).endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n")
    done = "Done.\n</think>\n\n" + templates.render("hermes", "", [SUBMIT])
    assert conversation.reply([*tokenizer.encode(done), encoder.end], True).done
    assert conversation.outcome(False).solved
    for name, other, line in (
        ("headers", SWE_AGENT, "writes tool calls in a form that is not known"),
        ("instruct", MINI_SWE_AGENT, "of F refuses it: Only user and assistant roles are known"),
    ):
        with pytest.raises(UserError, match=f"^--config.sft.scaffold={other.name}: .*{line}.*chat_template=native is Qwen"):
            fitted(other, under(name), "--config.sft.scaffold")
    assert fitted(MINI_SWE_AGENT, under("chatml"), "f") is MINI_SWE_AGENT


def test_two_episodes_at_once_have_sandboxes_of_their_own_and_idle_ones_have_none(encoder, live) -> None:
    services, pool = live
    first, second, idle = (begin(encoder, services, tiny.make_task(), scaffold=MINI_SWE_AGENT) for _ in range(3))
    say = lambda conversation, command: conversation.reply(
        [*encoder.tokenizer.encode(shell(command)[0]), encoder.end], True)
    assert first.opening() == second.opening() == idle.opening() and pool._open == [0]
    assert not say(first, MEND).done and not say(second, "rm calc/core.py").done and pool._open == [2]
    assert say(first, DONE).done and say(second, DONE).done
    assert first.outcome(False).solved and not second.outcome(False).solved
    assert idle.outcome(True).detail["outcome"] == "empty_patch" and pool._open == [0]


def test_a_live_sandbox_that_is_lost_is_nobodys_fault(encoder, live) -> None:
    services, pool = live
    conversation = begin(encoder, services, tiny.make_task(), scaffold=MINI_SWE_AGENT)
    conversation.opening()
    say = lambda command: conversation.reply([*encoder.tokenizer.encode(shell(command)[0]), encoder.end], True)
    assert not say("true").done
    pool._lines[0].kill()  # the worker
    assert say("true").done and conversation.outcome(False).infrastructure and pool._open == [0]


def test_a_shell_where_no_command_may_run_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(tiny.provider(), "commands_allowed", False)
    with pytest.raises(UserError, match="^--scaffold: 'mini_swe_agent'; runs shell commands, which this sandbox cannot"):
        check_shell(MINI_SWE_AGENT, tiny.provider(), "--scaffold")
    check_shell(NANO, tiny.provider(), "--scaffold")


def test_prompts_and_splits() -> None:
    functions = [f"f{n // 2}" for n in range(40)]
    tasks = [dataclasses.replace(tiny.make_task(), instance_id=str(n), function=f) for n, f in enumerate(functions)]
    imitation, reward = split_tasks(tasks, 0)
    assert len(imitation) + len(reward) == 40 and min(len(imitation), len(reward)) > 8
    assert not {task.function for task in imitation} & {task.function for task in reward}
    assert split_tasks(tasks, 0) == (imitation, reward) != split_tasks(tasks, 1)
    prompts = TOOL_FORMAT.prompts(tasks, NANO, ["hermes", "toolace", "react"])
    assert [prompt.template for prompt in prompts[:4]] == ["hermes", "toolace", "react", "hermes"]
    both = TOOL_FORMAT.prompts(tasks[:2], NANO, ["hermes"], ["glm46"])
    assert [(prompt.template, prompt.unseen) for prompt in both] == [("hermes", False)] * 2 + [("glm46", True)] * 2
    assert prompts[0].scaffold.template == "hermes" and SWE.prompts(tasks, NANO)[0].scaffold is NANO
    assert SINGLE_TURN.prompts(tasks, NANO)[0].scaffold == NANO.single()
    with pytest.raises(UserError, match="swe_agent cannot"):
        SINGLE_TURN.prompts(tasks, SWE_AGENT)


def test_nobody_asks_what_an_unjudged_episode_was_worth(encoder, services) -> None:
    def graded(*_):
        raise AssertionError("graded")

    quiet = Services(services.files, services.run_tests, graded)
    outcome, _, _ = play(encoder, quiet, tiny.make_task(), [[VIEW], [RIGHT], [SUBMIT]], graded=False)
    assert outcome == Outcome(0.0, False, True)


def test_a_reward_of_the_configuration_takes_the_experts_place(encoder, services) -> None:
    reward = lambda result, verdict, penalty: Outcome(result.turns + penalty, verdict.resolved, True)
    outcome, _, _ = play(encoder, services, tiny.make_task(), [[VIEW], [RIGHT], [SUBMIT]], reward=reward)
    assert outcome == Outcome(3.25, True, True)


PLAIN, QUIET = Expert("plain", "plain one"), Expert("kinds", "called as a number is")


def test_names_find_experts_and_one_is_the_headline() -> None:
    assert [expert.name for expert in experts_of(EXPERTS)] == list(EXPERTS)
    assert headline(experts_of(["tool_format", "swe"])).name == "swe"
    alone = experts_of(["tests.pipeline.experts.test_experts:PLAIN", "single_turn"])
    assert headline(alone).name == "plain" and [expert.headline for expert in alone] == [True, False]
    assert alone[0].model == "expert_plain"


@pytest.mark.parametrize(("names", "message"), [
    (["weeb"], "'weeb'; allowed: swe, single_turn, tool_format, web, package.module:OBJECT"),
    ([], "is empty"), (["swe", "swe"], "'swe' is there twice"),
    (["tests.pipeline.experts.test_experts:NANO"], "is a NanoScaffold; expert needs an Expert"),
    (["tests.pipeline.experts.test_experts:QUIET"], "is called 'kinds'; allowed: a lower-case word"),
])
def test_names_that_find_no_expert_are_refused(names, message) -> None:
    with pytest.raises(UserError) as raised:
        experts_of(names)
    assert str(raised.value).startswith("--config.experts.names: ") and message in str(raised.value)
