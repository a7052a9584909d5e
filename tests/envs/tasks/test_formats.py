"""Other projects' formats: field names as documented, there and back, and by their own packages where installed."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.tasks import formats, harbor, swebench
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from tests.envs.synthesis.small import SOURCE, TESTS

PRISTINE = {"numbers_pkg/__init__.py": "", "numbers_pkg/core.py": SOURCE, "tests/test_core.py": TESTS.split("@pytest.mark.parametrize(\"name\"")[0]}
BUGGY = {**PRISTINE, "numbers_pkg/core.py": SOURCE.replace("value > high", "value >= low")}
NAMES = {case: f"tests/test_core.py::test_clamp[{case}]" for case in ("5-5", "-1-0", "11-10", "0-0", "10-10")}
TASK = Task(
    instance_id="pypi__numbers_pkg.00000000.change_boundary__11111111", repo="numbers_pkg==1.0", base_commit="a" * 40,
    patch=patches.make_diff(BUGGY, PRISTINE), test_patch="", problem_statement="It \"breaks\".\nReally.", version="1.0",
    FAIL_TO_PASS=(NAMES["5-5"], NAMES["0-0"]), PASS_TO_PASS=(NAMES["-1-0"], NAMES["10-10"]), kind="change_boundary",
    bug_patch=patches.make_diff(PRISTINE, BUGGY), image_name="local/numbers:1", path="numbers_pkg/core.py",
)  # fmt: skip
SWEBENCH = {"repo", "instance_id", "base_commit", "patch", "test_patch", "problem_statement", "hints_text",
            "created_at", "version", "FAIL_TO_PASS", "PASS_TO_PASS", "environment_setup_commit"}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("swebench", SWEBENCH),
        ("swebench5", SWEBENCH | {"image", "eval_script", "log_parser", "eval_type"}),
        ("swesmith", {"instance_id", "repo", "patch", "FAIL_TO_PASS", "PASS_TO_PASS", "created_at", "image_name",
                      "base_commit", "problem_statement"}),
        ("swebench_pro", {"repo", "instance_id", "base_commit", "patch", "test_patch", "problem_statement",
                          "fail_to_pass", "pass_to_pass", "before_repo_set_cmd", "selected_test_files_to_run",
                          "dockerhub_tag", "repo_language"}),
    ],
)  # fmt: skip
def test_fields_and_round_trip(tmp_path, kind, fields):
    """Each format has its documented fields and no others, and reads back as the same fix and tests."""
    formats.write(tmp_path / "tasks.jsonl", [TASK], kind)
    row = json.loads((tmp_path / "tasks.jsonl").read_text())
    assert set(row) == fields and formats.detect(row) == kind
    back = formats.read(tmp_path / "tasks.jsonl")[0]
    for name in ("instance_id", "repo", "patch", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS", "problem_statement"):
        assert getattr(back, name) == getattr(TASK, name), name
    if kind == "swesmith":
        assert patches.apply_diff(PRISTINE, row["patch"]) == BUGGY and back.kind == "change_boundary"


def test_published_spellings():
    """Nulls, JSON strings, Python literals and dates as they occur in published rows."""
    row = {**formats.to_swebench_pro(TASK), "fail_to_pass": "['a::b', \"c::d['x']\"]", "hints_text": None}
    assert formats.from_row(row).FAIL_TO_PASS == ("a::b", "c::d['x']")
    row = {**formats.to_swebench(TASK), "hints_text": None, "created_at": 1700000000}
    assert formats.from_row(row).hints_text == "" and formats.from_row(row).created_at == "1700000000"
    with pytest.raises(UserError, match="row 7: field fail_to_pass is not a list"):
        formats.from_row({**formats.to_swebench_pro(TASK), "fail_to_pass": "oops"}, "row 7")
    with pytest.raises(UserError, match="SWE-bench 5 needs image_name"):
        formats.to_swebench5(Task(*["x"] * 6, (), ()))


@pytest.mark.parametrize("settings", ["", "addopts = --cov=pkg -n 4"])
def test_eval_script_runs(tmp_path, settings):
    """The script of release 5 as the package changes and runs it: the gold patch decides, whatever plugins the image lacks.

    It is read as the package reads it, and by the package where that is installed.
    """
    package = importlib.util.find_spec("swebench") is not None
    root, row = tmp_path / "testbed", formats.to_swebench5(TASK)
    instance = swebench.Instance.from_row(row)
    prediction = {"instance_id": TASK.instance_id, "model_name_or_path": "m", "model_patch": TASK.patch}
    for state, resolved in ((BUGGY, False), (patches.apply_diff(BUGGY, TASK.patch), True)):
        _write(root, {**state, "pytest.ini": f"[pytest]\n{settings}\n"})
        script = instance.script()
        if package:
            from swebench.harness import grading, utils

            specification = utils.make_test_spec(row)
            script = specification.eval_script
        script = script.replace("cd /testbed", f"cd {root}").replace("python -m", f"{sys.executable} -m")
        run = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        found = swebench.verdict(instance, run.stdout)
        assert found.resolved is resolved and found.tests_status["PASS_TO_PASS"]["failure"] == [], run.stdout
        if package:
            (tmp_path / "log").write_text(run.stdout)
            report = grading.get_eval_report(specification, prediction, str(tmp_path / "log"), include_tests_status=True)
            assert report[TASK.instance_id]["resolved"] is resolved, run.stdout


@pytest.mark.skipif(importlib.util.find_spec("swebench") is None, reason="not installed: swebench")
def test_swebench_package(tmp_path):
    """The package loads our file, makes its test specification and grades a log of ours as we do."""
    from swebench.harness import grading, utils

    formats.write(tmp_path / "tasks.jsonl", [TASK], "swebench5")
    instance = utils.load_swebench_dataset(str(tmp_path / "tasks.jsonl"))[0]
    specification = utils.make_test_spec(instance)
    assert specification.FAIL_TO_PASS == list(TASK.FAIL_TO_PASS)
    names = [*TASK.FAIL_TO_PASS, *TASK.PASS_TO_PASS]
    for broken, resolved in ((None, True), (names[0], False), (names[-1], False)):
        lines = [f"{'FAILED' if name == broken else 'PASSED'} {name}" for name in names]
        log = tmp_path / "log.txt"
        log.write_text("\n".join([">>>>> Start Test Output", *lines, ">>>>> End Test Output", ""]))
        prediction = {"instance_id": TASK.instance_id, "model_name_or_path": "m", "model_patch": TASK.patch}
        report = grading.get_eval_report(specification, prediction, str(log), include_tests_status=True)
        assert report[TASK.instance_id]["resolved"] is resolved


def _write(root: pathlib.Path, state):
    for path, text in state.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize("settings", ["addopts = -ra -q", "addopts = -s -x\nconsole_output_style = count", "addopts = --cov=pkg -n 4"])
def test_harbor_folder(tmp_path, settings):
    """The documented files and keys; the verifier, run, rewards the solution and nothing else, however pytest is set."""
    folder = tmp_path / "task"
    harbor.write_folder(folder, TASK, {**PRISTINE, "pytest.ini": f"[pytest]\n{settings}\n"})
    config = tomllib.loads((folder / "task.toml").read_text())
    assert set(config) >= {"version", "metadata", "agent", "verifier", "environment"}
    assert config["agent"]["timeout_sec"] > 0 and config["verifier"]["timeout_sec"] > 0
    assert set(config["environment"]) == {"build_timeout_sec", "cpus", "memory_mb", "storage_mb"}
    read = harbor.read_folder(folder)
    assert read.task == TASK and TASK.problem_statement in read.instruction
    # Its scripts name absolute folders of the container; here they are moved below tmp_path.
    repo, logs = folder / "environment" / "repo", tmp_path / "logs"

    def script(name):
        text = (folder / name).read_text()
        for place, moved in (("/logs/verifier", logs), ("/tests/", f"{folder}/tests/"), ("/testbed", repo)):
            text = text.replace(place, str(moved))
        return text

    (folder / "tests" / "grade.py").write_text(script("tests/grade.py"))
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["git", "init", "-q", str(repo)], check=True)
    for solved, reward in ((False, 0.0), (True, 1.0)):
        if solved:
            subprocess.run(["bash", "-c", script("solution/solve.sh")], check=True)
        (repo / "tests" / "test_core.py").write_text("")  # whatever was done to the tests does not matter
        subprocess.run(["bash", "-c", script("tests/test.sh")], check=True, env={**os.environ, "PATH": path},
                       stdout=subprocess.DEVNULL)  # fmt: skip
        assert harbor.read_reward(logs) == reward


GOOD_TOMLS = {
    "[environment]\nmemory = '8G'\nstorage = '512m'\n": (8192, 512, 1, ""),
    "[environment]\nmemory = '1.5g'\nmemory_mb = 1536\n": (1536, 10240, 1, ""),
    "[environment]\ndocker_image = 'a/b:1'\ncpus = 0.5\nmemory = '2048K'\n": (2, 10240, 0.5, "a/b:1"),
    "version = '1.0'\n[metadata]\nx = [1]\n[environment]\nmemory_mb = 100\nos = 'Linux'\n": (100, 10240, 1, "")}
BAD_TOMLS = {
    "[environment]\nmemory = '8X'\n": "environment.memory must be a size", "environment = 3\n": "environment must be a table",
    "[environment]\nmemory = '8G'\nmemory_mb = 100\n": "environment.memory_mb 100", "agent = []\n": "agent must be a table",
    "[agent]\ntimeout_sec = nan\n": "agent.timeout_sec must be a positive number",
    "[verifier]\ntimeout_sec = inf\n": "verifier.timeout_sec must be", "[environment]\ndocker_image = 3\n": "docker_image must be text",
    "metadata = 'x'\n": "metadata must be a table", "task = 'x'\n": "task must be a table", "x = [\n": "is not valid TOML",
    "[environment]\ncpus = '2'\n": "environment.cpus must be", "[[steps]]\nname = 'a'\n": "several steps",
    "[environment]\nos = 'windows'\n": "environment.os must be linux"}


def _harbor(folder, toml, dockerfile):
    for name, text in {"task.toml": toml, "instruction.md": "Do.", "tests/test.sh": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if dockerfile:
        (folder / "environment").mkdir(exist_ok=True)
        (folder / "environment" / "Dockerfile").write_text("FROM a/b:1\n")
    return folder


def test_harbor_resources_are_read_as_harbor_reads_them(tmp_path):
    """In both spellings, and with an image in place of a Dockerfile; what is odd is one line that names the field."""
    for number, (toml, wanted) in enumerate(GOOD_TOMLS.items()):
        task = harbor.read_folder(_harbor(tmp_path / str(number), toml, "docker_image" not in toml))
        assert (task.memory_mb, task.storage_mb, task.cpus, task.docker_image) == wanted
    for number, (toml, words) in enumerate(BAD_TOMLS.items()):
        with pytest.raises(UserError, match=re.escape(words)) as failure:
            harbor.read_folder(_harbor(tmp_path / f"bad{number}", toml, True))
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name, content, words", [
    ("task.toml", b"\xff\xfe", "is not valid UTF-8"), ("instruction.md", b"\xff", "is not valid UTF-8"),
    ("tests/config.json", b"{", "is not valid JSON"), ("tests/config.json", b'{"task": {}}', "field instance_id is missing"),
    ("instruction.md", None, "instruction.md is missing"), ("tests/test.sh", None, "tests/test.sh is missing"),
    ("environment/Dockerfile", None, "Dockerfile is missing")])
def test_odd_files_of_harbor_are_named(tmp_path, name, content, words):
    path = _harbor(tmp_path, "", True) / name
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(UserError, match=words) as failure:
        harbor.read_folder(tmp_path)
    assert "\n" not in str(failure.value)
    if content is None:
        path.mkdir()
        with pytest.raises(UserError, match=words):
            harbor.read_folder(tmp_path)


@pytest.mark.parametrize("content", ["[1]", '["tests"]', '{"task": 3}', '{"other": 1}'])
def test_other_peoples_files_of_the_same_name_are_theirs(tmp_path, content):
    (_harbor(tmp_path, "", True) / "tests" / "config.json").write_text(content)
    assert harbor.read_folder(tmp_path).task is None


@pytest.mark.parametrize("name, content, reward", [
    ("reward.json", "1", 1.0), ("reward.json", '{"reward": 0.25, "other": 3}', 0.25), ("reward.txt", "1e0\n", 1.0),
    ("reward.json", '{"reward": "1"}', None), ("reward.json", "NaN", None), ("reward.json", "[]", None),
    ("reward.txt", "inf", None), ("reward.txt", "", None), ("reward.json", '{"reward": 1e999}', None)])
def test_rewards(tmp_path, name, content, reward):
    (tmp_path / name).write_text(content)
    if reward is None:
        with pytest.raises(UserError, match="holds no reward"):
            harbor.read_reward(tmp_path)
    else:
        assert harbor.read_reward(tmp_path) == reward


def test_harbor_refusals(tmp_path):
    """A folder of somebody else's is read; what is missing or ill-typed is named."""
    with pytest.raises(UserError, match="task.toml is missing"):
        harbor.read_folder(tmp_path)
    for name, text in {"task.toml": 'schema_version = "1.1"\n[task]\nname = "a/b"\n[agent]\ntimeout_sec = 5\n',
                       "instruction.md": "Do.", "tests/test.sh": "", "environment/Dockerfile": ""}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    task = harbor.read_folder(tmp_path)
    assert (task.name, task.agent_seconds, task.memory_mb, task.task) == ("a/b", 5, harbor.MEMORY_MB, None)
    (tmp_path / "task.toml").write_text("[environment]\nmemory_mb = 'much'\n")
    with pytest.raises(UserError, match="environment.memory_mb must be a positive number, got 'much'"):
        harbor.read_folder(tmp_path)
    assert harbor.read_reward(tmp_path) is None
    (tmp_path / "reward.txt").write_text("0.5\n")
    assert harbor.read_reward(tmp_path) == 0.5
    (tmp_path / "reward.json").write_text("{}")
    with pytest.raises(UserError, match="holds no reward"):
        harbor.read_reward(tmp_path)
