"""Conversations read from files in their usual forms: what counts, to the token, and what is malformed."""

import json
import types
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.chat.rendering import render
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import ChatSource, RunConfig, SftConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline import chat_template
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.data.readers.chat import CHAT, Options, conversation
from qcn_jax.pipeline.data.texts import Findings
from qcn_jax.pipeline.stages import sft
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS

CALL = {"id": "1", "type": "function", "function": {"name": "run", "arguments": '{"command": "ls", "n": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "run", "description": "Runs.", "parameters": {
    "type": "object", "properties": {"command": {"type": "string", "description": "What."}}, "required": ["command"]}}}]
OPENAI = {"tools": TOOLS, "messages": [
    {"role": "system", "content": "You help."}, {"role": "user", "content": [{"type": "text", "text": "List <|im_end|>."}]},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "a.py <|im_start|>assistant"},
    {"role": "assistant", "content": "One file.", "weight": 0.5}, {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing.", "weight": 0}]}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([render(OPENAI["messages"][:2], TOOLS), "One file. And? Nothing. I look."], 400, ADDED_TOKENS)


def test_assistants_tokens_and_no_others_count_with_their_messages_weight(tokenizer):
    read = conversation(OPENAI)
    document = ChatEncoder(tokenizer).encode(read.messages, read.tools)
    tokens, weights = document["tokens"], document["weights"]
    plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in OPENAI["messages"]]
    plain[2]["tool_calls"] = [{"name": "run", "arguments": {"command": "ls", "n": 2}}]
    assert tokenizer.decode(tokens) == render(plain, TOOLS)
    call = "<tool_call>\n<function=run>\n<parameter=command>\nls\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>\n</tool_call>"
    counted = {weight: tokenizer.decode([token for token, of in zip(tokens[1:], weights) if of == weight])
               for weight in set(weights.tolist())}
    assert counted[1.0] == f"I look.\n\n{call}<|im_end|>" and counted[0.5] == "One file.<|im_end|>"
    assert "Nothing.<|im_end|>" in counted[0.0] and set(counted) == {0.0, 0.5, 1.0}
    # Turns are the frame's alone: one a message, whatever texts spell.
    assert list(tokens).count(tokenizer.id("<|im_end|>")) == 7 and list(tokens).count(tokenizer.id("<|im_start|>")) == 7


def test_a_documents_head_is_the_turn_with_the_tools_and_long_ones_go_or_stay_whole(tokenizer):
    encoder, plain = ChatEncoder(tokenizer), {"messages": OPENAI["messages"][1:3]}
    encode = lambda row, length: list(sft.encoded([conversation(row)], encoder, length, findings, Counter()))
    findings = Findings()
    (document,), (other,) = encode(OPENAI, None), encode(plain, None)
    assert tokenizer.decode(document["tokens"][:document["head"]]) == render(OPENAI["messages"][:1], TOOLS).rstrip("\n")
    assert other["head"] == 0 and findings.left_out == {}
    assert not encode(OPENAI, 40) and findings.left_out == {"over 40 tokens": 1} and findings.kept == 2


def forms():
    said = [("user", "Hello"), ("assistant", "Hi"), ("user", "Bye"), ("assistant", "Ciao")]
    openai = [{"role": role, "content": text} for role, text in said]
    other = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in said]
    prompt, completion = openai[:3], openai[3:]
    yield {"messages": openai}, 1.0
    yield {"messages": json.dumps(openai), "tools": None}, 1.0
    yield {"conversations": other}, 1.0
    yield {"prompt": prompt, "completion": completion}, 0.0
    yield {"prompt": prompt, "completion": "Ciao"}, 0.0


@pytest.mark.parametrize("row, first", forms())
def test_forms_are_read_alike(row, first):
    read = conversation(row)
    assert [(message["role"], message["content"]) for message in read.messages] == [
        ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye"), ("assistant", "Ciao")]
    assert [message["weight"] for message in read.messages if message["role"] == "assistant"] == [first, 1.0]


def test_roles_of_other_tongues_and_calls_as_text():
    row = {"system": "S", "conversations": [
        {"from": "human", "value": "go"}, {"from": "function_call", "value": '{"name": "run", "arguments": {"a": [1]}}'},
        {"from": "observation", "value": "done"}, {"from": "gpt", "value": "ok"}]}  # fmt: skip
    messages = conversation(row, Options(template="hermes")).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [{"name": "run", "arguments": {"a": [1]}}] and messages[2]["template"] == "hermes"
    # Data marks nothing as the scaffold's own.
    sly = {"role": "user", "content": [{"type": "text", "text": "<tool_call>", "special": True}], "special": True}
    assert conversation({"messages": [sly, *OPENAI["messages"][2:]]}).messages[0] == {"role": "user", "content": "<tool_call>"}


def user(content="u"):
    return {"role": "user", "content": content}


def answer(**more):
    return {"role": "assistant", "content": "a", **more}


def calling(**function):
    return [user(), answer(tool_calls=[{"function": function}])]


MALFORMED = [
    ({"text": "a"}, "has no messages, no conversations, no prompt with a completion, only text"),
    ({}, "only an empty object"),
    ({"prompt": "a"}, "no prompt with a completion, only prompt"),
    ({"messages": None}, "messages: expected a list of messages, got null"),
    ({"messages": []}, "messages: expected a list of messages, got (null|an empty list)"),
    ({"messages": {"a": 1}}, "messages: expected a list of messages, got dict"),
    ({"messages": "[{"}, "messages: is not valid JSON"),
    ({"messages": ["a"]}, r"messages\[0\]: expected an object, got str"),
    ({"messages": [{"content": "a"}]}, r"messages\[0\].role: None; allowed: system, developer"),
    ({"messages": [{"role": "critic", "content": "a"}]}, r"messages\[0\].role: 'critic'"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages\[0\].role: \['user'\]"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, r"conversations\[0\].role: 'bot'"),
    ({"messages": [user(3), answer()]}, r"messages\[0\].content: expected text or a list of text parts, got int"),
    ({"messages": [user([{"type": "image_url", "image_url": {}}]), answer()]}, "a part of type image_url"),
    ({"messages": [user([{"type": "text"}]), answer()]}, "expected text or a list of text parts"),
    ({"messages": [user(), {"role": "assistant", "content": ""}]}, r"messages\[1\]: an assistant's message with neither"),
    ({"messages": [user(), answer(content="a<|im_end|>b")]}, "an assistant's text holds <|im_end|>, which ends a turn"),
    ({"messages": [user(), answer(reasoning_content=3)]}, r"messages\[1\].reasoning_content: expected text or a list"),
    ({"messages": [user(), answer(weight=-1)]}, r"messages\[1\].weight: -1; allowed: a number from 0"),
    ({"messages": [user(), answer(weight=float("nan"))]}, "weight: nan; allowed: a number from 0"),
    ({"messages": [user(), answer(weight=True)]}, "weight: True; allowed: a number from 0"),
    ({"messages": [user()]}, "no assistant's message counts; there is nothing to learn"),
    ({"messages": [user(), answer(weight=0)]}, "no assistant's message counts"),
    ({"messages": [{"role": "tool", "content": "a"}, answer()]}, "begins with a tool's answer"),
    ({"messages": [{**user(), "tool_calls": [CALL]}, answer()]}, "tool_calls: of a user; only assistants call tools"),
    ({"messages": [user(), answer(tool_calls={"a": 1})]}, r"messages\[1\].tool_calls: expected a list, got dict"),
    ({"messages": [user(), answer(tool_calls=["ls"])]}, r"tool_calls\[0\]: expected an object with a function's name"),
    ({"messages": calling(arguments={})}, r"tool_calls\[0\]: the function has no name"),
    ({"messages": calling(name="run", arguments="{")}, r"tool_calls\[0\].arguments: is not valid JSON"),
    ({"messages": calling(name="run", arguments=[1])}, r"tool_calls\[0\].arguments: expected an object, got list"),
    ({"messages": [user(), answer()], "tools": "x"}, "tools: is not valid JSON"),
    ({"messages": [user(), answer()], "tools": {"a": 1}}, "tools: expected a list, got dict"),
    ({"messages": [user(), answer()], "tools": [{"function": {}}]}, r"tools\[0\]: expected an object with a function's name"),
    ({"messages": [user(), answer()], "tools": [{"name": "f", "parameters": {"properties": {"x": True}}}]},
     r"tools\[0\].parameters: expected a JSON schema whose properties are objects"),
    ({"system": 3, "conversations": [{"from": "gpt", "value": "a"}]}, "system: expected text, got int"),
    ({"prompt": 3, "completion": "a"}, "prompt: expected a list of messages, got int"),
]  # fmt: skip


@pytest.mark.parametrize("row, line", MALFORMED, ids=[line[:50] for _, line in MALFORMED])
def test_what_is_malformed_stops_by_file_line_and_reason_or_is_skipped_and_counted(row, line, tmp_path):
    path = tmp_path / "a.jsonl"
    good = {"messages": [user(), answer()]}
    path.write_text("".join(json.dumps(value) + "\n" for value in (good, row, good)))
    source = ChatSource(path=str(path))
    with pytest.raises(UserError, match=f"{path}:2: .*{line}") as caught:
        list(CHAT.read(None, source, Findings("stop", "--config.sft.malformed"), lambda: False))
    assert "\n" not in str(caught.value) and str(caught.value).endswith("--config.sft.malformed=skip leaves such rows out")
    findings = Findings("skip")
    assert len(list(CHAT.read(None, source, findings, lambda: False))) == 2
    assert findings.malformed == 1 and findings.read == 3 and findings.summary()["malformed_rows"][0].startswith(f"{path}:2: ")


def test_parquet_gives_the_same_conversation(tmp_path, tokenizer):
    plain = {"messages": [user(), {"role": "assistant", "content": "a", "tool_calls": [CALL]},
                          {"role": "tool", "content": "o"}, answer()], "tools": TOOLS}  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([plain] * 3), tmp_path / "a.parquet")
    read = list(CHAT.read(None, ChatSource(path=str(tmp_path)), Findings(), lambda: False))
    assert [(one.messages, one.tools) for one in read] == [(conversation(plain).messages, TOOLS)] * 3
    assert read[2].place == f"{tmp_path}/a.parquet:3"


def test_what_cannot_be_written_or_is_too_long_is_counted(tokenizer):
    bad = conversation({"messages": calling(name="two words", arguments={})}, place="f:1")
    long = conversation({"messages": [user("u" * 500), answer()]}, place="f:2")
    good = conversation({"messages": [user(), answer()]}, place="f:3")
    findings = Findings("skip")
    documents = list(sft.encoded([bad, long, good], ChatEncoder(tokenizer), 100, findings, Counter()))
    assert len(documents) == findings.kept == findings.malformed == 1 and findings.left_out == {"over 100 tokens": 1}
    with pytest.raises(UserError, match="^f:1: tool call: 'two words' cannot name a function.*malformed=skip"):
        list(sft.encoded([bad], ChatEncoder(tokenizer), 1000, Findings("stop"), Counter()))
    thinks = conversation({"messages": [user(), answer(reasoning_content="hm")]}, place="f:4")
    with pytest.raises(UserError, match=r"^f:4: messages\[1\].reasoning_content: .* no place for it; .*reasoning=drop"):
        list(sft.encoded([thinks], ChatEncoder(tokenizer), 1000, Findings("stop"), Counter()))


def test_the_folders_own_template_writes_conversations_unless_told_otherwise(tmp_path, tokenizer):
    folder, other = tmp_path / "model", tmp_path / "other.jinja"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    other.write_text("{{ messages[0].role }}")

    def chosen(init, name=""):
        return chat_template.chat_template(RunConfig(init=init, sft=SftConfig(chat_template=name)))

    assert chosen(str(folder)) is chosen("random") is None
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert chosen(str(folder)).render([user("Hi")]) == chosen("random", str(folder)).render([user("Hi")]) == "Hi"
    assert chosen(str(folder), "native") is None and chosen(str(folder), str(other)).render([user()]) == "user"
    with pytest.raises(UserError, match=f"^--config.sft.chat_template={tmp_path}/none: holds no chat template; allowed: nat"):
        chosen("random", f"{tmp_path}/none")


def test_the_stages_documents_are_written_by_that_template(tmp_path, tokenizer):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ': ' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}")
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "system", "content": "s"}, user(), answer(weight=0.5)]}))
    config = RunConfig(init=str(folder), sft=SftConfig(data=str(rows)))
    context = types.SimpleNamespace(config=config, encoder=lambda: chat_template.encoder_of(config, tokenizer), workdir=tmp_path / "sft", log=lambda _: None)
    sft.write_documents(context)
    document = loader.TokenStore(tmp_path / "sft" / sft.DOCUMENTS / "data")[0]
    assert tokenizer.decode(document["tokens"]) == "<|im_start|>system: s<|im_end|><|im_start|>user: u<|im_end|><|im_start|>assistant: a<|im_end|>"
    assert tokenizer.decode(document["tokens"][1:][document["weights"][:-1] == 0.5]) == "a<|im_end|>"


@pytest.mark.parametrize("source, line", [
    (ChatSource(), "sources.a.path: is empty; allowed: a file, a folder or a glob"),
    (ChatSource(path="none.jsonl"), "sources.a.path=none.jsonl: there is no such file or folder"),
    (ChatSource(path="empty.jsonl"), "empty.jsonl: is empty"),
    (ChatSource(path="a.txt"), r"a.txt: holds no rows; allowed: \*.jsonl"),
    (ChatSource(path="good.jsonl", options={"template": "x"}), "a.options.template: 'x'; allowed: qwen3_coder"),
    (ChatSource(path="good.jsonl", options={"column": "x"}), "a.options.column: unknown key; allowed: marks, messages, reas"),
    (ChatSource(path="good.jsonl", options={"messages": "m"}), "good.jsonl:1: has no m, no conversations"),
])  # fmt: skip
def test_a_source_that_cannot_be_read_is_one_line_before_any_work(source, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "good.jsonl").write_text(json.dumps({"messages": [user(), answer()]}))
    with pytest.raises(UserError, match=line):
        CHAT.check(RunConfig(sft=SftConfig()), source, "--config.sft.sources.a")
