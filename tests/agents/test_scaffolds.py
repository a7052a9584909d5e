"""Every scaffold presents the same task, reads its own calls back, and mends the same file with its own tools."""

import json

import pytest

from qcn_jax.agents.episode import EndReason, Episode
from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.agents.scaffolds.claude_code import CLAUDE_CODE
from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT
from qcn_jax.agents.scaffolds.openhands import OPENHANDS
from qcn_jax.agents.scaffolds.qwen_code import QWEN_CODE
from qcn_jax.agents.scaffolds.simulated_user import SIMULATED_USER
from qcn_jax.agents.scaffolds.swe_agent import SWE_AGENT
from qcn_jax.agents.scaffolds.terminus import TERMINUS_JSON, TERMINUS_XML
from qcn_jax.agents.workspace import SandboxWorkspace
from qcn_jax.chat import rendering
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.chat.tokenizer import QWEN_ADDED, Tokenizer
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.tasks.grading import starting_changes
from qcn_jax.errors import UserError
from qcn_jax.recipes.nano.scaffold import NANO
from tests.agents import tiny

NANO_SINGLE = NANO.single()
ALL = [NANO, NANO_SINGLE, SWE_AGENT, QWEN_CODE, MINI_SWE_AGENT, OPENHANDS, CLAUDE_CODE, TERMINUS_JSON, TERMINUS_XML,
       SIMULATED_USER]
SED = "sed -i 's/if value > low/if value < low/' core.py"
CORE = "/testbed/calc/core.py"
MEND = {
    "nano": [
        [ToolCall("view")],
        [ToolCall("edit", {"line": "<|5|>", "old": ">", "new": "<"}), ToolCall("run_tests")],
        [ToolCall("submit")],
    ],
    "nano_single": [[ToolCall("edit", {"line": "5", "old": ">", "new": "<"})]],
    "swe_agent": [
        [ToolCall("bash", {"command": "grep -rn 'def clamp' ."})],
        [ToolCall("str_replace_editor", {"command": "view", "path": CORE, "view_range": [8, 14]})],
        [ToolCall("str_replace_editor", {"command": "str_replace", "path": CORE, "old_str": "if value > low:",
                                         "new_str": "if value < low:"})],
        [ToolCall("run_tests")],
        [ToolCall("submit")],
    ],
    "qwen_code": [
        [ToolCall("list_directory", {"path": "/testbed"})],
        [ToolCall("grep_search", {"pattern": "def clamp"})],
        [ToolCall("read_file", {"absolute_path": CORE, "offset": 7, "limit": 7})],
        [ToolCall("edit", {"file_path": CORE, "old_string": "if value > low:", "new_string": "if value < low:"})],
        [ToolCall("run_shell_command", {"command": "python -m pytest -q tests", "description": "Test"})],
        [ToolCall("submit")],
    ],
    "openhands": [
        [ToolCall("terminal", {"command": "cd calc && export WHAT=low && grep -n 'def clamp' core.py"})],
        [ToolCall("task_tracker", {"command": "plan", "task_list": [{"title": "mend", "status": "in_progress"}]}),
         ToolCall("think", {"thought": "The comparison is the wrong way round."})],
        [ToolCall("file_editor", {"command": "view", "path": CORE, "view_range": [8, 14]})],
        [ToolCall("terminal", {"command": "sed -i \"s/if value > $WHAT/if value < $WHAT/\" core.py && pwd"})],
        [ToolCall("finish", {"message": "done"})],
    ],
    "claude_code": [
        [ToolCall("Glob", {"pattern": "**/core.py"}), ToolCall("Grep", {"pattern": "def cla.p", "output_mode": "content"})],
        [ToolCall("Read", {"file_path": CORE, "offset": 8, "limit": 7})],
        [ToolCall("Edit", {"file_path": CORE, "old_string": "if value > low:", "new_string": "if value < low:"})],
        [ToolCall("Bash", {"command": "cd calc && ls", "timeout": 5000, "description": "List"})],
        [],
    ],
    **{f"terminus_{form}": [
        [ToolCall("keystrokes", {"keystrokes": "cd calc\n", "duration": 0.1}),
         ToolCall("keystrokes", {"keystrokes": "grep -n 'def clamp' core.py\n", "duration": 0.1})],
        [ToolCall("keystrokes", {"keystrokes": f"{SED}\n", "duration": 1.0}), ToolCall("task_complete", {})],
        [ToolCall("task_complete", {})],
    ] for form in ("json", "xml")},
    "simulated_user": [
        [ToolCall("bash", {"command": "cat calc/core.py"}), ToolCall("bash", {"command": "ls"})],
        [ToolCall("bash", {"command": "sed -i 's/if value > low/if value < low/' calc/core.py"})],
        [],
    ],
    "mini_swe_agent": [
        [ToolCall("bash", {"command": "cat calc/core.py"})],
        [ToolCall("bash", {"command": "sed -i 's/if value > low/if value < low/' calc/core.py"})],
        [ToolCall("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"})],
    ],
}


@pytest.mark.parametrize("scaffold", ALL, ids=lambda s: s.name)
def test_the_same_task_is_mended_in_a_live_sandbox(scaffold):
    task = tiny.make_task()
    with sandbox(tiny.provider(), "tiny==1", starting_changes(task, tiny.PRISTINE)) as box:
        executor = scaffold.executor(task, SandboxWorkspace(box))
        episode = Episode(task, scaffold, executor)
        for calls in MEND[scaffold.name]:
            observation = episode.step(scaffold.render("" if calls else "All is done.", calls))
            assert not observation.malformed
            assert all(result.ok for result in episode.turns[-1].results), episode.turns[-1].results
        result = episode.result()
    assert result.reason is EndReason.SUBMITTED
    assert result.patch == task.patch
    if scaffold is not NANO_SINGLE:
        assert any("clamp" in str(message["content"]) for message in episode.messages[2:])


@pytest.mark.parametrize("scaffold", ALL, ids=lambda s: s.name)
def test_calls_read_back(scaffold):
    for calls in MEND[scaffold.name]:
        parsed = scaffold.parse(scaffold.render("What it is.\n\nWhat is next.", calls))
        assert parsed.problems == []
        assert [call.name for call in parsed.calls] == [call.name for call in calls]
        assert [call.arguments for call in parsed.calls] == [call.arguments for call in calls]


@pytest.mark.parametrize("scaffold", ALL, ids=lambda s: s.name)
def test_prompts_hold_the_statement_and_the_tools(scaffold):
    task = tiny.make_task(problem_statement="  {statement} of {root} <|im_end|>\n")
    messages = scaffold.first_messages(task, scaffold.executor(task, tiny.overlay(task)))
    text = rendering.render(messages, scaffold.schemas(), add_generation_prompt=True)
    assert "{statement} of {root} <|im_end|>" in text
    assert ("<tools>" in text) == scaffold.describe_tools
    if scaffold.describe_tools:
        assert all(f"<name>{tool.name}</name>" in text for tool in scaffold.tools)
    json.dumps(scaffold.schemas())


def test_nano_prompts_are_short():
    task = tiny.make_task()
    executor = NANO.executor(task, tiny.overlay(task))
    assert NANO.first_messages(task, executor) == [{"role": "user", "content": task.problem_statement}]
    (message,) = NANO_SINGLE.first_messages(task, executor)
    statement, path, token, line, *rest = message["content"]
    assert statement["text"] == task.problem_statement + "\n" and path["text"] == "calc/core.py\n"
    assert token == {"type": "text", "text": "<|1|>", "special": True} and line["text"].startswith("def clamp(")
    assert not any(part.get("special") for part in (statement, path, line)) and len(rest) == 12


def test_format_prompts_name_the_template():
    task = tiny.make_task()
    scaffold = NANO.in_template("hermes")
    executor = scaffold.executor(task, tiny.overlay(task))
    (message,) = scaffold.first_messages(task, executor)
    assert message["content"][0]["text"] == task.problem_statement + "\nformat: hermes\n"
    episode = Episode(task, scaffold, executor)
    text = scaffold.render("", MEND["nano_single"][0])
    assert json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))["name"] == "edit"
    assert episode.step(text).done and episode.result().patch == task.patch
    # The same action in another format is not accepted.
    episode = Episode(task, scaffold, scaffold.executor(task, tiny.overlay(task)))
    assert episode.step(NANO_SINGLE.render("", MEND["nano_single"][0])).malformed
    assert not any(result.ok for turn in episode.turns for result in turn.results)


def test_nano_joins_what_tools_say_and_keeps_views_apart():
    task = tiny.make_task()
    executor = NANO.executor(task, tiny.overlay(task, tiny.run_tests))
    search = ToolCall("search", {"pattern": "def is_even"})
    results = executor.execute([ToolCall("view"), search, ToolCall("run_tests")])
    view, rest = NANO.observe(results)
    assert [part["text"] for part in view["content"]][:2] == ["calc/core.py\n", "<|1|>"] and view["content"][1]["special"]
    assert rest == {"role": "tool", "content": "calc/core.py:17:def is_even(n):\nFAILED 3 of 3\nassert 1 == 5"}
    results = executor.execute([ToolCall("edit", {"line": "5", "old": ">", "new": "<"}), ToolCall("run_tests")])
    assert NANO.observe(results) == [{"role": "tool", "content": "ok"}]
    assert NANO.observe(executor.execute([ToolCall("undo")])) == [{"role": "tool", "content": "done"}]


def test_mini_swe_agent_wants_one_block():
    for text in ("no block", "```bash\nls\n```\n```bash\npwd\n```", "```python\n1\n```"):
        parsed = MINI_SWE_AGENT.parse(text)
        assert parsed.calls == [] and parsed.problems
    parsed = MINI_SWE_AGENT.parse("THOUGHT: look\n\n```mswea_bash_command\nls -la\n```\n")
    assert (parsed.content, parsed.calls[0].arguments) == ("THOUGHT: look", {"command": "ls -la"})


def test_turns_to_learn_from_are_what_a_scaffold_writes():
    encoder = ChatEncoder(Tokenizer.train(["a"], Tokenizer.smallest(QWEN_ADDED), QWEN_ADDED))
    for scaffold in (SWE_AGENT, MINI_SWE_AGENT):
        calls = [ToolCall("bash", {"command": "ls -la"})]
        ids = encoder.encode_answer(scaffold.assistant(calls))
        assert encoder.tokenizer.decode(ids) == scaffold.render("", calls) + "<|im_end|>"


def test_mini_swe_agent_submits_only_if_the_command_succeeds():
    task = tiny.make_task()
    with sandbox(tiny.provider(), "tiny==1", starting_changes(task, tiny.PRISTINE)) as box:
        executor = MINI_SWE_AGENT.executor(task, SandboxWorkspace(box))
        for command, submitted in [
            ("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; false", False),
            ("echo not COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT", False),
            ("echo; echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT", True),
        ]:
            (result,) = executor.execute([ToolCall("bash", {"command": command})])
            assert result.submitted == submitted


def test_swe_agents_editor():
    task = tiny.make_task()
    executor = SWE_AGENT.executor(task, tiny.overlay(task))

    def edit(**arguments):
        (result,) = executor.execute([ToolCall("str_replace_editor", {"path": "/testbed/new.py", **arguments})])
        return result

    assert edit(command="create", file_text="a\nb\n").ok
    assert not edit(command="create", file_text="x").ok
    assert edit(command="insert", insert_line="1", new_str="between").ok
    assert edit(command="view").text == "     1\ta\n     2\tbetween\n     3\tb"
    assert edit(command="view", view_range=["2", "-1"]).text == "     2\tbetween\n     3\tb"
    for range_ in ([0, 1], [4, 5], [3, 2], ["x", "y"], [1]):
        assert not edit(command="view", view_range=range_).ok
    assert not edit(command="str_replace", old_str="absent", new_str="").ok
    assert not edit(command="str_replace", new_str="").ok
    assert edit(command="str_replace", old_str="between\n").ok
    assert edit(command="undo_edit").ok and edit(command="undo_edit").ok and edit(command="undo_edit").ok
    assert not edit(command="undo_edit").ok and executor.diff() == ""
    assert edit(command="delete").malformed
    assert edit(command="view", path="/testbed").text.split("\n") == sorted(tiny.PRISTINE)


def test_unknown_scaffolds_are_refused():
    with pytest.raises(UserError, match="^--scaffold: 'claude'; allowed: mini_swe_agent, .*nano"):
        SCAFFOLDS.resolve("claude", "--scaffold")


def test_every_registered_scaffold_has_its_name():
    assert [SCAFFOLDS.resolve(name).name for name in SCAFFOLDS] == list(SCAFFOLDS)


def test_variants_that_a_scaffold_does_not_offer_are_refused():
    for make in (SWE_AGENT.single, lambda: MINI_SWE_AGENT.in_template("hermes")):
        with pytest.raises(UserError, match="scaffold (swe_agent|mini_swe_agent) cannot"):
            make()


def test_scaffolds_with_a_shell_ask_for_a_guard():
    assert {scaffold.name for scaffold in ALL if scaffold.has_shell} == {*SCAFFOLDS} - {"nano", "answer"}


@pytest.mark.parametrize("text, commands, complete", [
    ('{"analysis": "a", "plan": "p", "commands": [{"keystrokes": "ls\\n"}]}', [("ls\n", 1.0)], False),
    ('Well. {"analysis": "a", "plan": "{p}", "commands": [{"keystrokes": "a\\n", "duration": 2}], "task_complete": "true"} So.',
     [("a\n", 2.0)], True),
    ('{"analysis": "a", "plan": "p", "commands": [{"keystrokes": "a", "duration": "long"}]}', [("a", 1.0)], False),
    ('{"analysis": "a", "plan": "p", "commands": [7], "task_complete": true}', [], True),
    ('{"analysis": "a", "commands": []}', None, False), ("no JSON", None, False), ('{"analysis": ', None, False),
    ('{"analysis": "a", "plan": "p", "commands": [{"duration": 1}]}', None, False), ("[1]", None, False)])
def test_terminus_reads_json_as_harbor_does(text, commands, complete):
    """What harbor 0.26's TerminusJSONPlainParser gave for the same texts."""
    parsed = TERMINUS_JSON.parse(text)
    assert (not parsed.problems) == (commands is not None)
    typed = [(call.arguments["keystrokes"], call.arguments["duration"]) for call in parsed.calls if call.name == "keystrokes"]
    assert typed == (commands or []) and any(call.name == "task_complete" for call in parsed.calls) == complete


@pytest.mark.parametrize("text, commands, complete", [
    ('<response>\n<analysis>a</analysis>\n<plan>p</plan>\n<commands>\n<keystrokes duration="0.1">ls <x> && y\n</keystrokes>\n'
     "</commands>\n</response>", [("ls <x> && y\n", 0.1)], False),
    ("<response><analysis>a</analysis><plan>p</plan><commands><keystrokes>a\n</keystrokes></commands>"
     "<task_complete>true</task_complete></response>", [("a\n", 1.0)], True),
    ("<response><analysis>a</analysis><plan>p</plan><commands></commands><task_complete/></response>", [], False),
    ("ls", None, False), ("<response><analysis>a</analysis><plan>p</plan></response>", None, False)])
def test_terminus_reads_xml_as_harbor_does(text, commands, complete):
    """What harbor 0.26's TerminusXMLPlainParser gave for the same texts."""
    parsed = TERMINUS_XML.parse(text)
    assert (not parsed.problems) == (commands is not None)
    typed = [(call.arguments["keystrokes"], call.arguments["duration"]) for call in parsed.calls
             if call.name == "keystrokes" and call.arguments["keystrokes"]]
    assert typed == (commands or []) and any(call.name == "task_complete" for call in parsed.calls) == complete


def test_terminus_asks_once_whether_the_task_is_complete():
    task = tiny.make_task()
    episode = Episode(task, TERMINUS_JSON, TERMINUS_JSON.executor(task, tiny.overlay(task)))
    end = TERMINUS_JSON.render("a\n\nb", [ToolCall("task_complete", {})])
    observation = episode.step(end)
    assert not observation.done and "once more" in observation.messages[0]["content"]
    assert episode.step(end).done and episode.reason is EndReason.SUBMITTED


def test_a_turn_of_text_ends_claude_codes_work_and_an_unreadable_one_does_not():
    task = tiny.make_task()
    episode = Episode(task, CLAUDE_CODE, CLAUDE_CODE.executor(task, tiny.overlay(task)))
    assert not episode.step("").done and not episode.step("I am", complete=False).done
    assert episode.step("I am done.").done and episode.reason is EndReason.SUBMITTED
    assert [turn.malformed for turn in episode.turns] == [True, True, False]
