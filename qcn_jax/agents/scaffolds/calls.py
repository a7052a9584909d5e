"""A request that calls of a user's own tools answer (envs/calls): the tools in the system turn, one turn to answer."""

import dataclasses
from typing import Any

from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold
from qcn_jax.chat import templates, tool_frames
from qcn_jax.envs.calls.schema import request_of
from qcn_jax.envs.tasks.schema import Task


class Calls(Scaffold):
    """The task defines the tools, and nothing executes them."""

    def in_template(self, template: str) -> "Calls":
        """As Scaffold.in_template."""
        return dataclasses.replace(self, name=f"calls:{template}", template=template)

    def first_messages(self, task: Task, executor: Any) -> list[Message]:
        """As Scaffold.first_messages: the template lists the tools; `executor` is not looked at."""
        request = request_of(task)
        lead = [(request.system + "\n\n", False)] if request.system else []
        parts = [*lead, *templates.describe(self.template, request.tools)]
        return [{"role": "system", "content": tool_frames.content_of(parts)},
                {"role": "user", "content": self.statement(task)}]


CALLS = Calls("calls", (), describe_tools=False, framed=True, result_role="user", single_turn=True)
