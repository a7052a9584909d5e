"""Instances of SWE-bench: our reading of logs beside the real package's, and real runs in an image made here."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.tasks import formats, log_parsers, swebench
from qcn_jax.envs.tasks.log_parsers import swebench_logs
from qcn_jax.envs.tasks.verdicts import write_reports
from qcn_jax.errors import UserError
from tests.sandboxes import BROKEN, CALC, FAILING, FILE, PASSING, SOURCE, TESTS, make_task

NAMES = ["t/a.py::test_one", "t/a.py::test_two[x-1]", "t/a.py::test_two[a b]", "t/a.py::C::test_x[/tmp/deep/file.py]",
         "t/b.py::test_cut[log(photon", "t/b.py::test_cut[log(photon-2)]", "t/b.py::test_three"]


def row(**changes):
    """A row of release 5."""
    return {"instance_id": "a__b-1", "repo": "a/b", "version": "1", "image": "none:1", "log_parser": "parse_log_pytest",
            "eval_type": "pass_and_fail", "eval_script": "#!/bin/bash\nset -uxo pipefail\n: '>>>>> Start Test Output'\n"
            "pytest -rA\n: '>>>>> End Test Output'\ngit checkout x\n",
            "FAIL_TO_PASS": json.dumps(NAMES[:2]), "PASS_TO_PASS": NAMES[2:], **changes}


def noise(rng):
    """A line of a log: a result, something that looks like one, or what runners print."""
    name, status = rng.choice(NAMES), rng.choice([*swebench_logs.STATUSES, "PASS", ""])
    return rng.choice([
        f"{status} {name}", f"{status} {name} - AssertionError: a - b", f"{name} {status}", f"{name} {status} [ 50%]",
        f"\x1b[32m{status}\x1b[0m {name}", f"SKIPPED [{rng.randrange(9)}] t/a.py:3: why", f"{status}", f"  {status} {name}",
        "PASSED [100%]", f"test_{rng.randrange(4)} (app.tests.C) ... {rng.choice(['ok', 'OK', 'FAIL', 'ERROR', 'skipped x'])}",
        f"test_{rng.randrange(4)} (app.tests.C) ... some output", "ok", "FAIL: test_1 (app.tests.C)", "ERROR: test_2 (a)",
        f"test_{rng.randrange(4)} {rng.choice(['ok', 'F', 'E'])}", "___ sympy/core/tests/test_x.py:test_y ___",
        "test_3 (a) ... Internal Server Error: /x/\nok", "test_5 (a) ... System check identified no issues (0 silenced)\nok",
        "test_6 (a) ... Testing against Django installed in '/d' with up to 4 processes\nx silenced).\nok",
        "MouseButton.LEFT", f"PASSED {name} MouseButton.RIGHT", "--version is equivalent to version", "12 passing", "", "garbage"])


def whole_log(rng):
    body = "\n".join(noise(rng) for _ in range(rng.randrange(25)))
    marks = rng.choice([(1, 1)] * 8 + [(0, 1), (1, 0)])
    code = rng.choice(["", "", ">>>>> Test Exit Code: 0\n", ">>>>> Test Exit Code: 1\n"])
    bad = rng.choice([""] * 12 + [">>>>> Patch Apply Failed\n", ">>>>> Tests Errored\n"])
    return (bad + "+ : '>>>>> Start Test Output'\n" * marks[0] + body + "\n+ : '>>>>> End Test Output'\n" * marks[1] + code)


@pytest.mark.parametrize("eval_type", ["pass_and_fail", "fail_only"])
def test_same_verdicts_as_the_package_on_the_same_logs(tmp_path, eval_type):
    package = pytest.importorskip("swebench.harness.grading", reason="not installed: swebench")
    from swebench.harness.log_parsers import PARSER_REGISTRY
    from swebench.harness.utils import make_test_spec

    rng, resolved, invalid = random.Random(0), 0, 0
    names = sorted(swebench_logs.PARSERS)
    assert set(names) <= set(PARSER_REGISTRY)
    for number in range(600):
        log, parser = whole_log(rng), names[number % len(names)]
        assert log_parsers.parser(parser)(log) == PARSER_REGISTRY[parser](log, None), (parser, log)
        found = list(log_parsers.parser(parser)(log))
        expected = rng.sample(found, min(len(found), rng.randrange(3))) or rng.sample(NAMES, 1)
        instance = row(log_parser=parser, eval_type=eval_type, FAIL_TO_PASS=expected,
                       PASS_TO_PASS=rng.sample(found, min(len(found), rng.randrange(3))) + rng.sample(NAMES, rng.randrange(2)))
        (tmp_path / "log").write_text(log)
        prediction = {"instance_id": "a__b-1", "model_name_or_path": "m", "model_patch": "x"}
        theirs = package.get_eval_report(make_test_spec(instance), prediction, str(tmp_path / "log"), True)["a__b-1"]
        ours = swebench.verdict(swebench.Instance.from_row(instance), log).report()["a__b-1"]
        assert ours["resolved"] is theirs["resolved"], log
        if theirs["patch_successfully_applied"]:
            assert ours["tests_status"] == {k: theirs["tests_status"][k] for k in ("FAIL_TO_PASS", "PASS_TO_PASS")}, log
        resolved, invalid = resolved + theirs["resolved"], invalid + (not theirs["patch_successfully_applied"])
    assert resolved > 20 and invalid > 20  # both kinds occur


def test_exit_code_is_recorded_as_the_package_does(tmp_path):
    utils = pytest.importorskip("swebench.harness.utils", reason="not installed: swebench")
    ours = swebench.Instance.from_row(row()).script()
    theirs = utils.make_test_spec(row()).eval_script
    for script in (ours, theirs):
        body = script.replace("pytest -rA", "false").replace("git checkout x", "true")
        run = subprocess.run(["bash", "-c", body], capture_output=True, text=True, check=False)
        assert ">>>>> Test Exit Code: 1" in run.stdout.split("\n")


@pytest.mark.parametrize("changes, words", [
    ({"image": None}, "row 3: field image is missing"), ({"FAIL_TO_PASS": "{"}, "field FAIL_TO_PASS is not a list"),
    ({"eval_type": "x"}, "eval_type: expected pass_and_fail or fail_only, got 'x'"),
    ({"log_parser": "parse_log_cobol"}, "log_parser: .*parse_log_cobol")])
def test_refusals(changes, words):
    with pytest.raises(UserError, match=words):
        swebench.Instance.from_row(row(**changes), "row 3")


def test_other_files_are_left_to_others(tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps(make_task().to_json()) + "\n")
    assert swebench.read(tmp_path / "tasks.jsonl") is None
    (tmp_path / "five.jsonl").write_text(json.dumps(row()) + "\n")
    assert list(swebench.read(tmp_path / "five.jsonl")) == ["a__b-1"]


# --- with Docker


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    """Our task as a row of release 5, its image made from Debian packages (once for each machine)."""
    from qcn_jax.envs.sandbox import images, layers

    client = images.engine()
    base = images.debian_image(client, layers.HARNESS_PACKAGES)
    pristine = {"victim/__init__.py": "", SOURCE: CALC, FILE: TESTS}
    repository = layers.repository_image(client, base, pristine, network=False)
    image = layers.task_image(client, repository, {SOURCE: BROKEN})
    client.images.get(image).tag("qcn-test/victim", "1")
    # A skipped test is not named in pytest's summary, so that in this format none can be expected.
    named = tuple(name for name in PASSING if not name.endswith("test_skipped"))
    yield formats.to_swebench5(dataclasses.replace(make_task(), image_name="qcn-test/victim:1", PASS_TO_PASS=named))
    client.images.remove("qcn-test/victim:1", force=True)


@pytest.mark.docker
def test_runs_in_the_image(instance):
    from qcn_jax.envs.sandbox import images

    client = images.engine()
    mine = swebench.Instance.from_row(instance)
    before = {one["Id"] for one in client.api.containers(all=True)}
    gold, log = swebench.run(client, mine, instance["patch"], 60)
    assert gold.resolved and gold.tests_status["FAIL_TO_PASS"]["success"] == list(FAILING), log
    wrong = patches.make_diff({SOURCE: BROKEN}, {SOURCE: BROKEN.replace("min(low,", "max(low,")})
    assert swebench.run(client, mine, wrong, 60)[0].tests_status["FAIL_TO_PASS"]["failure"] == list(FAILING[2:])
    assert swebench.run(client, mine, "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-1\n+2\n", 60)[0].outcome == \
        "patch_failed"
    assert swebench.run(client, mine, "", 60)[0].outcome == "empty_patch"
    hanging = patches.make_diff({SOURCE: BROKEN}, {SOURCE: "import time\ntime.sleep(600)\n"})
    assert swebench.run(client, mine, hanging, 3)[0].outcome == "timeout"
    reaching = patches.make_diff({SOURCE: BROKEN}, {SOURCE: "import socket\nsocket.create_connection(('1.1.1.1', 80), 2)\n"})
    assert "Network is unreachable" in swebench.run(client, mine, reaching, 60)[1]
    absent = dataclasses.replace(mine, image="registry.invalid/none:1")
    assert swebench.run(client, absent, instance["patch"], 60)[0].outcome == "infrastructure"
    assert {one["Id"] for one in client.api.containers(all=True)} <= before | {
        one["Id"] for one in client.api.containers(all=True) if one["Image"] != "qcn-test/victim:1"}


@pytest.mark.docker
def test_evaluate_verb_and_the_packages_harness_agree(instance, tmp_path):
    """`qcn evaluate --predictions` on a file of release 5; then the package's own harness on the same files and image."""
    wrong = patches.make_diff({SOURCE: BROKEN}, {SOURCE: BROKEN + "# no\n"})
    rows = [{**instance, "instance_id": name} for name in ("victim__1", "victim__2")]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "preds.jsonl").write_text("".join(json.dumps(
        {"instance_id": one["instance_id"], "model_name_or_path": "m", "model_patch": patch}) + "\n"
        for one, patch in zip(rows, (instance["patch"], wrong))))
    done = subprocess.run(
        [sys.executable, "-m", "qcn_jax", "evaluate", f"--predictions={tmp_path}/preds.jsonl",
         f"--tasks={tmp_path}/tasks.jsonl", f"--out={tmp_path}/out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["resolved"], summary["attempted"], summary["sandbox"]) == (1, 2, "docker")
    report = json.loads((tmp_path / "out" / "m.qcn.json").read_text())
    assert report["resolved_ids"] == ["victim__1"] and report["unresolved_ids"] == ["victim__2"]
    assert ">>>>> End Test Output" in (tmp_path / "out" / "victim__1" / "test_output.txt").read_text()

    pytest.importorskip("swebench", reason="not installed: swebench")
    command = [sys.executable, "-m", "swebench.harness.run_evaluation", "-d", f"{tmp_path}/tasks.jsonl", "-p",
               f"{tmp_path}/preds.jsonl", "-id", "t", "-t", "60", "--max_workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads((tmp_path / "m.t.json").read_text())
    for field in ("resolved_ids", "unresolved_ids", "completed_ids", "error_ids", "empty_patch_ids"):
        assert theirs[field] == report[field], field
    for name in ("victim__1", "victim__2"):
        single = json.loads((tmp_path / "logs" / "run_evaluation" / "t" / "m" / name / "report.json").read_text())[name]
        mine = json.loads((tmp_path / "out" / name / "report.json").read_text())[name]
        assert mine["resolved"] == single["resolved"]
        assert all(mine["tests_status"][group] == single["tests_status"][group] for group in mine["tests_status"])


def test_report_fields_are_the_packages(tmp_path):
    """The run report has every field that the package's has."""
    reporting = pytest.importorskip("swebench.harness.reporting", reason="not installed: swebench")
    prediction = {"instance_id": "a__b-1", "model_name_or_path": "m", "model_patch": "x"}
    theirs = reporting.make_run_report({"a__b-1": prediction}, [row()], "t", None, tmp_path)
    ours = write_reports(tmp_path, "t", "m", [], [])
    assert set(json.loads(theirs.read_text())) <= set(ours)
