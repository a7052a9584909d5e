"""The scripted solver: trajectories through the same tools, in the same sandboxes, kept only if the tests pass.

It knows the gold patch and acts it out: view, perhaps plausible wrong edits that fail the tests and that are
undone, then the smallest right edit, tests, submit. Nothing in a trajectory is made up: every observation comes from
the tools, and a trajectory whose tests do not pass in the end is not returned.
"""

import ast
import dataclasses
import io
import random
import re
import tokenize
from collections.abc import Callable, Sequence

from qcn_jax import syntax
from qcn_jax.agents import python_code, source_code
from qcn_jax.agents.episode import Episode
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.tools import ToolError, ToolExecutor, hunk_line
from qcn_jax.agents.trajectory import Trajectory, verified
from qcn_jax.agents.workspace import ProviderRunner, TestRunner, WorkspaceError, open_overlay
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.patches import PatchError, apply_changes
from qcn_jax.envs.sandbox.base import Provider
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from qcn_jax.pipeline.evaluate.baseline import Baseline
from qcn_jax.recipes.nano import page_tokens, spans
from qcn_jax.recipes.nano.scaffold import NANO, NanoScaffold
from qcn_jax.recipes.nano.spans import minimal_edit

__all__ = [
    "SpanEdit", "find_views", "gold_edits", "minimal_edit", "solve", "solve_with", "span_edits", "wrong_edits",
]

MAX_EDITS = 3  # spans of one fix; larger ones are not what the compact edit tool is for
GOLD_LINE = 0.5  # share of wrong edits that are made on a line which the right edit changes

_SWAPS = {
    "True": ("False",), "False": ("True",), "None": ("False",), "and": ("or",), "or": ("and",),
    "==": ("!=",), "!=": ("==",), "<": ("<=", ">"), "<=": ("<",), ">": (">=", "<"), ">=": (">",),
    "+": ("-",), "-": ("+",), "*": ("+",), "//": ("/",), "%": ("//",), "+=": ("-=",), "-=": ("+=",),
    "is": ("is not",), "in": ("not in",), "if": ("if not",), "elif": ("elif not",), "return": ("return not",),
    "not": ("",), "any": ("all",), "all": ("any",), "min": ("max",), "max": ("min",),
}


@dataclasses.dataclass(frozen=True)
class SpanEdit:
    """One call of the compact edit tool; `line` counts from 1 in the function on view."""

    line: int
    old: str
    new: str

    def call(self) -> ToolCall:
        """The edit as a tool call."""
        return ToolCall("edit", {"line": spans.line_token(self.line), "old": self.old, "new": self.new})

    def applied(self, lines: Sequence[str], path: str = "") -> str | None:
        """Its line of the function `lines` of the file `path` after the edit.

        None where nothing changes, the text is not there exactly once, or what comes of it does not parse.
        """
        if self.old == self.new or not 0 < self.line <= len(lines):
            return None
        if python_code.occurrences(lines[self.line - 1], self.old) != 1:
            return None
        after = lines[self.line - 1].replace(self.old, self.new)
        return after if source_code.parses([*lines[: self.line - 1], after, *lines[self.line :]], path) else None


def solve(
    task: Task, executor: ToolExecutor, scaffold: Scaffold = NANO, *, seed: int = 0, wrong: int = 0,
    guesses: Sequence[SpanEdit] = (), grade: Callable[[Task, str], bool] | None = None,
) -> Trajectory | None:
    """Acts the gold patch out.

    Args:
      task: its starting state is what `executor` must hold, untouched.
      executor: of `scaffold`'s tools.
      scaffold: NANO or one of the single-turn ones.
      seed: chooses the wrong edits, together with the task's id.
      wrong: how many wrong edits come first, if the function has room for so many.
      guesses: edits to take the wrong ones from before any are made up.
      grade: whether a patch resolves the task; by default the tests are run where the edits were made.

    Returns:
      None where the fix is no small span edit, or the tests do not pass.

    Raises:
      SandboxError: the sandbox failed.
    """
    views = find_views(task, executor)
    edits = None if views is None else gold_edits(task, executor)
    if views is None or edits is None or (scaffold.single_turn and len(views) > 1):
        return None
    failing = wrong_edits(task, executor, edits, seed, 0 if scaffold.single_turn else wrong, guesses)
    episode = Episode(task, scaffold, executor, max_turns=len(views) + len(failing) + 3)
    if scaffold.single_turn:
        _act(episode, [edit.call() for edit in edits])
    else:
        play_attempts(episode, views, [*([edit] for edit in failing), edits])
    return verified(episode, executor, grade)


class Scripted(Baseline):
    """The solver as evaluation's baseline: what the tools allow to whoever knows the fix."""

    def check(self, scaffold: Scaffold) -> None:
        """See Baseline."""
        check_plays(self, scaffold)

    def play(self, episode: Episode) -> None:
        """See Baseline; submits nothing where the fix is no small span edit."""
        views = find_views(episode.task, episode.executor)
        edits = None if views is None else gold_edits(episode.task, episode.executor)
        play_attempts(episode, views or (), [edits] * (edits is not None))
        _act(episode, [ToolCall("submit")])


SCRIPTED = Scripted("solver", "scripted solver, which knows the fix")


def check_plays(baseline: Baseline, scaffold: Scaffold) -> None:
    """Raises UserError unless `scaffold` has nano's tools and several turns."""
    if not isinstance(scaffold, NanoScaffold) or scaffold.single_turn:
        raise UserError(f"baseline {baseline.name} plays several turns with nano's tools, not scaffold {scaffold.name}")


def play_attempts(episode: Episode, views: Sequence[ToolCall], attempts: Sequence[Sequence[SpanEdit]]) -> None:
    """Views, then makes one attempt in the place of the one before until the tests pass; submits if they do."""
    for view in views:
        _act(episode, [view])
    undo: list[ToolCall] = []
    for attempt in attempts:
        _act(episode, [*undo, *(edit.call() for edit in attempt), ToolCall("run_tests")])
        if episode.done or episode.turns[-1].passed:
            break
        undo = [ToolCall("undo")] * len(attempt)
    if not episode.done and episode.turns and episode.turns[-1].passed:
        _act(episode, [ToolCall("submit")])


def solve_with(
    provider: Provider, task: Task, scaffold: Scaffold = NANO, *, seed: int = 0, wrong: int = 0,
    guesses: Sequence[SpanEdit] = (), grade: Callable[[Task, str], bool] | None = None,
    runner: TestRunner | None = None,
) -> Trajectory | None:
    """`solve` with files and test runs of `provider`, which has the task's repository prepared.

    Several trajectories of one task cost fewer test runs with a `runner` in common (`workspace.Remembering`).
    """
    workspace = open_overlay(task, provider.files(task.repo), runner or ProviderRunner(provider, task.repo))
    return solve(task, scaffold.executor(task, workspace), scaffold, seed=seed, wrong=wrong, guesses=guesses,
                 grade=grade)


def _act(episode: Episode, calls: Sequence[ToolCall]) -> None:
    if not episode.done:
        episode.step(episode.scaffold.render("", calls))


def find_views(task: Task, executor: ToolExecutor) -> list[ToolCall] | None:
    """The calls after which the function that the gold patch changes is on view, and puts it there.

    The statement names the function that was seen misbehaving. Where the defect lies in another one of the same
    file, an agent can only go there if it reads its name in what it sees; otherwise the answer is None.
    """
    line = hunk_line(task.patch, task.path)
    try:
        view = executor.show(None, None)
        source = executor.workspace.read(view.path)
    except (ToolError, WorkspaceError):
        return None
    if line is None or view.start <= line <= view.end:
        return [ToolCall("view")]
    holders = [span for span in source_code.function_spans(source, task.path) if span[1] <= line <= span[2]]
    shown = "\n".join(source.split("\n")[view.start - 1 : view.end])
    if not holders or not re.search(rf"\b{re.escape(holders[-1][0].split('.')[-1])}\b", shown):
        return None
    executor.show(task.path, holders[-1][0])
    return [ToolCall("view"), ToolCall("view", {"symbol": holders[-1][0]})]


def gold_edits(task: Task, executor: ToolExecutor) -> list[SpanEdit] | None:
    """The gold patch as span edits of the function on view; None where it is none or needs more than MAX_EDITS."""
    view = executor.view()
    before = executor.workspace.read(view.path)
    try:
        after = apply_changes({view.path: before}, task.patch)
    except PatchError:
        return None
    old, new = before.split("\n"), (after.get(view.path) or "").split("\n")
    if list(after) != [view.path] or len(old) != len(new) or view.end - view.start >= spans.MAX_LINE_TOKENS:
        return None
    outside = [*range(view.start - 1), *range(view.end, len(old))]
    if any(old[i] != new[i] for i in outside):
        return None
    function = old[view.start - 1 : view.end]
    cut = len(function[0]) - len(spans.dedent(function)[0])
    if any(a != b and a[:cut] != b[:cut] for a, b in zip(old, new, strict=True)):
        return None
    return span_edits(spans.dedent(function), spans.dedent(new[view.start - 1 : view.end]))


def span_edits(before: Sequence[str], after: Sequence[str]) -> list[SpanEdit] | None:
    """Span edits that turn the lines `before` into `after` (equally many); None if there are none or too many."""
    edits = []
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        if old != new:
            span = minimal_edit(old, new)
            if span is None:
                return None
            edits.append(SpanEdit(number, *span))
    return edits if 1 <= len(edits) <= MAX_EDITS else None


def wrong_edits(
    task: Task, executor: ToolExecutor, gold: Sequence[SpanEdit], seed: int, count: int,
    guesses: Sequence[SpanEdit] = (),
) -> list[SpanEdit]:
    """Up to `count` different edits of the task's function that keep it parseable and are not the right one.

    First those of `guesses` that are such edits, in order, then random exchanges of tokens.
    """
    if not count:
        return []
    view = executor.view()
    lines = spans.dedent(executor.workspace.read(view.path).split("\n")[view.start - 1 : view.end])
    rng = random.Random(f"{seed} {task.instance_id}")
    gold_lines = {edit.line for edit in gold}
    right = {(edit.line, lines[edit.line - 1].replace(edit.old, edit.new)) for edit in gold}
    loops = _loop_lines(lines)
    made = [(edit.line, after) for edit in guesses if (after := edit.applied(lines, view.path)) is not None]
    pool = [item for item in sorted(set(_mutations(lines, view.path))) if item not in right and item not in made]
    rng.shuffle(pool)
    chosen: list[SpanEdit] = []
    for number, after in dict.fromkeys(made):
        span = minimal_edit(lines[number - 1], after)
        if len(chosen) < count and span is not None and (number, after) not in right and number not in loops:
            chosen.append(SpanEdit(number, *span))
    while pool and len(chosen) < count:
        near = [item for item in pool if item[0] in gold_lines]
        number, after = (near or pool)[0] if rng.random() < GOLD_LINE else pool[0]
        pool.remove((number, after))
        span = minimal_edit(lines[number - 1], after)
        if span is not None and source_code.parses([*lines[: number - 1], after, *lines[number:]], view.path):
            chosen.append(SpanEdit(number, *span))
    return chosen


def _mutations(lines: Sequence[str], path: str = "") -> list[tuple[int, str]]:
    """(line number, changed line) for every token that has a swap; strings and comments are left alone.

    So are `while` loops: an endless one costs a whole test timeout and teaches little.
    """
    if path.endswith(spans.PAGE_ENDINGS):
        return [(number, after) for _, number, after in page_tokens.changes(lines, path)]
    found = []
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return []
    inside = _loop_lines(lines)
    for token in tokens:
        (number, start), end = token.start, token.end[1]
        if number in inside:
            continue
        if token.type == tokenize.NUMBER and token.string.isdigit():
            swaps: tuple[str, ...] = (str(int(token.string) + 1), str(max(int(token.string) - 1, 0)))
        elif token.type in (tokenize.NAME, tokenize.OP):
            swaps = _SWAPS.get(token.string, ())
        else:
            continue
        line = lines[number - 1]
        for swap in swaps:
            tail = line[end:] if swap else line[end:].lstrip()
            if swap != token.string:
                found.append((number, line[:start] + swap + tail))
    return found


def _loop_lines(lines: Sequence[str]) -> set[int]:
    """Numbers of the lines inside `while` loops; none where the text does not parse."""
    try:
        loops = [node for node in ast.walk(syntax.parse("\n".join(lines))) if isinstance(node, ast.While)]
    except (SyntaxError, ValueError):
        return set()
    return {number for loop in loops for number in range(loop.lineno, (loop.end_lineno or loop.lineno) + 1)}
