"""What a model writes is kept only where checks bear it out: pages, questions, rankings, users who run what is proposed."""

import json
import random
import re

import pytest

from qcn_jax.agents.scaffolds.simulated_user import SIMULATED_USER
from qcn_jax.agents.writing import rewrite
from qcn_jax.agents.writing.kind import Item
from qcn_jax.agents.writing.page import read_page
from qcn_jax.agents.writing.qa import ABSTAINED, QuestionsAnswered
from qcn_jax.agents.writing.rank import Rank
from qcn_jax.cli import main as cli
from qcn_jax.envs.tasks.schema import write_tasks
from tests.agents import playing
from tests.envs.synthesis.answering import serve
from tests.pipeline import chain

PAGE = """<!doctype html><html><head><title>Clamp 2.1</title><style>p {}</style></head><body>
<nav><a href="/home">Home</a> <a href="/blog">Blog</a></nav>
<article><h1>Clamp 2.1</h1>
<p>Clamp keeps a value between <em>low</em> and <em>high</em>. It is not safe to call it from several threads.</p>
<p>Released on 12 March 2024 by Ada Byron. Version 2.1 needs Python 3.9 or later and takes 1,500 bytes.</p>
<ul><li>Negative values such as -5 are allowed.</li><li>See <a href="https://example.org/docs?a=1">the manual</a>.</li></ul>
<table><tr><th>Call</th><th>Result</th></tr><tr><td>clamp(5, 1, 3)</td><td>3</td></tr><tr><td>clamp(0, 1, 3)</td><td>1</td></tr></table>
<pre><code>from clamp import clamp
clamp(5, 1, 3)  # 3
</code></pre>
<p>If <code>low</code> exceeds <code>high</code>, a <code>ValueError</code> is raised.</p></article>
<footer>Copyright 2024. All rights reserved.</footer></body></html>"""
GOOD = """# Clamp 2.1

Clamp keeps a value between *low* and **high**. It is not safe to call it from several threads.

Released on 12 March 2024 by Ada Byron.
Version 2.1 needs Python 3.9 or later and takes 1,500 bytes.

* Negative values such as -5 are allowed.
* See [the manual](https://example.org/docs?a=1).

| Call | Result |
|------|--------|
| clamp(5, 1, 3) | 3 |
| `clamp(0, 1, 3)` | 1 |

```python
from clamp import clamp
clamp(5, 1, 3)  # 3
```

If `low` exceeds `high`, a `ValueError` is raised."""
# Twenty inventions: what of GOOD becomes what, and as what it is seen.
INVENTIONS = [
    ("12 March", "13 March", "invented"), ("2024 by", "2023 by", "invented"), ("Ada Byron", "Ada Lovelace", "invented"),
    ("is not safe", "is safe", "invented"), ("Python 3.9", "Python 3.10", "invented"), ("1,500 bytes", "1,500 kilobytes", "invented"),
    ("-5 are", "5 are", "invented"), ("are allowed", "are not allowed", "invented"), ("from several", "from two", "invented"),
    ("| 3 |", "| 5 |", "invented"), ("`ValueError`", "`TypeError`", "invented"), ("exceeds", "equals", "invented"),
    ("https://example.org/docs?a=1", "https://example.com/docs?a=1", "link"),
    ("[the manual](https://example.org/docs?a=1)", "the manual at https://evil.example/x", "link"),
    ("clamp(5, 1, 3)  # 3\n```", "clamp(5, 1, 4)  # 4\n```", "code"), ("from clamp import clamp\n", "import clamp\n", "code"),
    ("# Clamp 2.1\n", "# Clamp 2.1\n\n## Summary\n\nA small library for everyone.\n", "invented"),
    ("is raised.", "is raised. Use it with care.", "invented"), ("# Clamp 2.1\n", "Here is the page as Markdown:\n\n# Clamp 2.1\n", "invented"),
    ("and takes", "and never takes", "invented"),
]


def test_a_faithful_rewriting_is_kept_and_twenty_inventions_are_not():
    page = read_page(PAGE)
    assert rewrite.difference(page, GOOD) == ""
    assert rewrite.difference(page, GOOD + "\n\nCopyright 2024. All rights reserved.") == ""  # whoever keeps more, invents nothing
    for old, new, seen in INVENTIONS:
        assert GOOD.count(old) >= 1 and rewrite.difference(page, GOOD.replace(old, new, 1)) == seen, (old, new)
    assert len(INVENTIONS) == 20
    swapped = GOOD.replace("* Negative values such as -5 are allowed.\n* See [the", "* See [the").replace("a=1).\n", "a=1).\n* Negative values such as -5 are allowed.\n")
    assert rewrite.difference(page, swapped) == "order"


@pytest.mark.parametrize("left", ["# Clamp 2.1", GOOD.replace("```python\nfrom clamp import clamp\nclamp(5, 1, 3)  # 3\n```", ""),
                                  GOOD.split("* Negative")[0], ""])
def test_what_leaves_out_the_matter_is_not_kept(left):
    assert rewrite.difference(read_page(PAGE), left) == "incomplete"


def test_plain_documents_are_pages_too():
    page = read_page("First things first.\n\nThen 5 others.\n\n```\nx = 1\n```\n")
    assert rewrite.difference(page, "- First things first.\n- Then 5 others.\n\n```py\nx = 1\n```") == ""
    assert rewrite.difference(page, "- First things first.\n- Then 6 others.\n\n```py\nx = 1\n```") == "invented"


DOCUMENT = "The mill at Stow was built in 1843 by Ann Reed. It ground barley until a fire in May 1902."
ASKED = {"When was the mill built?": ("1843", "The mill at Stow was built in 1843 by Ann Reed."),
         "Who built it?": ("Ann Reed", "built in 1843 by Ann Reed"), "How tall is it?": (None, None),
         "What did it grind?": ("wheat", "It ground barley until a fire"),  # says what the quotation does not
         "When did it burn?": ("May 1902", "It burned down in May 1902."),  # a quotation that is none
         "Was it rebuilt?": (None, None), "What did it grind then?": ("barley", "It ground barley until a fire")}
# What somebody answers who knows neither answer nor quotation.
READ = {"When was the mill built?": "In 1843.", "Who built it?": "Ann Reed", "How tall is it?": ABSTAINED,
        "Was it rebuilt?": "No, it was not.", "What did it grind then?": "Oats."}


def answering_questions(messages, seed=0):
    if "Answer the question" in messages[0]["content"]:
        return READ[messages[1]["content"].rpartition("Question: ")[2]]
    rows = [{"question": q, "answer": a, **({"quote": quote} if quote else {})} for q, (a, quote) in ASKED.items()]
    return "Sure:\n" + json.dumps({"questions": [*rows, "what?", {"question": ""}, rows[0]]})


def test_questions_are_answered_from_the_document_or_not_at_all():
    made = QuestionsAnswered().make(Item("d", {"text": DOCUMENT}), answering_questions, 0)
    kept = {row["messages"][0]["content"].rpartition("\n\n")[2]: row["messages"][1]["content"] for row in made.rows}
    assert kept == {"When was the mill built?": "1843", "Who built it?": "Ann Reed", "How tall is it?": ABSTAINED}
    assert made.dropped == {"ungrounded": 1, "quotation": 1, "answerable": 1, "disagreed": 1, "malformed": 2, "repeated": 1}
    assert [row["answerable"] for row in made.rows] == [True, True, False]


def test_planted_rankings_are_recovered():
    """Answers meet 0 to 4 of four points. The judge sees them, but now and then prefers what comes first."""
    points, rng = ["a", "b", "c", "d"], random.Random(0)

    def ask(messages, seed):
        a, b = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)", messages[1]["content"]).groups()
        met = lambda text: [n for n, point in enumerate(points, 1) if f"point {point}" in text]
        return json.dumps({"A": [1, 2, 3, 4], "B": met(b)} if rng.random() < 0.1 else {"A": met(a), "B": met(b)})

    right = 0
    for number in range(20):
        order = random.Random(number).sample(range(5), 5)  # the answer at a place meets so many points
        answers = [" ".join(f"point {point}" for point in points[:count]) + f" of {place}" for place, count in enumerate(order)]
        item = Item(str(number), {"prompt": "p", "answers": answers, "checklist": points})
        (row,) = Rank().make(item, ask, 0).rows
        found = row["ranking"] == sorted(range(5), key=lambda place: -order[place])
        assert found or row["swayed"]
        assert not found or (row["chosen"], row["rejected"]) == (answers[order.index(4)], answers[order.index(0)])
        assert row["chosen"] == row["messages"][1]["content"]
        right += found
    assert right >= 18
    same = Rank().make(Item("s", {"prompt": "p", "answers": ["x", "y"], "checklist": points}), lambda *_: '{"A": [], "B": []}', 0)
    swayed = Rank().make(Item("s", {"prompt": "p", "answers": ["x", "y"], "checklist": points}), lambda *_: '{"A": [1], "B": []}', 0)
    assert same.dropped == swayed.dropped == {"undecided": 1}
    assert Rank().make(Item("s", {"prompt": "p", "answers": ["x", "y"], "checklist": points}), lambda *_: '{"A": [9], "B": []}',
                       0).dropped == {"unreadable": 1}


def test_written_data_is_collected_and_a_run_goes_on(tmp_path, capsys):
    (tmp_path / "pages").mkdir()
    for number in range(3):
        (tmp_path / "pages" / f"{number}.html").write_text(PAGE.replace("Clamp 2.1", f"Clamp 2.{number}"))
    asked = []

    def answer(messages):
        asked.append(messages[1]["content"])
        number = re.search(r"<h1>Clamp 2\.(\d)", asked[-1])[1]
        if number == "1" and len(asked) < 5:
            return 400  # refuses, and ends the run
        return GOOD.replace("Clamp 2.1", f"Clamp 2.{number}").replace("ValueError", "TypeError" if number == "2" else "ValueError")

    with serve(answer) as (url, _):
        command = ["collect", "--kind=rewrite", f"--data={tmp_path}/pages", f"--endpoint={url}", "--model=m", "--parallel=1",
                   f"--out={tmp_path}/texts.jsonl"]
        assert cli.main(command) == 1 and "answers 400" in capsys.readouterr().err and not (tmp_path / "texts.jsonl").exists()
        asked += [""] * 5
        assert cli.main(command) == 0
        assert asked.count(PAGE.replace("Clamp 2.1", "Clamp 2.0")) == 1  # made before, and kept
        assert "kept 2 of 3 items; dropped: invented 1" in capsys.readouterr().out
        (tmp_path / "pages/2.html").write_text(PAGE.replace("Clamp 2.1", "Clamp 2.2 "))  # read anew, and the others are not
        count = len(asked)
        assert cli.main(command) == 0 and len(asked) == count + 1
        assert cli.main([*command, "--temperature=1"]) == 1 and "--temperature=0.0, and now it is 1.0" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0.html", "1.html"] and rows[0]["text"].startswith("# Clamp 2.0\n")
    (tmp_path / "rank.jsonl").write_text('{"prompt": "p", "answers": ["a"], "checklist": ["x"]}\n{"prompt": 5}\n')
    assert cli.main(["collect", "--kind=rank", f"--data={tmp_path}/rank.jsonl", "--endpoint=http://localhost:1/v1", "--model=m",
                     f"--out={tmp_path}/r.jsonl"]) == 1
    assert "rank.jsonl:1: field answers" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["--kind=rewrite", "--tasks=t.jsonl"], "--kind=rewrite takes --data, and no --tasks"),
    (["--kind=agent", "--data=d"], "--kind=agent takes --tasks, and no --data"), ([], "takes --tasks"),
    (["--kind=qa", "--data=d", "--checkpoint=c"], "--kind=qa takes --endpoint=URL and --model=NAME; qcn serve"),
    (["--kind=qa", "--data=none", "--endpoint=u", "--model=m"], "--data=none: no such file"),
    (["--kind=qa", "--data=d", "--endpoint=u", "--model=m", "--attempts=3"], "--attempts: nothing that --kind=qa goes by; leave"),
    (["--kind=rank", "--data=d", "--endpoint=u", "--model=m", "--sandbox=local"], "--sandbox: nothing that --kind=rank goes by"),
    (["--kind=simulate", "--tasks=t", "--scaffold=nano", "--endpoint=u", "--model=m"], "--kind=simulate has its own")])
def test_bad_flags_are_named(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["collect", "--out=o.jsonl", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_a_simulated_user_runs_what_is_proposed(tmp_path, capsys, monkeypatch):
    """The assistant proposes commands and programs; the user runs them and tells; what resolves the task is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tmp_path.chmod(0o755)
    chain.write(tmp_path)
    write_tasks(tmp_path / "tasks.jsonl", [playing.words("count"), playing.words("short")])

    def talk(messages):
        said, name = messages[-1]["content"], "count" if "Mend count" in messages[0]["content"] else "short"
        good, bad, _ = playing.DEFECTS[name]
        if len(messages) == 1:
            assert messages[0]["role"] == "user" and "with my repository in /testbed" in said
            return "Let us look.\n\n```bash\ngrep -n 'def ' words/core.py; exit 3\n```\n\n```text\nnot run\n```"
        if len(messages) == 3:
            assert "I ran that:" in said and "def count_words" in said and "exit status 3" in said
            new = good if name == "count" else "1 / 0 #"
            return f"So:\n\n```python\np = 'words/core.py'\ns = open(p).read()\nopen(p, 'w').write(s.replace({bad!r}, {new!r}))\nprint(6 * 7)\n```"
        assert "42" in said
        return "It should work now."

    with serve(talk) as (url, _):
        assert cli.main(["collect", "--kind=simulate", f"--tasks={tmp_path}/tasks.jsonl", f"--endpoint={url}", "--model=m", "--nostream",
                         f"--out={tmp_path}/chats.jsonl", f"--repo={tmp_path}/words-1.0", "--sandbox=local", "--isolation=shared",
                         "--workers=1", "--invalid=keep"]) == 0, capsys.readouterr().err
    assert "kept 1 of 2 episodes, of 1 of 2 tasks; dropped: unresolved 1" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "chats.jsonl").read_text().splitlines())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert "```python" in row["messages"][3]["content"] and row["scaffold"] == SIMULATED_USER.name
