"""The report's section on calls of tools that users define: what models answered, by template and kind of request."""

from collections.abc import Mapping
from typing import Any

from qcn_jax.pipeline.report.parts import section, table, text

_NEVER = "never trained on"


def called_tools(models: Mapping[str, Any], name: str, titles: Mapping[str, str]) -> str:
    """The section; "" where no model has such numbers.

    Args:
      models: numbers by model.
      name: of the expert whose they are.
      titles: of models, in the order in which they are shown.
    """
    shown = {model: part for model in titles if (part := _parts(models.get(model, {}).get(name) or {}))}
    if not shown:
        return ""
    rows = [[text(titles[model]), label or "trained on", str(calls["parsed"]["attempted"]),
             *(_rate(calls[measure]) for measure in ("parsed", "valid", "right"))]
            for model, parts in shown.items() for label, calls in parts.items()]
    content = table(["model", "templates", "requests", "in the template", "fit the schema", "right calls"], rows)
    for title, key in (("template", "by_template"), ("kind of request", "by_kind")):
        content += f"<h3>By {title}: fit the schema, right calls</h3>" + _by(shown, titles, title, key)
    return section(
        "Calls of tools that users define",
        "Requests whose tools stand in the system turn as the demanded template lists them. A call counts as in the "
        "template where nothing of it needs repair, as fitting where it is of a tool that there is and its JSON schema "
        "holds (types, required, enum, no unknown key), as right where it is the call that was asked for. Where no "
        "tool fits, words alone are right.", content)


def _parts(found: Mapping[str, Any]) -> dict[str, Any]:
    """A model's numbers on templates that were trained on, and on others; what is missing is left out."""
    parts = {"": found.get("calls"), _NEVER: (found.get("unseen") or {}).get("calls")}
    return {label: calls for label, calls in parts.items() if calls}


def _by(shown: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], title: str, key: str) -> str:
    groups = dict.fromkeys((label, group) for parts in shown.values() for label, calls in parts.items()
                           for group in calls[key])
    rows = []
    for label, group in sorted(groups):
        cells = []
        for parts in shown.values():
            found = parts.get(label, {}).get(key, {}).get(group)
            cells.append(f"{found['valid']['rate']:.0%}, {found['right']['rate']:.0%}" if found else "–")
        rows.append([text(group) + (f", {label}" if label else ""), *cells])
    return table([title, *(text(titles[model]) for model in shown)], rows)


def _rate(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['rate']:.1%} ({low:.0%} – {high:.0%})"
