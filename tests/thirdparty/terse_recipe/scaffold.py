"""Three tools, no prose."""

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.scaffold import Scaffold, object_schema
from qcn_jax.agents.tools import RunSummary, ToolExecutor, ToolResult, ToolSpec


def verdict(summary: RunSummary) -> str:
    """One word."""
    return "good" if summary.passed else "bad"


def check(executor: ToolExecutor) -> ToolResult:
    """Runs the tests."""
    return operations.run_tests(executor, describe=verdict)


SCAFFOLD = Scaffold(
    "terse",
    (
        ToolSpec("swap", "Replaces text.", object_schema("path", "old", "new", path="File.", old="Text.", new="Text."),
                 operations.replace),
        ToolSpec("check", "Runs the tests.", object_schema(), check),
        ToolSpec("done", "Ends the work.", object_schema(), operations.submit),
    ),
    describe_tools=False, output_limit=200,
)
