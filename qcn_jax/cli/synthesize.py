"""Makes verified tasks from repositories, and says how many candidates became tasks and why the others did not.

  qcn synthesize --repo=toolz==1.2.0,parse==1.22.4 --out=tasks.jsonl
  qcn synthesize --repo=path/to/folder,downloads/boltons-26.2.0.tar.gz --count=500 --out=tasks.jsonl
  qcn synthesize --repo=path/to/clone --strategies=inject,combine,mine --issues=export.json --out=tasks.jsonl
  qcn synthesize --repo=toolz==1.2.0 --strategies=rewrite --endpoint=http://localhost:8000/v1 --model=NAME --out=t.jsonl
  qcn synthesize --repo=path/to/clone --strategies=mine --setup='apt-get update && apt-get install -y python3-nose' \
    --sandbox=docker --out=tasks.jsonl

  qcn synthesize --repo=path/to/site,pages:checklist:1 --out=tasks.jsonl

Strategies: inject (rules), rewrite (a model changes or rewrites functions), combine (several verified defects at once),
mine (the history of a git clone), build (only the environment: Dockerfile, install steps, test command, log parser).
A folder of pages that has page tests (*.web.json, see the docs), or one of this package's own templates
(pages:NAME:SEED), gives tasks that a browser's tests decide; that needs Chromium and the extra `web`.
JavaScript and Go repositories get an environment first and need a Docker engine. A candidate is kept only after
execution: tests that passed now fail, and the fix makes them pass again. Interrupted runs continue from OUT.work, with
the same result. Beside OUT stands OUT.yields.json. Every repository's last line says what it gave, or why it gave
nothing; exit status 0 means that there are tasks (or that only environments were asked for).
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from qcn_jax import files
from qcn_jax.chat import endpoint
from qcn_jax.cli import parsing, task_repositories
from qcn_jax.envs.synthesis import describe, inject, make_tasks, plan, quality, statement
from qcn_jax.envs.synthesis.make_tasks import STRATEGIES
from qcn_jax.envs.synthesis.pages import inject as page_kinds
from qcn_jax.envs.tasks.schema import write_tasks
from qcn_jax.errors import UserError


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
    flags.DEFINE_integer("pass_to_pass", 0, "Of the suite's passing tests beyond (at most 40) that call the defective "
                         "function, so many, spread over its files, go into PASS_TO_PASS; 0: all of them.",
                         flag_values=values, lower_bound=0)  # fmt: skip
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
    flags.DEFINE_enum("statement", "issue", describe.WORDINGS, "issue: as users report defects, with a program that "
                      "shows them and no word of tests; observed: what a call gave and should, and failing tests; "
                      "endpoint: the issue in the model's words.", flag_values=values)  # fmt: skip
    flags.DEFINE_bool("judge", False, "Have the endpoint's model judge statements, and leave out tasks of which it "
                      "shows that tests want what nobody says, or contradict the statement.", flag_values=values)
    flags.DEFINE_bool("hide_tests", True, "Take the tests that show the defect out of the tree that the agent sees; "
                      "test_patch puts them back.", flag_values=values)  # fmt: skip
    flags.DEFINE_string("issues", "", "mine: pull requests and issues as JSON, or `github` to ask its API with the "
                        "token in GITHUB_TOKEN.", flag_values=values)  # fmt: skip
    flags.DEFINE_bool("need_issue", True, "mine: only changes with a linked issue, SWE-bench's criterion.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("mined_per_repo", 0, "mine: try at most so many changes, newest first; 0: all.",
                         flag_values=values, lower_bound=0)  # fmt: skip
    task_repositories.define_needs(values)
    flags.DEFINE_integer("seed", 0, "Seed of all choices.", flag_values=values)
    flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.", flag_values=values)
    flags.DEFINE_integer("workers", 2, "Candidates side by side.", flag_values=values, lower_bound=1)
    parsing.parse(values, "synthesize", __doc__, argv)
    kinds = (*inject.KINDS, *page_kinds.KINDS)
    for flag, given, allowed in (("strategies", values.strategies, STRATEGIES), ("kinds", values.kinds, kinds)):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise UserError(f"--{flag}: unknown {unknown[0]!r}; allowed: {', '.join(allowed)}")
    _refuse_idle(values)
    files.check_file(values.out, "out")
    return _synthesize(values)


def _refuse_idle(values: flags.FlagValues) -> None:
    """Refuses flags of strategies, or of a model, that nobody asked for."""
    for strategy, names in (("mine", ("issues", "need_issue", "mined_per_repo")), ("combine", ("combined_per_repo",)),
                            ("rewrite", ("rewrites_per_repo",))):
        if strategy not in values.strategies:
            parsing.refuse_given(values, names, f"only strategy {strategy} has a use for it")
    if not values.endpoint:
        parsing.refuse_given(values, ["model", "key_variable"], "nobody is asked without --endpoint")


def _settings(values: flags.FlagValues) -> plan.Settings:
    asked = set(values.strategies)
    model = None
    if values.endpoint:
        if not values.model:
            raise UserError("--model: name the model that --endpoint serves")
        model = endpoint.Endpoint(values.endpoint, values.model, values.key_variable,
                                  f"{values.out}.work/answers", stream=False)
    elif "rewrite" in asked or values.statement == "endpoint" or values.judge:
        raise UserError("--endpoint: needed for strategy rewrite, for --statement=endpoint and for --judge")
    if "combine" in asked and not asked & {"inject", "rewrite"}:
        raise UserError("--strategies: combine needs inject or rewrite, whose verified defects it puts together")
    return plan.Settings(
        target=values.count, kinds=tuple(values.kinds), candidates_per_repo=values.candidates_per_repo,
        timeout=values.timeout, reruns=values.reruns, pass_to_pass=values.pass_to_pass,
        statement_characters=values.statement_characters, held_out=values.held_out, tests_may_tell=True,
        combined_per_repo=values.combined_per_repo if "combine" in asked else 0,
        rules="inject" in asked, model=model, judged=values.judge, statement=values.statement,
        hide_tests=values.hide_tests,
        near_duplicates=values.near_duplicates,
        rewrites_per_repo=values.rewrites_per_repo if "rewrite" in asked else 0, seed=values.seed,
    )  # fmt: skip


def _synthesize(values: flags.FlagValues) -> int:
    from qcn_jax.envs.synthesis.mine import Criteria

    out = pathlib.Path(values.out)
    mining = Criteria(need_issue=values.need_issue, limit=values.mined_per_repo, timeout=values.timeout,
                      setup=tuple(values.setup), python_path=task_repositories.python_path(values))
    tasks, yields = make_tasks.make_tasks(make_tasks.Request(
        values.repo, pathlib.Path(f"{out}.work"), values.strategies, _settings(values), mining, values.issues,
        values.setup, values.sandbox, values.workers, task_repositories.python_path(values),
        task_repositories.modules(values)))
    write_tasks(out, tasks)
    files.write_json(f"{out}.yields.json", yields)
    if yields["kinds"]:
        print(_table(yields["kinds"]))
        print(f"outcomes: {', '.join(f'{name} {count}' for name, count in yields['outcomes'].items())}")
    print(f"statements: {yields['statement']}, which give the fix's place away to {yields['mean_localisation']:.2f} "
          f"of 1; PASS_TO_PASS: {yields['pass_to_pass']}, median {yields['median_pass_to_pass']}, "
          f"{yields['without_pass_to_pass']} tasks have none")
    if judged := yields.get("judge"):
        print("judge: " + ", ".join(f"{name} {count}" for name, count in judged.items()))
    print(f"{len(tasks)} verified tasks: {out}")
    return 0 if tasks or set(values.strategies) == {"build"} else 1


def _table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'kind':<18}{'candidates':>11}{'kept':>7}{'yield':>8}{'s each':>8}{'cpu s':>8}"]
    for kind, row in rows.items():
        lines.append(f"{kind:<18}{row['candidates']:>11}{row['kept']:>7}{row['yield']:>8.0%}"
                     f"{row['seconds']:>8.2f}{row['cpu_seconds']:>8.2f}")  # fmt: skip
    return "\n".join(lines)
