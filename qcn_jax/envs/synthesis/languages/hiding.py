"""Tests of JavaScript and Go that show a defect, taken out of the tree that an agent sees, as tasks/hidden.py does.

A Go function, or the statement of a JavaScript test, is cut from its file with the comments above it; what is around
tests goes where none is left in it, and a file without tests goes as a whole.
"""

import dataclasses
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from qcn_jax.envs.synthesis.build.container import ROOT
from qcn_jax.envs.synthesis.inject import treesitter
from qcn_jax.envs.synthesis.inject.treesitter import Node, Site
from qcn_jax.envs.synthesis.languages import LANGUAGES, go_module
from qcn_jax.envs.testpaths import is_test_path

_CALLED = re.compile(r"(?:\w+\.)*(?:test|it|specify|describe|suite|context)(?:\.\w+)*")
Changes = dict[str, str | None]


def without(language: str, tests: Iterable[str], files: Mapping[str, str], whole: bool = False) -> Changes | None:
    """Test files without some tests, None for those that go; None where a test is found in no file.

    Args:
      language: javascript or go.
      tests: ids of languages' log parsers.
      files: texts by path.
      whole: take the files out instead of cutting the tests from them.
    """
    endings = LANGUAGES[language].endings
    of_tests = {path: text for path, text in files.items() if path.endswith(endings) and is_test_path(path)}
    if language == "go":
        names = _go_places(list(tests), of_tests, files)
        return None if names is None else {path: None if whole else _cut_go(of_tests[path], wanted)
                                           for path, wanted in names.items()}
    titles = _javascript_places(list(tests), of_tests)
    return None if titles is None else {path: None if whole else _cut_javascript(of_tests[path], wanted)
                                        for path, wanted in titles.items()}


def _site(language: str, text: str) -> tuple[Node, Site]:
    grammar = treesitter.GO if language == "go" else treesitter.JAVASCRIPT
    data = text.encode()
    return treesitter.parser(language).parse(data).root_node, Site(data, grammar, random.Random(0))


def _without_lines(language: str, site: Site, nodes: Iterable[Node]) -> str | None:
    """The text without nodes, the comments above them and one side's empty lines; None where others share a line."""
    lines, edits = site.data.decode().split("\n"), [site.lines(node) for node in nodes]
    known = [edit for edit in edits if edit is not None]
    if len(known) < len(edits):
        return None
    for edit in sorted(known, key=lambda edit: -edit.start):
        start, end = site.data.count(b"\n", 0, edit.start), site.data.count(b"\n", 0, edit.end - 1) + 1
        while start > 0 and lines[start - 1].lstrip().startswith("//"):
            start -= 1
        while start > 0 and end < len(lines) and not lines[start - 1].strip() and not lines[end].strip():
            end += 1
        del lines[start:end]
    made = "\n".join(lines)
    return None if _site(language, made)[0].has_error else made


# Go: "module/folder::TestName/part".


def _go_places(tests: Sequence[str], of_tests: Mapping[str, str], files: Mapping[str, str]
               ) -> dict[str, set[str]] | None:
    module = go_module(files)
    places: dict[str, set[str]] = {}
    for test in tests:
        package, _, name = test.partition("::")
        name = name.partition("/")[0]
        folder = package.removeprefix(module).strip("/")
        path = next((path for path, text in of_tests.items() if path.rpartition("/")[0] == folder
                     and name and re.search(rf"(?m)^func {re.escape(name)}\(", text)), None)
        if path is None:
            return None
        places.setdefault(path, set()).add(name)
    return places


def _cut_go(text: str, names: Collection[str]) -> str | None:
    root, site = _site("go", text)
    functions = {site.text(node.child_by_field_name("name")): node for node in root.named_children
                 if node.type == "function_declaration"}
    if not any(name.startswith("Test") and name not in names for name in functions):
        return None
    made = _without_lines("go", site, [functions[name] for name in names]) if set(names) <= set(functions) else None
    return made and _without_imports(made, "\n".join(site.text(functions[name]) for name in names))


def _without_imports(text: str, gone: str) -> str | None:
    """The file without imports that only what is gone used, which Go would refuse."""
    root, site = _site("go", text)
    body, gone_too = _IMPORTS.sub("", text), []
    for declaration in (node for node in root.named_children if node.type == "import_declaration"):
        inner = declaration.named_children[0]
        specs = [inner] if inner.type == "import_spec" else inner.named_children
        unused = [spec for spec in specs if spec.type == "import_spec" and _used(site, spec, gone)
                  and not _used(site, spec, body)]
        everything = unused and len(unused) == sum(spec.type == "import_spec" for spec in specs)
        gone_too += [declaration] if everything else unused
    return _without_lines("go", site, gone_too) if gone_too else text


_IMPORTS = re.compile(r"(?m)^import (?:\([^)]*\)|.*)$")


def _used(site: Site, spec: Node, text: str) -> bool:
    own, path = spec.child_by_field_name("name"), site.text(spec.child_by_field_name("path")).strip('"`')
    parts = [part for part in path.split("/") if not re.fullmatch(r"v\d+", part)] or [path]
    name = site.text(own) if own is not None else re.sub(r"\.v\d+$", "", parts[-1])
    return re.search(rf"\b{re.escape(name)}\.", text) is not None


# JavaScript: "outer > inner", in mocha's reports "outer inner", in jest's with the file in front.


@dataclasses.dataclass
class _Test:
    titles: tuple[str, ...]
    statement: Node
    inner: "list[_Test]"

    def leaves(self) -> "list[_Test]":
        """The tests within, or itself."""
        return [leaf for one in self.inner for leaf in one.leaves()] or [self]


def _found(node: Node, site: Site, outer: tuple[str, ...] = ()) -> list[_Test]:
    found: list[_Test] = []
    for child in node.named_children:
        title = _title(child, site) if child.type == "expression_statement" else None
        titles = outer if title is None else (*outer, title)
        inner = _found(child, site, titles)
        found += inner if title is None else [_Test(titles, child, inner)]
    return found


def _title(statement: Node, site: Site) -> str | None:
    """What a test or a group of tests is called, where its name is written out."""
    call = statement.named_children[0] if statement.named_children else statement
    if call.type == "await_expression":
        call = call.named_children[0]
    if call.type != "call_expression" or not _CALLED.fullmatch(site.text(call.child_by_field_name("function"))):
        return None
    arguments = call.child_by_field_name("arguments").named_children
    if not arguments or arguments[0].type not in ("string", "template_string"):
        return None
    text = site.text(arguments[0])[1:-1]
    return None if "${" in text else re.sub(r"\\(.)", r"\1", text)


def _plain(titles: Sequence[str]) -> str:
    return " ".join(" ".join(titles).split())


def _javascript_places(tests: Sequence[str], of_tests: Mapping[str, str]
                       ) -> dict[str, set[tuple[str, ...]]] | None:
    known = {path: [leaf for one in _found(*_site("javascript", text)) for leaf in one.leaves()]
             for path, text in of_tests.items()}
    places: dict[str, set[tuple[str, ...]]] = {}
    for test in tests:
        parts = test.split(" > ")
        file = parts[0].removeprefix(f"{ROOT}/")
        name = _plain(parts[1:] if file in of_tests else parts)
        leaves = [(path, leaf) for path, found in known.items() for leaf in found
                  if path == file or file not in of_tests]
        # tape names assertions within a test, and sections of one name are numbered.
        matching = [(path, leaf) for path, leaf in leaves if _plain(leaf.titles) == name] or [
            (path, leaf) for path, leaf in leaves if name.startswith(f"{_plain(leaf.titles)} ")]
        if file in of_tests:
            places.setdefault(file, set())
        elif not matching:
            last = parts[-1].strip()
            if not (holding := [path for path, text in of_tests.items() if last and last in text]):
                return None
            matching = [(path, _Test((), None, [])) for path in holding]  # the titles of none: the whole file
        for path, leaf in matching:
            places.setdefault(path, set()).add(leaf.titles)
    return places


def _cut_javascript(text: str, wanted: Collection[tuple[str, ...]]) -> str | None:
    root, site = _site("javascript", text)
    found = _found(root, site)
    leaves = {leaf.titles for one in found for leaf in one.leaves()}
    if not wanted or not set(wanted) <= leaves or not leaves - set(wanted):
        return None
    nodes: list[Node] = []

    def cut(tests: Iterable[_Test]) -> None:
        for one in tests:
            if all(leaf.titles in wanted for leaf in one.leaves()):
                nodes.append(one.statement)
            else:
                cut(one.inner)

    cut(found)
    return _without_lines("javascript", site, nodes)
