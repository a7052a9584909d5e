"""Defects inside expressions. Each function maps (node, site) to the edits of one kind at that node."""

import libcst as cst

from qcn_jax.envs.synthesis.inject.site import Edit, Edits, Site, parenthesized
from qcn_jax.envs.synthesis.inject.swapped_operators import (
    BOUNDARY,
    EQUALITY,
    OPPOSITE,
    PYTHON_ARITHMETIC,
    PYTHON_AUGMENTED,
)  # fmt: skip

# What `not` may be put before without parentheses: it binds looser than all of these.
_TIGHTER_THAN_NOT = (
    cst.Name, cst.Attribute, cst.Call, cst.Subscript, cst.Comparison, cst.BinaryOperation,
)  # fmt: skip

_FLIPPED = OPPOSITE | EQUALITY
_COUNTERPARTS = (
    ("append", "extend"), ("startswith", "endswith"), ("lstrip", "rstrip"), ("strip", "lstrip"), ("find", "rfind"),
    ("split", "rsplit"), ("index", "rindex"), ("partition", "rpartition"), ("upper", "lower"), ("ljust", "rjust"),
    ("keys", "values"), ("values", "items"), ("popleft", "pop"), ("appendleft", "append"), ("match", "search"),
    ("add", "discard"), ("isdigit", "isalpha"), ("isupper", "islower"), ("min", "max"), ("any", "all"),
    ("union", "intersection"), ("issubset", "issuperset"), ("floor", "ceil"), ("list", "set"), ("reversed", "iter"),
)  # fmt: skip


def condition_of(node: cst.CSTNode) -> cst.BaseExpression | None:
    """The expression that a statement, conditional expression or comprehension filter tests, if it is one."""
    return node.test if isinstance(node, cst.If | cst.While | cst.IfExp | cst.CompIf) else None


def _exchanged(operator: cst.CSTNode, table: dict[str, str], site: Site) -> Edits:
    if site.text(operator) in table:
        yield site.replace(operator, table[site.text(operator)])


def add_not(node: cst.CSTNode, site: Site) -> Edits:
    """`if x` becomes `if not x`; also for operands of `and`/`or`."""
    tests = [condition_of(node)] if not isinstance(node, cst.BooleanOperation) else [node.left, node.right]
    for test in tests:
        if isinstance(test, _TIGHTER_THAN_NOT) and not parenthesized(test):
            start = site.span(test)[0]
            yield Edit(start, start, "not ")


def drop_not(node: cst.UnaryOperation, site: Site) -> Edits:
    """`not x` becomes `x`."""
    if isinstance(node.operator, cst.Not) and not parenthesized(node.expression):
        yield Edit(site.span(node)[0], site.span(node.expression)[0], "")


def flip_boolean(node: cst.Name, site: Site) -> Edits:
    """`True` becomes `False` and the other way round."""
    if node.value in ("True", "False"):
        yield site.replace(node, "False" if node.value == "True" else "True")


def change_constant(node: cst.Integer, site: Site) -> Edits:
    """A decimal integer outside subscripts becomes its neighbour."""
    if node.value.isdigit() and not isinstance(site.parent, cst.Index | cst.Slice):
        yield site.replace(node, _neighbour(int(node.value), site))


def swap_and_or(node: cst.BooleanOperation, site: Site) -> Edits:
    """`and` becomes `or` and the other way round."""
    yield site.replace(node.operator, "or" if isinstance(node.operator, cst.And) else "and")


def drop_operand(node: cst.BooleanOperation, site: Site) -> Edits:
    """`a and b` becomes `a` or `b`."""
    left, right = site.span(node.left), site.span(node.right)
    if parenthesized(node.left) or parenthesized(node.right):
        return
    yield Edit(left[1], right[1], "") if site.rng.random() < 0.5 else Edit(left[0], right[0], "")


def flip_comparison(node: cst.ComparisonTarget, site: Site) -> Edits:
    """A comparison becomes its negation: `<` becomes `>=`, `==` becomes `!=`."""
    yield from _exchanged(node.operator, _FLIPPED, site)


def change_boundary(node: cst.ComparisonTarget, site: Site) -> Edits:
    """`<` becomes `<=` and the other way round; likewise `>`."""
    yield from _exchanged(node.operator, BOUNDARY, site)


def flip_membership(node: cst.ComparisonTarget, site: Site) -> Edits:
    """`in` becomes `not in` and the other way round."""
    if isinstance(node.operator, cst.In | cst.NotIn):
        yield site.replace(node.operator, "not in" if isinstance(node.operator, cst.In) else "in")


def flip_identity(node: cst.ComparisonTarget, site: Site) -> Edits:
    """`is` becomes `is not` and the other way round."""
    if isinstance(node.operator, cst.Is | cst.IsNot):
        yield site.replace(node.operator, "is not" if isinstance(node.operator, cst.Is) else "is")


def change_arithmetic(node: cst.BinaryOperation, site: Site) -> Edits:
    """An arithmetic or bit operator becomes its counterpart; `%` on a string literal is left alone."""
    if not isinstance(node.left, cst.BaseString):
        yield from _exchanged(node.operator, PYTHON_ARITHMETIC, site)


def change_augmented(node: cst.AugAssign, site: Site) -> Edits:
    """`+=` becomes `-=` or plain `=`, and so on."""
    other = PYTHON_AUGMENTED.get(site.text(node.operator))
    if other:
        yield site.replace(node.operator, other if site.rng.random() < 0.5 else "=")


def swap_operands(node: cst.CSTNode, site: Site) -> Edits:
    """`a - b` becomes `b - a`, `a < b` becomes `b < a`; only where the order matters and both are simple."""
    if isinstance(node, cst.BinaryOperation | cst.BooleanOperation):
        ordered = (cst.Subtract | cst.Divide | cst.FloorDivide | cst.Modulo | cst.Power | cst.Add | cst.And | cst.Or)
        operator, left, right = node.operator, node.left, node.right
    else:
        ordered = cst.LessThan | cst.LessThanEqual | cst.GreaterThan | cst.GreaterThanEqual
        operator, left, right = node.comparisons[0].operator, node.left, node.comparisons[0].comparator
        if len(node.comparisons) != 1:
            return
    simple = cst.Name | cst.Attribute | cst.Subscript | cst.Call | cst.Integer
    if isinstance(operator, ordered) and isinstance(left, simple) and isinstance(right, simple):
        if not parenthesized(left) and not parenthesized(right) and site.text(left) != site.text(right):
            yield site.swap(left, right)


def break_chain(node: cst.BinaryOperation, site: Site) -> Edits:
    """`a + b + c` becomes `a + b` or `a + c`: a link of a chain is dropped."""
    left = node.left
    if isinstance(left, cst.BinaryOperation) and not parenthesized(left) and not parenthesized(node.right):
        yield Edit(site.span(left)[1], site.span(node.right)[1], "")
        if not parenthesized(left.left) and not parenthesized(left.right):
            yield Edit(site.span(left.left)[1], site.span(left.right)[1], "")


def swap_ternary(node: cst.IfExp, site: Site) -> Edits:
    """`a if c else b` becomes `b if c else a`."""
    if not parenthesized(node.body) and not parenthesized(node.orelse):
        body, orelse = site.text(node.body), site.text(node.orelse)
        if body != orelse and not isinstance(node.orelse, cst.IfExp | cst.Lambda):
            yield site.swap(node.body, node.orelse)


def slice_off_by_one(node: cst.Subscript, site: Site) -> Edits:
    """An index or a slice bound moves by one."""
    for element in node.slice:
        part = element.slice
        bounds = [part.value] if isinstance(part, cst.Index) else [part.lower, part.upper]
        for bound in bounds:
            yield from _move(bound, site)
        if isinstance(part, cst.Slice) and part.lower is not None and part.upper is None:
            end = site.span(part)[1]
            if part.step is None and site.data[end - 1 : end] == b":":
                yield Edit(end, end, "-1")


def range_off_by_one(node: cst.Call, site: Site) -> Edits:
    """A bound of `range` or the start of `enumerate` moves by one."""
    if isinstance(node.func, cst.Name) and node.func.value in ("range", "enumerate"):
        bounds = node.args if node.func.value == "range" else node.args[1:]
        for argument in bounds[:2]:
            yield from _move(argument.value, site)


def swap_arguments(node: cst.Call, site: Site) -> Edits:
    """Two neighbouring positional arguments change places."""
    for first, second in zip(node.args, node.args[1:]):
        plain = not any(a.keyword or a.star for a in (first, second))
        texts = [site.text(a.value) for a in (first, second)]
        if plain and texts[0] != texts[1] and not parenthesized(first.value) and not parenthesized(second.value):
            yield site.swap(first.value, second.value)


def drop_argument(node: cst.Call, site: Site) -> Edits:
    """The last keyword argument of a call is left out."""
    if len(node.args) > 1 and node.args[-1].keyword is not None:
        yield Edit(site.span(node.args[-2])[1], site.span(node.args[-1])[1], "")


def wrong_function(node: cst.Call, site: Site) -> Edits:
    """A method or builtin is exchanged for its counterpart: `lstrip` for `rstrip`, `min` for `max`."""
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    if isinstance(name, cst.Name):
        others = [b if name.value == a else a for a, b in _COUNTERPARTS if name.value in (a, b)]
        if others:
            yield site.replace(name, site.rng.choice(others))


def alias_mutable(node: cst.CSTNode, site: Site) -> Edits:
    """A defensive copy is left out: `list(x)`, `x.copy()` and `x[:]` become `x`."""
    if isinstance(node, cst.Subscript):
        part = node.slice[0].slice if len(node.slice) == 1 else None
        if isinstance(part, cst.Slice) and part.lower is part.upper is part.step is None:
            yield Edit(site.span(node.value)[1], site.span(node)[1], "")
    elif isinstance(node.func, cst.Attribute) and node.func.attr.value in ("copy", "deepcopy") and not node.args:
        yield Edit(site.span(node.func.value)[1], site.span(node)[1], "")
    elif isinstance(node.func, cst.Name) and node.func.value in ("list", "dict", "set", "copy", "deepcopy", "tuple"):
        if len(node.args) == 1 and isinstance(node.args[0].value, cst.Name | cst.Attribute | cst.Subscript):
            if not node.args[0].star and node.args[0].keyword is None:
                yield site.replace(node, site.text(node.args[0].value))


def _neighbour(value: int, site: Site) -> str:
    return str(value + 1 if value == 0 or site.rng.random() < 0.5 else value - 1)


def _move(bound: cst.BaseExpression | None, site: Site) -> Edits:
    """Edits that move an index or bound by one; simple expressions only."""
    if bound is None or parenthesized(bound):
        return
    negative = isinstance(bound, cst.UnaryOperation) and isinstance(bound.operator, cst.Minus)
    number = bound.expression if negative else bound
    if isinstance(number, cst.Integer) and number.value.isdigit():
        value = -int(number.value) if negative else int(number.value)
        # A step across zero would change from one end of the sequence to the other; that is no off-by-one.
        moved = value + 1 if value == 0 else value - 1 if value == -1 else int(_neighbour(value, site))
        yield site.replace(bound, str(moved))
    elif isinstance(bound, cst.Name | cst.Attribute | cst.Call):
        end = site.span(bound)[1]
        yield Edit(end, end, " + 1" if site.rng.random() < 0.5 else " - 1")
    elif isinstance(bound, cst.BinaryOperation) and isinstance(bound.operator, cst.Add | cst.Subtract):
        if isinstance(bound.right, cst.Integer) and bound.right.value == "1" and not parenthesized(bound.left):
            yield Edit(site.span(bound.left)[1], site.span(bound)[1], "")
