"""What tests say about a mined change: the state before, and the state after, with the change's tests in both."""

import dataclasses
import importlib.resources
import math
from collections.abc import Mapping
from typing import Any

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import PASSING, Provider, PythonResult, sandbox

TASK_SECONDS = 4.0  # wall limit of a task's tests, beyond ten times what they took
_SCRIPT = (importlib.resources.files("qcn_jax.envs.synthesis.inside") / "files.py").read_text()


@dataclasses.dataclass(frozen=True)
class Item:
    """A change to execute: everything as it differs from the repository `anchor`, which is prepared.

    `base` leads to the state before; `tests` and `fix` are the two halves of the change (None: deleted).
    """

    anchor: str
    key: str
    base: Mapping[str, str | None] = dataclasses.field(repr=False)
    tests: Mapping[str, str | None] = dataclasses.field(repr=False)
    fix: Mapping[str, str | None] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Finding:
    """`outcome` is kept or the reason why not; the rest is there when kept."""

    key: str
    outcome: str
    detail: str = ""
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] = ()
    messages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout: float = 30.0
    seconds: float = 0.0

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Finding":
        """Reads what `dataclasses.asdict` gave."""
        lists = {name: tuple(row[name]) for name in ("fail_to_pass", "pass_to_pass")}
        return cls(**{**row, **lists})


def examine(provider: Provider, item: Item, timeout: float, reruns: int) -> Finding:
    """Runs the change's test files without and with its fix, and once more each; flaky tests are left out.

    Raises:
      SandboxError: the back end failed.
    """
    before, after = {**item.base, **item.tests}, {**item.base, **item.tests, **item.fix}
    test_files = [path for path, text in item.tests.items() if text is not None and path.endswith(".py")]
    spent: list[float] = []

    def run(overlay: Mapping[str, str | None]) -> PythonResult:
        with sandbox(provider, item.anchor, overlay) as place:
            result = place.run_python(_SCRIPT, {"files": test_files}, timeout)
        spent.append(result.seconds)
        return result

    def broken(result: PythonResult) -> Finding:
        return end(result.status, next(reversed((result.error or result.output).strip().splitlines()), ""))

    def end(outcome: str, detail: str = "") -> Finding:
        return Finding(item.key, outcome, detail[:300], seconds=round(sum(spent), 3))

    first = run(after)
    if first.status != "ok":
        return broken(first)
    fixed = first.value
    passing = [name for name, outcome in fixed["outcomes"].items() if outcome in PASSING]
    if not passing:
        words = next(iter(fixed["messages"].values()), "no tests in its files")
        return end("tests_fail_after" if fixed["outcomes"] else "no_tests_found", words)
    results = [run(before), *(run(state) for _ in range(reruns) for state in (before, after))]
    failed = next((result for result in results if result.status != "ok"), None)
    if failed is not None:
        return broken(failed)
    runs = [result.value for result in results]
    buggy, again_buggy, again_fixed = runs[0], runs[1::2], runs[2::2]

    def stable(name: str) -> bool:
        failing = buggy["outcomes"].get(name) not in PASSING
        return all((r["outcomes"].get(name) not in PASSING) == failing for r in again_buggy) and all(
            r["outcomes"].get(name) in PASSING for r in again_fixed)

    failing = [name for name in passing if buggy["outcomes"].get(name) not in PASSING]
    if not failing:
        return end("no_fail_to_pass")
    fail_to_pass = tuple(name for name in failing if stable(name))
    if not fail_to_pass:
        return end("flaky")
    pass_to_pass = tuple(name for name in passing if buggy["outcomes"].get(name) in PASSING and stable(name))
    messages = {name: words for name, words in buggy["messages"].items()
                if name in fail_to_pass or "::" not in name}
    limit = 5.0 * math.ceil((TASK_SECONDS + 10 * max(fixed["cpu"], buggy["cpu"])) / 5)
    return Finding(item.key, "kept", "", fail_to_pass, pass_to_pass, dict(list(messages.items())[:10]), limit,
                   round(sum(spent), 3))


def difference(anchor: Mapping[str, str], state: Mapping[str, str]) -> dict[str, str | None]:
    """The overlay that turns one state into another."""
    changed: dict[str, str | None] = {path: text for path, text in state.items() if anchor.get(path) != text}
    changed.update({path: None for path in anchor if path not in state})
    return changed


def as_patch(before: Mapping[str, str], changes: Mapping[str, str | None]) -> str:
    """The unified diff of some changes."""
    return patches.make_diff({path: before[path] for path in changes if path in before},
                             {path: text for path, text in changes.items() if text is not None})
