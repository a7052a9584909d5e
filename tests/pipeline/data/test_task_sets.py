"""Tasks of files: every format in every kind of file, what is wrong with which row, and what is kept apart."""

import dataclasses
import gzip
import json
import subprocess

import pyarrow
import pytest
from pyarrow import parquet

from qcn_jax.config import TasksConfig
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.tasks import formats, harbor
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import given_tasks
from qcn_jax.pipeline.data.readers import task_sets
from qcn_jax.pipeline.data.texts import Findings
from tests.agents import tiny

TASK = tiny.make_task(image_name="tiny:1")
WRITERS = {**formats.WRITERS, "ours": lambda task: task.to_json()}


def read(path, malformed="stop"):
    findings = Findings(malformed, "--config.tasks.malformed")
    return [task for _, task in task_sets.read_tasks(str(path), "--config.tasks.data", findings)], findings


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else text)
    return path


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.json", "tasks.jsonl.gz", "tasks.parquet"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_read_from_every_kind_of_file(kind, name, tmp_path):
    (task,), findings = read(write(tmp_path / name, [WRITERS[kind](TASK)]))
    fields = ("instance_id", "repo", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS")
    assert [getattr(task, field) for field in fields] == [getattr(TASK, field) for field in fields]
    assert task.patch == TASK.patch and findings.read == 1 and task.image_name == ("" if kind == "swebench" else "tiny:1")
    assert (task == TASK) == (kind == "ours")


def test_folders_globs_and_harbors_folders(tmp_path):
    for number in range(3):
        harbor.write_folder(tmp_path / "harbor" / f"task-{number}", dataclasses.replace(TASK, instance_id=f"t.{number}"),
                            tiny.PRISTINE)
    assert [task.instance_id for task in read(tmp_path / "harbor")[0]] == ["t.0", "t.1", "t.2"]
    assert [task.instance_id for task in read(tmp_path / "harbor/task-[12]")[0]] == ["t.1", "t.2"]
    (tmp_path / "harbor/task-1/tests/config.json").unlink()
    theirs, place = read(tmp_path / "harbor")[0][1], tmp_path / "harbor/task-1"  # now anybody's: its own tests decide
    assert (theirs.instance_id, theirs.repo, theirs.log_parser, theirs.image_name[:11]) == ("task-1", str(place), "harbor", "qcn-harbor:")
    (place / "environment/docker-compose.yaml").write_text("")
    write(tmp_path / "led.jsonl", [theirs.to_json()])
    for path, words in (("harbor", "task-1: environment/docker-compose.yaml: tasks of several containers are not acted on"),
                        ("led.jsonl", "field log_parser: 'harbor' stands for a task folder of Harbor")):
        assert words in read(tmp_path / path, "skip")[1].shown[0]

    rows = tmp_path / "rows"
    (rows / "b.jsonl.work").mkdir(parents=True)
    write(rows / "b.jsonl", [TASK.to_json()])
    for beside in ("b.jsonl.work/tasks.journal.jsonl", "b.jsonl.yields.json", "repositories.json"):  # of qcn synthesize
        (rows / beside).write_text("[1]")
    write(rows / "a.parquet", [formats.to_swebench(dataclasses.replace(TASK, instance_id="first"))])
    assert [task.instance_id for task in read(rows)[0]] == ["first", TASK.instance_id]


ROW = TASK.to_json()
MALFORMED = [
    ("{", "is not valid JSON"),
    ("[1]", "expected a JSON object, got list"),
    ({}, "field instance_id is missing"),
    ({**ROW, "instance_id": "../x"}, "field instance_id must be printable"),
    ({**ROW, "patch": None}, "field patch is missing"),
    ({**ROW, "FAIL_TO_PASS": "tests/a.py::b"}, "field FAIL_TO_PASS is not a JSON list"),
    ({**ROW, "PASS_TO_PASS": [1]}, "field PASS_TO_PASS must be a list of test ids"),
    ({**ROW, "timeout": -1}, "field timeout must be above 0"),
    ({**ROW, "repo": ""}, "field repo must be a printable name"),
    ({**formats.to_swesmith(TASK), "patch": "@@ nonsense"}, "field patch cannot be reversed"),
    ({**formats.to_swebench_pro(TASK), "fail_to_pass": "[open"}, "field fail_to_pass is not a list of test names"),
    (ROW, "field instance_id: tiny__calc.1 came before, in "),
]


def test_rows_that_are_no_tasks_are_named_and_skipped_or_fatal(tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = [json.dumps(ROW), *(row if isinstance(row, str) else json.dumps(row) for row, _ in MALFORMED)]
    path.write_text("\n".join(lines) + "\n")
    tasks, findings = read(path, "skip")
    assert len(tasks) == 1 and findings.malformed == len(MALFORMED)
    for number, (shown, (_, words)) in enumerate(zip(findings.shown, MALFORMED, strict=True), 2):
        assert shown.startswith(f"{path}:{number}: {words}"), shown
    with pytest.raises(UserError, match=rf"^{path}:2: is not valid JSON.*; --config.tasks.malformed=skip leaves such rows out$"):
        read(path)


@pytest.mark.parametrize("name, words", [
    ("none.jsonl", "there is no such file or folder"), ("none/*.jsonl", "matches no file"), ("a.txt", "holds no tasks; allowed"),
    ("empty.jsonl", "is empty"), ("blank.jsonl", "holds no task"), ("folder", "holds no tasks; allowed"),
])
def test_a_file_without_tasks_is_one_line_before_any_work(name, words, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=words) as caught:
        task_sets.check(TasksConfig(heldout_data=str(tmp_path / name)))
    assert str(caught.value).startswith("--config.tasks.heldout_data") and "\n" not in str(caught.value)


# --- which of them can be used


@pytest.fixture(name="pool")
def _pool(tmp_path):
    with EnvPool(1, {"kind": "local", "state_dir": str(tmp_path / "state")}) as made:
        yield made


def load(tmp_path, pool, rows, *, apart=lambda task: "", malformed="skip", repos=None, verify=0):
    write(tmp_path / "tasks.jsonl", rows)
    repos = (str(tiny.write_tree(tmp_path / "tiny-1")),) if repos is None else repos
    config = TasksConfig(data=str(tmp_path / "tasks.jsonl"), repos_train=repos, malformed=malformed, verify=verify)
    return given_tasks.load(config, "train", pool, None, tmp_path / "archives", print, apart)


def test_tasks_that_cannot_be_used_are_counted_with_their_reason(tmp_path, pool):
    changed = lambda **fields: dataclasses.replace(TASK, instance_id=f"bad.{len(rows)}", **fields).to_json()
    rows, words = [TASK.to_json()], []
    for reason, fields in (
        ("field FAIL_TO_PASS is empty", {"FAIL_TO_PASS": ()}),
        ("field problem_statement is empty", {"problem_statement": " \n"}),
        ("field eval_script: its tests are run by a script of its own, but no field names the image",
         {"eval_script": "npm test", "FAIL_TO_PASS": ("clamps",), "image_name": ""}),
        ("field repo: 'owner/tiny' is not name==version and not given by --config.tasks.repos_train", {"repo": "owner/tiny"}),
        ("task bad.5: bug_patch does not apply", {"bug_patch": TASK.patch}),
        ("field patch does not apply to tiny==1", {"patch": TASK.bug_patch}),
        ("field test_patch does not apply to tiny==1", {"test_patch": TASK.bug_patch.replace("calc/core", "calc/other")}),
    ):
        rows.append(changed(**fields))
        words.append(reason)
    found = load(tmp_path, pool, rows)
    assert [task.instance_id for task in found.tasks] == [TASK.instance_id] and found.summary["malformed"] == len(words)
    assert [spec.name for spec in found.repositories] == ["tiny==1"]
    shown = sorted(found.summary["malformed_rows"], key=lambda line: int(line.split(":")[1]))
    assert [f"{tmp_path}/tasks.jsonl:{number}: {reason}" == line[: len(f"{tmp_path}/tasks.jsonl:{number}: {reason}")]
            for number, (reason, line) in enumerate(zip(words, shown, strict=True), 2)] == [True] * len(words), shown
    with pytest.raises(UserError, match="tasks.jsonl:2: field FAIL_TO_PASS is empty; --config.tasks.malformed=skip"):
        load(tmp_path, pool, rows, malformed="stop")
    with pytest.raises(UserError, match=r"--config.tasks.data=.*: no task is left \(0 of 1 kept, 1 malformed"):
        load(tmp_path, pool, rows[1:2])


def test_release_5_rows_of_python_repositories_are_graded_here(tmp_path, pool):
    (task,) = load(tmp_path, pool, [formats.to_swebench5(dataclasses.replace(TASK, bug_patch=""))],
                   repos=(str(tiny.write_tree(tmp_path / "tiny-1", {**tiny.PRISTINE, "calc/core.py": buggy()})),)).tasks
    assert task.eval_script == task.log_parser == "" and task.FAIL_TO_PASS == TASK.FAIL_TO_PASS


def buggy():
    return tiny.GOOD.replace("if value < low:", "if value > low:")


def test_a_clone_gives_each_tasks_base_commit(tmp_path, pool):
    clone = tiny.write_tree(tmp_path / "tiny", {**tiny.PRISTINE, "calc/core.py": buggy()})
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=clone, check=True,
                                        capture_output=True, text=True).stdout.strip()
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "start")
    row = formats.to_swebench(dataclasses.replace(TASK, repo="Owner/Tiny", base_commit=git("rev-parse", "HEAD"), bug_patch=""))
    (clone / "calc/core.py").write_text("")
    git("commit", "-q", "-a", "-m", "later")
    missing = {**row, "instance_id": "missing", "base_commit": "0" * 40}
    found = load(tmp_path, pool, [row, missing], repos=(str(clone),))
    (task,), (spec,) = found.tasks, found.repositories
    assert task.repo == spec.name == f"tiny@{row['base_commit'][:12]}" and spec.archive.startswith(str(tmp_path / "archives"))
    assert found.summary["malformed"] == 1 and ":2: " in found.summary["malformed_rows"][0]


def test_training_tasks_that_have_to_do_with_held_out_ones_are_left_out(tmp_path, pool):
    heldout = dataclasses.replace(TASK, repo="owner/other", problem_statement="Breaks  on\nempty input.", patch="x")
    apart = given_tasks.heldout_apart([heldout], [RepositorySpec("Some.Thing==2.0", "")])
    rows = [dataclasses.replace(TASK, instance_id=f"t.{number}", **fields).to_json() for number, fields in enumerate((
        {}, {"problem_statement": "Breaks on empty input."}, {"repo": "swesmith/somebody__other.0a1b2c3d"}, {"repo": "some-thing==3"},
    ))] + [TASK.to_json()]
    found = load(tmp_path, pool, rows, apart=apart)
    assert [task.instance_id for task in found.tasks] == ["t.0"]
    assert found.summary["left_out"] == {"its project is held out": 2, "a held-out task has its id, statement or fix": 2}


@pytest.mark.parametrize("name, words", [
    ("toolz==1.2.0", "toolz"), ("Flask-SQLAlchemy==3", "flask-sqlalchemy"), ("astropy/astropy", "astropy"),
    ("astropy@0a1b2c3d4e5f", "astropy"), ("swesmith/astropy__astropy.0a1b2c3d", "astropy"), ("zope.interface==5", "zope-interface"),
])
def test_projects_of_names(name, words):
    assert given_tasks.project(name) == words


def test_what_is_executed_must_be_as_it_says(tmp_path, pool):
    """A fix that mends nothing is found by running it, whatever applies."""
    useless = tiny.make_diff({"calc/core.py": buggy()}, {"calc/core.py": buggy() + "\n"})
    rows = [TASK.to_json(), dataclasses.replace(TASK, instance_id="useless", patch=useless).to_json()]
    found = load(tmp_path, pool, rows, verify=2)
    assert [task.instance_id for task in found.tasks] == [TASK.instance_id] and found.summary["executed"] == 2
    assert ":2: the gold patch gives " in found.summary["malformed_rows"][0]
