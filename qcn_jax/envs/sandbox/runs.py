"""What came of what ran in a sandbox."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

PASSING = frozenset({"passed", "xfailed"})  # SWE-bench's reading: an expected failure counts as a pass


@dataclasses.dataclass(frozen=True)
class ExecResult:
    """What a command did; `exit_code` is 128 + signal where a signal ended it."""

    exit_code: int
    output: str  # standard output and error, the middle left out where too long
    timed_out: bool
    out_of_memory: bool
    seconds: float
    network: Mapping[str, int] = dataclasses.field(default_factory=dict)  # requests served, refused/RULE


@dataclasses.dataclass(frozen=True)
class TestRun:
    """What a test run did.

    `outcomes` maps node ids to passed, failed, error, skipped, xfailed or xpassed; a file that cannot be
    collected is listed under its path as error. `messages` says in one line each what the first failures were.
    `tampered` names what in pytest or the results was interfered with, and is empty in an honest run.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    status: str  # ok, timeout, out_of_memory, killed
    outcomes: dict[str, str]
    messages: dict[str, str]
    seconds: float
    output: str
    exit_status: int
    cpu_seconds: float = 0.0
    tampered: tuple[str, ...] = ()
    evidence: tuple[tuple[str, int, Any], ...] = ()  # (node id, number, value) of claims, where tests make such
    served: tuple[str, ...] = ()  # files of the repository that pages are made of, where pages are tested

    @property
    def outcome(self) -> str:
        """passed (every test that ran did what it must, and at least one did), failed, timeout, out_of_memory, killed.

        Failures of the infrastructure are no outcome of a run: they are raised as SandboxError.
        """
        if self.status != "ok":
            return self.status
        good = self.exit_status == 0 and not self.tampered and bool(self.outcomes)
        return "passed" if good else "failed"

    def passed(self, node_ids: Sequence[str]) -> bool:
        """Whether the run was orderly and every one of `node_ids` passed."""
        return (self.status == "ok" and not self.tampered
                and all(self.outcomes.get(name) in PASSING for name in node_ids))


@dataclasses.dataclass(frozen=True)
class PythonResult:
    """What a harness script did: status is ok, error, timeout, out_of_memory or killed."""

    status: str
    value: Any
    error: str
    output: str
    seconds: float


def test_run(reply: Mapping[str, Any]) -> TestRun:
    """Reads a server's reply."""
    return TestRun(reply["status"], reply["outcomes"], reply["messages"], reply["seconds"], reply["output"],
                   reply["exit_status"], reply["cpu"], tuple(reply["tampered"]),
                   tuple((name, number, value) for name, number, value in reply.get("evidence", ())),
                   tuple(reply.get("served", ())))
