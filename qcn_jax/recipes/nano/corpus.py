"""The demonstration's texts: the training repositories and the standard library of this machine's Python.

Nothing is read from site-packages, so held-out packages that happen to be installed never enter; what a training
repository vendors or copies of a held-out one, mid-training leaves out by content.
"""

import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qcn_jax.config import RunConfig, TextSource
from qcn_jax.envs.synthesis.pages import factory
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents.repository import MAX_FILE_BYTES, Module, decoded, repository_modules
from qcn_jax.pipeline.data.readers import TextReader
from qcn_jax.pipeline.data.texts import Findings, Text
from qcn_jax.recipes.nano.spans import PAGE_ENDINGS

if TYPE_CHECKING:
    from qcn_jax.pipeline.context import StageContext

# Installed packages, tests (some hold deliberately broken code), bundled wheels, tables and demonstrations.
_STDLIB_DROPPED = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip", "encodings", "pydoc_data",
    "turtledemo", "lib2to3", "__pycache__", "__phello__"})
_LANGUAGES = {".py": "Python", ".js": "JavaScript", ".mjs": "JavaScript", ".jsx": "JavaScript", ".css": "CSS",
              ".html": "HTML"}


class Corpus(TextReader):
    """Files by repository, Python or pages: the training repositories, then a seeded choice of the standard library.

    `megabytes` counts both; the training repositories are read whole.
    """

    def check(self, config: RunConfig, source: TextSource, field: str) -> None:
        """See TextReader."""
        for name in ("path", "options"):
            if getattr(source, name):
                raise UserError(f"{field}.{name}: {getattr(source, name)!r}; kind nano reads the run's repositories "
                                "and has no use for it")

    def read(self, context: "StageContext", source: TextSource, findings: Findings) -> Iterator[Text]:
        """See TextReader."""
        left = source.megabytes * 1e6 if source.megabytes else float("inf")
        for name, modules in self._repositories(context, left):
            for path, text in modules:
                findings.read += 1
                yield Text(text, path, name, _LANGUAGES[pathlib.PurePath(path).suffix], place=f"{name}/{path}")

    def _repositories(self, context: "StageContext", left: float) -> Iterator[tuple[str, list[Module]]]:
        training = set(context.result("tasks")["repos_train"])
        for name, spec in sorted(context.repositories().items()):
            if name in training:
                modules = repository_modules(spec, PAGE_ENDINGS if factory.is_pages(spec) else (".py",))
                left -= sum(len(text) for _, text in modules)
                yield name, modules
        packages = sorted(stdlib_repositories(stdlib_modules()).items())
        for index in np.random.default_rng(context.config.seed).permutation(len(packages)):
            name, group = packages[index]
            chosen = []
            for path, text in group:
                if left > 0:
                    chosen.append((path, text))
                    left -= len(text)
            yield name, chosen


CORPUS = Corpus()


def stdlib_modules() -> list[Module]:
    """(path, source) of the standard library's Python files, sorted by path.

    Raises:
      UserError: this Python has no readable standard library (zipped or stripped).
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_DROPPED and not name.startswith("config-")]
        for name in names:
            path = pathlib.Path(folder, name)
            if name.endswith(".py") and not name.startswith("test_") and path.stat().st_size <= MAX_FILE_BYTES:
                found.append((path.relative_to(root).as_posix(), path.read_bytes()))
    if not found:
        raise UserError(f"{root}: holds no Python files; the standard library of this Python cannot be read")
    return decoded(found)


def stdlib_repositories(modules: Sequence[Module]) -> dict[str, list[Module]]:
    """Groups the standard library as repositories: each package one, and the single modules one together."""
    groups: dict[str, list[Module]] = {}
    for path, text in modules:
        package = path.split("/")[0] if "/" in path else "modules"
        groups.setdefault(f"cpython/{package}", []).append((path, text))
    return groups
