"""Lets an agent mend a failing test of a repository, and prints the diff if it does.

  qcn fix --repo=. --test=tests/test_core.py::test_count --endpoint=http://localhost:8000/v1 --model=NAME | git apply
  qcn fix --repo=. --test=tests/test_core.py --checkpoint=DIR --scaffold=swe_agent --attempts=4

The agent works on a copy in a sandbox; the repository itself is only read. What it leaves is cut down to paths that a
fix may touch and graded in a fresh sandbox: the named tests must pass, and so must all that passed before. Only such a
diff is printed on stdout, and the exit status is then 0; all else is said on stderr. Attempts are made one after the
other until one succeeds. --out=DIR keeps what was said and tried.
"""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from qcn_jax import files
from qcn_jax.agents import fixing, running
from qcn_jax.agents.arena import Arena, open_arena
from qcn_jax.agents.records import Record
from qcn_jax.cli import acting, parsing, task_repositories
from qcn_jax.envs import names
from qcn_jax.envs.sandbox import SandboxError
from qcn_jax.envs.synthesis import sources
from qcn_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parses flags, lets somebody act, prints a diff that was graded."""
    values = flags.FlagValues()
    flags.DEFINE_string("repo", ".", "Folder or archive of the repository.", flag_values=values)
    flags.DEFINE_multi_string("test", None, "Test that fails: an id as pytest has it, or a file or class of which "
                              "those count that fail. May be given several times.", flag_values=values, required=True)
    flags.DEFINE_string("out", None, "Folder that keeps the episodes.", flag_values=values)
    task_repositories.define_needs(values)
    acting.define_place(values)
    mesh = acting.define_agent(values)
    parsing.parse(values, "fix", __doc__, argv)
    if values.out:
        files.check_folder(values.out, "out")
    spec = dataclasses.replace(sources.locate(values.repo), setup=tuple(values.setup),
                               python_path=task_repositories.python_path(values),
                               modules=task_repositories.modules(values))
    agent = acting.agent(values, mesh)
    with contextlib.ExitStack() as stack:
        out = values.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="qcn-fix-"))
        folder = stack.enter_context(contextlib.closing(running.Folder(pathlib.Path(out), agent.settings)))
        arena = stack.enter_context(open_arena({}, [spec], acting.place_of(values), scaffold=agent.scaffold))
        try:
            task = fixing.task_of(spec.name, arena.prepare(spec), values.test)
        except SandboxError as error:
            raise UserError(f"--repo={values.repo}: its tests cannot be run: {error}") from error
        print(f"{len(task.FAIL_TO_PASS)} tests to mend, {len(task.PASS_TO_PASS)} to keep", file=sys.stderr)
        found = _tried(agent, dataclasses.replace(arena, tasks={task.instance_id: task}), folder)
        if found.resolved:
            dropped = found.verdict["dropped"]
            for path, why in sorted(dropped.items()):
                print(f"left out: {names.shown(path)} {why}", file=sys.stderr)
            sys.stdout.write(fixing.graded_part(found.patch, dropped, arena.services.files(spec.name)))
            return 0
    ended = f"{found.outcome}, ended by {found.reason}" + (f": {found.detail}" if found.detail else "")
    raise UserError(f"not mended in {agent.plan.attempts} attempts; the last: {ended}")


def _tried(agent: acting.Agent, arena: Arena, folder: running.Folder) -> Record:
    """The first attempt that succeeds, or the last."""
    for number in range(1, agent.plan.attempts + 1):
        plan = dataclasses.replace(agent.plan, attempts=number)
        found = dataclasses.replace(agent, plan=plan).run(arena, folder)
        if found[-1].resolved:
            break
    return found[-1]
