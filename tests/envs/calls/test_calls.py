"""Requests that calls of users' tools answer: planted answers of each kind, rows as users write them and as they are made."""

import json
import re

import pytest

from qcn_jax.chat import templates
from qcn_jax.chat.tool_calls import ToolCall
from qcn_jax.envs.calls import check, make, schema
from qcn_jax.errors import UserError

BOOK = {"name": "book_table", "description": "Books a table.", "parameters": {
    "type": "object", "required": ["guests", "place"], "properties": {
        "guests": {"type": "integer", "minimum": 1}, "place": {"type": "string", "enum": ["inside", "garden"]},
        "quiet": {"type": "boolean", "default": False}, "dishes": {"type": "array", "items": {"type": "string"}},
        "host": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}}}}
CANCEL = {"type": "function", "function": {"name": "cancel_table", "parameters": {
    "type": "object", "properties": {"guests": {"type": "integer"}, "place": {"type": "string"}}}}}
ROW = {"id": "a", "tools": [BOOK, CANCEL], "prompt": "A table for 4 in the garden, for Ida.",
       "calls": [{"name": "book_table", "arguments": {"guests": 4, "place": "garden", "host": {"name": "Ida"}}}]}
RIGHT = ROW["calls"][0]["arguments"]


def request_of(**changes):
    return schema.request_of(schema.to_task(ROW | changes))


def answer(template, *calls, content=""):
    return templates.render(template, content, [ToolCall(name, arguments) for name, arguments in calls])


PLANTED = [  # name, calls, (parsed, valid, right)
    ("right", [("book_table", RIGHT)], (1, 1, 1)),
    ("default said", [("book_table", RIGHT | {"quiet": False})], (1, 1, 1)),
    ("other value", [("book_table", RIGHT | {"guests": 5})], (1, 1, 0)),
    ("wrong type", [("book_table", RIGHT | {"guests": "four"})], (1, 0, 0)),
    ("wrong type of an item", [("book_table", RIGHT | {"dishes": [1]})], (1, 0, 0)),
    ("below the least", [("book_table", RIGHT | {"guests": 0})], (1, 0, 0)),
    ("no member", [("book_table", RIGHT | {"place": "roof"})], (1, 0, 0)),
    ("missing required", [("book_table", {"guests": 4})], (1, 0, 0)),
    ("missing within", [("book_table", RIGHT | {"host": {}})], (1, 0, 0)),
    ("unknown key", [("book_table", RIGHT | {"hour": 7})], (1, 0, 0)),
    ("unknown key within", [("book_table", RIGHT | {"host": {"name": "Ida", "age": 7}})], (1, 0, 0)),
    ("unknown tool", [("book", RIGHT)], (1, 0, 0)),
    ("other tool", [("cancel_table", {"guests": 4, "place": "garden"})], (1, 1, 0)),
    ("twice", [("book_table", RIGHT)] * 2, (1, 1, 0)),
    ("two calls", [("book_table", RIGHT), ("cancel_table", {})], (1, 1, 0)),
]


@pytest.mark.parametrize("template", ["qwen3_coder", "hermes", "glm46", "toolace", "minimax_m2"])
@pytest.mark.parametrize(("calls", "wanted"), [case[1:] for case in PLANTED], ids=[case[0] for case in PLANTED])
def test_planted_answers(template, calls, wanted) -> None:
    found = check.judge(request_of(), template, answer(template, *calls))
    assert (found.parsed, found.valid, found.right) == wanted and bool(found.why) != found.right, found


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_the_right_answer_is_right_in_every_template_and_in_no_other(template) -> None:
    request = request_of()
    assert check.expresses(template, request)
    assert check.judge(request, template, answer(template, ("book_table", RIGHT), content="Of course.")).right
    other = "toolace" if template != "toolace" else "hermes"
    wrong = check.judge(request, template, answer(other, ("book_table", RIGHT)))
    assert not wrong.parsed and not wrong.right
    for words in ("A table for four it is.", "", "book_table(guests=4)"):
        assert not check.judge(request, template, words).parsed
    cut = answer(template, ("book_table", RIGHT))
    assert not check.judge(request, template, cut[:len(cut) * 2 // 3]).right


def test_words_that_are_no_boolean_are_not_read_as_false() -> None:
    text = answer("qwen3_coder", ("book_table", RIGHT | {"quiet": "banana"}))
    found = check.judge(request_of(), "qwen3_coder", text)
    assert found.parsed and not found.valid and "'banana' is no boolean" in found.why
    assert check.judge(request_of(), "qwen3_coder", text.replace("banana", "False")).right


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_where_no_tool_fits_words_alone_are_right(template) -> None:
    request = request_of(calls=[])
    assert check.judge(request, template, "Nothing here does that.").right
    for found in (check.judge(request, template, answer(template, ("book_table", RIGHT))),
                  check.judge(request, template, answer("qwen3_coder", ("book_table", RIGHT))), check.judge(request, template, " ")):
        assert not found.right
    assert check.judge(request, template, answer(template, ("book_table", RIGHT))).uncalled


def test_any_valid_call_and_several_in_any_order() -> None:
    assert check.judge(request_of(calls="any"), "hermes", answer("hermes", ("cancel_table", {}))).right
    assert not check.judge(request_of(calls="any"), "hermes", answer("hermes", ("cancel_table", {"x": 1}))).right
    both = request_of(calls=[*ROW["calls"], {"name": "cancel_table"}])
    assert check.judge(both, "hermes", answer("hermes", ("cancel_table", {}), ("book_table", RIGHT))).right
    assert not check.judge(both, "hermes", answer("hermes", ("cancel_table", {}), ("cancel_table", {}))).right


def test_references_and_open_objects_are_the_schemas_own_business() -> None:
    point = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
    tool = {"name": "draw", "parameters": {"type": "object", "$defs": {"point": point}, "properties": {
        "at": {"$ref": "#/$defs/point"}, "more": {"type": "object", "additionalProperties": {"type": "integer"}},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}}
    fault = schema.request_of(schema.to_task({"id": "a", "prompt": "Draw.", "calls": "any", "tools": [tool]})).fault
    assert not fault(ToolCall("draw", {"at": {"x": 1.5}, "more": {"anything": 2}, "either": None}))
    assert "['at']" in fault(ToolCall("draw", {"at": {"x": 1, "y": 2}}))
    assert fault(ToolCall("draw", {"more": {"anything": "2"}})) and fault(ToolCall("draw", {"either": "a"}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"id": ""}, "field id must be text"), ({"prompt": 3}, "field prompt must be text"), ({"tool": []}, "field .tool. is unknown; allowed: id, tools"),
    ({"tools": []}, "field tools must be a list of functions, and not empty"), ({"tools": [{"description": "?"}]}, r"field tools\[0\] must be an object"),
    ({"tools": [BOOK, BOOK]}, "field tools has .book_table. twice"), ({"calls": "some"}, 'field calls must be "any", or a list'),
    ({"calls": [{"arguments": {}}]}, r"field calls\[0\] must be an object of name"),
    ({"calls": [{"name": "book_table", "arguments": {"guests": 4}}]}, r"field calls\[0\] does not fit tools: book_table: 'place' is a required property"),
    ({"calls": [{"name": "book_table", "arguments": RIGHT | {"guests": "4"}}]}, r"field calls\[0\] does not fit tools: book_table\['guests'\]: '4' is not of"),
    ({"tools": [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}}]}, r"field tools\[0\] has parameters\['properties'\]\['a'\]\['type'\] that are no JSON schema"),
    ({"tools": [{"name": "f", "parameters": {"type": "string"}}]}, r"field tools\[0\] has parameters that are no JSON schema of type object"),
    ({"tools": [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "https://example.com/a"}}}}]}, r"field tools\[0\] has parameters with a \$ref that leads nowhere"),
    ({"tools": [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}]}, r".*with a \$ref that leads nowhere"),
])
def test_rows_that_are_refused(tmp_path, changes, message) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW | {"id": "first"}) + "\n" + json.dumps(ROW | changes) + "\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:2: {message}"):
        schema.read(path)


def words_of(rows):
    """All names and texts that requests invent."""
    found = set()
    for row in rows:
        for tool in row["tools"]:
            properties = tool["function"]["parameters"]["properties"]
            found |= {tool["function"]["name"], *properties}
        found |= set(re.findall(r'"([^"]*)"', row["prompt"]))
    return found


def test_made_requests_are_the_seeds_and_the_splits_share_nothing() -> None:
    rows = make.requests(48, 3)
    assert rows == make.requests(48, 3) and rows[:5] == make.requests(5, 3) and rows != make.requests(48, 4)
    heldout = make.requests(48, 3, split="heldout")
    assert not words_of(rows) & words_of(heldout) and len(words_of(rows)) > 150
    assert {row["kind"] for row in rows} == set(make.KINDS) and not {row["id"] for row in rows} & {row["id"] for row in heldout}
    types = json.dumps(rows)
    assert all(f'"{name}"' in types for name in ("string", "integer", "number", "boolean", "array", "object", "enum"))
    for row in (*rows, *heldout):
        request = schema.request_of(schema.to_task(row))  # its calls fit its tools
        assert (request.calls == ()) == (row["kind"] == "none") and (len(row["tools"]) > 2) >= (row["kind"] == "choice")
        assert all(check.expresses(name, request) for name in ("toolace", "harmony_xml"))
    assert any(len(row["calls"][0]["arguments"]) < len(tool["function"]["parameters"]["properties"]) for row in rows
               if row["kind"] == "optional" for tool in row["tools"] if tool["function"]["name"] == row["calls"][0]["name"])
