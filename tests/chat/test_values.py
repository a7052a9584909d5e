"""Values of tool calls: every type that a schema can name, nothing that JSON cannot hold, no schema that breaks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.chat import templates
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.chat.values import coerce, parameter_schemas


def read(schema, text, **root):
    return coerce(text, parameter_schemas([{"name": "f", "parameters": {"properties": {"a": schema}, **root}}])["f"]["a"])


DEFINITIONS = {
    "Point": {"type": "object", "properties": {"x": {"type": "integer"}}},
    "Colour": {"enum": ["red", "blue"], "type": "string"},
    "Level": {"enum": [1, 2], "type": "integer"},
    "Loop": {"$ref": "#/$defs/Loop"},
    "Tree": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"$ref": "#/$defs/Tree"}, {"$ref": "#/$defs/Point"}]},
    "a/b": {"type": "boolean"},
}


@pytest.mark.parametrize("schema, text, value", [
    ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
    ({"allOf": [{"$ref": "#/$defs/Level"}], "default": 1}, "2", 2),
    ({"allOf": [{"type": "number"}, {"type": "integer"}]}, "2.5", "2.5"),
    ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, "null", None),
    ({"oneOf": [{"$ref": "#/$defs/Colour"}, {"$ref": "#/$defs/Level"}]}, "1", 1),
    ({"oneOf": [{"$ref": "#/$defs/Colour"}, {"$ref": "#/$defs/Level"}]}, "red", "red"),
    ({"$ref": "#/$defs/a~1b"}, "true", True), ({"$ref": "#/$defs/none"}, "1", "1"),
    ({"$ref": "https://example.com/x"}, "1", "1"), ({"$ref": "#/$defs/Loop"}, "1", "1"),
    ({"$ref": "#/$defs/Tree"}, '{"x": 1}', {"x": 1}),  # given up, not followed for ever
    ({"properties": {}}, '{"x": 1}', {"x": 1}), ({"items": {}}, "[1]", [1]), ({"additionalProperties": {}}, "{}", {}),
    ({"enum": [1, 2]}, "2", 2), ({"enum": ["1", 2]}, "1", "1"), ({"enum": [True, "auto"]}, "true", True),
    ({"enum": [None, "a"]}, "null", None), ({"const": 5}, "5", 5), ({"enum": [[1], [2]]}, "[2]", [2]),
    ({"type": ["boolean", "string"]}, "auto", "auto"), ({"type": ["boolean", "string"]}, "True", True),
    ({"type": ["string", "integer"]}, "007", "007"), ({"type": ["integer", "string"]}, "-7", -7),
    ({"type": ["integer", "string"]}, "+7", "+7"), ({"type": ["number", "string"]}, "1.10", "1.10"),
    ({"type": ["number", "string"]}, "2.5", 2.5), ({"type": ["object", "string"]}, "{'a': 1}", "{'a': 1}"),
    ({"type": ["object", "string"]}, "[1]", "[1]"), ({"type": ["array", "string"]}, "[1]", [1]),
    ({"type": ["string", "boolean"]}, "null", "null"), ({"type": ["integer", "boolean"]}, "false", False),
    ({"type": "integer", "nullable": True}, "None", None), ({"anyOf": [{}, {"type": "null"}]}, "5", "5"),
    ({"type": "number"}, "12345678901234567891", 12345678901234567891), ({"type": "number"}, "1e3", 1000),
    ({"type": "number"}, "1e30", 1e30), ({"type": "number"}, "nan", "nan"), ({"type": "number"}, "-Infinity", "-Infinity"),
    ({"type": "integer"}, "1_000", "1_000"), ({"type": "integer"}, "١٢", "١٢"), ({"type": "number"}, "1_0.5", "1_0.5"),
    ({"type": "integer"}, "9" * 5000, "9" * 5000), ({"type": "array"}, "0", "0"), ({"type": "object"}, '"x"', '"x"'),
    (True, "1", "1"), (False, "1", "1"), (None, "1", "1"), (5, "1", "1"), ({"type": {"a": 1}}, "[1]", [1]),
    ({"enum": 5, "anyOf": 5, "allOf": "x", "$ref": 5, "type": []}, "1", "1"),
])  # fmt: skip
def test_texts_become_what_the_schema_says(schema, text, value):
    result = read(schema, text, **{"$defs": DEFINITIONS})
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize("text", [
    "...", "{1, 2}", "b'abc'", "{(1,2): 3}", "[1+2j]", "{1: 2}", "[NaN]", "[1e999]", "{'a': [..., 1]}", "[" * 5000,
    "[" * 500 + "]" * 500, "-" * 3000 + "1", "[0x" + "f" * 20000 + "]", "__import__('os')",
])  # fmt: skip
@pytest.mark.parametrize("type_", ["array", "object", "other"])
def test_what_json_cannot_hold_stays_text(type_, text):
    assert read({"type": type_}, text) == text
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": type_}}}}]
    for name in ("glm46", "minimax_m2", "xml_cline", "qwen3_coder"):
        parsed = templates.parse(name, templates.render_call(name, ToolCall("f", {"a": text})), tools)
        assert parsed.calls == [ToolCall("f", {"a": text})]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.sampled_from(["[{1}]", "{'a': b''}", "(1, ...)", "[1e400]", "1e400"]))
def test_whatever_is_read_is_json(text):
    for type_ in ("array", "other", "number", ["integer", "null"], ["object", "string"]):
        assert json.loads(json.dumps(value := read({"type": type_}, text), allow_nan=False)) == value
    for name in templates.TEMPLATES:
        for call in templates.parse(name, templates.render_call(name, ToolCall("f", {"a": "X"})).replace("X", text)).calls:
            json.dumps(call.arguments, allow_nan=False)


@pytest.mark.parametrize("parameters", [
    None, True, 5, "x", [], {}, {"properties": None}, {"properties": []}, {"properties": {"a": True}}, {"properties": "a"},
])  # fmt: skip
def test_odd_parameters_are_read_as_far_as_they_make_sense(parameters):
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert set(parameter_schemas(tools)["f"]) <= {"a"}
