"""The HTTP server: a real one on a real port, a tiny model behind it, a client in front."""

import concurrent.futures
import dataclasses
import json
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcn_jax import hub
from qcn_jax.chat import rendering
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.inference import protocol
from qcn_jax.inference.answer import Choice
from qcn_jax.inference.checkpoint import load_engine
from qcn_jax.inference.generation import Generation
from qcn_jax.inference.sampling import Sampling
from qcn_jax.inference.scheduler import PIECE, Piece
from qcn_jax.inference.server import Service
from qcn_jax.model import Qwen3Next
from tests.inference.scripted import VIEW, Speller
from tests.inference.speaking import serving
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
    with serving(folder, "--slots=4", seconds=30) as address:
        yield address


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
    ("completions", {"prompt": ""}, "prompt"), ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [True]}, "prompt"), ("completions", {"prompt": ["hello", 5]}, "prompt"),
    ("completions", {"prompt": ["hello"] * 200}, "prompt"), ("completions", {"prompt": "hello", "logprobs": 21}, "logprobs"),
    ("completions", {"prompt": "hello", "echo": True, "logprobs": 0}, "logprobs"),
    ("completions", {"prompt": "hello", "best_of": 3}, "best_of"), ("completions", {"prompt": "hello", "suffix": "x"}, "suffix"),
    ("completions", {"prompt": "hello", "tools": [{}]}, "tools"), ("completions", {"prompt": "hello", "top_k": -1}, "top_k"),
    *(("chat/completions", {"messages": HELLO, name: value}, name) for name, value in (
        ("top_logprobs", 2), ("response_format", {"type": "json_object"}), ("logit_bias", {"5000000": 1}), ("echo", True),
        ("frequency_penalty", 2.5), ("presence_penalty", "a"), ("min_p", 1.1), ("logit_bias", {"a": 1}), ("logit_bias", [5]),
        ("logit_bias", {"5": 101}), ("repetition_penalty", 0), ("functions", [{}]), ("no_such_field", 1),
        ("parallel_tool_calls", 5), ("logprobs", 5), ("tool_choice", {"type": "function"}), ("tools", 5))),
    *(("chat/completions", {"messages": HELLO, "tools": [{"function": function}]}, "tools") for function in (
        5, {"name": 5}, {"name": "a b"}, {"name": "f", "parameters": True}, {"name": "<|im_end|>"})),
    *(("chat/completions", {"messages": [*HELLO, {"role": "assistant", **said}]}, "messages") for said in (
        {"content": 5}, {"content": [5]}, {"content": [{"type": "image_url"}]}, {"tool_calls": 5}, {"tool_calls": [5]},
        {"tool_calls": [{"function": {"name": "f", "arguments": "[NaN]"}}]}, {"function_call": {"name": "f"}},
        {"tool_calls": [{"function": {"name": "a b", "arguments": "{}"}}]})),
])  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(server, path, body, parameter) -> None:
    response = post(server, path, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error" and error["param"] == parameter


def test_paths_and_health(server) -> None:
    base = server.removesuffix("/v1")
    assert httpx.get(f"{server}/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{server}/models/tiny").json()["id"] == "tiny"
    unknown = httpx.get(f"{server}/models/other/name")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert httpx.post(f"{server}/completions", json={"model": "other", "prompt": "x"}).status_code == 404
    health = httpx.get(f"{base}/health").json()
    assert health.pop("prompt_tokens").keys() == {"prefilled", "reused"}
    assert health.pop("blocks").keys() == {"swapped_out", "swapped_in", "copied", "dropped", "recomputed_tokens"}
    assert health == {"status": "ok", "active": 0, "waiting": 0}
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


def choice(stops=(), tools=None) -> Choice:
    return Choice(Service(None, Speller(), None, frozenset([0]), "x"), stops, tools)


def feed(made: Choice, text: str, size: int, finish: str = "stop") -> list[str]:
    ids = [ord(c) for c in text] + ([0] if finish == "stop" else [])
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    shown = []
    for number, piece in enumerate(pieces):
        shown.append(made.push(Piece(piece, [0.0] * len(piece), finish if number == len(pieces) - 1 else None)))
        if made.finish:
            break
    return [*shown, made.end()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_stop_texts_never_show_however_tokens_fall(size: int) -> None:
    made = choice(stops=("END", "\n\n"))
    assert "".join(feed(made, "one EN two\nthree END four", size)) == "one EN two\nthree " and made.finish == "stop"
    made = choice(stops=("END",))
    assert "".join(feed(made, "ends with EN", size, "length")) == "ends with EN" and made.finish == "length"


@pytest.mark.parametrize("size", [1, 4, 100])
def test_calls_are_held_back_from_streamed_content(size: int) -> None:
    made = choice(tools=VIEW)
    call = rendering.render_tool_call(rendering.ToolCall("view", {"path": "a.py"}))
    assert "".join(feed(made, f"use <tool_call> to look: {call}", size)) == "use <tool_call> to look:"
    assert made.calls == [rendering.ToolCall("view", {"path": "a.py"})] and made.finish == "tool_calls"


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


def test_what_asks_for_nothing_is_taken(server) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, {"role": "assistant", "content": [
        {"type": "text", "text": "hi"}]}, *HELLO], "max_tokens": 2, "model": "tiny", "user": "me", "logit_bias": {},
        "frequency_penalty": 0, "response_format": {"type": "text"}, "top_logprobs": None, "tools": [], "top_k": 2**40}  # fmt: skip
    assert post(server, "chat/completions", **body).status_code == 200


def test_biases_penalties_and_alternatives(server) -> None:
    ask = lambda **more: post(server, "completions", prompt="hello", max_tokens=6, temperature=0, **more).json()["choices"][0]
    plain, shown = ask(logprobs=0), ask(logprobs=3)
    assert plain["text"] == shown["text"] and plain["logprobs"]["top_logprobs"] is None
    for best, value in zip(shown["logprobs"]["top_logprobs"], shown["logprobs"]["token_logprobs"], strict=True):
        assert 1 <= len(best) <= 3 and max(best.values()) == pytest.approx(value, abs=1e-5)  # greedy takes the best
    forced = ask(logit_bias={"70": 100}, logprobs=0)["logprobs"]["tokens"]
    assert len(set(forced)) == 1 and ask(logit_bias={"70": 100}, frequency_penalty=2, min_p=0.5)["text"] == "".join(forced)
    said = post(server, "chat/completions", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2,
                presence_penalty=1.5, repetition_penalty=1.2).json()["choices"][0]["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 and "bytes" in entry["top_logprobs"][0] for entry in said)


def test_prompts_in_a_list_are_answered_each_as_alone(server) -> None:
    prompts, options = ["hello", "hello world"], {"max_tokens": 5, "temperature": 0, "echo": True}
    body = post(server, "completions", prompt=prompts, n=2, **options).json()
    alone = [post(server, "completions", prompt=prompt, **options).json() for prompt in prompts]
    texts = [answer["choices"][0]["text"] for answer in alone]
    assert [c["text"] for c in body["choices"]] == [texts[0]] * 2 + [texts[1]] * 2
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == sum(answer["usage"]["prompt_tokens"] for answer in alone)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    streamed = events(server, "completions", prompt=prompts, **options)
    for index, text in enumerate(texts):
        assert "".join(c["text"] for e in streamed for c in e["choices"] if c["index"] == index) == text


def test_log_probabilities_hold_the_tokens_bytes(server) -> None:
    body = post(server, "chat/completions", messages=HELLO, max_tokens=40, logprobs=True, seed=5, temperature=2).json()
    entries = body["choices"][0]["logprobs"]["content"]
    raw = b"".join(bytes(entry["bytes"]) for entry in entries if entry["token"] not in ADDED)
    assert any(entry["token"] == "\ufffd" and len(entry["bytes"]) == 1 for entry in entries)  # a part of a character
    assert raw.decode("utf-8", "replace") == body["choices"][0]["message"]["content"]


def test_large_bodies_are_refused_as_they_come_and_stop_nobody(server) -> None:
    def chunks():
        for _ in range(40):
            yield b" " * (1 << 20)

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        asked = [
            threads.submit(httpx.post, f"{server}/completions", content=chunks(), timeout=180),
            threads.submit(httpx.post, f"{server}/completions", json={"prompt": "hello " * 1_400_000}, timeout=180),
            threads.submit(httpx.post, f"{server}/chat/completions", timeout=180, json={
                "messages": [{"role": "user", "content": " " * 5000}]}),
        ]  # fmt: skip
        answers = []
        for each in asked:
            try:
                answers.append(each.result().status_code)
            except (httpx.WriteError, httpx.RemoteProtocolError):  # refused before it was all sent
                answers.append(413)
    assert answers == [413, 400, 400]
    assert httpx.get(f"{server.removesuffix('/v1')}/health").status_code == 200


SOUP = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=5),
              st.sampled_from(["user", "assistant", "tool", "function", "hello", "text", "\ud800", "<|im_end|>"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([
        "role", "content", "type", "text", "function", "name", "arguments", "parameters", "properties", "tool_calls", "$ref",
        "anyOf", "enum", "description"]), inner, max_size=4)), max_leaves=12,
)  # fmt: skip
FIELDS = st.dictionaries(st.sampled_from([
    "messages", "prompt", "tools", "model", "n", "stop", "stream", "stream_options", "temperature", "top_p", "top_k", "seed",
    "logprobs", "max_tokens", "tool_choice", "parallel_tool_calls", "echo"]), SOUP, max_size=5)  # fmt: skip


def test_no_body_is_answered_with_500_and_no_slot_is_kept(server) -> None:
    client = httpx.Client(timeout=180)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(FIELDS, SOUP, st.binary(max_size=30)), st.sampled_from(["messages", "prompt", "tools"]), SOUP)
    def check(body, good, more):
        if isinstance(body, dict) and good != "prompt":
            body = {"messages": HELLO, "max_tokens": 3, **body}
            body |= {"tools": [{"function": {"name": "f", "parameters": more}}]} if good == "tools" else {}
        elif isinstance(body, dict):
            body = {"prompt": "hello", "max_tokens": 3, **body}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = "completions" if good == "prompt" else "chat/completions"
        response = client.post(f"{server}/{path}", content=data)
        assert response.status_code in (200, 400, 404), (response.status_code, data)
        if response.status_code != 200:
            assert response.json()["error"]["message"]

    check()
    health = httpx.get(f"{server.removesuffix('/v1')}/health").json()
    assert (health["active"], health["waiting"]) == (0, 0)
