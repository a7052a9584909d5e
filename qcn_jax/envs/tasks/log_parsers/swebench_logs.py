"""Outcomes of tests read from a log, as the parsers that SWE-bench's rows name in `log_parser` read them.

A log is text that the tested code can write into: what is read here is for grading by rules that others publish, and
our own tasks are graded by records that it cannot forge (`envs.tasks.grading`). Parsers of pytest's, Django's and
SymPy's reports are here; those of other languages' runners are taken from the `swebench` package where that is
installed.
"""

import re
from collections.abc import Callable, Iterator

PASSED, FAILED, SKIPPED, ERROR, XFAIL = "PASSED", "FAILED", "SKIPPED", "ERROR", "XFAIL"
STATUSES = (FAILED, PASSED, SKIPPED, ERROR, XFAIL)
_COUNT = re.compile(r"\[\d+\]")  # pytest sums skips up as "SKIPPED [3] file:line: reason", which names no test
_CONTROL = {number: None for number in range(1, 32)}


def _short_summary(log: str, rename: Callable[[str], str] = lambda name: name,
                   edit: Callable[[str], str] = lambda line: line) -> dict[str, str]:
    """Lines "STATUS name ..." of pytest's short summary; a name ends at the first blank."""
    found = {}
    for line in map(edit, log.split("\n")):
        if not line.startswith(STATUSES):
            continue
        words = (line.replace(" - ", " ") if line.startswith(FAILED) else line).split()
        if len(words) > 1 and not (words[0] == SKIPPED and _COUNT.fullmatch(words[1])):
            found[rename(words[1])] = words[0]
    return found


def pytest_log(log: str) -> dict[str, str]:
    """pytest's short summary (`-rA`)."""
    return _short_summary(log)


def pytest_options_log(log: str) -> dict[str, str]:
    """The same, where parameters that are absolute paths are named by their last part."""
    def rename(name: str) -> str:
        start, end = name.find("["), name.rfind("]")
        if not 0 <= start < end:
            return name
        main, option = name[:start], name[start + 1:end]
        if option.startswith("/") and not option.startswith("//") and "*" not in option:
            option = "/" + option.rsplit("/", 1)[-1]
        return f"{main}[{option}]"

    return _short_summary(log, rename)


def pytest_v2_log(log: str) -> dict[str, str]:
    """The same for coloured logs and names that hold blanks, and "name STATUS" as older versions print it."""
    found = {}
    for raw in log.split("\n"):
        line = re.sub(r"\[\d+m", "", raw).translate(_CONTROL)
        if line.startswith(STATUSES):
            words = (line.split(" - ", 1)[0] if line.startswith(FAILED) else line).split()
            if len(words) > 1 and not (words[0] == SKIPPED and _COUNT.fullmatch(words[1])):
                found[" ".join(words[1:])] = words[0]
        elif line.endswith(STATUSES):
            words = line.split()
            if len(words) > 1:
                found[" ".join(words[:-1])] = words[-1]
    return found


def matplotlib_log(log: str) -> dict[str, str]:
    """pytest's summary, where mouse buttons are named by number."""
    return _short_summary(
        log, edit=lambda line: line.replace("MouseButton.LEFT", "1").replace("MouseButton.RIGHT", "3"))


def seaborn_log(log: str) -> dict[str, str]:
    """pytest's verbose lines "name PASSED [..]" and "FAILED name"."""
    found = {}
    for line in log.split("\n"):
        words = line.split()
        if len(words) < 2:
            continue
        if line.startswith(FAILED):
            found[words[1]] = FAILED
        elif f" {PASSED} " in line:
            if words[1] == PASSED:
                found[words[0]] = PASSED
        elif line.startswith(PASSED):
            found[words[1]] = PASSED
    return found


def sympy_log(log: str) -> dict[str, str]:
    """SymPy's runner: "test_x ok", F or E, and a heading for each failure."""
    found = {}
    for line in log.split("\n"):  # r"(_*) (.*)\.py:(.*) (_*)", in linear time
        first, last = line.find(" "), line.rfind(" ")
        at = line.rfind(".py:", first + 1, max(last, 0))
        if first >= 0 and at >= 0:
            found[f"{line[first + 1:at]}.py:{line[at + 4:last]}"] = FAILED
    for line in map(str.strip, log.split("\n")):
        if line.startswith("test_"):
            for ending, status in ((" E", ERROR), (" F", FAILED), (" ok", PASSED)):
                if line.endswith(ending):
                    found[line.split()[0]] = status
    return found


# Output of a Django test between "name ... " and "ok", which ends up on lines of its own.
# (how it begins, how it ends, whether on one line), so that a log of beginnings is read in linear time.
_DJANGO_BROKEN = tuple((re.compile(rf"^(.*?)\s\.\.\.\s{begin}", re.MULTILINE), end, one) for begin, end, one in (
    (r"Testing against Django installed in ", " silenced).\nok", False), (r"Internal Server Error: /", "/\nok", True),
    (r"System check identified no issues \(0 silenced\)", "\nok", True)))
_DJANGO_NOISE = "Applying sites.0002_alter_domain_unique...test_no_migrations"


def django_log(log: str) -> dict[str, str]:
    """unittest's verbose lines as Django's runner prints them."""
    found: dict[str, str] = {}
    previous = None
    for line in map(str.strip, log.split("\n")):
        if "--version is equivalent to version" in line:
            found["--version is equivalent to version"] = PASSED
        if " ... " in line:
            previous = line.split(" ... ")[0]
        for ending in (" ... ok", " ... OK", " ...  OK"):
            if line.endswith(ending):
                if line.startswith(_DJANGO_NOISE):
                    line = line.split("...", 1)[-1].strip()
                found[line.rsplit(ending, 1)[0]] = PASSED
                break
        if " ... skipped" in line:
            found[line.split(" ... skipped")[0]] = SKIPPED
        for ending, heading, status in ((" ... FAIL", "FAIL:", FAILED), (" ... ERROR", "ERROR:", ERROR)):
            if line.endswith(ending):
                found[line.split(ending)[0]] = status
            if line.startswith(heading) and len(line.split()) > 1:
                found[line.split()[1]] = status
        if line.startswith("ok") and previous is not None:
            found[previous] = PASSED
    for pattern in _DJANGO_BROKEN:
        found.update(dict.fromkeys(_between(log, *pattern), PASSED))
    return found


def _between(log: str, begin: re.Pattern[str], end: str, one_line: bool) -> Iterator[str]:
    """What stands before each `begin` that is followed by `end` at the end of a line."""
    at, stop = 0, -1
    while (start := begin.search(log, at)) is not None:
        while stop < start.end() or log[stop + len(end):stop + len(end) + 1] not in ("", "\n"):
            stop = log.find(end, max(start.end(), stop + 1))
            if stop < 0:
                return
        at = stop + len(end)
        if one_line and "\n" in log[start.end():start.end() + (stop - start.end())]:
            at = start.end()
            continue
        yield start[1]


PARSERS: dict[str, Callable[[str], dict[str, str]]] = {
    **{f"parse_log_{name}": pytest_log for name in (
        "pytest", "astroid", "flask", "marshmallow", "pvlib", "pyvista", "sqlfluff", "xarray")},
    **{f"parse_log_{name}": pytest_options_log for name in ("pytest_options", "pydicom", "requests", "pylint")},
    **{f"parse_log_{name}": pytest_v2_log for name in ("pytest_v2", "astropy", "scikit", "sphinx")},
    "parse_log_django": django_log, "parse_log_sympy": sympy_log, "parse_log_matplotlib": matplotlib_log,
    "parse_log_seaborn": seaborn_log,
}
