"""What scaffolds for models that read prose have in common: the task's wording and the tools most of them have."""

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.scaffold import field_schema, object_schema
from qcn_jax.agents.tools import ToolSpec

TASK = """\
<uploaded_files>
{root}
</uploaded_files>
A Python repository is in {root}. Consider the following problem:

<problem_statement>
{statement}
</problem_statement>

Change the repository's source files (not its tests or configuration) so that the problem is solved, in a way that \
is general and fits the code around it. Find the code at fault, reproduce the problem, fix it, check with the tests, \
then submit."""

BASH = ToolSpec(
    "bash", "Runs a command in a new shell in the repository.",
    object_schema("command", command="The command.",
                  timeout=field_schema("number", "Seconds after which it is stopped.")),
    operations.bash, shell=True,
)
RUN_TESTS = ToolSpec(
    "run_tests", "Runs the repository's tests.",
    object_schema(tests=field_schema("array", "pytest node ids; by default those that concern the problem.",
                                     items={"type": "string"})),
    operations.run_tests,
)
SUBMIT = ToolSpec("submit", "Ends the work; the edits made so far are the answer.", object_schema(), operations.submit)
