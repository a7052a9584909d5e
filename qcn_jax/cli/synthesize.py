"""Makes verified tasks from repositories, and says how many candidates became tasks and why the others did not.

  qcn synthesize --repo=toolz==1.2.0,parse==1.22.4 --out=tasks.jsonl
  qcn synthesize --repo=path/to/folder,downloads/boltons-26.2.0.tar.gz --count=500 --out=tasks.jsonl
  qcn synthesize --repo=path/to/clone --strategies=inject,combine,mine --issues=export.json --out=tasks.jsonl
  qcn synthesize --repo=toolz==1.2.0 --strategies=rewrite --endpoint=http://localhost:8000/v1 --model=NAME --out=t.jsonl
  qcn synthesize --repo=path/to/clone --strategies=mine --setup='apt-get update && apt-get install -y python3-nose' \
    --sandbox=docker --out=tasks.jsonl

Strategies: inject (rules), rewrite (a model changes or rewrites functions), combine (several verified defects at once),
mine (the history of a git clone), build (only the environment: Dockerfile, install steps, test command, log parser).
JavaScript and Go repositories get an environment first and need a Docker engine. A candidate is kept only after
execution: tests that passed now fail, and the fix makes them pass again. Interrupted runs continue from OUT.work, with
the same result. Beside OUT stands OUT.yields.json.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from qcn_jax import files
from qcn_jax.chat import endpoint
from qcn_jax.cli import parsing, task_repositories
from qcn_jax.envs.sandbox import RepositorySpec, repository
from qcn_jax.envs.synthesis import inject, plan, quality, sources, statement
from qcn_jax.envs.tasks.schema import Task, write_tasks
from qcn_jax.errors import UserError

if TYPE_CHECKING:
    from qcn_jax.envs.pool.env_pool import EnvPool

STRATEGIES = ("inject", "rewrite", "combine", "mine", "build")


def main(argv: Sequence[str]) -> int:
    """Parses flags, synthesizes, prints the table of yields."""
    values = flags.FlagValues()
    flags.DEFINE_list("repo", None, "Repositories: name==version, source distributions, folders or git clones.",
                      flag_values=values, required=True)  # fmt: skip
    flags.DEFINE_list("strategies", ["inject"], f"Comma-separated, out of: {', '.join(STRATEGIES)}.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", None, "Where tasks are written, as JSONL in SWE-bench's schema.", flag_values=values,
                        required=True)  # fmt: skip
    flags.DEFINE_integer("count", 0, "Stop injecting at so many verified tasks; 0: try all candidates.",
                         flag_values=values, lower_bound=0)  # fmt: skip
    flags.DEFINE_list("kinds", [], f"Kinds of defects; default: all. Out of: {', '.join(inject.KINDS)}.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("candidates_per_repo", 400, "Execute at most so many of one repository.", flag_values=values,
                         lower_bound=1)  # fmt: skip
    flags.DEFINE_integer("combined_per_repo", 40, "Combinations tried of one repository (strategy combine).",
                         flag_values=values, lower_bound=1)  # fmt: skip
    flags.DEFINE_integer("rewrites_per_repo", 20, "Functions given to the model (strategy rewrite).",
                         flag_values=values, lower_bound=1)  # fmt: skip
    flags.DEFINE_integer("reruns", 1, "Further runs of each defective state that must agree with the first.",
                         flag_values=values, lower_bound=0)  # fmt: skip
    flags.DEFINE_float("timeout", 10.0, "Seconds for one run of a candidate's tests.", flag_values=values,
                       lower_bound=0.1)  # fmt: skip
    flags.DEFINE_integer("statement_characters", statement.FULL, "Longest problem statement.", flag_values=values,
                         lower_bound=120)  # fmt: skip
    flags.DEFINE_bool("held_out", True, "Make held-out tests for each task.", flag_values=values)
    flags.DEFINE_float("near_duplicates", quality.NEAR, "Tasks of one file whose changes are this alike are kept once; "
                       "above 1: keep all.", flag_values=values, lower_bound=0.0)  # fmt: skip
    flags.DEFINE_string("endpoint", "", "OpenAI-compatible endpoint, e.g. http://localhost:8000/v1.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("model", "", "Model to ask there.", flag_values=values)
    flags.DEFINE_string("key_variable", "OPENAI_API_KEY", "Environment variable that holds the endpoint's key.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_bool("word_statements", False, "Let the model word the statements.", flag_values=values)
    flags.DEFINE_string("issues", "", "mine: pull requests and issues as JSON, or `github` to ask its API with the "
                        "token in GITHUB_TOKEN.", flag_values=values)  # fmt: skip
    flags.DEFINE_bool("need_issue", True, "mine: only changes with a linked issue, SWE-bench's criterion.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("mined_per_repo", 0, "mine: try at most so many changes, newest first; 0: all.",
                         flag_values=values, lower_bound=0)  # fmt: skip
    task_repositories.define_setup(values)
    flags.DEFINE_integer("seed", 0, "Seed of all choices.", flag_values=values)
    flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.", flag_values=values)
    flags.DEFINE_integer("workers", 2, "Candidates side by side.", flag_values=values, lower_bound=1)
    parsing.parse(values, "synthesize", __doc__, argv)
    for flag, given, allowed in (("strategies", values.strategies, STRATEGIES), ("kinds", values.kinds, inject.KINDS)):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise UserError(f"--{flag}: unknown {unknown[0]!r}; allowed: {', '.join(allowed)}")
    files.check_file(values.out, "out")
    return _synthesize(values)


def _settings(values: flags.FlagValues) -> plan.Settings:
    asked = set(values.strategies)
    model = None
    if values.endpoint:
        if not values.model:
            raise UserError("--model: name the model that --endpoint serves")
        model = endpoint.Endpoint(values.endpoint, values.model, values.key_variable, f"{values.out}.work/answers")
    elif "rewrite" in asked or values.word_statements:
        raise UserError("--endpoint: needed for strategy rewrite and for --word_statements")
    if "combine" in asked and not asked & {"inject", "rewrite"}:
        raise UserError("--strategies: combine needs inject or rewrite, whose verified defects it puts together")
    return plan.Settings(
        target=values.count, kinds=tuple(values.kinds), candidates_per_repo=values.candidates_per_repo,
        timeout=values.timeout, reruns=values.reruns, statement_characters=values.statement_characters,
        held_out=values.held_out, tests_may_tell=True,
        combined_per_repo=values.combined_per_repo if "combine" in asked else 0,
        rules="inject" in asked, model=model, word_statements=values.word_statements,
        rewrites_per_repo=values.rewrites_per_repo if "rewrite" in asked else 0, seed=values.seed,
    )  # fmt: skip


def _synthesize(values: flags.FlagValues) -> int:
    from qcn_jax.envs.pool.env_pool import EnvPool
    from qcn_jax.envs.synthesis import synthesize

    settings = _settings(values)
    out = pathlib.Path(values.out)
    arguments = {"kind": values.sandbox, "state_dir": str(sources.default_cache().parent / "sandbox")}
    tasks: list[Task] = []
    yields: dict[str, Any] = {"kinds": {}, "repositories": {}, "outcomes": {}, "left_out": {}}
    specs, foreign = [], []
    if settings.rules or settings.rewrites_per_repo or "build" in values.strategies:
        for spec in [_locate(source, out, values.setup) for source in values.repo]:
            python = "build" not in values.strategies and _language(spec) == "python"
            (specs if python else foreign).append(spec)
    if foreign and values.setup:
        raise UserError(f"--setup: {foreign[0].name} gets its environment by rules or from --endpoint; only Python "
                        "repositories take it, without strategy build")
    with EnvPool(values.workers, arguments) as pool:
        print(f"sandbox: {pool.describe()['description']}", file=sys.stderr)
        if specs:
            result = synthesize.synthesize(pool, specs, settings, f"{out}.work", _log)
            tasks += result.tasks
            yields = {"kinds": result.yields(), "repositories": result.repository_yields(),
                      "outcomes": result.outcomes(), "left_out": result.skipped}  # fmt: skip
        if foreign:
            tasks += _foreign(values, foreign, settings, yields)
        if "mine" in values.strategies:
            tasks += _mine(values, pool, yields)
    tasks, repeated = quality.without_near_duplicates(tasks, values.near_duplicates)
    yields |= {"near_duplicates": len(repeated), "held_out": sum(bool(task.held_out_patch) for task in tasks)}
    write_tasks(out, tasks)
    files.write_json(f"{out}.yields.json", yields)
    if yields["kinds"]:
        print(_table(yields["kinds"]))
        print(f"outcomes: {', '.join(f'{name} {count}' for name, count in yields['outcomes'].items())}")
    print(f"{len(tasks)} verified tasks: {out}")
    return 0


def _locate(source: str, out: pathlib.Path, setup: Sequence[str]) -> RepositorySpec:
    """A repository by name, archive or folder; of a bare clone its newest state; with what installs its needs."""
    path = pathlib.Path(source)
    if (path / "HEAD").is_file() and (path / "objects").is_dir():
        from qcn_jax.envs.synthesis.mine.history import Clone

        clone = Clone(path)
        spec = clone.archive(clone.head, f"{out}.work/archives")
    else:
        spec = sources.locate(source)
    return dataclasses.replace(spec, setup=tuple(setup))


def _language(spec: RepositorySpec) -> str:
    from qcn_jax.envs.synthesis.build import rules

    try:
        return rules.plan({name[5:]: member.data.decode("utf-8", "replace")
                           for name, member in repository.unpack(spec).items() if name.startswith("repo/")}).language
    except UserError:
        return "python"  # what is wrong with it is said when its tests are run


def _foreign(values: flags.FlagValues, specs: Sequence[RepositorySpec], settings: plan.Settings,
             yields: dict[str, Any]) -> list[Task]:
    """Environments, and tasks of repositories in other languages than Python."""
    from qcn_jax.envs.synthesis import build, synthesize
    from qcn_jax.envs.synthesis.build.container import engine
    from qcn_jax.envs.synthesis.languages import factory

    client, tasks, verdicts = engine(), [], []
    for spec in specs:
        content = {name[5:]: member.data for name, member in repository.unpack(spec).items()
                   if name.startswith("repo/")}
        environment = build.build(content, spec.name, _log, model=settings.model, client=client)
        folder = pathlib.Path(f"{values.out}.work", "environments", spec.name)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "Dockerfile", environment.dockerfile)
        files.write_json(folder / "environment.json", dataclasses.asdict(environment))
        print(f"{spec.name}: {len(environment.passing)} tests pass in {environment.seconds:.1f} s by "
              f"`{environment.recipe.test}`; verifier: {environment.acceptance.states}; {folder / 'Dockerfile'}")
        if "build" not in values.strategies and environment.recipe.language != "python":
            made, found = factory.synthesize(client, spec.name, content, environment, settings, f"{values.out}.work",
                                             _log, values.workers)
            tasks, verdicts = tasks + made, verdicts + found
    if verdicts:
        result = synthesize.Result(tasks, verdicts, list(specs), {})
        yields["kinds"] = {**yields["kinds"], **{f"{name} (other)": row for name, row in result.yields().items()}}
        yields["repositories"] |= result.repository_yields()
        yields["outcomes"] |= {f"{name} (other)": count for name, count in result.outcomes().items()}
    return tasks


def _mine(values: flags.FlagValues, pool: "EnvPool", yields: dict[str, Any]) -> list[Task]:
    """Tasks from histories; adds to `yields` what became of the commits."""
    from qcn_jax.envs.synthesis.mine import Criteria, mine

    criteria = Criteria(need_issue=values.need_issue, limit=values.mined_per_repo, timeout=values.timeout,
                        setup=tuple(values.setup))
    tasks: list[Task] = []
    for source in values.repo:
        mined = mine(pool, source, criteria, f"{values.out}.work", _log, values.issues)
        yields.setdefault("mined", {})[mined.name] = {"outcomes": mined.outcomes, "details": mined.details}
        reasons = ", ".join(f"{reason} {count}" for reason, count in mined.outcomes.items())
        print(f"{mined.name}: {len(mined.tasks)} tasks of {sum(mined.outcomes.values())} changes ({reasons})")
        tasks += mined.tasks
    return tasks


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'kind':<18}{'candidates':>11}{'kept':>7}{'yield':>8}{'s each':>8}{'cpu s':>8}"]
    for kind, row in rows.items():
        lines.append(f"{kind:<18}{row['candidates']:>11}{row['kept']:>7}{row['yield']:>8.0%}"
                     f"{row['seconds']:>8.2f}{row['cpu_seconds']:>8.2f}")  # fmt: skip
    return "\n".join(lines)
