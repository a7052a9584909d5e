"""Defects of React components, over tree-sitter: mistakes that people make with JSX, hooks and state.

Handlers on the wrong event, conditions that show too much, effects that do not see what changed or are never ended,
state that is changed in place. What JavaScript itself allows is in inject.treesitter.
"""

import re
from collections.abc import Callable, Iterator

from qcn_jax.envs.synthesis.inject.site import Edit
from qcn_jax.envs.synthesis.inject.treesitter import Node, Site

_DROPPED = re.compile(r"on[A-Z]\w*|disabled|checked|value|htmlFor|id|role|tabIndex|className|key|ref|aria-[a-z]+|style")
_EVENTS = {"onClick": "onDoubleClick", "onChange": "onBlur", "onSubmit": "onReset", "onKeyDown": "onKeyUp",
           "onFocus": "onBlur", "onBlur": "onFocus", "onMouseEnter": "onMouseLeave"}  # fmt: skip
_HOOKS = ("useEffect", "useLayoutEffect", "useMemo", "useCallback")


def _name(node: Node, site: Site) -> str:
    return site.text(node.named_children[0])


def _drop_attribute(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "jsx_attribute" and _DROPPED.fullmatch(_name(node, site)):
        start = len(site.data[: node.start_byte].rstrip())
        yield Edit(start, node.end_byte, "")


def _wrong_event(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "jsx_attribute" and (other := _EVENTS.get(_name(node, site))):
        yield site.replace(node.named_children[0], other)


def _wrong_handler(node: Node, site: Site) -> Iterator[Edit]:
    """Handlers of neighbours, exchanged."""
    if node.type in ("jsx_element", "jsx_fragment"):
        groups = [found for child in node.named_children if (found := list(_handlers(child, site)))]
        for before, after in zip(groups, groups[1:]):
            if site.text(before[-1]) != site.text(after[0]):
                yield site.swap(before[-1], after[0])


def _handlers(node: Node, site: Site) -> Iterator[Node]:
    if node.type == "jsx_attribute":
        if _name(node, site).startswith("on") and len(node.named_children) == 2:
            yield node.named_children[1]
    elif node.type in ("jsx_element", "jsx_opening_element", "jsx_self_closing_element"):
        for child in node.named_children:
            yield from _handlers(child, site)


def _drop_condition(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "jsx_expression" and node.named_children and node.named_children[0].type == "binary_expression":
        both = node.named_children[0]
        if site.text(both.child_by_field_name("operator")) == "&&":
            yield site.replace(both, site.text(both.child_by_field_name("right")))


def _called(node: Node, site: Site) -> str:
    """What a call calls, without what it is called on."""
    return site.text(node.child_by_field_name("function")).split(".")[-1] if node.type == "call_expression" else ""


def _drop_dependency(node: Node, site: Site) -> Iterator[Edit]:
    if _called(node, site) in _HOOKS:
        listed = node.child_by_field_name("arguments").named_children[-1]
        if listed.type == "array":
            items = listed.named_children
            for at in range(len(items)):
                yield site.replace(listed, f"[{', '.join(site.text(one) for one in items if one != items[at])}]")


def _drop_cleanup(node: Node, site: Site) -> Iterator[Edit]:
    if node.type == "return_statement" and node.named_children and node.named_children[0].type == "arrow_function":
        hook = node
        for kind in ("statement_block", "arrow_function", "arguments", "call_expression"):
            hook = hook.parent
            if hook is None or hook.type != kind:
                return
        if _called(hook, site) in _HOOKS and (edit := site.lines(node)) is not None:
            yield edit


def _drop_copy(node: Node, site: Site) -> Iterator[Edit]:
    """State that is changed in place is, to React, the same as before."""
    if node.type == "new_expression":
        given = node.child_by_field_name("arguments")
        if site.text(node.child_by_field_name("constructor")) in ("Set", "Map") and given is not None and [
                one.type for one in given.named_children] == ["identifier"]:
            yield site.replace(node, site.text(given.named_children[0]))
    elif node.type == "array" and [one.type for one in node.named_children] == ["spread_element"]:
        yield site.replace(node, site.text(node.named_children[0].named_children[0]))


KINDS: dict[str, Callable[[Node, Site], Iterator[Edit]]] = {
    "jsx_drop_attribute": _drop_attribute, "jsx_wrong_event": _wrong_event, "jsx_wrong_handler": _wrong_handler,
    "jsx_drop_condition": _drop_condition, "react_drop_dependency": _drop_dependency,
    "react_drop_cleanup": _drop_cleanup, "react_drop_copy": _drop_copy,
}  # fmt: skip
