"""Sample trajectories, readable turn by turn: each a <details> with the conversation in coloured boxes."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

_TAG = re.compile(r"(&lt;/?(?:tool_call|tool_response|function|parameter)(?:=[\w.-]*)?&gt;)")
_TOKEN = re.compile(r"&lt;\|(\w+)\|&gt;")
_ROLES = {"user": "task", "assistant": "model", "tool": "environment", "system": "system"}


def trajectories_section(trajectories: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """The section; "" where there are no trajectories.

    Args:
      trajectories: each with model, instance_id, kind, resolved, messages (role and content), and of pages optionally
        screenshots.
      titles: how models are called on the page.
    """
    if not trajectories:
        return ""
    items = "".join(_trajectory(one, titles, index == 0) for index, one in enumerate(trajectories))
    return ("<section><h2>Sample trajectories</h2><p class=\"sub\">What the models did on held-out tasks, greedy, as "
            f"it happened; some that worked and some that did not.</p>{items}</section>")


def _trajectory(one: Mapping[str, Any], titles: Mapping[str, str], opened: bool) -> str:
    verdict = "<span class=good>resolved</span>" if one["resolved"] else "<span class=bad>not resolved</span>"
    turns = sum(message["role"] == "assistant" for message in one["messages"])
    boxes = "".join(
        f"<div class=\"turn {html.escape(message['role'])}\"><b>{_ROLES.get(message['role'], 'other')}</b>"
        f"<pre>{highlight(message['content'])}</pre></div>" for message in one["messages"])
    return (f"<details{' open' if opened else ''}><summary>{html.escape(titles.get(one['model'], one['model']))} · "
            f"<code>{html.escape(one['instance_id'])}</code> · {html.escape(one.get('kind', ''))} · {turns} turns · "
            f"{verdict}</summary><div class=\"turns\">{_screenshots(one.get('screenshots', ()))}{boxes}</div>"
            "</details>")


def _screenshots(taken: Sequence[str]) -> str:
    """A page with its defect and as it was left, from PNGs in base64; "" where there are none."""
    shown = [f"<figure style=\"margin:0;flex:1 1 300px\"><figcaption>{words}</figcaption><img alt=\"{words}\" "
             f"style=\"max-width:100%;border:1px solid #888\" src=\"data:image/png;base64,{png}\"></figure>"
             for words, png in zip(("the page with its defect", "the page as it was left"), taken)]
    return f"<div style=\"display:flex;flex-wrap:wrap;gap:12px\">{''.join(shown)}</div>" if shown else ""


def highlight(text: str) -> str:
    """Escapes `text`; colours tool-call tags and shows added tokens by what they hold, numbers aligned."""
    escaped = html.escape(text.strip("\n"), quote=False)
    escaped = _TAG.sub(r'<span class="tag">\1</span>', escaped)
    return _TOKEN.sub(lambda match: f'<span class="token">{match.group(1):>3} </span>', escaped)
