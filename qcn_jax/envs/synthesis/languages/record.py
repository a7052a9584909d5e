"""Calls of the function that a defect is in, recorded while JavaScript or Go tests run, as inside/observe.py does.

The function's body is handed to a recorder that notes what it was given and how it ended. Only values that can be
written down as literals are kept. Recorded calls have the form that statement.py compares.
"""

import importlib.resources
import json
import posixpath
from collections.abc import Mapping
from typing import Any

from qcn_jax.envs.synthesis import inject
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.inject import treesitter
from qcn_jax.envs.synthesis.inject.treesitter import Node

CALLS = "/tmp/qcn-calls"  # where tests may write
MOST = 300  # calls of one process
LONGEST = 400  # characters of a value
_INSIDE = importlib.resources.files("qcn_jax.envs.synthesis.inside")
JAVASCRIPT, GO = (_INSIDE.joinpath(name).read_text() for name in ("literals.js", "literals.go"))  # values as source


def recording(language: str, injection: inject.Injection, text: str) -> dict[str, str] | None:
    """Files that record the calls of a defect's function while tests run; None where that cannot be done.

    Args:
      language: javascript or go.
      injection: the defect.
      text: of the file, in one of the two states.
    """
    data = text.encode()
    root = treesitter.parser(language).parse(data).root_node
    at = len(injection.before_source[:injection.start].encode())
    function = _function(root, injection, at)
    if function is None or root.has_error:
        return None
    made = (_go if language == "go" else _javascript)(data, root, function, "." in injection.qualname)
    if made is None:
        return None
    changed, more = made
    folder = injection.path.rpartition("/")[0]
    return {injection.path: changed, **{posixpath.join(folder, path): body for path, body in more.items()}}


def _script(name: str) -> str:
    """A recorder, with this module's bounds in their places."""
    text = _INSIDE.joinpath(name).read_text()
    return text.replace("CALLS", CALLS).replace("MOST", str(MOST)).replace("LONGEST", str(LONGEST))


def _function(root: Node, injection: inject.Injection, at: int) -> Node | None:
    """The function that the defect counts as in: it starts in its line, and holds its place."""
    found, node = None, root
    while node is not None:
        if node.type in (treesitter.GO.functions | treesitter.JAVASCRIPT.functions) and (
                node.start_point[0] == injection.function_start_line - 1):
            found = node
        node = next((child for child in node.children if child.start_byte <= at < child.end_byte), None)
    return found


def _javascript(data: bytes, root: Node, function: Node, method: bool) -> tuple[str, dict[str, str]] | None:
    body = function.child_by_field_name("body")
    head = data[function.start_byte:body.start_byte].decode()
    names = _javascript_parameters(data, function)
    if names is None or "generator" in function.type or head.startswith(
            ("async", "get ", "set ", "static ", "constructor", "*")):
        return None
    inner = data[body.start_byte:body.end_byte].decode()
    block = body.type == "statement_block"
    given = ", ".join(name.removeprefix("...") for name in names)
    listed = json.dumps([name.removeprefix("...") for name in names])
    call = f"__qcn({listed}, [{given}], {'this' if method else 'null'}, () => {inner if block else f'({inner})'})"
    text = (data[:body.start_byte].decode() + (f"{{ return {call}; }}" if block else call)
            + data[body.end_byte:].decode())
    modern = any(node.type in ("import_statement", "export_statement") for node in root.named_children)
    helper = JAVASCRIPT + _script("record.js").replace("FS.", "__qcnFs." if modern else "require('fs').").replace(
        "UTIL.", "__qcnUtil." if modern else "require('util').")
    imports = "import * as __qcnFs from 'fs'; import * as __qcnUtil from 'util';\n" if modern else ""
    return f"{text}\n{imports}{helper}", {}


def _javascript_parameters(data: bytes, function: Node) -> list[str] | None:
    """Names of parameters, the last one with dots where it takes the rest; None where one has no name."""
    single = function.child_by_field_name("parameter")
    if single is not None:
        return [data[single.start_byte:single.end_byte].decode()]
    names = []
    for node in function.child_by_field_name("parameters").named_children:
        rest = node.type == "rest_pattern"
        inner = node.named_children[0] if rest else (
            node.child_by_field_name("left") if node.type == "assignment_pattern" else node)
        if inner.type == "comment":
            continue
        if inner.type != "identifier":
            return None
        names.append(("..." if rest else "") + data[inner.start_byte:inner.end_byte].decode())
    return names


def _go(data: bytes, root: Node, function: Node, method: bool) -> tuple[str, dict[str, str]] | None:
    def text(node: Node) -> str:
        return data[node.start_byte:node.end_byte].decode()

    body, results = function.child_by_field_name("body"), function.child_by_field_name("result")
    if function.type == "func_literal" or body is None:
        return None
    names = [text(name) for group in function.child_by_field_name("parameters").named_children
             for name in group.children_by_field_name("name")]
    receiver = [text(name) for group in getattr(function.child_by_field_name("receiver"), "named_children", ())
                for name in group.children_by_field_name("name")]
    kinds = text(results) if results is not None else ""
    count = 0 if results is None else 1 if results.type != "parameter_list" else sum(
        max(1, len(group.children_by_field_name("name"))) for group in results.named_children)
    if "_" in names or (method and receiver in ([], ["_"])):
        return None
    ends = [f"qcnEnd{number}" for number in range(count)]
    call = (f"qcn := qcnStart({receiver[0] if method else 'nil'}, []string{{{', '.join(map(json.dumps, names))}}}"
            + "".join(f", {name}" for name in names) + "); defer qcn.watch(); ")
    run = f"func() {kinds} {text(body)}()"
    wrapped = f"{', '.join(ends)} := {run}\nqcn.end({', '.join(ends)})\nreturn {', '.join(ends)}" if count else (
        f"{run}\nqcn.end()")
    package = next(text(node) for node in root.named_children if node.type == "package_clause")
    made = data[:body.start_byte].decode() + f"{{ {call}{wrapped}\n}}" + data[body.end_byte:].decode()
    return made, {"qcn_record.go": package + "\n" + _script("record.go") + GO}


def calls(container: Container, injection: inject.Injection) -> list[dict[str, Any]]:
    """What was recorded since the last call of this; later it is gone."""
    done = container.exec(f"cat {CALLS} 2>/dev/null; rm -f {CALLS}", 30.0)
    found = []
    for line in done.output.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # tested code may write there, too, and long output is cut
            continue
        if isinstance(row, dict) and well_formed(row):
            found.append({**row, "path": injection.path, "name": injection.qualname})
    return found


def well_formed(row: Mapping[str, Any]) -> bool:
    """Whether a recorded call has the fields that statements are made of."""
    def pairs(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value)

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    return (pairs(row.get("args")) and pairs(row.get("after")) and isinstance(row.get("raised"), str)
            and texts(row.get("result")) and texts(row.get("types", [])) and isinstance(row.get("values"), str | None)
            and {name for name, _ in row["after"]} <= {name for name, _ in row["args"]})
