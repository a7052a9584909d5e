"""Tests rewritten so that what they expect never enters the process of the code that they test.

Threat model. Code under test shares a process with its tests, and so can read and replace whatever is in it: test
functions, assertions, contexts, pytest, the way to the server. No check in that process can be relied on. What such
code cannot do is tell what it does not know. So before a patch counts as resolving, its tests run once more, in a
fresh process, as `rewrite` makes them: `assert f(x) == 5` sends the value of `f(x)` to the host, which holds the 5;
`with pytest.raises(ValueError)` takes any exception and tells which it was; other conditions are sent as they come
out, comparisons with a second one that must fail, which objects that are equal to everything give away. Tests have
names drawn for this one run, and beside them stand canaries, one that must pass and one that must fail. Whoever reports
success without doing the work must guess numbers, names and values.

What remains: patches that know the expected values by heart (held-out tests are against those), and conditions whose
expected value the test itself computes and that code finds there (inside/evidence.py and permissions.FORBIDDEN close
the known ways).
"""

import ast
import dataclasses
import operator
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qcn_jax.envs.tasks import parameters

Place = tuple[str, ...]  # (class, ..., function)
EVIDENCE = "_qcn_evidence"  # what the tests find among the builtins
_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.In: "in",
    ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not"}
# What the host compares itself; for other operators few values would fail.
_APPLY: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "in": lambda a, b: a in b, "is": lambda a, b: type(a) is type(b) and a == b}
_PROBED = frozenset({"==", "<", "<=", ">", ">=", "in"})
_UNITTEST: dict[str, type[ast.cmpop]] = {
    "assertEqual": ast.Eq, "assertEquals": ast.Eq, "assertListEqual": ast.Eq, "assertDictEqual": ast.Eq,
    "assertSetEqual": ast.Eq, "assertTupleEqual": ast.Eq, "assertMultiLineEqual": ast.Eq, "assertNotEqual": ast.NotEq,
    "assertIn": ast.In, "assertNotIn": ast.NotIn, "assertIs": ast.Is, "assertIsNot": ast.IsNot,
    "assertGreater": ast.Gt, "assertGreaterEqual": ast.GtE, "assertLess": ast.Lt, "assertLessEqual": ast.LtE}
_CONDITIONAL = (ast.If, ast.While, ast.Try, ast.Match, ast.IfExp, ast.TryStar)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What one place of a test claims.

    `kind` is value (`expected` is a literal's text, or such by the brackets of test ids where parameters say what is
    expected, compared by `operator` on the side `left` or right), truth
    (`expected` is True or False), compare, raises (`expected` holds names of exceptions and a pattern) or end.
    `always`: it depends on no condition of its own function. `key` names it, the same in every rewriting of a file.
    """

    key: str
    kind: str
    expected: Any = None
    operator: str = ""
    left: bool = False
    always: bool = True

    def judge(self, found: Any, brackets: str = "") -> str:
        """What a record says of the claim: holds, fails, or opaque (only the value's own methods can tell)."""
        try:
            if self.kind == "value":
                literal = ast.literal_eval(self.expected if isinstance(self.expected, str) else self.expected[brackets])
                if isinstance(found, dict) and "opaque" in found:
                    return "holds" if any(self._compare(one, literal) for one in found["as"]) else "opaque"
                good = self._compare(found, literal)
            elif self.kind == "compare":
                good = found == [True, False]
            elif self.kind == "raises":
                names, pattern = self.expected
                good = bool(set(names) & set(found[0])) and re.search(pattern or "", found[1]) is not None
            else:
                good = found is (True if self.kind == "end" else self.expected)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, re.error, RecursionError):
            return "fails"
        return "holds" if good else "fails"

    def _compare(self, found: Any, literal: Any) -> bool:
        value = plain_value(found)
        try:
            return bool(_APPLY[self.operator](*((literal, value) if self.left else (value, literal))))
        except TypeError:
            return False


def plain_value(found: Any) -> Any:
    """The value that inside/evidence.py, `plain`, wrote; raises ValueError where it is none."""
    if not isinstance(found, dict):
        return found
    ((kind, items),) = found.items()
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "complex":
        return complex(*items)
    if kind == "dict":
        return {plain_value(key): plain_value(item) for key, item in items}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if kind not in kinds:
        raise ValueError(f"no plain value: {kind}")
    return kinds[kind](map(plain_value, items))


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A rewritten test file: `text`; `claims` by number; `names` new to old of (class, ..., function); the canaries.

    `brackets` are the ends of rewritten ids, by function under its old name and old end, where parameters are hidden.
    A file without wanted tests, such as a helper of others, has no canaries.
    """

    text: str
    claims: Mapping[int, Claim]
    names: Mapping[Place, Place]
    brackets: Mapping[Place, Mapping[str, str]]
    passing: str
    failing: str


def rewrite(source: str, wanted: Mapping[Place, Collection[str]], plain: Collection[Place], inside: Collection[str],
            rng: random.Random) -> Rewritten:
    """A test file with its expectations withheld.

    Args:
      source: its text.
      wanted: (class, ..., function) of the tests that are to run, and the ends in brackets of their ids.
      plain: those of them that stay as they are.
      inside: keys of claims that stay inside: their values have methods of their own to compare them.
      rng: draws numbers and names.

    Raises:
      SyntaxError: the file cannot be read.
    """
    tree = ast.parse(source)
    rewriter = _Rewriter({place: ends for place, ends in wanted.items() if place not in plain}, set(plain), set(inside),
                         rng)
    names = _rename(tree, set(wanted) - set(plain), rng)
    rewriter.old = {new: old for new, old in names.items()}
    tree = rewriter.visit(tree)
    passing, failing = (f"test_{rng.getrandbits(48):012x}" if wanted else "" for _ in range(2))
    if wanted:
        tree.body += ast.parse(f"def {passing}():\n    {EVIDENCE}.end({rewriter.number(Claim('+', 'end'))})\n"
                               f"def {failing}():\n    {EVIDENCE}.end({rewriter.number(Claim('-', 'end'))})\n"
                               "    raise AssertionError\n").body
    # pytest need not rewrite what no longer asserts.
    words = ast.get_docstring(tree, clean=False)
    tree.body[: words is not None] = [ast.Expr(ast.Constant(f"{words or ''}\nPYTEST_DONT_REWRITE"))]
    return Rewritten(ast.unparse(ast.fix_missing_locations(tree)) + "\n", rewriter.claims, names, rewriter.brackets,
                     passing, failing)


def _rename(tree: ast.Module, wanted: set[Place], rng: random.Random) -> dict[Place, Place]:
    """Gives wanted functions names drawn by `rng`, and returns new to old.

    Functions whose name the file uses elsewhere, or that a class inherits under it, keep theirs.
    """
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    found: dict[Place, Any] = {}

    def walk(body: Sequence[ast.stmt], outer: Place) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                walk(node.body, (*outer, node.name))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[*outer, node.name] = node

    walk(tree.body, ())
    kept = used | {place[-1] for place in wanted - found.keys()}
    names: dict[Place, Place] = {}
    for place in sorted(wanted & found.keys()):
        if place[-1] not in kept and place[-1].startswith("test"):
            found[place].name = f"test_{rng.getrandbits(48):012x}"
        names[*place[:-1], found[place].name] = place
    return names


class _Rewriter(ast.NodeTransformer):
    """Puts claims in place of assertions, in all functions but those of `plain`."""

    def __init__(self, wanted: Mapping[Place, Collection[str]], plain: set[Place], inside: set[str],
                 rng: random.Random):
        self.wanted, self.plain, self.inside, self._rng = wanted, plain, inside, rng
        self.claims: dict[int, Claim] = {}
        self.old: dict[Place, Place] = {}
        self._place: Place = ()
        self.brackets: dict[Place, Mapping[str, str]] = {}
        self._hidden: Mapping[str, Mapping[str, str]] = {}
        self._conditions = 0

    def number(self, claim: Claim) -> int:
        """Draws the number under which a claim is made."""
        while (number := self._rng.getrandbits(48)) in self.claims:
            pass
        self.claims[number] = claim
        return number

    # --- where we are

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._enter(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def _enter(self, node: Any) -> Any:
        before = self._place, self._conditions
        self._place, self._conditions = (*self._place, node.name), 0
        node = self.generic_visit(node)
        self._place, self._conditions = before
        return node

    def _function(self, node: Any) -> Any:
        place = (*self._place, node.name)
        old = self.old.get(place, place)
        if old in self.plain:
            return node
        outer, self._hidden = self._hidden, {}
        if old in self.wanted and not self._compares_inside(node):
            hidden = parameters.hide(node, self.wanted[old])
            if hidden is not None:
                self._hidden, self.brackets[old] = hidden.values, hidden.brackets
        node = self._enter(node)
        self._hidden = outer
        if old in self.wanted and not any(isinstance(part, ast.Return | ast.Yield | ast.YieldFrom)
                                          for statement in node.body for part in _own(statement)):
            node.body.append(self._say("end", Claim(f"{'.'.join(old)} end", "end")))
        return node

    def _compares_inside(self, function: ast.AST) -> bool:
        return any(f"{node.lineno}:{node.col_offset}" in self.inside for node in ast.walk(function)
                   if isinstance(node, ast.stmt | ast.expr))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        conditional = isinstance(node, _CONDITIONAL)
        self._conditions += conditional
        node = super().generic_visit(node)
        self._conditions -= conditional
        return node

    # --- claims

    def visit_Assert(self, node: ast.Assert) -> Any:
        return self._claims(node.test, node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        call = node.value
        if isinstance(call, ast.Call) and not any(keyword.arg != "msg" for keyword in call.keywords):
            attribute = call.func.attr if isinstance(call.func, ast.Attribute) and isinstance(
                call.func.value, ast.Name) and call.func.value.id == "self" else ""
            if attribute in _UNITTEST and len(call.args) in (2, 3):
                return self._claims(ast.Compare(call.args[0], [_UNITTEST[attribute]()], [call.args[1]]), node)
            if attribute in ("assertTrue", "assertFalse", "assertIsNone", "assertIsNotNone") and call.args:
                test = call.args[0]
                if attribute == "assertFalse":
                    test = ast.UnaryOp(ast.Not(), test)
                elif attribute != "assertTrue":
                    test = ast.Compare(test, [ast.Is() if attribute == "assertIsNone" else ast.IsNot()],
                                       [ast.Constant(None)])
                return self._claims(test, node)
        raising = self._raising(call, 2)
        if raising is not None:  # the form that is given a function
            inner = ast.Expr(ast.Call(call.args[1], call.args[2:], call.keywords))
            return ast.With([ast.withitem(raising)], [inner])
        return node

    def visit_With(self, node: ast.With) -> Any:
        for item in node.items:
            raising = self._raising(item.context_expr, 1)
            if raising is not None:
                item.context_expr = raising
        return self.generic_visit(node)

    def _claims(self, test: ast.expr, at: ast.stmt | ast.expr) -> list[ast.stmt]:
        """Statements that claim what `assert test`, which stands `at`, asserts."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return [statement for part in test.values for statement in self._claims(part, part)]
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return [self._say("truth", self._claim("truth", False, at), test.operand)]
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            name, left, right = _OPERATORS[type(test.ops[0])], test.left, test.comparators[0]
            if name in _APPLY and f"{at.lineno}:{at.col_offset}" not in self.inside:
                for literal, other, is_left in ((right, left, False), (left, right, True)):
                    if isinstance(literal, ast.Name) and literal.id in self._hidden:
                        claim = self._claim("value", self._hidden[literal.id], at, operator=name, left=is_left)
                        return [self._say("value", claim, other)]
                    if _is_literal(literal):
                        claim = self._claim("value", ast.unparse(literal), at, operator=name, left=is_left)
                        return [self._say("value", claim, other)]
            if name in _PROBED:
                return [self._say("compare", self._claim("compare", None, at), ast.Constant(name), left, right)]
        return [self._say("truth", self._claim("truth", True, at), test)]

    def _raising(self, call: ast.AST, arguments: int) -> ast.expr | None:
        """A context that tells what was raised, in place of one that expects an exception; None where it is none."""
        if not isinstance(call, ast.Call) or not call.args or len(call.args) < arguments:
            return None
        function = call.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name not in ("raises", "assertRaises", "assertRaisesRegex") or (arguments == 1 and len(call.args) > (
                2 if name == "assertRaisesRegex" else 1)) or (arguments == 2 and name == "assertRaisesRegex"):
            return None
        kinds = call.args[0].elts if isinstance(call.args[0], ast.Tuple) else [call.args[0]]
        names = [getattr(kind, "attr", getattr(kind, "id", None)) for kind in kinds]
        patterns = call.args[1:] if name == "assertRaisesRegex" else []
        if arguments == 1:
            if any(keyword.arg != "match" for keyword in call.keywords):
                return None
            patterns = [*patterns, *(keyword.value for keyword in call.keywords)]
        if None in names or not all(isinstance(p, ast.Constant) and isinstance(p.value, str) for p in patterns):
            return None
        claim = self._claim("raises", (tuple(names), patterns[0].value if patterns else None), call)
        return self._say("raises", claim).value

    def _claim(self, kind: str, expected: Any, at: ast.stmt | ast.expr, **more: Any) -> Claim:
        return Claim(f"{at.lineno}:{at.col_offset}", kind, expected, always=not self._conditions, **more)

    def _say(self, method: str, claim: Claim, *arguments: ast.expr) -> ast.Expr:
        function = ast.Attribute(ast.Name(EVIDENCE, ast.Load()), method, ast.Load())
        return ast.Expr(ast.Call(function, [ast.Constant(self.number(claim)), *arguments], []))


def _own(statement: ast.AST) -> list[ast.AST]:
    """A statement's nodes without those of functions and classes inside it."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        return []
    return [statement, *(node for child in ast.iter_child_nodes(statement) for node in _own(child))]


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
        return True
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
