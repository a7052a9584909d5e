"""A page that says which of several models is best on a set of tasks: rates and pairs with intervals and p-values."""

import html
from collections.abc import Mapping
from typing import Any

from qcn_jax.pipeline.report.style import CSS


def page(title: str, found: Mapping[str, Any], summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One HTML document without anything from elsewhere.

    Args:
      title: of the page.
      found: of agents.comparing.compare.
      summaries: summary.json by an evaluation's name.
    """
    rows = "".join(_rate(one, summaries[one["name"]]) for one in found["evaluations"])
    pairs = "".join(_pair(pair, len(found["pairs"]) > 1) for pair in found["pairs"])
    pair_heads = ["second", "won", "lost", "tied", "difference", "95 % interval", "p",
                  *(["p, adjusted"] if len(found["pairs"]) > 1 else [])]
    heads = ["resolved", "95 % interval", "pass@k", "unresolved", "limit", "infrastructure", "suspected exploit",
             "refused calls", "turns"]
    compared = "" if not pairs else (
        "<section><h2>Pairs</h2><p class='sub'>A task is won by the model of which a larger share of attempts resolves "
        "it. p is McNemar's exact one of single attempts, else a sign-flip test's over tasks; the interval of a "
        "difference is a bootstrap's over tasks.</p><div class='scroll'><table>"
        f"{_head('first', pair_heads)}{pairs}</table></div></section>")
    return ("<!doctype html><html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{CSS}</style><main><header><h1>{html.escape(title)}</h1>"
            f"<p>{found['tasks']} tasks, each verified by execution: its own fix resolves it, and nothing does not. "
            "Every patch was graded in a fresh sandbox that its author never saw.</p></header>"
            f"<section><h2>Models</h2><div class='scroll'><table>{_head('model', heads)}{rows}</table></div>"
            f"</section>{compared}</main></html>\n")


def _head(first: str, others: list[str]) -> str:
    return f"<tr><th>{first}</th>{''.join(f'<th>{name}</th>' for name in others)}</tr>"


def _rate(one: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    ks = ", ".join(f"{k}: {value['rate']:.1%}" for k, value in summary["pass_at"].items() if value["rate"] is not None)
    cells = [f"{one['rate']:.1%}", _interval(one["ci95"]), ks, summary["unresolved"], summary["limit"],
             summary["infrastructure"], summary["suspected_exploit"], summary["guard"].get("blocked", 0),
             summary["turns"]]
    return f"<tr><td>{html.escape(one['model'])}</td>{_cells(cells)}</tr>"


def _pair(pair: Mapping[str, Any], several: bool) -> str:
    cells = [pair["won"], pair["lost"], pair["tied"], f"{pair['difference']:+.1%}", _interval(pair["ci95"], "+"),
             f"{pair['p_value']:.4g}", *([f"{pair['p_adjusted']:.4g}"] if several else [])]
    names = f"<td>{html.escape(pair['first_model'])}</td><td>{html.escape(pair['second_model'])}</td>"
    return f"<tr>{names}{_cells(cells)}</tr>"


def _cells(values: list[Any]) -> str:
    return "".join(f"<td>{html.escape(str(value))}</td>" for value in values)


def _interval(ends: list[float], sign: str = "") -> str:
    low, high = ends
    return f"{low:{sign}.1%} to {high:{sign}.1%}"
