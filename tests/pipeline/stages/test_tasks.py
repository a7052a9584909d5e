"""Stage tasks, whole: folders in, verified tasks out; refusals; the same result after an interruption."""

import base64
import dataclasses
import json

import pytest

from qcn_jax import files
from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.config import DistillConfig, ExpertsConfig, RunConfig, TasksConfig
from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.tasks import formats
from qcn_jax.envs.tasks.grading import Grader
from qcn_jax.envs.tasks.schema import write_tasks
from qcn_jax.errors import UserError
from qcn_jax.pipeline import run
from qcn_jax.pipeline.context import Shared, StageContext
from tests.agents import playing, tiny
from tests.envs.synthesis.small import write_repository
from tests.envs.tasks.test_swebench import instance  # noqa: F401
from tests.sandboxes import CALC, SOURCE


@pytest.fixture
def config(tmp_path):
    """A configuration over two copies of the small repository, under different names."""
    train = write_repository(tmp_path, "numbers_pkg-1.0")
    heldout = write_repository(tmp_path, "others_pkg-2.0")
    tasks = TasksConfig(repos_train=(str(train),), repos_heldout=(str(heldout),), train=6, heldout=3, reruns=0, test_timeout=60.0, near_duplicates=2.0,
                        kinds=("change_boundary", "flip_comparison", "wrong_variable"))  # fmt: skip
    return RunConfig(sandbox="local", workers=1, tasks=tasks)


def test_stage(config, tmp_path, capsys):
    """Tasks of both splits, as promised to the other stages; then a torn journal gives the same tasks again."""
    results = run.run(config, tmp_path / "run", ("tasks",))["tasks"]
    assert (results["train"], results["heldout"]) == (6, 3)
    assert (results["repos_train"], results["repos_heldout"]) == (["numbers_pkg==1.0"], ["others_pkg==2.0"])
    assert results["candidates"] == sum(row["candidates"] for row in results["yields"].values()) >= 9
    assert set(results["yields"]) <= set(config.tasks.kinds)
    assert "verified" in capsys.readouterr().out
    context = StageContext(config, tmp_path / "run", "sft", Shared(config, tmp_path / "run"))
    tasks = context.tasks("train")
    assert {task.repo for task in tasks} == {"numbers_pkg==1.0"} and len({task.instance_id for task in tasks}) == 6
    with make_provider("local", str(tmp_path / "state")) as provider:
        provider.prepare(context.repositories()["numbers_pkg==1.0"])
        assert all(Grader(provider).grade(task, task.patch).resolved for task in tasks[:2])
        assert not Grader(provider).grade(tasks[0], tasks[1].patch).resolved

    folder = tmp_path / "run" / "tasks"
    before = {name: (folder / name).read_bytes() for name in ("train.jsonl", "heldout.jsonl", "train.journal.jsonl")}
    journal = before["train.journal.jsonl"]
    (folder / "train.journal.jsonl").write_bytes(journal[: len(journal) // 2])
    for name in ("DONE.json", "train.jsonl", "heldout.jsonl"):
        (folder / name).unlink()
    run.run(config, tmp_path / "run", ("tasks",))
    assert (folder / "train.jsonl").read_bytes() == before["train.jsonl"]
    assert (folder / "heldout.jsonl").read_bytes() == before["heldout.jsonl"]


def test_given_tasks_take_the_place_of_made_ones(tmp_path, capsys):
    """Training tasks of a file, held-out ones of another, on repositories that are named; counts say what became of them."""
    train, heldout = tiny.write_tree(tmp_path / "tiny-1"), tiny.write_tree(tmp_path / "other-2")
    task = tiny.make_task()
    rows = [task, dataclasses.replace(task, instance_id="unknown", repo="gone"), dataclasses.replace(task, instance_id="kept_apart",
                                                                                                   repo="other==1")]
    formats.write(tmp_path / "train.jsonl", rows, "swesmith")
    write_tasks(tmp_path / "heldout.jsonl", [tiny.make_task(
        "return n % 2 == 0", "return n % 2 == 1", "is_even", ("even",), instance_id="h", repo="other==2", problem_statement="Odd.")])
    config = RunConfig(sandbox="local", workers=1, tasks=TasksConfig(
        data=str(tmp_path / "train.jsonl"), heldout_data=str(tmp_path / "heldout.jsonl"), malformed="skip", verify=1,
        repos_train=(str(train),), repos_heldout=(str(heldout),)))
    results = run.run(config, tmp_path / "run", ("tasks",))["tasks"]
    assert (results["train"], results["heldout"], results["candidates"]) == (1, 1, 0)
    assert (results["repos_train"], results["repos_heldout"]) == (["tiny==1"], ["other==2"])
    given = results["given"]["train"]
    assert [given[key] for key in ("read", "kept", "malformed", "executed")] == [3, 1, 1, 1]
    assert given["left_out"] == {"its project is held out": 1} and "train.jsonl:2: field repo: 'gone'" in given["malformed_rows"][0]
    assert "train: 1 of 3 kept, 1 malformed" in capsys.readouterr().out
    context = StageContext(config, tmp_path / "run", "sft", Shared(config, tmp_path / "run"))
    (read,) = context.tasks("train")
    assert (read.instance_id, read.repo, read.bug_patch) == (task.instance_id, task.repo, task.bug_patch)
    assert set(context.repositories()) == {"tiny==1", "other==2"}


@pytest.mark.docker
def test_given_tasks_are_acted_on_and_graded_in_their_images(instance, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Instances of SWE-bench, whose repository is nowhere: checked by the stage, then played as a policy would."""
    rows = [instance, {**instance, "instance_id": "absent", "image": "qcn-test/absent:1"},
            {**instance, "instance_id": "false", "patch": "diff --git a/x b/x\n"}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = TasksConfig(data=str(tmp_path / "tasks.jsonl"), malformed="skip", heldout=0)
    config = RunConfig(sandbox="local", workers=1, tasks=given, experts=ExpertsConfig(scaffold="mini_swe_agent", names=("swe",)),
                       distill=DistillConfig(scaffold="mini_swe_agent"))
    found = run.run(config, tmp_path / "run", ("tasks",))["tasks"]["given"]["train"]
    assert (found["kept"], found["in_images"], found["executed"]) == (1, 1, 2)
    reasons = "\n".join(found["malformed_rows"])
    assert "tasks.jsonl:2: " in reasons and "absent:1" in reasons and "the gold patch gives patch_failed" in reasons

    shared = Shared(config, tmp_path / "run")
    context = StageContext(config, tmp_path / "run", "experts", shared)
    (task,), services = context.tasks("train"), context.services()
    episode = services.episode(task, SCAFFOLDS.resolve("mini_swe_agent", ""), 3)
    try:
        coded = base64.b64encode(CALC.encode()).decode()
        assert not episode.step(playing.block(f"echo {coded} | base64 -d > {SOURCE}")).done
        assert episode.step(playing.SUBMIT).done
        assert services.grade(task, episode.result().patch).resolved and not services.grade(task, "").resolved
    finally:
        episode.executor.close()
        shared.close()

    refuse = lambda name, **changes: pytest.raises(UserError, run.run, dataclasses.replace(config, **changes), tmp_path / name,
                                                   ("tasks",)).value
    assert str(refuse("nano", experts=ExpertsConfig())).startswith("--config.experts.scaffold: 'nano'; tasks with images")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    assert str(refuse("none")).startswith("--config.tasks.data: tasks with images of their own need Docker")


def test_nothing_is_made_of_a_project_that_given_tasks_hold_out(config, tmp_path):
    write_tasks(tmp_path / "heldout.jsonl", [dataclasses.replace(tiny.make_task(), repo="numbers-pkg==0.9")])
    archive = tiny.write_tree(tmp_path / "older" / "numbers-pkg-0.9")
    changed = dataclasses.replace(config.tasks, heldout_data=str(tmp_path / "heldout.jsonl"), repos_heldout=(str(archive),), verify=0)
    with pytest.raises(UserError, match="repos_train: numbers_pkg==1.0 is of the project of numbers-pkg==0.9, which is held out"):
        run.run(dataclasses.replace(config, tasks=changed), tmp_path / "run", ("tasks",))


def test_no_tasks_wanted(config, tmp_path):
    """With counts of zero only the repositories are found (a base checkpoint needs no more)."""
    config = dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, train=0, heldout=0))
    results = run.run(config, tmp_path / "run", ("tasks",))["tasks"]
    assert (results["train"], results["candidates"]) == (0, 0)
    assert [row["name"] for row in files.read_json(tmp_path / "run/tasks/repositories.json")] == [
        "numbers_pkg==1.0", "others_pkg==2.0"]  # fmt: skip


def test_refusals(config, tmp_path, monkeypatch):
    """One line each: overlapping splits, unknown kind, nothing to make tasks of, failing repository, no network."""

    def refused(**changes):
        changed = dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, **changes))
        with pytest.raises(UserError) as caught:
            run.run(changed, tmp_path / f"run{len(changes)}{sorted(changes)[0]}", ("tasks",))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "must be disjoint" in refused(repos_train=("a==1",), repos_heldout=("a==2",))
    assert "--config.tasks.kinds: 'nonsense'; allowed: " in refused(kinds=("nonsense",))
    assert "--config.tasks.heldout: 3 tasks wanted" in refused(repos_heldout=(), train=0, repos_train=())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert refused(repos_train=("toolz==1.2.0",)).startswith("toolz==1.2.0: cannot be downloaded")
    broken = write_repository(tmp_path, "broken_pkg-1.0")
    (broken / "tests/test_core.py").write_text("import numbers_pkg.nothing\n")
    assert "none of its tests passes before any defect" in refused(repos_train=(str(broken),), train=1, heldout=0)
