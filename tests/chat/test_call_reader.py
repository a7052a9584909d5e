"""Tool calls read as they come: pieces equal the whole, mentions are words, a malformed parameter harms only itself."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcn_jax.chat.call_reader import CallReader
from qcn_jax.chat.rendering import ToolCall, parse_tool_calls, render_assistant, render_tool_call
from tests.chat.test_tool_calls import ONE, PIECES, TOOLS

OTHER = ONE.replace("function=f", "function=shell")
MORE = [
    *PIECES, ONE, OTHER, "<!-- c -->", "<!--", "-->", '<parameter name="x">', "<parameter=\n", "<function=shell>\n",
    "<tool_call>\n<function=shell>\n", "a < b", "```\n", "word",
]  # fmt: skip


def streamed(text, cuts, tools):
    """The words of every piece, and the message."""
    reader, start = CallReader(tools), 0
    words = []
    for cut in sorted(cuts):
        words.append(reader.push(text[start:cut]))
        start = max(start, cut)
    return [*words, reader.push(text[start:]), reader.finish()], reader.message


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(MORE), st.text(max_size=3)), max_size=12).map("".join),
    st.lists(st.integers(0, 200), max_size=8), st.sampled_from([None, TOOLS]),
)  # fmt: skip
@example("Use <\\tool_call> and <tool_call>\n<function=f>\n<!-- x", range(60), TOOLS)
@example(f"a\n{OTHER}\nb\n{ONE}", range(300), TOOLS)
def test_whatever_the_cuts_pieces_equal_the_whole(text, cuts, tools):
    whole = parse_tool_calls(text, tools)
    words, message = streamed(text, cuts, tools)
    assert message == whole and "".join(words) == whole.content


@pytest.mark.parametrize("mention", [
    "Write <tool_call> first.", "Use `<function=f>` there", "<tool_call>\nnothing", "a < b and <tool_calls>", OTHER + " is it.",
])  # fmt: skip
def test_mentions_do_not_stop_the_words_and_are_not_lost_before_a_call(mention):
    text = f"{mention} So I look at the file, and then"
    reader = CallReader(TOOLS)
    seen = "".join(map(reader.push, text))
    assert seen == text
    call = render_tool_call(ToolCall("f", {"a": "1"}))
    assert reader.push("\n\n" + call) + reader.finish() == "" and reader.message.content == text
    assert reader.message.calls == [ToolCall("f", {"a": "1"})]


def test_escaped_words_stream_as_they_were_meant():
    words = f"Calls look so:\n{ONE}\nmore"
    parts, message = streamed(render_assistant(words, []), range(200), TOOLS)
    assert "".join(parts) == message.content == words and not message.calls


def test_examples_of_unknown_tools_are_words_and_calls_of_them_are_calls():
    unknown = ToolCall("shell", {"a": "1"})
    for text in (f"For example:\n{OTHER}\nwould run it.", f"```\n{OTHER}\n```", f"{OTHER}\n{OTHER}\nare two"):
        message = parse_tool_calls(text, TOOLS)
        assert (message.content, message.calls) == (text, [])
    assert parse_tool_calls(f"```\n{OTHER}\n```\n{ONE}", TOOLS).calls == [ToolCall("f", {"a": "1"})]
    assert parse_tool_calls(f"So:\n{OTHER}", TOOLS).calls == [unknown]  # the client says that there is no such tool
    assert parse_tool_calls(f"{OTHER}\n{ONE}", TOOLS).calls == [unknown, ToolCall("f", {"a": "1"})]


A, B = "<parameter=a>\nls\n</parameter>\n", "<parameter=b>\n2\n</parameter>\n"
MALFORMED = {
    "no name": "<parameter=\n1\n</parameter>\n",
    "text in the tag": "<parameter=ids: [1]\n</parameter>\n",
    "text in the tag, and a value": "<parameter=ids: [1]>\nx\n</parameter>\n",
    "an attribute": '<parameter name="note">\nrm -rf x\n</parameter>\n',
    "a call as its value": f"<parameter>\n{ONE}\n</parameter>\n",
    "empty": '<parameter name="note"/>\n',
    "doubled closing": "</parameter>\n",
    "text": "and so on\n",
    "a comment": "<!-- see <parameter=a> -->\n",
}


@pytest.mark.parametrize("with_schema", [False, True])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_parameter_is_dropped_and_its_neighbours_are_kept(kind, with_schema):
    odd = MALFORMED[kind]
    for body, arguments in (
        (odd + A, {"a": "ls"}), (A + odd, {"a": "ls"}), (A + odd + B, {"a": "ls", "b": "2"}),
        (A + B + odd, {"a": "ls", "b": "2"}), (odd + odd + A + odd, {"a": "ls"}),
    ):  # fmt: skip
        text = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
        message = parse_tool_calls(f"Now.\n\n{text}", TOOLS if with_schema else None)
        assert message.calls == [ToolCall("f", arguments)], body
        assert message.malformed and message.content == "Now."


def test_values_on_the_line_of_their_tag_end_at_the_first_closing():
    for odd in ("", " junk ", '<parameter name="n">x</parameter>', "</parameter>"):
        text = f"<tool_call><function=f><parameter=a>ls</parameter>{odd}<parameter=b>2</parameter></function></tool_call>"
        message = parse_tool_calls(text)
        assert message.calls == [ToolCall("f", {"a": "ls", "b": "2"})] and message.malformed == bool(odd)


def test_files_that_hold_parameters_are_written_as_they_are():
    for value in (
        '<config>\n  <parameter name="x">1</parameter>\n  <parameter name="y"/>\n</config>',
        '<a>\n<parameter\n  name="x">\n1\n</parameter>\n</a>', "A value ends with </parameter>, see below",
    ):  # fmt: skip
        raw = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n{B}</function>\n</tool_call>"
        message = parse_tool_calls(raw, TOOLS)
        assert message.calls == [ToolCall("f", {"a": value, "b": "2"})] and not message.malformed
