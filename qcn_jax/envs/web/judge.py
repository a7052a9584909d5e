"""Judges how pages look and behave: checks of the DOM and the layout, and a model that sees screenshots.

As in the report (arXiv 2603.00729, section 4.2.1): screenshots are scored against a checklist; interactive elements are
found in the DOM, the model proposes what to do with them, that is done in the browser, and what was before and after is
compared. Without a model the checks score alone.
"""

import base64
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.chat.asking import Ask, asked_for_json
from qcn_jax.chat.endpoint import Endpoint
from qcn_jax.envs.web import running
from qcn_jax.envs.web.page_tests import PageTest, Suite
from qcn_jax.envs.web.running import Call, Element, Survey
from qcn_jax.errors import UserError

CHECKLIST = (
    "Layout: everything has its place and is aligned; nothing overlaps, is cut off or runs out of the window.",
    "Completeness: headings, fields, buttons and contents that such a page needs are there and can be seen.",
    "Quality: texts are readable in size and contrast, spaces are even, and the page looks finished.",
)
MOST_PAGES, MOST_ACTIONS = 4, 3  # of a site that are looked at; of a page that are tried
FULL = 10  # the best score of an item
LEAST = 0.7  # score from which on a page survives
TYPED = ("textbox", "searchbox", "spinbutton", "combobox")

_STATIC = """You judge screenshots of a web page, taken in windows of different widths. Score each item of the checklist
from 0 (not at all) to 10 (fully), by what the screenshots show. Answer with one JSON object and nothing else:
{"scores": [one number for each item, in order]}"""
_ACTIONS = """You test a web page. You see a screenshot and the elements that a visitor can use. Propose up to 3 single
actions that show whether the page works: click an element, or type into it. Answer with one JSON object and nothing
else:
{"actions": [{"element": its number, "do": "click" or "type", "text": "what is typed, for type"}]}"""
_COMPARED = """You test a web page. You see it before and after an action. Score from 0 (nothing happened that should,
or the page broke) to 10 (it did what a visitor expects). Answer with one JSON object and nothing else:
{"score": number}"""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model that takes images, and what it scores by."""

    endpoint: Endpoint
    checklist: tuple[str, ...] = CHECKLIST


def connect(url: str, model: str, flag: str, **options: Any) -> Judge:
    """A judge behind an endpoint that answers.

    Args:
      url: OpenAI-compatible.
      model: takes images.
      flag: names the endpoint where something is wrong.
      options: of Endpoint.

    Raises:
      UserError: it does not answer.
    """
    endpoint = Endpoint(url, model, flag=flag, **options)
    endpoint.check()
    return Judge(endpoint)


@dataclasses.dataclass(frozen=True)
class Review:
    """What was found of a site; each part from 0 to 1, None where nobody looked.

    Attributes:
      checks: share of the checks of the DOM and the layout that hold.
      seen: mean of the checklist's items over all pages.
      acted: mean over the actions that were tried.
      faults: in words.
    """

    checks: float
    seen: float | None = None
    acted: float | None = None
    faults: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The mean of the parts that there are."""
        parts = [part for part in (self.checks, self.seen, self.acted) if part is not None]
        return sum(parts) / len(parts)

    def to_json(self) -> dict[str, Any]:
        """The parts and the score, JSON-ready."""
        return {"score": round(self.score, 4), **dataclasses.asdict(self)}


def review(call: Call, suite: Suite, judge: Judge | None = None) -> Review:
    """Looks at the pages that a suite tests.

    Args:
      call: runs a script in the sandbox of the site.
      suite: tells its pages.
      judge: None: the checks alone.

    Raises:
      SandboxError: the browser does not get to the end.
      UserError: the endpoint cannot be used, or does not answer as asked.
    """
    pages = list(dict.fromkeys(test.page for test in suite.tests))[:MOST_PAGES]
    surveys = running.survey(call, suite, pages)
    held = [found for one in surveys for found in _checks(one)]
    checks = sum(not fault for fault in held) / max(1, len(held))
    faults = [fault for fault in held if fault]
    if judge is None:
        return Review(checks, faults=tuple(faults))
    seen, acted = [], []
    for page in pages:
        views = [one for one in surveys if one.page == page and one.png]
        if not views:
            seen.append(0.0)
            continue
        seen.append(scored(judge, [view.png for view in views]))
        acted += _tried(call, suite, judge, views[0], faults)
    mean = lambda values: sum(values) / len(values) if values else None
    return Review(checks, mean(seen), mean(acted), tuple(faults))


def scored(judge: Judge, screenshots: Sequence[bytes]) -> float:
    """The mean score, 0 to 1, that a model gives screenshots (PNG) of one page against the checklist.

    Raises:
      UserError: the endpoint cannot be used, or does not answer as asked.
    """
    items = "\n".join(f"{number}. {item}" for number, item in enumerate(judge.checklist, 1))
    accept = lambda found: (isinstance(found.get("scores"), list) and len(found["scores"]) == len(judge.checklist)
                            and all(map(_is_score, found["scores"])))
    found = _asked(judge, _STATIC, [_words(f"Checklist:\n{items}"), *map(_image, screenshots)], accept)
    return sum(found["scores"]) / (FULL * len(judge.checklist))


def _checks(one: Survey) -> list[str]:
    """A fault in words, or "", for each thing that is checked."""
    where = f"{one.page} at {one.width} pixels"
    hidden = next((element for element in one.elements if element.hidden), None)
    pair = next(((a, b) for a, b in itertools.combinations(one.elements, 2) if _overlap(a, b)), None)
    return [
        f"{where}: {one.errors[0]}" if one.errors else "",
        "" if one.fits else f"{where}: the page is wider than its window",
        f"{where}: {hidden.role} “{hidden.name}” {hidden.hidden}" if hidden else "",
        f"{where}: “{pair[0].name}” and “{pair[1].name}” overlap" if pair else "",
    ]


def _overlap(a: Element, b: Element) -> bool:
    """Whether two elements meet by more than a pixel and neither lies in the other."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a.box, b.box
    across, down = min(ax + aw, bx + bw) - max(ax, bx), min(ay + ah, by + bh) - max(ay, by)
    within = across >= min(aw, bw) - 1 and down >= min(ah, bh) - 1
    return across > 1 and down > 1 and not within


def _tried(call: Call, suite: Suite, judge: Judge, view: Survey, faults: list[str]) -> list[float]:
    """Scores of the actions that a model proposes on a page; what cannot be done scores 0 and is a fault."""
    usable = [element for element in view.elements if not element.hidden]
    if not usable:
        return []
    listed = "\n".join(f"{number}. {element.role} “{element.name}”" for number, element in enumerate(usable, 1))

    def accept(found: Mapping[str, Any]) -> bool:
        actions = found.get("actions")
        return isinstance(actions, list) and all(
            isinstance(one, dict) and one.get("do") in ("click", "type") and isinstance(one.get("element"), int)
            and 1 <= one["element"] <= len(usable) and isinstance(one.get("text", ""), str) for one in actions)

    found = _asked(judge, _ACTIONS, [_words(f"Elements:\n{listed}"), _image(view.png)], accept)
    steps = [_step(usable[one["element"] - 1], one) for one in found["actions"][:MOST_ACTIONS]]
    looks = running.look(call, suite, [PageTest(f"action {n}", taken, view.page, view.width)
                                       for n, taken in enumerate(steps, 1)])
    scores = []
    for taken, after in zip(steps, looks, strict=True):
        if after.message:
            faults.append(f"{view.page}: {json.dumps(taken[0], ensure_ascii=False)}: {after.message}")
            scores.append(0.0)
            continue
        told = _words(f"Action: {json.dumps(taken, ensure_ascii=False)}\nBefore:\n{view.tree}\nAfter:\n{after.tree}")
        score = _asked(judge, _COMPARED, [told, _image(view.png), _image(after.png)],
                       lambda found: _is_score(found.get("score")))
        scores.append(score["score"] / FULL)
    return scores


def _step(element: Element, action: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """An action as steps of a page test."""
    target = {"role": element.role, "name": element.name}
    if action["do"] == "type" and element.role in TYPED:
        return ({"type": action.get("text", ""), "into": target}, {"press": "Enter"})
    return ({"click": target},)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= FULL


def _asked(judge: Judge, system: str, parts: Sequence[Mapping[str, Any]], accept: Any) -> dict[str, Any]:
    ask: Ask = judge.endpoint.ask
    found = asked_for_json(ask, system, parts, 0, accept)
    if found is None:
        place, model = f"{judge.endpoint.flag}={judge.endpoint.url}", judge.endpoint.model
        raise UserError(f"{place}: {model} does not answer as asked; it must take images and write JSON")
    return found


def _words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(png: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
