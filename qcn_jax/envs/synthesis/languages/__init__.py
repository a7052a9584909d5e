"""What synthesis must know of a language: its files, its tests, its defects, and how code is made to stop."""

import dataclasses
import re
from collections.abc import Callable, Mapping

from qcn_jax.envs.synthesis import inject
from qcn_jax.envs.synthesis.inject import treesitter
from qcn_jax.envs.testpaths import is_test_path

_INSTALLED = frozenset({"node_modules", "bower_components", "vendor", "testutil", "testutils", "test-helpers"})
_STEERING = re.compile(r"(?i).*[.-](?:config|conf|setup|rc)\.[cm]?[jt]s|.*rc\.[cm]?js|"
                       r"(?:gruntfile|gulpfile|jakefile|conftest|setup|noxfile)\.\w+")


@dataclasses.dataclass(frozen=True)
class Language:
    """One language.

    `candidates` has the interface of inject.candidates; `stopped` is the text with a statement added that raises as the
    file is loaded, so that everything is still there to be read and nothing can be used; `kinds` are its defects.
    """

    name: str
    endings: tuple[str, ...]
    candidates: Callable[..., list[inject.Injection]]
    emptied: Callable[[str], str]
    stopped: Callable[[str], str]
    kinds: tuple[str, ...]

    def is_source(self, path: str) -> bool:
        """Whether a file is one whose defects count."""
        return path.endswith(self.endings) and not is_test_path(path) and not path.endswith((".min.js", ".config.js"))

    def may_change(self, path: str) -> bool:
        """Whether a patch may change a file: a source, but no configuration of runners, nor what is installed."""
        parts = path.split("/")
        return (self.is_source(path) and not _STEERING.fullmatch(parts[-1]) and not _INSTALLED & set(parts)
                and not any(part.startswith(".") for part in parts))


def go_module(files: Mapping[str, str]) -> str:
    """The path of the Go module that these files are; "" where they are none."""
    found = re.search(r"(?m)^module (\S+)", files.get("go.mod", ""))
    return found[1] if found else ""


def go_package(text: str) -> str:
    """The name of the package that a Go file is of; "" where it names none."""
    found = re.search(r"(?m)^package (\w+)", text)
    return found[1] if found else ""


def _go_emptied(text: str) -> str:
    package = go_package(text)
    return f"package {package}\n" if package else ""


LANGUAGES: dict[str, Language] = {
    language.name: language for language in (
        Language("python", (".py",), inject.candidates, lambda text: "",
                 lambda text: f"{text}\nraise SystemError('stopped')\n", tuple(inject.KINDS)),
        Language("javascript", (".js", ".mjs", ".cjs"), treesitter.candidates, lambda text: "",
                 lambda text: f"{text}\n;throw new Error('stopped');\n", tuple(treesitter.KINDS)),
        Language("go", (".go",), treesitter.candidates, _go_emptied,
                 lambda text: f'{text}\nfunc init() {{ panic("stopped") }}\n', tuple(treesitter.KINDS)),
    )
}  # fmt: skip
