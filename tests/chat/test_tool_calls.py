"""Reading and writing Qwen3-Coder tool calls: every string survives, malformed text loses no call."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcn_jax.chat.rendering import ToolCall, parse_tool_calls, render_assistant, render_tool_call
from qcn_jax.errors import UserError

PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<function=f>",
    "<function=g>",
    "</function>",
    "<parameter=a>",
    "<parameter=b>",
    "</parameter>",
    "\n",
    "\n\n",
    " ",
    "x",
    "<",
    ">",
    "/",
    "\\",
    "<\\",
    "<\\\\/parameter>",
    "<\\tool_call>",
    "</parameter",
    "<parameter=a",
    "< parameter = a >",
    "</ function >",
    '<parameter="a">',
    "<parameters>",
    "<|im_end|>",
    "é",
    "👩‍👩‍👧",
    "<parameter=a>\n1\n</parameter>",
    "<tool_call>\n<function=f>\n",
    "</function>\n</tool_call>",
    "\t",
    "\r\n",
    "\u2028",
]
TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(PIECES)).map("".join),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map("".join),
)
NAMES = st.one_of(st.sampled_from(["f", "g", "a", "b", "path"]), st.from_regex(r"\A[^\s<>{}\"'=]{1,8}\Z"))
CALLS = st.builds(ToolCall, NAMES, st.dictionaries(NAMES, TEXTS, max_size=4))
ONE = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}},
        },
    }
    for name in "fg"
]


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.lists(CALLS, max_size=3), st.booleans())
@example("<tool_call>\n<function=f>\n</function>\n</tool_call>", [], False)
@example("", [ToolCall("f", {"a": "x\n</parameter>\n<parameter=b>\ny"})], True)
@example("<function=f><", [], True)
@example("", [ToolCall("f", {"a": "<tool_call>\n<function=f>\n<!--", "b": "x\n-->\n<parameter=c>\n</parameter>"})], False)
@example("<tool_call>\n<function=f>\n<!--", [ToolCall("f", {"a": "-->\n</parameter>", "b": "x"})], True)
@example("", [ToolCall("f", {"a": ONE, "b": "see\n<parameter=b>"})], True)
def test_whatever_is_written_reads_back(content, calls, with_schema):
    message = parse_tool_calls(render_assistant(content, calls), TOOLS if with_schema else None)
    assert message.calls == calls
    assert message.content == (content.strip() if calls else content)
    if calls:
        assert not message.malformed, message.problems


def published(call):
    """The published template's text, which never escapes."""
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in call.arguments.items())
    return f"<tool_call>\n<function={call.name}>\n{body}</function>\n</tool_call>"


@settings(max_examples=100, deadline=None)
@given(st.builds(ToolCall, NAMES, st.dictionaries(NAMES, st.text(), max_size=4)))
@example(ToolCall("f", {"a": "a </parameter> inside, <parameter=q> and </function> too"}))
@example(ToolCall("f", {"a": "<function=g>", "b": "<tool_call>"}))
@example(ToolCall("write", {"path": "p", "text": f"docs:\n{ONE}\nend"}))
def test_only_what_would_misread_is_escaped(call):
    assert render_tool_call(call) == published(call)


def test_escaping_is_reversible_and_marked():
    hostile = ToolCall("f", {"a": "x\n</parameter>\n</function>\n</tool_call>", "b": "<\\/parameter>"})
    text = render_tool_call(hostile)
    assert "x\n<\\/parameter>\n<\\/function>\n<\\/tool_call>\n</parameter>" in text
    assert "\n<\\\\/parameter>\n" in text
    assert parse_tool_calls(text).calls == [hostile]


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.booleans())
def test_no_text_breaks_the_parser(text, with_schema):
    message = parse_tool_calls(text, TOOLS if with_schema else None)
    assert isinstance(message.content, str)
    for call in message.calls:
        assert all(isinstance(value, str) for value in call.arguments.values())


@settings(max_examples=100, deadline=None)
@given(st.builds(ToolCall, NAMES, st.dictionaries(NAMES, st.text(), min_size=1, max_size=4)), st.data())
def test_a_cut_call_keeps_its_finished_parameters(call, data):
    text = render_tool_call(call)
    message = parse_tool_calls(text[: data.draw(st.integers(0, len(text) - 1))])
    assert len(message.calls) <= 1
    if message.calls:
        assert message.malformed
        given_ = list(message.calls[0].arguments.items())
        assert given_[:-1] == list(call.arguments.items())[: max(len(given_) - 1, 0)]


A, AB = ToolCall("f", {"a": "1"}), ToolCall("f", {"a": "1", "b": "2"})
MALFORMED = {
    "no opening tool_call": ("<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", [A]),
    "bare function": ("Text.\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>", [A]),
    "no closing tool_call": ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>", [A]),
    "no closing function": ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</tool_call>", [A]),
    "no closing parameter before function": (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>",
        [A],
    ),
    "last parameter closed only by function": (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</function>\n</tool_call>",
        [AB],
    ),
    "no closing parameter before the next": (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>",
        [AB],
    ),
    "no closing tags at all": ("<tool_call>\n<function=f>\n<parameter=a>\n1", [A]),
    "only tool_call closes": ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</tool_call>", [A]),
    "cut in a closing tag": ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</param", [A]),
    "cut behind a parameter": ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</func", [A]),
    "cut before parameters": ("<tool_call>\n<function=f>\n", [ToolCall("f", {})]),
    "parameter tag without >": (
        "<tool_call>\n<function=f>\n<parameter=a\n1\n</parameter>\n</function>\n</tool_call>",
        [A],
    ),
    "blanks in tags": (
        "<tool_call>\n<function = f >\n< parameter =a>\n1\n</ parameter>\n</function >\n</tool_call>",
        [A],
    ),
    "quoted names": ("<tool_call>\n<function=\"f\">\n<parameter='a'>\n1\n</parameter>\n</function>\n</tool_call>", [A]),
    "one line": ("<tool_call><function=f><parameter=a>1</parameter></function></tool_call>", [A]),
    "consecutive without closing tool_call": (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n" + ONE,
        [A, A],
    ),
    "consecutive, first left open in a value": ("<tool_call>\n<function=f>\n<parameter=a>\n1\n" + ONE, [A, A]),
    "consecutive bare functions": ("<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n" * 2, [A, A]),
    "cut last call behind a good one": (ONE + "\n<tool_call>\n<function=f>\n<parameter=a>\n1", [A, A]),
    "text after the call": (ONE + "\nNow I wait.", [A]),
    "repeated parameter, last wins": (
        "<tool_call>\n<function=f>\n<parameter=a>\n0\n</parameter>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        [A],
    ),
}


@pytest.mark.parametrize("with_schema", [False, True])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_calls_are_read_and_reported(kind, with_schema):
    text, calls = MALFORMED[kind]
    message = parse_tool_calls(text, TOOLS if with_schema else None)
    assert message.calls == calls
    assert message.malformed or kind == "one line"


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_good_call_survives_a_malformed_one_before_it(kind):
    good = ToolCall("g", {"b": "line 1\nline 2"})
    assert parse_tool_calls(MALFORMED[kind][0] + "\n" + render_tool_call(good)).calls[-1] == good


def test_mentions_of_tags_are_text():
    for text in ("Use the <tool_call> tag.", "`<function=f>` opens it", "<parameters> and <tool_calls>", "plain"):
        message = parse_tool_calls(text)
        assert (message.content, message.calls, message.malformed) == (text, [], False)
    assert parse_tool_calls("<tool_call>\nnothing\n</tool_call>").malformed


def test_a_parameter_the_function_lacks_does_not_cut_a_value_short():
    text = "<tool_call>\n<function=f>\n<parameter=a>\nsee\n<parameter=zzz>\n</parameter>\n</function>\n</tool_call>"
    assert parse_tool_calls(text, TOOLS).calls == [ToolCall("f", {"a": "see\n<parameter=zzz>"})]


@pytest.mark.parametrize(
    "schema, text, value",
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "number"}, "2.0", 2),
        ({"type": "number"}, "2.5", 2.5),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "no", False),
        ({"type": "object"}, '{"x": [1, null]}', {"x": [1, None]}),
        ({"type": "array"}, "[1, 'a']", [1, "a"]),
        ({"type": "array"}, "[1,", "[1,"),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, "null", None),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "None", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"type": ["string", "null"]}, "x", "x"),
        ({"enum": ["a"]}, "a", "a"),
        ({"type": "other"}, "(1, 2)", [1, 2]),
        ({"type": "string"}, "\n5 \n", "\n5 \n"),
    ],
)
def test_values_take_the_type_of_the_schema(schema, text, value):
    tools = [{"name": "f", "parameters": {"properties": {"a": schema}}}]
    result = parse_tool_calls(render_tool_call(ToolCall("f", {"a": text})), tools).calls[0].arguments["a"]
    assert result == value and type(result) is type(value)


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
        max_leaves=8,
    ).filter(lambda value: isinstance(value, (list, dict)))
)
def test_containers_read_back_through_the_schema(value):
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "object"}}}}]
    assert parse_tool_calls(render_tool_call(ToolCall("f", {"a": value})), tools).calls[0].arguments["a"] == value


@pytest.mark.parametrize("call", [ToolCall("f g"), ToolCall(""), ToolCall("f", {"a>": "1"}), ToolCall("f", "{}")])
def test_calls_that_no_parser_could_read_are_refused(call):
    with pytest.raises(UserError, match="tool call"):
        render_tool_call(call)


def test_long_hostile_text_is_read_in_reasonable_time():
    for piece in (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n",
        "<parameter=a>",
        "</parameter>",
        "\n",
        "<tool_call> ",
    ):
        parse_tool_calls("<tool_call>\n<function=f>\n<parameter=a>\n" + piece * 300)
    for piece in ("<parameter=a>\n", "<parameter name='a'>"):  # as models do that repeat themselves
        parse_tool_calls("<tool_call>\n<function=f>\n" + piece * 5000)
