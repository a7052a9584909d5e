"""Documents of whole repositories: natural code, or any other text, with what stands around it.

Files of one repository make one document, imported files before their importers (the report's repository-level
data), those whose imports say nothing in the order of their paths, in Qwen's form:

  <|repo_name|>NAME\n<|file_sep|>PATH\nSOURCE<|file_sep|>PATH\nSOURCE ... <|endoftext|>

Spans that the corpus repeats are masked from the loss after their first occurrence.
"""

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from qcn_jax import syntax
from qcn_jax.chat.tokenizer import END_OF_TEXT, Tokenizer
from qcn_jax.envs.sandbox.repository import RepositorySpec, unpack
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents import Request
from qcn_jax.pipeline.data.documents.repetition import runs
from qcn_jax.pipeline.data.loader import TokenStore

Module = tuple[str, str]  # path in its repository, source text

REPO_NAME, FILE_SEP = "<|repo_name|>", "<|file_sep|>"

_VENDORED = frozenset({
    "_vendor", "vendor", "vendored", "_vendored", "third_party", "thirdparty", "extern", "externals"})
MAX_FILE_BYTES = 200_000  # larger ones are generated tables


def repository_modules(spec: RepositorySpec, endings: tuple[str, ...] = (".py",)) -> list[Module]:
    """(path, source) of a repository's Python files, or of those with other endings, sorted by path.

    Vendored code is left out.
    """
    found = []
    for name, member in unpack(spec).items():
        kind, _, path = name.partition("/")
        parts = path.split("/")
        if (kind == "repo" and path.endswith(endings) and not _VENDORED & set(parts)
                and len(member.data) <= MAX_FILE_BYTES):
            found.append((path, member.data))
    return decoded(found)


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


def documents(request: Request) -> TokenStore:
    """The form `repository` of a source: documents tokenised once, as many as the phase will read."""
    if TokenStore.exists(request.folder):
        return TokenStore(request.folder)
    made = RepositoryDocuments(request.tokenizer, request.length)

    def enough() -> Iterator[dict[str, np.ndarray]]:
        for number, (name, texts) in enumerate(request.texts.repositories()):
            if number and made.tokens >= request.tokens:
                break
            yield from made.documents(name, [(text.path, text.text) for text in texts])

    store = TokenStore.write(request.folder, enough())
    request.context.log(f"{request.name}: {len(store)} documents, {store.tokens:,} tokens, "
                        f"{100 * made.masked / max(1, made.tokens):.1f} % masked as repeated")
    return store


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
        for part, repeated in runs(text, self._seen):
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


def decoded(found: Iterable[tuple[str, bytes]]) -> list[Module]:
    """Reads files that are UTF-8, sorted by path, line ends made \\n."""
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
    if not path.endswith(".py"):
        return ()
    try:
        tree = syntax.parse(text)
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
