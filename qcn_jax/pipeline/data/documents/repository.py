"""Natural code for mid-training: the Python standard library of this machine and the training repositories.

Files of one repository make one document, imported files before their importers (the report's repository-level
data), in Qwen's form:

  <|repo_name|>NAME\n<|file_sep|>PATH\nSOURCE<|file_sep|>PATH\nSOURCE ... <|endoftext|>

Nothing is read from site-packages, so held-out packages that happen to be installed never enter; what a training
repository vendors or copies of a held-out one is left out by content. Spans that the corpus repeats are masked from
the loss after their first occurrence.
"""

import ast
import functools
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from qcn_jax.chat.tokenizer import END_OF_TEXT, Tokenizer
from qcn_jax.envs.sandbox.repository import RepositorySpec, unpack
from qcn_jax.errors import UserError

Module = tuple[str, str]  # path in its repository, source text

REPO_NAME, FILE_SEP = "<|repo_name|>", "<|file_sep|>"

# Installed packages, tests (some hold deliberately broken code), bundled wheels, tables and demonstrations.
_STDLIB_DROPPED = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip", "encodings", "pydoc_data",
    "turtledemo", "lib2to3", "__pycache__", "__phello__"})
_VENDORED = frozenset({
    "_vendor", "vendor", "vendored", "_vendored", "third_party", "thirdparty", "extern", "externals"})
_MAX_FILE_BYTES = 200_000  # larger ones are generated tables
_SIGNIFICANT = 24  # characters from which a line says where it comes from
_COPY_SHARE = 0.3  # of a file's significant lines that a held-out repository also has
_REPEAT_LINES = 6  # a block of so many lines that was seen before is masked


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
            if name.endswith(".py") and not name.startswith("test_") and path.stat().st_size <= _MAX_FILE_BYTES:
                found.append((path.relative_to(root).as_posix(), path.read_bytes()))
    if not found:
        raise UserError(f"{root}: holds no Python files; the standard library of this Python cannot be read")
    return _decoded(found)


def repository_modules(spec: RepositorySpec) -> list[Module]:
    """(path, source) of a repository's Python files, vendored code left out, sorted by path."""
    found = []
    for name, member in unpack(spec).items():
        kind, _, path = name.partition("/")
        parts = path.split("/")
        if (kind == "repo" and path.endswith(".py") and not _VENDORED & set(parts)
                and len(member.data) <= _MAX_FILE_BYTES):
            found.append((path, member.data))
    return _decoded(found)


def without_copies(modules: Iterable[Module], heldout: Iterable[Module]) -> list[Module]:
    """`modules` without files that share more than a small part of their telling lines with `heldout` files."""
    known = {line for _, text in heldout for line in _significant(text)}
    kept = []
    for path, text in modules:
        lines = _significant(text)
        if sum(line in known for line in lines) <= _COPY_SHARE * len(lines):
            kept.append((path, text))
    return kept


def stdlib_repositories(modules: Sequence[Module]) -> dict[str, list[Module]]:
    """Groups the standard library as repositories: each package one, and the single modules one together."""
    groups: dict[str, list[Module]] = {}
    for path, text in modules:
        package = path.split("/")[0] if "/" in path else "modules"
        groups.setdefault(f"cpython/{package}", []).append((path, text))
    return groups


def dependency_order(modules: Sequence[Module]) -> list[Module]:
    """Imported files before those that import them; path order where imports do not say, or say a circle."""
    texts = dict(modules)
    owners = {_dotted(path): path for path in texts}
    ordered: dict[str, None] = {}
    visiting: set[str] = set()

    def visit(path: str) -> None:
        # Iterative, because import chains can be longer than Python's stack is deep.
        stack = [(path, iter(sorted(_imports(path, texts[path], owners))))]
        visiting.add(path)
        while stack:
            current, rest = stack[-1]
            following = next((p for p in rest if p not in visiting and p not in ordered), None)
            if following is None:
                stack.pop()
                ordered[current] = None
            else:
                visiting.add(following)
                stack.append((following, iter(sorted(_imports(following, texts[following], owners)))))

    for path in sorted(texts):
        if path not in visiting:
            visit(path)
    return [(path, texts[path]) for path in ordered]


class RepositoryDocuments:
    """Turns repositories into token documents, masking what the corpus repeated.

    One instance is one corpus: it remembers the blocks of lines it has seen.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """`max_tokens` is the longest document; a repository that is longer is divided between files, and a
        file that is longer is divided too, its parts under the same heading."""
        if max_tokens < 64:
            raise UserError(f"sequence_length: repository documents need at least 64 tokens, got {max_tokens}")
        self._tokenizer, self._max = tokenizer, max_tokens
        self._seen: set[bytes] = set()
        self.masked = self.tokens = 0

    def documents(self, name: str, modules: Sequence[Module]) -> Iterator[dict[str, np.ndarray]]:
        """Documents of one repository: tokens int32 [n], weights float32 [n] of predicting the next token."""
        special = self._tokenizer.id
        heading = [special(REPO_NAME), *self._tokenizer.encode_ordinary(name + "\n")]
        end = special(END_OF_TEXT)
        tokens, told = list(heading), [1.0] * len(heading)
        for path, text in dependency_order(modules):
            opening = [special(FILE_SEP), *self._tokenizer.encode_ordinary(path + "\n")]
            ids, weights = self._encode(text)
            room = self._max - len(heading) - len(opening) - 1
            for start in range(0, max(len(ids), 1), room):
                part = ids[start:start + room]
                if len(tokens) + len(opening) + len(part) + 1 > self._max:
                    yield self._document(tokens, told, None)
                    tokens, told = list(heading), [0.0] * len(heading)
                tokens += opening + part
                told += [1.0 if start == 0 else 0.0] * len(opening) + weights[start:start + room]
        yield self._document(tokens, told, end)

    def _encode(self, text: str) -> tuple[list[int], list[float]]:
        """Ids of a source text and, per id, whether it is new (1) or part of a repeated block (0)."""
        ids: list[int] = []
        weights: list[float] = []
        for part, repeated in _runs(text, self._seen):
            encoded = self._tokenizer.encode_ordinary(part)
            ids += encoded
            weights += [0.0 if repeated else 1.0] * len(encoded)
        self.masked += len(weights) - int(sum(weights))
        self.tokens += len(ids)
        return ids, weights

    def _document(self, tokens: list[int], told: list[float], end: int | None) -> dict[str, np.ndarray]:
        if end is not None:
            tokens, told = [*tokens, end], [*told, 1.0]
        # `told` says whether a token is worth predicting; weights stand at the position that predicts it.
        return {"tokens": np.asarray(tokens, np.int32), "weights": np.asarray([*told[1:], 0.0], np.float32)}


def _runs(text: str, seen: set[bytes]) -> Iterator[tuple[str, bool]]:
    """Cuts `text` at line starts into maximal runs of new lines and of lines in blocks that `seen` holds."""
    lines = text.splitlines(keepends=True)
    telling = [i for i, line in enumerate(lines) if line.strip()]
    repeated = [False] * len(lines)
    fresh = []
    for first in range(len(telling) - _REPEAT_LINES + 1):
        block = telling[first:first + _REPEAT_LINES]
        key = _digest("\n".join(lines[i].strip() for i in block)) if _tells(lines, block) else None
        if key in seen:
            repeated[block[0]:block[-1] + 1] = [True] * (block[-1] - block[0] + 1)
        elif key is not None:
            fresh.append(key)
    seen.update(fresh)
    start = 0
    for i in range(1, len(lines) + 1):
        if i == len(lines) or repeated[i] != repeated[start]:
            yield "".join(lines[start:i]), repeated[start]
            start = i


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _tells(lines: Sequence[str], block: Sequence[int]) -> bool:
    """Blocks of closing brackets and the like recur without being copies."""
    return sum(len(lines[i].strip()) >= _SIGNIFICANT // 2 for i in block) > _REPEAT_LINES // 2


def _significant(text: str) -> list[str]:
    return [line for raw in text.splitlines() if len(line := raw.strip()) >= _SIGNIFICANT]


def _decoded(found: Iterable[tuple[str, bytes]]) -> list[Module]:
    """Files that are UTF-8, sorted by path, line ends made \\n."""
    modules = []
    for path, data in sorted(found):
        try:
            modules.append((path, data.decode("utf-8").replace("\r\n", "\n")))
        except UnicodeDecodeError:
            continue
    return [(path, text) for path, text in modules if text.strip()]


def _dotted(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.lru_cache(maxsize=4096)
def _imported_names(path: str, text: str) -> tuple[tuple[int, str], ...]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found.append((node.level, base))
            found += [(node.level, f"{base}.{alias.name}" if base else alias.name) for alias in node.names]
    return tuple(found)


def _imports(path: str, text: str, owners: Mapping[str, str]) -> set[str]:
    """Paths of the repository's files that `path` imports, also where the sources lie in src/ or the like."""
    package = path.split("/")[:-1]
    result = set()
    for level, name in _imported_names(path, text):
        if level:
            base = package[:len(package) - level + 1]
            candidates = [".".join([*base, name]) if name else ".".join(base)]
        else:
            candidates = [name, *(f"{prefix}.{name}" for prefix in ("src", "lib"))]
        result.update(owners[c] for c in candidates if c in owners)
    return result - {path}
