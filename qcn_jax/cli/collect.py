"""Collects data to learn from: an agent works on tasks and what execution verifies is kept; or a model writes, and
what checks bear out is kept.

  qcn collect --tasks=tasks.jsonl --endpoint=http://localhost:8000/v1 --model=NAME --scaffold=mini_swe_agent \
    --attempts=4 --temperature=0.7 --out=chats.jsonl
  qcn collect --tasks=tasks.jsonl --checkpoint=DIR --attempts=8 --temperature=1 --out=chats.jsonl
  qcn collect --kind=rewrite --data=pages/ --endpoint=URL --model=NAME --out=texts.jsonl
  qcn run --config=finetune:MODEL_FOLDER --workdir=DIR --stages=sft --config.sft.data=chats.jsonl

Kept is an episode whose patch resolves its task, that the agent ended itself, and whose calls were all well formed; of
those with the same turns one. A page must survive a review besides: its layout, its errors and, with --judge_endpoint
and --judge_model, how it looks and behaves to a model that takes images. OUT is a source of conversations of `qcn
run`'s SFT; OUT.yields.json says what was tried and kept of each task, and why the rest was not; OUT.work holds all
episodes. The same command goes on after a kill, and with more --attempts it tries those that are missing.

Kinds: agent (default); simulate, the same with a user who runs what the answers propose; and what a model writes from
--data: rewrite (web pages to Markdown that adds nothing and keeps the matter), qa (questions on documents, answered
from a quotation or not at all), rank (answers in pairs against a checklist). rewrite gives texts, the
others conversations.
"""

import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm
from absl import flags

from qcn_jax import files
from qcn_jax.agents import running
from qcn_jax.agents.arena import open_arena
from qcn_jax.agents.reviewing import review_pages
from qcn_jax.agents.selecting import KEPT, Selection, fate_of
from qcn_jax.agents.writing.kind import Kind, make_all, read_items
from qcn_jax.agents.writing.qa import QuestionsAnswered
from qcn_jax.agents.writing.rank import Rank
from qcn_jax.agents.writing.rewrite import Rewrite
from qcn_jax.cli import acting, parsing, task_repositories
from qcn_jax.envs.web import judge
from qcn_jax.errors import UserError

WRITTEN: dict[str, Kind] = {kind.name: kind for kind in (Rewrite(), QuestionsAnswered(), Rank())}
_WRITING = {"kind", "data", "out", "checkpoint", "baseline", "endpoint", "model", "key_variable", "stream",
            "request_seconds", "temperature", "top_p", "top_k", "seed", "max_new_tokens", "parallel"}  # flags of those


def main(argv: Sequence[str]) -> int:
    """Parses flags, lets somebody act or write, writes what is kept."""
    values = flags.FlagValues()
    flags.DEFINE_enum("kind", "agent", ["agent", "simulate", *WRITTEN], "What is collected.", flag_values=values)
    flags.DEFINE_string("tasks", None, "Tasks as JSONL in SWE-bench's schema, or a folder of Harbor's task folders; "
                        "for agent and simulate.", flag_values=values)
    flags.DEFINE_string("data", None, "For rewrite and qa: JSONL with text, or a file or folder of pages; for rank: "
                        "JSONL with prompt, answers and checklist.", flag_values=values)
    flags.DEFINE_string("out", None, "File of conversations or texts, JSONL.", flag_values=values, required=True)
    flags.DEFINE_integer("per_task", 0, "Keep at most so many of a task; 0: all.", flag_values=values, lower_bound=0)
    flags.DEFINE_string("judge_endpoint", "", "OpenAI-compatible endpoint of a model that takes images, which scores "
                        "the pages that agents leave; without it checks of the DOM and the layout score alone.",
                        flag_values=values)
    flags.DEFINE_string("judge_model", "", "Model to ask there.", flag_values=values)
    acting.define_invalid(values)
    task_repositories.define(values)
    acting.define_place(values)
    mesh = acting.define_agent(values)
    parsing.parse(values, "collect", __doc__, argv)
    wanted, other = ("data", "tasks") if values.kind in WRITTEN else ("tasks", "data")
    if not values[wanted].value or values[other].value:
        raise UserError(f"--kind={values.kind} takes --{wanted}, and no --{other}")
    if values.kind in WRITTEN:
        parsing.refuse_given(values, set(values) - _WRITING, f"nothing that --kind={values.kind} goes by")
    files.check_file(values.out, "out")
    eyes = _judge(values)
    if values.kind in WRITTEN:
        return _written(values, WRITTEN[values.kind])
    if values.kind == "simulate":
        if values.scaffold not in (None, "simulated_user"):
            raise UserError(f"--scaffold={values.scaffold}: --kind=simulate has its own, simulated_user; leave it out")
        values.scaffold = "simulated_user"
        values["scaffold"].present = 1  # said by --kind
    given = acting.read_tasks(values.tasks)
    agent, work = acting.agent(values, mesh), pathlib.Path(f"{values.out}.work")
    folder = running.Folder(work, agent.settings)
    given = given.located(values)
    place = acting.place_of(values)
    with open_arena(given.tasks, given.specs, place, given.instances, agent.scaffold, eyes) as arena:
        arena = acting.checked(values, arena, work)
        episodes = agent.run(arena, folder)
        judged = {"judge_endpoint": values.judge_endpoint, "judge_model": values.judge_model}
        with running.remember(work / "reviews", "reviews.jsonl", judged, f"--out={values.out}") as reviews:
            kept = [record for record in episodes if fate_of(record) == KEPT]
            refused = review_pages(kept, arena.tasks, arena.services, reviews, values.workers)
        selection = Selection(folder, episodes, values.per_task, refused)
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


def _judge(values: flags.FlagValues) -> judge.Judge | None:
    """Who looks at pages; raises UserError where it does not answer."""
    if not values.judge_endpoint:
        parsing.refuse_given(values, ["judge_model"], "nobody is asked without --judge_endpoint")
        return None
    if not values.judge_model:
        raise UserError("--judge_model: name the model that --judge_endpoint serves")
    return judge.connect(values.judge_endpoint, values.judge_model, "--judge_endpoint",
                         key_variable=values.key_variable)


def _written(values: flags.FlagValues, kind: Kind) -> int:
    """Has a model write rows of `kind`, writes those that checks bear out."""
    if not values.endpoint or not values.model or values.checkpoint or values.baseline:
        raise UserError(f"--kind={kind.name} takes --endpoint=URL and --model=NAME; qcn serve makes one of a "
                        "checkpoint")
    faults: list[str] = []
    items, work = read_items(values.data, kind, faults), pathlib.Path(f"{values.out}.work")
    model = acting.endpoint(values, values.endpoint, values.model, f"{work}/answers")
    settings = {name: values[name].value for name in ("kind", "model", "temperature", "top_p", "top_k", "seed",
                                                      "max_new_tokens")}
    model.check()
    made_before = running.remember(work, f"{kind.name}.jsonl", settings, f"--out={values.out}")
    yields: Counter[str] = Counter()

    def kept(bar: Any) -> Iterator[dict[str, Any]]:
        progress = lambda made: bar.update()
        parallel = values.parallel or 8
        for _, made in make_all(items, kind, model.ask, made_before, parallel, values.seed, progress):
            yields.update(made.dropped, kept=len(made.rows))
            yield from made.rows

    with tqdm.tqdm(total=len(items), desc=kind.name, unit="item", file=sys.stderr) as bar:
        files.write_jsonl(values.out, kept(bar))
    for fault in faults:
        print(fault)
    count = yields.pop("kept", 0)
    files.write_json(f"{values.out}.yields.json", {
        "kind": kind.name, "items": len(items), "kept": count, "dropped": dict(sorted(yields.items())),
        "bad_rows": len(faults), "model": values.model})
    dropped = ", ".join(f"{name} {number}" for name, number in sorted(yields.items()))
    print(f"kept {count} of {len(items)} items" + (f"; dropped: {dropped}" if dropped else "") + f"; {values.out}")
    return 0
