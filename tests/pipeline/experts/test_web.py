"""The web expert: its tasks are pages, and a page must also survive a look at it."""

import dataclasses

import pytest

from qcn_jax.agents.services import Services
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import PAGES
from qcn_jax.envs.web.judge import Review
from qcn_jax.pipeline.experts.swe import SWE
from qcn_jax.pipeline.experts.tool_format import TOOL_FORMAT
from qcn_jax.pipeline.experts.web import WEB
from qcn_jax.recipes.nano.scaffold import NANO
from tests.agents import tiny
from tests.pipeline.experts.test_experts import RIGHT, SUBMIT, VIEW, WRONG, _live, encoder, play, services  # noqa: F401

PAGE = dataclasses.replace(tiny.make_task(), instance_id="page", language=PAGES)


def test_pages_are_its_tasks_and_others_are_not():
    tasks = [tiny.make_task(), PAGE]
    assert [prompt.task for prompt in WEB.prompts(tasks, NANO)] == [PAGE]
    assert [prompt.task for prompt in SWE.prompts(tasks, NANO)] == [tasks[0]]
    assert [prompt.task for prompt in TOOL_FORMAT.prompts(tasks, NANO, ["hermes"])] == [tasks[0]]
    assert WEB.absent({"pages": {"tasks": 3, "missing": ""}}) == ""
    assert WEB.absent({"pages": {"tasks": 0, "missing": "no Chromium"}}) == "no Chromium"


@pytest.mark.parametrize("edit, score, reward, asked", [(RIGHT, 0.8, 1.0, 1), (RIGHT, 0.6, 0.0, 1), (WRONG, 0.8, 0.0, 0)])
def test_what_passes_is_looked_at(encoder, services, edit, score, reward, asked):  # noqa: F811
    seen = []

    def review(task, patch):
        seen.append(patch)
        return Review(score)

    with_eyes = dataclasses.replace(services, grade=services.grade, review=review)
    task = dataclasses.replace(PAGE, language="python")  # what runs the tests here
    conversation = WEB.conversation(SWE.prompts([task], NANO)[0], encoder, with_eyes, max_turns=4)
    conversation.opening()
    for calls in ([VIEW], [edit], [SUBMIT]):
        said = NANO.render("", calls)
        conversation.reply([*encoder.tokenizer.encode(said), encoder.end], True)
    outcome = conversation.outcome(False)
    assert (outcome.reward, outcome.solved, len(seen)) == (reward, reward == 1.0, asked)
    assert outcome.detail.get("review", {}).get("score") == (score if asked else None)


def test_a_browser_that_fails_is_nobodys_fault(encoder, services):  # noqa: F811
    def broken(task, patch):
        raise SandboxError("the browser ended early")

    blind = Services(services.files, services.run_tests, services.grade, review=broken)
    conversation = WEB.conversation(SWE.prompts([tiny.make_task()], NANO)[0], encoder, blind, max_turns=4)
    conversation.opening()
    for calls in ([VIEW], [RIGHT], [SUBMIT]):
        conversation.reply([*encoder.tokenizer.encode(NANO.render("", calls)), encoder.end], True)
    assert conversation.outcome(False).infrastructure
