"""The HTTP server: a real one on a real port, a tiny model behind it, a client in front."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.chat import rendering
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.inference import protocol
from qcn_jax.inference.checkpoint import load_engine
from qcn_jax.inference.engine import Generation
from qcn_jax.inference.sampling import Sampling
from qcn_jax.inference.scheduler import PIECE, Piece, Request, Scheduler
from qcn_jax.inference.server import Service, _Choice
from qcn_jax.model import Qwen3Next
from tests.pipeline.micro import MODEL

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = Tokenizer.train(["hello world, hello there\n"] * 3, 256 + 10 + len(ADDED), ADDED)
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, max_position_embeddings=96)
    params = jax.jit(Qwen3Next(config).init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"]
    hub.save(folder, config, params)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """`qcn serve` as a process of its own; its address."""
    command = [sys.executable, "-m", "qcn_jax", "serve", f"--checkpoint={folder}", "--port=0", "--slots=4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    line = ""
    while "serving" not in line:
        line = process.stderr.readline()
        assert line or process.poll() is None, "the server did not start"
    yield line.split()[-1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, 128 + signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()


def post(server: str, path: str, **body) -> httpx.Response:
    response = httpx.post(f"{server}/{path}", json=body, timeout=180)
    assert response.status_code in (200, 400), response.text
    return response


def events(server: str, path: str, **body) -> list[dict]:
    with httpx.stream("POST", f"{server}/{path}", json=body | {"stream": True}, timeout=180) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_are_the_engines_own(server, folder) -> None:
    loaded = load_engine(folder, slots=4, max_length=96, max_new_tokens=PIECE)  # the server's shapes, compiled already
    tokens = loaded.tokenizer.encode(rendering.render(HELLO, None, add_generation_prompt=True))
    loaded.engine.extend({0: tokens})
    want = Generation([], np.zeros(0), np.zeros(0), "length")
    while want.finish != "stop" and len(want.tokens) < 24:
        piece = loaded.engine.generate([0], seeds=[0], sampling=Sampling(0.0))[0]
        want = Generation(want.tokens + piece.tokens, np.append(want.logprobs, piece.logprobs), np.zeros(0), piece.finish)
    stopped = want.finish == "stop"
    text = loaded.tokenizer.decode(want.tokens[: -1 if stopped else None])
    response = post(server, "chat/completions", messages=HELLO, max_tokens=24, temperature=0, logprobs=True)
    assert response.status_code == 200, response.text
    body = response.json()
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == want.finish and body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["usage"] == protocol.usage_body(len(tokens), len(want.tokens))
    values = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    np.testing.assert_allclose(values, want.logprobs, atol=1e-4)
    plain = post(server, "completions", prompt=tokens, max_tokens=24, temperature=0).json()
    assert plain["choices"][0]["text"] == text
    streamed = events(server, "chat/completions", messages=HELLO, max_tokens=24, temperature=0)
    deltas = [event["choices"][0]["delta"] for event in streamed]
    assert deltas[0]["role"] == "assistant" and "".join(delta.get("content", "") for delta in deltas) == text
    assert streamed[-1]["choices"][0]["finish_reason"] == want.finish and len(streamed) > 3


def test_many_clients_get_what_each_would_get_alone(server) -> None:
    ask = lambda seed: post(
        server, "completions", prompt=f"hello {seed % 3}", max_tokens=5 + seed, seed=seed
    ).json()["choices"][0]["text"]  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(10) as threads:
        together = list(threads.map(ask, range(10)))
    assert together == [ask(seed) for seed in range(10)]
    assert len(set(together)) > 3


def test_samples_seeds_and_usage(server) -> None:
    ask = lambda seed: [c["text"] for c in post(
        server, "completions", prompt="hello", n=3, max_tokens=8, seed=seed).json()["choices"]]  # fmt: skip
    assert ask(1) == ask(1) != ask(2) and len(set(ask(1))) > 1
    last = events(server, "completions", prompt="hello", n=2, max_tokens=4, temperature=0,
                  stream_options={"include_usage": True})[-1]  # fmt: skip
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("path,body,parameter", [
    ("chat/completions", {}, "messages"), ("chat/completions", {"messages": [{"role": "robot"}]}, "messages"),
    ("chat/completions", {"messages": HELLO, "temperature": -1}, "temperature"),
    ("chat/completions", {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ("chat/completions", {"messages": HELLO, "n": 99}, "n"),
    ("chat/completions", {"messages": HELLO, "stop": [1]}, "stop"),
    ("chat/completions", {"messages": HELLO, "stream": "yes"}, "stream"),
    ("chat/completions", {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"messages": HELLO, "tools": [{}]}, "tools"),
    ("chat/completions", {"messages": [{"role": "user", "content": "hello " * 200}]}, "messages"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ("completions", {"prompt": 5}, "prompt"), ("completions", {"prompt": [99999]}, "prompt"),
    ("completions", {"prompt": ""}, "prompt"),
])  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(server, path, body, parameter) -> None:
    response = post(server, path, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error" and error["param"] == parameter


def test_paths_and_health(server) -> None:
    base = server.removesuffix("/v1")
    assert httpx.get(f"{server}/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{base}/health").json() == {"status": "ok", "active": 0, "waiting": 0}
    assert httpx.get(f"{base}/nothing").json()["error"]["message"] == "GET /nothing: no such endpoint"
    assert httpx.get(f"{server}/completions").status_code == 405
    assert httpx.post(f"{server}/completions", content=b"{").status_code == 400
    assert httpx.post(f"{server}/completions", content=b"[1]").status_code == 400


def test_a_client_that_leaves_frees_its_slots(server) -> None:
    with httpx.stream("POST", f"{server}/completions", timeout=600,
                      json={"prompt": "hello", "max_tokens": 90, "n": 4, "stream": True}) as response:  # fmt: skip
        next(response.iter_lines())
    health = f"{server.removesuffix('/v1')}/health"
    until = time.time() + 30
    while httpx.get(health).json()["active"] and time.time() < until:
        time.sleep(0.05)
    assert httpx.get(health).json()["active"] == 0


class Speller:
    """A tokenizer whose ids are characters."""

    vocab_size = 0x110000

    def token_bytes(self, id_: int) -> bytes:
        return chr(id_).encode()


def choice(stops=(), hold_calls=False) -> _Choice:
    service = Service(None, Speller(), None, frozenset([0]), "x")
    return _Choice(service, stops, hold_calls)


def feed(made: _Choice, text: str, size: int, finish: str = "stop") -> list[str]:
    ids = [ord(c) for c in text] + ([0] if finish == "stop" else [])
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    shown = []
    for number, piece in enumerate(pieces):
        shown.append(made.push(Piece(piece, [0.0] * len(piece), finish if number == len(pieces) - 1 else None)))
        if made.finish:
            break
    return shown


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_stop_texts_never_show_however_tokens_fall(size: int) -> None:
    made = choice(stops=("END", "\n\n"))
    assert "".join(feed(made, "one EN two\nthree END four", size)) == "one EN two\nthree " and made.finish == "stop"
    made = choice(stops=("END",))
    assert "".join(feed(made, "ends with EN", size, "length")) == "ends with EN" and made.finish == "length"


@pytest.mark.parametrize("size", [1, 4, 100])
def test_calls_are_held_back_from_streamed_content(size: int) -> None:
    made = choice(hold_calls=True)
    call = rendering.render_tool_call(rendering.ToolCall("view", {"path": "a.py"}))
    assert "".join(feed(made, f"look: {call}", size)) == "look: "
    assert rendering.parse_tool_calls(made.text).calls == [rendering.ToolCall("view", {"path": "a.py"})]


def test_tools_are_rendered_and_calls_come_back_as_openai_writes_them() -> None:
    assert protocol.read_tools({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}) is None
    messages = protocol.read_messages({"messages": [
        {"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "go"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]})  # fmt: skip
    text = rendering.render(messages, None, True)
    assert "<function=f>\n<parameter=x>\n1\n</parameter>" in text and "<tool_response>\ndone\n" in text
    body = protocol.tool_calls_body([rendering.ToolCall("f", {"x": 1})], streamed=True)[0]
    assert body["function"] == {"name": "f", "arguments": '{"x": 1}'} and body["index"] == 0
    with pytest.raises(protocol.BadRequest, match="JSON object"):
        protocol.read_messages({"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[1"}}]}]})  # fmt: skip


def test_an_engine_that_fails_fails_its_requests_and_not_the_server() -> None:
    class Broken:
        slots, max_length = 2, 32
        calls = 0

        def reset(self, slots):
            pass

        def extend(self, tokens):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("out of memory")

        def length(self, slot):
            return 5

        def part(self, slot):
            return 0

        def generate(self, slots, **_):
            return [Generation([1], np.zeros(1, np.float32), np.zeros(1, np.float32), "stop") for _ in slots]

    scheduler, pieces = Scheduler(Broken(), most_waiting=2), []
    make = lambda: Request([1], Sampling(), 4, 0, pieces.append)
    assert not scheduler.submit([make(), make(), make()])
    for tokens, most, line in (([], 4, "prompt has 0 tokens"), ([1] * 32, 4, "prompt has 32 tokens"), ([1], 0, "max_new_tokens: 0")):
        with pytest.raises(ValueError, match=line):
            scheduler.submit([make(), Request(tokens, Sampling(), most, 0, pieces.append)])
    assert scheduler.load() == (0, 0)
    for want in ("error: the engine failed: out of memory", "stop"):
        assert scheduler.submit([make()])
        until = time.time() + 10
        while not pieces and time.time() < until:
            time.sleep(0.01)
        assert pieces.pop().finish == want
    scheduler.close()
    assert not scheduler.submit([make()])
