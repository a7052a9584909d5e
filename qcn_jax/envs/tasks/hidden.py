"""Tests that show a task's defect, taken out of the tree that its agent sees.

`bug_patch` takes them out and `test_patch`, which graders apply, puts them back: SWE-bench's way, so that every reader
of its format does the same. A test's function is cut from its file; where that cannot be done the whole file goes.
"""

import ast
import re
from collections.abc import Collection, Iterable, Mapping

from qcn_jax import syntax
from qcn_jax.envs import patches
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.testpaths import is_test_path

_DEFINITION = re.compile(r"\s*(?:async\s+)?def\s+(\w+)")


def takes_out(task: Task) -> bool:
    """Whether a task's starting state lacks tests that its `test_patch` puts back."""
    try:
        return bool(task.bug_patch and task.test_patch) and set(patches.touched(task.test_patch)) <= set(
            patches.touched(task.bug_patch))
    except patches.PatchError:  # no patch of ours
        return False


def left(task: Task) -> tuple[str, ...]:
    """Of PASS_TO_PASS the tests that the starting state of such a task has."""
    back: dict[str, set[str] | None] = {}
    for file in patches.parse(task.test_patch):
        lines = [line for hunk in file.hunks for sign, line in hunk.lines if sign == "+"]
        names = {match[1] for line in lines if (match := _DEFINITION.match(line))}
        back[file.path] = None if file.old is None else names

    def there(name: str) -> bool:
        path, _, rest = name.partition("::")
        names = back.get(path, set())
        return names is not None and rest.partition("[")[0].split("::")[-1] not in names

    return tuple(name for name in task.PASS_TO_PASS if there(name))


def without(tests: Iterable[str], files: Mapping[str, str], whole: bool = False) -> dict[str, str | None] | None:
    """Test files without some tests, None for those that go; None where a test stands in no file of tests.

    Args:
      tests: node ids.
      files: texts by path.
      whole: take the files out instead of cutting the tests from them.
    """
    places: dict[str, set[tuple[str, ...]]] = {}
    for name in tests:
        path, *place = name.partition("[")[0].split("::")
        places.setdefault(path, set()).add(tuple(place))
    changed: dict[str, str | None] = {}
    for path, wanted in places.items():
        text = None if whole or not path.endswith(".py") else _cut(files.get(path, ""), wanted)
        if text is None and not (path.endswith(".py") and is_test_path(path)):
            return None  # a doctest, say
        changed[path] = text
    return changed


def _cut(text: str, places: Collection[tuple[str, ...]]) -> str | None:
    """A test file without the functions at `places` ((class, ..., name)); None where that leaves no tests or fails."""
    try:
        tree = syntax.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    lines, spans, found = text.split("\n"), [], set()
    rest = _walk(tree.body, (), places, spans, found)
    if found != set(places) or not rest:
        return None
    for start, end in sorted(spans, reverse=True):
        while start > 1 and lines[start - 2].lstrip().startswith("#"):
            start -= 1  # comments above it
        while start > 1 and end < len(lines) and not lines[start - 2].strip() and not lines[end].strip():
            end += 1  # of the empty lines on both sides one side's
        del lines[start - 1:end]
    made = "\n".join(lines)
    try:
        syntax.parse(made)
    except (SyntaxError, ValueError):
        return None
    return made


def _walk(body: list[ast.stmt], outer: tuple[str, ...], places: Collection[tuple[str, ...]],
          spans: list[tuple[int, int]], found: set[tuple[str, ...]]) -> int:
    """Adds the lines to cut to `spans`, and what was found to `found`; returns how many tests are left."""
    rest = 0
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        place = (*outer, node.name)
        span = (min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno or 0)
        if place in places and not isinstance(node, ast.ClassDef):
            found.add(place)
            spans.append(span)
        elif isinstance(node, ast.ClassDef):
            inside: list[tuple[int, int]] = []
            count = _walk(node.body, place, places, inside, found)
            # Nothing of use is left of a class without tests, and a body must not be empty.
            spans += inside if count or not inside else [span]
            rest += count
        elif node.name.startswith("test"):
            rest += 1
    return rest
