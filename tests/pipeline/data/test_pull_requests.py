"""Pull requests: read from rows and from tasks with their repositories, written with edits that can be applied again."""

import json
import types

import pytest

from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MidtrainConfig, RunConfig, TextSource
from qcn_jax.envs import patches
from qcn_jax.envs.tasks.schema import Task, write_tasks
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents import FORMS, pull_request
from qcn_jax.pipeline.data.documents.pull_request import PullRequest
from qcn_jax.pipeline.data.readers.files import FILES
from qcn_jax.pipeline.data.readers.pull_requests import PULL_REQUESTS
from qcn_jax.pipeline.data.texts import Findings, Text
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS

FIELD = "--config.midtrain.sources.prs"
CODE = "".join(f"def f{i}(x):\n    y = x + {i}\n    return y\n\n\n" for i in range(12))
FILES_BEFORE = {"pkg/a.py": CODE, "pkg/b.py": "A = 1\nB = 2\n", "pkg/near.py": "near = 1\n", "docs/far.md": "far\n", "x/b.py": "b\n"}
AFTER = {"pkg/a.py": CODE.replace("x + 3\n", "x + 33\n    y += 1\n").replace("    return y\n", "", 1).replace("x + 9", "x - 9"),
         "pkg/b.py": "A = 1\nC = 3\nB = 2\n", "pkg/new.py": "NEW = True\n"}
DIFF = patches.make_diff({path: FILES_BEFORE.get(path) for path in AFTER}, AFTER)
ROW = {"description": "far values are wrong\nFix f3.", "files": FILES_BEFORE, "patch": DIFF, "repo": "me/pkg"}


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer():
    return Tokenizer.train([CODE, DIFF], 400, ADDED_TOKENS)


def written(folder, rows, name="prs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, malformed="stop", **options):
    source, findings = TextSource("pull_requests", str(path), "pull_request", options=options), Findings(malformed)
    PULL_REQUESTS.check(RunConfig(midtrain=MidtrainConfig(malformed=malformed)), source, FIELD)
    return [PullRequest.from_text(text) for text in PULL_REQUESTS.read(None, source, findings)], findings


def applied(files, edits):
    """Files with search-and-replace blocks applied, each of which must find its place and no other."""
    files = dict(files)
    for block in edits.split(pull_request.REPLACE)[:-1]:
        path, _, rest = block.partition("\n" + pull_request.SEARCH)
        search, _, replace = rest.partition(pull_request.DIVIDER)
        if path in files:
            assert search.strip() and files[path].count(search) == 1
            files[path] = files[path].replace(search, replace)
        else:
            assert not search
            files[path] = replace
    return files


def test_rows_bring_files_and_columns_have_names(tmp_path):
    as_list = [{"path": path, "content": text} for path, text in FILES_BEFORE.items()]
    rows = [ROW, {**ROW, "files": json.dumps(FILES_BEFORE)}, {**ROW, "files": as_list}]
    found, findings = read(written(tmp_path, rows))
    assert len(found) == 3 and found[0] == found[1] == found[2] and findings.read == 3
    assert found[0].changes == AFTER and found[0].repo == "me/pkg" and found[0].description == ROW["description"]
    # What changes first; then what stands beside it, and what the description names.
    assert list(found[0].files) == ["pkg/a.py", "pkg/b.py", "pkg/near.py", "docs/far.md", "x/b.py"]
    other = {"body": "d", "base": FILES_BEFORE, "diff": DIFF}
    assert read(written(tmp_path, [other]), description="body", files="base", patch="diff")[0][0].changes == AFTER


def test_tasks_bring_their_repositories(tmp_path):
    repository = tmp_path / "pkg-1.0"
    for path, text in FILES_BEFORE.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(text)
    broken = {**FILES_BEFORE, "pkg/b.py": "A = 1\n"}
    fix = patches.make_diff({"pkg/b.py": broken["pkg/b.py"]}, {"pkg/b.py": FILES_BEFORE["pkg/b.py"]})
    task = Task("t-1", "pkg==1.0", "0" * 40, fix, "", "B is gone", ("t::a",), (), bug_patch=patches.reverse(fix))
    write_tasks(tmp_path / "tasks.jsonl", [task])
    (found,), findings = read(tmp_path / "tasks.jsonl", repositories=(str(repository),))
    assert found.files["pkg/b.py"] == "A = 1\n" and found.changes == {"pkg/b.py": "A = 1\nB = 2\n"}
    assert (found.repo, found.description, found.diff) == ("pkg==1.0", "B is gone", fix) and findings.read == 1
    write_tasks(tmp_path / "tasks.jsonl", [Task(**{**vars_of(task), "repo": "me/other"})])
    with pytest.raises(UserError, match="tasks.jsonl:1: field repo: 'me/other' is not name==version and not given by .*repositories"):
        read(tmp_path / "tasks.jsonl", repositories=(str(repository),))


def vars_of(task):
    return {name: getattr(task, name) for name in task.__dataclass_fields__}


def test_edits_applied_again_give_the_change():
    asked = PullRequest("r", "d", FILES_BEFORE, AFTER)
    assert PullRequest.from_text(asked.to_text()) == asked
    edits = pull_request.search_and_replace(asked)
    assert applied(FILES_BEFORE, edits) == {**FILES_BEFORE, **AFTER}
    assert patches.apply_diff(FILES_BEFORE, asked.diff) == {**FILES_BEFORE, **AFTER}
    # Lines that come again are widened until they come once, and no further.
    assert f"{pull_request.SEARCH}    y = x + 3\n{pull_request.DIVIDER}    y = x + 33\n    y += 1\n{pull_request.REPLACE}" in edits
    assert f"{pull_request.SEARCH}    y = x + 0\n    return y\n" in edits
    repeated = PullRequest("r", "d", {"a": "x\n" * 5}, {"a": "x\nx\ny\nx\nx\nx\n"})
    assert applied(repeated.files, pull_request.search_and_replace(repeated)) == repeated.changes


@pytest.mark.parametrize("files, changes", [
    ({"a": "x\n"}, {"a": None}), ({"a": "x\n"}, {"a": "x\n=======\n"}), ({"a": "x"}, {"a": "y"}), ({"a": ""}, {"a": "y\n"}),
])  # fmt: skip
def test_what_search_and_replace_cannot_say_is_a_diff(files, changes, tokenizer, tmp_path):
    asked = PullRequest("r", "d", files, changes)
    assert pull_request.search_and_replace(asked) is None
    (document,), log = documents(tokenizer, tmp_path, "pull_request_edits", [asked])
    assert asked.diff in tokenizer.decode(document["tokens"]) and "1 as diffs" in log[0]


def documents(tokenizer, folder, form, requests, length=4000):
    log = []
    context = types.SimpleNamespace(config=types.SimpleNamespace(seed=1), log=log.append)
    request = types.SimpleNamespace(context=context, name="prs", texts=[one.to_text() for one in requests], tokenizer=tokenizer,
                                    length=length, tokens=10**6, folder=folder / form)
    store = FORMS.resolve(form)(request)
    return [store[i] for i in range(len(store))], log


def test_documents_have_context_in_any_order_and_weigh_description_and_edits(tokenizer, tmp_path):
    asked = PullRequest("me/pkg", ROW["description"], FILES_BEFORE, AFTER)
    made, _ = documents(tokenizer, tmp_path, "pull_request", [asked] * 4)
    orders = set()
    for number, document in enumerate(made):
        text = tokenizer.decode(document["tokens"])
        head, edits = text.removesuffix("<|endoftext|>").split("<|fim_middle|>")
        said, *files = head.split("<|file_sep|>")
        assert said == f"<|repo_name|>me/pkg\n{ROW['description']}\n"
        assert dict(file.split("\n", 1) for file in files) == FILES_BEFORE
        orders.add(tuple(file.split("\n", 1)[0] for file in files))
        assert edits == (asked.diff if number % 2 else pull_request.search_and_replace(asked))
        weighed = tokenizer.decode(document["tokens"][1:][document["weights"][:-1] > 0])
        assert weighed == said.removeprefix("<|repo_name|>") + f"<|fim_middle|>{edits}<|endoftext|>"
    assert len(orders) > 1
    assert "<<<<<<<" not in tokenizer.decode(documents(tokenizer, tmp_path, "pull_request_diff", [asked])[0][0]["tokens"])


def test_long_files_are_shown_around_the_edits_and_what_does_not_fit_is_counted(tokenizer, tmp_path):
    long = "".join(f"line {i}\n" for i in range(2000))
    asked = PullRequest("r", "d", {"a.txt": long, "b.txt": "b\n" * 900}, {"a.txt": long.replace("line 1000\n", "row 1000\n")})
    (document,), _ = documents(tokenizer, tmp_path, "pull_request_edits", [asked], 600)
    text = tokenizer.decode(document["tokens"])
    assert "a.txt\n...\nline 977\n" in text and "line 1023\n...\n<|fim_middle|>" in text and "b.txt" not in text
    with pytest.raises(UserError, match="there are no documents"):
        documents(tokenizer, tmp_path, "pull_request_diff", [asked], 100)


def test_kinds_and_forms_that_do_not_go_together_are_one_line(tmp_path):
    path = written(tmp_path, [ROW])
    with pytest.raises(UserError, match="sources.prs.form: 'text'; kind=pull_requests has the forms pull_request, "):
        PULL_REQUESTS.check(RunConfig(), TextSource("pull_requests", str(path), "text"), FIELD)
    with pytest.raises(UserError, match="sources.prs.kind: 'files'; form=pull_request is of kind=pull_requests"):
        FILES.check(RunConfig(), TextSource("files", str(path), "pull_request"), FIELD)
    with pytest.raises(UserError, match="texts are no pull requests"):
        PullRequest.from_text(Text("plain\ntext"))


MALFORMED = [
    ({**ROW, "description": " "}, "its description is str, expected text"),
    ({**ROW, "patch": None}, "its patch is NoneType, expected text"),
    ({"files": {}, "description": "d"}, "its patch is missing, expected text"),
    ({**ROW, "files": 3}, "files: expected paths and texts, got int"),
    ({**ROW, "files": "{"}, "files: is not valid JSON"),
    ({**ROW, "files": {"a.py": 3}}, "files: expected a text for every path"),
    ({**ROW, "files": [{"content": "a"}]}, "files: expected a text for every path"),
    ({**ROW, "files": {}}, "its patch does not apply to its files: pkg/a.py: no such file"),
    ({**ROW, "patch": "no diff"}, "its patch does not apply to its files: patch is malformed"),
    ({**ROW, "patch": DIFF.replace("pkg/b.py", "../b.py")}, "its patch does not apply to its files: path "),
]  # fmt: skip


@pytest.mark.parametrize("row, line", MALFORMED, ids=[line[:40] for _, line in MALFORMED])
def test_malformed_rows_are_named_or_counted(tmp_path, row, line):
    path = written(tmp_path, [ROW, row, ROW])
    with pytest.raises(UserError, match=f"prs.jsonl:2: {line}") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    found, findings = read(path, "skip")
    assert len(found) == 2 and findings.malformed == 1
