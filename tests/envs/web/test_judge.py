"""The judge of pages: checks without a model, and one that looks at real screenshots through a real endpoint."""

import numpy as np
import pytest
from envs.web import looking
from envs.web.near_misses import PAGE

from qcn_jax.chat.endpoint import Endpoint
from qcn_jax.envs.sandbox import RepositorySpec, make_provider
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.synthesis.pages import catalog
from qcn_jax.envs.web import judge, page_tests, running
from qcn_jax.envs.web.judge import Judge
from qcn_jax.envs.web.page_tests import PageTest, Suite
from qcn_jax.errors import UserError

GOOD = ("checklist", "questions", "tabs", "filter")


@pytest.fixture(scope="module")
def url():
    with looking.endpoint() as (address, _):
        yield address


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A sandbox with good pages, one that is spoilt in ten ways, and one whose buttons do nothing; their suite."""
    folder, texts = tmp_path_factory.mktemp("looks"), {}
    for name in GOOD:
        texts |= {f"{name}/{path}": text for path, text in catalog.fill(f"pages:{name}:1").items() if "web.json" not in path}
    for name, style in looking.SPOILT.items():
        texts[f"{name}/index.html"] = texts["checklist/index.html"]
        texts[f"{name}/app.js"] = texts["checklist/app.js"]
        texts[f"{name}/style.css"] = texts["checklist/style.css"] + style
    texts["good/index.html"] = PAGE
    dead = PAGE.replace("addEventListener", "removeEventListener")
    texts["dead/index.html"] = dead.replace(".badge {", "#clear { margin-left: -60px; }\nmain { min-width: 1400px; }\n.badge {")
    suite = Suite(tuple(PageTest(name, (), f"{name}/index.html") for name in (*GOOD, *looking.SPOILT)))
    texts["all.web.json"] = suite.to_text()
    for path, text in texts.items():
        folder.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(path).write_text(text)
    with make_provider("local", str(tmp_path_factory.mktemp("state"))) as provider:
        provider.prepare(RepositorySpec("looks", str(folder)))
        with sandbox(provider, "looks") as made:
            yield made, suite


@pytest.mark.browser
def test_spoilt_screenshots_are_scored_below_good_ones(place, url):
    made, suite = place
    looks = running.look(made.ask_python, suite, suite.tests)
    eyes = Judge(Endpoint(url, "eyes", stream=False))
    scores = {test.name: judge.scored(eyes, [look.png]) for test, look in zip(suite.tests, looks, strict=True)}
    good, bad = ({name: scores[name] for name in names} for names in (GOOD, looking.SPOILT))
    assert len(bad) == 10 and max(bad.values()) < min(good.values()), scores


@pytest.mark.browser
def test_checks_and_actions_tell_a_dead_page_from_a_good_one(place, url):
    made, _ = place
    reviews = {}
    with looking.endpoint() as (address, seen):
        for name in ("good", "dead"):
            suite = Suite((PageTest("a", (), f"{name}/index.html"),))
            reviews[name] = judge.review(made.ask_python, suite, Judge(Endpoint(address, "eyes", stream=False)))
    good, dead = reviews["good"], reviews["dead"]
    assert good.checks == 1.0 and good.faults == () and good.acted == 1.0 and good.score > judge.LEAST
    assert dead.checks < 1.0 and dead.acted < good.acted and dead.score < judge.LEAST
    assert any("wider than its window" in fault for fault in dead.faults)
    assert any("“Join” and “Clear” overlap" in fault for fault in dead.faults)
    assert [images for text, images in seen if text.startswith("Checklist")] == [len(page_tests.WIDTHS)] * 2
    assert any("button “Join”" in text for text, _ in seen)


def test_judge_that_does_not_answer_as_asked_is_named(url):
    flag = "--config.web.judge_endpoint"
    eyes = Judge(Endpoint(url, "eyes", stream=False, flag=flag), ("one item",))  # this endpoint scores three
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=r"--config.web.judge_endpoint=http.*eyes does not answer as asked"):
        judge.scored(eyes, [looking.png(image)])
