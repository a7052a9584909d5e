"""Tests rewritten so that what they expect never enters the process of the code that they test.

Threat model. Code under test shares a process with its tests, and so can read and replace whatever is in it: test
functions, assertions, contexts, pytest, the way to the server. No check in that process can be relied on. What such
code cannot do is tell what it does not know. So before a patch counts as resolving, its tests run once more, in a
fresh process, as `rewrite` makes them: `assert f(x) == 5` sends the value of `f(x)` to the host, which holds the 5. So
it is with `assert f(x) == wanted`, where code under test has no part in `wanted` (dataflow.py): what it is was taught
by the fixed state, it is not evaluated here, and what only it needs is not there. `with pytest.raises(ValueError)`
takes any exception and tells which it was; other conditions are sent as they come out, comparisons with decoys that
must fail, so that neither objects that are equal to everything nor a process that says yes to everything pass. Tests
have names drawn for this one run, and beside them stand canaries, one that must pass and one that must fail. Whoever
reports success without doing the work must guess numbers, names and values.

What remains: patches that know the expected values by heart or read them in files that tests read (held-out tests are
against those), and conditions whose expected value the code itself has a part in (inside/evidence.py, the look at
replaced functions in inside/runner.py and permissions.FORBIDDEN close the known ways).
"""

import ast
import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qcn_jax import syntax
from qcn_jax.envs import python_source
from qcn_jax.envs.tasks import claims, dataflow, parameters, pruning
from qcn_jax.envs.tasks.claims import Claim

Place = tuple[str, ...]  # (class, ..., function)
CHECKS = 6  # of one comparison in the fixed state; a decoy that may be equal to the true value is to show itself
EVIDENCE = "_qcn_evidence"  # what the tests find among the builtins
_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.In: "in",
    ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not"}
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_PROBED = frozenset({"==", "<", "<=", ">", ">=", "in"})
_UNITTEST: dict[str, type[ast.cmpop]] = {
    "assertEqual": ast.Eq, "assertEquals": ast.Eq, "assertListEqual": ast.Eq, "assertDictEqual": ast.Eq,
    "assertSetEqual": ast.Eq, "assertTupleEqual": ast.Eq, "assertMultiLineEqual": ast.Eq, "assertNotEqual": ast.NotEq,
    "assertIn": ast.In, "assertNotIn": ast.NotIn, "assertIs": ast.Is, "assertIsNot": ast.IsNot,
    "assertGreater": ast.Gt, "assertGreaterEqual": ast.GtE, "assertLess": ast.Lt, "assertLessEqual": ast.LtE}
# Methods whose literal second argument the host compares with itself (claims.py).
_OF_HOST = {"assertAlmostEqual": "near", "assertAlmostEquals": "near", "assertCountEqual": "count",
            "assertRegex": "regex"}
_CONDITIONAL = (ast.If, ast.While, ast.Try, ast.Match, ast.IfExp, ast.TryStar)


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
            rng: random.Random, named: Collection[Place] = (), known: Mapping[str, Sequence[Any]] | None = None,
            checking: bool = False) -> Rewritten:
    """A test file with its expectations withheld.

    Args:
      source: its text.
      wanted: (class, ..., function) of the tests that are to run, and the ends in brackets of their ids.
      plain: those of them that stay as they are.
      inside: keys of claims that stay inside: their values have methods of their own to compare them.
      rng: draws numbers and names.
      named: those of the tests that keep their names.
      known: all that the fixed state taught, by key; None: the tests are to tell it.
      checking: what is compared inside is compared CHECKS times, and told: is it the same as before, and no decoy's?

    Raises:
      SyntaxError: the file cannot be read.
    """
    # Tests beside the wanted ones say what is expected, too.
    tree = python_source.parse(pruning.without_others(source, {place[-1] for place in wanted}) if wanted else source)
    rewriter = _Rewriter({place: ends for place, ends in wanted.items() if place not in plain}, set(plain), set(inside),
                         rng, known, dataflow.Dataflow(tree), checking)
    names = _rename(tree, set(wanted) - set(plain), set(named), rng)
    rewriter.old = {new: old for new, old in names.items()}
    tree = rewriter.visit(tree)
    dataflow.blank(tree, rewriter.taken)
    passing, failing = (f"test_{rng.getrandbits(48):012x}" if wanted else "" for _ in range(2))
    if wanted:
        tree.body += syntax.parse(f"def {passing}():\n    {EVIDENCE}.end({rewriter.number(Claim('+', 'end'))})\n"
                               f"def {failing}():\n    {EVIDENCE}.end({rewriter.number(Claim('-', 'end'))})\n"
                               "    raise AssertionError\n").body
    # pytest need not rewrite what no longer asserts.
    words = ast.get_docstring(tree, clean=False)
    tree.body[: words is not None] = [ast.Expr(ast.Constant(f"{words or ''}\nPYTEST_DONT_REWRITE"))]
    return Rewritten(ast.unparse(ast.fix_missing_locations(tree)) + "\n", rewriter.claims, names, rewriter.brackets,
                     passing, failing)


def _rename(tree: ast.Module, wanted: set[Place], named: set[Place], rng: random.Random) -> dict[Place, Place]:
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
        if place[-1] not in kept and place[-1].startswith("test") and place not in named:
            found[place].name = f"test_{rng.getrandbits(48):012x}"
        names[*place[:-1], found[place].name] = place
    return names


class _Rewriter(ast.NodeTransformer):
    """Puts claims in place of assertions, in all functions but those of `plain`."""

    def __init__(self, wanted: Mapping[Place, Collection[str]], plain: set[Place], inside: set[str],
                 rng: random.Random, known: Mapping[str, Sequence[Any]] | None, flow: dataflow.Dataflow,
                 checking: bool):
        self.wanted, self.plain, self.inside, self._rng = wanted, plain, inside, rng
        self._known, self._flow, self._functions, self._checking = known, flow, [], checking
        self.taken: dict[int, set[str]] = {}  # names in what was taken out, by the id of each function around it
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
        self._functions.append(node)
        self._flow.independent(node.args, self._functions)  # looks at the function before it is changed
        node = self._enter(node)
        self._functions.pop()
        self._hidden = outer
        if old in self.wanted and not any(isinstance(part, ast.Return | ast.Yield | ast.YieldFrom)
                                          for statement in node.body for part in _own(statement)):
            node.body.append(self._say("end", Claim(f"{'.'.join(old)} end", "end")))
        return node

    def _compares_inside(self, function: ast.AST) -> bool:
        return bool(self.inside) and any(f"{node.lineno}:{node.col_offset}" in self.inside
                                         for node in ast.walk(function) if isinstance(node, ast.stmt | ast.expr))

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
        if isinstance(call, ast.Call) and _place(node) not in self.inside and (decided := _of_host(call)):
            name, expected, value = decided
            return self._say("value", self._claim("value", expected, node, operator=name), value)
        if isinstance(call, ast.Call) and not any(keyword.arg != "msg" for keyword in call.keywords):
            attribute = call.func.attr if isinstance(call.func, ast.Attribute) and isinstance(
                call.func.value, ast.Name) and call.func.value.id == "self" else ""
            if attribute in _UNITTEST and len(call.args) in (2, 3):
                return self._claims(ast.Compare(call.args[0], [_UNITTEST[attribute]()], [call.args[1]]), node)
            if attribute == "assertIsInstance" and len(call.args) in (2, 3):
                return self._claims(ast.Call(ast.Name("isinstance", ast.Load()), call.args[:2], []), node)
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
            if name in claims.APPLY and _place(at) not in self.inside:
                for own, other, is_left in ((right, left, False), (left, right, True)):
                    if said := self._withheld(name, own, other, is_left, at):
                        return said
            if name in _PROBED:
                return self._compared(name, left, right, at)
        return [self._say("truth", self._claim("truth", True, at), test)]

    def _withheld(self, name: str, own: ast.expr, other: ast.expr, is_left: bool, at: Any) -> list[ast.stmt]:
        """Statements that send `other` to the host, which knows `own`; none where that cannot be."""
        expected = (self._hidden.get(own.id) if isinstance(own, ast.Name) else None) or (
            ast.unparse(own) if _is_literal(own) else None)
        if expected is None and name == "==" and (near := _approx(own)):
            name, expected = "approx", near
        claim = self._claim("value", expected, at, operator=name, left=is_left)
        if expected is None:
            if name not in ("==", "in") or not self._independent(own) or self._independent(other):
                return []
            if self._known is None:
                return [self._say("value", claim, other), self._say("value", self._claim("taught", None, at, "?"), own)]
            if claim.key + "?" not in self._known:
                return []
            names = {node.id for node in ast.walk(own) if isinstance(node, ast.Name)}
            for function in self._functions:
                self.taken.setdefault(id(function), set()).update(names)
        return [self._say("value", claim, other)]

    def _independent(self, expression: ast.expr) -> bool:
        return bool(self._functions) and self._flow.independent(expression, self._functions)

    def _compared(self, name: str, left: ast.expr, right: ast.expr, at: Any) -> list[ast.stmt]:
        """Statements that compare inside, with a decoy beside it that must not hold, in an order drawn here."""
        claim, decoy = self._claim("compare", True, at), self._claim("compare", False, at, "!")
        if name not in ("==", *_OPPOSITE) or decoy.key in self.inside:
            return [self._say("compare", claim, ast.Constant(name), left, right)]
        variables = [f"_{self._rng.getrandbits(48):012x}" for _ in range(2)]
        values = [ast.Assign([ast.Name(variable, ast.Store())], value, lineno=at.lineno)
                  for variable, value in zip(variables, (left, right))]
        left, right = (ast.Name(variable, ast.Load()) for variable in variables)
        asked = [self._say("compare", claim, ast.Constant(name), left, right)]
        if name in _OPPOSITE:
            asked.append(self._say("compare", decoy, ast.Constant(_OPPOSITE[name]), left, right))
        elif self._known is not None:
            for _ in range(CHECKS if self._checking else 1):
                different = claims.decoy(self._known.get(f"{decoy.key}?", ()), self._rng)
                asked.append(self._say("compare", decoy, ast.Constant(name), left, _literal(different)))
        if self._checking:
            asked += asked[:1] * (CHECKS - 1)
        if name == "==" and (self._checking or self._known is None):
            asked.append(self._say("value", self._claim("taught", None, at, "!?"), left))
        self._rng.shuffle(asked)
        return [*values, *asked]

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

    def _claim(self, kind: str, expected: Any, at: ast.stmt | ast.expr, mark: str = "", **more: Any) -> Claim:
        return Claim(_place(at) + mark, kind, expected, always=not self._conditions, **more)

    def _say(self, method: str, claim: Claim, *arguments: ast.expr) -> ast.Expr:
        function = ast.Attribute(ast.Name(EVIDENCE, ast.Load()), method, ast.Load())
        return ast.Expr(ast.Call(function, [ast.Constant(self.number(claim)), *arguments], []))


def _place(at: ast.stmt | ast.expr) -> str:
    return f"{at.lineno}:{at.col_offset}"


def _literal(value: Any) -> ast.expr:
    return _Numbers().visit(syntax.parse(repr(value), mode="eval")).body


class _Numbers(ast.NodeTransformer):
    """Writes the numbers that Python has no literal for as expressions."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"inf": "1e999", "nan": "(1e999 - 1e999)"}.get(node.id, node.id)
        return syntax.parse(words, mode="eval").body


def _approx(node: ast.expr) -> str | None:
    """The arguments, as a literal's text, of a call of pytest.approx that has literals alone; otherwise None."""
    if not (isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "approx"):
        return None
    try:
        given = tuple(ast.literal_eval(one) for one in node.args)
        return repr((given, {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _of_host(call: ast.Call) -> tuple[str, str, ast.expr] | None:
    """(operator, literal's text, value) of a call of unittest's that the host can decide; None where it is none."""
    name = _OF_HOST.get(getattr(call.func, "attr", ""))
    words = {word.arg: word.value for word in call.keywords if word.arg != "msg"}
    if name is None or len(call.args) < 2 or not words.keys() <= ({"places", "delta"} if name == "near" else set()):
        return None
    value, literal = call.args[:2]
    if name != "regex" and not _is_literal(literal):
        value, literal = literal, value
    try:
        found = ast.literal_eval(literal)
        if name == "near":
            places = ast.literal_eval(call.args[2]) if len(call.args) > 2 else None
            given = {word: ast.literal_eval(value) for word, value in words.items()}
            found = (found, given.get("places", places) or (7 if places is None else places), given.get("delta"))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return name, repr(found), value


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
