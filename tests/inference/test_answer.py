"""Answers as clients get them, of a model whose words are given: calls, hang-ups, failures."""

import asyncio
import json
import time

import httpx
import pytest

from qcn_jax.chat import rendering, templates
from qcn_jax.inference import protocol
from qcn_jax.inference.sampling import Sampling
from qcn_jax.inference.scheduler import Request, Scheduler
from qcn_jax.inference.server import Service
from tests.inference.scripted import STOP, VIEW, Scripted, Speller

HELLO = [{"role": "user", "content": "hello"}]


def serve(engine: Scripted, form: str = templates.NATIVE) -> Service:
    return Service(Scheduler(engine), Speller(), lambda messages, tools: [*map(ord, "hello$")], frozenset([STOP]), "x", form)


def ask(engine: Scripted, *bodies: dict, path: str = "chat/completions", form: str = templates.NATIVE) -> list[httpx.Response]:
    """Answers to several requests at once."""
    service = serve(engine, form)

    async def run():
        transport = httpx.ASGITransport(service.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://x/v1/") as client:
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

    try:
        return asyncio.run(run())
    finally:
        service.scheduler.close()


def joined(response: httpx.Response) -> tuple[str, list, str]:
    """Content, calls and finish reason of a streamed answer."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert lines[-1] == "[DONE]", lines
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    deltas = [choice["delta"] for choice in choices]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
    return "".join(delta.get("content") or "" for delta in deltas), calls, choices[-1]["finish_reason"]


CALL = rendering.render_tool_call(rendering.ToolCall("view", {"path": "..."}))
OTHER = CALL.replace("=view>", "=shell>")


@pytest.mark.parametrize("text, content, calls, finish", [
    ("Use <tool_call> or `<function=f>`. " + CALL, "Use <tool_call> or `<function=f>`.", 1, "tool_calls"),
    (f"See <\\tool_call>\n{OTHER}\nis how.", f"See <tool_call>\n{OTHER}\nis how.", 0, "stop"),
    (CALL + "\n" + CALL, "", 2, "tool_calls"), (" a < b ", " a < b ", 0, "stop"),
    ("cut <tool_call>\n<function=", "cut <tool_call>\n<function=", 0, "stop"),  # no name, no call
])  # fmt: skip
def test_streamed_answers_are_the_whole_ones(text, content, calls, finish) -> None:
    body = {"messages": HELLO, "tools": VIEW}
    whole, streamed, single = ask(
        Scripted(text), body, body | {"stream": True}, body | {"parallel_tool_calls": False})
    choice = whole.json()["choices"][0]
    message = choice["message"]
    functions = [call["function"] for call in message.get("tool_calls", [])]
    assert joined(streamed) == (message["content"] or "", functions, choice["finish_reason"]) == (
        content, [{"name": "view", "arguments": '{"path": "..."}'}] * calls, finish)
    assert len(single.json()["choices"][0]["message"].get("tool_calls", [])) == min(1, calls)


@pytest.mark.parametrize("form", ["hermes", "glm46", "kimik2", "llama4_pythonic", "deepseekv32", "xml_cline"])
def test_calls_come_in_the_form_of_the_models_own_template(form) -> None:
    text = templates.render(form, "Let me look: [1] < 2.", [rendering.ToolCall("view", {"path": ["a"]})])
    body = {"messages": HELLO, "tools": VIEW}
    whole, streamed = ask(Scripted(text), body, body | {"stream": True}, form=form)
    message = whole.json()["choices"][0]["message"]
    functions = [call["function"] for call in message["tool_calls"]]
    assert joined(streamed) == (message["content"], functions, "tool_calls") == (
        "Let me look: [1] < 2.", [{"name": "view", "arguments": '{"path": ["a"]}'}], "tool_calls")


def test_values_that_no_encoding_has_are_answered() -> None:
    value = r'["\ud800"]'
    (response,) = ask(Scripted(CALL.replace("...", value)), {"messages": HELLO, "tools": VIEW})
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"path": ["\ud800"]}


def test_an_engine_that_fails_at_a_request_fails_no_other() -> None:
    text = "a text of more than one piece"
    bodies = [{"prompt": prompt, "max_tokens": 100} for prompt in ("one$", "two!$", "three$", "four$", "five!$")]
    answers = ask(Scripted(text, poison="!"), *bodies, path="completions")
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200, 500]
    assert {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200} == {text}
    assert answers[1].json()["error"]["message"] == "error: the engine failed: out of memory"


def test_an_engine_that_always_fails_fails_requests_and_not_the_scheduler() -> None:
    engine, pieces = Scripted(poison="$"), []
    scheduler = Scheduler(engine, most_waiting=2)
    make = lambda tokens=(ord("$"),), most=4: Request(tokens, Sampling(), most, 0, pieces.append)
    assert not scheduler.submit([make(), make(), make()])
    for tokens, most, line in (([], 4, "prompt has 0 tokens"), ([1] * 4096, 4, "prompt has 4096 tokens"), ([1], 0, "max_new_tokens: 0")):
        with pytest.raises(ValueError, match=line):
            scheduler.submit([make(), make(tokens, most)])
    assert scheduler.load() == (0, 0)
    for poison, want in (("$", "error: the engine failed: out of memory"), (None, "stop")):
        engine.poison = poison
        assert scheduler.submit([make()])
        until = time.time() + 60
        while not pieces and time.time() < until:
            time.sleep(0.01)
        assert pieces.pop().finish == want
    scheduler.close()
    assert not scheduler.submit([make()])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(stream) -> None:
    engine = Scripted(endless=True)
    engine.max_length = 10**6
    service = serve(engine)
    body = json.dumps({"messages": HELLO, "stream": stream}).encode()

    async def run():
        left = asyncio.Event()
        told = iter([{"type": "http.request", "body": body}])

        async def receive():
            if (message := next(told, None)) is None:
                await left.wait()
            return message or {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"",
                 "asgi": {"spec_version": "2.3"}}  # fmt: skip
        serving = asyncio.create_task(service.app()(scope, receive, send))
        await asyncio.to_thread(engine.running.wait, 60)
        assert service.scheduler.load()[0] == 1
        left.set()
        await asyncio.wait_for(serving, 60)
        for _ in range(6000):
            if service.scheduler.load() == (0, 0):
                break
            await asyncio.sleep(0.01)
        return service.scheduler.load()

    assert asyncio.run(run()) == (0, 0)
    service.scheduler.close()


def test_those_who_left_while_they_waited_take_no_place() -> None:
    engine = Scripted(endless=True)
    engine.max_length = 10**6
    scheduler = Scheduler(engine, most_waiting=4)
    make = lambda: Request([ord("$")], Sampling(), 10**5, 0, lambda piece: None)
    busy, gone = [make() for _ in range(3)], [make() for _ in range(4)]
    assert scheduler.submit(busy)
    engine.running.wait(60)
    until = time.time() + 60
    while not scheduler.submit(gone) and time.time() < until:
        time.sleep(0.01)
    for request in gone:
        request.cancel()
    while scheduler.load()[1] and time.time() < until:
        time.sleep(0.01)
    assert scheduler.load() == (3, 0)
    scheduler.close()


def test_sampling_that_no_device_can_draw_with_is_refused() -> None:
    for wrong in ({"top_k": 2**31}, {"top_k": -1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="must be finite"):
            Sampling(**wrong)
    assert protocol.read_options({"top_k": 2**40}, chat=True, vocabulary=9).sampling.top_k == 2**31 - 1
    for number in ("NaN", "1e999", "-Infinity"):
        with pytest.raises(protocol.BadRequest, match="not valid JSON"):
            protocol.read_body(b'{"temperature": %s}' % number.encode())
    with pytest.raises(protocol.BadRequest, match="deep"):
        protocol.read_body(b'{"a": %s1%s}' % (b"[" * 200, b"]" * 200))
