"""The report's table of what the unified model keeps of each expert's gain (pipeline.evaluate.comparisons.headroom)."""

from collections.abc import Mapping
from typing import Any

from qcn_jax.pipeline.report.parts import table, text


def headroom_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table with its heading; "" where no domain has a unified model.

    Args:
      found: numbers by domain.
    """
    rows = [[text(domain.replace("_sampled", ", sampled")), str(one["tasks"]),
             *(f"{one[name]:.1%}" for name in ("start", "expert", "unified")),
             f"{100 * (one['expert'] - one['start']):+.1f} ({_points(one['gain_ci95'])})", _kept(one)]
            for domain, one in found.items()]
    if not rows:
        return ""
    return ("<h3>What the unified model keeps of each expert's gain</h3><p class=\"sub\">(unified − start) / (expert − "
            "start) over the same tasks, where an expert is measurably better than the model it began from (paired "
            "test, p &lt; 0.05); 95 % intervals are a bootstrap's over tasks.</p>"
            + table(["domain", "tasks", "start", "expert", "unified", "points gained", "of these kept"], rows))


def _points(ends: list[float]) -> str:
    low, high = ends
    return f"{100 * low:+.1f} – {100 * high:+.1f}"


def _kept(one: Mapping[str, Any]) -> str:
    if one["kept"] is None:
        return "<span class=quiet>no headroom</span>"
    low, high = (sign if end is None else f"{end:.0%}" for end, sign in zip(one["ci95"], ("−∞", "∞"), strict=True))
    return f"{one['kept']:.0%} ({low} – {high})"
