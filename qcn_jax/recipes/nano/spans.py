"""Lines, token spans and functions of Python text: what the compact edit tool and the solver speak about."""

import ast
import functools
import re
import threading
from collections.abc import Sequence

MAX_LINE_TOKENS = 64  # the tokenizer has <|1|> .. <|64|>

_PARSING = threading.Lock()

# Python's tokens, except that strings are taken apart into words: a change inside one stays small.
_TOKEN = re.compile(
    r"\w+(?:\.\d+)?|\*\*=|//=|>>=|<<=|\.\.\.|->|:=|==|!=|<=|>=|\*\*|//|>>|<<|[-+*/%&|^@]=|\S"
)


def parse(source: str) -> ast.Module:
    """`ast.parse` that may be called from several threads; raises what it raises.

    CPython 3.11 counts the depth of recursion in a place that all threads share, and when a garbage collection lets
    another thread parse in between it raises SystemError ("AST constructor recursion depth mismatch").
    """
    with _PARSING:
        return ast.parse(source)


def parses(lines: Sequence[str]) -> bool:
    """Whether `lines` are Python."""
    try:
        parse("\n".join(lines))
    except (SyntaxError, ValueError):
        return False
    return True


def line_token(number: int) -> str:
    """The tokenizer's token for line `number` (1-based) of a function on view."""
    return f"<|{number}|>"


def dedent(lines: Sequence[str]) -> list[str]:
    """`lines` without the indentation of the first one; lines indented less (in strings) stay as they are."""
    indentation = lines[0][: len(lines[0]) - len(lines[0].lstrip())] if lines else ""
    return [line.removeprefix(indentation) for line in lines]


def occurrences(line: str, old: str) -> int:
    """How often `old` occurs in `line`, overlapping ones included; an empty `old` never occurs."""
    return sum(line.startswith(old, i) for i in range(len(line))) if old else 0


def minimal_edit(before: str, after: str) -> tuple[str, str] | None:
    """The smallest span of Python tokens whose replacement turns line `before` into line `after`.

    The span begins and ends at token boundaries of both lines, is widened to a neighbouring token where one side
    would be empty (an inserted `not`), and further until it occurs exactly once in `before`. Among spans of equally
    many tokens the one with the fewest characters is taken, then the rightmost.

    Returns:
      (old, new), both non-empty and without outer whitespace, or None where no such span exists: equal lines,
      an empty line, another indentation.
    """
    if before == after or "\n" in before + after:
        return None
    prefix = _common_prefix(before, after)
    suffix = _common_prefix(before[::-1], after[::-1])
    spans = [match.span() for match in _TOKEN.finditer(before)]
    after_spans = [match.span() for match in _TOKEN.finditer(after)]
    starts, ends = {start for start, _ in after_spans}, {end for _, end in after_spans}
    best = None
    for i, (start, _) in enumerate(spans):
        if start > prefix or start not in starts:
            continue
        for j in range(i, len(spans)):
            end = spans[j][1]
            after_end = len(after) - (len(before) - end)
            if len(before) - end > suffix or after_end <= start or after_end not in ends:
                continue
            old, new = before[start:end], after[start:after_end]
            rank = (j - i, len(old) + len(new), -i)
            if (best is None or rank < best[0]) and occurrences(before, old) == 1:
                best = (rank, old, new)
    return best and best[1:]


def _common_prefix(a: str, b: str) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def function_spans(source: str) -> tuple[tuple[str, int, int], ...]:
    """All functions and classes of `source` as (qualified name, first line, last line), 1-based.

    The first line is that of `def` or `class`, below decorators, as everywhere here: defects and mid-training
    documents count lines from it. Names nest with dots (`Class.method`, `outer.inner`); the order is that of the text; a source that does not
    parse has none.
    """
    with _PARSING:  # looked up under the lock: samples of one prompt ask for the same module at the same time
        return _function_spans(source)


@functools.lru_cache(maxsize=256)  # a parsed module costs 10 ms and more
def _function_spans(source: str) -> tuple[tuple[str, int, int], ...]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ()
    found: list[tuple[str, int, int]] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}" if prefix else child.name
                found.append((name, child.lineno, child.end_lineno or child.lineno))
            if not isinstance(child, ast.expr):
                walk(child, name)

    walk(tree, "")
    return tuple(sorted(found, key=lambda item: (item[1], -item[2])))


def find_function(source: str, name: str, line: int | None = None) -> tuple[int, int] | None:
    """First and last line of the function or class called `name` in `source`.

    A full qualified name is preferred over a bare one (`Class.method` over `method`). Where several definitions
    share the name (a property and its setter), the one that holds `line` is taken, else the first.
    """
    spans = function_spans(source)
    matches = [span for span in spans if span[0] == name]
    matches = matches or [span for span in spans if span[0].endswith("." + name)]
    if not matches:
        return None
    holding = [span for span in matches if line is not None and span[1] <= line <= span[2]]
    return (holding or matches)[0][1:]
