"""The task schema: SWE-bench's fields there and back, malformed rows named."""

import dataclasses
import json

import pytest

from qcn_jax.envs.tasks.schema import Task, read_tasks, write_tasks
from qcn_jax.errors import UserError

ROW = {"instance_id": "a__b-1", "repo": "a/b", "base_commit": "0" * 40, "patch": "p", "test_patch": "", "FAIL_TO_PASS":
       '["t::a"]', "PASS_TO_PASS": ["t::b"], "problem_statement": "It breaks.", "version": "1", "image": "x"}  # fmt: skip


def test_round_trip(tmp_path):
    """Lists may come as JSON strings, unknown fields are ignored, what is written reads back."""
    task = Task.from_json(ROW)
    assert (task.FAIL_TO_PASS, task.PASS_TO_PASS, task.version) == (("t::a",), ("t::b",), "1")
    write_tasks(tmp_path / "tasks.jsonl", [task, dataclasses.replace(task, instance_id="a__b-2")])
    assert read_tasks(tmp_path / "tasks.jsonl") == [task, dataclasses.replace(task, instance_id="a__b-2")]
    write_tasks(tmp_path / "twice.jsonl", [task, task])
    with pytest.raises(UserError, match="twice.jsonl:2: field instance_id: a__b-1 comes a second time"):
        read_tasks(tmp_path / "twice.jsonl")
    written = json.loads((tmp_path / "tasks.jsonl").read_text().splitlines()[0])
    assert written["FAIL_TO_PASS"] == ["t::a"] and set(ROW) - {"image"} <= set(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": None}, "field patch is missing"),
        ({"FAIL_TO_PASS": "t::a"}, "FAIL_TO_PASS is not a JSON list"),
        ({"PASS_TO_PASS": [1]}, "PASS_TO_PASS must be a list of test ids"),
    ],
)
def test_malformed(tmp_path, change, message):
    row = {key: value for key, value in {**ROW, **change}.items() if value is not None}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"tasks.jsonl:2: .*{message}"):
        read_tasks(tmp_path / "tasks.jsonl")
