"""Mining a small clone with merged pull requests, squashed ones and plain commits; the cleaning of issue texts."""

import http.server
import json
import os
import shutil
import subprocess
import threading

import pytest

from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.synthesis import sources, verify
from qcn_jax.envs.synthesis.make_tasks import Request, make_tasks
from qcn_jax.envs.synthesis.mine import Criteria, issues, mine
from qcn_jax.envs.synthesis.mine.history import Clone
from qcn_jax.envs.synthesis.mine.split import kind_of
from qcn_jax.envs.tasks import grading
from qcn_jax.errors import UserError
from tests.envs.synthesis.small import SOURCE, TESTS, write_repository

CORE, TEST = "numbers_pkg/core.py", "tests/test_core.py"
MEDIAN = "\n\ndef median(values):\n    return sorted(values)[len(values) // 2]\n"
TEST_MEDIAN = "\n\ndef test_median():\n    from numbers_pkg.core import median\n    assert median([3, 1, 2]) == 2\n"
ISSUE = {"number": 7, "title": "mean of nothing", "body": (
    "`mean([])` gives None; I expected an error.\r\n\r\nSee https://example.org/x and #3.\n"
    "<!-- template -->\nA possible fix: `raise ValueError(values)`\n")}  # fmt: skip
PULL = {"number": 8, "title": "Raise", "body": "resolves #7", "pull_request": {"url": "x"}}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Six changes: docs, a fix without tests, a merged PR that closes #7, a squashed PR, a broken one, tests alone."""
    root = write_repository(tmp_path_factory.mktemp("history"))

    def git(*arguments, **environment):
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", **environment}
        for role in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{role}_NAME": "a", f"GIT_{role}_EMAIL": "a@b", f"GIT_{role}_DATE": "2024-01-01T00:00:00Z"}
        subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, env=environment)

    def commit(message, **changed):
        for path, text in changed.items():
            (root / {"core": CORE, "test": TEST, "doc": "README.md"}[path]).write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", message)

    core = SOURCE.replace("return value\n", "return value  # kept\n", 1)
    raising = core.replace("return total / len(values) if values else None",
                           "if not values:\n        raise ValueError(values)\n    return total / len(values)")
    tests = TESTS.replace("assert mean([]) is None", "with pytest.raises(ValueError):\n        mean([])")
    git("init", "-q", "-b", "main")
    git("remote", "add", "origin", "https://github.com/someone/numbers.git")
    commit("start")
    commit("docs", doc="Numbers.\n")
    commit("comment, fixes #2", core=core)
    git("checkout", "-q", "-b", "work")
    commit("raise instead; fixes #7", core=raising, test=tests)
    git("checkout", "-q", "main")
    git("merge", "-q", "--no-ff", "work", "-m", "Merge pull request #8 from someone/work\n\nRaise for no values")
    commit("Add median (#9)", core=raising + MEDIAN, test=tests + TEST_MEDIAN)
    commit("break things, closes #11", core=raising + MEDIAN + "# x\n", test=tests + "\n\ndef test_x():\n    assert 0\n")
    commit("tests alone", test=tests + TEST_MEDIAN)
    return root


def run(clone, folder, criteria=Criteria(), tracker=""):
    with EnvPool(1, {"kind": "local", "state_dir": str(folder / "state")}) as pool:
        return mine(pool, clone, criteria, folder / "work", lambda _: None, tracker)


def test_mining(clone, tmp_path):
    """With an export: the issue's text, cleaned, is the statement; gold resolves; a second run executes nothing."""
    export = tmp_path / "export.json"
    export.write_text(json.dumps({"issues": [ISSUE, {"number": 11, "title": "t"}], "pulls": [PULL]}))
    mined = run(clone, tmp_path, tracker=str(export))
    assert mined.outcomes == {"no_test_change": 1, "no_source_change": 2, "kept": 1, "no_linked_issue": 1,
                              "no_fail_to_pass": 1}  # fmt: skip
    (task,) = mined.tasks
    assert (task.instance_id, task.kind, task.strategy) == ("someone__numbers-8", "pull_request", "mine")
    assert task.FAIL_TO_PASS == (f"{TEST}::test_mean",) and f"{TEST}::test_stack" in task.PASS_TO_PASS
    assert task.problem_statement == "mean of nothing\n\n`mean([])` gives None; I expected an error."
    assert "raise ValueError" in task.patch and TEST not in task.patch and TEST in task.test_patch
    with make_provider("local", str(tmp_path / "state")) as provider:
        provider.prepare(sources.locate(str(mined.archives / f"{task.repo}.tar.gz")))
        assert verify.verify_task(provider, task).problems == ()
        assert not grading.Grader(provider).grade(task, task.test_patch).resolved
    journal = (tmp_path / "work" / "numbers.mined.jsonl").read_bytes()
    assert run(clone, tmp_path, tracker=str(export)) == mined
    assert (tmp_path / "work" / "numbers.mined.jsonl").read_bytes() == journal


def test_without_issues(clone, tmp_path):
    """Git alone: changes without an issue too, told by what their tests say."""
    mined = run(clone, tmp_path, Criteria(need_issue=False))
    assert mined.outcomes["kept"] == 2 and mined.outcomes["no_fail_to_pass"] == 1
    median = next(task for task in mined.tasks if task.instance_id == "someone__numbers-9")
    assert median.problem_statement.startswith("median\n") and "test_median: ImportError" in median.problem_statement
    assert mined.details and all(words for words in mined.details.values())


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Calling f() fails with KeyError.", "Calling f() fails with KeyError."),
        ("It was reported in [the list](https://x.org/1) and octo/cat#12, GH-4", "It was reported in the list and ,"),
        ("Broken since 1a2b3c4d5e, see https://github.com/a/b/commit/1a2b3c4d5e", "Broken since , see"),
        ("Fixed in #88", ""),
        ("This patch solves it:", ""),
        ("    return total / max(count, 1)", ""),
        ("> try `return total / max(count, 1)` instead", ""),
        ("Signed-off-by: A <a@b.c>", ""),
        ("The default is wrong and the facade too", "The default is wrong and the facade too"),
    ],
)
def test_cleaning(line, kept):
    patch = "--- a/m.py\n+++ b/m.py\n@@ -1 +1 @@\n-    return total / count\n+    return total / max(count, 1)\n"
    assert issues.cleaned(f"Title\n{line}\n", patch) == f"Title\n{kept}".strip()
    assert "```" not in issues.cleaned("a\n```diff\n-x\n+y\n```\nb", patch)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("pkg/core.py", "source"), ("pkg/tests/data.json", "test"), ("tests/test_a.py", "test"), ("setup.py", "other"),
     ("docs/conf.py", "other"), ("CHANGES.rst", "other"), ("src/pkg/testing_tools.py", "source"), ("pkg/x_test.py", "test")],
)  # fmt: skip
def test_kinds_of_files(path, kind):
    assert kind_of(path) == kind


def test_github(tmp_path, monkeypatch):
    """The API over HTTP: the token is sent, failures are tried again, answers are kept, what is gone is None."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["authorization"]))
            status = 404 if self.path.endswith("/404") else 502 if len(asked) == 1 else 401 if self.path.endswith("/9") else 200
            data = json.dumps({**ISSUE, "user": "x"}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GITHUB_TOKEN", "t")
    monkeypatch.setattr(issues.time, "sleep", lambda _: None)
    try:
        for _ in range(2):
            hub = issues.GitHub("a", "b", tmp_path, api=f"http://127.0.0.1:{server.server_port}")
            assert hub.get(7).title == "mean of nothing" and not hub.get(7).is_pull and hub.get(404) is None
        assert asked == 2 * [("/repos/a/b/issues/7", "Bearer t")] + [("/repos/a/b/issues/404", "Bearer t")]
        with pytest.raises(UserError, match="a/b#9: answers 401"):
            hub.get(9)
    finally:
        server.shutdown()
        server.server_close()


def _again(clone, folder, *commands):
    """A copy of the clone on which git commands were run."""
    shutil.copytree(clone, folder)
    for command in commands:
        subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=b", *command], check=True, capture_output=True)
    return folder


def test_several_commits_of_one_pull_request_have_ids_of_their_own(clone, tmp_path):
    copy = _again(clone, tmp_path / "copy")
    for number in range(2):
        core, test = copy / CORE, copy / TEST
        core.write_text(core.read_text() + f"\n\ndef more{number}():\n    return {number}\n")
        test.write_text(test.read_text() + f"\n\ndef test_more{number}():\n    from numbers_pkg.core import more{number}\n"
                        f"    assert more{number}() == {number}\n")
        for command in (["add", "-A"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", f"Part {number} (#20)"]):
            subprocess.run(["git", "-C", copy, *command], check=True)
    tasks = run(copy, tmp_path, Criteria(need_issue=False, limit=2)).tasks
    assert len(tasks) == 2 and tasks[0].instance_id == "someone__numbers-20"
    assert tasks[1].instance_id.startswith("someone__numbers.") and tasks[0].patch != tasks[1].patch


def test_a_clone_that_lacks_objects_is_read_as_far_as_it_goes(clone, tmp_path):
    """Partial clones have the history and not all of the files: such changes are unreadable, and no more."""
    copy = _again(clone, tmp_path / "copy")
    show = ["git", "-C", copy, "rev-parse", f"HEAD~2:{TEST}"]
    blob = subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip()
    (copy / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    found = run(copy, tmp_path, Criteria(need_issue=False))
    assert found.outcomes["unreadable"] >= 1 and found.tasks
    head = ["git", "-C", copy, "rev-parse", f"HEAD:{CORE}"]
    blob = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
    (copy / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    bare = tmp_path / "bare.git"
    shutil.move(copy / ".git", bare)
    with pytest.raises(UserError, match="objects are missing") as failure:
        make_tasks(Request([str(bare)], tmp_path / "made", sandbox="local"))
    assert "\n" not in str(failure.value)


def test_two_clones_of_one_name_are_refused(clone, tmp_path):
    copy = _again(clone, tmp_path / "copy")
    with pytest.raises(UserError, match="^--repo: .* are clones of one name, numbers; give each in a call of its own$"):
        make_tasks(Request([str(clone), str(copy)], tmp_path / "made", ("mine",), sandbox="local"))


def test_exports_of_issues(tmp_path):
    """What stands in texts ends no line, and exports of nothing hold null."""
    path = tmp_path / "issues.json"
    rows = [{"number": 3, "title": "a\u2028b\x85c", "body": "d\u2029e"}, {"number": 4, "title": "f"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert issues.Export(path).get(3).title == "a\u2028b\x85c" and issues.Export(path).get(4).title == "f"
    path.write_text(json.dumps({"issues": None, "pulls": [{"number": 8}]}))
    assert issues.Export(path).get(8).is_pull
    path.write_text(json.dumps({"issues": {"1": {}}}))
    with pytest.raises(UserError, match="field issues must be a list, got dict"):
        issues.Export(path)


def test_bad_input(tmp_path, monkeypatch, clone):
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    with pytest.raises(UserError, match="is no git clone"):
        Clone(tmp_path)
    with pytest.raises(UserError, match="needs a token"):
        run(clone, tmp_path, tracker="github")
    (tmp_path / "bad.json").write_text('[{"title": "no number"}]')
    with pytest.raises(UserError, match="an item has no number"):
        issues.Export(tmp_path / "bad.json")
