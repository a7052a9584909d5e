"""`qcn collect` on pages: what survives the tests and a look is kept."""

import json

import pytest
from envs.web import looking

from qcn_jax.cli import main as cli
from qcn_jax.envs.patches import make_diff
from qcn_jax.envs.synthesis.pages import catalog
from qcn_jax.envs.tasks.schema import PAGES, Task, write_tasks

SUITE = "tests/page.web.json::"


@pytest.fixture(name="tasks")
def _tasks(tmp_path):
    """The same defect in a good page and in one that is no pleasure to see; returns the file of tasks and their folders."""
    tasks, good = [], catalog.fill("pages:checklist:1")
    for name, style in (("good", ""), ("red", looking.RED)):
        texts = good | {"style.css": good["style.css"] + style}
        for path, text in texts.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        bad = good["app.js"].replace("entries.length - 1", "entries.length + 1")
        patch = make_diff({"app.js": bad}, {"app.js": good["app.js"]})
        tasks.append(Task(name, name, "", patch, "", "entries that are done stay", (f"{SUITE}ticks off and clears",),
                          (f"{SUITE}adds an entry",), bug_patch=make_diff({"app.js": good["app.js"]}, {"app.js": bad}),
                          path="app.js", function="clearDone", language=PAGES))
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    return tmp_path / "tasks.jsonl", [str(tmp_path / name) for name in ("good", "red")]


@pytest.mark.browser
def test_pages_that_a_judge_refuses_are_not_kept(tasks, tmp_path, capsys):
    with looking.endpoint() as (url, seen):
        given = [f"--tasks={tasks[0]}", f"--repo={','.join(tasks[1])}", f"--out={tmp_path / 'kept.jsonl'}", "--baseline=solver",
                 "--sandbox=local", "--isolation=shared", "--invalid=keep", f"--judge_endpoint={url}", "--judge_model=eyes"]
        assert cli.main(["collect", *given]) == 0
        looked = len(seen)
        assert cli.main(["collect", *given]) == 0 and len(seen) == looked  # what was judged is not judged again
        assert cli.main(["collect", *given[:-2]]) == 1  # by nobody now: other pages would survive
    assert "--judge_endpoint" in capsys.readouterr().err
    assert [json.loads(line)["task_id"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()] == ["good"]
    yields = json.loads((tmp_path / "kept.jsonl.yields.json").read_text())
    assert yields["kept"] == 1 and yields["dropped"] == {"review": 1}


def test_a_judge_needs_a_model(capsys, tmp_path):
    given = ["--tasks=t", f"--out={tmp_path / 'o'}", "--baseline=solver", "--judge_endpoint=http://127.0.0.1:1/v1"]
    assert cli.main(["collect", *given]) == 1 and "--judge_model" in capsys.readouterr().err
    assert cli.main(["collect", *given, "--judge_model=eyes"]) == 1
    assert "--judge_endpoint" in capsys.readouterr().err
