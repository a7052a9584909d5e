"""The Qwen3-Coder template against texts made with the published one."""

import json
import pathlib

import pytest

from qcn_jax.chat import rendering
from qcn_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "qwen3_coder_chat.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
USER = {"role": "user", "content": "Mend f."}


@pytest.mark.parametrize("case", CASES)
def test_renders_what_the_published_template_renders(case):
    assert rendering.render(case["messages"], case["tools"], case["add_generation_prompt"]) == case["text"]


def test_generated_segments_are_what_follows_the_generation_prompt():
    call = rendering.ToolCall("view", {"path": "a.py"})
    history = [USER, {"role": "assistant", "content": "Look.", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
    prompt = rendering.render(history[:1], add_generation_prompt=True)
    pieces = list(rendering.segments(history))
    generated = [piece.text for piece in pieces if piece.kind == "generated"]
    assert generated == [rendering.render_assistant("Look.", [call]) + "<|im_end|>"]
    assert rendering.render(history).startswith(prompt + generated[0])
    assert [piece.text for piece in pieces if piece.kind == "text"] == ["Mend f.", "x"]


def test_tool_calls_may_be_objects_or_mappings_and_content_a_list_of_parts():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}
    one = rendering.render([USER, {"role": "assistant", "tool_calls": [call]}])
    other = rendering.render(
        [
            {"role": "user", "content": [{"type": "text", "text": "Mend "}, {"type": "text", "text": "f."}]},
            {"role": "assistant", "content": "", "tool_calls": [rendering.ToolCall("f", {"a": "1"})]},
        ]
    )
    assert one == other


@pytest.mark.parametrize(
    "messages, named",
    [
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role.*'robot'"),
        ([USER, {"role": "user", "content": 5}], r"messages\[1\].content"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].*tool message"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}],
            r"messages\[1\].tool_calls.*mapping",
        ),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "", "arguments": {}}]}], "cannot name"),
    ],
)
def test_bad_messages_are_named(messages, named):
    with pytest.raises(UserError, match=named):
        rendering.render(messages)
