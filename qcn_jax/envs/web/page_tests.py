"""Tests of pages: JSON files that say what a visitor does and what there must be; ids are "PATH::NAME".

  {"site": "", "build": "", "tests": [
    {"name": "adds an item", "page": "index.html", "width": 1280, "steps": [
      {"type": "Milk", "into": {"label": "New item"}},
      {"click": {"role": "button", "name": "Add"}},
      {"see": {"role": "listitem", "nth": 0}},
      {"text": {"css": "#count"}, "is": "1 item"}]}]}

Elements are told by what people and assistive technology know: role and name, label, text; or by a CSS selector. `in`
looks inside another element, `nth` takes one of several. Actions are click, hover, type (`into`), press, select
(`from`), open and resize; checks are see (some of its pixels are its own), gone, text and value (`is`), count (`is`),
focus, tab (the Tab key's order), tree (`is`, as Playwright's ARIA snapshot), named (in the accessibility tree), fits
(no sideways scrolling), apart, above, beside, inside, size (`least`) and at (the address). A test also fails where the
page writes an error to the console, throws, or asks for what is not there. With `"build": "vite"` the pages are built
from sources (JSX, TypeScript, modules) before they are opened: see building.py.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from qcn_jax.errors import UserError

ENDING = ".web.json"
BUILDS = ("", "vite")
WIDTHS = (1280, 375)  # pixels: a laptop and a telephone
# Steps by their first key: what that holds, and the keys that must stand beside it with what these hold.
TARGET, TARGETS, TEXT, NUMBER, TRUE, TREE, SIZE = "target", "targets", "text", "number", "true", "tree", "size"
STEPS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "click": (TARGET, {}), "hover": (TARGET, {}), "type": (TEXT, {"into": TARGET}), "press": (TEXT, {}),
    "select": (TEXT, {"from": TARGET}), "open": (TEXT, {}), "resize": (NUMBER, {}), "pass": (TRUE, {}),
    "see": (TARGET, {}), "gone": (TARGET, {}), "text": (TARGET, {"is": TEXT}), "value": (TARGET, {"is": TEXT}),
    "count": (TARGET, {"is": NUMBER}), "focus": (TARGET, {}), "tab": (TARGETS, {}), "tree": (TREE, {"is": TEXT}),
    "named": (TARGET, {}), "fits": (TRUE, {}), "apart": (TARGETS, {}), "above": (TARGETS, {}), "beside": (TARGETS, {}),
    "inside": (TARGETS, {}), "size": (TARGET, {"least": SIZE}), "at": (TEXT, {}),
}  # fmt: skip
ACTIONS = ("click", "hover", "type", "press", "select", "open", "resize")
_KEYS = {"role", "name", "label", "text", "css", "nth", "in"}


@dataclasses.dataclass(frozen=True)
class PageTest:
    """One test: the page is opened in a window of `width` pixels, then the steps are taken."""

    name: str
    steps: tuple[Mapping[str, Any], ...]
    page: str = "index.html"
    width: int = WIDTHS[0]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {"name": self.name, "page": self.page, "width": self.width, "steps": list(self.steps)}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A file of tests: of pages below the folder `site`, which are built first where `build` says with what."""

    tests: tuple[PageTest, ...]
    site: str = ""
    build: str = ""

    def to_text(self) -> str:
        """The file: one step a line, so that changes of a test are few lines of a diff."""
        head = {"site": self.site} | ({"build": self.build} if self.build else {})
        lines = [json.dumps(head)[:-1] + ', "tests": [']
        for number, test in enumerate(self.tests):
            head = json.dumps({"name": test.name, "page": test.page, "width": test.width}, ensure_ascii=False)[:-1]
            lines.append(f'  {head}, "steps": [')
            lines += [f"    {json.dumps(step, ensure_ascii=False)}{',' * (at < len(test.steps) - 1)}"
                      for at, step in enumerate(test.steps)]
            lines.append(f"  ]}}{',' * (number < len(self.tests) - 1)}")
        return "\n".join([*lines, "]}", ""])


def is_tests(path: str) -> bool:
    """Whether a file, by its name, holds tests of pages."""
    return path.endswith(ENDING)


def read(path: str, text: str) -> Suite:
    """Reads a file of tests.

    Raises:
      UserError: it is none; names the file, the test and the step.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("tests"), list):
        raise UserError(f"{path}: expected an object with a list `tests`")
    site, build = found.get("site", ""), found.get("build", "")
    if not isinstance(site, str) or site.startswith("/") or ".." in site.split("/"):
        raise UserError(f"{path}: site must be a folder of the repository, got {site!r}")
    if build not in BUILDS:
        raise UserError(f"{path}: build: unknown {build!r}; allowed: vite, or nothing")
    tests = tuple(_test(f"{path}: test {number}", row) for number, row in enumerate(found["tests"], 1))
    names = [test.name for test in tests]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two tests have the name {min(twice)!r}")
    return Suite(tests, site, build)


def _test(where: str, row: Any) -> PageTest:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"].strip():
        raise UserError(f"{where}: expected an object with a name")
    where = f"{where} ({row['name'][:60]})"
    page, width, steps = row.get("page", "index.html"), row.get("width", WIDTHS[0]), row.get("steps")
    if not isinstance(page, str) or "\n" in row["name"]:
        raise UserError(f"{where}: page and name must be one line of text")
    if not isinstance(width, int) or isinstance(width, bool) or not 100 <= width <= 4000:
        raise UserError(f"{where}: width must be 100 to 4000 pixels, got {width!r}")
    if not isinstance(steps, list):
        raise UserError(f"{where}: steps must be a list")
    for number, step in enumerate(steps, 1):
        if fault := _step_fault(step):
            raise UserError(f"{where}: step {number} {fault}")
    return PageTest(row["name"], tuple(steps), page, width)


def _step_fault(step: Any) -> str:
    if not isinstance(step, dict) or not step:
        return "must be an object"
    name = next(iter(step))
    if name not in STEPS:
        return f"has an unknown first key {name!r}; allowed: {', '.join(STEPS)}"
    kind, beside = STEPS[name]
    if extra := step.keys() - {name, "wait"} - beside.keys():
        return f"{name} has an unknown key {min(extra)!r}; allowed: {', '.join([*beside, 'wait'])}"
    for key, wanted in ((name, kind), *beside.items()):
        if key not in step:
            return f"{name} needs {key!r}"
        if not _fits(step[key], wanted):
            return f"{key}: expected {wanted}, got {json.dumps(step[key])[:80]}"
    return "" if _fits(step.get("wait", 0), NUMBER) else f"wait: expected {NUMBER}"


def _fits(value: Any, kind: str) -> bool:
    if kind == TEXT:
        return isinstance(value, str)
    if kind == NUMBER:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind == TARGETS:
        return isinstance(value, list) and len(value) > 0 and all(_fits(one, TARGET) for one in value)
    if kind == TREE:
        return value is True or _fits(value, TARGET)
    if kind == SIZE:
        return isinstance(value, list) and len(value) == 2 and all(_fits(one, NUMBER) for one in value)
    if kind == TRUE:
        return value is True
    told = isinstance(value, dict) and value.keys() <= _KEYS and len(
        value.keys() & {"role", "label", "text", "css"}) == 1
    return (told and all(isinstance(value[key], str) for key in value.keys() & {"role", "name", "label", "text", "css"})
            and _fits(value.get("nth", 0), NUMBER) and ("in" not in value or _fits(value["in"], TARGET)))


def suites(files: Mapping[str, str]) -> dict[str, Suite]:
    """The tests of a repository, by the path of their file."""
    return {path: read(path, text) for path, text in sorted(files.items()) if is_tests(path)}


def ids(found: Mapping[str, Suite]) -> list[str]:
    """Ids of all tests, in order."""
    return [f"{path}::{test.name}" for path, suite in found.items() for test in suite.tests]


def builds(found: Mapping[str, Suite]) -> bool:
    """Whether any of these pages are built."""
    return any(suite.build for suite in found.values())


def without(suite: Suite, names: Collection[str]) -> Suite:
    """A file without some of its tests."""
    return dataclasses.replace(suite, tests=tuple(test for test in suite.tests if test.name not in names))
