"""Whether an answer solves a problem.

The answer runs once for each test in a sandbox for grading, in which it can change no file, and knows that test's input
alone. What it should give is compared here: a process can claim no result that it does not know.
"""

import contextlib
import json
import math
import secrets
import shlex
import time
from collections.abc import Iterable, Mapping
from typing import Any

from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.problems import rules
from qcn_jax.envs.problems.schema import REPOSITORY, Checks, checks_of
from qcn_jax.envs.sandbox.base import ExecResult, Provider, Sandbox, sandbox
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError

_PROGRAMS = {"python": "python answer.py", "javascript": "node answer.js", "go": "./.answer"}
_CALLS = {"python": "python call.py", "javascript": "node call.js", "sql": "python query.py"}
_NEEDS = {"javascript": "node", "go": "go"}
_BUILD = "HOME=$PWD GOCACHE=$PWD/.cache GOFLAGS=-mod=mod GO111MODULE=off go build -o .answer answer.go"
_BUILD_SECONDS = 120.0
_INPUT = ".input"
_TOLERANCE = 1e-6  # of floats, relative


def grade(provider: Provider, task: Task, patch: str, fail_fast: bool = False) -> Verdict:
    """The verdict on a patch that adds an answer's file; what it does to other files is left out.

    Raises:
      UserError: the sandbox lacks the answer's language.
      SandboxError: the back end failed.
    """
    started, checks = time.monotonic(), checks_of(task)
    if not patch.strip():
        return Verdict(task.instance_id, "empty_patch")
    try:
        changes = patches.apply_changes({}, patch)
    except patches.PatchError as error:
        return Verdict(task.instance_id, "patch_failed", detail=str(error))
    dropped = {path: "an answer is one file" for path in changes if path != checks.path}
    answer = changes.get(checks.path) or ""
    if not answer.strip():
        return Verdict(task.instance_id, "empty_patch", dropped=dropped)
    passed, outcome, message = _examine(provider, task, checks, answer, fail_fast)
    failed = [name for name in task.FAIL_TO_PASS if name not in passed]
    status = {"FAIL_TO_PASS": {"success": [name for name in task.FAIL_TO_PASS if name in passed], "failure": failed},
              "PASS_TO_PASS": {"success": [], "failure": []}}
    return Verdict(task.instance_id, "resolved" if not failed else outcome or "unresolved", status,
                   time.monotonic() - started, {failed[0]: message} if failed else {}, dropped)


def _examine(provider: Provider, task: Task, checks: Checks, answer: str, fail_fast: bool) -> tuple[set[str], str, str]:
    """Names of what passed, the outcome where a limit decided, and what the first failure was."""
    passed, outcome, message = set(), "", ""
    for number, rule in enumerate(checks.rules):
        if rules.met(rule, answer, checks.language):
            passed.add(f"rule {number}")
        else:
            message = message or f"rule {json.dumps(rule)} is not met"
    if not checks.tests or message and fail_fast:
        return passed, outcome, message
    with sandbox(provider, task.repo, {checks.path: answer}, role="grading") as place:
        if fault := _built(place, checks):
            return passed, "", message or fault
        for number, test in enumerate(checks.tests):
            if test.get("files"):  # what an answer made earlier may not stand in their way
                with sandbox(provider, task.repo, {checks.path: answer}, role="grading") as fresh:
                    fault, limit = _run(fresh, checks, test, task.timeout)
            else:
                fault, limit = _run(place, checks, test, task.timeout)
            if not fault:
                passed.add(f"test {number}")
                continue
            outcome, message = outcome or limit, message or fault
            if fail_fast:
                break
    return passed, outcome, message


def _built(place: Sandbox, checks: Checks) -> str:
    """What keeps an answer from being run; "" where nothing does."""
    if checks.language in _NEEDS:
        check_language(place, checks.language)
    built = place.exec(_BUILD, _BUILD_SECONDS) if checks.language == "go" else None
    return f"does not compile: {built.output[:200]}" if built is not None and built.exit_code else ""


def results(provider: Provider, checks: Checks, answer: str, timeout: float) -> list[Any]:
    """What an answer gives on each test: its output, or the value of a call or query; None where it gives none.

    Raises:
      UserError: the sandbox lacks the answer's language.
      SandboxError: the back end failed.
    """
    found: list[Any] = []
    with sandbox(provider, REPOSITORY, {checks.path: answer}, role="grading") as place:
        if _built(place, checks):
            return [None] * len(checks.tests)
        for test in checks.tests:
            ran = _execute(place, checks, test, timeout, "")
            if ran.exit_code or ran.timed_out:
                found.append(None)
            elif "input" in test:
                found.append("\n".join(_plain(ran.output)) + "\n")
            else:
                found.append((_said(ran.output) or {}).get("value"))
    return found


def _run(place: Sandbox, checks: Checks, test: Mapping[str, Any], timeout: float) -> tuple[str, str]:
    """(what is wrong, "" where nothing is; timeout or out_of_memory where that is why) of one test."""
    secret = secrets.token_hex(8)
    ran = _execute(place, checks, test, timeout, secret)
    if ran.timed_out or ran.out_of_memory:
        limit = "timeout" if ran.timed_out else "out_of_memory"
        return limit.replace("_", " "), limit
    return _fault(test, ran, secret), ""


def _execute(place: Sandbox, checks: Checks, test: Mapping[str, Any], timeout: float, secret: str) -> ExecResult:
    """Runs an answer on one test's input."""
    fill = lambda text: text.replace("{secret}", secret)
    for path, text in test.get("files", {}).items():
        place.write(path, fill(text))
    if "input" in test:
        command, given = _PROGRAMS[checks.language], test["input"]
    elif "setup" in test:
        command, given = _CALLS["sql"], json.dumps({"setup": test["setup"]})
    else:
        command, given = _CALLS[checks.language], fill(json.dumps(test["call"]))
    place.write(_INPUT, given)
    return place.exec(f"{command} < {shlex.quote(_INPUT)} 2>/dev/null", timeout)


def _fault(test: Mapping[str, Any], ran: ExecResult, secret: str) -> str:
    """What is wrong with what a test gave."""
    if ran.exit_code:
        return f"exit status {ran.exit_code}"
    if "output" in test:
        return "" if _plain(ran.output) == _plain(test["output"]) else f"printed {ran.output[:100]!r}"
    if "without" in test:
        bad = [word for word in test["without"] if word.replace("{secret}", secret) in ran.output]
        return "gives away what it must not" if bad else "" if _said(ran.output) else "gave no result"
    said = _said(ran.output)
    if said is None:
        return "gave no result"
    if "raises" in test:
        return "" if test["raises"] in said.get("raised", ()) else f"did not raise {test['raises']}"
    if "refuses" in test:
        refused = "raised" in said or said.get("value") is None or said.get("value") is False
        return "" if refused == test["refuses"] else "did not refuse" if test["refuses"] else "refused"
    if "value" not in said:
        return f"raised {said['raised'][0]}"
    if "rows" in test and not test.get("ordered"):
        return "" if _same_rows(said["value"], test["rows"]) else "gave other rows"
    wanted = test["rows"] if "rows" in test else test["returns"]
    return "" if same(said["value"], wanted) else f"gave {json.dumps(said['value'])[:100]}"


def _said(output: str) -> dict[str, Any] | None:
    """The one line of JSON that a driver writes; None where there is anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(output)
        if isinstance(found, dict) and output.count("\n") == 1 and tuple(found) in (("value",), ("raised",)):
            return found
    return None


def _plain(text: str) -> list[str]:
    """Lines without the blanks at their ends, and without empty ones at the end of all."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_rows(found: Any, wanted: list[Any]) -> bool:
    key = lambda row: json.dumps(row, sort_keys=True)
    return isinstance(found, list) and same(sorted(found, key=key), sorted(wanted, key=key))


def same(found: Any, wanted: Any) -> bool:
    """Whether two JSON values are the same; floats nearly."""
    if isinstance(found, bool) or isinstance(wanted, bool) or found is None or wanted is None:
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return found == wanted or math.isclose(found, wanted, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in found)
    return type(found) is type(wanted) and found == wanted


def check_language(place: Sandbox, language: str) -> None:
    """Raises UserError where a sandbox lacks what runs a language."""
    if place.exec(f"command -v {_NEEDS[language]}", _BUILD_SECONDS).exit_code:
        raise UserError(f"problems in {language}: the sandbox has no {_NEEDS[language]}; install it (docker: by "
                        "--config.tasks.setup, or --setup), or leave them out")


def check_languages(pool: EnvPool, tasks: Iterable[Task]) -> None:
    """Raises UserError where the sandboxes lack a language that some of `tasks` are in."""
    for language in sorted({checks_of(task).language for task in tasks if task.checks} & set(_NEEDS)):
        pool.submit(_try_language, language, repository=REPOSITORY).result()


def _try_language(provider: Provider, language: str) -> None:
    with sandbox(provider, REPOSITORY, {}, role="grading") as place:
        check_language(place, language)
