"""Templates of pages and defects in them, without a browser."""

import json
import re

import pytest

from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.synthesis.pages import catalog, factory, inject
from qcn_jax.envs.tasks import permissions
from qcn_jax.envs.web import page_tests
from qcn_jax.errors import UserError


@pytest.mark.parametrize("name", catalog.NAMES)
def test_template_is_filled_and_has_defects_of_each_kind_of_file(name, tmp_path):
    files = catalog.fill(f"pages:{name}:3")
    assert files == catalog.fill(f"pages:{name}:3")
    assert not any(re.search(r"\{\{\w*\}\}", text) for text in files.values())
    (suite,) = page_tests.suites(files).values()
    assert {test.width for test in suite.tests} == set(page_tests.WIDTHS)
    assert factory.is_pages(sources.locate(f"pages:{name}:3", tmp_path))
    assert {"index.html", "style.css"} < files.keys()
    for path in sorted(files.keys() - {"tests/page.web.json", "src/main.jsx"}):
        found = inject.candidates(files[path], path)
        assert found, path
        assert all(one.before_source[:one.start] + one.new + one.before_source[one.end:] == one.after_source
                   != files[path] for one in found)


COMPONENT = """export default function Panel({ items, at }) {
  const [open, setOpen] = useState(new Set());
  useEffect(() => {
    const timer = setInterval(tick, 1000);
    return () => clearInterval(timer);
  }, [at, open]);
  return (
    <div>
      <button onClick={more}>More</button><input disabled onChange={less} />
      {open && <p>{[...items].length}</p>}
    </div>
  );
}
"""


@pytest.mark.parametrize("kind, changed", [
    ("jsx_drop_attribute", ["<button>More</button><input disabled onChange={less} />",
                            "<button onClick={more}>More</button><input onChange={less} />",
                            "<button onClick={more}>More</button><input disabled />"]),
    ("jsx_wrong_event", ["<button onDoubleClick={more}>More</button><input disabled onChange={less} />",
                         "<button onClick={more}>More</button><input disabled onBlur={less} />"]),
    ("jsx_wrong_handler", ["<button onClick={less}>More</button><input disabled onChange={more} />"]),
    ("jsx_drop_condition", ["{<p>{[...items].length}</p>}"]),
    ("react_drop_dependency", ["}, [at]);", "}, [open]);"]),
    ("react_drop_cleanup", ["}, [at, open]);"]),
    ("react_drop_copy", ["{open && <p>{items.length}</p>}"]),
])  # fmt: skip
def test_mistakes_of_components(kind, changed):
    found = inject.candidates(COMPONENT, "src/Panel.jsx", [kind])
    lines = [one.after_source.splitlines()[one.before_source.count("\n", 0, one.start)].strip() for one in found]
    assert lines == changed
    assert all(one.kind == kind and one.qualname == "Panel" and one.path == "src/Panel.jsx" for one in found)


def test_words_fit_into_scripts_and_pages():
    for name in catalog.NAMES:
        for choices in json.loads((catalog.FOLDER / name / "words.json").read_text()).values():
            assert not [word for word in choices if set(word) & set("'\"\\<>{}&`")], name


def test_words_differ_from_seed_to_seed():
    assert len({catalog.fill(f"pages:checklist:{seed}")["index.html"] for seed in range(20)}) > 5


def test_unknown_template_is_refused():
    with pytest.raises(UserError, match="pages:shop:1.* allowed: pages:NAME:SEED with NAME one of basket"):
        catalog.fill("pages:shop:1")


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="unknown 'css_hide'; allowed: css_drop_declaration"):
        inject.candidates("", "style.css", ["css_hide"])


@pytest.mark.parametrize("path, why", [
    ("src/app.js", ""), ("pages/new.html", ""), ("tests/a.web.json", "is a test"), ("a.web.json", "is a test"),
    ("package.json", "steers how tests or builds run"), ("vite.config.js", "steers how tests or builds run"),
    ("node_modules/x/y.js", "steers how tests or builds run"), (".env", "is hidden"),
])  # fmt: skip
def test_what_a_patch_may_touch(path, why):
    assert permissions.page_refusal(path) == why


def test_statement_says_what_was_done_and_seen():
    test = page_tests.PageTest("one", ({"type": "Milk", "into": {"label": "New"}}, {"pass": True},
                                       {"click": {"role": "button", "name": "Add"}}, {"see": {"text": "Milk"}}), width=375)
    assert factory.statement(test, "step 4: there is no text “Milk”") == (
        "I opened index.html in a window of 375 pixels, then: type “Milk” into field “New”; click button “Add”. "
        "Now there is no text “Milk”.")
