"""Repositories in, verified tasks out, by every strategy: what `qcn synthesize` does, for Python.

    tasks, yields = make_tasks(Request(("toolz==1.2.0",), pathlib.Path("work")))
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qcn_jax import files
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import RepositorySpec, repository
from qcn_jax.envs.synthesis import judge, plan, quality, sources, synthesize
from qcn_jax.envs.synthesis.pages import factory
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError

if TYPE_CHECKING:
    from qcn_jax.envs.synthesis.mine import Criteria

STRATEGIES = ("inject", "rewrite", "combine", "mine", "build")


def to_stderr(line: str) -> None:
    """Prints a progress line."""
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be made of which repositories.

    Attributes:
      repositories: requirements of the package index, source distributions, folders or git clones.
      work: folder for journals, environments and archives; a killed call given again goes on from there.
      strategies: of STRATEGIES.
      settings: of strategies inject, rewrite and combine.
      mining: of strategy mine; None are its defaults.
      issues: file of exported issues that mined changes may be linked to; empty for none.
      setup: shell commands that install what tests of Python repositories need.
      sandbox: auto, docker or local.
      workers: candidates side by side.
      python_path: folders below the repositories' roots from which Python imports; None: the usual ones.
      modules: folder whose node_modules pages are built from; empty for our own.
    """

    repositories: Sequence[str]
    work: pathlib.Path
    strategies: Sequence[str] = ("inject",)
    settings: plan.Settings = plan.Settings()
    mining: "Criteria | None" = None
    issues: str = ""
    setup: Sequence[str] = ()
    sandbox: str = "auto"
    workers: int = 2
    python_path: tuple[str, ...] | None = None
    modules: str = ""


def make_tasks(request: Request, log: Callable[[str], None] = to_stderr) -> tuple[list[Task], dict[str, Any]]:
    """Makes verified tasks.

    Returns:
      Tasks, and JSON-ready yields: kinds, repositories, outcomes, left_out, near_duplicates, ambiguous, held_out,
      statement, pass_to_pass, `quality.summary`, mined where histories were mined, and judge where a model judged.

    Raises:
      UserError: something that is no repository, `setup` for one that is not Python's, or a sandbox that is missing.
    """
    tasks: list[Task] = []
    yields: dict[str, Any] = {"kinds": {}, "repositories": {}, "outcomes": {}, "left_out": {}}
    if "mine" in request.strategies:
        _check_clones(request.repositories)
    specs, foreign, pages = _sorted_out(request)
    arguments = {"kind": request.sandbox, "state_dir": str(files.cache_folder("sandbox"))}
    with EnvPool(request.workers, arguments) as pool:
        log(f"sandbox: {pool.describe()['description']}")
        if specs:
            result = synthesize.synthesize(pool, specs, request.settings, request.work, log)
            tasks += result.tasks
            _keep_local(result.repositories, request.work / "archives")
            yields = {"kinds": result.yields(), "repositories": result.repository_yields(),
                      "outcomes": result.outcomes(), "left_out": result.skipped}  # fmt: skip
        if pages:
            result = factory.synthesize_pages(pool, pages, request.settings, request.work, log)
            tasks += result.tasks
            _keep_local(pages, request.work / "archives")
            yields["kinds"] |= result.yields()
            yields["repositories"] |= result.repository_yields()
            yields["outcomes"] |= {f"{name} (pages)" if name in yields["outcomes"] else name: count
                                   for name, count in result.outcomes().items()}
        if foreign:
            tasks += _foreign(request, foreign, yields, log)
        if "mine" in request.strategies:
            tasks += _mined(request, pool, yields, log)
    tasks, refused = quality.sifted(tasks, request.settings.near_duplicates)  # across strategies, too
    if request.settings.judged and request.settings.model is not None:
        tasks, yields["judge"] = judge.sifted(tasks, request.settings.model.ask, log)
    yields |= {f"{reason}s" if reason == "near_duplicate" else reason: refused.get(reason, 0) + yields["outcomes"].get(
        reason, 0) for reason in ("near_duplicate", "ambiguous")}
    yields |= {"held_out": sum(bool(task.held_out_patch) for task in tasks),
               "statement": request.settings.statement, "pass_to_pass": request.settings.pass_to_pass or "all",
               **quality.summary(tasks)}
    return tasks, yields


def _keep_local(specs: Sequence[RepositorySpec], folder: pathlib.Path) -> None:
    """Keeps what cannot be downloaded by its name where `sources.of_tasks` looks, beside the tasks."""
    for spec in specs:
        if not pathlib.Path(spec.archive).is_relative_to(files.cache_folder("sources")):
            members = repository.unpack(spec)
            contents = {name[5:]: (member.data, member.mode) for name, member in members.items()
                        if name.startswith("repo/")}
            repository.write_archive(folder / f"{spec.name}.tar.gz", spec.name, contents)


def _sorted_out(request: Request) -> tuple[list[RepositorySpec], list[RepositorySpec], list[RepositorySpec]]:
    """Python repositories whose environment is this one; others, which get one of their own first; and pages."""
    settings, building = request.settings, "build" in request.strategies
    specs, foreign, pages = [], [], []
    if settings.rules or settings.rewrites_per_repo or building:
        for spec in sources.distinct(_locate(source, request) for source in request.repositories).values():
            python = not building and _language(spec) == "python"
            (pages if factory.is_pages(spec) else specs if python else foreign).append(spec)
    if foreign and request.setup:
        raise UserError(f"--setup: {foreign[0].name} gets its environment by rules or from --endpoint; only Python "
                        "repositories take it, without strategy build")
    return specs, foreign, pages


def _locate(source: str, request: Request) -> RepositorySpec:
    """A repository by name, archive or folder; of a bare clone its newest state; with what installs its needs."""
    path = pathlib.Path(source)
    if files.is_file(path / "HEAD") and files.is_dir(path / "objects"):
        from qcn_jax.envs.synthesis.mine.history import Clone

        clone = Clone(path)
        spec = clone.archive(clone.head, request.work / "archives")
    else:
        spec = sources.locate(source)
    return dataclasses.replace(spec, setup=tuple(request.setup), python_path=request.python_path,
                               modules=request.modules)


def _language(spec: RepositorySpec) -> str:
    from qcn_jax.envs.synthesis.build import rules

    try:
        return rules.plan({name[5:]: member.data.decode("utf-8", "replace")
                           for name, member in repository.unpack(spec).items() if name.startswith("repo/")}).language
    except UserError:
        return "python"  # what is wrong with it is said when its tests are run


def _foreign(request: Request, specs: Sequence[RepositorySpec], yields: dict[str, Any],
             log: Callable[[str], None]) -> list[Task]:
    """Environments, and tasks of repositories in other languages than Python."""
    from qcn_jax.envs.synthesis import build
    from qcn_jax.envs.synthesis.build.container import engine
    from qcn_jax.envs.synthesis.languages import factory

    client, tasks, verdicts = engine(), [], []
    for spec in specs:
        content = {name[5:]: member.data for name, member in repository.unpack(spec).items()
                   if name.startswith("repo/")}
        environment = build.build(content, spec.name, log, model=request.settings.model, client=client)
        folder = request.work / "environments" / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "Dockerfile", environment.dockerfile)
        files.write_json(folder / "environment.json", dataclasses.asdict(environment))
        print(f"{spec.name}: {len(environment.passing)} tests pass in {environment.seconds:.1f} s by "
              f"`{environment.recipe.test}`; verifier: {environment.acceptance.states}; {folder / 'Dockerfile'}")
        if "build" not in request.strategies and environment.recipe.language != "python":
            made, found = factory.synthesize(client, spec.name, content, environment, request.settings,
                                             str(request.work), log, request.workers)
            tasks, verdicts = tasks + made, verdicts + found
    if verdicts:
        result = synthesize.Result(tasks, verdicts, list(specs), {})
        yields["kinds"] = {**yields["kinds"], **{f"{name} (other)": row for name, row in result.yields().items()}}
        yields["repositories"] |= result.repository_yields()
        yields["outcomes"] |= {f"{name} (other)": count for name, count in result.outcomes().items()}
    return tasks


def _check_clones(repositories: Sequence[str]) -> None:
    """Raises UserError where two clones have the name after which journals, archives and tasks are called."""
    from qcn_jax.envs.synthesis.mine.history import Clone

    names: dict[str, str] = {}
    for source in repositories:
        name = Clone(source).name
        if names.setdefault(name, source) != source:
            raise UserError(f"--repo: {names[name]} and {source} are clones of one name, {name}; give each in a call "
                            "of its own")


def _mined(request: Request, pool: EnvPool, yields: dict[str, Any], log: Callable[[str], None]) -> list[Task]:
    """Tasks from histories; adds to `yields` what became of the commits."""
    from qcn_jax.envs.synthesis.mine import Criteria, mine

    criteria = request.mining or Criteria()
    tasks: list[Task] = []
    for source in dict.fromkeys(request.repositories):
        mined = mine(pool, source, criteria, request.work, log, request.issues)
        yields.setdefault("mined", {})[mined.name] = {"outcomes": mined.outcomes, "details": mined.details}
        reasons = ", ".join(f"{reason} {count}" for reason, count in mined.outcomes.items())
        print(f"{mined.name}: {len(mined.tasks)} tasks of {sum(mined.outcomes.values())} changes ({reasons})")
        tasks += mined.tasks
    return tasks
