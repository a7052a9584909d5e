"""Edit documents: a function with injected defects, and the minimal edits that fix it.

Mid-training data of the report's "edits as search-and-replace" kind, for a model far too small to learn copying
whole lines: the edit names a line and the smallest changed span. A document reads

    <|file_sep|>PATH\n<|1|>def f(x):\n<|2|>    return not x\n<|fim_middle|><|2|>not x<|fim_suffix|>x<|endoftext|>

with one `<|n|>old<|fim_suffix|>new` group per defect, in line order. The defects come from the same injectors as the
tasks (envs.synthesis.inject), applied to code that is not held out; nothing here is verified by execution, which is
why it is mid-training data and not SFT data.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import pathlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from qcn_jax import files
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.envs.synthesis.inject import Injection, candidates
from qcn_jax.envs.synthesis.pages import inject as page_defects
from qcn_jax.envs.testpaths import is_test_path
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents import Request
from qcn_jax.recipes.nano.spans import (
    MAX_LINE_TOKENS,
    PAGE_ENDINGS,
    SCRIPT_ENDINGS,
    dedent,
    line_token,
    minimal_edit,
)

_DRAWS = 1000  # of functions, until one fits into a row
CODE_WEIGHT = 0.1  # of next-token loss on code lines, which are many; the edit's few tokens have weight 1


@dataclasses.dataclass(frozen=True)
class Defect:
    """One possible defect: line `line` (0-based in the function) reads `after` instead of the true line."""

    kind: str
    line: int
    after: str


@dataclasses.dataclass(frozen=True)
class FunctionDefects:
    """A function's true lines (dedented) and every single-line defect that the injectors found for it."""

    path: str
    lines: tuple[str, ...]
    defects: tuple[Defect, ...]


def function_table(
    modules: Iterable[tuple[str, str]], *, max_lines: int, kinds: Sequence[str] = (), seed: int = 0,
    cache: pathlib.Path | None = None, processes: int = 1,
) -> list[FunctionDefects]:
    """Collects the functions of `modules` that have between 2 and `max_lines` lines and at least one defect.

    Args:
      modules: pairs of path and source text; modules that do not parse or are not ASCII give nothing.
      max_lines: longest function kept, at most MAX_LINE_TOKENS.
      kinds: injection kinds; all by default.
      seed: of the injectors' own choices.
      cache: JSON file that keeps the result for the same modules and arguments.
      processes: how many processes share the work; the result does not depend on it.
    """
    modules = sorted((path, source) for path, source in modules if source.isascii())
    digest = hashlib.sha256(repr((modules, max_lines, sorted(kinds), seed)).encode()).hexdigest()
    if cache is not None and cache.exists():
        stored = files.read_json(cache)
        if stored["digest"] == digest:
            return [
                FunctionDefects(path, tuple(lines), tuple(Defect(*defect) for defect in defects))
                for path, lines, defects in stored["functions"]
            ]
    work = functools.partial(_functions, max_lines=min(max_lines, MAX_LINE_TOKENS), kinds=tuple(kinds), seed=seed)
    if processes > 1:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            found = list(pool.map(work, modules, chunksize=8))
    else:
        found = [work(module) for module in modules]
    table = list(itertools.chain.from_iterable(found))
    if cache is not None:
        rows = [[f.path, f.lines, [dataclasses.astuple(d) for d in f.defects]] for f in table]
        files.write_json(cache, {"digest": digest, "functions": rows})
    return table


def _functions(module: tuple[str, str], max_lines: int, kinds: tuple[str, ...], seed: int) -> list[FunctionDefects]:
    path, source = module
    rng = random.Random(f"{seed} {path}")
    page, whole = path.endswith(PAGE_ENDINGS), path.endswith(PAGE_ENDINGS) and not path.endswith(SCRIPT_ENDINGS)
    found = page_defects.candidates(source, path, kinds, rng) if page else \
        candidates(source, path, kinds or None, max_lines, rng)
    groups: dict[tuple[int, int], list[Injection]] = {}
    for candidate in found:
        if candidate.single_line:
            span = (1, len(source.rstrip("\n").split("\n"))) if whole else (
                candidate.function_start_line, candidate.function_end_line)
            groups.setdefault(span, []).append(candidate)
    result = []
    rows = source.split("\n")
    for (start, end), group in groups.items():
        if not 2 <= end - start + 1 <= max_lines:
            continue
        before = rows[start - 1 : end]
        lines = dedent(before)
        shift = len(before[0]) - len(lines[0])
        defects = []
        for candidate in group:
            row = candidate.line - 1
            column = candidate.start - (candidate.before_source.rfind("\n", 0, candidate.start) + 1)
            after = rows[row][:column] + candidate.new + rows[row][column + len(candidate.old) :]
            if column >= shift:
                defects.append(Defect(candidate.kind, row - start + 1, after[shift:]))
        if defects:
            result.append(FunctionDefects(path, tuple(lines), tuple(dict.fromkeys(defects))))
    return result


def documents(request: Request) -> "EditDocuments":
    """The form `nano_edits` of a source: its Python files and pages without tests, with the kinds of `config.tasks`."""
    return EditDocuments(table_of(request), request.tokenizer, seed=request.context.config.seed,
                         max_tokens=request.length)


def table_of(request: Request) -> list[FunctionDefects]:
    """Functions of a source's Python files and scripts, pages and style sheets, with defects of `config.tasks`' kinds.

    Tests are left out.

    Raises:
      UserError: there is none.
    """
    config = request.context.config
    code = [(text.path, text.text) for text in request.texts if not is_test_path(text.path)]
    table = function_table(code, max_lines=config.tasks.max_function_lines, kinds=config.tasks.kinds, seed=config.seed,
                           cache=request.context.workdir / "data" / f"{request.name}.json", processes=config.workers)
    request.context.log(f"{request.name}: {len(table)} functions, {sum(len(f.defects) for f in table)} defects")
    if not table:
        raise UserError(f"--config.midtrain.sources.{request.name}: no function of its texts has a defect of the kinds "
                        "in --config.tasks.kinds")
    return table


class EditDocuments:
    """Random access to edit documents: index i always gives the same document for the same table and seed.

    Kinds are drawn with probability proportional to the square root of their number of defects, so that rare kinds
    are seen and common ones do not drown them; `multiple` is the share of documents with two or three defects.
    """

    def __init__(
        self, table: Sequence[FunctionDefects], tokenizer: Tokenizer, *, seed: int, max_tokens: int,
        kinds: Sequence[str] = (), multiple: float = 0.5,
    ):
        self._table, self._tokenizer, self._seed = table, tokenizer, seed
        self._max_tokens, self._multiple = max_tokens, multiple
        by_kind: dict[str, list[tuple[int, int]]] = {}
        for i, function in enumerate(table):
            for j, defect in enumerate(function.defects):
                if not kinds or defect.kind in kinds:
                    by_kind.setdefault(defect.kind, []).append((i, j))
        self._kinds = sorted(by_kind)
        self._by_kind = [by_kind[kind] for kind in self._kinds]
        sizes = np.sqrt([len(group) for group in self._by_kind])
        self._probability = sizes / sizes.sum()
        self._line_cache: dict[str, list[int]] = {}
        self._line_ids = [tokenizer.id(line_token(n)) for n in range(1, MAX_LINE_TOKENS + 1)]

    def counts(self) -> Counter[str]:
        """Number of distinct defects per kind."""
        return Counter({kind: len(group) for kind, group in zip(self._kinds, self._by_kind, strict=True)})

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Document `index`: `tokens` int32 [T] and `weights` float32 [T], of predicting token t + 1 at t."""
        rng = np.random.default_rng([self._seed, index])
        for _ in range(_DRAWS):
            group = self._by_kind[rng.choice(len(self._kinds), p=self._probability)]
            i, j = group[rng.integers(len(group))]
            function = self._table[i]
            chosen = {function.defects[j].line: function.defects[j]}
            if rng.random() < self._multiple:
                for k in rng.permutation(len(function.defects))[: rng.integers(1, 3)]:
                    chosen.setdefault(function.defects[k].line, function.defects[k])
            document = self._document(function, [chosen[line] for line in sorted(chosen)], rng)
            if document is not None:
                return document
        raise UserError(f"edit documents: none of {_DRAWS} functions with its edits has at most {self._max_tokens} "
                        "tokens, --config.midtrain.train.sequence_length; give --config.tasks.max_function_lines less")

    def prompt(self, path: str, lines: Sequence[str]) -> list[int]:
        """Ids of a document up to where the edits begin."""
        tokens = [self._tokenizer.id("<|file_sep|>"), *self._line(path + "\n")]
        for number, line in enumerate(lines):
            tokens += [self._line_ids[number], *self._line(line + "\n")]
        return [*tokens, self._tokenizer.id("<|fim_middle|>")]

    def read(self, tokens: Sequence[int]) -> list[tuple[int, str, str]]:
        """(line from 1, old, new) of every complete edit in what a model wrote after `prompt`."""
        numbers = {id_: number for number, id_ in enumerate(self._line_ids, 1)}
        suffix, end = self._tokenizer.id("<|fim_suffix|>"), self._tokenizer.id("<|endoftext|>")
        found: list[tuple[int, list[int], list[int] | None]] = []
        for token in tokens:
            if token == end:
                break
            if token in numbers:
                found.append((numbers[token], [], None))
            elif not found:
                break
            elif token == suffix:
                found[-1] = (*found[-1][:2], [])
            else:
                (found[-1][1] if found[-1][2] is None else found[-1][2]).append(token)
        decode = self._tokenizer.decode
        return [(number, decode(old), decode(new)) for number, old, new in found if old and new]

    def _line(self, text: str) -> list[int]:
        if text not in self._line_cache:
            self._line_cache[text] = self._tokenizer.encode_ordinary(text)
        return self._line_cache[text]

    def _document(
        self, function: FunctionDefects, defects: list[Defect], rng: np.random.Generator
    ) -> dict[str, np.ndarray] | None:
        """The document of a function with defects; None where it is longer than a row, or a defect has no edit."""
        special = self._tokenizer.id
        lines = list(function.lines)
        for defect in defects:
            lines[defect.line] = defect.after
        tokens = self.prompt(function.path, lines)
        code = len(tokens) - 1
        for defect in defects:
            span = minimal_edit(defect.after, function.lines[defect.line])
            if span is None:
                return None
            old, new = map(self._line, span)
            tokens += [self._line_ids[defect.line], *old, special("<|fim_suffix|>"), *new]
        tokens.append(special("<|endoftext|>"))
        if len(tokens) > self._max_tokens:
            return None
        weights = np.ones(len(tokens), np.float32)
        weights[:code] = CODE_WEIGHT
        return {"tokens": np.asarray(tokens, np.int32), "weights": weights}
