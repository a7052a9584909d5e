"""Test logs to outcomes: {test id: passed, failed, skipped or xfailed}, for the runners that recipes use.

Ids say where a test stands: pytest's node ids, "package::Test/sub" for Go, "suite > test" where tests nest by name. A
test reported twice keeps its worse outcome, so that a name used twice cannot hide a failure.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator

Outcomes = dict[str, str]
_RANK = ("passed", "xfailed", "skipped", "failed")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _collect(pairs: Iterable[tuple[str, str]]) -> Outcomes:
    found: Outcomes = {}
    for name, outcome in pairs:
        if name not in found or _RANK.index(outcome) > _RANK.index(found[name]):
            found[name] = outcome
    return found


_PYTEST = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped", "XFAIL": "xfailed",
           "XPASS": "passed"}  # fmt: skip
_PYTEST_FIRST = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) ([^\s\[]+(?:\[.*\])?)(?: - .*)?$")  # -rA
_PYTEST_LAST = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")  # -v
_PYTEST_NAME = re.compile(r"\S+::.")


def pytest(log: str) -> Outcomes:
    """`pytest -rA` or `-v`."""
    def pairs() -> Iterator[tuple[str, str]]:
        for line in log.splitlines():
            if found := _PYTEST_FIRST.match(line):
                yield found[2], _PYTEST[found[1]]
            elif (name := _PYTEST_NAME.match(line)) and (found := _PYTEST_LAST.search(line, name.end())):
                yield line[:found.start()], _PYTEST[found[1]]

    return _collect(pairs())


_UNITTEST = re.compile(r"^(\w+) \(([\w.]+)\)(?:.*?)? \.\.\. (ok|FAIL|ERROR|skipped|expected failure|"
                       r"unexpected success)")
_UNITTEST_OUTCOMES = {"ok": "passed", "FAIL": "failed", "ERROR": "failed", "skipped": "skipped",
                      "expected failure": "xfailed", "unexpected success": "failed"}


def unittest(log: str) -> Outcomes:
    """`python -m unittest -v`, also where a docstring's first line stands between name and outcome."""
    joined = re.sub(r"(?m)^(\w+ \([\w.]+\))\n(?=.* \.\.\. )", r"\1 ", log)
    return _collect((f"{found[2]}.{found[1]}" if not found[2].endswith(f".{found[1]}") else found[2],
                     _UNITTEST_OUTCOMES[found[3]])
                    for line in joined.splitlines() if (found := _UNITTEST.match(line)))


_TAP_POINT = re.compile(r"^( *)(not ok|ok)\b *(\d+)? *(?:- )?(.*?)(?: # *(SKIP|TODO)\b.*| # time=.*)?$", re.IGNORECASE)
_TAP_SUBTEST = re.compile(r"^( *)# Subtest: (.*)$")
_TAP_SECTION = re.compile(r"^# (?!tests |pass |fail |ok$|skip|todo|cancelled|suites|duration_ms|failures|not ok)(.+)$")


def tap(log: str) -> Outcomes:
    """TAP of `node --test`, tape, mocha and node-tap: nested tests are "outer > inner", only leaves count.

    tape names its sections by comments; numbers keep apart assertions of one section with equal words.
    """
    found: list[tuple[str, str]] = []
    opened: list[tuple[int, str]] = []  # (indent, name) of subtests under way
    parents: set[str] = set()
    section, counts = "", {}
    for line in _ANSI.sub("", log).splitlines():
        if subtest := _TAP_SUBTEST.match(line):
            indent = len(subtest[1])
            opened = [entry for entry in opened if entry[0] < indent]
            if opened:
                parents.add(" > ".join(name for _, name in opened))
            opened.append((indent, subtest[2].strip()))
        elif point := _TAP_POINT.match(line):
            indent, name = len(point[1]), point[4].strip() or f"test {point[3] or ''}".strip()
            opened = [entry for entry in opened if entry[0] < indent]
            full = " > ".join([*(outer for _, outer in opened), name])
            if not opened and section:
                full = f"{section} > {name}"
                counts[full] = counts.get(full, 0) + 1
                full += f" #{counts[full]}" if counts[full] > 1 else ""
            mark = (point[5] or "").upper()
            failed = point[2].lower() == "not ok"
            found.append((full, "skipped" if mark == "SKIP" else "xfailed" if mark == "TODO" and failed
                          else "failed" if failed else "passed"))
        elif heading := _TAP_SECTION.match(line):
            section = heading[1].strip()
    return _collect((name, outcome) for name, outcome in found if name not in parents)


_JEST_FILE = re.compile(r"^(?:PASS|FAIL) (\S+)")
_JEST_TEST = re.compile(r"^( +)([✓✕√×○]|✎) (?:skipped |todo )?(.*?)(?: \([\d.]+ m?s\))?$")
_JEST_SUITE = re.compile(r"^( +)(\S.*)$")


def jest(log: str) -> Outcomes:
    """`jest --verbose`: "file > suite > test"."""
    found: list[tuple[str, str]] = []
    file, suites = "", []
    listing = False
    for line in _ANSI.sub("", log).splitlines():
        if start := _JEST_FILE.match(line):
            file, suites, listing = start[1], [], True
        elif point := _JEST_TEST.match(line):
            indent = len(point[1])
            suites = [entry for entry in suites if entry[0] < indent]
            outcome = "passed" if point[2] in "✓√" else "failed" if point[2] in "✕×" else "skipped"
            found.append((" > ".join([file, *(name for _, name in suites), point[3].strip()]), outcome))
        elif not line.strip():
            listing = listing and not suites
        elif listing and (suite := _JEST_SUITE.match(line)) and not suite[2].startswith("●"):
            suites = [entry for entry in suites if entry[0] < len(suite[1])] + [(len(suite[1]), suite[2].strip())]
    return _collect(found)


_MOCHA_TEST = re.compile(r"^( +)(?:([✓✔√])|(\d+)\)|-) (.*?)(?: \(\d+ms\))?$")


def mocha(log: str) -> Outcomes:
    """mocha's spec reporter: "suite > test"; its summary of failures is not read."""
    found: list[tuple[str, str]] = []
    suites: list[tuple[int, str]] = []
    for line in _ANSI.sub("", log).splitlines():
        if re.match(r"^ +\d+ passing\b", line):
            break
        if point := _MOCHA_TEST.match(line):
            suites = [entry for entry in suites if entry[0] < len(point[1])]
            outcome = "passed" if point[2] else "failed" if point[3] else "skipped"
            found.append((" > ".join([*(name for _, name in suites), point[4].strip()]), outcome))
        elif suite := _JEST_SUITE.match(line):
            suites = [entry for entry in suites if entry[0] < len(suite[1])] + [(len(suite[1]), suite[2].strip())]
    return _collect(found)


_GO = {"pass": "passed", "fail": "failed", "skip": "skipped"}


def go_test(log: str) -> Outcomes:
    """`go test -json`: "package::TestName/sub"; a package that does not build is failed under its own name."""
    found: list[tuple[str, str]] = []
    for event in _events(log):
        outcome = _GO.get(event.get("Action", ""))
        if outcome and event.get("Test"):
            found.append((f"{event.get('Package', '')}::{event['Test']}", outcome))
        elif outcome == "failed" and event.get("Package"):
            found.append((event["Package"], outcome))
    return _collect(found)


def _events(log: str) -> Iterator[dict[str, str]]:
    """What of a Go log are events, with the fields that are text; tested code may have written into it, too."""
    for line in log.splitlines():
        if line.startswith("{"):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            yield {name: value for name, value in event.items() if isinstance(value, str)}


PARSERS: dict[str, Callable[[str], Outcomes]] = {
    "pytest": pytest, "unittest": unittest, "tap": tap, "jest": jest, "mocha": mocha, "go_test": go_test,
}


def messages(parser: str, log: str) -> dict[str, str]:
    """One line for each failing test of a TAP or Go log: what it said."""
    found: dict[str, str] = {}
    if parser == "go_test":
        for event in _events(log):
            text = event.get("Output", "").strip()
            name = f"{event.get('Package', '')}::{event.get('Test', '')}"
            if event.get("Test") and text and not text.startswith(("=== ", "--- ", "FAIL", "PASS")):
                found.setdefault(name, re.sub(r"^\w+_test\.go:\d+: ", "", text)[:240])
    elif parser == "tap":
        section, name = "", ""
        facts: dict[str, str] = {}
        for line in _ANSI.sub("", log).splitlines():
            point = _TAP_POINT.match(line)
            if point:
                name = point[4].strip() if point[2].lower() == "not ok" else ""
                facts = {}
                name = f"{section} > {name}" if name and section and not point[1] else name
            elif heading := _TAP_SECTION.match(line):
                section = heading[1].strip()
            elif name and (fact := re.match(r"^\s+(error|expected|actual): *(.*)$", line)):
                facts[fact[1]] = fact[2].strip("'\"|- ")
                if facts.get("expected") and facts.get("actual"):
                    found[name] = f"expected {facts['expected'][:100]}, got {facts['actual'][:100]}"
                elif facts.get("error"):
                    found[name] = facts["error"][:240]
    return found
