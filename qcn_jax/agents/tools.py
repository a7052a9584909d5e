"""Tools: what an agent can do to its workspace, with bounded output.

A tool is a `ToolSpec`: a name, a schema and an operation (`agents.operations`). Scaffolds give the same operations
different names and parameters. A `ToolExecutor` holds one episode's workspace and runs the calls of one assistant
turn; it knows no text format and can be pickled if its workspace can, so it works where the agent loop runs as well as
in a worker process beside a live sandbox (`agents.sessions`).
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax.agents import source_code
from qcn_jax.agents.arguments import ToolError, fit_arguments
from qcn_jax.agents.workspace import Workspace, WorkspaceError, relative_path
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.sandbox.base import ExecResult, TestRun
from qcn_jax.envs.tasks import hidden
from qcn_jax.envs.tasks.schema import Task

# Characters: of a file that is edited, and of what is kept to take edits back; one replacement can lengthen a file a
# thousandfold, and all of this is the host's memory.
MAX_EDITED, MAX_UNDO = 4_000_000, 32_000_000
MAX_CALLS = 16  # calls of one turn that are executed; more than any scaffold needs
MESSAGE_LENGTH = 200  # characters of a failure's last line
_ADDRESS = re.compile(r"0x[0-9a-f]{4,}")
FIRST_TESTS = 16  # F2P tests that run to the end before the rest runs up to its first failure


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What one `run_tests` call saw.

    Attributes:
      passed: all tests that ran did what they must.
      status: TestRun's status: ok, timeout, out_of_memory or killed.
      failed: tests that failed or went missing, of `total` asked for.
      names: the first failed tests.
      message: last line of the first failure.
      seconds: wall time.
    """

    passed: bool
    status: str = "ok"
    failed: int = 0
    total: int = 0
    names: tuple[str, ...] = ()
    message: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What one call gave.

    Attributes:
      text: for the agent; empty where there is nothing to say.
      ok: the call did its work; the calls after a failed one in the same turn are skipped.
      malformed: no such tool, or arguments that do not fit its schema.
      blocked: refused by the guard (`agents.guard`).
      special: spans [start, stop) of `text` that the tool wrote (and no file) and that may become added tokens.
      changed: files changed, or may have (a shell command).
      tests: set by run_tests.
      submitted: the agent is done.
      network: what came of requests to the network during the call (`ExecResult.network`).
    """

    tool: str
    text: str = ""
    ok: bool = True
    malformed: bool = False
    blocked: bool = False
    special: tuple[tuple[int, int], ...] = ()
    changed: bool = False
    tests: RunSummary | None = None
    submitted: bool = False
    network: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ToolSpec:
    """One tool of a scaffold.

    Attributes:
      parameters: JSON schema of type object.
      operation: (executor, **arguments) -> text or ToolResult; a module-level function.
      special: parameters whose values are written as one added token where they spell one.
      shell: runs commands: calls are shown to a guard first, and need a live sandbox.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    operation: Callable[..., "str | ToolResult"]
    special: tuple[str, ...] = ()
    shell: bool = False

    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's function form, which chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclasses.dataclass
class _View:
    """The function on view: lines start .. end (1-based, inclusive) of `path`, to which `edit`'s line numbers refer."""

    path: str
    start: int
    end: int


class ToolExecutor:
    """Runs tool calls on one workspace.

    Args:
      task: says what is on view at first and which tests `run_tests` runs.
      tools: the scaffold's tools.
      workspace: the task's starting state; None only on the way to a worker (`agents.sessions`).
      output_limit: characters of one result; both ends of longer ones are kept.
    """

    def __init__(
        self, task: Task, tools: Sequence[ToolSpec], workspace: Workspace | None, *, output_limit: int = 10_000
    ) -> None:
        self.task, self.workspace = task, workspace
        self._tools = {tool.name: tool for tool in tools}
        self._limit = output_limit
        self._undo: list[tuple[str, str | None, _View | None]] = []
        self._view: _View | None = None
        self._revision, self._requests = 0, {}
        self.notes: dict[str, Any] = {}  # what a scaffold's tools keep between calls; plain values

    def execute(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Runs the calls of one turn in order; those after a failed one or a submission are skipped.

        Raises:
          SandboxError: the sandbox failed, which is not the agent's fault.
        """
        results: list[ToolResult] = []
        for call in calls[:MAX_CALLS]:
            if results and not results[-1].ok:
                results.append(skipped(call))
                continue
            result = self._call(call)
            results.append(clip_result(result, self._limit))
            if result.submitted:
                break
        return results

    def diff(self) -> str:
        """Unified diff of everything changed so far."""
        return self.workspace.diff()

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` takes back to; the workspace must be an OverlayWorkspace, no live sandbox."""
        view = self._view and dataclasses.replace(self._view)
        return self.workspace.snapshot(), list(self._undo), view, self._revision, copy.deepcopy(self.notes)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Makes everything what it was when `snapshot` gave `state`."""
        edits, undo, self._view, self._revision, self.notes = state
        self.workspace.restore(edits)
        self._undo = list(undo)

    def close(self) -> None:
        """Does nothing: the workspace is somebody else's."""

    def _call(self, call: ToolCall) -> ToolResult:
        spec = self._tools.get(call.name)
        if spec is None:
            return ToolResult(call.name, f"no tool {call.name[:40]!r}; tools: {', '.join(self._tools)}", False, True)
        try:
            arguments = fit_arguments(spec.parameters, call.arguments)
        except ToolError as error:
            return ToolResult(call.name, f"{call.name}: {error}", ok=False, malformed=True)
        revision, self._requests = self._revision, {}
        try:
            result = spec.operation(self, **arguments)
        except (ToolError, WorkspaceError) as error:
            result = ToolResult(call.name, str(error), ok=False)
        if not isinstance(result, ToolResult):
            result = ToolResult(call.name, result)
        return dataclasses.replace(result, tool=call.name, changed=self._revision != revision,
                                   network=self._requests)

    def bash(self, command: str, timeout: float) -> ExecResult:
        """Runs a shell command; whatever it did to files counts as a change."""
        self._revision += 1
        ran = self.workspace.bash(command, timeout)
        self._requests = dict(ran.network)
        return ran

    def change(self, path: str, text: str | None) -> None:
        """Writes `text` to `path` so that `undo` can take it back."""
        try:
            before = self.workspace.read(path)
        except WorkspaceError:
            before = None
        view = self._view and dataclasses.replace(self._view)
        if text is not None and len(text) > MAX_EDITED:
            raise ToolError(f"{path}: a file that is edited may have {MAX_EDITED} characters, not {len(text)}")
        self.workspace.write(path, text)
        self._revision += 1
        self._undo.append((path, before, view))
        while sum(len(kept or "") for _, kept, _ in self._undo) > MAX_UNDO:
            del self._undo[0]

    def view(self) -> _View:
        """The function on view; at first the task's own."""
        if self._view is None:
            self.show(None, None)
        assert self._view is not None
        return self._view

    def show(self, path: str | None, symbol: str | None) -> _View:
        """Puts a function, or a whole file, on view.

        Raises:
          ToolError: there is no such function.
        """
        clean = self.task.path if path is None else relative_path(path)
        source = self.workspace.read(clean)
        if symbol is None and path is None:
            symbol = self.task.function or None
        if symbol is None:
            self._view = _View(clean, 1, len(source.split("\n")))
            return self._view
        lines = source_code.find_function(source, clean, symbol, hunk_line(self.task.patch, clean))
        if lines is None:
            raise ToolError(f"no {symbol[:60]!r} in {clean}")
        self._view = _View(clean, *lines)
        return self._view

    def forget(self, path: str) -> None:
        """Takes `path` off view: its line numbers no longer hold."""
        if self._view is not None and self._view.path == path:
            self._view = None

    @property
    def has_changes(self) -> bool:
        """Whether there is a change to take back."""
        return bool(self._undo)

    def undo(self) -> str:
        """Takes the latest change back and returns its path; raises ToolError where there is none."""
        if not self._undo:
            raise ToolError("nothing to undo")
        path, before, self._view = self._undo.pop()
        self.workspace.write(path, before)
        self._revision += 1
        return path

    def test(self, node_ids: Sequence[str] | None = None) -> RunSummary:
        """Runs the given tests, or those of the task that its agent may see."""
        stages = [(tuple(node_ids), False)] if node_ids else visible_tests(self.task)
        seconds = 0.0
        for ids, fail_fast in stages:
            run = self.workspace.run_tests(ids, self.task.timeout, fail_fast)
            must_pass = ids if node_ids else self.task.FAIL_TO_PASS
            summary = summarize(run, ids, set(must_pass or ()), fail_fast)
            seconds += run.seconds
            if not summary.passed:
                break
        return dataclasses.replace(summary, seconds=seconds)


def skipped(call: ToolCall) -> ToolResult:
    """The result of a call that was not made because one before it in the same turn did not work."""
    return ToolResult(call.name, "skipped: the call before it failed", ok=False)


def clip(text: str, limit: int) -> str:
    """`text`, or both of its ends with a note between them where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[len(text) - half :]}"


def clip_result(result: ToolResult, limit: int) -> ToolResult:
    """`result` with its text as `clip` leaves it, and those special spans that are left whole."""
    text, half = clip(result.text, limit), limit // 2
    if text == result.text:
        return result
    shift, tail = len(text) - len(result.text), len(result.text) - half
    kept = [(start, stop) for start, stop in result.special if stop <= half]
    kept += [(start + shift, stop + shift) for start, stop in result.special if start >= tail]
    return dataclasses.replace(result, text=text, special=tuple(kept))


def summarize(run: TestRun, ids: Sequence[str] | None, must_pass: set[str], fail_fast: bool) -> RunSummary:
    """Summarizes a run by grading's rule: tests in `must_pass` must pass, the others must not fail or go missing.

    After a failure under `fail_fast` the tests that did not run are not counted as missing.
    """
    asked = list(ids) if ids is not None else list(run.outcomes)
    bad = [name for name in asked if run.outcomes.get(name) in ("failed", "error", "xpassed")]
    bad += [name for name in asked if run.outcomes.get(name) == "skipped" and name in must_pass]
    if not (fail_fast and bad):
        bad += [name for name in asked if name not in run.outcomes]
    # A file that cannot be collected has its message under its own name, and all of its tests are missing.
    messages = [run.messages[name] for name in (*bad, *run.messages) if run.messages.get(name)]
    passed = run.status == "ok" and not run.tampered and not bad and bool(run.outcomes)
    message = _last_line(messages[0]) if messages else ""
    return RunSummary(passed, run.status, len(bad), len(asked), tuple(bad[:5]), message, run.seconds)


def _last_line(message: str) -> str:
    """The line of a failure's message that says what was wrong, the same in every run.

    pytest explains an assertion below it in lines that begin with "+", "-", "?" or "Use -v".
    """
    lines = [line.strip().removeprefix("E ").strip() for line in message.splitlines()]
    telling = [line for line in lines if line and not line.startswith(("+", "-", "?", "Use -v", "where "))]
    return _ADDRESS.sub("0x0", (telling or lines or [""])[-1])[:MESSAGE_LENGTH]


def visible_tests(task: Task) -> list[tuple[tuple[str, ...] | None, bool]]:
    """Tests that the agent may run, in stages with their fail-fast flags; a stage runs if the one before it passed.

    Where the repository already holds the deciding tests (`test_patch` is empty) these are the task's own; hidden
    tests are not there to be run. What was left of them takes their place, or the repository's whole suite.
    """
    if task.test_patch:
        rest = hidden.left(task) if hidden.takes_out(task) else ()
        return [(rest, True)] if rest else [(None, False)]
    first, rest = task.FAIL_TO_PASS[:FIRST_TESTS], task.FAIL_TO_PASS[FIRST_TESTS:] + task.PASS_TO_PASS
    return [(first, False), (rest, True)] if rest else [(first, False)]


@functools.lru_cache(maxsize=4096)
def hunk_line(patch: str, path: str) -> int | None:
    """First changed line of `path` in `patch`'s own "before" numbering; tells definitions of one name apart."""
    inside, line = False, 0
    for text in patch.split("\n"):
        if text.startswith("--- "):
            inside = text[4:].split("\t")[0].removeprefix("a/") == path
        elif inside and text.startswith("@@ -"):
            line = int(text[4:].split(",")[0].split(" ")[0])
        elif inside and line and text.startswith(("-", "+")) and not text.startswith("+++ "):
            return line
        elif inside and line:
            line += 1
    return None
