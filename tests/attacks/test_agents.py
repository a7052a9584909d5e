"""What an agent, its endpoint and the repository that it works on do to the host that plays it: none ends or fills it."""

import base64
import gzip
import http.server
import json
import math
import tracemalloc
import xml.etree.ElementTree as ElementTree
import zlib

import pytest

from qcn_jax import files
from qcn_jax.agents import exports, fixing, running
from qcn_jax.agents.guard import Guard
from qcn_jax.agents.records import Record
from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.agents.workspace import OverlayWorkspace
from qcn_jax.chat.endpoint import Endpoint, EndpointError
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import pytest_options
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.synthesis import sources, survey
from qcn_jax.envs.synthesis.build import rules
from qcn_jax.envs.synthesis.languages import factory
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from tests.attacks.test_rows import SECONDS, spent
from tests.envs.network.local_index import serving
from tests.sandboxes import BROKEN, CALC, SOURCE, make_task

ROOM = 300 << 20  # bytes that an answer may take at most; those here would have no end

# --- endpoints


def whole(message=None, **more):
    return json.dumps({"choices": [{"message": {"content": "x", **(message or {})}, "finish_reason": "stop"}], **more})


def called(arguments):
    return {"tool_calls": [{"id": "a" * 10_000_000, "function": {"name": "b" * 10_000_000, "arguments": arguments}}]}


EVENT = b'data: {"choices": [{"delta": {"%s": "' + b"x" * 60_000 + b'"}}]}\n\n'
# What is sent again and again until nobody listens any more, under which status and headers.
ENDLESS = {
    "content": (200, {"content-type": "text/event-stream"}, EVENT % b"content"),
    "reasoning": (200, {"content-type": "text/event-stream"}, EVENT % b"reasoning_content"),
    "one line": (200, {"content-type": "text/event-stream"}, b"data: " + b"x" * 60_000),
    "document": (200, {"content-type": "application/json"}, b'{"choices": [' + b" " * 60_000),
    "refusal": (500, {}, b"no " * 20_000), "packed": (200, {"content-encoding": "gzip"}, gzip.compress(bytes(200_000_000)))}
# Whole answers, and what the turn then is: None where it is none.
ANSWERS = {
    "half a character": (whole({"content": "\ud800"}), "\ufffd"), "tokens without end": (whole(usage={"x": 0}).replace(
        '"x": 0', '"completion_tokens": 1e400'), None),
    "negative tokens": (whole(usage={"completion_tokens": -5}), "x"), "long names": (whole(called("{}")), "x"),
    "nested": ('{"choices":' + "[" * 100_000, None), "tokens by the thousand digits": (
        whole(usage={"x": 0}).replace('"x": 0', '"prompt_tokens": ' + "9" * 4000), "x"), "long": (whole({"content": "y" * 9_000_000}), "y"),
    "long arguments": (whole(called('{"x": "' + "y" * 9_000_000 + '"}')), "x")}


class Server(http.server.BaseHTTPRequestHandler):
    """Sends `self.server.answer`: a text once, or (status, headers, bytes) for ever."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append(body)
        status, headers, data = self.server.answer if isinstance(self.server.answer, tuple) else (200, {}, None)
        self.send_response(status)
        for name, value in {"connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            if data is None:
                self.wfile.write(self.server.answer.encode())
            while data is not None:
                self.wfile.write(data)
        except OSError:
            pass  # whoever asked has left

    do_GET = do_POST


@pytest.fixture(scope="module", name="server")
def _server():
    with serving(Server) as server:
        yield server


def asked(server, answer, messages=({"role": "user", "content": "x"},)):
    """The turn that an endpoint's answer is, and the most memory that reading it took."""
    server.answer = answer
    client = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "m", attempts=1, timeout=60.0)
    tracemalloc.start()
    try:
        return client.turn(list(messages), None), tracemalloc.get_traced_memory()[1]
    except EndpointError as error:
        return str(error), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        client.close()


@pytest.mark.parametrize("name", ENDLESS)
def test_answers_without_end(server, name):
    """They are cut off, or the endpoint has failed; before they fill the memory."""
    turn, most = asked(server, ENDLESS[name])
    assert turn.finish == "length" if name == "content" else isinstance(turn, str)
    assert most < ROOM


def test_whether_it_answers_does_not_depend_on_the_answers_end(server):
    server.answer = ENDLESS["document"]
    client = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "m")
    client.check()
    client.close()


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_odd_content(server, name):
    """Each is a turn that can be told again, or one line of words."""
    answer, content = ANSWERS[name]
    turn, _ = asked(server, answer)
    if content is None:
        assert isinstance(turn, str) and "\n" not in turn
        return
    assert turn.content[:1] == content and len(turn.content) < 1_000_000 and 0 <= turn.completion_tokens < 2**60
    assert all(len(call.id) < 1000 > len(call.name) and len(call.arguments) < 1_000_000 for call in turn.calls)
    json.dumps(turn.content).encode()
    turn.content.encode()


@pytest.mark.parametrize("said", ["\ud800", "caf\udce9", "\x00", "\u2028"])
def test_what_tools_print_is_told(server, said):
    """A file that is no UTF-8, say; servers are sent UTF-8 all the same."""
    turn, _ = asked(server, whole(), [{"role": "user", "content": said}])
    assert turn.content == "x" and json.loads(server.seen[-1].decode())["messages"]


# --- tool calls

HOSTILE = [math.inf, math.nan, 10**400, -1, "\ud800", "\0", "", [], [{}], [[1]], {}, None, True, "../../etc/passwd", "/etc/passwd",
           "x" * 100_000, ["\ud800"], [math.inf, 1], [10**400], "1e400", "nan", "9" * 5000, "[" * 5000, "*" * 300]
NAMES = ("mini_swe_agent", "swe_agent", "openhands", "qwen_code", "claude_code", "terminus_json", "terminus_xml", "nano",
         "simulated_user")


def executor(name):
    task = make_task()
    space = OverlayWorkspace({SOURCE: CALC, "a.py": "x" * 1000}, {SOURCE: BROKEN}, lambda *_: TestRun("ok", {}, {}, 0.0, "", 0))
    return SCAFFOLDS.resolve(name, "scaffold").executor(task, space)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_tools(name):
    """Whatever stands in a call, the agent is told what is wrong with it, and nothing leaves the workspace."""
    started = spent()
    for tool in SCAFFOLDS.resolve(name, "scaffold").tools:
        known = tool.parameters["properties"]
        honest = {key: {"string": "a.py", "integer": 1, "number": 1.0, "boolean": False, "array": []}[field["type"]]
                  for key, field in known.items()}
        for key in known:
            for value in HOSTILE:
                choices = known.get("command", {}).get("enum", [None])
                for choice in choices if key != "command" else [None]:
                    given = {**honest, key: value} | ({"command": choice} if choice else {})
                    (result,) = executor(name).execute([ToolCall(tool.name, given)])
                    assert "root:" not in result.text and len(result.text) < 100_000
    assert spent() - started < SECONDS


@pytest.mark.parametrize("name", ["qwen_code", "claude_code"])
def test_one_replacement_after_the_other(name):
    """A thousand times as long each time: the file lies in the host's memory."""
    one, tool = executor(name), {"qwen_code": "edit", "claude_code": "Edit"}[name]
    call = ToolCall(tool, {"file_path": "/testbed/a.py", "old_string": "x", "new_string": "x" * 1000, "replace_all": True})
    tracemalloc.start()
    results = [one.execute([call])[0] for _ in range(3)]
    assert tracemalloc.get_traced_memory()[1] < ROOM and [result.ok for result in results] == [True, False, False]
    tracemalloc.stop()


def test_what_is_kept_to_take_edits_back_is_bounded():
    one = executor("claude_code")
    tracemalloc.start()
    for number in range(60):
        call = ToolCall("Write", {"file_path": "/testbed/a.py", "content": f"{number}" + "x" * 3_000_000})
        assert one.execute([call])[0].ok
    assert tracemalloc.get_traced_memory()[0] < ROOM // 4
    tracemalloc.stop()


def test_occurrences_are_counted_in_time():
    one, started = executor("swe_agent"), spent()
    one.workspace.write("a.py", "a" * 2_000_000)
    (result,) = one.execute([ToolCall("str_replace_editor", {
        "command": "str_replace", "path": "/testbed/a.py", "old_str": "a" * 1_000_000, "new_str": "b"})])
    assert not result.ok and spent() - started < SECONDS


TURNS = {"response": "<response>" * 9000, "analysis": "<response>" + "<analysis>" * 9000, "keystrokes": (
    "<response><analysis>a</analysis><plan>b</plan><commands>" + "<keystrokes " * 9000 + "</commands></response>"),
    "version": '<response><analysis>a</analysis><plan>b</plan><commands><keystrokes duration="1.2.3">x</keystrokes></commands>'
               "</response>", "objects": "{" * 9000, "long number": '{"analysis": "a", "plan": "b", "commands": [{"keystrokes": "x", '
    '"duration": 1' + "0" * 400 + "}]}", "nested": '{"analysis": ' + "[" * 900 + "]" * 900 + ', "plan": "b", "commands": []}',
    "no number": '{"analysis": "a", "plan": "b", "commands": [{"keystrokes": "x", "duration": NaN}]}', "calls": "<tool_call>\n" * 9000}


@pytest.mark.parametrize("name", NAMES)
def test_turns_are_read_in_time(name):
    started = spent()
    for text in TURNS.values():
        parsed = SCAFFOLDS.resolve(name, "scaffold").parse(text)
        json.dumps([call.arguments for call in parsed.calls], allow_nan=False)
    assert spent() - started < SECONDS


COMMANDS = {
    "aliases": "shopt -s expand_aliases\n" + "".join(f"alias a{n}='a{n + 1}; a{n + 1}'\n" for n in range(30)) + "a0",
    "functions": "".join(f"f{n}() {{ f{n + 1}; f{n + 1}; }}\n" for n in range(40)) + "f0", "values": "a=x\n" + 'a="$a$a"\n' * 60 + "$a",
    "loops": "for a in {1,2,3,4,5,6,7,8,9}; do " * 8 + "echo x; " + "done; " * 8, "braces": "echo " + "{a,b}" * 40,
    "substitutions": "echo $(" * 2000 + "x" + ")" * 2000, "quotes": "echo '" + "\"'" * 9000, "documents": "cat <<E\n" * 900,
    "width": "printf '%999999999d' 1 | sh", "ranges": "echo x | tr a-\U0010ffff b | sh", "shells": "eval " * 4000 + "x"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_read_in_time(name):
    started = spent()
    Guard().check("bash", {"command": COMMANDS[name]})
    assert spent() - started < SECONDS


# --- qcn fix

WORKFLOW = "on: push\njobs: {a: {runs-on: x, steps: [{run: evil}]}}\n"


def test_a_fix_brings_nothing_that_was_not_graded():
    """What it prints is applied to somebody's repository, by `git apply`."""
    state = {SOURCE: BROKEN, "victim/__init__.py": "", "setup.py": "x = 1\n"}
    added = {"conftest.py": "import os\n", ".github/workflows/a.yml": WORKFLOW, "setup.py": "evil = 1\n"}
    patch = patches.make_diff(state, {**state, SOURCE: CALC, **added})
    printed = fixing.graded_part(patch, dict.fromkeys(added, "is no source"), state)
    assert patches.apply_changes(state, printed) == {SOURCE: CALC}


# --- repositories

DEEP = "[" * 100_000
DECLARED = [{"package.json": DEEP}, {"package.json": "[]"}, {"package.json": '{"scripts": []}'}, {"package.json": '{"scripts": {"test": 5}}'},
            {"package.json": '{"dependencies": 7}'}, {"pyproject.toml": f"a = {DEEP}"}, {"pyproject.toml": "project = 1"},
            {"pyproject.toml": "tool = 3"}, {"pyproject.toml": "[tool]\npytest = 3\npoetry = 4"},
            {"pyproject.toml": "[project]\noptional-dependencies = 3"}, {"pyproject.toml": "[tool.pytest.ini_options]\naddopts = 5"},
            {"pytest.ini": "[pytest]\naddopts = '"}]


@pytest.mark.parametrize("declared", DECLARED, ids=lambda declared: ascii(list(declared.items())[0])[:40])
def test_declarations_of_another_form(declared):
    """`qcn synthesize` and `qcn evaluate --repo` say so of that repository, and go on with the others."""
    texts = {"a.py": "", **declared}
    try:
        rules.plan(texts)
    except UserError as error:
        assert "\n" not in str(error)
    assert isinstance(pytest_options.milder(texts, "")[0], list)


def test_coverage_that_tests_wrote():
    """A Go profile that names a line beyond any file, a V8 report that is none."""
    files_ = {"a.go": "package a\n\nfunc f() {}\n", "a.js": "f()\n"}
    tracemalloc.start()
    reached = factory._go_coverage("a.go:1.1,99999999999999.1 1 1\na.go:1.1,999999999.1 1 1\n" + "b.go:1.1,900000000.1 1 1\n", files_)
    assert reached("a.go", 12) and tracemalloc.get_traced_memory()[1] < ROOM // 10
    tracemalloc.stop()
    url = "file:///testbed/a.js"
    part = {"url": url, "functions": [{"ranges": [{"startOffset": 0, "endOffset": 4, "count": 1}]}]}
    odd = [DEEP, "[]", '{"result": [{}]}', '{"result": 7}', '{"result": [{"url": "' + url + '", "functions": [{"ranges": [{"startOffset": []}]}]}]}']
    reached = factory._node_coverage([text.encode() for text in odd] + [json.dumps({"result": [part]}).encode()], files_)
    assert reached("a.js", 1) and not reached("a.js", 50)


def test_a_list_of_tests_that_unpacks_without_end():
    """Written by a conftest.py in the place of the true one."""

    for text in (base64.b85encode(zlib.compress(b"x" * 150_000_000, 1)).decode(), base64.b85encode(zlib.compress(b"[]")).decode(),
                 base64.b85encode(zlib.compress(DEEP.encode())).decode()):
        tracemalloc.start()
        with pytest.raises((ValueError, RecursionError, zlib.error)):
            survey._listing(text)
        assert tracemalloc.get_traced_memory()[1] < ROOM
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["my repo", "a" * 250, "né", "x.json", "-rf", "b\nc"])
def test_folders_called_anything(tmp_path, name):
    """Tasks and archives are called after the repository, and must be read again."""
    (tmp_path / name).mkdir()
    found = sources.locate(str(tmp_path / name)).name
    row = {**make_task().to_json(), "repo": found, "instance_id": f"pypi__{found}.0123abcd.negate_condition__0123abcd"}
    assert Task.from_json(row).repo == found and len(f"{found}.tar.gz") < 250 and found.isprintable()


# --- exports


def test_results_of_like_names_stay_apart(tmp_path):
    """Harbor's trials carry the first 64 characters of an id, SWE-agent's files an attempt behind it."""
    long = "a" * 70
    found = [Record(f"{long}1", 0, "resolved"), Record(f"{long}2", 0, "unresolved"), Record("x", 1, "resolved"),
             Record("x.1", 0, "unresolved")]
    folder = running.Folder(tmp_path, {})
    for record in found:
        files.write_json(folder.trajectory(record), {"messages": [], "instance_id": record.key, "info": {
            "exit_status": "Submitted", "submission": "", "model_stats": {}}})
    exports.export("harbor", folder, "m", "s", found)
    rewards = [path.read_text() for path in tmp_path.glob("harbor/*/verifier/reward.txt")]
    assert sorted(rewards) == ["0\n", "0\n", "1\n", "1\n"]
    exports.export("swe_agent", folder, "m", "s", found)
    kept = {json.loads(path.read_text())["environment"] for path in tmp_path.glob("swe_agent/*/*.traj")}
    assert kept == {record.key for record in found}
    folder.close()


def test_ids_that_are_names_of_results():
    """`junit.xml` would be a folder where --export=junit writes a file, after all the work."""
    for name in ("junit.xml", "INDEX.HTML", "summary.json", "preds.jsonl"):
        with pytest.raises(UserError, match="instance_id"):
            Task.from_json({**make_task().to_json(), "instance_id": name})
    ElementTree.fromstring(exports.junit("m\x00\x1b", "s", [Record("a", 0, "resolved")]))
