"""The tool-format expert on requests: what planted answers earn, which template asks for which, what is counted."""

import dataclasses

import pytest

from qcn_jax.agents.episode import EndReason
from qcn_jax.chat import templates
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.chat.tool_calls import ToolCall
from qcn_jax.config import RunConfig, ToolCallsConfig
from qcn_jax.envs.calls import schema
from qcn_jax.errors import UserError
from qcn_jax.pipeline.experts.tool_format import TOOL_FORMAT
from qcn_jax.pipeline.report.called_tools import called_tools
from qcn_jax.pipeline.rl.records import Outcome
from qcn_jax.recipes.nano.scaffold import NANO
from tests.agents import tiny
from tests.envs.calls.test_calls import RIGHT, ROW
from tests.pipeline.experts.test_experts import ADDED

BOOKED, CANCELLED = ToolCall("book_table", RIGHT), ToolCall("cancel_table", {})
WORDS = "I cannot do that."


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(Tokenizer.train([tiny.GOOD], 256 + len(ADDED) + 10, ADDED))


def expert(*rows):
    return dataclasses.replace(TOOL_FORMAT, requests=tuple(schema.to_task(ROW | row) for row in rows), edits=False)


def answered(encoder, text, template="hermes", close=True, reward=None, **row):
    """(outcome, reply, opening as text) of one answer, text or calls."""
    (prompt,) = expert(row).prompts([], NANO, [template])
    conversation = prompt.expert.conversation(prompt, encoder, None, max_turns=8, unfinished_penalty=0.25, reward=reward)
    opening = encoder.tokenizer.decode(conversation.opening())
    said = text if isinstance(text, str) else templates.render(template, "", text)
    reply = conversation.reply([*encoder.tokenizer.encode(said), *([encoder.end] if close else [])], close)
    assert reply.done and conversation.messages[-1] == {"role": "assistant", "content": said}
    return conversation.outcome(False), reply, opening


def call(**changes):
    return [ToolCall("book_table", {key: value for key, value in (RIGHT | changes).items() if value is not None})]


@pytest.mark.parametrize("template", ["hermes", "minimax_m2", "qwen3_coder"])
@pytest.mark.parametrize(("said", "row", "reward", "malformed"), [
    ([BOOKED], {}, 1.0, False), ([CANCELLED], {}, 0.5, False), ([BOOKED, CANCELLED], {}, 0.5, False),
    ([CANCELLED], {"calls": "any"}, 1.0, False), (call(guests=5), {}, 0.5, False),
    (call(guests="many"), {}, 0.0, True), (call(place=None), {}, 0.0, True), (call(hour=7), {}, 0.0, True), (call(place="roof"), {}, 0.0, True),
    (WORDS, {}, 0.0, True), (templates.render("toolace", "", [BOOKED]), {}, 0.0, True),
    (WORDS, {"calls": []}, 1.0, False), ([BOOKED], {"calls": []}, 0.0, False), (templates.render("toolace", "", [BOOKED]), {"calls": []}, 0.0, True),
])
def test_what_planted_answers_earn(encoder, template, said, row, reward, malformed) -> None:
    outcome, reply, _ = answered(encoder, said, template, **row)
    assert (outcome.reward, outcome.solved, reply.malformed) == (reward, reward == 1.0, malformed)
    assert outcome.finished and not outcome.infrastructure and outcome.detail["resolved"] == outcome.solved
    assert outcome.detail["call"]["why"] or reward == 1.0


def test_the_template_lists_the_tools_and_text_of_users_is_text(encoder) -> None:
    system = "Be kind.<|im_end|>"
    _, _, opening = answered(encoder, WORDS, "deepseekv31", system=system)
    assert opening.startswith("<|im_start|>system\nBe kind.<|im_end|>\n\n") and "### book_table\n" in opening
    assert opening.endswith("<|im_start|>user\nA table for 4 in the garden, for Ida.<|im_end|>\n<|im_start|>assistant\n")
    (prompt,) = expert({"system": system}).prompts([], NANO, ["deepseekv31"])
    tokens = prompt.expert.conversation(prompt, encoder, None, max_turns=1).opening()
    assert tokens.count(encoder.end) == 2  # those of the frame


def test_a_turn_that_was_cut_off_calls_nothing(encoder) -> None:
    outcome, reply, _ = answered(encoder, [BOOKED], close=False)
    assert (outcome.reward, outcome.finished, reply.malformed) == (0.0, False, True)
    assert outcome.detail["reason"] == EndReason.LENGTH_LIMIT and outcome.detail["call"]["why"] == "cut off"


def test_a_reward_of_the_configuration_takes_the_place(encoder) -> None:
    reward = lambda result, verdict, penalty: Outcome(penalty + verdict.resolved, True, result.turns == 1)
    outcome, _, _ = answered(encoder, [BOOKED], reward=reward)
    assert (outcome.reward, outcome.finished, outcome.detail["call"]["right"]) == (1.25, True, True)


def test_templates_come_in_turn_and_only_where_they_can_say_it() -> None:
    two = {"calls": [*ROW["calls"], {"name": "cancel_table"}]}
    both = expert({}, {"id": "b"}, {"id": "c"} | two).prompts([tiny.make_task()], NANO, ["hermes", "toolace"], ["react"])
    assert [(p.task.instance_id, p.template, p.unseen) for p in both] == [
        ("a", "hermes", False), ("b", "toolace", False), ("c", "hermes", False), *((name, "react", True) for name in "abc")]
    beside = dataclasses.replace(expert({}), edits=True).prompts([tiny.make_task()], NANO, ["hermes"])
    assert [p.task.repo for p in beside] == ["tiny==1", "calls"]
    spaced = {"name": "book table", "parameters": {"type": "object"}}
    with pytest.raises(UserError, match="request a: none of the templates hermes can say its calls"):
        expert({"tools": [spaced], "calls": [{"name": "book table"}]}).prompts([], NANO, ["hermes"])


def test_configuration_gives_requests_of_each_split(tmp_path) -> None:
    config = RunConfig(tool_calls=ToolCallsConfig(made=3, kinds=("none", "array")))
    train, heldout = (TOOL_FORMAT.configured(config, split) for split in ("train", "heldout"))
    assert [task.instance_id for task in train.own_tasks()] == ["call_none_train_0_0", "call_array_train_0_1", "call_none_train_0_2"]
    assert train.own_tasks() != heldout.own_tasks() and train.edits and not TOOL_FORMAT.configured(RunConfig(), "train").requests
    with pytest.raises(UserError, match="--config.tool_calls.edits: is off, and there are no requests"):
        TOOL_FORMAT.configured(RunConfig(tool_calls=ToolCallsConfig(edits=False)), "train")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="--config.tool_calls.data=.*empty.jsonl: holds no request"):
        TOOL_FORMAT.configured(RunConfig(tool_calls=ToolCallsConfig(data=str(tmp_path / "empty.jsonl"))), "train")


def row(name, template, measures, kind="choice", unseen=False):
    parsed, valid, right = measures
    return {"instance_id": name, "kind": template, "solved": right, "infrastructure": False, "turns": 1, "malformed": not valid,
            "call": {"parsed": parsed, "valid": valid, "right": right, "kind": kind}} | ({"unseen": True} if unseen else {})


def test_numbers_are_counted_by_template_and_kind_and_shown() -> None:
    rows = [row("a", "hermes", (1, 1, 1)), row("b", "hermes", (1, 0, 0), "none"), row("c", "react", (0, 0, 0)),
            row("a", "glm46", (1, 1, 0), unseen=True)]
    found = TOOL_FORMAT.metrics(rows)
    calls = found["tool_format"]["calls"]
    assert [calls[name]["resolved"] for name in ("parsed", "valid", "right")] == [2, 1, 1] and calls["valid"]["attempted"] == 3
    assert calls["by_template"]["hermes"]["valid"]["rate"] == 0.5 and calls["by_kind"]["none"]["parsed"]["rate"] == 1.0
    assert found["tool_format"]["unseen"]["calls"]["by_template"]["glm46"]["right"]["rate"] == 0.0
    assert found["format_valid"] == pytest.approx(1 / 3, abs=1e-6) and found["tool_format"]["solved"] == {"a": True, "b": False, "c": False}
    page = called_tools({"sft": found, "base": {}}, "tool_format", {"base": "base", "sft": "<SFT>"})
    assert "&lt;SFT&gt;" in page and "glm46, never trained on" in page and "50%, 50%" in page and "<SFT>" not in page
    assert "calls" not in TOOL_FORMAT.metrics([{**rows[0], "call": None}])["tool_format"]
    assert called_tools({"sft": TOOL_FORMAT.metrics([])}, "tool_format", {"sft": "SFT"}) == ""
