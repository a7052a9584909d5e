"""Rule-based defects in JavaScript and Go, over tree-sitter: the same kinds, edits and guarantees as for Python.

One defect in one function, everything else of the text untouched; never in tests. What a language calls its nodes
stands in its Grammar, what a kind does stands once.
"""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from qcn_jax.envs.synthesis.inject import Injection
from qcn_jax.envs.synthesis.inject.site import Edit
from qcn_jax.envs.synthesis.inject.swapped_operators import ARITHMETIC, AUGMENTED, BOUNDARY, OPPOSITE
from qcn_jax.envs.testpaths import is_test_path
from qcn_jax.errors import UserError

Node = Any  # tree_sitter.Node; the package is loaded when it is first needed


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A language's names for what the kinds look for."""

    name: str  # as tree-sitter-language-pack knows it
    functions: frozenset[str]
    blocks: frozenset[str]
    loops: frozenset[str]
    numbers: frozenset[str]
    arguments: str
    augmented: frozenset[str]
    steps: frozenset[str]  # i++ and i--
    equal: tuple[tuple[str, str], ...]
    statements: frozenset[str]


JAVASCRIPT = Grammar(
    "javascript",
    frozenset({"function_declaration", "function_expression", "arrow_function", "method_definition",
               "generator_function_declaration", "generator_function"}),
    frozenset({"statement_block"}), frozenset({"for_statement", "for_in_statement", "while_statement"}),
    frozenset({"number"}), "arguments", frozenset({"augmented_assignment_expression"}),
    frozenset({"update_expression"}),
    (("===", "!=="), ("==", "!=")),
    frozenset({"expression_statement", "lexical_declaration", "variable_declaration"}),
)
GO = Grammar(
    "go", frozenset({"function_declaration", "method_declaration", "func_literal"}),
    frozenset({"block", "statement_list"}), frozenset({"for_statement"}), frozenset({"int_literal"}), "argument_list",
    frozenset({"assignment_statement"}), frozenset({"inc_statement", "dec_statement"}), (("==", "!="),),
    frozenset({"expression_statement", "assignment_statement", "short_var_declaration"}),
)
_LOGICAL = {"&&": "||", "||": "&&"}
_COUNTERPARTS = {
    "javascript": (("push", "unshift"), ("pop", "shift"), ("startsWith", "endsWith"), ("indexOf", "lastIndexOf"),
                   ("trimStart", "trimEnd"), ("toUpperCase", "toLowerCase"), ("some", "every"), ("min", "max"),
                   ("floor", "ceil"), ("padStart", "padEnd"), ("keys", "values")),
    "go": (("HasPrefix", "HasSuffix"), ("Index", "LastIndex"), ("TrimLeft", "TrimRight"), ("ToUpper", "ToLower"),
           ("TrimPrefix", "TrimSuffix"), ("IsUpper", "IsLower"), ("Floor", "Ceil"), ("Min", "Max")),
}
_LEAVING = frozenset({"return_statement", "throw_statement", "continue_statement", "break_statement"})


class Site:
    """The text, and edits of nodes of it."""

    def __init__(self, data: bytes, grammar: Grammar, rng: random.Random):
        self.data, self.grammar, self.rng = data, grammar, rng

    def text(self, node: Node) -> str:
        """What stands at a node."""
        return self.data[node.start_byte : node.end_byte].decode()

    def replace(self, node: Node, new: str) -> Edit:
        return Edit(node.start_byte, node.end_byte, new)

    def swap(self, first: Node, second: Node) -> Edit:
        between = self.data[first.end_byte : second.start_byte].decode()
        return Edit(first.start_byte, second.end_byte, self.text(second) + between + self.text(first))

    def lines(self, node: Node) -> Edit | None:
        """The edit that deletes a statement's whole lines; None where others share them."""
        start = self.data.rfind(b"\n", 0, node.start_byte) + 1
        end = self.data.find(b"\n", node.end_byte)
        end = len(self.data) if end < 0 else end + 1
        rest = self.data[node.end_byte : end].strip().removeprefix(b";")
        return None if self.data[start : node.start_byte].strip() or rest else Edit(start, end, "")


def _operator(node: Node, table: dict[str, str], site: Site) -> Iterator[Edit]:
    operator = node.child_by_field_name("operator")
    if operator is not None and site.text(operator) in table:
        yield site.replace(operator, table[site.text(operator)])


def _binary(table: Callable[[Grammar], dict[str, str]]) -> Callable[[Node, Site], Iterator[Edit]]:
    def edits(node: Node, site: Site) -> Iterator[Edit]:
        if node.type == "binary_expression":
            chosen = table(site.grammar)
            strings = any(side is not None and "string" in side.type for side in (
                node.child_by_field_name("left"), node.child_by_field_name("right")))  # fmt: skip
            if not (strings and chosen is ARITHMETIC):
                yield from _operator(node, chosen, site)

    return edits


def _equality(grammar: Grammar) -> dict[str, str]:
    pairs = {a: b for pair in grammar.equal for a, b in (pair, pair[::-1])}
    return OPPOSITE | pairs


def _change_augmented(node: Node, site: Site) -> Iterator[Edit]:
    if node.type in site.grammar.augmented:
        operator = next((child for child in node.children if site.text(child) in AUGMENTED), None)
        if operator is not None:
            yield site.replace(operator, AUGMENTED[site.text(operator)])
    elif node.type in site.grammar.steps:
        sign = next((child for child in node.children if site.text(child) in ("++", "--")), None)
        if sign is not None and node.parent.type not in ("for_statement", "for_clause"):  # such loops would not end
            yield site.replace(sign, "--" if site.text(sign) == "++" else "++")


def _change_constant(node: Node, site: Site) -> Iterator[Edit]:
    if node.type in site.grammar.numbers and site.text(node).isdigit():
        value = int(site.text(node))
        yield site.replace(node, str(value + 1 if value == 0 or site.rng.random() < 0.5 else value - 1))


def _flip_boolean(node: Node, site: Site) -> Iterator[Edit]:
    if node.type in ("true", "false"):
        yield site.replace(node, "false" if node.type == "true" else "true")


def _drop_not(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "unary_expression" and site.text(node.child_by_field_name("operator")) == "!":
        argument = node.child_by_field_name("argument") or node.child_by_field_name("operand")
        yield Edit(node.start_byte, argument.start_byte, "")


def _add_not(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "if_statement":
        test = node.child_by_field_name("condition")
        text = site.text(test)
        if not text.startswith(("!", "(!")):
            yield site.replace(test, f"(!{text})" if text.startswith("(") else f"!({text})")


def _drop_operand(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "binary_expression" and site.text(node.child_by_field_name("operator")) in _LOGICAL:
        left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
        yield site.replace(node, site.text(left if site.rng.random() < 0.5 else right))


def _swap_operands(node: Node, site: Site) -> Iterator[Edit]:
    ordered = ("-", "/", "%", "<", ">")
    if node.type == "binary_expression" and site.text(node.child_by_field_name("operator")) in ordered:
        left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
        simple = all(side.type not in ("binary_expression", "ternary_expression") for side in (left, right))
        if simple and site.text(left) != site.text(right):
            yield site.swap(left, right)


def _swap_ternary(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "ternary_expression":
        yield site.swap(node.child_by_field_name("consequence"), node.child_by_field_name("alternative"))


def _swap_branches(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "if_statement":
        first, second = node.child_by_field_name("consequence"), node.child_by_field_name("alternative")
        if second is not None and second.type == "else_clause":
            second = second.named_children[-1]
        if second is not None and first.type == second.type and first.type in site.grammar.blocks:
            yield site.swap(first, second)


def _leaves(node: Node, site: Site) -> bool:
    body = node.child_by_field_name("consequence")
    inner = list(body.named_children) if body.type in site.grammar.blocks else [body]
    if len(inner) == 1 and inner[0].type == "statement_list":
        inner = list(inner[0].named_children)
    return bool(inner) and inner[-1].type in _LEAVING


def _drop_if(leaving: bool) -> Callable[[Node, Site], Iterator[Edit]]:
    def edits(node: Node, site: Site) -> Iterator[Edit]:
        alone = node.type == "if_statement" and node.child_by_field_name("alternative") is None
        if alone and node.parent.type in site.grammar.blocks and _leaves(node, site) == leaving:
            if (edit := site.lines(node)) is not None:
                yield edit

    return edits


def _drop_loop(node: Node, site: Site) -> Iterator[Edit]:
    if node.type in site.grammar.loops and node.parent.type in site.grammar.blocks:
        if (edit := site.lines(node)) is not None:
            yield edit


def _drop_statement(node: Node, site: Site) -> Iterator[Edit]:
    plain = node.type == "expression_statement" or (node.type == "assignment_statement" and site.grammar is GO)
    if plain and node.parent.type in site.grammar.blocks and "use strict" not in site.text(node):
        if (edit := site.lines(node)) is not None:
            yield edit


def _shuffle_lines(node: Node, site: Site) -> Iterator[Edit]:
    if node.type in site.grammar.blocks:
        for first, second in zip(node.named_children, node.named_children[1:]):
            if all(s.type in site.grammar.statements and b"\n" not in site.data[s.start_byte : s.end_byte]
                   for s in (first, second)):  # fmt: skip
                yield site.swap(first, second)


def _swap_arguments(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == site.grammar.arguments:
        for first, second in zip(node.named_children, node.named_children[1:]):
            if "comment" not in (first.type, second.type) and site.text(first) != site.text(second):
                yield site.swap(first, second)


def _wrong_function(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "call_expression":
        called = node.child_by_field_name("function")
        name = called.child_by_field_name("property") or called.child_by_field_name("field") or called
        for a, b in _COUNTERPARTS[site.grammar.name]:
            if site.text(name) in (a, b):
                yield site.replace(name, b if site.text(name) == a else a)
                return


def _slice_off_by_one(node: Node, site: Site) -> Iterator[Edit]:
    bounds: list[Node] = []
    if node.type == "slice_expression":
        bounds = [bound for name in ("start", "end") if (bound := node.child_by_field_name(name)) is not None]
    elif node.type == "call_expression" and site.grammar is JAVASCRIPT:
        name = node.child_by_field_name("function").child_by_field_name("property")
        if name is not None and site.text(name) in ("slice", "substring", "substr"):
            bounds = list(node.child_by_field_name("arguments").named_children)
    for bound in bounds:
        yield Edit(bound.end_byte, bound.end_byte, " + 1" if site.rng.random() < 0.5 else " - 1")


def _break_continue(node: Node, site: Site) -> Iterator[Edit]:
    if node.type in ("break_statement", "continue_statement") and not node.named_children:
        parents = node.parent
        while parents is not None and parents.type not in site.grammar.loops | site.grammar.functions:
            if "switch" in parents.type or "select" in parents.type:
                return
            parents = parents.parent
        word = node.children[0]
        yield site.replace(word, "continue" if site.text(word) == "break" else "break")


def _wrong_variable(node: Node, site: Site) -> Iterator[Edit]:
    """An argument or operand that is a parameter is exchanged for another parameter of the function."""
    if node.type == "identifier" and node.parent.type in (site.grammar.arguments, "binary_expression"):
        function = node.parent
        while function is not None and function.type not in site.grammar.functions:
            function = function.parent
        names = _parameters(function, site) if function is not None else []
        others = [name for name in names if name != site.text(node)]
        if site.text(node) in names and others:
            yield site.replace(node, site.rng.choice(others))


def _parameters(function: Node, site: Site) -> list[str]:
    found = function.child_by_field_name("parameters")
    if found is None:
        return []
    inner = [child for group in found.named_children
             for child in ([group] if group.type == "identifier" else group.children_by_field_name("name"))]
    return [site.text(child) for child in inner]


KINDS: dict[str, Callable[[Node, Site], Iterator[Edit]]] = {
    "add_not": _add_not, "drop_not": _drop_not, "flip_boolean": _flip_boolean, "change_constant": _change_constant,
    "swap_and_or": _binary(lambda grammar: _LOGICAL), "drop_operand": _drop_operand,
    "flip_comparison": _binary(_equality), "change_boundary": _binary(lambda grammar: BOUNDARY),
    "change_arithmetic": _binary(lambda grammar: ARITHMETIC), "change_augmented": _change_augmented,
    "swap_operands": _swap_operands, "swap_ternary": _swap_ternary, "slice_off_by_one": _slice_off_by_one,
    "swap_arguments": _swap_arguments, "wrong_function": _wrong_function, "swap_branches": _swap_branches,
    "drop_guard": _drop_if(True), "drop_conditional": _drop_if(False), "drop_loop": _drop_loop,
    "drop_statement": _drop_statement, "shuffle_lines": _shuffle_lines, "break_continue": _break_continue,
    "wrong_variable": _wrong_variable,
}  # fmt: skip
GRAMMARS = {".js": JAVASCRIPT, ".mjs": JAVASCRIPT, ".cjs": JAVASCRIPT, ".jsx": JAVASCRIPT, ".go": GO}


@functools.cache
def parser(name: str) -> Any:
    """The parser of a language; raises UserError where tree-sitter-language-pack is not installed."""
    try:
        import tree_sitter_language_pack
    except ImportError as error:
        raise UserError("languages other than Python need the package tree-sitter-language-pack") from error
    return tree_sitter_language_pack.get_parser(name)


def candidates(
    source: str, path: str, kinds: Collection[str] | None = None, max_function_lines: int | None = None,
    rng: random.Random | None = None, rules: Mapping[str, Callable[[Node, Site], Iterator[Edit]]] = KINDS,
) -> list[Injection]:
    """All defects of the given kinds of `rules` that a module's functions allow, in source order; as inject.candidates.

    Raises:
      UserError: an unknown kind or file ending, or tree-sitter-language-pack is not installed.
    """
    unknown = sorted(set(kinds or ()) - set(rules))
    if unknown:
        raise UserError(f"kinds: unknown {unknown[0]!r}; allowed: {', '.join(rules)}")
    grammar = GRAMMARS.get(pathlib.PurePosixPath(path).suffix)
    if grammar is None:
        raise UserError(f"{path}: no language known by this ending; allowed: {', '.join(GRAMMARS)}")
    if is_test_path(path):
        return []
    data = source.encode()
    tree = parser(grammar.name).parse(data)
    if tree.root_node.has_error:
        return []
    site = Site(data, grammar, rng or random.Random(0))
    chosen = [(kind, rules[kind]) for kind in rules if kinds is None or kind in kinds]
    found = []
    for node, function, name in _walk(tree.root_node, site, None, ""):
        if max_function_lines and function.end_point[0] - function.start_point[0] >= max_function_lines:
            continue
        for kind, edits in chosen:
            for edit in edits(node, site):
                start, end = (len(data[:at].decode()) for at in (edit.start, edit.end))
                if source[start:end] != edit.new:
                    found.append(Injection(kind, path, name, function.start_point[0] + 1, function.end_point[0] + 1,
                                           source, start, end, edit.new))  # fmt: skip
    return sorted(found, key=lambda i: (i.start, i.end, i.kind, i.new))


def function_spans(source: str, path: str) -> tuple[tuple[str, int, int], ...]:
    """(name, first line, last line) of all named functions of a module, in the order of its text.

    Raises:
      UserError: tree-sitter-language-pack is not installed.
    """
    grammar, data = GRAMMARS[pathlib.PurePosixPath(path).suffix], source.encode()
    tree = parser(grammar.name).parse(data)
    site = Site(data, grammar, random.Random(0))
    found = {(name, function.start_point[0] + 1, function.end_point[0] + 1)
             for _, function, name in _walk(tree.root_node, site, None, "")}
    return tuple(sorted(found, key=lambda span: (span[1], -span[2])))


def parses(text: str, path: str) -> bool:
    """Whether a text is one of its language; raises UserError where tree-sitter-language-pack is not installed."""
    return not parser(GRAMMARS[pathlib.PurePosixPath(path).suffix].name).parse(text.encode()).root_node.has_error


def _walk(node: Node, site: Site, function: Node | None, name: str) -> Iterator[tuple[Node, Node, str]]:
    """(node, innermost named function around it, its name) for all nodes in bodies of functions."""
    if node.type in ("class_declaration", "class"):
        own = node.child_by_field_name("name")
        name = site.text(own) if own is not None else name
    if node.type in site.grammar.functions:
        own = _name(node, site)
        if own:
            outer = name if node.type == "method_definition" else ""
            function, name = node, f"{outer}.{own}" if outer else own
        body = node.child_by_field_name("body")
        if body is not None and function is not None:
            yield from _children(body, site, function, name)
        return
    yield from _children(node, site, function, name)


def _children(node: Node, site: Site, function: Node | None, name: str) -> Iterator[tuple[Node, Node, str]]:
    if function is not None:
        yield node, function, name
    for child in node.named_children:
        yield from _walk(child, site, function, name)


def _name(node: Node, site: Site) -> str:
    """A function's name: its own, or of what it is assigned to; in Go with the receiver's type."""
    own = node.child_by_field_name("name")
    if own is None and node.parent is not None:
        place = node.parent
        fields = ("property",) if place.type == "field_definition" else ("name", "left", "key")
        own = next((found for field in fields if (found := place.child_by_field_name(field)) is not None), None)
    if own is None:
        return ""
    name = site.text(own).split(".")[-1]
    receiver = node.child_by_field_name("receiver")
    if receiver is not None:
        kind = site.text(receiver).strip("()").split()[-1].lstrip("*").split("[")[0]
        return f"{kind}.{name}"
    return name
