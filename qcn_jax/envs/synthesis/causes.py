"""Why a repository gives nothing, or less than it could: the cause in one line, with the option that helps."""

import collections
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping

from qcn_jax.envs.sandbox.base import PREPARE_TIMEOUT, TestRun
from qcn_jax.envs.testpaths import is_test_path

ONLY_DOCTESTS = "those that pass are examples in docstrings, in the files that defects are put into"
_MISSING = re.compile(r"No module named '([\w.]+)'")
_FIXTURE = re.compile(r"fixture '(\w+)' not found")
# Fixtures of the plugins that are most in use.
_PLUGINS = {"mocker": "pytest-mock", "benchmark": "pytest-benchmark", "httpserver": "pytest-httpserver",
            "subtests": "pytest-subtests", "datadir": "pytest-datadir", "shared_datadir": "pytest-datadir",
            "freezer": "pytest-freezer", "snapshot": "syrupy", "event_loop": "pytest-asyncio"}  # fmt: skip
_SAID = re.compile(r"^(?:E +)?((?:[\w.]+: )?(?:error|ERROR|UsageError|INTERNALERROR>).*|mainloop caught .*|"
                   r"[\w.]*(?:Error|Exception|SystemExit|Interrupt)\b.*)$", re.MULTILINE)
_OF_PYTEST = frozenset({"pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments"})


def lacking(files: Collection[str], messages: Iterable[str]) -> str:
    """What messages of failures say is missing, and which option brings it; "" where they do not say so."""
    text = "\n".join(messages)
    modules = collections.Counter(name.split(".")[0] for name in _MISSING.findall(text))
    if modules:
        (name, _), = modules.most_common(1)
        top = {posixpath.dirname(path.removesuffix("/__init__.py").removesuffix(".py")) for path in files
               if path.endswith((f"/{name}/__init__.py", f"/{name}.py")) and not is_test_path(path)}
        if top:
            return f"{name} cannot be imported, which is in {min(top)}: --python_path={min(top)} may help"
        own = next((full for full in _MISSING.findall(text) if full.startswith(f"{name}.")), "")
        if own and is_test_path(f"{name}/x.py") and any(path.startswith(f"{name}/") for path in files):
            return f"{own}, which its tests import, is not in it, as in many source distributions: a clone may have it"
        return _not_installed(name)
    for name in _FIXTURE.findall(text):
        if name in _PLUGINS:
            return _not_installed(_PLUGINS[name])
    return ""


def _not_installed(name: str) -> str:
    return f"{name} is not installed: --sandbox=docker with --setup='pip install {name}' may help"


def of_no_passing_test(files: Collection[str], baseline: TestRun, failures: Iterable[str]) -> str:
    """Why none of a repository's tests passes.

    Args:
      files: paths of the repository.
      baseline: the run of all tests.
      failures: what is said of those that fail.
    """
    failures = [*failures, *baseline.messages.values()]
    if baseline.status in ("timeout", "out_of_memory"):
        limit = f" of {PREPARE_TIMEOUT:.0f} s" if baseline.status == "timeout" else ""
        return f"its tests end in {baseline.status}{limit}"
    if words := lacking(files, [*failures, baseline.output]):
        return words
    if failures:
        return failures[0]
    said = _SAID.findall(baseline.output)
    if said:
        return said[-1][:300]
    if not any(is_test_path(path) and path.endswith(".py") for path in files):
        return "it holds no tests, as many source distributions: a clone may"
    return "no tests were found"


def of_no_candidate(called: Iterable[str], files: Collection[str], sources: Mapping[str, str]) -> str:
    """Why no defect can be put into what a repository's passing tests call.

    Args:
      called: paths of the functions that the tests call.
      files: all paths of the repository.
      sources: those of its Python files that are text.
    """
    paths = {path for path in called if not is_test_path(path)}
    tops = {part.removesuffix(".py") for path in files for part in path.removeprefix("src/").split("/")[:1]}
    if not paths:
        if tops & _OF_PYTEST:
            return f"its tests call the {min(tops & _OF_PYTEST)} that pytest itself runs with, and not its own"
        return "its tests call none of its functions: they may run an installed copy (--python_path), or programs"
    odd = sorted(path for path in paths if path not in sources)
    if len(odd) == len(paths):
        return f"what its tests call is not written in UTF-8 ({odd[0]})"
    return f"the rules find nothing to change in what its tests call ({min(paths - set(odd))})"
