"""Exchanges of tokens in pages: what nano's rules take for mistakes in JavaScript, style sheets and HTML."""

import re
from collections.abc import Iterator, Sequence

from qcn_jax.recipes.nano.spans import SCRIPT_ENDINGS

Rules = tuple[dict[str, tuple[str, ...]], ...]
# Most suspicious first: a rule maps a token to what it is taken to have been.
SCRIPTS: Rules = (
    {"!": ("",)},
    {"===": ("!==",), "!==": ("===",), "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<=")},
    {"true": ("false",), "false": ("true",), "&&": ("||",), "||": ("&&",)},
    {"+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",), "+=": ("-=",), "-=": ("+=",), "++": ("--",), "--": ("++",)},
)
STYLES: Rules = (
    {"none": ("block",), "hidden": ("visible",), "nowrap": ("wrap",)},
    {"column": ("row",), "row": ("column",), "block": ("flex", "grid"), "max-width": ("min-width",),
     "min-width": ("max-width",), "absolute": ("relative",), "static": ("fixed",)},
    {"#fff": ("#222",), "center": ("space-between",), "0": ("16px",)},
)
PAGES: Rules = (
    {"disabled": ("",), 'tabindex="1"': ("",), 'tabindex="-1"': ("",), 'aria-hidden="true"': ("",)},
    {"div": ("button",), "span": ("label",)},
)
_SCRIPT = re.compile(r"//.*|/\*.*?\*/|'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`(?:\\.|[^`\\])*`|[\w$]+|===|!==|[=!<>]="
                     r"|&&|\|\||=>|\+\+|--|[-+*/]=|\S")
_STYLE = re.compile(r"/\*.*?\*/|#?[\w-]+")
_PAGE = re.compile(r"<!--.*?-->|[\w-]+=\"[^\"]*\"|[\w-]+")


def changes(lines: Sequence[str], path: str) -> Iterator[tuple[int, int, str]]:
    """Yields (rank of the rule, line number from 1, changed line); whole numbers one up and one down come last."""
    script = path.endswith(SCRIPT_ENDINGS)
    rules, token = (SCRIPTS, _SCRIPT) if script else (STYLES, _STYLE) if path.endswith(".css") else (PAGES, _PAGE)
    for number, line in enumerate(lines, 1):
        for found in token.finditer(line):
            swaps = [(rank, swap) for rank, rule in enumerate(rules) for swap in rule.get(found[0], ())]
            if script and found[0].isdigit():
                swaps += [(len(rules), str(int(found[0]) + step)) for step in (-1, 1)]
            for rank, swap in swaps:
                tail = line[found.end():] if swap else line[found.end():].lstrip()
                yield rank, number, line[:found.start()] + swap + tail
