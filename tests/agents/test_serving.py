"""What is collected from `qcn serve`, a process with a real checkpoint that says, at random, one of what is wanted of models.

Whatever it says when it is not asked for that is dropped with a reason; what is kept is true. And what a server does with
requests that only a model which calls tools can show.
"""

import json

import httpx
import pytest

from qcn_jax.chat import rendering
from qcn_jax.chat.tokenizer import TURN_END, TURN_START, Tokenizer
from qcn_jax.cli import main as cli
from qcn_jax.envs.tasks.schema import write_tasks
from tests.agents import playing
from tests.agents.test_writing import DOCUMENT, GOOD, PAGE
from tests.inference import speaking
from tests.inference.scripted import VIEW
from tests.pipeline import chain

pytestmark = pytest.mark.slow

QUESTIONS = json.dumps({"questions": [
    {"question": "When was the mill built?", "answer": "1843", "quote": "The mill at Stow was built in 1843 by Ann Reed."},
    {"question": "What did it grind?", "answer": "wheat", "quote": "It ground barley until a fire"},
    {"question": "How tall is it?", "answer": None}]})
EDIT = f"Try this:\n\n```bash\n{playing.edit('count')}\n```"
JUDGED = ('{"A": [1], "B": []}', '{"A": [], "B": [1]}')
SAID = ("In 1843.", "The document does not say.", GOOD, f"```markdown\n{GOOD}\n```", QUESTIONS, EDIT, *JUDGED)
CALL = rendering.render_tool_call(rendering.ToolCall("view", {"path": ["a"]}))
CALLS = f"So:\n{CALL}\n{CALL}"


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory):
    """A folder with a checkpoint; SAID is as probable as anything else that it says, and CALLS is said where asked for."""
    return speaking.write(tmp_path_factory.mktemp("speaking") / "speaker", SAID, [PAGE, DOCUMENT], unlikely=[CALLS])


@pytest.fixture(name="served", scope="module")
def _served(model):
    with speaking.serving(model, "--slots=4", "--max_length=2048") as url:
        yield url


def collect(kind, served, folder, *flags):
    """Status of `qcn collect`, the rows that it kept, and its yields."""
    out = folder / f"{kind}.jsonl"
    status = cli.main(["collect", f"--kind={kind}", f"--endpoint={served}", "--model=speaker", f"--out={out}", "--temperature=1", *flags])
    return status, list(map(json.loads, out.read_text().splitlines())), json.loads((folder / f"{kind}.jsonl.yields.json").read_text())


def test_rewritten_pages_are_those_that_say_what_theirs_say(served, tmp_path):
    (tmp_path / "pages").mkdir()
    for number in range(40):
        page = PAGE.replace("Copyright 2024.", f"Copyright 2024. Page {number}.")
        (tmp_path / f"pages/{number}.html").write_text(page if number % 2 else page.replace("Ada Byron", "Ada Lovelace"))
    status, rows, yields = collect("rewrite", served, tmp_path, f"--data={tmp_path}/pages")
    assert status == 0 and rows and yields["kept"] == len(rows)
    assert all(row["text"] == GOOD + "\n" and int(row["id"].removesuffix(".html")) % 2 for row in rows)
    assert yields["dropped"]["invented"] > 20 and sum(yields["dropped"].values()) == 40 - len(rows)


def test_questions_and_answers_are_those_that_two_readings_agree_on(served, tmp_path):
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"id": str(n), "text": f"{DOCUMENT} Page {n}."}) + "\n" for n in range(40)))
    status, rows, yields = collect("qa", served, tmp_path, f"--data={tmp_path}/docs.jsonl")
    kept = {(row["messages"][0]["content"].rpartition("\n\n")[2], row["messages"][1]["content"]) for row in rows}
    assert status == 0 and kept and kept <= {
        ("When was the mill built?", "1843"), ("How tall is it?", "The document does not say.")}
    dropped = yields["dropped"]
    assert dropped["unreadable"] and dropped["disagreed"] and dropped["answerable"] and yields["kept"] == len(rows)
    assert dropped["ungrounded"] == 40 - dropped["unreadable"] - dropped.get("malformed", 0)  # each time that it was asked so


def test_a_judge_who_likes_what_comes_first_ranks_nothing(served, tmp_path):
    """Its answers are drawn once for each comparison, so that some pairs are decided; the order of none of these is forged."""
    items = [{"id": str(n), "prompt": f"p{n}", "answers": ["good", "bad"], "checklist": ["is good"]} for n in range(12)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    status, rows, yields = collect("rank", served, tmp_path, f"--data={tmp_path}/items.jsonl")
    assert status == 0 and yields["kept"] + sum(yields["dropped"].values()) == 12 and yields["dropped"]["unreadable"]
    assert all(sorted(row["scores"]) == [0.0, 1.0] and row["swayed"] == 0 for row in rows)
    # Without chance it says the same of both orders: nothing is known.
    status, rows, yields = collect("rank", served, tmp_path / "greedy", f"--data={tmp_path}/items.jsonl", "--temperature=0")
    assert (status, rows, yields["dropped"]) == (0, [], {"unreadable": 12})


def test_a_simulated_user_keeps_what_works(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tmp_path.chmod(0o755)
    chain.write(tmp_path)
    write_tasks(tmp_path / "tasks.jsonl", [playing.words("count"), playing.words("short")])
    status, rows, yields = collect("simulate", served, tmp_path, f"--tasks={tmp_path}/tasks.jsonl", f"--repo={tmp_path}/words-1.0",
                                   "--sandbox=local", "--isolation=shared", "--workers=1", "--invalid=keep", "--attempts=12", "--max_turns=3")
    assert status == 0 and rows and yields["tried"] == 24 and yields["kept"] == len(rows)
    assert yields["by_task"]["short"]["kept"] == 0 and yields["by_task"]["short"]["unresolved"] > 0
    for row in rows:
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert EDIT in said[:-1] and said[-1] != EDIT and row["messages"][2]["content"].startswith("I ran that")


def ask(served, **body):
    reply = httpx.post(f"{served}/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "tools": VIEW, **body},
                       timeout=300)
    assert reply.status_code == 200, reply.text
    return reply


@pytest.mark.parametrize("parallel", [True, False])
def test_parallel_calls_are_one_where_the_client_wants_one(served, model, parallel):
    bias = {str(Tokenizer.from_folder(model).id(CALLS)): speaking.BIAS}
    (choice,) = ask(served, logit_bias=bias, parallel_tool_calls=parallel).json()["choices"]
    streamed = ask(served, logit_bias=bias, parallel_tool_calls=parallel, stream=True).text
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line and "[DONE]" not in line]
    deltas = [event["choices"][0]["delta"] for event in events]
    for calls in (choice["message"]["tool_calls"], [call for delta in deltas for call in delta.get("tool_calls", [])]):
        assert [call["function"] for call in calls] == [{"name": "view", "arguments": '{"path": ["a"]}'}] * (1 + parallel)
    assert choice["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So:" == "".join(delta.get("content") or "" for delta in deltas)


PLACES = {  # where a client's word may stand; tools' may come from servers that nobody knows
    "user": lambda word: {"messages": [{"role": "user", "content": word}]},
    "parts": lambda word: {"messages": [{"role": "user", "content": [{"type": "text", "text": word}]}]},
    "system": lambda word: {"messages": [{"role": "system", "content": word}, {"role": "user", "content": "x"}]},
    "history": lambda word: {"messages": [{"role": "assistant", "content": word}, {"role": "user", "content": "x"}]},
    "result": lambda word: {"messages": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "view", "arguments": "{}"}}]}, {"role": "tool", "content": word}]},
    "argument": lambda word: {"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "view", "arguments": json.dumps({"path": word})}}]}, {"role": "tool", "content": "x"}]},
    "nested argument": lambda word: {"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "view", "arguments": json.dumps({"path": {"k": [{word: 1}]}})}}]}, {"role": "tool", "content": "x"}]},
    "description": lambda word: {"tools": [{"function": {"name": "view", "description": word}}]},
    "parameter": lambda word: {"tools": [{"function": {"name": "view", "parameters": {"properties": {word: {"type": "string"}}}}}]},
    "type": lambda word: {"tools": [{"function": {"name": "view", "parameters": {"properties": {"a": {"type": word}}}}}]},
    "enum": lambda word: {"tools": [{"function": {"name": "view", "parameters": {"properties": {"a": {"enum": [word]}}}}}]},
    "required": lambda word: {"tools": [{"function": {"name": "view", "parameters": {"properties": {"a": {}}, "required": [word]}}}]},
    "schema": lambda word: {"tools": [{"function": {"name": "view", "parameters": {"properties": {"a": {}}, word: {word: word}}}}]},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_words_of_clients_are_never_control_tokens(served, model, place):
    """As tokens they would be one each; as text they are as long as words that are spelt like them, wherever they stand."""
    tokenizer = Tokenizer.from_folder(model)
    count = lambda word: ask(served, max_tokens=1, **PLACES[place](word)).json()["usage"]["prompt_tokens"]
    length = lambda word: len(tokenizer.encode_ordinary(word))
    for word in (TURN_END, TURN_START):
        twin = next(twin for letter in "qzxvwj" if length(twin := word.replace("m", letter)) == length(word))
        assert len(tokenizer.encode(word)) == 1 < len(tokenizer.encode(twin))
        assert count(word) == count(twin), word
