"""Defects of whole statements and of names. Each function maps (node, site) to the edits of one kind at that node."""

import libcst as cst

from qcn_jax.envs import python_source
from qcn_jax.envs.synthesis.inject.site import Edit, Edits, Site

_EXCEPTIONS = (
    ("KeyError", "IndexError"), ("ValueError", "TypeError"), ("AttributeError", "KeyError"),
    ("IndexError", "StopIteration"), ("StopIteration", "IndexError"), ("TypeError", "ValueError"),
    ("NotImplementedError", "TypeError"), ("RuntimeError", "ValueError"), ("OSError", "ValueError"),
    ("ImportError", "ValueError"), ("Exception", "KeyError"), ("OverflowError", "ZeroDivisionError"),
    ("UnicodeDecodeError", "UnicodeEncodeError"), ("ZeroDivisionError", "OverflowError"), ("LookupError", "KeyError"),
)  # fmt: skip
_DEFAULTS = {"None": ("False", "()", "0"), "True": ("False", "None"), "False": ("True",)}
_FRESH = ("[]", "{}", "list()", "dict()", "set()")
_LEAVING = cst.Return | cst.Raise | cst.Continue | cst.Break


def swap_branches(node: cst.If, site: Site) -> Edits:
    """The bodies of `if` and `else` change places."""
    if not isinstance(node.orelse, cst.Else) or _is_elif(node, site):
        return
    blocks = [node.body, node.orelse.body]
    if all(isinstance(block, cst.IndentedBlock) for block in blocks):
        (a, b), (c, d) = (site.lines(block.body[0], block.body[-1]) for block in blocks)
        if site.data[a:b] != site.data[c:d] and site.data[b - 1 : b] == site.data[d - 1 : d] == b"\n":
            yield Edit(a, d, (site.data[c:d] + site.data[b:c] + site.data[a:b]).decode())


def drop_guard(node: cst.If, site: Site) -> Edits:
    """An `if` without `else` whose body leaves (return, raise, continue, break) is deleted."""
    if node.orelse is None and not _is_elif(node, site) and isinstance(_last(node.body), _LEAVING):
        yield from delete(node, site)


def drop_conditional(node: cst.If, site: Site) -> Edits:
    """Any other `if` statement without `else` is deleted."""
    if node.orelse is None and not _is_elif(node, site) and not isinstance(_last(node.body), _LEAVING):
        yield from delete(node, site)


def drop_loop(node: cst.CSTNode, site: Site) -> Edits:
    """A `for` or `while` statement is deleted."""
    yield from delete(node, site)


def unwrap(node: cst.CSTNode, site: Site) -> Edits:
    """`with` and `try` blocks are replaced by their bodies; handlers and `finally` are lost."""
    if isinstance(node.body, cst.IndentedBlock) and isinstance(site.parent, cst.IndentedBlock):
        (start, _), (first, last) = site.lines(node, node), site.lines(node.body.body[0], node.body.body[-1])
        end = site.lines(node, node)[1]
        outer = site.span(node)[0] - start
        depth = site.span(node.body.body[0])[0] - first - outer
        rows = python_source.lines(site.data[first:last].decode())
        movable = all(not row.strip() or not row[:depth].strip() for row in rows)
        if depth > 0 and movable and b'"""' not in site.data[first:last] and b"'''" not in site.data[first:last]:
            yield Edit(start, end, "".join(row[depth:] if row.strip() else row for row in rows))


def drop_wrapper(node: cst.CSTNode, site: Site) -> Edits:
    """`with` and `try` statements are deleted together with their bodies."""
    yield from delete(node, site)


def drop_statement(node: cst.SimpleStatementLine, site: Site) -> Edits:
    """A call, a delete, or an assignment to an attribute or element is deleted."""
    if len(node.body) == 1:
        statement = node.body[0]
        calls = isinstance(statement, cst.Expr) and isinstance(statement.value, cst.Call | cst.Await)
        if calls or isinstance(statement, cst.Del) or (
            isinstance(statement, cst.Assign)
            and isinstance(statement.targets[0].target, cst.Attribute | cst.Subscript)
        ):  # fmt: skip
            yield from delete(node, site)


def drop_assignment(node: cst.SimpleStatementLine, site: Site) -> Edits:
    """An augmented assignment, or a later assignment to a name that is bound already, is deleted."""
    if len(node.body) != 1:
        return
    statement = node.body[0]
    if isinstance(statement, cst.AugAssign):
        yield from delete(node, site)
    elif isinstance(statement, cst.Assign) and isinstance(statement.targets[0].target, cst.Name):
        if statement.targets[0].target.value in site.names:
            yield from delete(node, site)


def drop_return(node: cst.Return, site: Site) -> Edits:
    """`return f(x)` loses its `return`."""
    if isinstance(node.value, cst.Call | cst.Name | cst.Attribute | cst.Subscript) and not node.value.lpar:
        yield Edit(site.span(node)[0], site.span(node.value)[0], "")


def shuffle_lines(node: cst.IndentedBlock, site: Site) -> Edits:
    """Two neighbouring statements of one line each change places."""
    for first, second in zip(node.body, node.body[1:]):
        if all(isinstance(s, cst.SimpleStatementLine) and not s.leading_lines for s in (first, second)):
            movable = not isinstance(first.body[0], cst.Import | cst.ImportFrom | cst.Pass | cst.Global | cst.Nonlocal)
            if movable and not _is_docstring(first) and not isinstance(second.body[0], _LEAVING | cst.Pass):
                yield site.swap(first, second)


def change_exception(node: cst.CSTNode, site: Site) -> Edits:
    """Another exception is raised or caught: `KeyError` becomes `IndexError`."""
    if isinstance(node, cst.ExceptHandler):
        names = [node.type] if not isinstance(node.type, cst.Tuple) else [e.value for e in node.type.elements]
    else:
        names = [node.exc.func if isinstance(node.exc, cst.Call) else node.exc]
    for name in names:
        others = [b for a, b in _EXCEPTIONS if isinstance(name, cst.Name) and name.value == a]
        if others:
            yield site.replace(name, others[0])


def change_default(node: cst.Param, site: Site) -> Edits:
    """A parameter's default value is another one of its kind."""
    if isinstance(node.default, cst.Name) and node.default.value in _DEFAULTS:
        yield site.replace(node.default, site.rng.choice(_DEFAULTS[node.default.value]))
    elif isinstance(node.default, cst.Integer) and node.default.value.isdigit():
        yield site.replace(node.default, str(int(node.default.value) + 1))


def mutable_default(node: cst.Param, site: Site) -> Edits:
    """A default of None that the body replaces by a fresh list, dict or set becomes one that all calls share."""
    function = next((parent for parent in reversed(site.parents) if isinstance(parent, cst.FunctionDef)), None)
    if function is None or not isinstance(node.default, cst.Name) or node.default.value != "None":
        return
    for statement in function.body.body:
        test = statement.test if isinstance(statement, cst.If) else None
        if isinstance(test, cst.Comparison) and isinstance(test.left, cst.Name) and test.left.value == node.name.value:
            fresh = _last(statement.body)
            if isinstance(test.comparisons[0].operator, cst.Is) and isinstance(fresh, cst.Assign):
                text = site.text(fresh.value)
                if site.text(fresh.targets[0].target) == node.name.value and text in _FRESH:
                    yield site.replace(node.default, text)


def break_continue(node: cst.CSTNode, site: Site) -> Edits:
    """`break` becomes `continue` and the other way round."""
    yield site.replace(node, "continue" if isinstance(node, cst.Break) else "break")


def wrong_variable(node: cst.Name, site: Site) -> Edits:
    """A local name is read where another one was meant."""
    if node.value not in site.names or not _is_read(node, site):
        return
    others = [name for name in site.names if name not in (node.value, "self", "cls")]
    if others and node.value not in ("self", "cls"):
        yield site.replace(node, site.rng.choice(others))


def _is_read(node: cst.Name, site: Site) -> bool:
    parent = site.parent
    if isinstance(parent, cst.Arg):
        return parent.value is node
    if isinstance(parent, cst.Attribute):
        return parent.value is node
    if isinstance(parent, cst.Call):
        return False  # the callee: another function rather than another variable
    return not isinstance(parent, cst.Param | cst.AsName | cst.NameItem | cst.FunctionDef | cst.ClassDef | cst.Del)


def _is_elif(node: cst.If, site: Site) -> bool:
    return isinstance(site.parent, cst.If)


def _is_docstring(node: cst.SimpleStatementLine) -> bool:
    return isinstance(node.body[0], cst.Expr) and isinstance(node.body[0].value, cst.BaseString)


def _last(block: cst.BaseSuite) -> cst.CSTNode | None:
    last = block.body[-1] if block.body else None
    return last.body[-1] if isinstance(last, cst.SimpleStatementLine) else last


def delete(node: cst.CSTNode, site: Site) -> Edits:
    """Deletes a statement's lines; a block that would be left empty gets `pass`."""
    if not isinstance(site.parent, cst.IndentedBlock):
        return
    start, end = site.lines(node, node)
    if site.data[start : site.span(node)[0]].strip() or not site.data[:end].endswith(b"\n"):
        return
    alone = sum(not (isinstance(s, cst.SimpleStatementLine) and _is_docstring(s)) for s in site.parent.body) < 2
    if alone:
        yield Edit(site.span(node)[0], end - 1, "pass")
    else:
        yield Edit(start, end, "")
