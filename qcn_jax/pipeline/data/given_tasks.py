"""Tasks that a configuration names instead of making them: read, their repositories found, checked, kept apart.

A task can be used where its repository is found (of `--config.tasks.repos_train` and `repos_heldout`, beside its file,
in a clone at its base commit, or downloaded), its patches apply there, and it says what is wrong and which tests must
pass; or where it has a script for its tests, and the image in which that runs is here. Some of each file's are executed
besides. Training tasks that have to do with held-out ones are left out.
"""

import collections
import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qcn_jax.agents.image_tasks import ImageTasks
from qcn_jax.config import TasksConfig
from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import repository
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import sources, verify
from qcn_jax.envs.synthesis.mine.history import Clone
from qcn_jax.envs.tasks.grading import starting_changes
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.envs.tasks.swebench import Instance
from qcn_jax.envs.web import runtime
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.readers.task_sets import FIELDS, file_of, read_tasks
from qcn_jax.pipeline.data.texts import Findings

_COMMIT = re.compile("[0-9a-f]{40}")
_SEED = re.compile(r"^(pages:\w+):\d+$")
_PER_COMMIT = re.compile(r"\.[0-9a-f]{7,40}$")  # the end of SWE-smith's repositories

Placed = tuple[str, Task]  # where it was read, and what
Connect = Callable[[Mapping[str, Instance]], ImageTasks]


@dataclasses.dataclass(frozen=True)
class Given:
    """The tasks of one split that can be used, and what they need.

    Attributes:
      tasks: those with an `eval_script` are run in their images, the others in sandboxes.
      repositories: of the latter.
      instances: those of the former that SWE-bench's rules decide.
      summary: counts for DONE.json.
    """

    tasks: list[Task]
    repositories: list[RepositorySpec]
    instances: list[Instance]
    summary: dict[str, Any]


def project(name: str) -> str:
    """The project of a repository's name, whichever version, commit or owner: astropy of Astropy==6.0, astropy@0a1b2c3,
    astropy/astropy and swesmith/astropy__astropy.0a1b2c3d; of pages:NAME:SEED the template, whatever its words."""
    last = _SEED.sub(r"\1", _PER_COMMIT.sub("", name.rsplit("/", 1)[-1].rsplit("__", 1)[-1]))
    return re.sub(r"[-_.]+", "-", re.split("==|@", last)[0]).lower()


def heldout_apart(heldout: Iterable[Task], repositories: Iterable[RepositorySpec]) -> Callable[[Task], str]:
    """A function that says why a training task must be left out, given what is held out; "" where it need not."""
    heldout = list(heldout)
    projects = {project(name) for name in (*(task.repo for task in heldout), *(spec.name for spec in repositories))}
    known = {value for task in heldout for value in _marks(task)}

    def reason(task: Task) -> str:
        if project(task.repo) in projects:
            return "its project is held out"
        return "a held-out task has its id, statement or fix" if known & set(_marks(task)) else ""

    return reason


def _marks(task: Task) -> tuple[tuple[str, str], ...]:
    words = {"id": task.instance_id, "statement": " ".join(task.problem_statement.split()), "fix": task.patch.strip()}
    return tuple((name, text) for name, text in words.items() if text)


def load(config: TasksConfig, split: str, pool: EnvPool, connect: Connect, archives: pathlib.Path,
         log: Callable[[str], None], apart: Callable[[Task], str] = lambda task: "") -> Given:
    """Reads and checks the tasks of a split.

    Args:
      config: of the stage.
      split: train or heldout.
      pool: executes some of them.
      connect: gives what executes those that have images of their own, called where there are such.
      archives: where starting states that are taken from clones are kept.
      log: takes one line.
      apart: see `heldout_apart`.

    Raises:
      UserError: a task cannot be used and `config.malformed` says stop, none is left, or no sandbox can be had.
    """
    path, field = getattr(config, FIELDS[split]), f"--config.tasks.{FIELDS[split]}"
    findings = Findings(config.malformed, "--config.tasks.malformed")
    instances: dict[str, Instance] = {}
    placed = _without(read_tasks(path, field, findings, instances), apart,
                      lambda _, reason: findings.without(reason))
    placed = _without(placed, _fault, findings.row)
    if any(task.language == PAGES for _, task in placed):
        missing = runtime.missing(pool.describe()["kind"])
        placed = _without(placed, lambda task: missing * (task.language == PAGES),
                          lambda _, reason: findings.without(reason))
    placed, specs = _with_repositories(config, placed, archives, findings)
    faults = _patch_faults([one for one in placed if not one[1].eval_script], specs)
    placed = _without(placed, lambda task: faults.get(task.instance_id, ""), findings.row)
    pool.register(specs.values())
    with contextlib.ExitStack() as stack:
        images = None
        if any(task.eval_script for _, task in placed):
            images = stack.enter_context(contextlib.closing(connect(instances)))
            placed = _without(placed, _image_fault(images), findings.row)
        sample = _sample(placed, config.verify)
        problems = _problems(pool, images, sample)
    placed = _without(placed, lambda task: problems.get(task.instance_id, ""), findings.row)
    findings.kept = len(placed)
    if not placed:
        raise UserError(f"{field}={path}: no task is left ({findings.line()})")
    log(f"{split}: {findings.line()}; {len(sample)} executed, {len(problems)} of them not as they say")
    tasks = [task for _, task in placed]
    foreign = [task.instance_id for task in tasks if task.eval_script]
    used = [specs[name] for name in sorted({task.repo for task in tasks if not task.eval_script})]
    counts = {"executed": len(sample)} | ({"in_images": len(foreign)} if foreign else {})
    return Given(tasks, used, [instances[name] for name in foreign if name in instances], findings.summary() | counts)


def _image_fault(images: ImageTasks) -> Callable[[Task], str]:
    """A function that says why a task's image cannot be had, asked once of each image."""
    known: dict[str, str] = {}

    def fault(task: Task) -> str:
        if task.eval_script and task.image_name not in known:
            known[task.image_name] = images.image_fault(task)
        return known.get(task.image_name, "") if task.eval_script else ""

    return fault


def _with_repositories(config: TasksConfig, placed: Sequence[Placed], archives: pathlib.Path, findings: Findings
                       ) -> tuple[list[Placed], dict[str, RepositorySpec]]:
    """The tasks whose repositories are found, under the repositories' names, and those that have images instead."""
    known = (*config.repos_train, *config.repos_heldout)
    local = [(place, task) for place, task in placed if not _only_in_image(task)]
    specs, missing = sources.of_tasks({task.repo for _, task in local}, {file_of(place) for place, _ in local}, known,
                                      "--config.tasks.repos_train")
    clones = {clone.name.lower(): clone for clone in map(_clone, known) if clone is not None}
    kept = []
    for place, task in placed:
        if _only_in_image(task):
            kept.append((place, task))
            continue
        clone = clones.get(task.repo.rsplit("/", 1)[-1].lower())
        try:
            if clone is not None and not task.bug_patch and _COMMIT.fullmatch(task.base_commit):
                spec = clone.archive(task.base_commit, archives)
                specs[spec.name], task = spec, dataclasses.replace(task, repo=spec.name)
            elif task.repo in missing:
                raise UserError(missing[task.repo])
        except UserError as error:
            if task.eval_script and task.image_name:
                kept.append((place, task))
            else:
                findings.row(place, str(error))
            continue
        kept.append((place, dataclasses.replace(task, eval_script="", log_parser="")))
    return kept, {name: dataclasses.replace(spec, setup=tuple(config.setup), modules=config.modules)
                  for name, spec in specs.items()}


def _clone(source: str) -> Clone | None:
    path = pathlib.Path(source)
    return Clone(path) if (path / ".git").exists() or (path / "HEAD").is_file() else None


def _without(placed: Iterable[Placed], fault: Callable[[Task], str], tell: Callable[[str, str], None]) -> list[Placed]:
    """The tasks that have no `fault`; `tell` gets the others' places and faults."""
    kept = []
    for place, task in placed:
        if words := fault(task):
            tell(place, words)
        else:
            kept.append((place, task))
    return kept


def _fault(task: Task) -> str:
    """Why no stage can act on a task, whatever its repository; "" where it can."""
    if not task.FAIL_TO_PASS:
        return "field FAIL_TO_PASS is empty"
    if not task.problem_statement.strip():
        return "field problem_statement is empty"
    if _only_in_image(task) and not task.image_name:
        return "field eval_script: its tests are run by a script of its own, but no field names the image for that"
    return ""


def _only_in_image(task: Task) -> bool:
    """Whether no sandbox can run a task's tests, even where its repository is found."""
    ours = task.language == "python" and all("::" in name for name in (*task.FAIL_TO_PASS, *task.PASS_TO_PASS))
    return bool(task.eval_script) and not ours


def _patch_faults(placed: Sequence[Placed], specs: Mapping[str, RepositorySpec]) -> dict[str, str]:
    """By id, why a defect, fix or test patch does not apply; one repository is in memory at a time."""
    by_repository: dict[str, list[Task]] = collections.defaultdict(list)
    for _, task in placed:
        by_repository[task.repo].append(task)
    faults = {}
    for name, tasks in by_repository.items():
        members = repository.unpack(specs[name])
        texts = repository.text_files((path, member.data) for path, member in members.items())
        faults |= {task.instance_id: fault for task in tasks if (fault := _patch_fault(task, texts))}
    return faults


def _patch_fault(task: Task, texts: Mapping[str, str]) -> str:
    field = "bug_patch"
    try:
        start = {**texts, **starting_changes(task, texts)}
        start = {path: text for path, text in start.items() if text is not None}
        for field in ("patch", "test_patch"):
            if getattr(task, field).strip():
                patches.apply_changes(start, getattr(task, field))
    except UserError as error:
        return str(error)
    except patches.PatchError as error:
        return f"field {field} does not apply to {task.repo}: {error}"
    return ""


def _sample(placed: Sequence[Placed], count: int) -> list[Task]:
    """`count` of the tasks, evenly spread."""
    total = len(placed)
    return [placed[number * total // count][1] for number in range(count)] if total > count else [t for _, t in placed]


def _problems(pool: EnvPool, images: ImageTasks | None, sample: Sequence[Task]) -> dict[str, str]:
    """By id, what is wrong with tasks that were executed with their gold patch and without."""
    ours = [task for task in sample if not task.eval_script]
    try:
        problems = {found.instance_id: "; ".join(found.problems) for found in verify.verify(pool, ours)}
        problems |= {task.instance_id: images.check(task) for task in sample if images and task.eval_script}
        return {name: words for name, words in problems.items() if words}
    except SandboxError as error:
        raise UserError(f"--config.tasks.verify: tasks cannot be executed: {error}") from error
