"""The baseline that needs no model: undo the most suspicious token of the function that misbehaves.

It acts through the same tools, turns and tests as a model does: view, edit, run the tests, undo and try the next
suspicion while turns are left, submit when the tests pass. What it resolves is what guessing with test feedback
gives, and every rate of a model is to be read beside it.
"""

import io
import tokenize
from collections.abc import Sequence

from qcn_jax.agents import source_code
from qcn_jax.agents.episode import Episode
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.tools import ToolExecutor
from qcn_jax.agents.trajectory import Trajectory, verified
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.pipeline.evaluate.baseline import Baseline
from qcn_jax.recipes.nano import page_tokens, spans
from qcn_jax.recipes.nano.solver import SpanEdit, check_plays, play_attempts

# Most suspicious first: a rule maps a token to what it is taken to have been. Deleting `not` comes before all.
RULES: tuple[dict[str, tuple[str, ...]], ...] = (
    {"not": ("",)},
    {"==": ("!=",), "!=": ("==",), "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<=")},
    {"True": ("False",), "False": ("True",), "and": ("or",), "or": ("and",)},
    {"+": ("-",), "-": ("+",), "*": ("/",), "//": ("*",), "+=": ("-=",), "-=": ("+=",)},
)
_NUMBER_RULE = len(RULES)  # integers one up and one down come last


def suspicions(lines: Sequence[str], path: str = "") -> list[SpanEdit]:
    """Edits of a function worth trying, the most suspicious first; each leaves it parseable.

    Args:
      lines: of the function, without its outer indentation; of pages it may be a whole file.
      path: of its file, whose ending tells the language; Python otherwise.
    """
    changes = page_tokens.changes(lines, path) if path.endswith(spans.PAGE_ENDINGS) else _changes(lines)
    found = []
    for rank, number, after in changes:
        span = spans.minimal_edit(lines[number - 1], after)
        if span is not None and source_code.parses([*lines[: number - 1], after, *lines[number:]], path):
            found.append((rank, SpanEdit(number, *span)))
    ranked = [edit for _, edit in sorted(found, key=lambda item: item[0])]  # stable: text order within a rule
    return list(dict.fromkeys(ranked))


def act(episode: Episode, first: Sequence[SpanEdit] = ()) -> None:
    """Plays `episode` (of the nano scaffold) to its end; tries the edits `first`, as far as they apply, before any."""
    _step(episode, [ToolCall("view")])
    path, lines = shown(episode) if not episode.done else ("", [])
    applicable = [edit for edit in first if edit.applied(lines, path) is not None]
    try_edits(episode, list(dict.fromkeys([*applicable, *suspicions(lines, path)])))


def try_edits(episode: Episode, edits: Sequence[SpanEdit]) -> None:
    """Makes one edit after the other, each in the place of the one before, until the tests pass; then submits."""
    play_attempts(episode, (), [[edit] for edit in edits])
    if not episode.done:
        _step(episode, [ToolCall("submit")])


class Heuristic(Baseline):
    """`act` as evaluation's baseline."""

    def check(self, scaffold: Scaffold) -> None:
        """See Baseline."""
        check_plays(self, scaffold)

    def play(self, episode: Episode) -> None:
        """See Baseline."""
        act(episode)


HEURISTIC = Heuristic("heuristic", "heuristic")


def search(task: Task, scaffold: Scaffold, executor: ToolExecutor, guesses: Sequence[SpanEdit] = (), max_turns: int = 8
           ) -> Trajectory | None:
    """A trajectory that looks for the defect without knowing it: guesses first, then suspicions, tests deciding.

    Args:
      task: its starting state is what `executor` must hold, untouched.
      scaffold: nano's, with several turns.
      executor: of the scaffold's tools.
      guesses: of a model, the likeliest first.
      max_turns: turns in which it must have been found.

    Returns:
      None where it was not.

    Raises:
      SandboxError: the sandbox failed.
    """
    episode = Episode(task, scaffold, executor, max_turns=max_turns)
    act(episode, guesses)
    return verified(episode, executor, search=True)


def _step(episode: Episode, calls: Sequence[ToolCall]) -> None:
    episode.step(episode.scaffold.render("", calls))


def shown(episode: Episode) -> tuple[str, list[str]]:
    """Path and lines of the function that the first call of the last turn showed."""
    result = episode.turns[-1].results[0]
    if not result.ok:
        return "", []
    path, *lines = result.text.split("\n")
    return path, [line.removeprefix(spans.line_token(number)) for number, line in enumerate(lines, 1)]


def _changes(lines: Sequence[str]) -> list[tuple[int, int, str]]:
    """(rank of the rule, line number, changed line); strings and comments are left alone."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return []
    found = []
    for token in tokens:
        (number, start), (last, end) = token.start, token.end
        if number != last or number > len(lines) or token.type not in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
            continue
        line = lines[number - 1]
        for rank, swap in _swaps(token):
            tail = line[end:] if swap else line[end:].lstrip()
            found.append((rank, number, line[:start] + swap + tail))
    return found


def _swaps(token: tokenize.TokenInfo) -> list[tuple[int, str]]:
    if token.type == tokenize.NUMBER:
        value = int(token.string) if token.string.isdigit() else None
        return [] if value is None else [(_NUMBER_RULE, str(value - 1)), (_NUMBER_RULE, str(value + 1))]
    return [(rank, swap) for rank, rule in enumerate(RULES) for swap in rule.get(token.string, ())]
