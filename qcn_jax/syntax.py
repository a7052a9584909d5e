"""Python text to syntax trees and literals, safely from many threads.

CPython 3.11 counts the depth of recursion in a place that all threads share, and when a garbage collection lets another
thread parse in between it raises SystemError ("AST constructor recursion depth mismatch"). Whoever parses text takes
this module's functions instead of those of `ast`.
"""

import ast
import threading
from typing import Any

_PARSING = threading.Lock()


def parse(source: str, mode: str = "exec") -> Any:
    """`ast.parse`; raises what it raises. Returns an ast.Module, with mode "eval" an ast.Expression."""
    with _PARSING:
        return ast.parse(source, mode=mode)


def literal(text: str) -> Any:
    """`ast.literal_eval` of text; raises what it raises."""
    with _PARSING:
        return ast.literal_eval(text)
