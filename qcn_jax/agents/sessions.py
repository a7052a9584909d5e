"""Tools in a live sandbox that a pool's worker holds: for scaffolds with a shell, one round trip a turn."""

from collections.abc import Callable, Sequence

from qcn_jax.agents.tools import ToolExecutor, ToolResult
from qcn_jax.agents.workspace import SandboxWorkspace
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.pool.env_pool import Session
from qcn_jax.envs.sandbox.base import Sandbox

DEADLINE = 1800.0  # seconds for one turn's calls in a worker; each is bounded by itself


class SessionExecutor:
    """Runs tool calls where a session's sandbox is; an agent that makes no call takes no sandbox.

    Args:
      open_session: makes a session that holds the task's starting state; called with the first calls.
      executor: of the scaffold's tools, without a workspace (None); its state travels with the calls.
    """

    def __init__(self, open_session: Callable[[], Session], executor: ToolExecutor) -> None:
        self._open, self._executor = open_session, executor
        self._session: Session | None = None

    def execute(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """As `ToolExecutor.execute`."""
        if self._session is None:
            self._session = self._open()
        future = self._session.call(execute_in, self._executor, list(calls), deadline=DEADLINE)
        self._executor, results = future.result()
        return results

    def diff(self) -> str:
        """As `ToolExecutor.diff`; raises SandboxError."""
        return self._session.diff().result() if self._session is not None else ""

    def close(self) -> None:
        """Gives the sandbox back; whatever is asked for afterwards raises SandboxError."""
        if self._session is not None:
            self._session.close()


def execute_in(
    sandbox: Sandbox, executor: ToolExecutor, calls: Sequence[ToolCall]
) -> tuple[ToolExecutor, list[ToolResult]]:
    """Runs in a pool worker: `executor`'s calls on `sandbox`; returns the executor's new state, without workspace."""
    executor.workspace = SandboxWorkspace(sandbox)
    results = executor.execute(calls)
    executor.workspace = None
    return executor, results
