"""Order, resumption, refusal: the main job over small stages written here (tests/pipeline/test_chain.py runs the real ones)."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline import run

STAGE = """
import errno, pathlib, time

def run_stage(context):
    context.log("works")
    calls = context.root / "calls.txt"
    with calls.open("a") as stream:
        stream.write(context.stage + "\\n")
    {body}
    return {{"stage": context.stage, "seed": context.config.seed}}
"""


@pytest.fixture(name="stages")
def _stages(monkeypatch, tmp_path):
    """Puts small stages in the place of all real ones; returns a function that changes one's body."""
    monkeypatch.syspath_prepend(tmp_path)

    def set_body(name, body):
        (tmp_path / f"small_{name}.py").write_text(STAGE.format(body=body))
        sys.modules.pop(f"small_{name}", None)

    small = {}
    for name, stage in run.STAGES.items():
        set_body(name, "pass")
        small[name] = dataclasses.replace(stage, module=f"small_{name}", sandbox=False)
    monkeypatch.setattr(run, "STAGES", small)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return set_body


def _calls(root):
    path = root / "calls.txt"
    return path.read_text().split() if path.exists() else []


def test_stages_run_in_their_order_and_finished_ones_only_once(stages, tmp_path, capsys):
    root = tmp_path / "run"
    run.run(RunConfig(), root, stages=("sft", "tasks", "midtrain"))
    assert _calls(root) == ["tasks", "midtrain", "sft"]
    results = run.run(RunConfig(), root, stages=tuple(run.STAGES))
    assert _calls(root)[3:] == ["experts", "distill", "evaluate", "report"]
    assert results["sft"] == {"stage": "sft", "seed": 0}
    lines = capsys.readouterr().out.splitlines()
    assert sum("done in" in line for line in lines) == 7
    assert sum("skipped" in line for line in lines) == 3
    run.run(RunConfig(), root)
    assert _calls(root)[7:] == ["report"]  # a report is cheap and always made from what is there


def test_done_json_holds_results_seconds_and_hash(stages, tmp_path):
    run.run(RunConfig(), tmp_path / "run", stages=("tasks",))
    done = json.loads((tmp_path / "run/tasks/DONE.json").read_text())
    assert done["results"] == {"stage": "tasks", "seed": 0}
    assert done["config_hash"] == run.config_hash(RunConfig(), "tasks")
    assert done["config_hash"] != run.config_hash(RunConfig(seed=1), "tasks")
    assert 0 <= done["seconds"] < 10


def test_changed_configuration_is_named_and_restart_makes_it_anew(stages, tmp_path):
    root = tmp_path / "run"
    first = RunConfig()
    run.run(first, root)
    changed = dataclasses.replace(first, sft=dataclasses.replace(first.sft, recovery=0.25))
    with pytest.raises(UserError, match=r"config\.sft\.recovery was 0\.5 and is 0\.25"):
        run.run(changed, root)
    before = len(_calls(root))
    run.run(changed, root, stages=("tasks", "midtrain"))  # these do not depend on sft
    assert len(_calls(root)) == before
    run.run(changed, root, restart=("sft",))
    assert _calls(root)[before:] == ["sft", "experts", "distill", "evaluate", "report"]


def test_what_cannot_change_results_may_change(stages, tmp_path):
    run.run(RunConfig(workers=2, sandbox="auto"), tmp_path / "run")
    run.run(RunConfig(workers=5, sandbox="local", name="other"), tmp_path / "run")
    assert _calls(tmp_path / "run").count("tasks") == 1


def test_failed_stage_is_run_again_and_its_time_is_added(stages, tmp_path):
    root = tmp_path / "run"
    stages("sft", "time.sleep(0.3); (context.workdir / 'part').write_text('x'); raise RuntimeError('boom')")
    with pytest.raises(RuntimeError, match="boom"):
        run.run(RunConfig(), root)
    assert not (root / "sft/DONE.json").exists()
    stages("sft", "assert (context.workdir / 'part').exists()")
    run.run(RunConfig(), root)
    assert _calls(root) == ["tasks", "midtrain", "sft", "sft", "experts", "distill", "evaluate", "report"]
    assert json.loads((root / "sft/DONE.json").read_text())["seconds"] >= 0.3


@pytest.mark.parametrize("body", [
    "raise OSError(errno.ENOSPC, 'No space left on device')",
    "raise ValueError('RESOURCE_EXHAUSTED: write failed: No space left on device')",  # as tensorstore says it
])
def test_full_disk_is_a_user_error_that_names_stage_and_folder(stages, tmp_path, body):
    stages("midtrain", body)
    with pytest.raises(UserError, match="stage midtrain: no space left on the disk of .*run"):
        run.run(RunConfig(), tmp_path / "run")


def test_full_disk_for_real(stages, tmp_path):
    root = tmp_path / "small_disk"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        stages("midtrain", "(context.workdir / 'big').write_bytes(bytes(1 << 20))")
        with pytest.raises(UserError, match="no space left"):
            run.run(RunConfig(), root)
    finally:
        subprocess.run(["umount", root], check=True)


def test_unknown_stage_and_unwritable_workdir(stages, tmp_path):
    with pytest.raises(UserError, match="--stages: unknown stage 'stf'; stages: tasks"):
        run.run(RunConfig(), tmp_path / "run", stages=("stf",))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/run: cannot be written"):
        run.run(RunConfig(), tmp_path / "file" / "run")
    with pytest.raises(UserError, match="--workdir=/proc/run: cannot be written"):
        run.run(RunConfig(), "/proc/run")


def test_two_runs_do_not_share_a_workdir_and_kill_9_frees_it(tmp_path):
    root = tmp_path / "run"
    code = textwrap.dedent(f"""
        import pathlib, time
        from qcn_jax.pipeline import run
        with run._locked(pathlib.Path({str(root)!r})):
            print("locked", flush=True)
            time.sleep(60)
    """)
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert holder.stdout.readline() == "locked\n"
    try:
        with pytest.raises(UserError, match=rf"in use by another qcn run \(process {holder.pid}\)"):
            run.run(RunConfig(), root, stages=())
    finally:
        holder.kill()
        holder.wait()
    began = time.monotonic()
    run.run(RunConfig(), root, stages=())
    assert time.monotonic() - began < 5


def test_shared_things_are_closed_even_when_a_stage_fails(stages, tmp_path):
    stages("tasks", """
    class Thing:
        def close(self):
            (context.root / "closed").write_text("yes")
    context.shared.get("thing", Thing)
    raise RuntimeError("boom")""")
    with pytest.raises(RuntimeError):
        run.run(RunConfig(), tmp_path / "run")
    assert (tmp_path / "run/closed").exists()


def test_half_written_files_of_a_killed_run_are_removed(stages, tmp_path):
    left = tmp_path / "run/midtrain/.metrics.jsonl.abc123.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    run.run(RunConfig(), tmp_path / "run", stages=("tasks",))
    assert not left.exists()
