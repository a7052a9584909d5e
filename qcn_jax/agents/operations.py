"""The operations behind tools: module-level functions `(executor, **arguments) -> text or ToolResult`.

Scaffolds pick some, name them and describe them (`agents.scaffolds`). An operation raises ToolError or WorkspaceError
where it cannot do its work, which the agent is told.
"""

from collections.abc import Callable

from qcn_jax.agents.python_code import occurrences
from qcn_jax.agents.tools import MAX_EDITED, RunSummary, ToolError, ToolExecutor, ToolResult
from qcn_jax.agents.workspace import WorkspaceError, relative_path
from qcn_jax.envs.sandbox.base import ExecResult

MAX_MATCHES, MAX_MATCH = 50, 200  # lines that `search` shows, and characters of one
BASH_TIMEOUT = 60.0  # seconds, as in mini-swe-agent's SWE-bench configuration
MINI_OUTPUT = 10_000  # characters of a command's output that mini-swe-agent shows whole
SUBMIT_COMMAND = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"  # mini-swe-agent: first line of output that submits


def view_file(
    executor: ToolExecutor, path: str, start: int = 1, end: int = -1, symbol: str | None = None
) -> str:
    """A file with line numbers as `cat -n` prints them, a range or a function of it; or a folder's files."""
    clean = relative_path(path)
    inside = [p for p in executor.workspace.paths() if clean == "." or p.startswith(clean + "/")]
    if inside:
        return "\n".join(inside)
    text = executor.workspace.read(clean)
    if symbol is not None:
        view = executor.show(path, symbol)
        start, end = view.start, view.end
    lines = text.removesuffix("\n").split("\n")
    last = len(lines) if end == -1 else end
    if not 1 <= start <= max(last, 1) or start > len(lines):
        raise ToolError(f"view: lines {start} to {end} are not in 1 to {len(lines)}")
    return "\n".join(f"{n:6}\t{line}" for n, line in enumerate(lines[start - 1 : last], start))


def search(executor: ToolExecutor, pattern: str, path: str = ".", matches: int = MAX_MATCHES) -> str:
    """Lines that hold `pattern` literally (a regular expression from an agent could run forever)."""
    clean = relative_path(path)
    if not pattern:
        raise ToolError("search: pattern is empty")
    found = []
    for name in executor.workspace.paths():
        if clean not in (".", name) and not name.startswith(clean + "/"):
            continue
        try:
            text = executor.workspace.read(name)
        except WorkspaceError:  # it went away, or may not be read
            continue
        if pattern in text:
            found += [f"{name}:{n}:{line}"[:MAX_MATCH] for n, line in enumerate(text.split("\n"), 1) if pattern in line]
    more = f"\n... {len(found) - matches} more" if len(found) > matches else ""
    return "\n".join(found[:matches]) + more or "no match"


def replace(executor: ToolExecutor, path: str, old: str, new: str = "", every: bool = False) -> str:
    """Replaces `old`, which must occur exactly once in the file (or anywhere, with `every`), by `new`."""
    clean = relative_path(path)
    text = executor.workspace.read(clean)
    count = occurrences(text, old)
    if count == 0 or (count > 1 and not every):
        raise ToolError(f"{clean}: old text occurs {count} times, it must occur exactly once")
    if old == new:
        raise ToolError("old and new text are the same")
    if len(text) + text.count(old) * (len(new) - len(old)) > MAX_EDITED:
        raise ToolError(f"{clean}: would have more than {MAX_EDITED} characters")
    executor.change(clean, text.replace(old, new))
    executor.forget(clean)
    return f"edited {clean}"


def create(executor: ToolExecutor, path: str, text: str, overwrite: bool = False) -> str:
    """Writes a new file; one that exists is refused unless `overwrite`."""
    clean = relative_path(path)
    if not overwrite and clean in executor.workspace.paths():
        raise ToolError(f"{clean}: exists already")
    executor.change(clean, text)
    executor.forget(clean)
    return f"wrote {clean}"


def insert(executor: ToolExecutor, path: str, line: int, text: str) -> str:
    """Puts `text` after line `line` (0: at the beginning)."""
    clean = relative_path(path)
    lines = executor.workspace.read(clean).split("\n")
    if not 0 <= line <= len(lines):
        raise ToolError(f"{clean}: line {line} is not one of 0 to {len(lines)}")
    lines[line:line] = text.removesuffix("\n").split("\n")
    executor.change(clean, "\n".join(lines))
    executor.forget(clean)
    return f"edited {clean}"


def undo(executor: ToolExecutor, path: str | None = None) -> str:
    """Takes the latest change back; with `path` only if it was made there."""
    if path is not None and (not executor._undo or executor._undo[-1][0] != relative_path(path)):
        raise ToolError(f"{path[:100]}: the latest edit was not made there")
    return f"undone: {executor.undo()}"


def run_tests(
    executor: ToolExecutor, tests: list[str] | None = None, describe: Callable[[RunSummary], str] | None = None
) -> ToolResult:
    """Runs the task's tests, or those named; `describe` words the outcome."""
    summary = executor.test(tests)
    return ToolResult("run_tests", (describe or describe_tests)(summary), tests=summary)


def bash(executor: ToolExecutor, command: str, timeout: float = BASH_TIMEOUT) -> ToolResult:
    """Runs a shell command; its output, then the exit status where it is not zero."""
    ran = executor.bash(command, min(max(timeout, 1.0), 10 * BASH_TIMEOUT))
    if ran.timed_out:
        return ToolResult("bash", f"{ran.output}\n(timed out)".lstrip("\n"))
    status = f"\n(exit status {ran.exit_code})" if ran.exit_code else ""
    return ToolResult("bash", (ran.output.rstrip("\n") + status).lstrip("\n") or "(no output)")


def bash_or_submit(executor: ToolExecutor, command: str) -> ToolResult:
    """mini-swe-agent's only tool: a command whose output begins with SUBMIT_COMMAND on a line of its own submits."""
    ran = executor.bash(command, BASH_TIMEOUT)
    first = ran.output.lstrip().split("\n", 1)[0].strip()
    submitted = first == SUBMIT_COMMAND and ran.exit_code == 0 and not ran.timed_out
    return ToolResult("bash", mini_observation(ran, BASH_TIMEOUT), submitted=submitted)


def mini_observation(ran: ExecResult, timeout: float) -> str:
    """What a command did in the form of mini-swe-agent's SWE-bench configuration, its warning in our own words."""
    late = f"<exception>{late_command(timeout)}</exception>\n" if ran.timed_out else ""
    head, output = f"{late}<returncode>{-1 if ran.timed_out else ran.exit_code}</returncode>\n", ran.output
    if len(output) < MINI_OUTPUT:
        return f"{head}<output>\n{output}</output>"
    half = MINI_OUTPUT // 2
    return (f"{head}<warning>\nThe output is too long and its middle is left out. Ask for less: head, tail, sed or a "
            f"narrower search; or write it to a file and search that.\n</warning><output_head>\n{output[:half]}\n"
            f"</output_head>\n<elided_chars>\n{len(output) - MINI_OUTPUT} characters elided\n</elided_chars>\n"
            f"<output_tail>\n{output[-half:]}\n</output_tail>")


def late_command(timeout: float) -> str:
    """How mini-swe-agent's environments word a command that was stopped."""
    return f"An error occurred while executing the command: timed out after {timeout:g} seconds"


def submit(executor: ToolExecutor) -> ToolResult:
    """Ends the episode; what has been edited so far is the answer."""
    return ToolResult("submit", submitted=True)


def describe_tests(summary: RunSummary) -> str:
    """An outcome for a reader with room: counts, names of failed tests, the first failure's message."""
    if summary.passed:
        return f"all {summary.total} tests passed" if summary.total else "all tests passed"
    head = f"{summary.failed} of {summary.total} tests failed" if summary.status == "ok" else f"tests: {summary.status}"
    return "\n".join([head, *summary.names, summary.message]).rstrip()


def terminal(executor: ToolExecutor, command: str, timeout: float = BASH_TIMEOUT) -> ExecResult:
    """Runs a command in a terminal that lasts: folder and exported variables are those that the last one left.

    Processes do not outlive their command: sandboxes end all that a command started.
    """
    state = '"${TMPDIR:-/tmp}/.terminal"'
    script = (f"[ -f {state} ] && . {state}\n"
              f"trap '{{ export -p; echo \"cd \\\"$PWD\\\"\"; }} >{state} 2>/dev/null' EXIT\n{command}")
    return executor.bash(script, min(max(timeout, 1.0), 10 * BASH_TIMEOUT))
