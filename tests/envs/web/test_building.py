"""Real Node, Vite and Chromium: pages are built of sources that nobody vouches for, and nothing of them is run or leaks."""

import base64
import json
import pathlib
import subprocess

import pytest

from qcn_jax.cli import main as cli
from qcn_jax.envs.patches import make_diff
from qcn_jax.envs.sandbox import RepositorySpec, make_provider
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.synthesis import make_tasks, plan
from qcn_jax.envs.tasks.schema import PAGES, Task, write_tasks
from qcn_jax.envs.web import building, page_tests, running, vendored
from qcn_jax.envs.web.page_tests import PageTest, Suite
from qcn_jax.errors import UserError

TESTS = "tests/page.web.json"
PLUS, SECRET = {"role": "button", "name": "Plus"}, "7f3b-expected"
COUNTS = PageTest("counts", ({"click": PLUS}, {"click": PLUS}, {"text": {"css": "output"}, "is": "2"}, {"see": {"css": "output"}}))
TOLD = PageTest(SECRET, ({"see": PLUS},))
FILES = {
    "index.html": '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Counter</title>\n'
                  '<link rel="stylesheet" href="style.css">\n</head>\n<body>\n<div id="root"></div>\n'
                  '<script type="module" src="/src/main.jsx"></script>\n</body>\n</html>\n',
    "style.css": "output {\n  font-size: 32px;\n}\n",
    "src/main.jsx": "import { createRoot } from 'react-dom/client';\nimport Counter from './Counter';\n\n"
                    "createRoot(document.querySelector('#root')).render(<Counter />);\n",
    "src/Counter.jsx": "import { useState } from 'react';\n\nexport default function Counter() {\n"
                       "  const [count, setCount] = useState(0);\n"
                       "  return <p><button onClick={() => setCount(count + 1)}>Plus</button><output>{count}</output></p>;\n}\n",
    # What must take no effect.
    "vite.config.js": "import { writeFileSync } from 'node:fs';\nwriteFileSync('ran', '');\nthrow new Error('ran');\n",
    "postcss.config.cjs": "throw new Error('ran');\n",
    "package.json": '{"scripts": {"postinstall": "touch ran"}, "browserslist": "extends ./postcss.config.cjs", "postcss": {"plugins":'
                    ' {"./postcss.config.cjs": {}}}, "browser": {"react": "./style.css"}}\n',
    "tsconfig.json": '{"extends": "/etc/passwd"}\n',
    ".env": "VITE_SECRET=1\n",
}
SUITE = Suite((COUNTS, TOLD), build="vite")


def written(folder: pathlib.Path, files: dict[str, str]) -> RepositorySpec:
    for path, text in files.items():
        folder.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(path).write_text(text)
    return RepositorySpec(folder.name, str(folder))


@pytest.fixture(name="provider", scope="module")
def _provider(tmp_path_factory):
    with make_provider("local", str(tmp_path_factory.mktemp("state"))) as provider:
        provider.prepare(written(tmp_path_factory.mktemp("counter"), FILES | {TESTS: SUITE.to_text()}))
        yield provider


@pytest.fixture(name="place")
def _place(provider):
    """A sandbox of the page, as an agent has one."""
    with sandbox(provider, next(iter(provider.prepared))) as place:
        yield place


def built(place, **changed: str) -> building.Built:
    """The build of a sandbox after changes; names have __ for a slash and _ for a dot."""
    for name, text in changed.items():
        place.write(name.replace("__", "/").replace("_", "."), text)
    return building.build(place.ask_python, SUITE, [TESTS], ["index.html"])


def contents(found: building.Built) -> str:
    assert found.fault == ""
    return "\n".join(base64.b64decode(data).decode("utf-8", "replace") for data in found.files.values())


pytestmark = [pytest.mark.browser, pytest.mark.vite]


def test_page_is_built_and_tested_and_nothing_of_the_tree_is_run(provider):
    (prepared,) = provider.prepared.values()
    assert prepared.baseline.outcomes == {f"{TESTS}::counts": "passed", f"{TESTS}::{SECRET}": "passed"}
    assert prepared.baseline.served == ("index.html", "src/Counter.jsx", "src/main.jsx", "style.css")
    with sandbox(provider, prepared.spec.name) as place:
        place.run_tests()
        assert place.changes() == {}  # no `ran`, no node_modules, nothing built
        overlay = {"src/Counter.jsx": FILES["src/Counter.jsx"].replace("count + 1", "count - 1")}
    with sandbox(provider, prepared.spec.name, overlay, role="grading") as place:
        run = place.run_tests()
    assert run.outcomes == {f"{TESTS}::counts": "failed", f"{TESTS}::{SECRET}": "passed"}
    assert run.messages[f"{TESTS}::counts"] == "step 3: element output reads “-2”, expected “2”"


def test_modules_come_from_the_lock_file_and_no_script_of_theirs_ran():
    folder = pathlib.Path(vendored.folder(""))
    assert (folder / "package-lock.json").read_bytes() == (vendored.MANIFEST / "package-lock.json").read_bytes()
    # esbuild's own would have put the program where a script of Node stands.
    assert (folder / "node_modules/esbuild/bin/esbuild").read_bytes().startswith(b"#!/usr/bin/env node")


@pytest.mark.parametrize("line, words", [
    ("import fs from 'fs';", "“fs” is neither a file of the tree nor among the vendored modules"),
    ("import { readFileSync } from 'node:fs';", "“node:fs” is neither"), ("import 'vite';", "“vite” is neither"),
    ("import 'https://example.org/a.js';", "“https://example.org/a.js” is neither"),
    ("import 'clsx';", "“clsx” is neither"), ("import x from '/etc/passwd?raw';", "“/etc/passwd?raw” is not a file of the tree"),
    ("import x from '../../../../etc/passwd?raw';", "“../../../../etc/passwd?raw” is not a file of the tree"),
    ("import x from './link.txt?raw';", "“./link.txt?raw” is not a file of the tree"),
    ("import x from '../tests/page.web.json';", "“../tests/page.web.json” is not a file of the tree"),
    ("const = 3;", 'Expected identifier but found "="'),
])  # fmt: skip
def test_what_cannot_be_imported_is_told_by_file_and_line(place, line, words):
    place.exec("ln -s /etc/passwd src/link.txt; mkdir -p node_modules/clsx && echo '{}' >node_modules/clsx/package.json")
    found = built(place, src__Counter_jsx=f"\n{line}\n{FILES['src/Counter.jsx']}")
    assert found.files == {} and found.fault.startswith(f"src/Counter.jsx:2: {words}"), found.fault


def test_failed_build_fails_the_tests_and_can_be_looked_at(place):
    place.write("src/main.jsx", "import './nothing';\n")
    run = place.run_tests()
    assert set(run.outcomes.values()) == {"failed"}
    told = "the build fails: src/main.jsx:1: “./nothing” is not a file of the tree"
    assert set(run.messages.values()) == {f"step 1: {told}"}
    (look,) = running.look(place.ask_python, SUITE, [PageTest("a", ())])
    (wide, _) = running.survey(place.ask_python, SUITE, ["index.html"])
    assert told in look.tree and wide.errors == (f"console: {told}",)


# Ways around the plugin: Vite resolves some names itself, and links of a folder are not asked for by name.
HIDDEN = {
    "style.css": ("style__css", "p { background: u\\72l(../../../../etc/passwd); }\n"),
    "import.meta.glob": ("src__main_jsx", "console.log(import.meta.glob('../../../../etc/*', { eager: true, query: '?raw' }),"
                         " import.meta.glob('/tests/*', { eager: true, query: '?raw' }), import.meta.env);\n"),
    "import.meta.url": ("src__main_jsx", "console.log(new URL('../../../../etc/passwd', import.meta.url));\n"),
    "attribute": ("index_html", FILES["index.html"].replace("<div", "<img src='../../../../etc/passwd'><img src='/tests/page.web.json'><div")),
    "folder": ("src__main_jsx", "import './Counter';\n"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_nothing_outside_of_the_tree_gets_into_a_page(place, name):
    place.exec("mkdir public; ln -s /etc/passwd public/passwd; ln -s /etc public/etc; echo fine >public/fine.txt")
    path, text = HIDDEN[name]
    found = built(place, **{path: text})
    assert found.fault.startswith("index.html: ") if name == "attribute" else found.fault == ""
    assert not any("passwd" in one or "etc" in one for one in found.files)
    text = contents(found) if found.files else found.fault
    assert "root:" not in text and SECRET not in text and "VITE_SECRET" not in text
    assert not found.files or "fine.txt" in found.files


def test_names_and_sizes_of_what_is_built_are_bounded(place, monkeypatch):
    place.exec("mkdir public && for i in 1 2 3 4; do head -c 1900000 /dev/zero | tr '\\0' a >public/$i.txt; done")
    assert built(place).fault.startswith("it makes 7 files of 8")
    place.exec("rm public/*.txt; for i in $(seq 420); do echo a >public/$i.txt; done")
    assert "at most 400 files" in built(place).fault
    # Whatever the process in the sandbox may answer.
    for name in ("../a.js", "/a.js", "a/../../b", "a\x00b", ""):
        answer = {"status": "ok", "value": {"files": {name: ""}}, "output": ""}
        assert "is not inside" in (fault := building.build(lambda *_: answer, SUITE, [], ["index.html"]).fault) or "\x00" in name and fault
    for value in ({"files": {"a": 1}}, {"files": []}, {}):
        answer = {"status": "ok", "value": value, "output": ""}
        assert building.build(lambda *_: answer, SUITE, [], ["index.html"]).fault == "Vite's answer cannot be read"
    monkeypatch.setattr(building, "HEAP_MB", 48)
    place.exec("rm -r public")
    many = "".join(f"export const a{number} = [{'1, ' * 500}];\n" for number in range(400))
    assert "memory" in built(place, src__many_js=many, src__main_jsx="import * as all from './many';\nconsole.log(all);\n").fault


def test_build_that_does_not_end_is_ended(place, monkeypatch):
    monkeypatch.setattr(building, "SECONDS", 4.0)
    place.write(f"src/{'a' * 200}.js", "")  # the pattern tries every way to divide the name
    place.write("src/main.jsx", "console.log(import.meta.glob('./*a*a*a*a*a*a*a*a*a*b.js'));\n")
    run = place.run_tests()
    assert set(run.messages.values()) == {"step 1: the build fails: it does not end within 4 seconds"}


def test_modules_that_a_user_has_are_built_from(provider, tmp_path):
    given = tmp_path / "given"
    subprocess.run(["cp", "-rl", vendored.folder(""), str(given)], check=True)
    own = given / "node_modules" / "shout"
    own.mkdir()
    (own / "package.json").write_text('{"name": "shout", "main": "index.js"}')
    (own / "index.js").write_text("module.exports = (text) => text.toUpperCase();\n")
    main = "import shout from 'shout';\n\ndocument.querySelector('#root').textContent = shout('loud');\n"
    suite = Suite((PageTest("shouts", ({"see": {"text": "LOUD"}},)),), build="vite")
    spec = written(tmp_path / "loud", FILES | {"src/main.jsx": main, TESTS: suite.to_text()})
    assert "“shout” is neither" in next(iter(provider.prepare(spec).baseline.messages.values()))
    with_own = RepositorySpec(spec.name, spec.archive, modules=str(given))
    assert provider.prepare(with_own).baseline.outcomes == {f"{TESTS}::shouts": "passed"}
    (given / "node_modules/react/package.json").unlink()
    with pytest.raises(UserError, match=rf"--modules={given}: holds no node_modules/react"):
        vendored.check(str(given), "--modules")


def test_without_npm_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert vendored.missing() == ("pages are built from modules that npm installs, and there is no npm; --modules names a folder "
                                  "that has them")


def test_pages_that_are_built_are_those_that_tests_visit():
    suite = Suite((PageTest("a", ({"open": "b.html?x#y"}, {"open": ""}), page="sub/"), COUNTS), build="vite")
    assert building.pages_of(suite) == ["sub/index.html", "index.html", "b.html"]
    assert page_tests.read("a.web.json", suite.to_text()) == suite


def test_solver_resolves_a_task_of_react_and_no_patch_does_not(provider, tmp_path, capsys):
    (spec,) = (prepared.spec for prepared in provider.prepared.values() if prepared.spec.name != "loud")
    good = FILES["src/Counter.jsx"]
    bad = good.replace("count + 1", "count - 1")
    task = Task("counter-1", spec.name, "", make_diff({"src/Counter.jsx": bad}, {"src/Counter.jsx": good}), "", "It counts down.",
                (f"{TESTS}::counts",), (f"{TESTS}::{SECRET}",), language=PAGES, path="src/Counter.jsx", function="Counter",
                bug_patch=make_diff({"src/Counter.jsx": good}, {"src/Counter.jsx": bad}), timeout=600.0)
    write_tasks(tmp_path / "tasks.jsonl", [task])
    given = [f"--tasks={tmp_path / 'tasks.jsonl'}", f"--repo={spec.archive}", "--sandbox=local", "--isolation=shared"]
    # Of the tasks the gold patch is tried first, and none.
    assert cli.main(["evaluate", *given, "--baseline=solver", f"--out={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["resolved"] == 1
    assert cli.main(["evaluate", *given, "--baseline=solver", "--modules=nowhere", f"--out={tmp_path / 'other'}"]) == 1
    assert "--modules=nowhere: holds no node_modules/vite" in capsys.readouterr().err


def test_what_pages_are_not_made_of_is_not_changed_and_failing_ones_are_told(tmp_path):
    files = {path: FILES[path] for path in ("index.html", "style.css", "src/main.jsx", "src/Counter.jsx")}
    unused = {"src/Unused.jsx": FILES["src/Counter.jsx"], "unused.css": FILES["style.css"]}
    broken = Suite((COUNTS, TOLD, PageTest("sells", ({"see": {"text": "Buy"}},))), build="vite")
    written(tmp_path / "counted", files | unused | {TESTS: broken.to_text()})
    lines: list[str] = []
    request = make_tasks.Request((str(tmp_path / "counted"),), tmp_path / "work", sandbox="local",
                                 settings=plan.Settings(kinds=("change_arithmetic",), reruns=0))
    tasks, yields = make_tasks.make_tasks(request, lines.append)
    assert [(task.path, task.FAIL_TO_PASS, task.language) for task in tasks] == [("src/Counter.jsx", (f"{TESTS}::counts",), PAGES)]
    assert sum(row["candidates"] for row in yields["kinds"].values()) == 1
    assert f"counted: 1 of 3 tests fail on the pages as they are: {TESTS}::sells: step 1: there is no text “Buy”" in lines
