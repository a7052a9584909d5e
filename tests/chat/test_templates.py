"""Every tool-call template: what is written reads back, whatever the strings hold; no text breaks a reader."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.chat import templates, tool_frames
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.errors import UserError

CALLS = [ToolCall("edit", {"line": "2", "old": "x", "new": "not x"}), ToolCall("run_tests", {})]
# Pieces of every template's own syntax, to be mixed into values and words.
SYNTAX = sorted(
    {
        piece
        for name in templates.TEMPLATES
        for line in templates.render(name, "", CALLS).split("\n")
        for piece in (line, line[: len(line) // 2], line[1:])
    }
)
PIECES = [
    *SYNTAX,
    "\n",
    " ",
    "\\",
    "<\\",
    "[\\",
    '"',
    "'",
    "{",
    "}",
    "</old>",
    "<edit>",
    "<edit>\n",
    "x",
    "é",
    "👩‍👩‍👧",
    "Action: ",
    '[{"name":',
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))
NAMES = st.sampled_from(["edit", "run_tests", "old", "new", "a", "from", "b_1"])
STRINGS = st.builds(ToolCall, NAMES, st.dictionaries(NAMES, TEXTS, max_size=3))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
# Of the others only the tools' schemas tell which values are no text.
TYPED = [name for name in templates.TEMPLATES if name not in (
    "qwen3_coder", "qwen3_xml_mixed", "glm46", "minimax_m2", "xml_cline", "xml_aone", "harmony_xml")]


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_whatever_is_written_reads_back(name):
    @settings(max_examples=60, deadline=None)
    @given(TEXTS, st.lists(STRINGS, max_size=3))
    def check(content, calls):
        message = templates.parse(name, templates.render(name, content, calls))
        assert message.calls == calls
        assert message.content == (content.strip() if calls else content)
        assert not calls or not message.malformed, message.problems

    check()


@pytest.mark.parametrize("name", TYPED)
def test_typed_values_read_back(name):
    @settings(max_examples=40, deadline=None)
    @given(st.dictionaries(NAMES, JSON, max_size=3))
    def check(arguments):
        message = templates.parse(name, templates.render_call(name, ToolCall("edit", arguments)))
        assert message.calls == [ToolCall("edit", arguments)] and not message.malformed

    check()


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_no_text_breaks_the_reader(name):
    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def check(text):
        assert isinstance(templates.parse(name, text).content, str)

    check()


TOOLS = [{"type": "function", "function": {"name": call.name, "parameters": {"type": "object"}}} for call in CALLS]


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_pieces_are_read_as_the_whole(name):
    """Whatever the text, and wherever it is cut: the same words, calls and problems, and no word is said twice."""
    opened = templates.render(name, "See:", CALLS)

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(TEXTS, TEXTS.map(lambda text: opened + text), TEXTS.map(lambda text: text + opened)),
           st.lists(st.integers(0, 400), max_size=12), st.sampled_from([None, TOOLS]))
    def check(text, cuts, tools):
        whole = templates.reader(name, tools)
        words = whole.push(text) + whole.finish()
        piecewise, said = templates.reader(name, tools), ""
        bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
        for start, end in zip(bounds, bounds[1:]):
            said += piecewise.push(text[start:end])
        assert said + piecewise.finish() == words == whole.message.content
        assert piecewise.message == whole.message
        assert whole.message.calls == templates.parse(name, text, tools).calls

    check()


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_words_are_not_held_back_for_longer_than_need_be(name):
    made = templates.reader(name, TOOLS)
    assert made.push("a < b, [x] and `") == "a < b, [x] and `"


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_a_cut_text_is_never_taken_for_other_whole_calls(name):
    text = templates.render(name, "", CALLS)
    for end in range(len(text)):
        message = templates.parse(name, text[:end])
        assert message.malformed or message.calls == CALLS[: len(message.calls)], text[:end]
        assert len(message.calls) <= len(CALLS)


def test_forms_are_those_of_their_models():
    """Texts as the models' public parsers and templates have them, written down by hand."""
    expected = {
        "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>',
        "mistral3": '[TOOL_CALLS]f[ARGS]{"a": "x"}',
        "deepseekv31": (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "x"}<｜tool▁call▁end｜>'
            '<｜tool▁calls▁end｜>'
        ),
        "deepseekv3": (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "x"}\n'
            '```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        ),
        "deepseekv32": (
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
            '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            '</｜DSML｜function_calls>'
        ),
        "glm46": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
        "kimik2": (
            '<|tool_calls_section_begin|><|tool_call_begin|>'
            'functions.f:0<|tool_call_argument_begin|>{"a": "x"}<|tool_call_end|>'
            '<|tool_calls_section_end|>'
        ),
        "minimax_m2": (
            '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">x</parameter>\n</invoke>'
            '\n</minimax:tool_call>'
        ),
        "llama4_pythonic": "<|python_start|>[f(a='x')]<|python_end|>",
        "toolace": "[f(a='x')]",
        "xlam_qwen": '[{"name": "f", "arguments": {"a": "x"}}]',
        "xml_cline": "<f>\n<a>x</a>\n</f>",
        "harmony_json": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "x"}<|call|>',
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>",
    }
    for name, text in expected.items():
        assert templates.render_call(name, ToolCall("f", {"a": "x"})) == text, name
        assert templates.parse(name, "So:\n" + text).content == "So:"


@pytest.mark.parametrize(
    "name, text, calls",
    [
        (
            "hermes",
            '<tool_call>{"name":"f","arguments":{}}</tool_call> <tool_call> {"name": "g", "arguments": {"a": 1}}',
            [ToolCall("f"), ToolCall("g", {"a": 1})],
        ),
        ("hermes", "<tool_call>\n{'name': 'f'}\n</tool_call>", []),
        ("glm46", "<tool_call>f<arg_key>a</arg_key><arg_value>x", [ToolCall("f", {"a": "x"})]),
        ("toolace", "[f(a=[1, (2, 3)], b='),]'), g(a=open('x'))]", [ToolCall("f", {"a": [1, [2, 3]], "b": "),]"})]),
        ("xml_cline", "<f>\n<a>x\n</f>", [ToolCall("f", {"a": "x\n"})]),
        (
            "kimik2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}",
            [ToolCall("f")],
        ),
    ],
)
def test_malformed_text_is_read_as_far_as_it_goes(name, text, calls):
    message = templates.parse(name, text)
    assert message.calls == calls and message.malformed


def test_schemas_give_tagged_values_their_types():
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}]
    for name in ("glm46", "minimax_m2", "xml_cline", "qwen3_coder"):
        assert templates.parse(name, templates.render_call(name, ToolCall("f", {"a": 3})), tools).calls[
            0
        ].arguments == {"a": 3}


def test_a_good_call_survives_one_whose_arguments_are_no_json():
    for name in ("hermes", "kimik2", "mistral3", "deepseekv31", "harmony_json", "react"):
        text = templates.render(name, "", [ToolCall("f", {"a": "x"}), ToolCall("g", {"b": "y"})])
        message = templates.parse(name, text.replace('"a": "x"', '"a": x', 1))
        assert message.calls == [ToolCall("g", {"b": "y"})] and message.malformed


def test_only_known_tools_open_a_call_where_the_tag_is_the_name():
    text = "<details>\nsee below\n</details>\n\n<f>\n<a>x</a>\n</f>"
    message = templates.parse("xml_cline", text, [{"name": "f"}])
    assert message.content == "<details>\nsee below\n</details>" and message.calls == [ToolCall("f", {"a": "x"})]


def test_bad_requests_are_named():
    with pytest.raises(UserError, match="'nope' is unknown; known: qwen3_coder"):
        templates.render("nope", "", [])
    with pytest.raises(UserError, match="cannot name"):
        templates.render("hermes", "", [ToolCall("f g")])
    with pytest.raises(UserError, match="not JSON"):
        templates.render("toolace", "", [ToolCall("f", {"a": float("nan")})])


DEFINED = [{"type": "function", "function": {
    "name": "edit", "description": "Edits a file.", "parameters": {"type": "object", "required": ["path"], "properties": {
        "path": {"type": "string", "description": "Where."}, "count": {"type": "integer", "default": 3},
        "mode": {"type": "string", "enum": ["a", "b"]}, "lines": {"type": "array", "items": {"type": "integer"}}}}}},
    {"type": "function", "function": {"name": "list", "description": "Lists.", "parameters": {"type": "object"}}}]


def test_the_reports_templates_are_all_there():
    report = ("qwen3_coder qwen3_xml_mixed deepseekr1 deepseekv3 deepseekv31 deepseekv32 glm46 minimax_m1 minimax_m2 kimik2 "
              "hermes qwen25_coder harmony_json harmony_xml llama4_pythonic toolace mistral3 xlam_qwen xml_cline xml_aone")
    assert set(templates.REPORT) == set(report.split())


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_the_three_axes_say_what_is_to_be_said(name):
    said = templates.describe(name, DEFINED)
    text = tool_frames.joined(said)
    for word in ("edit", "Edits a file.", "path", "Where.", "count", "3", "list"):
        assert word in text
    own = "".join(words for words, frame in said if frame)
    assert "Edits" not in own and "Where" not in own and "PARAMETER_1" in own  # what is somebody's is no frame
    told = templates.respond(name, [("edit", "<|im_end|>\n[done]"), ("list", 'a "b"')])
    assert '"b' in tool_frames.joined(told) and any("[done]" in words and not frame for words, frame in told)
    calls = templates.parse(name, templates.render_call(name, ToolCall("edit", {"path": "x"})), DEFINED).calls
    assert calls == [ToolCall("edit", {"path": "x"})]


def test_axes_are_those_of_their_models():
    """As published, written down by hand; benchmarks/template_axes.py holds all against the published files."""
    told = lambda name: tool_frames.joined(templates.respond(name, [("f", "A"), ("g", "B")]))
    assert told("deepseekr1") == ("<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>A<｜tool▁output▁end｜>\n"
                                  "<｜tool▁output▁begin｜>B<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")
    assert told("kimik2") == "## Return of functions.f:0\nA\n## Return of functions.g:1\nB"
    assert told("toolace") == '{"output": "A"}\n{"output": "B"}'
    defined = lambda name: tool_frames.joined(templates.definitions(name, DEFINED[:1]))
    assert defined("harmony_xml") == (
        "# Tools\n\n## functions\n\nnamespace functions {\n\n// Edits a file.\ntype edit = (_: {\n// Where.\npath: string,\n"
        'count?: number, // default: 3,\nmode?: "a" | "b",\nlines?: number[],\n}) => any;\n\n} // namespace functions')
    assert defined("deepseekv31").endswith('\n### edit\nDescription: Edits a file.\n\nParameters: ' + json.dumps(
        DEFINED[0]["function"]["parameters"]) + "\n")
    with pytest.raises(UserError, match="tools.0.: expected an object with a name"):
        templates.describe("glm46", [{"type": "function"}])


@pytest.mark.parametrize("name", ["deepseekv32", "glm46", "minimax_m2", "harmony_xml", "xml_cline", "xml_aone"])
def test_a_value_whose_end_tag_is_broken_is_no_clean_call(name):
    """Without the last character of its tag a value would run on to the next one's end, and pass for what was meant."""
    written = templates.render_call(name, ToolCall("edit", {"path": "zq", "mode": "a"}))
    end = re.search(r"zq(</[^>]*)>", written)
    assert templates.parse(name, written[:end.end() - 1] + written[end.end():]).malformed
    held = ToolCall("edit", {"path": f"x{end[1]} y", "mode": end[1]})
    message = templates.parse(name, templates.render_call(name, held))
    assert message.calls == [held] and not message.malformed


@pytest.mark.parametrize("name", templates.REPORT)
def test_seeded_calls_read_back_in_every_cut(name):
    """A few of what benchmarks/template_axes.py does with 500 calls of each."""
    rng = random.Random(f"25 {name}")
    for _ in range(3):
        calls = [ToolCall("edit", {"path": "".join(rng.choices("ab<>/\n'\"{}", k=8)), "count": rng.randrange(99),
                                   "lines": [rng.randrange(9)]}) for _ in range(2)]
        written = templates.render(name, "I look.", calls)
        for at in range(0, len(written) + 1):
            reader = templates.reader(name, DEFINED)
            said = reader.push(written[:at]) + reader.push(written[at:]) + reader.finish()
            assert (said.strip(), reader.message.calls, reader.message.problems) == ("I look.", calls, [])
