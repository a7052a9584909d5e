"""The one registry of log parsers: a function from a log's text to the outcome of each test, by name.

  runner_logs    what test runners print (pytest, unittest, TAP, jest, mocha, go test), for environments that are built
                 here; outcomes are passed, failed, skipped, xfailed
  swebench_logs  what rows of SWE-bench name in `log_parser` (parse_log_...); outcomes are SWE-bench's, PASSED and so on

A log is text that the tested code can write into; tasks of our own are graded by records (`envs.tasks.grading`).
"""

from collections.abc import Callable

from qcn_jax.envs.tasks.log_parsers import runner_logs, swebench_logs
from qcn_jax.errors import UserError

RUNNERS = tuple(runner_logs.PARSERS)
PARSERS: dict[str, Callable[[str], dict[str, str]]] = {**runner_logs.PARSERS, **swebench_logs.PARSERS}


def parser(name: str) -> Callable[[str], dict[str, str]]:
    """Returns the parser called `name`: log -> {test: outcome}; further ones are the `swebench` package's.

    Raises:
      UserError: there is none of that name here, and the `swebench` package has none or is not installed.
    """
    if name in PARSERS:
        return PARSERS[name]
    try:
        from swebench.harness.log_parsers import PARSER_REGISTRY
    except ImportError as error:
        raise UserError(f"log_parser: {name!r} needs the swebench package; pip install swebench") from error
    if name not in PARSER_REGISTRY:
        raise UserError(f"log_parser: no parser {name!r}; known: {', '.join(sorted({*PARSERS, *PARSER_REGISTRY}))}")
    return lambda log: PARSER_REGISTRY[name](log, None)
