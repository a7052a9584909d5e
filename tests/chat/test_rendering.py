"""The Qwen3-Coder template against texts made with the published one."""

import json
import pathlib

import jinja2
import pytest

from qcn_jax.chat import jinja_template, rendering
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


PARTS = [{"type": "text", "text": "Mend "}, {"type": "text", "text": "f. "}]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"a": "1", "b": [None, "é"], "c": True}}}]
ODD_TOOL = {"type": "function", "function": {"name": "f", "description": None, "parameters": {
    "properties": {"a": True, "b": {"type": ["string", "null"], "default": None}, "c": "x", "d": {"enum": ["é"]}},
    "required": ["a"]}}}  # fmt: skip
CONVERSATIONS = [
    ([{"role": "user", "content": PARTS}], None),
    ([{"role": "system", "content": PARTS}, {"role": "user", "content": None}], [ODD_TOOL]),
    ([USER, {"role": "assistant", "content": PARTS}, USER], [{"name": "f", "parameters": 5}, {"name": "g", "parameters": {
        "properties": [1]}}]),
    ([USER, {"role": "assistant", "content": PARTS, "tool_calls": CALLS * 2}, {"role": "tool", "content": PARTS},
      {"role": "tool", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant"}, {"role": "system", "content": []}], None),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}, {"name": "g", "arguments": {}}]}], None),
    ([{**USER, "tool_calls": 5}], None), ([], [ODD_TOOL]),
]  # fmt: skip
REFUSED = [
    ([{"role": "robot", "content": "x"}], None), ([{"content": "x"}], None), ([{"role": "user", "content": 5}], None),
    ([USER, {"role": "assistant", "content": {"text": "x"}}], None), ([{"role": "tool", "content": "x"}], None),
    ([{"role": "system", "content": 5}], None), ([USER, {"role": "tool", "content": [5]}], None),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], None),
    ([USER, {"role": "assistant", "tool_calls": 5}], None), ([USER, {"role": "assistant", "tool_calls": [5]}], None),
    ([USER, {"role": "assistant", "tool_calls": {"a": 1}}], None),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}], None),
    ([USER], [{}]), ([USER], [5]), ([USER], [{"function": 5}]),
]  # fmt: skip


@pytest.fixture(scope="module")
def written():
    """The template file as transformers reads it."""
    reason = "not installed: transformers"
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils", reason=reason)
    template = chat_template_utils._compile_jinja_template(jinja_template.chat_template())
    return lambda messages, tools: template.render(messages=messages, tools=tools, add_generation_prompt=True)


@pytest.mark.parametrize("messages, tools", CONVERSATIONS)
def test_the_template_file_renders_what_render_renders(written, messages, tools):
    assert written(messages, tools) == rendering.render(messages, tools, add_generation_prompt=True)


@pytest.mark.parametrize("messages, tools", REFUSED)
def test_the_template_file_refuses_what_render_refuses(written, messages, tools):
    with pytest.raises(UserError):
        rendering.render(messages, tools)
    with pytest.raises(jinja2.TemplateError):
        written(messages, tools)
