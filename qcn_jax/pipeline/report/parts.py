"""Pieces of the report's page that its sections share."""

import html
from collections.abc import Sequence
from typing import Any


def text(value: Any) -> str:
    """`value` as text of a page."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[int] = ()) -> str:
    """An HTML table; cells are HTML already; `strong` are indices of emphasised rows."""
    lines = ["<div class=\"scroll\"><table><thead><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr></thead><tbody>"]
    for index, row in enumerate(rows):
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        lines.append(f"<tr{' class=strong' if index in strong else ''}>{cells}</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def section(title: str, explanation: str, content: str) -> str:
    """A titled box; "" where there is no content."""
    if not content:
        return ""
    return f"<section><h2>{text(title)}</h2><p class=\"sub\">{explanation}</p>{content}</section>"
