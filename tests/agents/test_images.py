"""Agents in the images of SWE-bench's instances: played, graded, compared; what is in the history is not theirs."""

import json

import pytest

from qcn_jax.cli import main as cli
from tests.agents import playing
from tests.envs.tasks.test_swebench import instance  # noqa: F401
from tests.sandboxes import CALC, SOURCE


@pytest.mark.docker
def test_agents_act_in_an_image(instance, tmp_path, capsys):  # noqa: F811
    (tmp_path / "tasks.jsonl").write_text(json.dumps(instance) + "\n")
    look = "git log --all --format=%s; git remote; pwd; cat /proc/net/route | wc -l"
    with playing.serve(playing.putting(SOURCE, CALC, look)) as (url, _, _):
        assert cli.main(["evaluate", f"--tasks={tmp_path}/tasks.jsonl", f"--endpoint={url}", "--model=gold", "--model=empty",
                         f"--out={tmp_path}/out", "--max_turns=3"]) == 0
    assert "won 1, lost 0" in capsys.readouterr().out
    gold, empty = (json.loads((tmp_path / "out" / name / "summary.json").read_text()) for name in ("1_gold", "2_empty"))
    assert (gold["resolved"], gold["sandbox"], empty["resolved"], empty["unresolved"]) == (1, "docker", 0, 1)
    said = json.loads((tmp_path / "out/1_gold/trajectories/victim__1/0.traj.json").read_text())
    assert "<output>\nstart\n/testbed\n1\n</output>" in said["messages"][3]["content"]
    (row,) = map(json.loads, (tmp_path / "out/1_gold/preds.jsonl").read_text().splitlines())
    assert f"+++ b/{SOURCE}" in row["model_patch"]


@pytest.mark.docker
def test_tasks_with_images_are_checked_and_need_a_shell(instance, tmp_path, capsys):  # noqa: F811
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**instance, "patch": "diff --git a/x b/x\n"}) + "\n")
    with playing.serve() as (url, asked, _):
        command = ["evaluate", f"--tasks={tmp_path}/tasks.jsonl", f"--endpoint={url}", "--model=gold", f"--out={tmp_path}/out"]
        assert cli.main([*command, "--scaffold=nano"]) == 1 and "--scaffold: 'nano'" in capsys.readouterr().err
        assert cli.main([*command[:-1], f"--out={tmp_path}/two"]) == 1 and not asked
    assert "the gold patch gives patch_failed" in capsys.readouterr().err
