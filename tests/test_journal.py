"""A file of rows loses at most the row that was being written when its writer died."""

import json

import pytest

from qcn_jax import journal
from qcn_jax.errors import UserError


def test_rows_come_back_and_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with journal.Lines(path) as lines:
        begins = [lines.add({"n": 1, "text": "é\ud800\u2028"}), lines.add([2])]
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"n": 3, "te')
    assert [row for _, row in journal.read(path)] == [{"n": 1, "text": "é\ud800\u2028"}, [2]]
    with journal.Lines(path) as lines:
        assert path.read_bytes() == whole
        begins.append(lines.add({"n": 3}))
    found = list(journal.read(path))
    assert [begin for begin, _ in found] == begins and found[-1][1] == {"n": 3}
    data = path.read_bytes()
    assert [json.loads(data[begin:].split(b"\n")[0]) for begin in begins] == [row for _, row in found]


def test_a_damaged_line_costs_itself_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a", "value": 1}\n{"key": "b", \x00\n{"key": "a", "value": 3}\n')
    with journal.Rows(path, durable=True) as rows:
        assert rows.known == {"a": 3}
        rows.add("c", None)
    with journal.Rows(path) as rows:
        assert rows.known == {"a": 3, "c": None}


def test_rows_that_are_not_kept_are_removed(tmp_path):
    path = tmp_path / "curve.jsonl"
    with journal.Lines(path) as lines:
        for step in range(5):
            lines.add({"step": step})
    with journal.Lines(path, keep=lambda row: row["step"] < 3) as lines:
        lines.add({"step": 3})
    assert [row["step"] for _, row in journal.read(path)] == [0, 1, 2, 3]


def test_files_that_cannot_be_used_are_named(tmp_path):
    assert list(journal.read(tmp_path / "missing")) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be written"):
        journal.Lines(tmp_path / "folder")
    with pytest.raises(UserError, match="folder: cannot be read"):
        list(journal.read(tmp_path / "folder"))
    with pytest.raises(ValueError), journal.Lines(tmp_path / "rows") as lines:
        lines.add(float("nan"))
