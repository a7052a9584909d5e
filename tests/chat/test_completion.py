"""Answers of chat endpoints: a stream cut anywhere is never taken for a whole one, and other servers' habits are read."""

import json

import pytest

from qcn_jax.chat.completion import Broken, Completion, RawCall, read_stream, read_whole


def lines(*events):
    return [f"data: {event if isinstance(event, str) else json.dumps(event)}" for event in events]


def delta(**values):
    finish = values.pop("finish", None)
    return {"choices": [{"index": 0, "delta": values, "finish_reason": finish}]}


STREAM = [delta(role="assistant", content=""), delta(content="Let "), delta(content="me"),
          delta(tool_calls=[{"index": 0, "id": "x", "function": {"name": "bash", "arguments": ""}}]),
          delta(tool_calls=[{"index": 0, "function": {"arguments": '{"command": '}}]),
          delta(tool_calls=[{"index": 1, "id": "y", "function": {"name": "submit", "arguments": "{}"}}]),
          delta(tool_calls=[{"index": 0, "function": {"arguments": '"ls"}'}}]), delta(finish="tool_calls"),
          {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}, "[DONE]"]
WHOLE = Completion("Let me", (RawCall("x", "bash", '{"command": "ls"}'), RawCall("y", "submit", "{}")), "tool_calls", "", 5, 9)


def test_a_stream_is_read_as_the_whole_answer_is():
    assert read_stream([": comment", "", *lines(*STREAM)]) == WHOLE
    message = {"content": "Let me", "tool_calls": [
        {"id": "x", "function": {"name": "bash", "arguments": '{"command": "ls"}'}},
        {"id": "y", "function": {"name": "submit", "arguments": "{}"}}]}
    assert read_whole(json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}],
                                  "usage": {"prompt_tokens": 5, "completion_tokens": 9}})) == WHOLE


@pytest.mark.parametrize("end", range(len(STREAM) - 3))
def test_a_stream_that_is_cut_is_broken(end):
    with pytest.raises(Broken):
        read_stream(lines(*STREAM[:end]))


@pytest.mark.parametrize("events", [[{"error": {"message": "overloaded"}}], ['{"choices": ['], ["7"], [{"choices": [7]}]])
def test_a_stream_of_something_else_is_broken(events):
    with pytest.raises(Broken):
        read_stream(lines(delta(content="x"), *events))


@pytest.mark.parametrize("text", ["", "<html>", "{}", '{"choices": []}', "[]", '{"error": {"message": "x"}}'])
def test_an_answer_that_is_none_is_broken(text):
    with pytest.raises(Broken):
        read_whole(text)


def test_other_servers_habits():
    calls = [{"function": {"name": "a", "arguments": {"x": 1}}}, {"id": "z", "function": {"name": "b", "arguments": None}}]
    message = {"content": [{"type": "text", "text": "x"}], "tool_calls": calls, "reasoning_content": "hm"}
    found = read_whole(json.dumps({"choices": [{"message": message}]}))
    assert found == Completion("x", (RawCall("call_0", "a", '{"x": 1}'), RawCall("z", "b", "{}")), "stop", "hm")
    unnumbered = [delta(tool_calls=[{"id": "p", "function": {"name": "a", "arguments": "{"}}]),
                  delta(tool_calls=[{"function": {"arguments": "}"}}]), delta(finish="stop")]
    assert read_stream(lines(*unnumbered)).calls == (RawCall("p", "a", "{}"),)
