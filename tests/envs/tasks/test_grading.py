"""Grading: SWE-bench's semantics on synthetic runs, and verdicts of real runs (hostile patches: tests/attacks)."""

import dataclasses
import json

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import SandboxError
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.tasks import suite
from qcn_jax.envs.tasks.grading import Grader
from qcn_jax.envs.tasks.permissions import allowed, refusal
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict, VerdictCache, judge, verdict_key, write_reports
from tests.sandboxes import BROKEN, CALC, FAILING, FILE, PASSING, SOURCE, world  # noqa: F401

TASK = Task("i", "r", "", "", "", "", ("t::f1", "t::f2"), ("t::p1", "t::p2"))
GOOD = {"t::f1": "passed", "t::f2": "passed", "t::p1": "passed", "t::p2": "passed"}


def run(outcomes, status="ok", exit_status=0, tampered=()):
    return TestRun(status, outcomes, {}, 0.1, "", exit_status, 0.1, tampered)


@pytest.mark.parametrize("change, resolved", [
    ({}, True), ({"t::f1": "failed"}, False), ({"t::f1": "error"}, False), ({"t::f1": "skipped"}, False),
    ({"t::f1": None}, False), ({"t::f1": "xfailed"}, True), ({"t::p1": "failed"}, False), ({"t::p1": None}, False),
    ({"t::p1": "skipped"}, True), ({"t::p1": "xfailed"}, True), ({"t::p1": "xpassed"}, False)])
def test_swe_bench_semantics(change, resolved):
    outcomes = {name: outcome for name, outcome in {**GOOD, **change}.items() if outcome is not None}
    verdict = judge(TASK, run(outcomes))
    assert verdict.resolved is resolved
    listed = verdict.tests_status
    assert sorted(listed["FAIL_TO_PASS"]["success"] + listed["FAIL_TO_PASS"]["failure"]) == ["t::f1", "t::f2"]
    assert bool(listed["FAIL_TO_PASS"]["failure"] or listed["PASS_TO_PASS"]["failure"]) is not resolved


def test_results_alone_or_exit_status_alone_are_not_enough():
    assert judge(TASK, run(GOOD)).resolved
    assert judge(TASK, run(GOOD, exit_status=1)).outcome == "unresolved"
    assert judge(TASK, run({}, exit_status=0)).outcome == "unresolved"
    assert judge(TASK, run(GOOD, tampered=("x",))).outcome == "suspected_exploit"
    assert judge(TASK, run(GOOD, status="killed")).outcome == "killed"
    assert judge(TASK, run(GOOD, status="timeout")).outcome == "timeout"
    assert not judge(dataclasses.replace(TASK, FAIL_TO_PASS=()), run(GOOD)).resolved


@pytest.mark.parametrize("path, expected", [
    ("pkg/core.py", True), ("pkg/new.py", True), ("pkg/sub/new.py", True), ("data.txt", True), ("setup.py", False),
    ("pkg/tests/x.py", False), ("pkg/json.py", True), ("json.py", False), ("other/new.py", False), ("new.py", False), ("pkg/x.pth", False),
    ("pkg/test_core.py", False), ("pkg/.hidden", False), ("docs/conf.py", False), ("pkg/doctested.py", False)])
def test_allowed_paths(path, expected):
    pristine = dict.fromkeys(["pkg/__init__.py", "pkg/core.py", "data.txt", "setup.py", "pkg/doctested.py"], "")
    assert allowed(path, pristine, {"pkg/doctested.py"}) is expected


NAMESPACE = ("ns/deep/core.py", "ns/tests/test_core.py", "setup.py", "docs/conf.py")
FLAT = ("tool.py", "words.txt", "other.txt", "test_tool.py", "setup.py")
INLINE = ("pkg/__init__.py", "pkg/core.py", "pkg/test_core.py", "pkg/settings.toml")


@pytest.mark.parametrize("files, fix, path, removed, reason", [
    (NAMESPACE, "ns/deep/core.py", "ns/deep/new.py", (), ""), (NAMESPACE, "ns/deep/core.py", "ns/other/new.json", (), ""),
    (NAMESPACE, "ns/deep/core.py", "ns/deep/types.py", (), ""), (NAMESPACE, "ns/deep/core.py", "docs/new.py", (), "test suite"),
    (NAMESPACE, "ns/deep/core.py", "ns/tests/new.py", (), "a test"), (NAMESPACE, "ns/deep/core.py", "new.py", (), "test suite"),
    (FLAT, "tool.py", "tool_helpers.py", (), ""), (FLAT, "tool.py", "json.py", (), "in place of another"),
    (FLAT, "tool.py", "yaml.py", (), "in place of another"), (FLAT, "tool.py", "yaml/__init__.py", (), "test suite"),
    (FLAT, "tool.py", "words.txt", (), ""), (FLAT, "tool.py", "new.txt", (), ""), (FLAT, "tool.py", "other.txt", (), "test suite"),
    (FLAT, "tool.py", "new.ini", (), "steers"), (FLAT, "tool.py", "pygments.py", (), "in place of another"),
    (INLINE, "pkg/core.py", "pkg/types.py", (), ""), (INLINE, "pkg/core.py", "pkg/settings.toml", (), ""),
    (INLINE, "pkg/core.py", "pkg/data/new.cfg", (), ""), (INLINE, "pkg/core.py", "pkg/tox.ini", (), "steers"),
    (INLINE, "pkg/core.py", "pkg/types.py", ("pkg/__init__.py",), "in place of another"),
    (INLINE, "pkg/core.py", "pkg/json/__init__.py", ("pkg/__init__.py",), "in place of another")])
def test_honest_new_files_and_data_are_taken(files, fix, path, removed, reason):
    """Files of namespace packages, of repositories without a folder, named like the standard library's, and data."""
    pristine = dict.fromkeys(files, "") | {fix: "import yaml\nopen('words.txt')\n"}
    found = refusal(path, pristine, (), suite.find([fix], pristine), removed)
    assert (reason in found) if reason else not found


def test_what_is_cut_is_named_with_its_reason(world, tmp_path):
    """A patch counts as applied only where all of it was; what was left out stands in report.json."""
    binary = "diff --git a/victim/x.png b/victim/x.png\nnew file mode 100644\nindex 0..1\nBinary files /dev/null and b/victim/x.png differ\n"
    more = patches.make_diff({}, {"victim/types.py": "KIND = 1\n", "docs/new.py": "x = 1\n"})
    for text, cut in (("", {}), (binary + more, {"victim/x.png": "is binary", "docs/new.py": "belongs to the test suite "
                                                 "and not to the package under test"})):
        verdict = Grader(world.provider).grade(world.task, world.task.patch + text)
        write_reports(tmp_path, "run", "m", [verdict], [world.task.instance_id])
        report = json.loads((tmp_path / world.task.instance_id / "report.json").read_text())[world.task.instance_id]
        assert verdict.resolved and report["patch_successfully_applied"] is (not cut) and report.get("dropped", {}) == cut
        assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@pytest.mark.parametrize("fail_fast", [False, True])
def test_gold_empty_and_partial_patches(world, fail_fast):
    grader = Grader(world.provider, fail_fast=fail_fast)
    gold = grader.grade(world.task, world.task.patch)
    assert gold.resolved and gold.patch_applied and gold.tests_status["PASS_TO_PASS"]["success"] == list(PASSING)
    assert grader.grade(world.task, " \n").outcome == "empty_patch"
    assert grader.grade(world.task, world.task.bug_patch).outcome == "patch_failed"
    half = patches.make_diff({SOURCE: BROKEN}, {SOURCE: BROKEN.replace("min(low,", "max(low,")})
    verdict = grader.grade(world.task, half)
    assert verdict.outcome == "unresolved" and verdict.messages
    if not fail_fast:
        assert verdict.tests_status["FAIL_TO_PASS"] == {"success": list(FAILING[:2]), "failure": list(FAILING[2:])}


def test_test_patch_brings_the_deciding_tests(world):
    tests = world.provider.files(world.spec.name)[FILE]
    added = tests + "\n\ndef test_mean_of_one():\n    assert mean([7]) == 7\n"
    task = dataclasses.replace(world.task, test_patch=patches.make_diff({FILE: tests}, {FILE: added}),
                               FAIL_TO_PASS=(*FAILING, f"{FILE}::test_mean_of_one"))
    assert Grader(world.provider).grade(task, task.patch).resolved
    assert not Grader(world.provider).grade(dataclasses.replace(task, test_patch=""), task.patch).resolved


def test_infrastructure_failures_are_retried_and_no_verdict_on_the_patch(world, monkeypatch):
    real, failures = world.provider.create, [SandboxError("a"), SandboxError("b")]

    def create(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(world.provider, "create", create)
    cache = VerdictCache()
    assert Grader(world.provider, cache=cache).grade(world.task, world.task.patch).resolved
    failures += [SandboxError("x")] * 4  # the patch's three, and one without the patch
    other = patches.make_diff({SOURCE: BROKEN}, {SOURCE: CALC + "# other\n"})
    verdict = Grader(world.provider, cache=cache).grade(world.task, other)
    assert verdict.outcome == "infrastructure" and not verdict.resolved and len(cache) == 1
    failures += [SandboxError("x")] * 3  # the machine is well again when the patch's part is to be found
    assert Grader(world.provider, cache=cache).grade(world.task, other).resolved and len(cache) == 2


def test_cache_survives_a_half_written_line(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    cache = VerdictCache(path)
    verdict = Verdict("i", "resolved", {"FAIL_TO_PASS": {"success": ["a"], "failure": []}}, 1.5, {"a": "b"}, {"c": "is a test"}, ("d",))
    cache.put("k", verdict)
    cache.put("t", Verdict("i", "timeout"))
    cache.put("n", Verdict("i", "infrastructure"))
    assert cache.get("t") and cache.get("n") is None
    with open(path, "a") as stream:
        stream.write('{"key": "half", "verd')
    again = VerdictCache(path)
    assert again.get("k") == verdict and len(again) == 1
    again.put("next", verdict)  # stands on a line of its own
    assert VerdictCache(path).get("next") == verdict


def test_cache_holds_a_bounded_number_in_memory(tmp_path):
    verdicts = {f"k{n}": Verdict("i", "unresolved", seconds=float(n), messages={"t": "\u00e4\n"}) for n in range(6)}
    memory, disk = VerdictCache(limit=3), VerdictCache(tmp_path / "verdicts.jsonl", limit=3)
    for key, verdict in verdicts.items():
        memory.put(key, verdict)
        disk.put(key, verdict)
        assert memory.get("k0") == verdicts["k0"]  # used again each time, so never the oldest
    assert [key for key in verdicts if memory.get(key)] == ["k0", "k4", "k5"]
    for cache in (disk, VerdictCache(tmp_path / "verdicts.jsonl", limit=2)):
        assert {key: cache.get(key) for key in verdicts} == verdicts and len(cache) == 6


def test_key_depends_on_everything_that_decides():
    base = verdict_key(TASK, "p")
    others = [verdict_key(TASK, "q"), verdict_key(TASK, "p", fail_fast=True), verdict_key(TASK, "p", strict=False),
              verdict_key(dataclasses.replace(TASK, bug_patch="x"), "p"),
              verdict_key(dataclasses.replace(TASK, PASS_TO_PASS=()), "p"),
              verdict_key(dataclasses.replace(TASK, timeout=1.0), "p")]
    assert len({base, *others}) == 7 and base == verdict_key(TASK, "p")


def test_reports_have_swe_benchs_fields(tmp_path):
    verdicts = [Verdict("a", "resolved", {"FAIL_TO_PASS": {}}), Verdict("b", "unresolved"), Verdict("c", "empty_patch"),
                Verdict("d", "timeout"), Verdict("e", "infrastructure")]
    report = write_reports(tmp_path, "run", "org/model", verdicts, ["a", "b", "c", "d", "e", "f"])
    assert report["resolved_ids"] == ["a"] and report["unresolved_ids"] == ["b"] and report["empty_patch_ids"] == ["c"]
    assert report["error_ids"] == ["d", "e"] and report["infra_failure_ids"] == ["e"] and report["incomplete_ids"] == ["f"]
    assert report["completed_instances"] == 2 and report["submitted_instances"] == 6
    assert json.loads((tmp_path / "org__model.run.json").read_text()) == report
    single = json.loads((tmp_path / "a" / "report.json").read_text())
    assert single["a"]["resolved"] is True and set(single["a"]) >= {"patch_successfully_applied", "tests_status"}
