"""The text of Python modules as the interpreter reads it: a byte order mark in front, and what ends a line."""

import ast
import io
import re

from qcn_jax import syntax

_MARK = "\ufeff"
_FEED = re.compile(r"^[ \t\f]*\f[ \t\f]*$", re.MULTILINE)


def parse(source: str) -> ast.Module:
    """`ast.parse` of a module's text, with its byte order mark if it has one; raises SyntaxError or ValueError."""
    return syntax.parse(source.removeprefix(_MARK))


def plain(source: str) -> str:
    """The text without its byte order mark, and with blanks in lines of form feeds, which move libcst's positions."""
    return _FEED.sub(lambda line: " " * len(line[0]), source.removeprefix(_MARK))


def lines(source: str) -> list[str]:
    """Lines with their ends, as `ast` counts them: form feeds and U+2028 end none (they do for str.splitlines)."""
    return io.StringIO(source, newline="").readlines()
