"""Checks tasks by execution: the gold patch must resolve each one, and the empty patch must not.

  qcn verify --tasks=tasks.jsonl
  qcn verify --tasks=runs/nano/tasks/heldout.jsonl --workers=8 --isolation=shared
  qcn verify --tasks=tasks.jsonl --reruns=3 --sample=200

Held-out tests are checked like the others. With --reruns every task's tests run so many further times in the defective
and in the fixed state, and flaky ones are named. Repositories named `name==version` are downloaded (or taken
from the cache); archives and folders are given with --repo. Every grading and every unpatched run has a fresh sandbox.
With --endpoint a model judges the statements as well: a task is not valid if its tests are shown to want what nobody
says, or to contradict the statement. Exit status 0 means that all tasks are valid.
"""

import concurrent.futures
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import tqdm
from absl import flags

from qcn_jax import files
from qcn_jax.cli import parsing, task_repositories
from qcn_jax.envs.problems.schema import holds_problems
from qcn_jax.envs.problems.schema import read as read_problems
from qcn_jax.envs.tasks import harbor
from qcn_jax.envs.tasks.schema import FOLDER_GRADER, Task, read_tasks
from qcn_jax.errors import UserError

if TYPE_CHECKING:
    from qcn_jax.envs.synthesis.verify import Check


def main(argv: Sequence[str]) -> int:
    """Parses flags and verifies; returns 0 when every task is valid."""
    values = flags.FlagValues()
    flags.DEFINE_string("tasks", None, "Tasks as JSONL in SWE-bench's schema, or a folder of Harbor's task folders.",
                        flag_values=values, required=True)
    flags.DEFINE_bool("verifier_network", False, "Tests and solutions of Harbor's task folders reach the network.",
                      flag_values=values)
    task_repositories.define(values)
    flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.", flag_values=values)
    flags.DEFINE_enum("isolation", "container", ["container", "shared"],
                      "A fresh container for each run, or warm ones with a fresh workspace.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("reruns", 0, "Further runs in both states, to find flaky tests.", flag_values=values,
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_integer("sample", 0, "Check so many tasks, evenly spread over the file; 0: all.", flag_values=values,
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_integer("workers", 2, "Tasks side by side.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("endpoint", None, "OpenAI-compatible endpoint of a model that judges statements.",
                        flag_values=values)
    flags.DEFINE_string("model", None, "Model to ask there.", flag_values=values)
    flags.DEFINE_string("key_variable", "OPENAI_API_KEY", "Environment variable that holds the endpoint's key.",
                        flag_values=values)
    parsing.parse(values, "verify", __doc__, argv)
    if bool(values.endpoint) != bool(values.model):
        raise UserError("--endpoint and --model go together: where the judge answers, and which model it is")
    if not values.endpoint:
        parsing.refuse_given(values, ["key_variable"], "nobody is asked without --endpoint")
    faults: list[str] = []
    read = (harbor.read_tasks if files.is_dir(values.tasks) else
            read_problems if holds_problems(values.tasks) else read_tasks)
    tasks = read(values.tasks, faults)
    if not tasks and not faults:
        raise UserError(f"--tasks={values.tasks}: holds no task")
    total = len(tasks)
    if 0 < values.sample < total:
        tasks = [tasks[number * total // values.sample] for number in range(values.sample)]
    from qcn_jax.envs.pool.env_pool import EnvPool
    from qcn_jax.envs.synthesis import verify

    foreign = [task for task in tasks if task.eval_script]
    tasks = [task for task in tasks if not task.eval_script]
    specs = task_repositories.find(values, tasks, faults)
    tasks = [task for task in tasks if task.repo in {spec.name for spec in specs}]
    for fault in faults:
        print(fault)
    arguments = {"kind": values.sandbox, "isolation": values.isolation,
                 "state_dir": str(files.cache_folder("sandbox"))}  # fmt: skip
    objections = _judged([*tasks, *foreign], values)
    invalid = flaky_tasks = 0
    count = len(tasks) + len(foreign)
    with contextlib.ExitStack() as stack:
        checks = _foreign(foreign, values)
        if tasks:
            pool = stack.enter_context(EnvPool(values.workers, arguments, specs))
            print(f"sandbox: {pool.describe()['description']}")
            checks = itertools.chain(verify.verify(pool, tasks, values.reruns), checks)
        for check in tqdm.tqdm(checks, total=count, desc="verifying", unit="task", file=sys.stderr):
            if problems := [*check.problems, *objections.get(check.instance_id, ())]:
                invalid += 1
                print(f"{check.instance_id}: {'; '.join(problems)}")
            for name, words in check.flaky.items():
                print(f"{check.instance_id}: flaky: {name}: {words}")
            flaky_tasks += bool(check.flaky)
    if count < total:
        print(f"a sample of {count} of {total} tasks")
    if values.reruns:
        print(f"flaky: {flaky_tasks} of {count} tasks ({flaky_tasks / count:.1%}) in {values.reruns} runs of both "
              "states")
    print(f"{count - invalid} of {count} tasks are valid: gold patch resolves, empty patch does not")
    if faults:
        print(f"{len(faults)} faults of rows, which are named above and were left out")
    return 1 if invalid or faults else 0


def _judged(tasks: Sequence[Task], values: flags.FlagValues) -> dict[str, tuple[str, ...]]:
    """What a model shows to be wrong with statements, by task; nothing where none is asked."""
    if not values.endpoint:
        return {}
    from qcn_jax.chat.endpoint import Endpoint
    from qcn_jax.envs.synthesis import judge

    model = Endpoint(values.endpoint, values.model, values.key_variable, stream=False)
    model.check()
    with concurrent.futures.ThreadPoolExecutor(values.workers) as threads:
        found = list(tqdm.tqdm(threads.map(lambda task: judge.judge(task, model.ask), tasks), total=len(tasks),
                               desc="judging", unit="task", file=sys.stderr))
    if unjudged := sum(not one.judged for one in found):
        print(f"{unjudged} of {len(tasks)} statements are not judged: the model's answers cannot be read")
    return {task.instance_id: one.faults for task, one in zip(tasks, found, strict=True)}


def _foreign(tasks: Sequence[Task], values: flags.FlagValues) -> Iterator["Check"]:
    """Checks of tasks with an eval_script and an image of their own, several at a time."""
    if not tasks:
        return
    from qcn_jax.envs.synthesis.build.container import engine
    from qcn_jax.envs.synthesis.languages import grade
    from qcn_jax.envs.synthesis.verify import Check
    from qcn_jax.envs.tasks import harbor_runs, swebench

    client = engine()

    def check(task: Task) -> Check:
        if task.log_parser != FOLDER_GRADER:
            return grade.verify(client, task, values.reruns)
        started = time.monotonic()
        problem = harbor_runs.problems(client, task, swebench.TIMEOUT, values.verifier_network)
        return Check(task.instance_id, (problem,) if problem else (), round(time.monotonic() - started, 3))

    with concurrent.futures.ThreadPoolExecutor(values.workers) as threads:
        yield from threads.map(check, tasks)
