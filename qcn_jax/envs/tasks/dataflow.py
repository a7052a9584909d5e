"""Which expressions of a test file depend on the code under test, and which its author wrote down alone.

What a test compares with need not be evaluated beside the code that it tests where no such code has a part in it: it is
the same whatever the code does. The analysis errs towards dependence.
"""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence

# What is other at another time, or on another machine, cannot be taught.
_CHANGING = {"time", "datetime", "calendar", "random", "uuid", "secrets", "tempfile", "platform", "socket", "getpass"}
_OWN_MODULES = (sys.stdlib_module_names | {"pytest"}) - _CHANGING
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Dataflow:
    """Names of a test file that code under test may have a part in, by function; the tree must be as it was parsed."""

    def __init__(self, tree: ast.Module):
        self._fixtures = {node.name for node in tree.body if isinstance(node, Function) and _is_fixture(node)}
        self._star = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))
        self._classes: dict[int, list[ast.ClassDef]] = {}  # around a function, by its id
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for function in node.body:
                    self._classes.setdefault(id(function), []).append(node)
        self._module = self._spread(tree.body, set(), whole=False)
        self._functions: dict[int, set[str]] = {}

    def independent(self, expression: ast.expr, functions: list[Function]) -> bool:
        """Whether code under test has no part in an expression that stands in nested `functions`, outermost first."""
        if self._star:
            return False
        names = self._module
        for function in functions:
            if id(function) not in self._functions:
                marks = [mark for outer in (*self._classes.get(id(function), ()), function)
                         for mark in outer.decorator_list]
                self._functions[id(function)] = self._spread(function.body, names | self._parameters(function, marks))
            names = self._functions[id(function)]
        return not _mentions(expression, names)

    def _parameters(self, function: Function, marks: list[ast.expr]) -> set[str]:
        """Parameters that may come from elsewhere: neither written down in a mark nor by a fixture of the file."""
        arguments = function.args
        names = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
                                     *filter(None, (arguments.vararg, arguments.kwarg)))}
        known = {name for name in self._fixtures if name not in self._module}
        for mark in marks:
            if isinstance(mark, ast.Call) and getattr(mark.func, "attr", "") == "parametrize" and mark.args and not (
                    _mentions(mark, self._module)):
                known |= {word.strip() for part in ast.walk(mark.args[0]) if isinstance(part, ast.Constant)
                          for word in str(part.value).split(",")}
        return names - known

    def _spread(self, body: list[ast.stmt], names: set[str], whole: bool = True) -> set[str]:
        """`names`, and those that get something of them in `body`; without `whole` not those inside of functions."""
        found = [_bound(node) for statement in body for node in _inside(statement, whole)]
        names = set(names).union(*(targets for targets, uses in found if targets and uses is None))
        waiting = [(targets, uses) for targets, uses in found if targets and uses]
        before = -1
        while len(names) > before:
            before = len(names)
            for targets, uses in waiting:
                if not names.isdisjoint(uses):
                    names |= targets
        return names


def _inside(node: ast.AST, whole: bool) -> Iterator[ast.AST]:
    yield node
    if whole or not isinstance(node, Function | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _inside(child, whole)


def _mentions(node: ast.AST, names: set[str]) -> bool:
    uses = _uses(node)
    return uses is None or not names.isdisjoint(uses)


def _uses(*nodes: ast.AST) -> set[str] | None:
    """Names in these; None where something comes from outside whatever the names are."""
    found = set()
    for node in nodes:
        for one in ast.walk(node):
            if isinstance(one, ast.Name):
                found.add(one.id)
            elif isinstance(one, ast.Await | ast.Yield | ast.YieldFrom):
                return None
    return found


def _targets(*nodes: ast.AST | None) -> set[str]:
    """Names that an assignment to these changes: `a` of a, a.b and a[0]."""
    return {one.id for node in nodes if node is not None for one in ast.walk(node) if isinstance(one, ast.Name)}


def _bound(node: ast.AST) -> tuple[set[str], set[str] | None]:
    """Names that a node gives something to, and those of which it is given if it is of any; None: of others anyway."""
    match node:
        case ast.Import():
            return {alias.asname or alias.name.split(".")[0] for alias in node.names
                    if alias.name.split(".")[0] not in _OWN_MODULES}, None
        case ast.ImportFrom():
            own = not node.level and (node.module or "").split(".")[0] in _OWN_MODULES
            return set() if own else {alias.asname or alias.name for alias in node.names}, None
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}, _uses(node)
        case ast.Assign():
            return _targets(*node.targets), _uses(node.value)
        case ast.AugAssign() | ast.AnnAssign() | ast.NamedExpr() if node.value:
            return _targets(node.target), _uses(node.value)
        case ast.For() | ast.AsyncFor() | ast.comprehension():
            return _targets(node.target), _uses(node.iter)
        case ast.withitem():  # such as what was raised, or printed; an open file is what it is
            opens = isinstance(node.context_expr, ast.Call) and "open" in ast.unparse(node.context_expr.func)
            return _targets(node.optional_vars), _uses(node.context_expr) if opens else None
        case ast.ExceptHandler() if node.name:
            return {node.name}, None
        case ast.Global() | ast.Nonlocal():
            return set(node.names), None
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner))):  # such as a list that something is appended to
            return {owner}, _uses(*node.args, *(keyword.value for keyword in node.keywords))
    return set(), set()


# --- taking out what is no longer used


def blank(tree: ast.Module, hidden: Mapping[int, set[str]]) -> None:
    """Puts None in place of what gave `hidden` names their values, where nothing uses them any more.

    Args:
      tree: of the rewritten file; changed in place.
      hidden: names in expressions that were taken out of it, by the `id` of the function that these stood in.
    """
    for node in ast.walk(tree):
        if id(node) in hidden:
            _blank_assignments(list(ast.walk(node)), hidden[id(node)] - _loaded(node))
    unused = {name for names in hidden.values() for name in names} - _loaded(tree)
    _blank_assignments(tree.body, unused)
    for node in tree.body:
        if isinstance(node, Function) and node.name in unused and _is_fixture(node):
            for part in ast.walk(node):
                if isinstance(part, ast.Return):
                    part.value = ast.Constant(None)


def _is_fixture(function: Function) -> bool:
    return any("fixture" in ast.unparse(mark) for mark in function.decorator_list)


def _blank_assignments(nodes: Sequence[ast.AST], unused: set[str]) -> None:
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name) and (
                node.targets[0].id in unused):
            node.value = ast.Constant(None)


def _loaded(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
