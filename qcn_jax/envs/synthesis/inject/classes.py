"""Defects of whole classes. Each function maps (class, site) to the edits of one kind; names are those of what is hit.

Unlike the other kinds these look at a module's classes, not at its functions.
"""

from collections.abc import Iterator

import libcst as cst

from qcn_jax.envs.synthesis.inject.site import Edit, Site
from qcn_jax.envs.synthesis.inject.statements import delete

NamedEdits = Iterator[tuple[str, Edit]]  # name below the class ("" for the class itself) and edit


def drop_base(node: cst.ClassDef, site: Site) -> NamedEdits:
    """`class A(B, C)` loses one of its bases."""
    for number, base in enumerate(node.bases):
        start, end = site.span(base)
        if len(node.bases) == 1:
            if not node.keywords:
                yield "", Edit(site.span(node.name)[1], site.data.index(b")", end) + 1, "")
        elif number:
            yield "", Edit(site.span(node.bases[number - 1])[1], end, "")
        else:
            yield "", Edit(start, site.span(node.bases[1])[0], "")


def drop_method(node: cst.ClassDef, site: Site) -> NamedEdits:
    """A method is deleted."""
    for method in _methods(node):
        if not method.decorators:
            site.parents.append(node.body)
            for edit in delete(method, site):
                yield method.name.value, edit
            site.parents.pop()


def shuffle_methods(node: cst.ClassDef, site: Site) -> NamedEdits:
    """Two neighbouring methods change places."""
    methods = _methods(node)
    for first, second in zip(methods, methods[1:]):
        plain = all(line.comment is None for line in first.leading_lines)  # a comment belongs to its method
        if plain and not first.decorators and not second.decorators:
            yield first.name.value, site.swap(first, second)


def _methods(node: cst.ClassDef) -> list[cst.FunctionDef]:
    return [child for child in node.body.body if isinstance(child, cst.FunctionDef)]
