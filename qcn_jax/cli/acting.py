"""Flags of verbs that let somebody act on tasks, and what they mean: who acts, how, where, on which tasks."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm
from absl import flags

from qcn_jax import files
from qcn_jax.agents import running
from qcn_jax.agents.acting import Limits, Script
from qcn_jax.agents.arena import Arena, Place
from qcn_jax.agents.records import Record
from qcn_jax.agents.scaffolds import SCAFFOLDS, Scaffold
from qcn_jax.chat.endpoint import Endpoint
from qcn_jax.chat.templates import TEMPLATES
from qcn_jax.cli import blocks, parsing, task_repositories
from qcn_jax.config import MeshConfig
from qcn_jax.envs.network.policy import NETWORKS
from qcn_jax.envs.problems import schema as problems
from qcn_jax.envs.sandbox import RepositorySpec, SandboxError
from qcn_jax.envs.sandbox.repository import read_specs
from qcn_jax.envs.tasks import formats, harbor, swebench
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.schema import read_tasks as read_rows
from qcn_jax.errors import UserError


def define_place(values: flags.FlagValues) -> None:
    """Defines where code runs."""
    flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.", flag_values=values)
    flags.DEFINE_enum("network", "none", NETWORKS, "What an agent with a shell reaches: nothing, or package indexes "
                      "and documentation through a filter.", flag_values=values)
    flags.DEFINE_enum("isolation", "container", ["container", "shared"],
                      "A fresh container for each grading, or warm ones with a fresh workspace.", flag_values=values)
    flags.DEFINE_enum("pool", "process", ["process", "ray"], "Workers on this machine or in a Ray cluster.",
                      flag_values=values)
    flags.DEFINE_string("ray_address", "", "Of the cluster; by default RAY_ADDRESS.", flag_values=values)
    flags.DEFINE_float("timeout", swebench.TIMEOUT, "Seconds for the tests of a task that has an image of its own.",
                       flag_values=values, lower_bound=1.0)
    flags.DEFINE_bool("verifier_network", False, "Tests and solutions of Harbor's task folders reach the network, as "
                      "those need that download what they run with.", flag_values=values)
    flags.DEFINE_integer("workers", 2, "Sandboxes and gradings side by side.", flag_values=values, lower_bound=1)


def place_of(values: flags.FlagValues) -> Place:
    """What the flags of `define_place` say.

    Raises:
      UserError: the address of a cluster that is not used.
    """
    if values.pool != "ray":
        parsing.refuse_given(values, ["ray_address"], "only --pool=ray has a cluster")
    return Place(values.sandbox, values.isolation, values.pool, values.ray_address, values.workers, values.timeout,
                 values.network, values.verifier_network)


def define_agent(values: flags.FlagValues, several: bool = False) -> Callable[[], MeshConfig | None]:
    """Defines who acts and how; returns what gives the mesh after parsing.

    With `several` --endpoint and --model may be given more than once.
    """
    define = flags.DEFINE_multi_string if several else flags.DEFINE_string
    more = " May be given several times." if several else ""
    flags.DEFINE_string("checkpoint", None, "Folder with weights in Hugging Face form and tokenizer.json.",
                        flag_values=values)
    flags.DEFINE_string("baseline", None, "What plays by rules, without a model: heuristic (with scaffold nano), or "
                        "package.module:OBJECT.", flag_values=values)
    define("endpoint", None, f"OpenAI-compatible endpoint, e.g. http://localhost:8000/v1.{more}", flag_values=values)
    define("model", None, f"Model to ask there.{more}", flag_values=values)
    flags.DEFINE_string("key_variable", "OPENAI_API_KEY", "Environment variable that holds the endpoint's key.",
                        flag_values=values)
    flags.DEFINE_bool("stream", True, "Ask the endpoint for answers in pieces.", flag_values=values)
    flags.DEFINE_float("request_seconds", 300.0, "Without a byte from the endpoint, after which it is asked again.",
                       flag_values=values, lower_bound=0.1)
    flags.DEFINE_string("scaffold", None, f"How tasks are shown: {', '.join(SCAFFOLDS)} or package.module:OBJECT. "
                        "Default: mini_swe_agent with an endpoint; with a checkpoint what the run that made it goes "
                        "by, as with all that follows, or nano.", flag_values=values)
    flags.DEFINE_string("template", "", "Tool-call template in which tools are listed, calls are written and results "
                        f"are told, with scaffolds that have tool calls: {', '.join(TEMPLATES)}. Default: the chat "
                        "template's own.", flag_values=values)
    flags.DEFINE_integer("attempts", 1, "Episodes for each task.", flag_values=values, lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "Of sampling.", flag_values=values, lower_bound=0.0)
    flags.DEFINE_float("top_p", 0.0, "Of sampling; 0: the endpoint's own, or 1.", flag_values=values, lower_bound=0.0,
                       upper_bound=1.0)
    flags.DEFINE_integer("top_k", 0, "Of sampling, most probable tokens; 0: the endpoint's own, or all.",
                         flag_values=values, lower_bound=0)
    flags.DEFINE_integer("redraws", 0, "With a checkpoint and a scaffold without a shell: how often a turn that comes "
                         "again to files on which tests failed is drawn once more; it counts for nothing. Default: "
                         "its run's, or 0.", flag_values=values, lower_bound=0)
    flags.DEFINE_float("redraw_temperature", 1.0, "Of these.", flag_values=values, lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "From which each attempt gets its own.", flag_values=values)
    flags.DEFINE_integer("max_turns", None, "Turns of an episode. Default: 50, with a checkpoint its run's or 8.",
                         flag_values=values, lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", None, "Tokens of a turn. Default: 4096, with a checkpoint its run's or 64.",
                         flag_values=values, lower_bound=1)
    flags.DEFINE_integer("max_length", None, "Tokens of an episode: with a checkpoint prompt included, default its "
                         "run's or 1024; "
                         "with an endpoint those that it generates, default no limit.", flag_values=values,
                         lower_bound=16)
    flags.DEFINE_float("max_seconds", 3600.0, "Of an episode with an endpoint.", flag_values=values, lower_bound=0.1)
    flags.DEFINE_integer("parallel", None, "Episodes side by side. Default: 8, with a checkpoint its run's or "
                         "32.",
                         flag_values=values, lower_bound=1)
    blocks.define(values, "parallel")
    return parsing.define_mesh(values)


@dataclasses.dataclass(frozen=True)
class Agent:
    """Who acts: behind an endpoint, by rules, or the weights of a folder.

    name: of the model, in reports.
    settings: what episodes depend on, by flag.
    player: the endpoint or the rules; None for weights.
    """

    name: str
    scaffold: Scaffold
    plan: running.Plan
    settings: Mapping[str, Any]
    player: Endpoint | Script | None
    values: flags.FlagValues
    mesh: MeshConfig | None

    def run(self, arena: Arena, folder: running.Folder) -> list[Record]:
        """Plays all attempts that `folder` lacks, with a bar that tells the time left."""
        total = len(arena.tasks) * self.plan.attempts
        done = sum(record.counts for record in folder.records().values())
        resolved = sum(record.resolved for record in folder.records().values())
        with tqdm.tqdm(total=total, initial=min(done, total), desc=self.name[-30:], unit="episode",
                       file=sys.stderr) as bar:
            def progress(record: Record) -> None:
                nonlocal resolved
                resolved += record.resolved
                bar.set_postfix_str(f"{resolved} resolved", refresh=False)
                bar.update()

            tasks = list(arena.tasks.values())
            if self.player is not None:
                return running.run(tasks, self.scaffold, arena.services, self.player, self.name, self.plan, folder,
                                   progress)
            from qcn_jax.pipeline.evaluate import acting

            values = self.values
            drawing = acting.Drawing(values.temperature, values.top_p or 1.0, values.top_k,
                                     values.max_new_tokens or 64, values.max_length or 1024,
                                     values.redraws, values.redraw_temperature)
            return acting.run(values.checkpoint, self.mesh, tasks, self.scaffold, arena.services, self.plan, drawing,
                              folder, progress, blocks.given(values))


def agent(values: flags.FlagValues, mesh: Callable[[], MeshConfig | None], url: str | None = None,
          model: str | None = None) -> Agent:
    """Who the flags name; an endpoint is asked whether it answers.

    Args:
      url: in the place of --endpoint, where several are named.
      model: in the place of --model.

    Raises:
      UserError: nobody, or two at once; a scaffold that is none; an endpoint that does not answer.
    """
    url, model = url or values.endpoint, model or values.model
    if bool(values.checkpoint) + bool(url) + bool(values.baseline) != 1:
        raise UserError("give one of --checkpoint=DIR, --endpoint=URL (with --model=NAME) and --baseline=NAME")
    if url and not model:
        raise UserError("--model: name the model that --endpoint serves")
    _refuse_idle(values, url)
    if values.checkpoint:
        _as_its_run(values)
    scaffold = SCAFFOLDS.resolve(values.scaffold or ("mini_swe_agent" if url else "nano"), "--scaffold")
    scaffold = in_template(scaffold, values.template)
    if values.redraws and scaffold.has_shell:
        if values["redraws"].present:
            raise UserError(f"--redraws={values.redraws}: what shell commands did cannot be taken back; use 0, or a "
                            f"scaffold without a shell, which --scaffold={scaffold.name} is not")
        values["redraws"].value = 0  # of a run with another scaffold
    if not values.redraws:
        parsing.refuse_given(values, ["redraw_temperature"], "no turn is drawn again without --redraws")
    if not scaffold.has_shell and values.network != "none":
        parsing.refuse_given(values, ["network"], f"--scaffold={scaffold.name} has no shell that could reach it")
    turns = values.max_turns or (50 if url else 8)
    limits = Limits(turns, values.max_seconds, values.max_length or 0)
    plan = running.Plan(values.attempts, values.seed, limits, values.parallel or (32 if values.checkpoint else 8))
    settings = {"model": model, "checkpoint": values.checkpoint, "baseline": values.baseline,
                "scaffold": scaffold.name, "network": values.network,
                "temperature": values.temperature, "top_p": values.top_p, "top_k": values.top_k or None,
                "seed": values.seed, "max_turns": turns, "max_new_tokens": values.max_new_tokens,
                "max_length": values.max_length, "redraws": values.redraws or None,
                "redraw_temperature": values.redraw_temperature if values.redraws else None}
    if values.baseline:
        from qcn_jax.pipeline.evaluate.baseline import BASELINES

        rules = BASELINES.resolve(values.baseline, "--baseline")
        try:
            rules.check(scaffold)
        except UserError as error:
            raise UserError(f"--scaffold={scaffold.name}: {error}") from error
        return Agent(rules.name, scaffold, plan, settings, rules, values, None)
    if not url:
        from qcn_jax.inference.checkpoint import check_budget
        from qcn_jax.pipeline.evaluate.acting import speaking

        devices = mesh()
        speaking(values.checkpoint, scaffold)  # what is wrong there is said before tasks are checked
        check_budget(values.checkpoint, devices, slots=plan.parallel, max_length=values.max_length or 1024,
                     block_size=values.block_size, num_blocks=values.num_blocks)
        return Agent(values.checkpoint, scaffold, plan, settings, None, values, devices)
    player = endpoint(values, url, model)
    player.check()
    return Agent(model, scaffold, plan, settings, player, values, None)


def _refuse_idle(values: flags.FlagValues, url: str | None) -> None:
    """Refuses flags that say nothing of the kind of agent that the others name."""
    if not url:
        keyed = "judge_endpoint" in values and values.judge_endpoint
        asked = ["model", "stream", "request_seconds", "max_seconds", *([] if keyed else ["key_variable"])]
        parsing.refuse_given(values, asked, "only an --endpoint is asked so")
    if not values.checkpoint:
        here = [*blocks.NAMES, "mesh", *(name for name in ("redraws", "redraw_temperature") if values[name].value)]
        parsing.refuse_given(values, here, "only a --checkpoint is run here")
    if values.baseline:
        parsing.refuse_given(values, ["temperature", "top_p", "top_k", "max_new_tokens", "max_length"],
                             "a --baseline plays by rules and writes no tokens")


def in_template(scaffold: Scaffold, template: str) -> Scaffold:
    """`scaffold` under --template, where that is given; raises UserError for one that is none, or does not fit."""
    if not template:
        return scaffold
    if template not in TEMPLATES:
        raise UserError(f"--template: {template!r} is unknown; allowed: {', '.join(TEMPLATES)}")
    try:
        return scaffold.in_template(template)
    except UserError as error:
        raise UserError(f"--template={template}: {error}") from error


def endpoint(values: flags.FlagValues, url: str, model: str, cache: str = "") -> Endpoint:
    """A model at `url`, asked as the flags of `define_agent` say; `cache` as Endpoint's."""
    return Endpoint(url, model, values.key_variable, cache, values.max_new_tokens or 4096, values.temperature,
                    values.request_seconds, values.top_p, values.stream, values.top_k)


def _as_its_run(values: flags.FlagValues) -> None:
    """Gives flags that are not given the values of the run that made --checkpoint, where its folder has them."""
    from qcn_jax.pipeline.evaluate import settings

    if (stored := settings.read(values.checkpoint)) is not None:
        for name, value in stored.flags(sampled=values.attempts > 1).items():
            if not values[name].present:
                values[name].value = value


def agents(values: flags.FlagValues, mesh: Callable[[], MeshConfig | None]) -> list[Agent]:
    """Who the flags name, where several may be: one endpoint for all models, or one model for all endpoints, or pairs.

    Raises:
      UserError: as `agent`, or the numbers do not fit.
    """
    urls, models = values.endpoint or [], values.model or []
    if not urls:
        return [agent(values, mesh)]
    count = max(len(urls), len(models))
    if not models:
        raise UserError("--model: name the model that --endpoint serves")
    if len(urls) not in (1, count) or len(models) not in (1, count):
        raise UserError(f"--model: {len(models)} are given for {len(urls)} of --endpoint; give one for all or one each")
    return [agent(values, mesh, (urls * count)[n] if len(urls) == 1 else urls[n],
                  (models * count)[n] if len(models) == 1 else models[n]) for n in range(count)]


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """Tasks by id with their repositories, SWE-bench's instances where they are such, and lines about bad rows."""

    tasks: Mapping[str, Task]
    instances: Mapping[str, swebench.Instance] | None
    faults: list[str]
    specs: Sequence[RepositorySpec] = ()

    def located(self, values: flags.FlagValues) -> "TaskSet":
        """With the repositories of tasks without an image, found or downloaded; raises UserError where none is left."""
        if self.instances is not None or self.specs:
            return self
        faults = list(self.faults)
        specs = task_repositories.find(values, [task for task in self.tasks.values() if not task.eval_script], faults)
        found = {spec.name for spec in specs}
        tasks = {name: task for name, task in self.tasks.items() if task.eval_script or task.repo in found}
        if not tasks:
            raise UserError(faults[0])
        return dataclasses.replace(self, tasks=tasks, faults=faults, specs=specs)


def read_tasks(path: str) -> TaskSet:
    """The tasks of a file, or of Harbor's folders at and below a folder; raises UserError where there is none."""
    faults: list[str] = []
    if files.is_dir(path):
        found = {task.instance_id: task for task in harbor.read_tasks(path, faults)}
        if not found:
            raise UserError(faults[0] if faults else f"--tasks={path}: holds no task; a folder must hold Harbor's, "
                            "with task.toml")
        return TaskSet(found, None, faults)
    if problems.holds_problems(path):
        found = {task.instance_id: task for task in problems.read(path, faults)}
        if not found:
            raise UserError(faults[0])
        return TaskSet(found, None, faults)
    instances = swebench.read(path, faults)
    if instances is None:
        faults = []  # of the same rows as tasks of our own
    tasks = {task.instance_id: task for task in formats.read(path, faults if instances is None else [])
             if instances is None or task.instance_id in instances}
    if not tasks:
        raise UserError(faults[0] if faults else f"--tasks={path}: holds no task")
    return TaskSet(tasks, instances, faults)


def tasks_of_run(checkpoint: str) -> TaskSet | None:
    """The tasks that the run which made a model measures its models on; None where there is no such run.

    Raises:
      UserError: its files are damaged.
    """
    from qcn_jax.pipeline.evaluate import settings

    stored = settings.read(checkpoint)
    path = pathlib.Path(checkpoint, stored.tasks) if stored is not None else None
    if stored is None or path is None or not files.is_file(path):
        return None
    from qcn_jax.pipeline.evaluate.bench import balanced

    tasks = {task.instance_id: task for task in balanced(read_rows(path), stored.count, stored.seed)}
    needed = {task.repo for task in tasks.values() if not task.eval_script}
    specs = [spec for spec in read_specs(path.with_name("repositories.json")) if spec.name in needed]
    return TaskSet(tasks, None, [], specs)


def define_invalid(values: flags.FlagValues) -> None:
    """Defines what happens to tasks that are not what they claim."""
    flags.DEFINE_enum("invalid", "stop", ["stop", "skip", "keep"], "Tasks whose gold patch does not resolve them, or "
                      "which need none: end, leave them out, or do not look.", flag_values=values)


def checked(values: flags.FlagValues, arena: Arena, folder: pathlib.Path) -> Arena:
    """The arena without tasks that are to be left out; see `check_tasks`."""
    return arena if values.invalid == "keep" else arena.without(check_tasks(arena, folder, values.invalid == "skip"))


def check_tasks(arena: Arena, folder: pathlib.Path, leave_out: bool) -> list[str]:
    """Executes what the tasks say of themselves, once for a folder; returns ids of those that are not valid.

    Raises:
      UserError: some are not valid, and are not to be left out; or the sandboxes fail.
    """
    path = folder / "checks.json"
    known: dict[str, str] = files.read_json(path) if path.exists() else {}
    missing = [name for name in arena.tasks if name not in known]
    try:
        with tqdm.tqdm(total=len(missing), desc="checking tasks", unit="task", file=sys.stderr,
                       disable=not missing) as bar:
            for name, problem in arena.check(missing):
                known[name] = problem
                bar.update()
    except SandboxError as error:
        raise UserError(f"tasks cannot be checked: {error}") from error
    finally:
        files.write_json(path, known)
    wrong = [name for name in arena.tasks if known[name]]
    for name in wrong:
        print(f"{name}: {known[name]}", file=sys.stderr)
    if wrong and (not leave_out or len(wrong) == len(arena.tasks)):
        raise UserError(f"--tasks: {len(wrong)} of {len(arena.tasks)} tasks are not valid, such as {wrong[0]}: "
                        f"{known[wrong[0]]}; --invalid=skip leaves them out, --invalid=keep asks nothing")
    return wrong
