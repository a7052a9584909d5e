"""The episode ends when it should and says why; no output of a model breaks it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.agents.episode import MAX_UNREADABLE, EndReason, Episode
from qcn_jax.agents.guard import Guard
from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT
from qcn_jax.agents.scaffolds.qwen_code import QWEN_CODE
from qcn_jax.agents.scaffolds.swe_agent import SWE_AGENT
from qcn_jax.agents.sessions import SessionExecutor
from qcn_jax.agents.workspace import SandboxWorkspace
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.grading import starting_changes
from qcn_jax.recipes.nano.scaffold import NANO
from tests.agents import tiny

VIEW = NANO.render("", [ToolCall("view")])
RIGHT = NANO.render("", [ToolCall("edit", {"line": "<|5|>", "old": ">", "new": "<"}), ToolCall("run_tests")])
WRONG = NANO.render("", [ToolCall("edit", {"line": "<|5|>", "old": ">", "new": ">="}), ToolCall("run_tests")])
UNDO = NANO.render("", [ToolCall("undo")])
SUBMIT = NANO.render("", [ToolCall("submit")])
TASK = tiny.make_task()


def start(runner=tiny.run_tests, scaffold=NANO, **options):
    return Episode(TASK, scaffold, scaffold.executor(TASK, tiny.overlay(TASK, runner)), **options)


def test_an_episode_with_a_wrong_and_a_right_edit():
    episode = start()
    texts = []
    for text in (VIEW, WRONG, UNDO, RIGHT, SUBMIT):
        observation = episode.step(text)
        assert not observation.malformed
        texts.append([message["content"] for message in observation.messages])
    assert texts[1:] == [["FAILED 3 of 3\nassert 1 == 5"], ["done"], ["ok"], []]
    result = episode.result()
    assert result.reason is EndReason.SUBMITTED and observation.done
    assert result.patch == TASK.patch and result.tests_passed
    assert (result.turns, result.attempts, [run.passed for run in result.runs]) == (5, 2, [False, True])
    assert result.malformed == (False,) * 5
    assert [message["role"] for message in episode.messages] == ["user"] + ["assistant", "tool"] * 4 + ["assistant"]
    assert result.to_json()["reason"] == "submitted"


def test_tests_passed_needs_a_run_after_the_last_change():
    episode = start()
    episode.step(RIGHT)
    episode.step(UNDO)
    episode.step(SUBMIT)
    assert episode.result().runs[-1].passed and not episode.result().tests_passed
    assert episode.result().patch == ""


def test_the_turn_limit_ends_an_episode_after_its_last_calls_ran():
    episode = start(max_turns=2)
    assert not episode.step(VIEW).done
    observation = episode.step(RIGHT)
    assert observation.done and observation.messages == ()
    assert episode.result().reason is EndReason.TURN_LIMIT and episode.result().patch == TASK.patch
    with pytest.raises(ValueError, match="over"):
        episode.step(SUBMIT)


def test_the_length_limit_comes_from_outside():
    episode = start()
    with pytest.raises(ValueError):
        episode.result()
    episode.step(RIGHT)
    episode.end(EndReason.LENGTH_LIMIT)
    episode.end(EndReason.SUBMITTED)  # the first reason stands
    assert episode.result().reason is EndReason.LENGTH_LIMIT and episode.result().patch == TASK.patch


def test_turns_without_a_call_are_told_so_and_end_the_episode():
    episode = start(runner=None)
    for number in range(MAX_UNREADABLE):
        observation = episode.step("I think the bug is on line 5.")
        assert observation.malformed
        assert observation.done == (number == MAX_UNREADABLE - 1)
    assert episode.messages[2] == {"role": "tool", "content": "no tool call"}
    assert episode.result().reason is EndReason.UNREADABLE
    assert episode.result().malformed == (True,) * MAX_UNREADABLE


def test_a_readable_turn_starts_the_count_of_unreadable_ones_again():
    episode = start(runner=None, max_turns=20)
    for _ in range(3):
        episode.step("no")
        episode.step("no")
        assert not episode.step(VIEW).malformed
    assert not episode.done


def test_a_turn_that_was_cut_off_is_not_executed():
    episode = start(runner=None)
    observation = episode.step(RIGHT, complete=False)
    assert observation.malformed and observation.messages[0]["content"] == "cut off"
    assert episode.turns[0].results == ()


@pytest.mark.parametrize("text", [
    "<tool_call>\n<function=shell>\n</function>\n</tool_call>",
    "<tool_call>\n<function=edit>\n<parameter=line>\n5\n</parameter>\n</function>\n</tool_call>",
    VIEW.removeprefix("<tool_call>\n"),
])
def test_malformed_calls_are_counted_but_the_episode_goes_on(text):
    episode = start(runner=None)
    observation = episode.step(text)
    assert observation.malformed and not observation.done and observation.messages
    assert not episode.step(VIEW).malformed


def test_a_failed_edit_is_not_malformed():
    episode = start(runner=None)
    observation = episode.step(NANO.render("", [ToolCall("edit", {"line": "5", "old": "zzz", "new": "y"})]))
    assert not observation.malformed
    assert observation.messages[0]["content"] == "edit: old occurs 0 times on line 5"


def test_a_single_turn_scaffold_submits_with_its_edit_and_asks_again_after_a_failed_one():
    episode = start(runner=None, scaffold=NANO.single(), max_turns=2)
    assert not episode.step(NANO.single().render("", [ToolCall("edit", {"line": "5", "old": "z", "new": "y"})])).done
    assert episode.step(NANO.single().render("", [ToolCall("edit", {"line": "5", "old": ">", "new": "<"})])).done
    assert episode.result().reason is EndReason.SUBMITTED and episode.result().patch == TASK.patch


def test_a_sandbox_failure_ends_the_episode_as_such():
    def broken(*_):
        raise SandboxError("gone")

    episode = start(runner=broken)
    assert episode.step(RIGHT).done
    assert episode.result().reason is EndReason.INFRASTRUCTURE and episode.result().patch == ""


def test_blocked_calls_are_counted_and_told():
    guard = Guard()
    with sandbox(tiny.provider(), "tiny==1", starting_changes(TASK, tiny.PRISTINE)) as box:
        episode = Episode(TASK, QWEN_CODE, QWEN_CODE.executor(TASK, SandboxWorkspace(box)), guard=guard)
        shell = [ToolCall("run_shell_command", {"command": command}) for command in (
            "echo one > made.txt", "git clone https://github.com/owner/repo && echo two > made.txt", "rm made.txt")]
        observation = episode.step(QWEN_CODE.render("", shell))
        first, refusal, last = (message["content"] for message in observation.messages)
        assert (first, last) == ("(no output)", "skipped: the call before it failed") and "blocked" in refusal
        assert box.read("made.txt") == "one\n"
        assert not episode.step(QWEN_CODE.render("", shell[::2])).malformed
        episode.step(QWEN_CODE.render("", [shell[1], ToolCall("submit")]))
        assert not episode.done
        episode.end(EndReason.LENGTH_LIMIT)
        assert episode.result().blocked == 2
        assert episode.result().guard == {"allowed": 3, "blocked": 2, "blocked/repository_link": 2}


def test_a_guarded_call_after_a_failed_one_is_not_counted():
    guard = Guard()
    episode = Episode(TASK, NANO, NANO.executor(TASK, tiny.overlay(TASK, None)), guard=guard)
    bad = ToolCall("edit", {"line": "5", "old": "zzz", "new": "y"})
    link = ToolCall("edit", {"line": "5", "old": ">", "new": "requests.get('https://github.com/owner/repo')"})
    episode.step(NANO.render("", [bad, link]))
    assert [result.blocked for result in episode.turns[0].results] == [False]
    assert "blocked" in episode.step(NANO.render("", [link])).messages[0]["content"]


# --- the overlay and a live sandbox agree ---------------------------------------------------------------------------


def play(episode, texts):
    for text in texts:
        if not episode.done:
            episode.step(text)
    episode.end(EndReason.LENGTH_LIMIT)
    result = episode.result().to_json()
    result["runs"] = [{**run, "seconds": 0} for run in result["runs"]]
    return [message["content"] for message in episode.messages], result


def random_texts(rng):
    """Turns of a clumsy agent: right and wrong edits, views of other things, tests, undo, nonsense."""
    calls = [
        lambda: ToolCall("view"),
        lambda: ToolCall("view", {"symbol": rng.choice(["is_even", "Calculator", "nothing"])}),
        lambda: ToolCall("view", {"path": rng.choice(["README.md", "calc", "absent.py", "calc/__init__.py"])}),
        lambda: ToolCall("edit", {"line": str(rng.randint(0, 9)), "old": rng.choice([">", "<", "low", "not ", "value"]),
                                  "new": rng.choice(["<", ">=", "high", "", "value\n    # two"])}),
        lambda: ToolCall("undo"),
        lambda: ToolCall("search", {"pattern": rng.choice(["clamp", "calculator", "%%"])}),
        lambda: ToolCall("run_tests"),
    ]
    weights = [1, 1, 1, 5, 2, 1, 2]
    return [NANO.render("", [make() for make in rng.choices(calls, weights, k=rng.randint(1, 3))]) for _ in range(7)]


@pytest.mark.parametrize("seed", range(12))
def test_overlay_and_sandbox_tell_the_agent_the_same(seed):
    texts = random_texts(random.Random(seed))
    here = play(start(), texts)
    with sandbox(tiny.provider(), "tiny==1", starting_changes(TASK, tiny.PRISTINE)) as box:
        live = play(Episode(TASK, NANO, NANO.executor(TASK, SandboxWorkspace(box))), texts)
    assert here == live


@pytest.fixture(scope="module")
def pool():
    with EnvPool(2, {"kind": "local", "state_dir": tiny.provider().state_dir}, [tiny.spec()]) as made:
        yield made


@pytest.mark.parametrize("seed", [0, 1])
def test_a_session_in_a_pool_worker_tells_the_agent_the_same(pool, seed):
    texts = random_texts(random.Random(seed))
    with pool.open_session("tiny==1", starting_changes(TASK, tiny.PRISTINE)) as session:
        remote = play(Episode(TASK, NANO, SessionExecutor(lambda: session, NANO.executor(TASK, None))), texts)
    assert remote == play(start(), texts)


def test_tests_of_an_overlay_run_in_the_pool(pool):
    def runner(changed, node_ids, timeout, fail_fast):
        return pool.run_tests("tiny==1", changed, node_ids, timeout, fail_fast).result()

    texts = [VIEW, WRONG, UNDO, RIGHT, SUBMIT]
    assert play(start(runner), texts) == play(start(), texts)
    verdict = pool.grade(TASK, play(start(runner), texts)[1]["patch"]).result()
    assert verdict.resolved


def test_a_lost_session_ends_the_episode_as_infrastructure(pool):
    with pool.open_session("tiny==1", starting_changes(TASK, tiny.PRISTINE)) as session:
        episode = Episode(TASK, NANO, SessionExecutor(lambda: session, NANO.executor(TASK, None)))
        assert not episode.step(VIEW).done
    assert episode.step(RIGHT).done  # the sandbox is gone
    assert episode.result().reason is EndReason.INFRASTRUCTURE


# --- whatever a model writes ----------------------------------------------------------------------------------------

fragments = st.sampled_from([
    "<tool_call>", "</tool_call>", "<function=", "edit>", "view>", "submit>", "undo>", "</function>", "<parameter=",
    "line>", "old>", "new>", "path>", "</parameter>", "\n", "5", "<|5|>", ">", "<", "<|im_end|>", "{", '"name"',
    "```bash\nls\n```", "\ud800", "\0", "é", "../../etc/passwd", RIGHT, VIEW, UNDO, "]", "edit(line=5)",
])
noise = st.one_of(st.text(max_size=60), st.lists(fragments, max_size=25).map("".join))


def passing(changed, node_ids, timeout, fail_fast):
    return tiny.TestRun("ok", dict.fromkeys(node_ids or ["a"], "passed"), {}, 0.0, "", 0)


@settings(max_examples=300, deadline=None)
@given(st.lists(noise, min_size=1, max_size=6), st.booleans(),
       st.sampled_from([NANO, NANO.single(), SWE_AGENT, QWEN_CODE, MINI_SWE_AGENT, NANO.in_template("toolace")]))
def test_no_text_breaks_an_episode(texts, complete, scaffold):
    episode = start(passing, scaffold, max_turns=5)
    for text in texts:
        if episode.done:
            break
        observation = episode.step(text, complete)
        assert observation.done == (not observation.messages)
        assert all(len(str(message["content"])) < 2 * scaffold.output_limit for message in observation.messages)
        assert observation.malformed or episode.turns[-1].calls
    episode.end(EndReason.LENGTH_LIMIT)
    result = episode.result()
    assert result.turns == len(episode.turns) == len(result.malformed) <= 5
    assert "etc/passwd" not in result.patch


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_corrupted_calls_never_run_something_else(data):
    """Deleting any part of a submission leaves a submission, or nothing that ends the episode as one."""
    start_, end = sorted(data.draw(st.tuples(st.integers(0, len(SUBMIT)), st.integers(0, len(SUBMIT)))))
    text = SUBMIT[:start_] + SUBMIT[end:]
    episode = start(passing)
    observation = episode.step(text)
    if "submit" not in text:
        assert not observation.done
    if "".join(text.split()) != "".join(SUBMIT.split()):  # blanks are not held against an agent
        assert observation.malformed or not observation.done
