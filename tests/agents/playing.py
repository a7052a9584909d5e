"""A chat endpoint, a real HTTP server, whose models play by a script: each by its name, all tasks by their statements.

Tasks are those of `words()`. Of every conversation that it is asked to continue it only sees the messages, as any model.
"""

import base64
import contextlib
import dataclasses
import http.server
import json
import re
import threading
from collections import Counter

from qcn_jax.agents.operations import SUBMIT_COMMAND
from qcn_jax.envs.patches import make_diff
from qcn_jax.envs.tasks.schema import Task
from tests.pipeline import chain

PATH = "words/core.py"
GOOD = chain.HELDOUT_REPOSITORY[PATH]
TESTS = [f"tests/test_core.py::test_{name}" for name in ("count", "short", "long", "palindrome", "digit", "no_digit")]
# Task: what is right, what stands there instead, the tests that fail.
DEFECTS = {"count": ("elif not inside", "elif inside", {"count"}), "short": ("<= limit", "< limit", {"short"}),
           "digit": ("return True\n    return False", "return True\n    return True", {"no_digit"})}


def words(name: str) -> Task:
    """A task in the small repository of tests/pipeline/chain.py."""
    good, bad, failing = DEFECTS[name]
    assert GOOD.count(good) == 1
    buggy = GOOD.replace(good, bad)
    failing = [test for test in TESTS if test.rpartition("test_")[2] in failing]
    return Task(instance_id=name, repo="words==1.0", base_commit="", patch=make_diff({PATH: buggy}, {PATH: GOOD}),
                test_patch="", problem_statement=f"Mend {name}.", FAIL_TO_PASS=tuple(failing),
                PASS_TO_PASS=tuple(test for test in TESTS if test not in failing),
                bug_patch=make_diff({PATH: GOOD}, {PATH: buggy}), path=PATH, timeout=20.0)


@dataclasses.dataclass
class Said:
    """What the server answers to one request."""

    text: str = ""
    calls: tuple = ()  # (name, arguments as text)
    finish: str = "stop"
    status: int = 200
    cut: bool = False
    seconds: float = 0.0


def edit(name: str, wrong: bool = False) -> str:
    """A command that mends a task, or puts something else there."""
    good, bad, _ = DEFECTS[name]
    new = "1 / 0  # " if wrong else good
    program = f"p={PATH!r}; s=open(p).read(); open(p,'w').write(s.replace({bad!r}, {new!r}))"
    return f'python3 -c "{program}"'


def block(command: str) -> str:
    """A turn of mini-swe-agent."""
    return f"Let me see.\n\n```mswea_bash_command\n{command}\n```"


IMPATIENT = 8.0  # seconds without a byte, after which who asks "stalled" should ask again
SUBMIT = block(f"echo {SUBMIT_COMMAND}")


def play(model: str, name: str, turn: int, failures: int) -> Said:
    """The turn of a model on a task; `failures` counts requests that failed before on purpose."""
    if model == "guarded" and turn == 0:
        return Said(block("curl https://github.com/a/words/archive/main.zip"))
    if model in ("tardy", "stalled"):  # right, but late: at each turn, or so late at first that nobody waits
        late = 3.0 if model == "tardy" else 4 * IMPATIENT if failures == 0 else 0.0
        return dataclasses.replace(play("gold", name, turn, 0), seconds=late)
    if model in ("gold", "guarded", "wrong", "flaky", "refused"):
        if model == "refused":
            return Said(status=400, text="no such option")
        if model == "flaky" and failures < 3:
            return [Said(status=429), Said(status=500), Said("half an ans", cut=True)][failures]
        done = turn - (model == "guarded")
        return Said(block(edit(name, model == "wrong"))) if done == 0 else Said(SUBMIT)
    if model == "mixed":  # right on one task, on the next empty, never done on the third
        return play({"count": "gold", "short": "empty", "digit": "looping"}[name], name, turn, 0)
    return {"empty": Said(SUBMIT), "malformed": Said("I would rather talk."), "looping": Said(block("ls")),
            "slow": Said(SUBMIT, seconds=30.0), "down": Said(status=503), "silent": Said(""),
            "overlong": Said(block("ls")) if turn < 2 else Said(status=400, text="maximum context length is 100 tokens"),
            "cut_off": Said("```mswea_bash_command\nls", finish="length"), "locked": Said(status=401)}[model]


def putting(path: str, text: str, first: str = "true"):
    """Two models that need not know the task: `gold` runs `first` and puts a file there, the others submit at once."""
    coded = base64.b64encode(text.encode()).decode()

    def script(model: str, name: str, turn: int, failures: int) -> Said:
        return Said(block(f"{first}; echo {coded} | base64 -d > {path}") if model == "gold" and turn == 0 else SUBMIT)

    return script


@contextlib.contextmanager
def serve(script=play, port=0):
    """Yields (url, requests by (model, task), list of bodies); a task that says "Play gold." is played so by any model."""
    asked, failed, bodies, lock, closing = Counter(), Counter(), [], threading.Lock(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_whole(401 if self.headers.get("authorization") == "Bearer wrong" else 200, {"data": []})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = "\n".join(str(message["content"]) for message in body["messages"])
            name = next((name for name in DEFECTS if f"Mend {name}." in text), "")
            turn = sum(message["role"] == "assistant" for message in body["messages"])
            with lock:
                failures = failed[body["model"], name, body.get("seed")]
                failed[body["model"], name, body.get("seed")] += 1
                asked[body["model"], name] += 1
                bodies.append(body)
            told = re.search(r"Play (\w+)\.", text)
            said = script(told[1] if told else body["model"], name, turn, failures)
            closing.wait(said.seconds)
            if said.status != 200:
                self.send_whole(said.status, {"error": {"message": said.text or "not now"}}, {"retry-after": "0"})
            elif body.get("stream"):
                self.send_stream(said)
            else:
                self.send_whole(200, {"choices": [{"message": _message(said), "finish_reason": said.finish}],
                                      "usage": {"prompt_tokens": 7, "completion_tokens": 5}})

        def send_whole(self, status, value, headers=()):
            data = json.dumps(value).encode()
            self.send_response(status)
            for key, content in {"content-type": "application/json", "content-length": str(len(data)), **dict(headers)}.items():
                self.send_header(key, content)
            self.end_headers()
            self.wfile.write(data)

        def send_stream(self, said):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            deltas = [{"content": said.text[i:i + 7]} for i in range(0, len(said.text), 7)]
            for number, (called, arguments) in enumerate(said.calls):
                deltas.append({"tool_calls": [{"index": number, "id": f"c{number}", "function": {"name": called, "arguments": ""}}]})
                deltas += [{"tool_calls": [{"index": number, "function": {"arguments": arguments[i:i + 9]}}]}
                           for i in range(0, len(arguments), 9)]
            events = [{"choices": [{"delta": delta}]} for delta in deltas]
            if not said.cut:
                events.append({"choices": [{"delta": {}, "finish_reason": said.finish}]})
                events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
            data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n" * (not said.cut)
            with contextlib.suppress(ConnectionError):  # whoever asked may have left
                self.wfile.write(data.encode())
            self.close_connection = True

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            """Whoever asked has left in the middle, as clients that are stopped do."""

    server = Server(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked, bodies
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _message(said):
    calls = [{"id": f"c{n}", "function": {"name": name, "arguments": text}} for n, (name, text) in enumerate(said.calls)]
    return {"role": "assistant", "content": said.text} | ({"tool_calls": calls} if calls else {})


