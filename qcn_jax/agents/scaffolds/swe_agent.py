"""SWE-agent's tools: a shell and one editor with the operation in its `command`."""

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.prose import BASH, RUN_TESTS, SUBMIT, TASK
from qcn_jax.agents.scaffolds.scaffold import Scaffold, field_schema, object_schema
from qcn_jax.agents.tools import ToolExecutor, ToolSpec
from qcn_jax.agents.workspace import ROOT


def str_replace_editor(
    executor: ToolExecutor, command: str, path: str, file_text: str | None = None, old_str: str | None = None,
    new_str: str | None = None, insert_line: int | None = None, view_range: list[int] | None = None,
) -> str:
    """SWE-agent's editor: one tool, the operation in `command`."""
    needed = {"create": {"file_text": file_text}, "str_replace": {"old_str": old_str},
              "insert": {"insert_line": insert_line, "new_str": new_str}}.get(command, {})
    for name, value in needed.items():
        if value is None:
            raise operations.ToolError(f"parameter {name!r} is missing for {command}")
    if command == "view":
        try:
            start, end = (int(number) for number in view_range or (1, -1))
        except (TypeError, ValueError) as error:
            raise operations.ToolError("parameter 'view_range' must hold two line numbers") from error
        return operations.view_file(executor, path, start, end)
    if command == "create":
        return operations.create(executor, path, file_text or "")
    if command == "str_replace":
        return operations.replace(executor, path, old_str or "", new_str or "")
    if command == "insert":
        return operations.insert(executor, path, insert_line or 0, new_str or "")
    return operations.undo(executor, path)


EDITOR = object_schema(
    "command", "path",
    command=field_schema("string", "What to do.",
                   enum=["view", "create", "str_replace", "insert", "undo_edit"]),
    path=f"Absolute path, e.g. `{ROOT}/file.py`.", file_text="Content for `create`.",
    old_str="Text to replace, for `str_replace`.", new_str="New text, for `str_replace` and `insert`.",
    insert_line=field_schema("integer", "`insert` puts `new_str` after this line."),
    view_range=field_schema("array", "First and last line to view; [a, -1] to the end.",
                      items={"type": "integer"}),
)

SWE_AGENT = Scaffold(
    "swe_agent",
    (
        BASH,
        ToolSpec(
            "str_replace_editor",
            "Views, creates and edits files; `view` lists a folder or shows a file with line numbers, `create` "
            "refuses files that exist, `str_replace` needs `old_str` to occur exactly once, `undo_edit` takes the "
            "latest edit of `path` back.",
            EDITOR,
            str_replace_editor,
        ),
        RUN_TESTS,
        SUBMIT,
    ),
    system="You are a helpful assistant that can interact with a computer to solve tasks.",
    instance=TASK,
    advice="Your turn held no tool call that could be read: {problem}. Call exactly the tools that you are given.",
)
