"""Encoded conversations: turn by turn equals the whole, the mask is the assistant's, untrusted text stays text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.agents.scaffolds.qwen_code import QWEN_CODE
from qcn_jax.agents.scaffolds.swe_agent import SWE_AGENT
from qcn_jax.chat import rendering
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.packing import pack
from qcn_jax.recipes.nano.scaffold import NANO
from qcn_jax.recipes.nano.solver import solve
from qcn_jax.recipes.nano.spans import MAX_LINE_TOKENS, line_token
from tests import conftest
from tests.agents import tiny

NANO_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<function=",
    "</function>", "<parameter=", "</parameter>", *(line_token(n) for n in range(1, MAX_LINE_TOKENS + 1)),
)


@pytest.fixture(scope="module")
def nano():
    tokenizer = Tokenizer.train([tiny.GOOD, tiny.TESTS, "FAILED 3 of 3\nassistant\nuser\nedit"], 500, NANO_ADDED)
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="module", params=["nano", "qwen"])
def encoder(request, nano):
    if request.param == "nano":
        return nano
    if not conftest.QWEN_TOKENIZER.exists():
        pytest.skip("no Qwen tokenizer: set QCN_QWEN_TOKENIZER")
    return ChatEncoder(Tokenizer.from_file(conftest.QWEN_TOKENIZER))


def parts(*texts):
    """Content parts, every second one the scaffold's own."""
    return [{"type": "text", "text": text} | ({"special": True} if number % 2 else {}) for number, text in enumerate(texts)]


def conversation(text="Fix f.", view=("calc.py\n", "<|1|>", "def f():\n", "<|2|>", "    return 1"), failure="FAILED 1 of 1"):
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "view", "arguments": {}}]},
        {"role": "tool", "content": parts(*view)},
        {"role": "assistant", "content": "Off by one.", "tool_calls": [
            {"name": "edit", "arguments": {"line": "<|2|>", "old": "1", "new": "2"}, "special": ["line"]},
            ToolCall("run_tests", {})]},
        {"role": "tool", "content": "done"},
        {"role": "tool", "content": failure},
        {"role": "assistant", "content": "That is all."},
    ]


def incrementally(encoder, messages, tools=None):
    """What a rollout does: prompt, sampled turns, observations."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    ids, own = encoder.encode_prompt(messages[:first], tools), []
    own += [False] * len(ids)
    position = first
    while position < len(messages):
        turn = encoder.encode_answer(messages[position])
        ids, own = ids + turn, own + [True] * len(turn)
        after = position + 1
        while after < len(messages) and messages[after]["role"] != "assistant":
            after += 1
        if after < len(messages):
            more = encoder.encode_turn(messages[position + 1 : after])
            ids, own = ids + more, own + [False] * len(more)
        position = after
    return ids, own


@pytest.mark.parametrize("tools", [None, SWE_AGENT.schemas()], ids=["bare", "tools"])
def test_trusted_conversations_are_encoded_as_their_text(encoder, tools):
    messages = conversation()
    document = encoder.encode(messages, tools)
    assert document["tokens"].tolist() == encoder.tokenizer.encode(rendering.render(messages, tools))
    assert document["tokens"].dtype == np.int32 and document["weights"].dtype == np.float32


@pytest.mark.parametrize("tools", [None, QWEN_CODE.schemas()], ids=["bare", "tools"])
def test_turn_by_turn_equals_the_whole(encoder, tools):
    messages = conversation()
    ids, own = incrementally(encoder, messages, tools)
    document = encoder.encode(messages, tools)
    whole = document["tokens"].tolist()
    assert whole[: len(ids)] == ids and encoder.tokenizer.decode(whole[len(ids) :]) == "\n"
    assert document["weights"][: len(ids) - 1].tolist() == [float(flag) for flag in own[1:]]
    assert not document["weights"][len(ids) - 1 :].any()


def test_the_mask_selects_what_the_assistant_wrote_with_its_end(encoder):
    document = encoder.encode(conversation())
    targets = [t for t, w in zip(document["tokens"][1:].tolist(), document["weights"], strict=False) if w]
    assert encoder.tokenizer.decode(targets) == (
        "<tool_call>\n<function=view>\n</function>\n</tool_call><|im_end|>"
        "Off by one.\n\n<tool_call>\n<function=edit>\n<parameter=line>\n<|2|>\n</parameter>\n<parameter=old>\n1\n"
        "</parameter>\n<parameter=new>\n2\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=run_tests>\n</function>\n</tool_call><|im_end|>"
        "That is all.<|im_end|>"
    )


SPELLED = st.lists(
    st.sampled_from([*NANO_ADDED[:20], "<think>", "\n", " ", "x", "<|", "|>", "<|im_<|im_end|>end|>", "é", "ꙮ",
                     "<|1|>a\n<|2|>"]),
    max_size=12,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(SPELLED, SPELLED, SPELLED)
def test_what_untrusted_text_spells_is_text(nano, statement, code, failure):
    frame = conversation(text="", view=(), failure="")
    messages = conversation(statement, ("p.py\n", "<|1|>", code), failure)
    document = nano.encode(messages)
    special = set(nano.tokenizer.added_tokens.values())
    line = nano.tokenizer.id("<|1|>")

    def specials(tokens):
        return [t for t in tokens.tolist() if t in special]

    expected = specials(nano.encode(frame)["tokens"])
    found = specials(document["tokens"])
    found.remove(line)  # the scaffold's own
    assert found == expected
    rendered = nano.tokenizer.decode(document["tokens"])
    assert rendered == rendering.render(messages)
    ids, _ = incrementally(nano, messages)
    assert document["tokens"][: len(ids)].tolist() == ids


def test_only_what_the_scaffold_marks_becomes_added_tokens(nano):
    line = {n: nano.tokenizer.id(line_token(n)) for n in range(1, 65)}

    def found(*texts):
        messages = [{"role": "user", "content": parts(*texts)}]
        ids = nano.encode_prompt(messages)
        assert nano.tokenizer.decode(ids) == rendering.render(messages, add_generation_prompt=True)
        assert ids.count(nano.end) == 1 and nano.tokenizer.id("<|endoftext|>") not in ids
        return [n for n in line for t in ids if t == line[n]]

    assert found("p\n", "<|1|>", "a <|2|> b\n", "<|2|>", "c") == [1, 2]
    assert found("p\n<|2|>a\n", "<|1|>", "c\n<|3|>") == [1]
    assert found("p\n<|1|>a\n<|2|>c") == []
    assert found("", "<|7|> and <|9|>") == [7, 9]
    assert found("", "<|im_end|>\n<|7|><|endoftext|>") == [7]  # a turn ends in the frame alone
    assert found("<|", "7|>", "<|7", "|>") == found("<|im_", "end|>") == []  # nor across parts
    content = [{"type": "text", "text": text} for text in ("<|im_", "end|>", "<|1", "|>")]
    ids = nano.encode_prompt([{"role": "user", "content": content}])
    assert ids.count(nano.end) == 1 and line[1] not in ids


def test_values_of_calls_cannot_end_the_turn(encoder):
    message = {"role": "assistant", "content": "", "tool_calls": [
        {"name": "edit", "arguments": {"line": "1", "old": "<|im_end|>", "new": ["<|im_start|>"]}}]}
    ids = encoder.encode_answer(message)
    assert ids.count(encoder.end) == 1 and ids[-1] == encoder.end
    assert encoder.tokenizer.id("<|im_start|>") not in ids
    assert encoder.tokenizer.decode(ids) == rendering.render_assistant(
        "", [ToolCall("edit", message["tool_calls"][0]["arguments"])]) + "<|im_end|>"


def test_argument_values_are_added_tokens_where_the_scaffold_says_so(nano):
    def ids(special, line="<|2|>"):
        call = {"name": "edit", "arguments": {"line": line, "old": "<|2|>", "new": ["<|2|>"]}, "special": special}
        return nano.encode_answer({"role": "assistant", "content": "", "tool_calls": [call]})

    token = nano.tokenizer.id("<|2|>")
    assert ids(["line"]).count(token) == 1 and ids([]).count(token) == 0 and ids(["line"], "on <|2|>").count(token) == 0
    assert ids(["line", "new"], ["<|2|>"]).count(token) == 0
    assert ids(["line"], "<|im_end|>").count(nano.end) == 1 and ids(["line"], "</function>") == ids([], "</function>")
    edit = ToolCall("edit", {"line": "<|5|>", "old": ">", "new": "<"})
    assert nano.encode_answer(NANO.assistant([edit])).count(nano.tokenizer.id("<|5|>")) == 1


def test_a_turn_that_was_cut_off_is_closed_outside_the_sample(encoder):
    observation = [{"role": "tool", "content": "cut off"}]
    assert encoder.encode_turn(observation, closed=False) == [encoder.end, *encoder.encode_turn(observation)]


def test_raw_turns_are_kept_byte_for_byte(encoder):
    for text in ("", " \n x", "<tool_call>\n<function=view>\n</tool_call> trailing", "<parameter=x>"):
        ids = encoder.encode_answer({"role": "assistant", "content": text})
        assert encoder.tokenizer.decode(ids) == text + "<|im_end|>"


@pytest.mark.parametrize("template", ["qwen3_coder", "hermes", "xml_cline", "toolace"])
def test_solver_trajectories_become_rows(nano, template):
    task = tiny.make_task()
    scaffold = NANO if template == "qwen3_coder" else NANO.in_template(template)
    executor = scaffold.executor(task, tiny.overlay(task, tiny.run_tests))
    trajectory = solve(task, executor, scaffold, wrong=1)
    document = nano.encode(trajectory.messages)
    packed = pack([document, document], length=1024)
    targets = np.roll(packed["tokens"], -1, axis=1)[packed["weights"] > 0]
    own = "".join(
        scaffold.render("", [ToolCall(c["name"], c["arguments"]) for c in m["tool_calls"]]) + "<|im_end|>"
        for m in trajectory.messages if m["role"] == "assistant")
    assert nano.tokenizer.decode(targets) == own * 2
    ids, _ = incrementally(nano, trajectory.messages)
    assert document["tokens"][: len(ids)].tolist() == ids


def test_nothing_that_a_client_says_becomes_an_added_token(encoder):
    special = set(encoder.tokenizer.added_tokens)
    words = [*special, "|im_start|", "|im_end|>", "im_start|>x", "plain"]

    def prompt(said):
        key = said.replace("<", "").replace(">", "").replace("=", "") or "k"  # calls' own names hold none of these
        call = {"name": key, "arguments": {key: said, "b": {said: [said]}}}
        tool = {"type": "function", said: said, "function": {"name": said, "description": said, said: said, "parameters": {
            "type": "object", "properties": {said: {"type": said, "description": said, "enum": [said], said: said}},
            said: {said: said}}}}  # fmt: skip
        messages = [
            {"role": "system", "content": said}, {"role": "user", "content": parts(said)},
            {"role": "assistant", "content": said}, {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "text", "text": said}], "tool_calls": [call]},
            {"role": "tool", "content": said},
        ]  # fmt: skip
        return messages, [tool]

    def specials(said):
        ids = encoder.encode_prompt(*prompt(said), trusted=False)
        return [id_ for id_ in ids if id_ in encoder.tokenizer.added_tokens.values()]

    expected = specials("k")
    for said in words:
        assert specials(said) == expected, said
    messages, tools = prompt("plain")
    want = encoder.tokenizer.encode(rendering.render(messages, tools, add_generation_prompt=True))
    assert encoder.encode_prompt(messages, tools, trusted=False) == want


def test_trusted_values_are_text_in_their_keys_too(nano):
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": {"<|im_end|>": 1}}}]}
    assert nano.encode_answer(message).count(nano.end) == 1


def test_the_letter_that_marks_text_is_in_no_tool_either(nano):
    letters = "".join(map(chr, range(0x10380, 0x10420)))
    tools = [{"name": "f", "description": letters}]
    assert letters in nano.tokenizer.decode(nano.encode_prompt([{"role": "user", "content": "x"}], tools))
    everything = "".join(map(chr, range(0x10380, 0x12400)))
    with pytest.raises(UserError, match="every letter"):
        nano.encode_prompt([{"role": "user", "content": everything}])
