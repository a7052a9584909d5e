"""`qcn synthesize` and `qcn verify` as commands: a killed run continues, invalid tasks are named."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.envs.synthesis.answering import serve
from tests.envs.synthesis.small import write_repository

ROOT = pathlib.Path(__file__).parents[2]


def qcn(tmp_path, *arguments, **options):
    """Starts `python -m qcn_jax ARGUMENTS` with a cache of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "qcn_jax", *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, **options)  # fmt: skip


def test_synthesize_killed_and_verified(tmp_path):
    """kill -9 in the middle, the same command again: the tasks of an uninterrupted run; all of them valid."""
    repo = write_repository(tmp_path)
    common = ["synthesize", f"--repo={repo}", "--kinds=flip_comparison,change_constant", "--sandbox=local", "--workers=1"]
    first = qcn(tmp_path, *common, "--out=a.jsonl")
    journal = tmp_path / "a.jsonl.work" / "tasks.journal.jsonl"
    deadline = time.monotonic() + 600
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    for name in ("a", "b"):
        process = qcn(tmp_path, *common, f"--out={name}.jsonl")
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        assert "verified tasks" in out and "flip_comparison" in out
    tasks = (tmp_path / "a.jsonl").read_text()
    assert tasks == (tmp_path / "b.jsonl").read_text() and tasks.count("\n") >= 5
    yields = json.loads((tmp_path / "a.jsonl.yields.json").read_text())
    assert sum(row["kept"] for row in yields["kinds"].values()) == tasks.count("\n")

    rows = [json.loads(line) for line in tasks.splitlines()]
    rows[1]["patch"] = rows[0]["patch"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    for name, status in (("a", 0), ("c", 1)):
        given = [f"--repo={repo}"] if name == "c" else []  # beside a.jsonl it was kept
        process = qcn(tmp_path, "verify", f"--tasks={name}.jsonl", *given, "--sandbox=local", "--isolation=shared")
        out, err = process.communicate(timeout=900)
        assert process.returncode == status, out + err
    assert rows[1]["instance_id"] in out and "2 of 3 tasks are valid" in out


def clone_with_a_change(tmp_path, imports=""):
    """A clone whose last commit closes an issue with a new function and its test; `imports` heads the tests."""
    repo = write_repository(tmp_path, "numbers_pkg")
    core, test = repo / "numbers_pkg/core.py", repo / "tests/test_core.py"

    def commit(message):
        for command in (["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", message]):
            subprocess.run(["git", "-C", repo, *command], check=True, capture_output=True)

    subprocess.run(["git", "init", "-q", repo], check=True)
    test.write_text(imports + test.read_text())
    commit("start")
    core.write_text(core.read_text() + "\n\ndef double(x):\n    return 2 * x\n")
    test.write_text(test.read_text() + "\n\ndef test_double():\n    from numbers_pkg.core import double\n    assert double(2) == 4\n")
    commit("Doubling, closes #4")
    return repo


@pytest.mark.docker
def test_what_the_tests_need_is_set_up(tmp_path):
    """Tests that import a package which only --setup installs: mined, verified and evaluated with it, not without."""
    repo = clone_with_a_change(tmp_path, "import answer_package\n")
    setup = ("--setup=d=$(python3 -c 'import site; print(site.getsitepackages()[0])'); mkdir -p $d && "
             "echo x = 7 > $d/answer_package.py")

    def run(*arguments):
        process = qcn(tmp_path, *arguments, "--sandbox=docker", "--workers=1")
        out, err = process.communicate(timeout=900)
        return process.returncode, out + err

    mine = ["synthesize", f"--repo={repo}", "--strategies=mine"]
    status, text = run(*mine, "--out=without.jsonl")
    assert status == 1 and "0 tasks of 1 changes (tests_fail_after 1)" in text
    status, text = run(*mine, "--setup=echo no such thing; exit 3", "--out=broken.jsonl")
    assert status == 1 and "--setup: image" in text and "no such thing" in text
    assert not (tmp_path / "broken.jsonl").exists()
    status, text = run(*mine, setup, "--out=with.jsonl")
    assert status == 0 and "1 tasks of 1 changes (kept 1)" in text
    (task,) = [json.loads(line) for line in (tmp_path / "with.jsonl").read_text().splitlines()]
    prediction = {"instance_id": task["instance_id"], "model_name_or_path": "gold", "model_patch": task["patch"]}
    (tmp_path / "gold.jsonl").write_text(json.dumps(prediction) + "\n")
    for given, resolved in (([setup], 1), ([], 0)):
        status, text = run("evaluate", "--tasks=with.jsonl", "--predictions=gold.jsonl", f"--out=out{resolved}", *given)
        assert status == 0 and json.loads((tmp_path / f"out{resolved}/summary.json").read_text())["resolved"] == resolved
    status, text = run("verify", "--tasks=with.jsonl", setup)
    assert status == 0 and "1 of 1 tasks are valid" in text


def test_all_strategies(tmp_path):
    """Rules, a model behind an endpoint, combinations and history in one run, then verified with reruns."""
    repo = clone_with_a_change(tmp_path)

    def model(messages):
        return "```python\n" + messages[-1]["content"].rsplit("```python\n", 1)[1].replace("total / len", "total * len")

    with serve(model) as (url, bodies):
        process = qcn(tmp_path, "synthesize", f"--repo={repo}", "--strategies=inject,rewrite,combine,mine", "--out=t.jsonl",
                      "--kinds=change_augmented,drop_loop,change_boundary,flip_comparison", "--combined_per_repo=4",
                      f"--endpoint={url}", "--model=m", "--sandbox=local", "--workers=1")
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert {row["strategy"] for row in rows} == {"inject", "combine", "mine"} and bodies
    assert {"model_modify", "combine_file", "commit"} <= {row["kind"] for row in rows}
    assert any(row["held_out_patch"] for row in rows) and all(row["difficulty"] > 0 for row in rows)
    assert "numbers_pkg: 1 tasks of 1 changes (kept 1)" in out
    process = qcn(tmp_path, "verify", "--tasks=t.jsonl", f"--repo={repo}", "--sandbox=local", "--isolation=shared",
                  "--reruns=1", "--workers=1")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert f"{len(rows)} of {len(rows)} tasks are valid" in out and f"flaky: 0 of {len(rows)} tasks" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["synthesize", "--repo=.", "--strategies=rewrite", "--out=x.jsonl"], "--endpoint: needed for strategy rewrite"),
        (["synthesize", "--repo=.", "--strategies=combine", "--out=x.jsonl"], "--strategies: combine needs inject"),
        (["synthesize", "--repo=.", "--strategies=build", "--setup=true", "--out=x.jsonl"], "gets its environment by rules"),
        (["synthesize", "--repo=nowhere", "--out=x.jsonl"], "--repo: 'nowhere' is neither"),
        (["synthesize", "--repo=.", "--strategies=magic", "--out=x.jsonl"], "--strategies: unknown 'magic'"),
        (["synthesize", "--repo=.", "--kinds=magic", "--out=x.jsonl"], "--kinds: unknown 'magic'"),
        (["verify", "--tasks=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    ],
)
def test_refusals(tmp_path, arguments, line):
    process = qcn(tmp_path, *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and line in err and err.strip().count("\n") == 0
