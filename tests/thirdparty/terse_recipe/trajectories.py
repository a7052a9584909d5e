"""The known fix, acted out with the scaffold's tools."""

import itertools

from qcn_jax.agents import collecting
from qcn_jax.agents.episode import Episode
from qcn_jax.agents.trajectory import verified
from qcn_jax.agents.workspace import ProviderRunner, open_overlay
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.patches import apply_changes
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.trajectories import TrajectorySource
from terse_recipe.scaffold import SCAFFOLD


class KnownFix(TrajectorySource):
    """One trajectory a task; the option `checks` says how often it looks at the tests."""

    def check(self, config, source, field):
        if set(source.options) != {"checks"}:
            raise UserError(f"{field}.options: {dict(source.options)}; allowed: checks")

    def collect(self, context, source, tasks, stopped):
        request = lambda number, task: source.options["checks"]
        return collecting.collect(context.root / "sft" / "trajectories.jsonl", tasks, act, request, context.pool(),
                                  context.log, stopped)


SOURCE = KnownFix()


def act(provider, task, checks):
    workspace = open_overlay(task, provider.files(task.repo), ProviderRunner(provider, task.repo))
    executor = SCAFFOLD.executor(task, workspace)
    episode = Episode(task, SCAFFOLD, executor)
    swap = ToolCall("swap", {"path": task.path} | difference(workspace.read(task.path), task))
    for calls in ([swap], *[[ToolCall("check")]] * checks, [ToolCall("done")]):
        if not episode.done:
            episode.step(SCAFFOLD.render("", calls))
    made = verified(episode, executor) if episode.done else None
    return [] if made is None else [made]


def difference(before, task):
    """Lines that the fix changes, with as many around them as make them the only such text of the file."""
    after = apply_changes({task.path: before}, task.patch)[task.path].split("\n")
    lines = before.split("\n")
    same = lambda a, b: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
    first, last = same(lines, after), same(lines[::-1], after[::-1])
    while True:
        old, new = ("\n".join(text[first : len(text) - last]) for text in (lines, after))
        if old and before.count(old) == 1:
            return {"old": old, "new": new}
        first, last = max(first - 1, 0), max(last - 1, 0)
