"""A change cut in two: what tests say (test patch) and what makes them pass (fix patch)."""

import dataclasses
import pathlib
from collections.abc import Mapping

from qcn_jax.envs.synthesis.mine.history import Change, Clone
from qcn_jax.envs.testpaths import is_test_path

ASIDE = frozenset({"doc", "docs", "example", "examples", "benchmark", "benchmarks", "tools", "scripts", ".github",
                   "ci"})
ENDINGS = (".py", ".pyi")


@dataclasses.dataclass(frozen=True)
class Split:
    """New texts by path (None: deleted); `binary` says that a file that is part of it is no text."""

    fix: dict[str, str | None]
    tests: dict[str, str | None]
    others: tuple[str, ...]
    binary: bool = False


def kind_of(path: str) -> str:
    """source, test or other."""
    parts = pathlib.PurePosixPath(path).parts
    if is_test_path(path):
        return "test"
    if path.endswith(ENDINGS) and parts[-1] not in ("setup.py", "noxfile.py") and parts[0] not in ASIDE:
        return "source"
    return "other"


def split(clone: Clone, change: Change) -> Split:
    """Reads a change's files and sorts them."""
    touched = clone.touched(change)
    tree = clone.tree(change.commit)
    wanted = {path: tree[path][1] for path, status in touched.items()
              if status != "D" and path in tree and kind_of(path) != "other"}
    contents = clone.read(list(wanted.values()))
    groups: dict[str, dict[str, str | None]] = {"source": {}, "test": {}}
    others, binary = [], False
    for path, status in touched.items():
        kind = kind_of(path)
        if kind == "other":
            others.append(path)
            continue
        text: str | None = None
        if status != "D":
            try:
                text = contents[wanted[path]].decode("utf-8")
            except (UnicodeDecodeError, KeyError):  # KeyError: a link or submodule
                binary = True
                continue
        groups[kind][path] = text
    return Split(groups["source"], groups["test"], tuple(others), binary)


def size(before: Mapping[str, str], after: Mapping[str, str | None]) -> int:
    """Lines that differ, roughly: those of either side that the other does not have."""
    total = 0
    for path, text in after.items():
        old, new = (before.get(path) or "").splitlines(), (text or "").splitlines()
        total += len(set(old) ^ set(new))
    return total
