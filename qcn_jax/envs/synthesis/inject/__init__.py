"""Rule-based bug injection: one defect in one function, everything else of the text untouched.

Every kind is a small function over libcst nodes (expressions.py, statements.py) that yields edits of text
spans, so formatting and comments outside the changed span stay byte for byte. Only function bodies and
parameter defaults are changed: never tests, docstrings, annotations or decorators.
"""

import ast
import dataclasses
import pathlib
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper

from qcn_jax import syntax
from qcn_jax.envs import python_source
from qcn_jax.envs.synthesis.inject import classes, expressions, statements
from qcn_jax.envs.synthesis.inject.site import Edit, Edits, Site
from qcn_jax.envs.testpaths import is_test_path
from qcn_jax.errors import UserError

Kind = tuple[tuple[type[cst.CSTNode], ...], Callable[..., Edits]]

KINDS: dict[str, Kind] = {
    "add_not": ((cst.If, cst.While, cst.IfExp, cst.CompIf, cst.BooleanOperation), expressions.add_not),
    "drop_not": ((cst.UnaryOperation,), expressions.drop_not),
    "flip_boolean": ((cst.Name,), expressions.flip_boolean),
    "change_constant": ((cst.Integer,), expressions.change_constant),
    "swap_and_or": ((cst.BooleanOperation,), expressions.swap_and_or),
    "drop_operand": ((cst.BooleanOperation,), expressions.drop_operand),
    "flip_comparison": ((cst.ComparisonTarget,), expressions.flip_comparison),
    "change_boundary": ((cst.ComparisonTarget,), expressions.change_boundary),
    "flip_membership": ((cst.ComparisonTarget,), expressions.flip_membership),
    "flip_identity": ((cst.ComparisonTarget,), expressions.flip_identity),
    "change_arithmetic": ((cst.BinaryOperation,), expressions.change_arithmetic),
    "change_augmented": ((cst.AugAssign,), expressions.change_augmented),
    "swap_operands": ((cst.BinaryOperation, cst.BooleanOperation, cst.Comparison), expressions.swap_operands),
    "break_chain": ((cst.BinaryOperation,), expressions.break_chain),
    "swap_ternary": ((cst.IfExp,), expressions.swap_ternary),
    "slice_off_by_one": ((cst.Subscript,), expressions.slice_off_by_one),
    "range_off_by_one": ((cst.Call,), expressions.range_off_by_one),
    "swap_arguments": ((cst.Call,), expressions.swap_arguments),
    "drop_argument": ((cst.Call,), expressions.drop_argument),
    "wrong_function": ((cst.Call,), expressions.wrong_function),
    "alias_mutable": ((cst.Subscript, cst.Call), expressions.alias_mutable),
    "swap_branches": ((cst.If,), statements.swap_branches),
    "drop_guard": ((cst.If,), statements.drop_guard),
    "drop_conditional": ((cst.If,), statements.drop_conditional),
    "drop_loop": ((cst.For, cst.While), statements.drop_loop),
    "unwrap": ((cst.With, cst.Try), statements.unwrap),
    "drop_wrapper": ((cst.With, cst.Try), statements.drop_wrapper),
    "drop_statement": ((cst.SimpleStatementLine,), statements.drop_statement),
    "drop_assignment": ((cst.SimpleStatementLine,), statements.drop_assignment),
    "drop_return": ((cst.Return,), statements.drop_return),
    "shuffle_lines": ((cst.IndentedBlock,), statements.shuffle_lines),
    "change_exception": ((cst.Raise, cst.ExceptHandler), statements.change_exception),
    "change_default": ((cst.Param,), statements.change_default),
    "mutable_default": ((cst.Param,), statements.mutable_default),
    "break_continue": ((cst.Break, cst.Continue), statements.break_continue),
    "wrong_variable": ((cst.Name,), statements.wrong_variable),
    "drop_base": ((cst.ClassDef,), classes.drop_base),
    "drop_method": ((cst.ClassDef,), classes.drop_method),
    "shuffle_methods": ((cst.ClassDef,), classes.shuffle_methods),
}
CLASS_KINDS = frozenset(kind for kind, (types, _) in KINDS.items() if types == (cst.ClassDef,))


@dataclasses.dataclass(frozen=True)
class Injection:
    """One defect: characters [start, end) of `before_source` replaced by `new`.

    `function_start_line` (the `def` line) and `function_end_line` are 1-based lines of `before_source`; for defects
    of a whole class they are the class's, and `qualname` is the class or the method that is hit.
    """

    kind: str
    path: str
    qualname: str
    function_start_line: int
    function_end_line: int
    before_source: str = dataclasses.field(repr=False)
    start: int
    end: int
    new: str

    @property
    def old(self) -> str:
        """The text that the defect replaces."""
        return self.before_source[self.start : self.end]

    @property
    def line(self) -> int:
        """The 1-based line of the change's first character."""
        return self.before_source.count("\n", 0, self.start) + 1

    @property
    def after_source(self) -> str:
        """The module's text with the defect."""
        return self.before_source[: self.start] + self.new + self.before_source[self.end :]

    @property
    def single_line(self) -> bool:
        """Whether the defect (and so its fix) stays within one line."""
        return "\n" not in self.old and "\n" not in self.new

    @property
    def function_before(self) -> str:
        """The function's lines without the defect."""
        rows = python_source.lines(self.before_source)
        return "".join(rows[self.function_start_line - 1 : self.function_end_line])

    @property
    def function_after(self) -> str:
        """The function's lines with the defect."""
        last = self.function_end_line + self.new.count("\n") - self.old.count("\n")
        return "".join(python_source.lines(self.after_source)[self.function_start_line - 1 : last])


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of a module: dotted name without `<locals>`, 1-based first (`def`) and last line."""

    qualname: str
    start_line: int
    end_line: int


def functions(tree: ast.Module) -> list[Function]:
    """All functions and methods of a module in source order, nested ones included."""
    found: list[Function] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(Function(prefix + child.name, child.lineno, child.end_lineno or child.lineno))
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            visit(child, f"{prefix}{child.name}." if named else prefix)

    visit(tree, "")
    return found


def candidates(
    source: str,
    path: str,
    kinds: Collection[str] | None = None,
    max_function_lines: int | None = None,
    rng: random.Random | None = None,
) -> list[Injection]:
    """All defects of the given kinds that the functions of a module allow, in source order.

    Args:
      source: text of the module.
      path: its path relative to the repository root; files of tests give no candidates.
      kinds: names out of KINDS; all by default.
      max_function_lines: longer functions are left alone (short ones nested in them are not), and classes too.
      rng: for choices between equally good edits; the same state gives the same result.

    Raises:
      UserError: an unknown kind; names it and those allowed.
    """
    unknown = sorted(set(kinds or ()) - set(KINDS))
    if unknown:
        raise UserError(f"kinds: unknown {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    if is_test_path(path) or pathlib.PurePosixPath(path).name == "setup.py":
        return []
    if (plain := python_source.plain(source)) != source:
        return within(source, candidates(plain, path, kinds, max_function_lines, rng))
    try:
        tree = syntax.parse(source)
    except (SyntaxError, ValueError):
        return []  # templates and Python 2 fixtures among a package's files
    chosen = [kind for kind in KINDS if kinds is None or kind in set(kinds)]
    table = _by_node_type([kind for kind in chosen if kind not in CLASS_KINDS])
    rng = rng or random.Random(0)
    limit = max_function_lines or len(source)
    rows = python_source.lines(source)
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    found: list[Injection] = []
    done = 0  # functions up to this line were part of an earlier, enclosing one
    for function in functions(tree):
        if function.start_line <= done or function.end_line - function.start_line >= limit:
            continue
        done = function.end_line
        chunk = "".join(rows[function.start_line - 1 : function.end_line])
        offset = starts[function.start_line - 1]
        for kind, edit, inner, bounds in _edits(chunk, table, rng):
            name = ".".join([function.qualname, *inner])
            lines = (bounds[0] + function.start_line, bounds[1] + function.start_line)
            span = (offset + edit.start, offset + edit.end)
            if source[span[0] : span[1]] != edit.new:
                found.append(Injection(kind, path, name, *lines, source, *span, edit.new))
    if max_function_lines is None and (whole := [kind for kind in chosen if kind in CLASS_KINDS]):
        found += _class_injections(source, path, whole, rng)
    if "\f" in source:  # before code: libcst's positions behind it may be wrong
        found = [injection for injection in found if _parses(injection.after_source)]
    return sorted(found, key=lambda injection: (injection.start, injection.end, injection.kind, injection.new))


def _parses(source: str) -> bool:
    try:
        syntax.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def within(source: str, found: Iterable[Injection]) -> list[Injection]:
    """Defects that were found in `python_source.plain(source)`, in `source` itself."""
    moved = len(source) - len(python_source.plain(source))
    return [dataclasses.replace(one, before_source=source, start=one.start + moved, end=one.end + moved)
            for one in found]


def _by_node_type(kinds: Collection[str]) -> dict[type[cst.CSTNode], list[tuple[str, Callable[..., Edits]]]]:
    table: dict[type[cst.CSTNode], list[tuple[str, Callable[..., Edits]]]] = {}
    for kind in kinds:
        for node_type in KINDS[kind][0]:
            table.setdefault(node_type, []).append((kind, KINDS[kind][1]))
    return table


def _edits(
    chunk: str, table: dict, rng: random.Random
) -> Iterator[tuple[str, Edit, list[str], tuple[int, int]]]:
    """Edits of one function's text: kind, span in characters of `chunk`, names of inner functions, 0-based lines.

    The text is parsed as it stands, indentation included, behind an `if` line that makes it a module.
    """
    indented = chunk[:1] in " \t"
    head = "if 1:\n" if indented else ""
    text = head + chunk
    try:
        wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    except cst.ParserSyntaxError:
        return
    data = text.encode()
    site = Site(data, wrapper.resolve(ByteSpanPositionProvider), rng)
    ascii_only = len(data) == len(text)

    def characters(offset: int) -> int:
        return (offset if ascii_only else len(data[:offset].decode())) - len(head)

    for kind, edit, inner, (first, last) in _walk(wrapper.module, site, table, [], None):
        lines = tuple(data.count(b"\n", 0, at) - bool(head) for at in (first, last))
        yield kind, Edit(characters(edit.start), characters(edit.end), edit.new), inner[1:], lines


def _class_injections(source: str, path: str, kinds: Sequence[str], rng: random.Random) -> Iterator[Injection]:
    """Defects of the classes of a module, nested ones included."""
    try:
        wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    except cst.ParserSyntaxError:
        return
    data = source.encode()
    site = Site(data, wrapper.resolve(ByteSpanPositionProvider), rng)

    def visit(node: cst.CSTNode, names: list[str]) -> Iterator[Injection]:
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            names = [*names, node.name.value]
        if isinstance(node, cst.ClassDef) and isinstance(node.body, cst.IndentedBlock):
            lines = tuple(data.count(b"\n", 0, at) + 1 for at in site.span(node))
            for kind in kinds:
                for member, edit in KINDS[kind][1](node, site):
                    name = ".".join([*names, member] if member else names)
                    span = (len(data[: edit.start].decode()), len(data[: edit.end].decode()))
                    yield Injection(kind, path, name, *lines, source, *span, edit.new)
        for child in node.children:
            if isinstance(child, cst.BaseCompoundStatement | cst.BaseSuite | cst.Else):
                yield from visit(child, names)

    yield from visit(wrapper.module, [])


_SKIPPED = (
    cst.Annotation, cst.Decorator, cst.BaseParenthesizableWhitespace, cst.TrailingWhitespace, cst.EmptyLine,
    cst.Comma, cst.SimpleString, cst.Import, cst.ImportFrom, cst.Comment, cst.Newline, cst.Dot, cst.Colon,
    cst.LeftParen, cst.RightParen, cst.AssignEqual, cst.BaseBooleanOp, cst.BaseBinaryOp, cst.BaseUnaryOp,
    cst.BaseCompOp, cst.BaseAugOp, cst.LeftSquareBracket, cst.RightSquareBracket,
)  # fmt: skip
_BINDING = (cst.AssignTarget, cst.AsName, cst.NameItem)


def _walk(
    node: cst.CSTNode, site: Site, table: dict, inner: list[str], bounds: tuple[int, int] | None
) -> Iterator[tuple[str, Edit, list[str], tuple[int, int]]]:
    """Visits nodes in source order inside functions; `bounds` are the bytes of the innermost function."""
    if isinstance(node, _SKIPPED):
        return
    if bounds is not None:
        for kind, transform in table.get(type(node), ()):
            for edit in transform(node, site):
                yield kind, edit, inner, bounds
    outer_names = site.names
    if isinstance(node, cst.FunctionDef):
        inner, bounds = [*inner, node.name.value], site.span(node)
        site.names = outer_names + _parameters(node.params)
    elif isinstance(node, cst.ClassDef):
        inner = [*inner, node.name.value]
    site.parents.append(node)
    for child in _children(node):
        if isinstance(child, _BINDING):
            site.names = site.names + [name for name in _bound(child) if name not in site.names]
            site.parents.append(child)
            if isinstance(child, cst.AssignTarget) and not isinstance(child.target, cst.Name | cst.Tuple | cst.List):
                yield from _walk(child.target, site, table, inner, bounds)
            site.parents.pop()
        else:
            yield from _walk(child, site, table, inner, bounds)
    site.parents.pop()
    if isinstance(node, cst.FunctionDef):
        site.names = outer_names


def _children(node: cst.CSTNode) -> list[cst.CSTNode]:
    """Children in order of evaluation where it matters for which names are bound: values before targets."""
    if isinstance(node, cst.Assign):
        return [node.value, *node.targets]
    if isinstance(node, cst.For | cst.CompFor):
        others = [child for child in node.children if child is not node.target and child is not node.iter]
        return [node.iter, cst.AssignTarget(node.target), *others]
    return list(node.children)


def _parameters(parameters: cst.Parameters) -> list[str]:
    groups = [*parameters.posonly_params, *parameters.params, *parameters.kwonly_params]
    stars = [parameters.star_arg, parameters.star_kwarg]
    return [p.name.value for p in (*groups, *stars) if isinstance(p, cst.Param)]


def _bound(node: cst.CSTNode) -> list[str]:
    """Names that an assignment target, `as` or `global` binds."""
    target = getattr(node, "target", None) or getattr(node, "name", None) or node
    if isinstance(target, cst.Name):
        return [target.value]
    if isinstance(target, cst.Tuple | cst.List):
        return [name for element in target.elements for name in _bound(element.value)]
    return []
