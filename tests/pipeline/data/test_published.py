"""Agents' trajectories in the forms in which their makers publish them become OpenAI's messages with tools."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.config import ChatSource, RunConfig, SftConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import trajectories
from qcn_jax.pipeline.data.readers.chat import CHAT
from qcn_jax.pipeline.data.texts import Findings

BASH = {"type": "function", "function": {"name": "bash", "description": "Runs.", "parameters": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}}


def call(name="bash", id_="c1", **arguments):
    return {"type": "function", "id": id_, "function": {"name": name, "arguments": json.dumps(arguments)}}


def text(value):
    return [{"type": "text", "text": value}]


SWE_AGENT = {
    "environment": "main", "trajectory": [{"action": "ls", "observation": "a.py", "response": "I look.", "thought": "I look.",
                                           "query": [{"role": "user", "content": "Fix."}], "state": {}}],
    "history": [
        {"role": "system", "content": "You help.", "agent": "main", "message_type": "system_prompt"},
        {"role": "user", "content": text("Fix."), "agent": "main", "message_type": "observation"},
        {"role": "assistant", "content": "I look.", "thought": "I look.", "action": "ls", "agent": "main",
         "tool_calls": [call(command="ls")], "message_type": "action", "thinking_blocks": []},
        {"role": "tool", "content": text("a.py"), "agent": "main", "message_type": "observation", "tool_call_ids": ["c1"]},
        {"role": "assistant", "content": "Done.", "action": "submit", "tool_calls": [call("submit", "c2")]},
        {"role": "assistant", "content": "Exit due to cost limit", "action": "", "tool_calls": None}],
    "info": {"exit_status": "submitted", "submission": "diff"}, "replay_config": "{}"}  # fmt: skip
WITHOUT_HISTORY = {"info": {"exit_status": "submitted (exit_cost)"}, "trajectory": [{}, {
    "query": SWE_AGENT["history"][:4], "response": "Done.", "tool_calls": [call("submit", "c2")], "observation": ""}]}
EARLIER = {"info": {"exit_status": None}, "trajectory": [{"messages": SWE_AGENT["history"][:5]}]}
MINI = {"trajectory_format": "mini-swe-agent-1.1", "info": {"mini_version": "2.2.7", "exit_status": "Submitted"}, "messages": [
    {"role": "system", "content": "You help."}, {"role": "user", "content": "Fix."},
    {"role": "assistant", "content": "I look.", "tool_calls": [call(command="ls") | {"index": 0}], "function_call": None,
     "extra": {"actions": [{"command": "ls", "tool_call_id": "c1"}]}},
    {"role": "tool", "tool_call_id": "c1", "content": "a.py", "extra": {"returncode": 0}},
    {"role": "assistant", "content": "Done.", "tool_calls": [call("submit", "c2")]},
    {"role": "exit", "content": "diff", "extra": {"exit_status": "Submitted"}}]}  # fmt: skip
RESPONSES = MINI | {"messages": [
    *MINI["messages"][:2],
    {"object": "response", "output": [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "bash", "arguments": '{"command": "ls"}'}]},
    {"type": "function_call_output", "call_id": "c1", "output": "a.py"}, *MINI["messages"][4:]]}  # fmt: skip


def acted(action, response, message, **args):
    return {"source": "agent", "action": action, "args": args, "message": "Running.", "tool_call_metadata": {
        "function_name": "bash", "tool_call_id": "c1", "model_response": {"id": response, "choices": [{"message": message}]}}}


ZERO = [  # OpenHands 0.x
    {"id": 0, "source": "agent", "action": "system", "args": {"content": "You help.", "tools": [BASH]}},
    {"id": 1, "source": "user", "action": "message", "args": {"content": "Fix."}},
    {"id": 2, "source": "user", "action": "recall", "args": {"query": "Fix."}},
    {"id": 3, "observation": "agent_state_changed", "content": "", "extras": {"agent_state": "running"}},
    acted("run", "r1", {"role": "assistant", "content": "I look.", "tool_calls": [call(command="ls")]}, command="ls"),
    {"source": "agent", "observation": "run", "content": "a.py", "tool_call_metadata": {"tool_call_id": "c1"},
     "extras": {"command": "ls", "metadata": {"exit_code": -1, "working_dir": "", "prefix": "", "suffix": ""}}},
    acted("finish", "r2", {"role": "assistant", "content": "Done.", "tool_calls": [call("submit", "c2")]})]  # fmt: skip
ONE = [  # OpenHands from 1.0
    {"kind": "SystemPromptEvent", "source": "agent", "system_prompt": text("You help.")[0], "tools": [BASH]},
    {"kind": "ConversationStateUpdateEvent", "key": "status", "value": "running"},
    {"kind": "MessageEvent", "source": "user", "llm_message": {"role": "user", "content": text("Fix.")}},
    {"kind": "ActionEvent", "source": "agent", "thought": text("I look."), "tool_name": "bash", "tool_call_id": "c1",
     "tool_call": {"id": "c1", "name": "bash", "arguments": '{"command": "ls"}'}, "llm_response_id": "r1"},
    {"kind": "ObservationEvent", "source": "environment", "tool_name": "bash", "tool_call_id": "c1",
     "observation": {"kind": "TerminalObservation", "content": text("a.py"), "metadata": {"exit_code": -1}}},
    {"kind": "ActionEvent", "source": "agent", "thought": text("Done."), "tool_name": "finish", "tool_call_id": "c2",
     "tool_call": {"id": "c2", "name": "submit", "arguments": "{}"}, "llm_response_id": "r2"}]  # fmt: skip
SMITH = {"instance_id": "a__b.1", "resolved": True, "model": "m", "traj_id": "t", "patch": "diff",
         "messages": json.dumps(SWE_AGENT["history"][:5])}
FORMS = {
    "a.traj": SWE_AGENT, "query.traj": WITHOUT_HISTORY, "earlier.traj": EARLIER, "b.traj.json": MINI,
    "responses.json": RESPONSES, "output.jsonl": {"instance_id": "a", "history": ZERO, "test_result": {"git_patch": ""}},
    "pairs.jsonl": {"history": [[event, {"observation": "null", "content": ""}] for event in ZERO]},
    "trajectory.json": ZERO, "events.json": ONE, "one.jsonl": {"history": ONE, "test_result": {"resolved": True}},
    "tool.parquet": SMITH, "rebench.jsonl": {"trajectory": SWE_AGENT["history"][:5], "tools": [json.dumps(BASH)], "resolved": 1},
}  # fmt: skip


def written(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([value]), path)
    else:
        path.write_text(json.dumps(value, indent=None if name.endswith("l") else 1) + "\n")
    return path


def read(path, malformed="stop", **options):
    findings = Findings(malformed, "--config.sft.malformed")
    return list(CHAT.read(None, ChatSource(path=str(path), options=options), findings, lambda: False)), findings


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_messages(tmp_path, name):
    (found,), findings = read(written(tmp_path, name, FORMS[name]))
    assert findings.read == 1 and found.place == f"{tmp_path}/{name}:1"
    assert [(message["role"], message["content"]) for message in found.messages] == [
        ("system", "You help."), ("user", "Fix."), ("assistant", "I look."), ("tool", "a.py"), ("assistant", "Done.")]
    assert [message["tool_calls"] for message in found.messages if message["role"] == "assistant"] == [
        [{"id": "c1", "name": "bash", "arguments": {"command": "ls"}}], [{"id": "c2", "name": "submit", "arguments": {}}]]
    assert found.messages[3]["tool_call_id"] == "c1" and all("special" not in message for message in found.messages)
    assert found.tools == ([BASH] if name in ("output.jsonl", "pairs.jsonl", "trajectory.json", "events.json", "one.jsonl",
                                              "rebench.jsonl") else None)


def test_a_folder_of_runs_is_read_for_its_trajectories_alone(tmp_path):
    for name in ("x/a.traj", "x/preds.json", "y/b.traj.json"):
        written(tmp_path, name, FORMS.get(name[2:], {"a": {"model_patch": ""}}))
    CHAT.check(RunConfig(sft=SftConfig()), ChatSource(path=str(tmp_path)), "--config.sft.sources.a")
    assert [found.place for found in read(tmp_path)[0]] == [f"{tmp_path}/x/a.traj:1", f"{tmp_path}/y/b.traj.json:1"]


def test_text_forms_and_lists_of_rows(tmp_path):
    plain = [{"role": "user", "content": "Fix."}, {"role": "assistant", "content": "I look.\n\n```\nls\n```"}]
    (found, again), _ = read(written(tmp_path, "a.json", [SMITH | {"messages": json.dumps(plain)}, {"messages": plain}]))
    assert found.messages == again.messages and again.place.endswith("a.json:2") and "tool_calls" not in found.messages[1]


def test_answers_with_several_calls_errors_and_shell_notes(tmp_path):
    both = {"role": "assistant", "content": "Two.", "tool_calls": [call(command="a"), call(id_="c2", command="b")]}
    shell = {"exit_code": 1, "working_dir": "/w", "py_interpreter_path": "/py", "prefix": "<", "suffix": ">"}
    note = "<out>\n[Current working directory: /w]\n[Python interpreter: /py]\n[Command finished with exit code 1]"
    zero = [*ZERO[:2], acted("run", "r1", both), acted("run", "r1", both),
            {"observation": "run", "content": "out", "extras": {"metadata": shell}, "tool_call_metadata": {"tool_call_id": "c1"}},
            {"observation": "error", "content": "bad", "tool_call_metadata": {"tool_call_id": "c2"}},
            {"observation": "error", "content": "worse"}, {"source": "agent", "action": "message", "args": {"content": "Hm."}}]
    parts = [{**ONE[3], "thought": text("Two.") * (n == 1), "tool_call": {"id": f"c{n}", "name": "bash", "arguments": "{}"}}
             for n in (1, 2)]
    one = [*ONE[:3], *parts,
           {"kind": "ObservationEvent", "tool_call_id": "c1", "observation": {"content": "out", "metadata": shell}},
           {"kind": "AgentErrorEvent", "tool_call_id": "c2", "error": "bad"},
           {"kind": "UserRejectObservation", "tool_call_id": "c3", "rejection_reason": "no"},
           {"kind": "MessageEvent", "source": "agent", "llm_message": {"role": "assistant", "content": text("Hm.")}}]  # fmt: skip
    for history, told in ((zero, ("tool", "bad\n[Error occurred in processing last action]")), (one, ("tool", "bad"))):
        (found,), _ = read(written(tmp_path, "a.jsonl", {"history": history}))
        assert [len(message.get("tool_calls", ())) for message in found.messages[2:4]] == [2, 0]
        said = [(message["role"], message["content"]) for message in found.messages[2:]]
        assert said[:3] == [("assistant", "Two."), ("tool", note), told] and said[-1] == ("assistant", "Hm.")
        assert len(said) == 5


def test_ours_come_back_as_they_were_made(tmp_path):
    messages = ({"role": "user", "content": [{"type": "text", "text": "<|1|>", "special": True}]},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "edit", "arguments": {"line": "<|1|>"}, "special": ["line"]}],
                 "template": "hermes"},
                {"role": "tool", "content": "FAILED"}, {"role": "assistant", "content": "Done."})  # fmt: skip
    made = Trajectory("t", "r", "s", "hermes", messages, "diff", 1, (False, True), failed=(0,))
    want = trajectories.conversation(made).messages
    for value in ({"key": "t", "value": [made.to_json()]}, made.to_json()):
        path = written(tmp_path, "a.jsonl", value)
        (found,), _ = read(path, marks=True, resolved=True, submitted=True)
        assert [message.get("weight", 1.0) for message in found.messages] == [message.get("weight", 1.0) for message in want]
        assert [[message.get(key) for key in ("role", "content", "tool_calls")] for message in found.messages] == [
            [message.get(key) for key in ("role", "content", "tool_calls")] for message in want]
        assert found.messages[1]["template"] == "hermes"
        # Without the option what a file marks is text like any other.
        assert "special" not in json.dumps(read(path)[0][0].messages)


def test_options_leave_out_what_did_not_resolve_or_end_and_count_it(tmp_path):
    rows = [{**SMITH, "resolved": said, "exit_status": status} for said, status in
            ((True, "submitted"), (False, "submitted"), (1, "submitted (exit_cost)"), (0.5, ""))]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(path)[0]) == 4
    found, findings = read(path, resolved=True)
    assert len(found) == 2 and findings.left_out == {"not resolved": 2} and findings.read == 4
    with pytest.raises(UserError, match="a.jsonl:4: does not say how it ended, which options.submitted asks for"):
        read(path, submitted=True)
    found, findings = read(path, "skip", submitted=True)
    assert len(found) == 2 and findings.left_out == {"not submitted": 1} and findings.malformed == 1
    assert len(read(written(tmp_path, "b.jsonl", {"history": ZERO}), submitted=True)[0]) == 1
    assert read(written(tmp_path, "b.jsonl", {"history": ZERO[:-1]}), submitted=True)[1].left_out == {"not submitted": 1}
    for report in ({"report": {"resolved": True}}, {"test_result": {"report": {"resolved": True}}}, {"reward": 1.0}):
        assert len(read(written(tmp_path, "b.jsonl", {"history": ZERO, **report}), resolved=True)[0]) == 1


def test_tools_of_rows_that_list_none_come_from_a_file(tmp_path):
    tools = written(tmp_path / "t", "tools.json", [BASH])
    (found,), _ = read(written(tmp_path, "a.traj", SWE_AGENT), tools=str(tools))
    assert found.tools == [BASH]
    tools.write_text('[{"function": {}}]')
    with pytest.raises(UserError, match=r"a.options.tools: .*tools.json: tools\[0\]: expected an object"):
        source = ChatSource(path=str(tmp_path / "a.traj"), options={"tools": str(tools)})
        CHAT.check(RunConfig(), source, "--config.sft.sources.a")


def test_reasoning_is_kept_or_left_out(tmp_path):
    thinking = {**SWE_AGENT["history"][2], "thinking_blocks": [{"type": "thinking", "thinking": "Hm."}]}
    path = written(tmp_path, "a.traj", SWE_AGENT | {"history": [*SWE_AGENT["history"][:2], thinking]})
    assert read(path)[0][0].messages[2]["reasoning_content"] == "Hm."
    assert "reasoning_content" not in read(path, reasoning="drop")[0][0].messages[2]


@pytest.mark.parametrize("row, line", [
    ({"trajectory": [{}], "info": {}}, "trajectory: its steps keep no messages"),
    ({"history": [ZERO[0], 3]}, r"history\[1\]: expected an event, got int"),
    ({"history": [ZERO[0], {"source": "agent", "action": "run", "args": {}}]}, r"history\[1\]: action 'run' has no tool_call_metadata"),
    ({"history": [ZERO[0], {"source": "agent", "action": ["run"]}]}, "is no trajectory of a known form: .*unhashable"),
    ({"history": [ONE[0], {**ONE[3], "tool_call": None}]}, r"history\[1\]: the action has no tool_call"),
    ({"history": [ONE[0], {**ONE[3], "thought": text(3)}]}, r"messages\[1\].content: expected text"),
    ({"history": ZERO[:2]}, "no assistant's message counts"),
    ({**MINI, "messages": ["a"]}, r"messages\[0\]: expected an object, got str"),
    ({**MINI, "messages": [{"object": "response", "output": 3}]}, "is no trajectory of a known form: 'int' object is not iter"),
    ({**SMITH, "messages": "[{"}, "messages: is not valid JSON"),
    ({**SMITH, "tools": ["{"]}, r"tools\[0\]: is not valid JSON"),
])  # fmt: skip
def test_malformed_trajectories_are_named(tmp_path, row, line):
    with pytest.raises(UserError, match=f"a.jsonl:1: .*{line}") as caught:
        read(written(tmp_path, "a.jsonl", row))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data, line", [
    (b'{"history": [', "a.traj:1: cannot be read as JSON: Expecting value"), (b"3", "a.traj:1: cannot be read as JSON: expected an obj"),
    (b"[3]", "a.traj:1: expected a JSON object, got int"), (b"\xff", "a.traj:1: cannot be read as JSON: .*utf-8"),
])  # fmt: skip
def test_files_that_are_no_trajectory_are_named(tmp_path, data, line):
    (tmp_path / "a.traj").write_bytes(data)
    with pytest.raises(UserError, match=line):
        read(tmp_path)
    assert read(tmp_path, "skip")[1].malformed == 1
