"""Hostile rows and patches: each is an outcome of its own row, soon, and ends no other."""

import dataclasses
import json
import os
import re

import pytest
from absl import flags

from qcn_jax import files
from qcn_jax.agents import records
from qcn_jax.cli import task_repositories
from qcn_jax.envs import names, patches
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks import formats, permissions, predictions, swebench
from qcn_jax.envs.tasks.grading import Grader
from qcn_jax.envs.tasks.schema import Task, read_tasks
from qcn_jax.envs.tasks.verdicts import Verdict, judge, write_reports
from qcn_jax.errors import UserError
from tests.sandboxes import BROKEN, SOURCE, make_task, world  # noqa: F401

SECONDS = 25  # of processors; far above what is needed, far below what was


def spent() -> float:
    """Processor seconds of this process and of those it has waited for, which a loaded machine does not change."""
    return sum(os.times()[:4])


def new(path, text="x = 1\n"):
    return patches.render([patches.FilePatch(None, path, (patches.Hunk(0, 1, (("+", text),)),))])


STATE = {"pkg/__init__.py": "", "pkg/core.py": "x = 1\n"}
UNUSABLE = {
    "file_as_folder": new("pkg/core.py/x.py"), "file_as_deep_folder": new("pkg/core.py/a/b/c.py"), "folder_as_file": new("pkg"),
    "new_file_as_folder": new("pkg/a.py") + new("pkg/a.py/b.py"), "long_name": new(f"pkg/{'a' * 300}.py"),
    "long_path": new("/".join(["pkg"] * 700) + "/x.py"), "wide_name": new(f"pkg/{'ü' * 130}.py"),
    "surrogate_in_path": new("pkg/\ud800.py"), "escaped_byte_in_path": new("pkg/\udcff.py"),
    "surrogate_in_text": new("pkg/x.py", "x = '\ud800'\n"), "pair_in_text": new("pkg/x.py", "x = '\ud83d'\n"),
    "nul_in_path": new("pkg/a\0b.py"), "control_in_path": new("pkg/a\x07b.py"), "dots": new("pkg/../../x.py")}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_patches_fail_on_the_host(name):
    with pytest.raises(patches.PatchError) as failure:
        patches.apply_changes(STATE, UNUSABLE[name])
    str(failure.value).encode()
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_patches_are_no_infrastructure(world, name):  # noqa: F811
    patch = UNUSABLE[name].replace("pkg/core.py", SOURCE).replace("pkg", "victim")
    assert Grader(world.provider).grade(world.task, patch).outcome in ("patch_failed", "empty_patch")


def edit(path, start, *lines):
    return patches.render([patches.FilePatch(path, path, (patches.Hunk(start, start, lines),))])


@pytest.mark.parametrize("start", [1, 150_000, 10**15])
def test_places_are_searched_within_a_limit(start):
    text = "x\n" * 300_000
    patch = edit("a.py", start, *[(" ", "x\n")] * 100_000, ("-", "y\n"), (" ", "x\n"))
    started = spent()
    with pytest.raises(patches.PatchError):
        patches.apply_changes({"a.py": text}, patch)
    assert spent() - started < SECONDS


def test_many_hunks_are_placed_within_a_limit():
    text = "x\n" * 200_000
    hunks = tuple(patches.Hunk(1, 1, ((" ", "x\n"), ("-", "x\n"), ("+", f"{n}\n"))) for n in range(20_000))
    started = spent()
    assert patches.apply_changes({"a.py": text}, [patches.FilePatch("a.py", "a.py", hunks)])
    assert spent() - started < SECONDS


@pytest.mark.parametrize("old, new", [
    ("x\n" * 100_000 + "y\n", "z\n" + "x\n" * 99_000), ("\n".join(f"{n * 7919 % 30_011}" for n in range(30_011)), "\n".join(
        map(str, range(30_011)))), ("a\nb\n" * 50_000, "b\nc\n" * 50_000)], ids=["same", "shuffled", "alternating"])
def test_differences_are_found_within_a_limit(old, new):
    started = spent()
    diff = patches.make_diff({"a.py": old}, {"a.py": new})
    assert spent() - started < SECONDS
    parsed = [patches.FilePatch(f.old, f.new, f.hunks) for f in [patches.FilePatch("a.py", "a.py", patches._hunks(
        patches._lines(old), patches._lines(new)))]]
    assert patches.apply_changes({"a.py": old}, parsed)["a.py"] == new and diff


def test_reversal_takes_linear_time():
    patch = edit("a.py", 1, *[(" ", "x\n"), ("-", "y\n"), ("+", "z\n")] * 40_000)
    started = spent()
    assert patches.reverse(patches.reverse(patch)) == patch
    assert spent() - started < SECONDS


@pytest.mark.parametrize("text", ["def __eq__(" * 80_000, "def __eq__()" + "a" * 900_000, "def __eq__(self):" + " " * 900_000,
                                  "sys" + " " * 900_000, "__eq__" + " " * 900_000, "def " * 225_000])
def test_forbidden_lines_are_found_within_a_limit(text):
    started = spent()
    permissions.forbidden_lines({"a.py": text}, {})
    assert spent() - started < SECONDS


# --- infrastructure is what fails without the patch, too


class Failing:
    """A provider whose sandboxes fail where a patch says so, or always."""

    def __init__(self, always=False, error=SandboxError("the sandbox's server ended")):
        self.always, self.error, self.made = always, error, 0

    def files(self, name):
        return {**STATE, "tests/test_a.py": "def test(): pass\n"}

    def create(self, name, overlay=None, role="agent", *rest, **more):
        self.made += 1
        if self.always or "KILL" in "".join(text or "" for text in (overlay or {}).values()):
            raise self.error
        return self

    prepared: dict = {}

    def run_tests(self, *_):
        return TestRun("ok", {}, {}, 0.0, "", 1)

    def destroy(self):
        pass


@pytest.mark.parametrize("error, outcome", [(SandboxError("ended"), "killed"), (OSError("no room"), "killed"),
                                            (NotADirectoryError("data.bin"), "patch_failed")])
def test_what_only_the_patch_breaks_is_no_infrastructure(error, outcome):
    task = Task("a__b-1", "pkg", "", "", "", "", ("tests/test_a.py::test",), ())
    patch = patches.make_diff({"pkg/core.py": "x = 1\n"}, {"pkg/core.py": "KILL = 1\n"})
    verdict = Grader(Failing(error=error)).grade(task, patch)
    assert (verdict.outcome, verdict.detail) == (outcome, str(error))
    assert Grader(Failing(True, error)).grade(task, patch).outcome == "infrastructure"


# --- suspected exploits


def test_tampering_is_an_outcome_of_its_own(tmp_path):
    task = make_task()
    good = dict.fromkeys((*task.FAIL_TO_PASS, *task.PASS_TO_PASS), "passed")
    for status in ("ok", "timeout", "killed"):
        verdict = judge(task, TestRun(status, good, {}, 0.0, "", 0, tampered=("records",)))
        assert verdict.outcome == "suspected_exploit" and not verdict.resolved and verdict.caught == ("tampered: records",)
    verdicts = [verdict, Verdict("b", "resolved"), Verdict("c", "infrastructure")]
    report = write_reports(tmp_path, "t", "m", verdicts, [v.instance_id for v in verdicts])
    assert report["suspected_exploit_ids"] == report["unresolved_ids"] == [task.instance_id]
    assert report["error_ids"] == report["infra_failure_ids"] == ["c"]
    found = [records.Record(v.instance_id, 0, records.outcome_of(v)) for v in verdicts]
    rate = records.summary(["victim__1", "b", "c"], found, 1)
    assert (rate["resolved"], rate["attempted"], rate["suspected_exploit"], rate["infrastructure"]) == (1, 2, 1, 1)


def test_tampering_with_pytest_is_named(world):  # noqa: F811
    source = BROKEN + ("\nfrom _pytest.reports import TestReport\nold = TestReport.from_item_and_call\ndef new(item, call):\n"
                       "    call.excinfo = None\n    return old(item, call)\nTestReport.from_item_and_call = new\n")
    patch = patches.make_diff({SOURCE: BROKEN}, {SOURCE: source})
    assert Grader(world.provider, strict=False).grade(world.task, patch).outcome == "suspected_exploit"


# --- names and fields of rows

ROW = dataclasses.replace(make_task(), base_commit="c").to_json()
IDS = ["../../x", "/tmp/x", "a/b", "..", ".hidden", "a\\b", "", "a\0b", "\ud800", "a" * 256, "m.qcn.json", "preds.jsonl", "a b", "a\nb"]
FIELDS = [{"timeout": "soon"}, {"timeout": -1}, {"timeout": 0}, {"timeout": True}, {"timeout": float("nan")}, {"timeout": [20]},
          {"repo": None}, {"repo": 7}, {"repo": ""}, {"language": "co\nbol"}, {"language": "cobol"}, {"patch": None}, {"problem_statement": "\ud800"},
          {"image_name": "x;touch /tmp/y"}, {"image_name": "../containers/json"}, {"image_name": "x\nRUN evil"},
          {"image_name": "$(id)"}, {"FAIL_TO_PASS": "7"}, {"FAIL_TO_PASS": ["\ud800"]}, {"FAIL_TO_PASS": [7]}, {"path": 3},
          {"difficulty": "high"}]


@pytest.mark.parametrize("changes", [*({"instance_id": name} for name in IDS), *FIELDS], ids=lambda c: ascii(c)[:50])
def test_rows_are_refused_in_one_line(changes):
    for read in (Task.from_json, formats.from_row):
        with pytest.raises(UserError) as failure:
            read({**ROW, **changes}, "tasks.jsonl:3")
        words = str(failure.value)
        words.encode()
        assert re.fullmatch(rf"tasks\.jsonl:3: field {next(iter(changes))}\b.*", words)


GOOD = json.dumps(ROW)
BAD_ROWS = {
    "no_json": '{"instance_id": ', "no_object": "[1]", "no_id": json.dumps({**ROW, "instance_id": None}),
    "path_as_id": json.dumps({**ROW, "instance_id": "../x"}), "cobol": json.dumps({**ROW, "language": "cobol", "instance_id": "c"}),
    "again": GOOD, "nested": "[" * 100_000, "half": json.dumps({**ROW, "instance_id": "h", "problem_statement": "\ud800"}),
    "number": "7", "no_utf8": None}


def write_rows(path, good, bad, other):
    path.write_bytes(b"".join(line + b"\n" for line in (good, b"\xff\xfe" if bad is None else bad.encode(), b"", other)))
    return path


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_does_not_end_the_others(tmp_path, name):
    other = json.dumps({**ROW, "instance_id": "other-1"}).encode()
    path = write_rows(tmp_path / "tasks.jsonl", GOOD.encode(), BAD_ROWS[name], other)
    for read in (formats.read, read_tasks):
        faults = []
        assert [task.instance_id for task in read(path, faults)] == [ROW["instance_id"], "other-1"]
        assert len(faults) == 1 and faults[0].startswith(f"{path}:2: ") and "\n" not in faults[0]
        with pytest.raises(UserError, match="tasks.jsonl:2: "):
            read(path)


@pytest.mark.parametrize("bad", ["{", "[]", '{"instance_id": "zzz", "model_name_or_path": "m", "model_patch": ""}',
                                 '{"instance_id": "a", "model_name_or_path": "m", "model_patch": "x"}', None,
                                 '{"instance_id": "b", "model_name_or_path": 7, "model_patch": ""}',
                                 '{"instance_id": "b", "model_name_or_path": "m"}', '{"instance_id": "\\ud800"}'])
def test_a_bad_prediction_does_not_end_the_others(tmp_path, bad):
    def line(name):
        return json.dumps({"instance_id": name, "model_name_or_path": "m", "model_patch": "p"}).encode()

    path = write_rows(tmp_path / "preds.jsonl", line("a"), bad, line("b"))
    faults, tasks = [], dict.fromkeys("ab")
    assert [(row.instance_id, row.patch) for row in predictions.read_predictions(path, tasks, faults)] == [("a", "p"), ("b", "p")]
    assert len(faults) == 1 and faults[0].startswith(f"{path}:2: ")
    with pytest.raises(UserError, match="preds.jsonl:2: "):
        predictions.read_predictions(path, tasks)


def test_instances_that_come_twice_are_reported(tmp_path):
    row = {"instance_id": "a__b-1", "image": "a/b:1", "eval_script": "x", "log_parser": "parse_log_pytest", "eval_type": "pass_and_fail",
           "FAIL_TO_PASS": ["t"], "PASS_TO_PASS": [], "repo": "a/b"}
    files.write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "FAIL_TO_PASS": ["u"]}, {**row, "instance_id": "a__b-2", "image": "$(id)"}])
    faults = []
    found = swebench.read(tmp_path / "rows.jsonl", faults)
    assert found["a__b-1"].FAIL_TO_PASS == ("t",) and len(found) == 1
    assert [fault.split(": ", 1)[0][-2:] for fault in faults] == [":2", ":3"]
    with pytest.raises(UserError, match="comes a second time"):
        swebench.read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("model", ["../../x", "/etc/x", "a\0b", "\ud800", "m" * 400, ".", "..", "", "a/b", "org/model:1", "a\nb", "..\\x"])
def test_names_of_models_are_no_paths(tmp_path, model):
    out = tmp_path / "a" / "b" / "out"
    write_reports(out, "qcn", model, [], [])
    (only,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert only.parent == out and only.name.endswith(".qcn.json") and only.name.isascii()


def test_repositories_of_rows_are_no_folders_of_the_grader(tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    flags.DEFINE_string("tasks", str(tmp_path / "tasks.jsonl"), "", flag_values=values)
    task_repositories.define(values)
    values(["x"])
    tasks = [dataclasses.replace(make_task(), repo=name) for name in ("private", str(tmp_path / "private"), "../private", "x==1/../y")]
    faults = []
    assert task_repositories.find(values, tasks, faults) == [] and len(faults) == 4
    assert all(re.search("is not name==version", fault) for fault in faults)
    with pytest.raises(UserError):
        task_repositories.find(values, tasks)


@pytest.mark.parametrize("value, seconds", [(20, 20.0), (20.5, 20.5), (None, 30.0)])
def test_timeouts_as_numbers(value, seconds):
    for read in (Task.from_json, formats.from_row):
        assert read({**ROW, "timeout": value}).timeout == seconds


def test_documents_with_half_characters_are_written(tmp_path):
    value = {"model_patch": "x\ud800 \udcff", "ü": "é"}
    files.write_json(tmp_path / "a.json", value)
    files.write_jsonl(tmp_path / "a.jsonl", [value])
    assert files.read_json(tmp_path / "a.json") == value and files.read_jsonl(tmp_path / "a.jsonl") == [value]
    assert "é" in (tmp_path / "a.json").read_text() and json.loads((tmp_path / "a.json").read_text()) == value


def test_honest_names():
    for name in ("astropy__astropy-12907", "toolz==1.2.0__3", "a__b.c0ffee12.func_pm__x1", "instance_a__b-vnan"):
        assert names.id_fault(name) == ""
    for name in ("qcn-test/victim:1", "registry.example:5000/a/b_c:v1", "python:3.11-slim-bookworm", "sha256:" + "a" * 64,
                 "swebench/sweb.eval.x86_64.astropy_1776_astropy-12907:latest", "a/b__c.d@sha256:" + "0" * 64):
        assert names.image_fault(name) == "", name
