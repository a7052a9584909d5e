"""Model-driven defects: a model changes a function, or writes its body anew from name, signature and docstring.

What comes back counts only where it parses, keeps the signature, and changes the function's code; the defect is then
cut down to the lines that differ. Whether tests notice is decided by execution, as for every other candidate.
"""

import ast
import random
import textwrap
from collections.abc import Collection, Sequence

from qcn_jax import syntax
from qcn_jax.chat import endpoint
from qcn_jax.envs import python_source
from qcn_jax.envs.synthesis.inject import Function, Injection, functions, within
from qcn_jax.envs.testpaths import is_test_path

MODIFY, REWRITE = "model_modify", "model_rewrite"
KINDS = (MODIFY, REWRITE)
SHORTEST, LONGEST = 3, 80  # lines of a function that is given to the model

_SYSTEM = "You are an expert Python programmer. Answer with one fenced code block that holds one complete function."
_MODIFY = """Introduce one subtle but realistic bug into this function, of the kind that slips through review: a wrong
condition, a missed edge case, a wrong variable or order of operations. It must still run, and typical calls should give
wrong results. Keep the name, the signature and the docstring. Add no comment about the bug.

```python
{source}```"""
_REWRITE = """Implement this function. Keep the name, the signature and the docstring; use only what the module offers.

Module `{path}` begins with:
```python
{head}```

```python
{source}```"""


def candidates(
    source: str, path: str, model: endpoint.Endpoint, kinds: Sequence[str] = KINDS, seed: int = 0,
    limit: int | None = None, among: Collection[str] | None = None,
) -> list[Injection]:
    """Defects that the model makes of a module's functions, in source order.

    Args:
      source: text of the module.
      path: its path relative to the root; files of tests give no candidates.
      model: is asked once for each function and kind.
      kinds: model_modify, model_rewrite.
      seed: chooses functions and goes with every request; with cached answers the result repeats.
      limit: functions at most.
      among: qualified names of the functions that may be changed (default: all).

    Raises:
      UserError: the endpoint cannot be used.
    """
    if is_test_path(path):
        return []
    if (plain := python_source.plain(source)) != source:
        return within(source, candidates(plain, path, model, kinds, seed, limit, among))
    try:
        tree = syntax.parse(source)
    except (SyntaxError, ValueError):
        return []
    rows = python_source.lines(source)
    found = [f for f in functions(tree) if SHORTEST <= f.end_line - f.start_line + 1 <= LONGEST
             and (among is None or f.qualname in among)]
    if limit is not None and len(found) > limit:
        chosen = random.Random(f"{seed}/{path}").sample(range(len(found)), limit)
        found = [found[number] for number in sorted(chosen)]
    made = []
    for function in found:
        for kind in kinds:
            text = "".join(rows[function.start_line - 1 : function.end_line])
            answer = model.ask(_messages(kind, text, path, tree, source), seed)
            injection = _injection(kind, path, function, source, rows, text, endpoint.code_block(answer))
            if injection is not None:
                made.append(injection)
    return made


def _messages(kind: str, text: str, path: str, tree: ast.Module, source: str) -> list[dict[str, str]]:
    plain = textwrap.dedent(text)
    if kind == MODIFY:
        prompt = _MODIFY.format(source=plain)
    else:
        imports = [ast.get_source_segment(source, node) or "" for node in tree.body
                   if isinstance(node, ast.Import | ast.ImportFrom)]
        prompt = _REWRITE.format(path=path, head="\n".join(imports) + "\n", source=_stub(plain))
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]


def _stub(text: str) -> str:
    """The function without its body, docstring kept."""
    node = syntax.parse(text).body[0]
    keep = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
    lines = python_source.lines(text)[:keep]
    return "".join(lines) + " " * node.body[0].col_offset + "...\n"


def _injection(
    kind: str, path: str, function: Function, source: str, rows: Sequence[str], text: str, answer: str
) -> Injection | None:
    """The defect that an answer makes, cut down to the lines that differ; None where the answer cannot be used."""
    indent = text[: len(text) - len(text.lstrip())]
    plain = textwrap.dedent(answer).strip("\n") + "\n"
    try:
        old, new = syntax.parse(textwrap.dedent(text)).body, syntax.parse(plain).body
    except (SyntaxError, ValueError):
        return None
    if len(new) != 1 or type(new[0]) is not type(old[0]) or not _same_signature(old[0], new[0]):
        return None
    if ast.dump(old[0]) == ast.dump(new[0]):
        return None
    written = python_source.lines(plain)[new[0].lineno - 1 :]  # decorators stay as they are
    lines = [indent + line if line.strip() else line for line in written]
    before = list(rows[function.start_line - 1 : function.end_line])
    head = next((n for n, (a, b) in enumerate(zip(before, lines)) if a != b), min(len(before), len(lines)))
    tail = 0
    while tail < min(len(before), len(lines)) - head and before[-1 - tail] == lines[-1 - tail]:
        tail += 1
    start = sum(map(len, rows[: function.start_line - 1 + head]))
    end = start + sum(map(len, before[head : len(before) - tail]))
    result = Injection(kind, path, function.qualname, function.start_line, function.end_line, source, start, end,
                       "".join(lines[head : len(lines) - tail]))  # fmt: skip
    try:
        syntax.parse(result.after_source)
    except SyntaxError:
        return None
    return result


def _same_signature(old: ast.AST, new: ast.AST) -> bool:
    return (isinstance(old, ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(new, type(old))
            and old.name == new.name and ast.dump(old.args) == ast.dump(new.args))
