"""Statements as people write issues: a program that shows the defect, what it gives and what it should give.

The program repeats a recorded call with its receiver constructed (inside/reproduce.py). It is run in both states, and
only what differs there is told, so that every such statement is true, and an agent can reproduce it. No test is named.
"""

import ast
import contextlib
import dataclasses
import importlib.resources
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qcn_jax.envs import python_source
from qcn_jax.envs.sandbox.base import Sandbox
from qcn_jax.envs.synthesis.statement import FULL, Observation, contrast, cut
from qcn_jax.envs.testpaths import is_test_path

MOST_CALLS = 24  # that are tried for one task
MOST_SHOWN = 3  # programs of one issue
_FORMS = ("`{}`", "\n{}\n", "\nraises {}\n")  # in which a statement gives a value
_INTERNAL = re.compile(r"AttributeError: 'NoneType'|NameError|UnboundLocalError")  # nobody expects these of right code
_IMPORTS = ("from ", "import ", "const ")  # how such programs begin
MOST_LINES = 14  # of a test that are shown
INLINE = 60  # characters of a value that stands in a sentence
_INSIDE = importlib.resources.files("qcn_jax.envs.synthesis.inside")
_SCRIPT = "\n".join((_INSIDE / name).read_text() for name in ("clocks.py", "reproduce.py"))


@dataclasses.dataclass(frozen=True)
class Example:
    """A program, and (verb, text) of what its last line gives in the defective and in the fixed state."""

    observation: Observation
    program: str
    came: tuple[str, str]
    expected: tuple[str, str]
    language: str = "python"


def calls(observations: Iterable[Observation]) -> list[Observation]:
    """Those that are worth repeating: what users call comes first, and of calls within each other the outer ones."""
    found = list({(o.path, o.function, o.arguments, o.came[0]): o for o in observations
                  if o.call and not o.call.get("local", False)}.values())
    found.reverse()
    return sorted(found, key=lambda o: _private(o.function) + ("..." in str(o.arguments)))[:MOST_CALLS]


def _private(function: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in function.split("."))


def run(sandbox: Sandbox, observations: Sequence[Observation], timeout: float) -> list[Any]:
    """[program, verb, text] of each repeated call in the sandbox's present state, or None."""
    wanted = [{**{name: o.call[name] for name in ("path", "name", "args", "kinds", "built", "yields")},
               "shows": o.came[0][5:-3] if o.came[0].startswith("left ") else ""} for o in observations]
    done = sandbox.run_python(_SCRIPT, wanted, timeout) if wanted else None
    return done.value if done is not None and done.status == "ok" else [None] * len(wanted)


def programs(text: str, language: str = "python") -> list[str]:
    """Programs in a statement: its code blocks that begin with an import."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)\n```$", text)
    return ["\n".join(line for line in block.split("\n") if line.strip()) for block in blocks
            if block.startswith(_IMPORTS)]


def repeat(sandbox: Sandbox, wanted: Sequence[str], timeout: float) -> list[Any]:
    """What programs give in the sandbox's present state, as `run`."""
    done = sandbox.run_python(_SCRIPT, [{"program": program} for program in wanted], timeout)
    return done.value if done.status == "ok" else [None] * len(wanted)


def falsehood(text: str, bad: Sequence[Any], good: Sequence[Any], language: str = "python") -> str:
    """What in a statement is not so, where its programs give `bad` and `good` in the two states; "" for nothing."""
    for program, came, wanted in zip(programs(text, language), bad, good):
        last = program.split("\n")[-1]
        if came is None or wanted is None:
            return f"`{last}` cannot be repeated"
        if came[1:] == wanted[1:]:
            return f"`{last}` {came[1]} {came[2]} with the fix, too"
        for what, outcome in (("without", came), ("with", wanted)):
            if not any(form.format(outcome[2]) in text for form in _FORMS):
                return f"`{last}` {outcome[1]} {outcome[2]} {what} the fix, which it does not say"
    return ""


def examples(observations: Sequence[Observation], buggy: Sequence[Any], fixed: Sequence[Any],
             forbidden: Sequence[str] = ()) -> list[Example]:
    """Programs that give something else in the two states, of one function; none that holds a `forbidden` word."""
    found: dict[str, Example] = {}
    for observation, bad, good in zip(observations, buggy, fixed):
        if bad is not None and good is not None and bad[0] == good[0] and bad[1:] != good[1:] and not (
                good[1] == "raises" and _INTERNAL.match(good[2])):
            if not names(" ".join((*bad, *good)), forbidden):
                found.setdefault(bad[0], Example(observation, bad[0], tuple(bad[1:]), tuple(good[1:])))
    first = next(iter(found.values()), None)
    return [one for one in found.values() if first and one.observation.function == first.observation.function]


def names(text: str, words: Iterable[str]) -> bool:
    """Whether a text holds one of some words."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in words if word)


def test_names(tests: Iterable[str]) -> list[str]:
    """Names of test functions."""
    return sorted({name.partition("[")[0].split("::")[-1] for name in tests})


def write(shown: Sequence[Example], rng: random.Random, limit: int = FULL) -> str:
    """An issue from programs, in at most `limit` characters; "" where not even the first one fits."""
    first, *others = shown
    text = "\n\n".join((_title(first, rng), _program(first, rng), _difference(first, rng)))
    lines: list[str] = []
    for other in others:
        program = other.program.split("\n")
        if len(lines) < MOST_SHOWN - 1 and program[:-1] == first.program.split("\n")[:-1] and max(
                len(other.came[1]), len(other.expected[1])) <= INLINE and len(program[-1]) <= 2 * INLINE:
            lines.append(f"- `{program[-1]}` {_verb(other.came)}, not {_value(other.expected)}")
    if lines:
        head = rng.choice(("Also:", "Other calls are affected, too:", "I see the same with:"))
        more = f"\n\n{head}\n\n" + "\n".join(lines)
        text += more if len(text) + len(more) <= limit else ""
    return text if len(text) <= limit else ""


def _title(shown: Example, rng: random.Random) -> str:
    name = shown.observation.function.removesuffix(".__init__")
    (came, text), (expected, wanted) = shown.came, shown.expected
    error, right = text.split(":")[0], wanted.split(":")[0]
    if came == "raises" and expected == "raises":
        return rng.choice((f"`{name}` raises {error} instead of {right}", f"Wrong exception from `{name}`")
                          if error != right else (f"`{name}` raises {error} with the wrong message",))
    if came == "raises":
        return rng.choice((f"`{name}` raises {error}", f"{error} from `{name}` on valid input",
                           f"Unexpected {error} in `{name}`"))
    if expected == "raises":
        return rng.choice((f"`{name}` does not raise {right}", f"No {right} from `{name}`"))
    if shown.observation.came[0].startswith("left "):
        return rng.choice((f"`{name}` leaves a wrong state behind", f"Wrong state after `{name}`"))
    return rng.choice((f"`{name}` gives a wrong result", f"Wrong result from `{name}`",
                       f"Unexpected result of `{name}`"))


def _program(shown: Example, rng: random.Random) -> str:
    lead = rng.choice(("To reproduce:", "Steps to reproduce:", "This shows it:", "I ran this:"))
    *imports, last = shown.program.split("\n")
    gap = [""] if imports and all(line.startswith(_IMPORTS) for line in imports) else []
    return "\n".join((lead, "", f"```{shown.language}", *imports, *gap, last, "```"))


def _difference(shown: Example, rng: random.Random) -> str:
    if max(len(shown.came[1]), len(shown.expected[1])) <= INLINE:
        return rng.choice((f"It {_verb(shown.came)}. I would expect {_value(shown.expected)}.",
                           f"The last line {_verb(shown.came)}; it should be {_value(shown.expected)}."
                           if shown.expected[0] == "gives" else
                           f"The last line {_verb(shown.came)}; it should raise `{shown.expected[1]}`."))
    heads = ("Actual result:", "Expected result:") if rng.random() < 0.5 else ("What happens:", "What should happen:")
    return "\n\n".join(f"{head}\n\n```\n{value if verb == 'gives' else f'raises {value}'}\n```"
                       for head, (verb, value) in zip(heads, (shown.came, shown.expected)))


def _verb(outcome: tuple[str, str]) -> str:
    return f"{outcome[0]} `{outcome[1]}`"


def _value(outcome: tuple[str, str]) -> str:
    return f"`{outcome[1]}`" if outcome[0] == "gives" else f"`{outcome[1]}` to be raised"


def from_observation(observation: Observation, limit: int = FULL) -> str:
    """An issue in words, where no program repeats the call: the receiver is shown as it was."""
    values = dict(observation.arguments)
    receiver, share = values.pop("self", values.pop("cls", "")), max(limit // 5, 40)
    given = ", ".join(f"`{name}` = `{cut(text, share)}`" for name, text in values.items())
    whole = [f"`{observation.function}` does not do what it should.", ""]
    whole.append(f"When it is called with {given}" if given else "When it is called without arguments")
    if receiver:
        whole[-1] += f" on `{cut(receiver, share)}`"
    came, wanted = observation.came, observation.expected
    verb = wanted[0] or came[0]
    should = {"returned": "return", "raised": "raise", "yielded": "yield"}.get(verb, verb.replace("left ", "leave ", 1))
    got, expected = contrast(came[1], wanted[1], share)
    whole[-1] += f", it {came[0]} `{got}`. It should {should} `{expected}`."
    return "\n".join(whole)[:limit]


def from_message(message: str, limit: int = FULL, read: Callable[[str], str] | None = None) -> str:
    """An issue where no call was seen misbehaving: the line that failed, and how; "" where no line of a test did.

    Nobody knows what to try where an error is all that is told.
    `read` gives the text of the test's file, of which what the line uses is shown before it.
    """
    said, _, place = message.partition(" | ")
    where, _, line = place.partition(": ")
    path, _, number = where.rpartition(":")
    if line and is_test_path(path):
        if read is not None and number.isdecimal():
            with contextlib.suppress(OSError):
                line = _with_what_it_uses(read(path), int(number)) or line
        return f"The following does not work:\n\n```python\n{line}\n```\n\nIt ends with `{said}`."[:limit]
    return ""


def _with_what_it_uses(source: str, number: int) -> str:
    """The statement at a line of a test, behind those of its function that give what it uses its values.

    Where all have more than MOST_LINES it stands alone, cut off there; "" where it is one line.
    """
    try:
        tree = python_source.parse(source)
    except (SyntaxError, ValueError):
        return ""
    around = [node for node in ast.walk(tree)
              if isinstance(node, ast.FunctionDef) and node.lineno <= number <= node.end_lineno]
    body = max(around, key=lambda node: node.lineno).body if around else []
    at = next((place for place, one in enumerate(body) if one.lineno <= number <= one.end_lineno), None)
    if at is None:
        return ""
    shown, needed = [body[at]], _names(body[at], ast.Load)
    for one in reversed(body[:at]):
        if not needed.isdisjoint(_names(one, ast.Store) | _changed(one)):
            shown.insert(0, one)
            needed |= _names(one, ast.Load)
    lines = python_source.lines(source.removeprefix("\ufeff"))
    text = [line for one in shown for line in _dedented(one, lines)]
    if len(text) > MOST_LINES:
        text = _dedented(body[at], lines)
    if len(text) > MOST_LINES:
        text[MOST_LINES:] = ["    ..."]
    return "\n".join(text) if len(text) > 1 else ""


def _dedented(node: ast.stmt, lines: Sequence[str]) -> list[str]:
    """A statement's lines without its indentation, which what is inside its texts is no part of."""
    inside = {number for one in ast.walk(node) if isinstance(one, ast.JoinedStr | ast.Constant)
              for number in range(one.lineno + 1, (one.end_lineno or one.lineno) + 1)}
    numbers = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return [lines[number - 1].rstrip() if number in inside else lines[number - 1].rstrip()[node.col_offset:]
            for number in numbers]


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, context)}


def _changed(node: ast.AST) -> set[str]:
    """Names whose methods are called, or parts of which are given a value."""
    return {one.value.id for one in ast.walk(node) if isinstance(one, ast.Attribute | ast.Subscript)
            and isinstance(one.value, ast.Name) and (isinstance(one.ctx, ast.Store) or isinstance(node, ast.Expr))}
