"""Lines and token spans of Python text: what the compact edit tool and the solver speak about."""

import re
from collections.abc import Sequence

from qcn_jax.agents.python_code import occurrences

MAX_LINE_TOKENS = 64  # the tokenizer has <|1|> .. <|64|>
SCRIPT_ENDINGS = (".js", ".mjs", ".jsx")
PAGE_ENDINGS = (*SCRIPT_ENDINGS, ".css", ".html")
LINE_TOKENS = tuple(f"<|{number}|>" for number in range(1, MAX_LINE_TOKENS + 1))

# Python's tokens, except that strings are taken apart into words: a change inside one stays small.
_TOKEN = re.compile(
    r"\w+(?:\.\d+)?|\*\*=|//=|>>=|<<=|\.\.\.|->|:=|==|!=|<=|>=|\*\*|//|>>|<<|[-+*/%&|^@]=|\S"
)


def line_token(number: int) -> str:
    """The tokenizer's token for line `number` (1-based) of a function on view."""
    return LINE_TOKENS[number - 1]


def dedent(lines: Sequence[str]) -> list[str]:
    """`lines` without the indentation of the first one; lines indented less (in strings) stay as they are."""
    indentation = lines[0][: len(lines[0]) - len(lines[0].lstrip())] if lines else ""
    return [line.removeprefix(indentation) for line in lines]


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
