"""Functions and syntax of source text in the languages that tasks are in, told by a file's ending; else Python."""

import pathlib
import threading
from collections.abc import Sequence

from qcn_jax.agents import python_code
from qcn_jax.envs.synthesis.inject import treesitter

_UNCHECKED = (".css", ".html")  # a browser makes something of every text
_PARSING = threading.Lock()  # tree-sitter's parsers are not for several threads


def function_spans(source: str, path: str) -> tuple[tuple[str, int, int], ...]:
    """All functions of a file as (qualified name, first line, last line), as python_code.function_spans has them.

    Raises:
      UserError: tree-sitter-language-pack is not installed, which languages other than Python need.
    """
    if pathlib.PurePosixPath(path).suffix in treesitter.GRAMMARS:
        with _PARSING:
            return treesitter.function_spans(source, path)
    return python_code.function_spans(source)


def find_function(source: str, path: str, name: str, line: int | None = None) -> tuple[int, int] | None:
    """First and last line of the function or class called `name` in a file.

    A full qualified name is preferred over a bare one (`Class.method` over `method`). Where several definitions
    share the name (a property and its setter), the one that holds `line` is taken, else the first.

    Raises:
      UserError: see `function_spans`.
    """
    spans = function_spans(source, path)
    matches = [span for span in spans if span[0] == name]
    matches = matches or [span for span in spans if span[0].endswith("." + name)]
    if not matches:
        return None
    holding = [span for span in matches if line is not None and span[1] <= line <= span[2]]
    return (holding or matches)[0][1:]


def parses(lines: Sequence[str], path: str) -> bool:
    """Whether `lines` are a text, or a function, of the language of `path`.

    Raises:
      UserError: see `function_spans`.
    """
    ending = pathlib.PurePosixPath(path).suffix
    if ending in treesitter.GRAMMARS:
        with _PARSING:
            return treesitter.parses("\n".join(lines), path)
    return ending in _UNCHECKED or python_code.parses(lines)
