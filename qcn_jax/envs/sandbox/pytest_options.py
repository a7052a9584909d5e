"""Settings of a repository's pytest that this place cannot follow: what is left out so that its tests run all the same.

Options of plugins that are not installed (--cov, -n) end pytest before the first test, as do demands for plugins and
versions and strictness about options that only plugins know. Tests in files called tests.py or test.py, which unittest
finds and pytest by itself does not, are found where there are no others.
"""

import configparser
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

Run = tuple[dict[str, Any], bytes]
ATTEMPTS = 4  # pytest names one reason at a time: demands, options, strictness; the last is without any settings
USAGE_ERROR, NOTHING_COLLECTED = 4, 5  # pytest's exit status
_UNITTESTS = frozenset({"test.py", "tests.py"})
_AS_UNITTEST = ("-o", "python_files=test_*.py *_test.py test.py tests.py")
_UNKNOWN = re.compile(r"unrecognized arguments: (.*)")
_PLUGIN = re.compile(r'Error importing plugin "([^"]+)"')
_STRANGE_SETTING = re.compile(r"PytestConfigWarning: Unknown config option: (\w+)")  # where warnings are errors
_RELAXED = ("-o", "required_plugins=", "-o", "minversion=0", "-W", "ignore::pytest.PytestConfigWarning",
            "-W", "ignore::pytest.PytestUnknownMarkWarning")
# Files in pytest's order, and their sections.
_FILES = (("pytest.toml", "pytest"), (".pytest.toml", "pytest"), ("pytest.ini", "pytest"), (".pytest.ini", "pytest"),
          ("pyproject.toml", "tool.pytest.ini_options"), ("pyproject.toml", "tool.pytest"), ("tox.ini", "pytest"),
          ("setup.cfg", "tool:pytest"))  # fmt: skip


def followed(files: Mapping[str, str], settings: dict[str, Any], run: Callable[[dict[str, Any]], Run]
             ) -> tuple[Run, dict[str, Any]]:
    """A run of all tests, and the settings with which pytest took it: the mildest change of `settings` that it takes.

    Args:
      files: texts by path.
      settings: hold pytest_args; what was left out, or added, is added to them as `without`.
      run: runs all tests; gives a reply with outcomes, exit_status and output, and something else.
    """
    first = latest = run(settings)
    if first[0]["exit_status"] == NOTHING_COLLECTED and any(path.rpartition("/")[2] in _UNITTESTS for path in files):
        changed = {**settings, "pytest_args": [*settings["pytest_args"], *_AS_UNITTEST],
                   "without": "tests in files called test.py or tests.py"}
        latest = run(changed)
        if latest[0]["outcomes"]:
            return latest, changed
    said, latest = "", first
    for attempt in range(ATTEMPTS):
        if not is_refused(latest[0]["outcomes"], latest[0]["exit_status"], latest[0]["output"]):
            break
        said += latest[0]["output"]
        more, without = milder(files, said, last=attempt == ATTEMPTS - 1)
        changed = {**settings, "pytest_args": [*settings["pytest_args"], *more], "without": without}
        latest = run(changed)
        if latest[0]["outcomes"]:
            return latest, changed
    return first, settings


def is_refused(outcomes: Mapping[str, str], exit_status: int, output: str) -> bool:
    """Whether pytest ended because of its settings. What a conftest.py fails to import is none of them."""
    if outcomes or "while loading conftest" in output:
        return False
    return exit_status == USAGE_ERROR or bool(_PLUGIN.search(output) or _STRANGE_SETTING.search(output))


def milder(files: Mapping[str, str], output: str, last: bool = False) -> tuple[list[str], str]:
    """Further arguments that leave out what pytest refused, and words for what that is.

    Args:
      files: texts by path.
      output: what pytest said each time.
      last: nothing else helped: no settings at all.
    """
    if last:
        return ["-c", os.devnull], "pytest without the repository's settings"
    given = _addopts(files)
    strange = {word for line in _UNKNOWN.findall(output) for word in line.split()} | {"--strict-config", "--strict"}
    plugins = set(_PLUGIN.findall(output))
    kept, at = [], 0
    while at < len(given):
        if given[at] == "-p" and given[at + 1:at + 2] and given[at + 1] in plugins:
            at += 1
        elif given[at] not in strange and given[at].removeprefix("-p") not in plugins:
            kept.append(given[at])
        at += 1
    unknown = dict.fromkeys([*(word for word in given if word not in kept), *_STRANGE_SETTING.findall(output)])
    gone = " ".join(unknown) or "demands for plugins and versions"
    return ["-o", f"addopts={shlex.join(kept)}", *_RELAXED], f"pytest's options without {gone}"


def _addopts(files: Mapping[str, str]) -> list[str]:
    """The options that the settings in force name."""
    for path, section in _FILES:
        try:
            if path.endswith(".toml"):
                table = tomllib.loads(files.get(path, ""))
                for key in section.split("."):
                    table = table.get(key, {})
                value = table.get("addopts") if isinstance(table, dict) else None
            else:
                parsed = configparser.ConfigParser(interpolation=None, strict=False)
                parsed.read_string(files.get(path, ""))
                value = parsed.get(section, "addopts", fallback=None)
            if value:
                return [str(word) for word in value] if isinstance(value, list) else shlex.split(value)
        except (configparser.Error, ValueError, TypeError, AttributeError, RecursionError):  # of another form
            continue
    return []
