"""Sandboxes as an environment of the mini-swe-agent package (2.x), whose agents then run in them.

  from minisweagent.agents.default import DefaultAgent
  with provider.create(task.repo, starting_changes(task, provider.files(task.repo))) as sandbox:
      DefaultAgent(model, SandboxEnvironment(sandbox), **settings).run(task.problem_statement)
      patch = sandbox.diff()
"""

from typing import Any

from qcn_jax.agents.guard import Guard
from qcn_jax.agents.operations import BASH_TIMEOUT, SUBMIT_COMMAND, late_command
from qcn_jax.agents.workspace import ROOT
from qcn_jax.envs.sandbox.base import Sandbox


class SandboxEnvironment:
    """mini-swe-agent's Environment over a sandbox.

    Args:
      sandbox: where commands run.
      guard: refuses commands before they are run; the refusal is their output.
      timeout: seconds of one command.
    """

    def __init__(self, sandbox: Sandbox, guard: Guard | None = None, timeout: float = BASH_TIMEOUT):
        self.sandbox, self.guard, self.timeout = sandbox, guard or Guard(), timeout
        self.config = {"cwd": ROOT, "timeout": timeout}

    def execute(self, action: dict[str, Any], cwd: str = "", *, timeout: float | None = None) -> dict[str, Any]:
        """Runs `action["command"]`; returns output, returncode and exception_info.

        Raises:
          minisweagent.exceptions.Submitted: the output's first line says that the agent is done.
          SandboxError: the sandbox failed.
        """
        command = action.get("command", "")
        rule = self.guard.check("bash", {"command": command})
        if rule is not None:
            return {"output": rule.message, "returncode": 1, "exception_info": ""}
        if cwd:
            command = f"cd {cwd} && {{ {command}\n}}"
        limit = timeout or self.timeout
        ran = self.sandbox.exec(command, limit)
        self.guard.add(ran.network)
        late = late_command(limit) * ran.timed_out
        output = {"output": ran.output, "returncode": -1 if late else ran.exit_code, "exception_info": late}
        lines = ran.output.lstrip().splitlines(keepends=True)
        if lines and lines[0].strip() == SUBMIT_COMMAND and output["returncode"] == 0:
            from minisweagent.exceptions import Submitted

            submission = "".join(lines[1:])
            raise Submitted({"role": "exit", "content": submission,
                             "extra": {"exit_status": "Submitted", "submission": submission}})
        return output

    def get_template_vars(self, **more: Any) -> dict[str, Any]:
        """What prompts may refer to; nothing of this machine's."""
        return {**self.config, "system": "Linux", "release": "", "version": "", "machine": "x86_64", **more}

    def serialize(self) -> dict[str, Any]:
        """For trajectories."""
        kind = f"{type(self).__module__}.{type(self).__name__}"
        return {"info": {"config": {"environment": self.config, "environment_type": kind}}}
