"""Order, resumption, refusal: the main job over small stages written here (tests/pipeline/test_chain.py runs the real ones)."""

import dataclasses
import errno
import importlib
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from qcn_jax.config import MidtrainConfig, RunConfig, SftConfig, TasksConfig, TokenizerConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline import run, workdir
from tests.rights import ordinary_user

CHATS = pathlib.Path(__file__).with_name("chats.jsonl")


def configuration(**changes):
    """The smallest one that may be run: random weights, hardly any data, and tasks that these stages never make."""
    return RunConfig(**{
        "init": "random", "tasks": TasksConfig(repos_train=("a==1",), repos_heldout=("b==1",)), "midtrain": MidtrainConfig(data=str(CHATS.parent)),
        "sft": SftConfig(data=str(CHATS)), **changes,
    })


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
    run.run(configuration(), root, stages=("sft", "tasks", "midtrain"))
    assert _calls(root) == ["tasks", "midtrain", "sft"]
    results = run.run(configuration(), root, stages=tuple(run.STAGES))
    assert _calls(root)[3:] == ["experts", "distill", "evaluate", "report"]
    assert results["sft"] == {"stage": "sft", "seed": 0}
    lines = capsys.readouterr().out.splitlines()
    assert sum("done in" in line for line in lines) == 7
    assert sum("skipped" in line for line in lines) == 3
    run.run(configuration(), root)
    assert _calls(root)[7:] == ["report"]  # a report is cheap and always made from what is there


def test_done_json_holds_results_seconds_and_hash(stages, tmp_path):
    run.run(configuration(), tmp_path / "run", stages=("tasks",))
    done = json.loads((tmp_path / "run/tasks/DONE.json").read_text())
    assert done["results"] == {"stage": "tasks", "seed": 0}
    assert done["config_hash"] == workdir.config_hash(run.stage_config(configuration(), "tasks"))
    assert done["config_hash"] != workdir.config_hash(run.stage_config(configuration(seed=1), "tasks"))
    assert 0 <= done["seconds"] < 10


def test_changed_configuration_is_named_and_restart_makes_it_anew(stages, tmp_path):
    root = tmp_path / "run"
    first = configuration()
    run.run(first, root)
    changed = dataclasses.replace(first, sft=dataclasses.replace(first.sft, data=str(CHATS.parent)))
    with pytest.raises(UserError, match=r"config\.sft\.data was '.*/pipeline/chats\.jsonl' and is '.*/pipeline'"):
        run.run(changed, root)
    before = len(_calls(root))
    run.run(changed, root, stages=("tasks", "midtrain"))  # these do not depend on sft
    assert len(_calls(root)) == before
    run.run(changed, root, restart=("sft",))
    assert _calls(root)[before:] == ["sft", "experts", "distill", "evaluate", "report"]


def test_what_cannot_change_results_may_change(stages, tmp_path):
    run.run(configuration(workers=2, sandbox="auto"), tmp_path / "run")
    run.run(configuration(workers=5, sandbox="local", name="other"), tmp_path / "run")
    assert _calls(tmp_path / "run").count("tasks") == 1


def test_failed_stage_is_run_again_and_its_time_is_added(stages, tmp_path):
    root = tmp_path / "run"
    stages("sft", "time.sleep(0.3); (context.workdir / 'part').write_text('x'); raise RuntimeError('boom')")
    with pytest.raises(RuntimeError, match="boom"):
        run.run(configuration(), root)
    assert not (root / "sft/DONE.json").exists()
    stages("sft", "assert (context.workdir / 'part').exists()")
    run.run(configuration(), root)
    assert _calls(root) == ["tasks", "midtrain", "sft", "sft", "experts", "distill", "evaluate", "report"]
    assert json.loads((root / "sft/DONE.json").read_text())["seconds"] >= 0.3


@pytest.mark.parametrize("body", [
    "raise OSError(errno.ENOSPC, 'No space left on device')",
    "raise ValueError('RESOURCE_EXHAUSTED: write failed: No space left on device')",  # as tensorstore says it
])
def test_full_disk_is_a_user_error_that_names_stage_and_folder(stages, tmp_path, body):
    stages("midtrain", body)
    with pytest.raises(UserError, match="stage midtrain: no space left on the disk of .*run"):
        run.run(configuration(), tmp_path / "run")


def test_full_disk_for_real(stages, tmp_path):
    root = tmp_path / "small_disk"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        stages("midtrain", "(context.workdir / 'big').write_bytes(bytes(1 << 20))")
        with pytest.raises(UserError, match="no space left"):
            run.run(configuration(), root)
    finally:
        subprocess.run(["umount", root], check=True)


def test_unknown_stage_and_unwritable_workdir(stages, tmp_path):
    with pytest.raises(UserError, match="--stages: unknown stage 'stf'; stages: tasks"):
        run.run(configuration(), tmp_path / "run", stages=("stf",))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/run: cannot be written"):
        run.run(configuration(), tmp_path / "file" / "run")
    with pytest.raises(UserError, match="--workdir=/proc/run: cannot be written"):
        run.run(configuration(), "/proc/run")


def test_two_runs_do_not_share_a_workdir_and_kill_9_frees_it(tmp_path):
    root = tmp_path / "run"
    code = textwrap.dedent(f"""
        import pathlib, time
        from qcn_jax.pipeline import workdir
        with workdir.locked(pathlib.Path({str(root)!r})):
            print("locked", flush=True)
            time.sleep(60)
    """)
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert holder.stdout.readline() == "locked\n"
    try:
        with pytest.raises(UserError, match=rf"in use by another qcn run \(process {holder.pid}\)"):
            run.run(configuration(), root, stages=())
    finally:
        holder.kill()
        holder.wait()
    began = time.monotonic()
    run.run(configuration(), root, stages=())
    assert time.monotonic() - began < 5


def test_shared_things_are_closed_even_when_a_stage_fails(stages, tmp_path):
    stages("tasks", """
    class Thing:
        def close(self):
            (context.root / "closed").write_text("yes")
    context.shared.get("thing", Thing)
    raise RuntimeError("boom")""")
    with pytest.raises(RuntimeError):
        run.run(configuration(), tmp_path / "run")
    assert (tmp_path / "run/closed").exists()


def test_half_written_files_of_a_killed_run_are_removed_and_the_users_stay(stages, tmp_path):
    root = tmp_path / "run"
    left = root / "midtrain/data/.metrics.jsonl.abc_1234.tmp"
    users = [root / ".notes.txt.abc_1234.tmp", root / "mine/.a.jsonl.abc_1234.tmp", root / "sft/mine",
             root / "sft/.a.jsonl.abc_1234.tmp", root / "midtrain/.mine.tmp"]
    for path in (left, root / "midtrain/START.json", *users):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run.run(configuration(), root, stages=("tasks",))
    assert not left.exists() and all(path.exists() for path in users)


def test_a_kill_before_start_json_was_there_is_resumed(stages, tmp_path):
    left = tmp_path / "run/tasks/.START.json.abc_1234.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    run.run(configuration(), tmp_path / "run", stages=("tasks",))
    assert not left.exists() and workdir.is_done(tmp_path / "run/tasks")


def _tree(root):
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_restart_moves_stages_aside_and_says_where(stages, tmp_path, capsys):
    root = tmp_path / "run"
    run.run(configuration(), root)
    made = _tree(root)
    capsys.readouterr()
    run.run(configuration(), root, stages=("sft", "experts"), restart=("experts", "sft"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("--restart=experts,sft: distill, evaluate, report follow from it and go too")
    (aside,) = (root / "discarded").iterdir()
    assert lines[1] == (f"--restart: moves sft, experts, distill, evaluate, report to {aside}; delete that folder when "
                        "you no longer need it")
    moved = {name: text for name, text in made.items() if name.split("/")[0] in workdir.os.listdir(aside)}
    assert _tree(aside) == moved and len(moved) == 10  # START.json and DONE.json of each
    assert not (root / "report").exists() and workdir.is_done(root / "experts")


def test_restarts_within_a_second_have_folders_of_their_own(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.time, "strftime", lambda form: "2026-11-28T12-30-05")
    for _ in range(4):
        run.run(configuration(), tmp_path / "run", stages=("tasks",), restart=("tasks",))
    assert sorted(path.name for path in (tmp_path / "run/discarded").iterdir()) == [
        "2026-11-28T12-30-05", "2026-11-28T12-30-05-2", "2026-11-28T12-30-05-3"]


def test_folders_that_no_stage_made_are_never_touched(stages, tmp_path):
    root = tmp_path / "home"
    for path in ("report/thesis.pdf", "tasks/todo.txt", "evaluate/grades.csv", "discarded/letters.txt", "sft/x/y"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    before = _tree(root)
    for arguments in ({"stages": ("midtrain",), "restart": ("tasks",)}, {"stages": (), "restart": tuple(run.STAGES)},
                      {"stages": ("midtrain",), "restart": ("midtrain",)}):
        run.run(configuration(), root, **arguments)
        assert before.items() <= _tree(root).items()
    with pytest.raises(UserError, match=r"home/tasks: exists and was not made by qcn run .* another --workdir"):
        run.run(configuration(), root)
    with pytest.raises(UserError, match="home/report: exists and was not made by qcn run"):
        run.run(configuration(), root, stages=("report",), restart=("report",))
    assert before.items() <= _tree(root).items()


def test_a_stage_on_a_disk_of_its_own_is_not_moved_aside(stages, tmp_path):
    root, disk = tmp_path / "run", tmp_path / "disk"
    run.run(configuration(), root, stages=("tasks", "midtrain"))
    (root / "tasks").rename(disk)
    (root / "tasks").symlink_to(disk)
    before = _tree(root)
    with pytest.raises(UserError, match="run/tasks is a symbolic link"):
        run.run(configuration(), root, restart=("tasks",))
    assert _tree(root) == before and not (root / "discarded").exists()


def test_a_kill_while_stages_are_moved_leaves_none_without_its_origin(stages, tmp_path, monkeypatch):
    root = tmp_path / "run"
    run.run(configuration(), root)
    rename, moved = os.rename, []

    def killed(source, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(pathlib.Path(source).name)
        rename(source, target)

    monkeypatch.setattr(workdir.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(configuration(), root, restart=("midtrain",))
    assert moved == ["report", "evaluate", "distill"]


def test_an_empty_workdir_is_refused(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir: is empty"):
        run.run(configuration(), "")
    assert not (tmp_path / ".lock").exists()
    run.run(configuration(), ".", stages=("tasks",))  # a choice
    assert workdir.is_done(tmp_path / "tasks")


def test_a_later_stage_alone_is_held_against_what_earlier_ones_were_made_with(stages, tmp_path):
    root = tmp_path / "run"
    run.run(configuration(), root, stages=("tasks", "midtrain"))
    before = _tree(root)
    other = configuration(tokenizer=TokenizerConfig(vocab_size=999))
    seeded = configuration(seed=1)
    for config, names in ((seeded, ("sft",)), (seeded, ("report",)), (other, ("sft", "report"))):
        made_with = "run/tasks was made .*config.seed was 0 and is 1.*--restart=tasks" if config.seed else (
            "run/midtrain was made .*tokenizer.vocab_size was .* and is 999.*--restart=midtrain")
        with pytest.raises(UserError, match=made_with):
            run.run(config, root, stages=names)
    assert _tree(root) == before
    run.run(configuration(seed=1), root, stages=("sft",), restart=("tasks",))  # nothing that was made otherwise stays
    with pytest.raises(UserError, match="run/sft was made .*config.seed was 1 and is 0"):
        run.run(configuration(), root, stages=("experts",))


def test_restart_with_a_bad_command_moves_nothing(stages, tmp_path):
    root = tmp_path / "run"
    run.run(configuration(), root, stages=("tasks", "midtrain"))
    before = _tree(root)
    for arguments, words in (({"stages": ("tusks",)}, "unknown stage"),
                             ({"config": configuration(seed=1)}, "seed was 0"),
                             ({"restart": ("midtrain", "x")}, "--restart: unknown stage 'x'")):
        with pytest.raises(UserError, match=words):
            run.run(**{"config": configuration(), "workdir": root, "restart": ("midtrain",)} | arguments)
    assert _tree(root) == before


@pytest.mark.parametrize("left", ["pass", "(context.workdir / 'data').mkdir(exist_ok=True)",
                                  "(context.workdir / 'journal').write_text('half')"])
def test_a_refused_start_may_be_corrected(stages, tmp_path, capsys, left):
    root = tmp_path / "run"
    wrong, right = configuration(seed=1), configuration(seed=2)
    stages("tasks", f"{left}; from qcn_jax.errors import UserError; raise UserError('seed is odd')")
    for _ in range(2):
        with pytest.raises(UserError, match="seed is odd"):
            run.run(wrong, root, stages=("tasks",))
    stages("tasks", "pass")
    capsys.readouterr()
    run.run(right, root, stages=("tasks",))
    assert json.loads((root / "tasks/START.json").read_text())["config"]["seed"] == 2
    out = capsys.readouterr().out
    assert ("starts" in out) and ("refused with another configuration: moves tasks to" in out) == ("journal" in left)
    if "journal" in left:
        (aside,) = (root / "discarded").iterdir()
        assert (aside / "tasks/journal").read_text() == "half" and not (root / "tasks/journal").exists()


@pytest.mark.parametrize("end", ["raise UserError('loss is NaN')", "raise RuntimeError('boom')"])
def test_work_is_not_moved_aside_for_another_configuration(stages, tmp_path, end):
    """Training that has saved its state, and whatever an error of ours ended, is not taken for a refused start."""
    root = tmp_path / "run"
    folder = "checkpoints/40/state" if "UserError" in end else "data"
    stages("midtrain", f"(context.workdir / '{folder}').mkdir(parents=True); (context.workdir / '{folder}/x').touch(); "
                       f"from qcn_jax.errors import UserError; {end}")
    with pytest.raises((UserError, RuntimeError)):
        run.run(configuration(), root, stages=("tasks", "midtrain"))
    with pytest.raises(UserError, match="run/midtrain was made with another configuration: config.tokenizer.* was"):
        run.run(configuration(tokenizer=TokenizerConfig(vocab_size=999)), root, stages=("tasks", "midtrain"))
    assert (root / "midtrain" / folder / "x").exists()


def test_half_written_models_are_cleared_up_and_an_old_one_is_put_back(stages, tmp_path):
    root = tmp_path / "run"
    run.run(configuration(), root, stages=("tasks",))
    for name in ("tasks/.model.abc_1234.tmp/shard", "tasks/x/.model.abc_1234.tmp.old/config.json"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(name)
    run.run(configuration(), root, stages=())
    assert not (root / "tasks/.model.abc_1234.tmp").exists()
    assert [path.name for path in (root / "tasks/x").iterdir()] == ["model"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch, number):
    def lockf(stream, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(workdir.fcntl, "lockf", lockf)
    with pytest.raises(UserError, match=f"cannot be locked against a second run: {os.strerror(number)}; choose"):
        run.run(configuration(), tmp_path / "run", stages=())


@pytest.mark.parametrize("path, mode, words", [
    ("", 0o500, "--workdir=.*run: cannot be written: no permission to write into "),
    ("", 0o000, "--workdir=.*run: cannot be written: no permission to write into "),
    (".lock", 0o400, "--workdir=.*run: cannot be written: Permission denied"),
    ("tasks", 0o000, "run/tasks: cannot be written: no permission to write into "),
    ("tasks/START.json", 0o000, "run/tasks/START.json: cannot be read: Permission denied"),
    ("tasks/DONE.json", 0o000, "run/tasks/DONE.json: cannot be read: Permission denied"),
    ("midtrain", 0o500, "run/midtrain: cannot be written: no permission to write into "),
    ("midtrain", 0o300, "run/midtrain: cannot be read: Permission denied"),
])
def test_rights_of_an_ordinary_user(stages, tmp_path, path, mode, words):
    """Each is one line that names the path, before any stage works."""
    stages("midtrain", "raise RuntimeError('boom')")
    run.run(configuration(), tmp_path / "before", stages=("tasks", "sft"))  # imports while everything may be read
    importlib.import_module("small_midtrain")
    with ordinary_user() as folder:
        root = folder / "run"
        with pytest.raises(RuntimeError, match="boom"):
            run.run(configuration(), root, stages=("tasks", "midtrain"))
        if mode == 0o300:
            (root / path / workdir.START).unlink()
        before = _calls(root)
        (root / path).chmod(mode)
        with pytest.raises(UserError, match=words):
            run.run(configuration(), root, stages=("tasks", "midtrain"))
        (root / path).chmod(0o700)
        assert _calls(root) == before
