"""Test logs to outcomes: {test id: passed, failed, skipped or xfailed}, for the runners that recipes use.

Ids say where a test stands: pytest's node ids, "package::Test/sub" for Go, "suite > test" where tests nest by name. A
test reported twice keeps its worse outcome, so that a name used twice cannot hide a failure.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

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
            elif line.startswith("SUBFAIL"):  # behind a failed subtest pytest may call its test passed
                words = line.split(" ")
                at = next((number for number, word in enumerate(words) if ".py::" in word), len(words))
                if at < len(words):
                    yield " ".join(words[at:]).partition(" - ")[0], "failed"

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


_TAP_POINT = re.compile(r"^( *)(not ok|ok) +(\d+)\b *(?:- )?(.*?)(?: # *(SKIP|TODO)\b.*| # time=.*)?$", re.IGNORECASE)
MAX_INDENT = 200  # of a point that is read: fifty tests within each other
_TAP_NESTED = re.compile(r"(?m)^ *# Subtest: ")
_TAP_SECTION = re.compile(r"^# (?!tests |pass |fail |ok$|skip|todo|cancelled|suites|duration_ms|failures|not ok)(.+)$")


@dataclasses.dataclass
class _Point:
    """A test point: where it stands, how it ended, and the lines of its YAML block."""

    indent: int
    name: str
    outcome: str
    block: list[str] = dataclasses.field(default_factory=list)
    inner: bool = False  # there are tests within it


def _tap_points(log: str) -> list[_Point]:
    """The points of a TAP log, their names with those around them.

    Tests within a test come before its own point, further in. Nothing else counts: what tests print may look like a
    comment or a heading. tape, which nests nothing, names its sections by comments; numbers keep apart assertions of
    one section with equal words.
    """
    found: list[_Point] = []
    section, counts, nested = "", {}, bool(_TAP_NESTED.search(log))
    block = -1  # the indent of the block that is being read
    for line in _ANSI.sub("", log).splitlines():
        indent = len(line) - len(line.lstrip(" "))
        if block >= 0 and (indent >= block or not line.strip()):
            if line.strip() == "..." and indent == block:
                block = -1
            else:
                found[-1].block.append(line[block:])
            continue
        block = -1
        if indent <= MAX_INDENT and (point := _TAP_POINT.match(line)):
            name = point[4].strip() or f"test {point[3]}"
            if section and not nested:
                name = f"{section} > {name}"
                counts[name] = counts.get(name, 0) + 1
                name += f" #{counts[name]}" if counts[name] > 1 else ""
            mark, failed = (point[5] or "").upper(), point[2].lower() == "not ok"
            outcome = ("skipped" if mark == "SKIP" else "xfailed" if mark == "TODO" and failed
                       else "failed" if failed else "passed")
            one = _Point(indent, name, outcome)
            for other in reversed(found):
                if other.indent <= indent:
                    break
                other.name, one.inner = f"{name} > {other.name}", True
            for other in reversed(found):  # they now stand as far out as this one, for what comes around it
                if other.indent <= indent:
                    break
                other.indent = indent + 1
            found.append(one)
        elif line.strip() == "---" and found and indent > found[-1].indent:
            block = indent
        elif heading := _TAP_SECTION.match(line):
            section = heading[1].strip()
    return found


def tap(log: str) -> Outcomes:
    """TAP of `node --test`, tape, mocha and node-tap: nested tests are "outer > inner", only leaves count."""
    return _collect((point.name, point.outcome) for point in _tap_points(log) if not point.inner)


def _tap_message(block: Sequence[str]) -> str:
    """What the YAML block of a failed point says: what was expected and came, or its error."""
    facts: dict[str, str] = {}
    key = ""
    for line in block:
        if fact := re.match(r"^ {0,2}(\w+): *(.*)$", line):
            key, value = fact[1], fact[2].strip()
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\"`"
            facts[key] = "" if value in ("|-", "|", ">-", ">") else value[1:-1] if quoted else value
        elif key == "error" and line.strip():
            facts[key] += f" {line.strip()}"
    error, expected, actual = (facts.get(name, "").strip() for name in ("error", "expected", "actual"))
    if expected and actual and (not error or error.startswith("Expected ")):
        return f"expected {expected[:100]}, got {actual[:100]}"
    return error[:240]


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


_GO_END = re.compile(r"--- (PASS|FAIL|SKIP): (\S+) \([\d.]+s\)\n?$")
_GO = {"pass": "passed", "fail": "failed", "skip": "skipped"}


def go_test(log: str) -> Outcomes:
    """`go test -json`: "package::TestName/sub"; a package that does not build is failed under its own name."""
    found: list[tuple[str, str]] = []
    for event in _events(log):
        outcome = _GO.get(event.get("Action", ""))
        # Go before 1.20 takes no notice of an end that stands behind what the test printed last.
        end = _GO_END.search(event.get("Output", ""))
        if event.get("Action") == "output" and end and end[2] == event.get("Test"):
            outcome = _GO[end[1].lower()]
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
        failed = {name for name, outcome in go_test(log).items() if outcome == "failed"}
        for event in _events(log):
            text = event.get("Output", "").strip()
            name = f"{event.get('Package', '')}::{event.get('Test', '')}"
            if name in failed and text and not text.startswith(("=== ", "--- ", "FAIL", "PASS")):
                found.setdefault(name, re.sub(r"^\w+_test\.go:\d+: ", "", text)[:240])
    elif parser == "tap":
        for point in _tap_points(log):
            if point.outcome == "failed" and not point.inner and (said := _tap_message(point.block)):
                found.setdefault(point.name, said)
    return found
