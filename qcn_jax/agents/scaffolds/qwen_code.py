"""Qwen Code's tools: files by absolute path, a search and a shell."""

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.prose import SUBMIT, TASK
from qcn_jax.agents.scaffolds.scaffold import Scaffold, field_schema, object_schema
from qcn_jax.agents.tools import ToolExecutor, ToolResult, ToolSpec
from qcn_jax.agents.workspace import ROOT


def _read_range(executor: ToolExecutor, absolute_path: str, offset: int = 0, limit: int = 2000) -> str:
    lines = operations.view_file(executor, absolute_path, offset + 1).split("\n")
    return "\n".join(lines[: max(limit, 1)])


def _edit_file(
    executor: ToolExecutor, file_path: str, old_string: str, new_string: str, replace_all: bool = False
) -> str:
    if old_string == "":
        return operations.create(executor, file_path, new_string)
    return operations.replace(executor, file_path, old_string, new_string, replace_all)


def _write_file(executor: ToolExecutor, file_path: str, content: str) -> str:
    return operations.create(executor, file_path, content, overwrite=True)


def _list_directory(executor: ToolExecutor, path: str) -> str:
    return operations.view_file(executor, path)


def _shell(executor: ToolExecutor, command: str, description: str = "") -> ToolResult:
    return operations.bash(executor, command)


QWEN_CODE = Scaffold(
    "qwen_code",
    (
        ToolSpec("list_directory", "Lists the files below a folder.", object_schema("path", path="Absolute path."),
                 _list_directory),
        ToolSpec(
            "read_file", "Reads a file with line numbers.",
            object_schema("absolute_path", absolute_path="Absolute path.",
                          offset=field_schema("integer", "Lines to pass over."),
                          limit=field_schema("integer", "Lines to read.")),
            _read_range,
        ),
        ToolSpec("grep_search", "Lists lines that hold a text.",
                 object_schema("pattern", pattern="Literal text.", path="File or folder."), operations.search),
        ToolSpec(
            "edit", "Replaces text in a file; an empty `old_string` creates the file.",
            object_schema("file_path", "old_string", "new_string", file_path="Absolute path.",
                    old_string="Text that occurs exactly once.", new_string="Text that takes its place.",
                    replace_all=field_schema("boolean", "Replace every occurrence.")),
            _edit_file,
        ),
        ToolSpec("write_file", "Writes a whole file.",
                 object_schema("file_path", "content", file_path="Absolute path.", content="Its text."), _write_file),
        ToolSpec("run_shell_command", "Runs a command in a new shell in the repository.",
                 object_schema("command", command="The command.", description="What it is for."),
                 _shell, shell=True),
        SUBMIT,
    ),
    system=f"You are Qwen Code, an agent that works on the repository in {ROOT} from the command line. Follow the "
    "conventions of the code around you, prove changes with the repository's tests, and call submit when done.",
    instance=TASK,
    advice="Your turn held no tool call that could be read: {problem}.",
)
