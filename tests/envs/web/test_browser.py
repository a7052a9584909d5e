"""A real Chromium in real sandboxes: near misses fail, and nothing that a page does changes what is said of it."""

import pathlib

import pytest
from envs.web import near_misses
from envs.web.near_misses import NEAR_MISSES, PAGE

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import RepositorySpec, make_provider
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.synthesis import verify
from qcn_jax.envs.tasks.grading import Grader
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.envs.web import page_tests, running
from qcn_jax.envs.web.page_tests import PageTest, Suite

TESTS = "tests/page.web.json"


def written(folder: pathlib.Path, files: dict[str, str]) -> RepositorySpec:
    for path, text in files.items():
        folder.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(path).write_text(text)
    return RepositorySpec(folder.name, str(folder))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    with make_provider("local", str(tmp_path_factory.mktemp("state"))) as provider:
        yield provider


@pytest.fixture(scope="module")
def run(local, tmp_path_factory):
    """All tests of all copies, in one browser."""
    return local.prepare(written(tmp_path_factory.mktemp("copies"), near_misses.files())).baseline


@pytest.mark.browser
def test_good_page_passes(run):
    good = {name: outcome for name, outcome in run.outcomes.items() if "::good: " in name}
    assert len(good) == len(near_misses.TESTS)
    assert set(good.values()) == {"passed"}, run.messages


@pytest.mark.browser
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_fails(run, name):
    _, _, test, words = NEAR_MISSES[name]
    test_id = f"{TESTS}::{name}: {test}"
    assert run.outcomes[test_id] == "failed"
    assert words in run.messages[test_id]


def task_of(spec: RepositorySpec, good: str, bad: str, tests: tuple[PageTest, ...], failing: list[str]) -> Task:
    ids = [f"{TESTS}::{test.name}" for test in tests]
    return Task("pages-1", spec.name, "", patches.make_diff({"index.html": bad}, {"index.html": good}), "",
                "Whoever joins is not greeted.", tuple(one for one in ids if one.split("::")[1] in failing),
                tuple(one for one in ids if one.split("::")[1] not in failing), language=PAGES, path="index.html",
                bug_patch=patches.make_diff({"index.html": good}, {"index.html": bad}), timeout=600.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A provider, and a task whose page has lost the focus."""
    old, new, failing, _ = NEAR_MISSES["focus_lost"]
    files = {"index.html": PAGE, TESTS: Suite(near_misses.TESTS[:2]).to_text()}
    spec = written(tmp_path_factory.mktemp("signup"), files)
    with make_provider("local", str(tmp_path_factory.mktemp("state"))) as provider:
        provider.prepare(spec)
        yield provider, task_of(spec, PAGE, PAGE.replace(old, new), near_misses.TESTS[:2], [failing])


@pytest.mark.browser
def test_gold_resolves_and_nothing_does_not(world):
    provider, task = world
    check = verify.verify_task(provider, task)
    assert check.problems == ()


@pytest.mark.browser
def test_patch_may_not_change_tests_nor_ask_for_the_driver(world):
    provider, task = world
    bad = patches.apply_changes({"index.html": PAGE}, task.bug_patch)["index.html"]
    suite = provider.files(task.repo)[TESTS]
    weaker = patches.make_diff({TESTS: suite}, {TESTS: suite.replace('{"focus": {"label": "Your name"}}', '{"pass": true}')})
    verdict = Grader(provider).grade(task, weaker)
    assert (verdict.outcome, verdict.dropped) == ("empty_patch", {TESTS: "is a test"})
    asking = bad.replace("field('name').value = '';\n});", "if (navigator.webdriver) field('name').focus();\n});", 1)
    verdict = Grader(provider).grade(task, patches.make_diff({"index.html": bad}, {"index.html": asking + " "}))
    assert verdict.outcome in ("unresolved", "suspected_exploit")
    assert verdict.caught


@pytest.mark.browser
def test_page_reads_no_tests_and_reaches_no_files(local, tmp_path):
    page = PAGE.replace("const field =", """
for (const place of ['/tests/page.web.json', '/../../../etc/passwd', '/%2e%2e/%2e%2e/etc/passwd', 'file:///etc/passwd',
                     'http://127.0.0.1:9222/json', 'https://example.org/']) {
  fetch(place).then((answer) => answer.ok ? answer.text() : '').then((text) => {
    if (text) document.querySelector('h1').textContent += text; }).catch(() => {});
}
const field =""")
    suite = Suite((PageTest("reads", ({"text": {"css": "h1"}, "is": "Sign up"},)),))
    spec = written(tmp_path / "reader", {"index.html": page, TESTS: suite.to_text()})
    run = local.prepare(spec).baseline
    # The heading is as it was; that what the page asked for was not there is the failure.
    assert run.messages[f"{TESTS}::reads"].startswith("step 2: ")


@pytest.mark.browser
def test_looks_and_what_there_is(local, tmp_path):
    spec = written(tmp_path / "looks", {"index.html": PAGE, TESTS: Suite(near_misses.TESTS[:1]).to_text()})
    local.prepare(spec)
    suite = page_tests.suites(local.files(spec.name))[TESTS]
    views = [PageTest("before", ()), PageTest("after", near_misses.TESTS[0].steps[:2])]
    with sandbox(local, spec.name) as place:
        before, after = running.look(place.ask_python, suite, views)
        found = running.survey(place.ask_python, suite, ["index.html"])
    assert before.png.startswith(b"\x89PNG") and before.png != after.png
    assert "Ada" in after.tree and "Ada" not in before.tree
    assert [one.width for one in found] == list(page_tests.WIDTHS)
    assert [(one.fits, one.errors) for one in found] == [(True, ())] * 2
    joins = [element for one in found for element in one.elements if element.name == "Join"]
    assert [(element.role, element.hidden) for element in joins] == [("button", "")] * 2
    assert all(element.box[2:] == (96, 40) for element in joins)


@pytest.mark.browser
def test_movements_are_at_their_end(local, tmp_path):
    """Transitions of an hour, one begun by another's end, and a turning wheel that never ends."""
    style = """
#status { transition: opacity 3600s, margin-left 3600s; opacity: 0.01; }
#status:not(:empty) { opacity: 1; }
.badge { animation: turn 2s infinite linear; }
@keyframes turn { to { transform: rotate(360deg); } }
</style>"""
    page = PAGE.replace("</style>", style).replace("field('clear').addEvent", """
field('status').addEventListener('transitionend', (event) => {
  field('status').style.marginLeft = '40px';
  if (event.propertyName === 'margin-left') field('status').textContent += '!';
});
field('clear').addEvent""").replace("<footer>", '<p class="badge">o</p><footer>')
    steps = ({"type": "Ada", "into": near_misses.NAME}, {"click": near_misses.JOIN}, {"see": {"text": "Welcome, Ada!"}})
    spec = written(tmp_path / "moving", {"index.html": page, TESTS: Suite((PageTest("moves", steps),)).to_text()})
    assert local.prepare(spec).baseline.outcomes == {f"{TESTS}::moves": "passed"}


@pytest.mark.browser
def test_page_that_never_answers_is_given_up(local, tmp_path):
    page = PAGE.replace("field('name').focus();", "for (;;) {}")
    spec = written(tmp_path / "hung", {"index.html": page, TESTS: Suite(()).to_text()})
    local.prepare(spec)
    suites = {TESTS: Suite(near_misses.TESTS[:1])}
    with sandbox(local, spec.name) as place:
        run = running.run_tests(place.ask_python, suites, None, timeout=30.0)  # a third of it for each test
    assert run["outcomes"] == {f"{TESTS}::joins": "failed"}
    assert "does not answer" in run["messages"][f"{TESTS}::joins"]
