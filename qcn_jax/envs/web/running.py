"""Runs page tests in a sandbox, and looks at pages: screenshots, what assistive technology is told, what there is."""

import base64
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.web import building, page_tests, runtime
from qcn_jax.envs.web.building import Built
from qcn_jax.envs.web.page_tests import PageTest, Suite

PATIENCE = 180.0  # seconds of one test after which its page is taken for hung; or a third of the limit of all
SECONDS = 600.0  # of a run that says nothing else
MOST_ELEMENTS = 24  # of a page that are looked at


class Call(Protocol):
    """Runs a script in a sandbox, with `without` in a copy of it that lacks these files: Sandbox.ask_python."""

    def __call__(self, script: str, args: Any, timeout: float, without: Sequence[str] | None = None
                 ) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Look:
    """A page as somebody sees it who has taken some steps: a PNG, its ARIA snapshot, and what went wrong on the way."""

    png: bytes
    tree: str
    message: str


@dataclasses.dataclass(frozen=True)
class Element:
    """Something that a visitor can use: role and name, (x, y, width, height) in pixels, and why it cannot be seen."""

    role: str
    name: str
    box: tuple[float, float, float, float]
    hidden: str = ""


@dataclasses.dataclass(frozen=True)
class Survey:
    """A page as it is opened in a window of `width` pixels: a PNG, its ARIA snapshot, what it offers, its errors."""

    page: str
    width: int
    png: bytes
    tree: str
    fits: bool
    elements: tuple[Element, ...]
    errors: tuple[str, ...]


@functools.cache
def _script() -> str:
    return (pathlib.Path(__file__).parent / "inside" / "start.py").read_text()


def run_tests(call: Call, suites: Mapping[str, Suite], node_ids: Sequence[str] | None, timeout: float,
              fail_fast: bool = False) -> dict[str, Any]:
    """Runs tests; the reply has the form of the server's reply about pytest (sandbox.runs.test_run).

    Args:
      call: runs a script in the sandbox.
      suites: the files of tests by path, from whom the tested code has not got them.
      node_ids: None: all; those that there are not are absent from the outcomes.
      timeout: seconds.
      fail_fast: stop at the first failure.
    """
    wanted = set(page_tests.ids(suites)) if node_ids is None else set(node_ids)
    reply = {"status": "ok", "outcomes": {}, "messages": {}, "seconds": 0.0, "output": "", "exit_status": 0, "cpu": 0.0,
             "tampered": [], "served": []}
    sites: dict[tuple[str, ...], Built] = {}
    for path, suite in suites.items():
        chosen = [(f"{path}::{test.name}", test) for test in suite.tests if f"{path}::{test.name}" in wanted]
        if not chosen:
            continue
        site = _site(call, suite, list(suites), sites)
        if site is not None and site.fault:
            reply["outcomes"] |= {name: "failed" for name, _ in chosen}
            reply["messages"] |= {name: f"step 1: the build fails: {site.fault}" for name, _ in chosen}
            continue
        done = _ask(call, suite, timeout, {"tests": [{**test.to_json(), "id": name} for name, test in chosen],
                                           "failFast": fail_fast}, list(suites), site)
        reply["status"] = done["status"]
        reply["seconds"] += done["seconds"]
        last = done["rows"][-1] if done["rows"] else {}
        reply["served"] = sorted({*reply["served"], *(last.get("served", ()) if site is None else site.sources)})
        for row in done["rows"]:
            if "id" in row:
                reply["outcomes"][row["id"]] = row["outcome"]
                if row["outcome"] != "passed":
                    reply["messages"][row["id"]] = f"step {row['step'] + 1}: {row['message']}"
        if done["status"] != "ok" or fail_fast and reply["messages"]:
            break
    reply["exit_status"] = int(bool(reply["messages"]) or reply["status"] != "ok")
    return reply


def look(call: Call, suite: Suite, views: Sequence[PageTest], timeout: float = SECONDS) -> list[Look]:
    """Screenshots of pages after some steps.

    Raises:
      SandboxError: the browser does not get to the end.
    """
    wanted = [{**view.to_json(), "id": number} for number, view in enumerate(views)]
    done = _ask(call, suite, timeout, {"looks": wanted}, site=_site(call, suite))
    rows = [row for row in done["rows"] if "look" in row]
    if len(rows) != len(views):
        raise SandboxError(f"the browser ended early ({done['status']})")
    return [Look(base64.b64decode(row["png"]), row["tree"], row["message"]) for row in rows]


def survey(call: Call, suite: Suite, pages: Sequence[str], timeout: float = SECONDS) -> list[Survey]:
    """What pages offer as they are opened, each in windows of all page_tests.WIDTHS.

    Raises:
      SandboxError: the browser does not get to the end.
    """
    places = [{"page": page, "width": width, "most": MOST_ELEMENTS} for page in pages for width in page_tests.WIDTHS]
    done = _ask(call, suite, timeout, {"surveys": places}, site=_site(call, suite))
    rows = [row for row in done["rows"] if "survey" in row]
    if len(rows) != len(places):
        raise SandboxError(f"the browser ended early ({done['status']})")
    found = []
    for row in rows:
        place, seen = row["survey"], row["found"]
        if seen is None:
            found.append(Survey(place["page"], place["width"], b"", "", False, (), (row["message"],)))
            continue
        elements = tuple(Element(one["role"], one["name"], _box(one["box"]), one["hidden"]) for one in seen["elements"])
        found.append(Survey(place["page"], place["width"], base64.b64decode(seen["png"]), seen["tree"], seen["fits"],
                            elements, tuple(seen["errors"])))
    return found


def _box(box: Mapping[str, float] | None) -> tuple[float, float, float, float]:
    return (0.0, 0.0, 0.0, 0.0) if box is None else (box["x"], box["y"], box["width"], box["height"])


def _site(call: Call, suite: Suite, hidden: Sequence[str] = (), known: dict[tuple[str, ...], Built] | None = None
          ) -> Built | None:
    """What the pages of a suite are built into, unless it is known; None where they are served as they are."""
    if not suite.build:
        return None
    known, key = {} if known is None else known, (suite.site, *building.pages_of(suite))
    if key not in known:
        known[key] = building.build(call, suite, hidden, key[1:])
    return known[key]


def _ask(call: Call, suite: Suite, timeout: float, wanted: Mapping[str, Any], hidden: Sequence[str] = (),
         site: Built | None = None) -> dict[str, Any]:
    request = {"tests": [], "looks": [], "surveys": [], "failFast": False, "site": suite.site,
               "chromium": runtime.CHROMIUM, "hidden": list(hidden),
               "built": None if site is None else site.showing(building.pages_of(suite)),
               "patience": min(PATIENCE, timeout / 3), **wanted}
    reply = call(_script(), {"folder": runtime.FOLDER, "request": request}, timeout)
    status, value = reply["status"], reply["value"]
    rows = value["rows"] if value else []
    if status == "ok" and not (rows and rows[-1].get("end")):
        raise SandboxError(f"the browser's driver fails: {' '.join(reply['output'].split())[-400:]}")
    if status == "error":
        raise SandboxError(f"the browser cannot be started: {reply['error'][:300]}")
    return {"status": status, "rows": rows, "seconds": reply["seconds"]}
