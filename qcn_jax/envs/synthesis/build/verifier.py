"""Whether a verifier is one, by execution: it must fail on the defective state, pass on the fixed one, and run the
code.

A verifier that only reads the sources cannot tell working code from the same text that never gets to run, and one that
looks at nothing cannot tell code from no code. So it is also run with the sources emptied and with sources that are
all there but stop as they are loaded; it must fail on both.
"""

import dataclasses
from collections.abc import Collection, Mapping

from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.languages import LANGUAGES
from qcn_jax.envs.tasks import log_parsers


@dataclasses.dataclass(frozen=True)
class Verifier:
    """A command, and the parser of its log ("" : its exit status alone decides)."""

    command: str
    parser: str = ""
    timeout: float = 300.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One execution: outcomes by test, exit status, log."""

    outcomes: dict[str, str]
    status: int
    log: str
    seconds: float
    timed_out: bool = False


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """`problems` is empty where the verifier is accepted; `states` says how it ended on each state it was run on."""

    problems: tuple[str, ...]
    states: dict[str, str]


def run(container: Container, verifier: Verifier) -> Run:
    """Runs the verifier on the container's present state, as a user who owns nothing of it."""
    result = container.run_tests(verifier.command, verifier.timeout)
    outcomes = log_parsers.parser(verifier.parser)(result.output) if verifier.parser else {}
    return Run(outcomes, result.exit_code, result.output, result.seconds, result.timed_out)


def passes(result: Run, expected: Collection[str]) -> bool:
    """Whether all expected tests passed; without expected ones, whether the command succeeded."""
    if expected:
        return all(result.outcomes.get(name) in ("passed", "xfailed") for name in expected)
    return result.status == 0 and not result.timed_out


def accept(
    container: Container, verifier: Verifier, language: str, sources: Mapping[str, str], defect: Mapping[str, str],
    expected: Collection[str] = (),
) -> Acceptance:
    """Runs a verifier on four states of a repository; the container is left in the fixed one.

    Args:
      container: holds the fixed state.
      verifier: to judge.
      language: of `sources`.
      sources: the fixed state's source files, tests not among them.
      defect: files of the defective state that differ.
      expected: tests that pass on the fixed state (empty: the exit status decides).
    """
    speaks = LANGUAGES[language]
    problems: list[str] = []
    states: dict[str, str] = {}

    def attempt(state: str, overlay: Mapping[str, str], wanted: bool, problem: str) -> None:
        container.write(overlay)
        try:
            passed = passes(run(container, verifier), expected)
        finally:
            container.write({path: sources[path] for path in overlay})
        states[state] = "passed" if passed else "failed"
        if passed != wanted:
            problems.append(problem)

    attempt("fixed", {}, True, "fails on the fixed state")
    attempt("defective", defect, False, "passes on the defective state")
    attempt("emptied", {path: speaks.emptied(text) for path, text in sources.items()}, False,
            "passes with the sources emptied")
    attempt("stopped", {path: speaks.stopped(text) for path, text in sources.items()}, False,
            "passes on sources that stop as they are loaded: it reads code and does not run it")
    return Acceptance(tuple(problems), states)
