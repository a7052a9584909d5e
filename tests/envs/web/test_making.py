"""Templates of pages and defects in them, without a browser."""

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
    assert not any("{{" in text for text in files.values())
    (suite,) = page_tests.suites(files).values()
    assert {test.width for test in suite.tests} == set(page_tests.WIDTHS)
    assert factory.is_pages(sources.locate(f"pages:{name}:3", tmp_path))
    for path in ("index.html", "style.css", "app.js"):
        found = inject.candidates(files[path], path)
        assert found, path
        assert all(one.before_source[:one.start] + one.new + one.before_source[one.end:] == one.after_source
                   != files[path] for one in found)


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
