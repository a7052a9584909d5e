"""Evaluations beside each other, beside what is counted by hand; what is kept to learn from; other tools' forms."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from qcn_jax import files, statistics
from qcn_jax.agents import comparing, exports, outputs
from qcn_jax.agents.records import Record
from qcn_jax.cli import main as cli
from qcn_jax.errors import UserError
from qcn_jax.pipeline.evaluate.page import page

YES, NO, LOST = "resolved", "unresolved", "infrastructure"


def write(folder, **tasks):
    """A folder as qcn evaluate leaves it."""
    made = [Record(name, n, outcome) for name, found in tasks.items() for n, outcome in enumerate(found)]
    attempts = max(map(len, tasks.values()))
    outputs.write(folder, outputs.Results(folder.name, list(tasks), made, attempts, {}))
    return str(folder)


def test_a_pair_is_counted_task_by_task(tmp_path, capsys):
    one = write(tmp_path / "one", **{f"t{n}": [YES] for n in range(9)}, a=[NO], b=[LOST], c=[YES])
    two = write(tmp_path / "two", **{f"t{n}": [NO if n < 7 else YES] for n in range(9)}, a=[YES], b=[YES], c=[YES])
    found = comparing.compare([comparing.read(one), comparing.read(two)])
    (pair,) = found["pairs"]
    assert (pair["won"], pair["lost"], pair["tied"], pair["left_out"]) == (7, 1, 3, 1)
    assert pair["p_value"] == pytest.approx(2 * (1 + 8) / 2**8) == statistics.sign_test(7, 1)
    assert pair["difference"] == pytest.approx(6 / 11) and pair["ci95"][0] < 6 / 11 < pair["ci95"][1]
    assert found["evaluations"][0]["rate"] == 10 / 11 and found["evaluations"][0]["infrastructure"] == 1
    assert cli.main(["compare", one, two, f"--out={tmp_path}/c.json"]) == 0
    assert "won 7, lost 1, tied 3" in (printed := capsys.readouterr().out) and "p = 0.07031" in printed
    assert files.read_json(tmp_path / "c.json")["pairs"][0]["won_ids"] == [f"t{n}" for n in range(7)]


def test_shares_of_attempts_are_compared_by_sign_flips(tmp_path):
    one = write(tmp_path / "one", **{f"t{n}": [YES, YES, NO] for n in range(12)})
    two = write(tmp_path / "two", **{f"t{n}": [YES, NO, NO] for n in range(12)})
    (pair,) = comparing.compare([comparing.read(one), comparing.read(two)])["pairs"]
    assert (pair["won"], pair["test"]) == (12, "sign flip") and pair["difference"] == pytest.approx(1 / 3)
    assert pair["p_value"] == pytest.approx(2 / 2**12, abs=5e-4)


def test_different_tasks_are_refused_unless_asked_for(tmp_path, capsys):
    one, two, three = (write(tmp_path / name, **{key: [YES] for key in keys}) for name, keys in (
        ("one", "ab"), ("two", "bc"), ("three", "b")))
    assert cli.main(["compare", one, two]) == 1
    error = capsys.readouterr().err
    assert "such as a" in error and "--common" in error and error.count("\n") == 1
    assert cli.main(["compare", one, two, three, "--common"]) == 0
    assert capsys.readouterr().out.count("adjusted 1") == 3
    with pytest.raises(UserError, match="no task in common"):
        comparing.compare([comparing.read(write(tmp_path / "x", x=[YES])), comparing.read(one)], common=True)
    for arguments, words in (([one], "two or more"), ([one, str(tmp_path)], "results.jsonl")):
        assert cli.main(["compare", *arguments]) == 1 and words in capsys.readouterr().err


def test_holm_adjusts_as_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == [] and statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_page_says_what_the_numbers_say(tmp_path):
    one, two = write(tmp_path / "<one>", a=[YES], b=[NO]), write(tmp_path / "two", a=[YES], b=[YES])
    found = comparing.compare([comparing.read(one), comparing.read(two)])
    text = page("t", found, {name: files.read_json(f"{name}/summary.json") for name in (one, two)})
    assert "&lt;one&gt;" in text and "<one>" not in text and "50.0%" in text and "-50.0%" in text


FOUND = [Record("a", 0, "resolved", "submitted", "p", 3, seconds=1.5), Record("b", 0, "limit", "turn_limit", "", 4),
         Record("c", 0, "infrastructure", "endpoint", detail="down \x00 <")]


def test_junit_has_a_case_for_each_episode():
    root = ElementTree.fromstring(exports.junit("m", "s", FOUND))
    (suite,) = root
    assert {key: suite.get(key) for key in ("tests", "failures", "errors")} == {"tests": "3", "failures": "1", "errors": "1"}
    assert [(case.get("name"), [child.tag for child in case]) for case in suite] == [
        ("a[0]", []), ("b[0]", ["failure"]), ("c[0]", ["error"])]


def test_a_harbor_job_has_rewards_of_what_counts(tmp_path):
    exports.harbor(tmp_path, "openai/m", "s", FOUND)
    job = json.loads((tmp_path / "result.json").read_text())
    assert job["n_total_trials"] == 3 and job["stats"]["n_errored_trials"] == 1
    assert job["stats"]["evals"]["s__m__tasks"]["reward_stats"] == {"reward": {"1": ["a__0"], "0": ["b__0"]}}
    rewards = {path.parent.parent.name: path.read_text() for path in tmp_path.glob("*/verifier/reward.txt")}
    assert rewards == {"a__0": "1\n", "b__0": "0\n"}
    trial = json.loads((tmp_path / "c__0/result.json").read_text())
    assert trial["verifier_result"] is None and trial["exception_info"]["exception_type"] == "InfrastructureError"
