"""Parameters of tests that only say what is expected: found, and taken out of a rewritten test."""

import ast
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from _pytest.mark.structures import ParameterSet
from _pytest.python import IdMaker


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What a test's parameters expect: for each hidden name the literals by the brackets of the test's id.

    `brackets` are those of the rewritten test by the old ones.
    """

    values: dict[str, dict[str, str]]
    brackets: dict[str, str]


def hide(function: ast.FunctionDef | ast.AsyncFunctionDef, brackets: Collection[str]) -> Hidden | None:
    """Takes expected values out of a function's only `parametrize`; None, and nothing changed, where that cannot be.

    Args:
      function: of the test; changed in place.
      brackets: of the ids of the tests that are wanted ("[7-7]").
    """
    calls = [mark for mark in function.decorator_list if "parametrize" in ast.unparse(mark)]
    if len(calls) != 1:
        return None
    call = calls[0]
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "parametrize"
            and len(call.args) == 2 and not call.keywords and isinstance(call.args[1], ast.List | ast.Tuple)):
        return None
    try:
        given = ast.literal_eval(call.args[0])
        rows, names_of_rows = zip(*map(_row, call.args[1].elts)) if call.args[1].elts else ((), ())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    names = [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else list(given)
    if len(names) < 2 or not all(isinstance(row, tuple | list) and len(row) == len(names) for row in rows):
        return None
    hidden = [name for name in names if _only_expected(function, name)]
    if not hidden:
        return None
    ids = [f"[{one}]" for one in _ids(names, rows, names_of_rows)]
    if len(set(ids)) != len(ids) or not set(brackets) <= set(ids):
        return None
    values: dict[str, dict[str, str]] = {}
    for name in hidden:
        at = names.index(name)
        values[name] = {one: repr(row[at]) for one, row in zip(ids, rows)}
        for row in call.args[1].elts:
            (row.args if isinstance(row, ast.Call) else row.elts)[at] = ast.Constant(None)
    for row in call.args[1].elts:
        if isinstance(row, ast.Call):  # its name may say what is expected
            row.keywords = [word for word in row.keywords if word.arg != "id"]
    call.keywords = [ast.keyword("ids", ast.List([ast.Constant(f"{number}") for number in range(len(ids))]))]
    return Hidden(values, {one: f"[{number}]" for number, one in enumerate(ids)})


def _row(row: ast.expr) -> tuple[Any, str | None]:
    """The values of a row, which may be a pytest.param, and its id there; raises as `ast.literal_eval`."""
    if not isinstance(row, ast.Call):
        return ast.literal_eval(row), None
    if getattr(row.func, "attr", getattr(row.func, "id", "")) != "param" or any(
            word.arg not in ("id", "marks") for word in row.keywords):
        raise ValueError
    name = next((ast.literal_eval(word.value) for word in row.keywords if word.arg == "id"), None)
    return tuple(map(ast.literal_eval, row.args)), name


def _ids(names: Sequence[str], rows: Sequence[Any], given: Sequence[str | None]) -> list[str]:
    """The ids that pytest gives these parameters."""
    sets = [ParameterSet.param(*row, id=name) for row, name in zip(rows, given)]
    rest = [None] * (len(dataclasses.fields(IdMaker)) - 2)  # how many there are depends on pytest's version
    return [str(one) for one in IdMaker(list(names), sets, *rest).make_unique_parameterset_ids()]


def _only_expected(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> bool:
    """Whether a parameter stands in assertions alone, as one side of ==."""
    uses = [node for statement in function.body for node in ast.walk(statement)
            if isinstance(node, ast.Name) and node.id == name]
    sides = set()
    for statement in function.body:
        for node in ast.walk(statement):
            test = node.test if isinstance(node, ast.Assert) else None
            if isinstance(test, ast.Compare) and [type(one) for one in test.ops] == [ast.Eq]:
                sides |= {id(side) for side in (test.left, *test.comparators)}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "assertEqual":
                sides |= {id(side) for side in node.args[:2]}
    return bool(uses) and all(id(use) in sides for use in uses)
