"""Whether an answer makes the calls that were asked for, in the template that was asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qcn_jax.chat import templates
from qcn_jax.chat.tool_calls import ParsedMessage, ToolCall
from qcn_jax.envs.calls.schema import Request
from qcn_jax.envs.problems.check import same
from qcn_jax.errors import UserError

_NO = ("false", "none", "null")  # what a text may be that stands for False


@dataclasses.dataclass(frozen=True)
class Judged:
    """What an answer is.

    Attributes:
      parsed: written in the template: calls, and nothing to repair; words alone where no call may be made.
      valid: besides, every call is of a function that there is, and its arguments fit its JSON schema.
      right: besides, the calls are those that were asked for.
      uncalled: there are calls where none may be made.
      why: what was wrong first; "" where nothing was.
    """

    parsed: bool = False
    valid: bool = False
    right: bool = False
    uncalled: bool = False
    why: str = ""


def judge(request: Request, template: str, text: str) -> Judged:
    """Judges an assistant's turn.

    Args:
      request: what was asked.
      template: tool-call template that was asked for.
      text: the turn without its end.

    Raises:
      UserError: no such template.
    """
    found = templates.parse(template, text, request.tools)
    if found.problems:
        return Judged(why=found.problems[0])
    if not found.calls:
        if request.calls != ():
            return Judged(why="no call in this template")
        other = next((name for name in templates.TEMPLATES if templates.parse(name, text, request.tools).calls), "")
        if other:
            return Judged(uncalled=True, why=f"a call, in template {other}")
        return Judged(True, True, True) if text.strip() else Judged(why="nothing was said")
    fault = next(filter(None, map(request.fault, found.calls)), "") or _misread(request, template, text, found)
    if fault:
        return Judged(True, uncalled=request.calls == (), why=fault)
    right = request.calls is None or _same_calls(request, found.calls, request.calls)
    return Judged(True, True, right, request.calls == (), "" if right else "not the calls that were asked for")


def expresses(template: str, request: Request) -> bool:
    """Whether a template can say what is right, and it is read back as it was; False for what it cannot write."""
    if not request.calls:
        return True
    try:
        return judge(request, template, templates.render(template, "", request.calls)).right
    except UserError:
        return False


def _misread(request: Request, template: str, text: str, found: ParsedMessage) -> str:
    """A boolean that was written as another word: templates without types read all of these as False."""
    untyped = [{"type": "function", "function": {"name": name}} for name in request.functions]
    written = templates.parse(template, text, untyped).calls
    for call, plain in zip(found.calls, written):
        for name, value in call.arguments.items():
            word = plain.arguments.get(name)
            if value is False and isinstance(word, str) and word.strip().lower() not in _NO:
                return f"{call.name}[{name!r}]: {word[:40]!r} is no boolean"
    return ""


def _same_calls(request: Request, calls: list[ToolCall], wanted: tuple[ToolCall, ...]) -> bool:
    left = [(call.name, _completed(request.functions[call.name], call)) for call in wanted]
    if len(calls) != len(left):
        return False
    for call in calls:
        one = (call.name, _completed(request.functions[call.name], call))
        match = next((index for index, other in enumerate(left) if one[0] == other[0] and same(one[1], other[1])), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _completed(function: Mapping[str, Any], call: ToolCall) -> dict[str, Any]:
    """The arguments with the defaults of those that were left out."""
    properties = (function.get("parameters") or {}).get("properties") or {}
    defaults = {name: schema["default"] for name, schema in properties.items()
                if isinstance(schema, Mapping) and "default" in schema}
    return defaults | dict(call.arguments)
