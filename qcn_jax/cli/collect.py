"""Collects conversations to learn from: an agent works on tasks, and what execution verifies is kept.

  qcn collect --tasks=tasks.jsonl --endpoint=http://localhost:8000/v1 --model=NAME --scaffold=mini_swe_agent \
    --attempts=4 --temperature=0.7 --out=chats.jsonl
  qcn collect --tasks=tasks.jsonl --checkpoint=DIR --attempts=8 --temperature=1 --out=chats.jsonl
  qcn run --config=finetune:MODEL_FOLDER --workdir=DIR --stages=sft --config.sft.data=chats.jsonl

Kept is an episode whose patch resolves its task, that the agent ended itself, and whose calls were all well formed; of
those with the same turns one. OUT is a source of conversations of `qcn run`'s SFT; OUT.yields.json says what was tried
and kept of each task, and why the rest was not; OUT.work holds all episodes. The same command goes on after a kill, and
with more --attempts it tries those that are missing.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from qcn_jax import files
from qcn_jax.agents import running
from qcn_jax.agents.arena import open_arena
from qcn_jax.agents.selecting import Selection
from qcn_jax.cli import acting, parsing, task_repositories


def main(argv: Sequence[str]) -> int:
    """Parses flags, lets somebody act, writes what is kept."""
    values = flags.FlagValues()
    flags.DEFINE_string("tasks", None, "Tasks as JSONL in SWE-bench's schema.", flag_values=values, required=True)
    flags.DEFINE_string("out", None, "File of conversations, JSONL.", flag_values=values, required=True)
    flags.DEFINE_integer("per_task", 0, "Keep at most so many of a task; 0: all.", flag_values=values, lower_bound=0)
    acting.define_invalid(values)
    task_repositories.define(values)
    acting.define_place(values)
    mesh = acting.define_agent(values)
    parsing.parse(values, "collect", __doc__, argv)
    files.check_file(values.out, "out")
    given = acting.read_tasks(values.tasks)
    agent, work = acting.agent(values, mesh), pathlib.Path(f"{values.out}.work")
    folder = running.Folder(work, agent.settings)
    given = given.located(values)
    with open_arena(given.tasks, given.specs, acting.place_of(values), given.instances, agent.scaffold) as arena:
        arena = acting.checked(values, arena, work)
        selection = Selection(folder, agent.run(arena, folder), values.per_task)
    files.write_jsonl(values.out, selection.rows())
    folder.close()
    yields = selection.yields() | {"model": agent.name, "scaffold": agent.scaffold.name}
    files.write_json(f"{values.out}.yields.json", yields)
    for fault in given.faults:
        print(fault)
    dropped = ", ".join(f"{name} {count}" for name, count in yields["dropped"].items())
    print(f"kept {yields['kept']} of {yields['tried']} episodes, of {yields['tasks_kept']} of {yields['tasks']} tasks"
          + (f"; dropped: {dropped}" if dropped else "") + f"; {values.out}")
    return 0
