"""Which files of a repository are the package under test, and which the suite that tests it.

The package are the top-level modules and packages that a task's fix touches and those that they import. All else
belongs to the suite, and so do files of the package that the suite loads as its own: modules that `pytest_plugins`
names, and data that tests open themselves (recorded while the repository was prepared).
"""

import ast
import dataclasses
import functools
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping

from qcn_jax.envs import python_source
from qcn_jax.envs.testpaths import is_test_path

SOURCE_FOLDERS = ("", "src/", "lib/", "python/")  # in which top-level modules stand
_IMPORT = re.compile(r"(?m)^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import\b|import[ \t]+([\w., \t]+))")


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a task's patch may not touch: everything outside of `package` (prefixes), and `own`.

    `roots` are the folders, "" or with "/" behind them, in which top-level modules are looked for.
    """

    package: tuple[str, ...]
    own: frozenset[str] = frozenset()
    roots: tuple[str, ...] = SOURCE_FOLDERS

    def holds(self, path: str) -> bool:
        """Whether a file belongs to the suite."""
        return path in self.own or not path.startswith(self.package)

    def is_flat(self, folder: str) -> bool:
        """Whether modules of the package stand in `folder` itself, one of `roots`, where new ones may join them."""
        root = f"{folder}/" if folder else ""
        return root in self.roots and any(top.endswith(".py") and posixpath.dirname(top) == folder
                                          for top in self.package)


def find(fix: Iterable[str], files: Mapping[str, str], opened: Collection[str] = (),
         python_path: Iterable[str] = ()) -> Suite:
    """The suite of a repository.

    Args:
      fix: paths that the task's fix and defect touch.
      files: the pristine files.
      opened: files that tests were seen to open.
      python_path: folders on the module search path, besides SOURCE_FOLDERS.
    """
    sources = [path for path in fix if not is_test_path(path)]
    more = {f"{folder}/" for folder in map(posixpath.normpath, python_path) if not folder.startswith((".", "/"))}
    roots = tuple(dict.fromkeys((*SOURCE_FOLDERS, *sorted(more))))
    tops = _tops(tuple(files), roots)
    package = {top for path in sources for top in (next((t for t in tops if path.startswith(t)), path),)}
    front = set(package)
    while front:
        named = {name for path, text in files.items() if path.endswith(".py") and path.startswith(tuple(front))
                 and not is_test_path(path) for name in imported(text)}
        found = {top for top in tops if posixpath.basename(top.rstrip("/")).removesuffix(".py") in named}
        front = {top for top in found if not is_test_path(top.rstrip("/") + "/x")} - package
        package |= front
    own = {path for path in opened if path not in sources}
    for path, text in files.items():
        if path.endswith(".py") and "pytest_plugins" in text:
            own |= {place for name in _plugins(text) for place in _places(name, files)}
    package |= _data(package, files) - own
    return Suite(tuple(sorted(package)), frozenset(own - set(sources)), roots)


def _data(package: Collection[str], files: Mapping[str, str]) -> set[str]:
    """Data outside of the package's folders that its sources name."""
    sources = "\n".join(text for path, text in files.items() if path.endswith(".py") and path.startswith(tuple(package))
                        and not is_test_path(path))
    words = set(re.findall(r"[\w.-]+", sources))
    return {path for path in files if not path.endswith(".py") and posixpath.splitext(path)[1]
            and posixpath.basename(path) in words}


@functools.lru_cache(maxsize=64)
def _tops(paths: tuple[str, ...], roots: tuple[str, ...]) -> tuple[str, ...]:
    """Top-level modules ("a.py") and folders with code ("a/", "src/a/")."""
    found = set()
    for path in paths:
        for folder in sorted(roots, key=len, reverse=True):
            if path.startswith(folder):
                rest = path[len(folder):]
                if "/" in rest:
                    found.add(f"{folder}{rest.split('/')[0]}/")
                elif rest.endswith(".py"):
                    found.add(path)
                break
    return tuple(sorted(found, key=len, reverse=True))


def imported(text: str) -> set[str]:
    """Top-level names that a module imports."""
    names = set()
    for start, several in _IMPORT.findall(text):
        names |= {word.strip().split(".")[0].split(" ")[0] for word in (start, *several.split(",")) if word.strip()}
    return names


def _plugins(text: str) -> list[str]:
    """Modules that `pytest_plugins` of a file names."""
    names: list[str] = []
    try:
        for node in ast.walk(python_source.parse(text)):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == "pytest_plugins" for target in targets):
                    names += [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)
                              and isinstance(part.value, str)]
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [word for name in names for word in re.split(r"[\s,]+", name) if word]


def _places(module: str, files: Mapping[str, str]) -> list[str]:
    stem = module.replace(".", "/")
    return [f"{folder}{stem}{ending}" for folder in SOURCE_FOLDERS for ending in (".py", "/__init__.py")
            if f"{folder}{stem}{ending}" in files]


def helpers(test_files: Collection[str], files: Mapping[str, str], suite: Suite) -> list[str]:
    """Modules of the suite that its test files import, directly or through each other."""
    found: set[str] = set()
    front = set(test_files)
    while front:
        named = set()
        for path in front:
            folder = posixpath.dirname(path)
            for module in _modules(files.get(path, ""), folder):
                named |= {place for base in ("", f"{folder}/" if folder else "")
                          for place in _places(base.replace("/", ".") + module, files)}
        front = {path for path in named - found - set(test_files) if suite.holds(path) or is_test_path(path)}
        found |= front
    return sorted(found)


def _modules(text: str, folder: str) -> set[str]:
    """Modules, dotted, that a file in `folder` imports; names taken from a package count as modules, too."""
    names: set[str] = set()
    try:
        tree = python_source.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = folder.split("/") if folder else []
            above = parts[:len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" if base else alias.name for alias in node.names)} - {""}
    return names
