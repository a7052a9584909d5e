"""Where other packages meet ours: mini-swe-agent's agents in our sandboxes, swesmith's and harbor's reading of our files."""

import json
import os
import re
import subprocess
import sys

import pytest

from qcn_jax.agents.acting import Limits, play
from qcn_jax.agents.episode import Episode
from qcn_jax.agents.guard import Guard
from qcn_jax.agents.interop import SandboxEnvironment
from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT
from qcn_jax.agents.workspace import SandboxWorkspace
from qcn_jax.chat.endpoint import Endpoint
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.tasks import formats, harbor
from qcn_jax.envs.tasks.grading import Grader, starting_changes
from tests.agents import playing, tiny
from tests.envs.tasks.test_formats import GOOD_TOMLS
from tests.sandboxes import CALC, FILE, SOURCE, TESTS, make_task

SED = "sed -i 's/if value > low/if value < low/' calc/core.py"
DONE = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def test_environment_as_mini_swe_agent_calls_it():
    task = tiny.make_task()
    with sandbox(tiny.provider(), "tiny==1", starting_changes(task, tiny.PRISTINE)) as box:
        place = SandboxEnvironment(box, guard := Guard(), timeout=60)
        assert place.execute({"command": "echo hi; exit 3"}) == {"output": "hi\n", "returncode": 3, "exception_info": ""}
        assert place.execute({"command": "pwd"}, cwd="/testbed/calc")["output"] == "/testbed/calc\n"
        late = place.execute({"command": "echo a; sleep 60"}, timeout=3.0)
        assert late["returncode"] == -1 and "timed out after 3 seconds" in late["exception_info"] and late["output"] == "a\n"
        refused = place.execute({"command": "curl https://github.com/a/b"})
        assert refused["returncode"] == 1 and "blocked" in refused["output"] and guard.counts["blocked"] == 1
        assert json.dumps(place.serialize()) and place.get_template_vars(x=1)["x"] == 1


def test_mini_swe_agents_own_agent_solves_a_task_in_a_sandbox():
    pytest.importorskip("minisweagent", reason="not installed: mini-swe-agent")
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.models.test_models import DeterministicModel, make_output

    task = tiny.make_task()
    turns = [make_output(command, [{"command": command}]) for command in ("cat calc/core.py", SED, DONE)]
    with sandbox(tiny.provider(), "tiny==1", starting_changes(task, tiny.PRISTINE)) as box:
        agent = DefaultAgent(DeterministicModel(outputs=turns), SandboxEnvironment(box), system_template="You fix.",
                             instance_template="{{task}} in {{cwd}}")
        assert agent.run(task.problem_statement)["exit_status"] == "Submitted"
        patch = box.diff()
    assert Grader(tiny.provider()).grade(task, patch).resolved


@pytest.mark.parametrize("model", ["gold", "wrong", "empty"])
def test_the_packages_agent_and_ours_do_the_same(tmp_path, model):
    """The same endpoint, task and sandboxes: the same commands, observations and verdicts."""
    pytest.importorskip("minisweagent", reason="not installed: mini-swe-agent")
    import yaml
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.config import builtin_config_dir
    from minisweagent.models.test_models import DeterministicModel
    from minisweagent.models.utils.actions_text import parse_regex_actions

    settings = yaml.safe_load((builtin_config_dir / "benchmarks/swebench_backticks.yaml").read_text())
    script = playing.putting("calc/core.py", tiny.GOOD if model == "gold" else "1 / 0\n", "cat calc/core.py; seq 4000")
    with playing.serve(script) as (url, _, _):
        name = "empty" if model == "empty" else "gold"

        class OverHttp(DeterministicModel):
            """The package's test model, whose turns come from the endpoint."""

            def query(self, messages, **_):
                turn = Endpoint(url, name).turn([{"role": m["role"], "content": m["content"]} for m in messages], None)
                actions = parse_regex_actions(
                    turn.content, action_regex=settings["model"]["action_regex"] if "action_regex" in settings["model"]
                    else r"```mswea_bash_command\s*\n(.*?)\n```", format_error_template="{{error}}")
                return {"role": "assistant", "content": turn.content, "extra": {"actions": actions, "cost": 0.0}}

        task = tiny.make_task()
        start = starting_changes(task, tiny.PRISTINE)
        with sandbox(tiny.provider(), "tiny==1", start) as box:
            theirs = DefaultAgent(OverHttp(outputs=[], observation_template=settings["model"]["observation_template"]),
                                  SandboxEnvironment(box), system_template="s", instance_template="{{task}}")
            assert theirs.run(task.problem_statement)["exit_status"] == "Submitted"
            their_patch = box.diff()
        with sandbox(tiny.provider(), "tiny==1", start) as box:
            ours = Episode(task, MINI_SWE_AGENT, MINI_SWE_AGENT.executor(task, SandboxWorkspace(box)), guard=Guard())
            play(ours, Endpoint(url, name), Limits())
            patch = box.diff()
    plain = lambda text: re.sub(r"<warning>.*?</warning>", "", text, flags=re.DOTALL).strip()
    said = [[plain(m["content"]) for m in messages[2:] if m["role"] in ("assistant", "user")]
            for messages in (theirs.messages, ours.messages)]
    assert said[0] == said[1] and len(said[0]) == (1 if model == "empty" else 3)
    assert patch == their_patch
    verdict = Grader(tiny.provider()).grade(task, patch)
    assert verdict.outcome == {"gold": "resolved", "wrong": "unresolved", "empty": "empty_patch"}[model]


@pytest.mark.parametrize("text", [
    "THOUGHT: x\n\n```mswea_bash_command\nls -la\n```", "a\n```mswea_bash_command\ncat <<'E'\nx\nE\n```\nb", "no block",
    "```mswea_bash_command\na\n```\n```mswea_bash_command\nb\n```", "```python\nx\n```", "```mswea_bash_command\n\n```"])
def test_our_reading_of_a_turn_is_mini_swe_agents(text):
    pytest.importorskip("minisweagent", reason="not installed: mini-swe-agent")
    from minisweagent.exceptions import FormatError
    from minisweagent.models.utils.actions_text import parse_regex_actions

    ours = [call.arguments["command"].strip() for call in MINI_SWE_AGENT.parse(text).calls]
    try:
        theirs = [action["command"] for action in parse_regex_actions(
            text, action_regex=r"```mswea_bash_command\s*\n(.*?)\n```", format_error_template="{{error}}")]
    except FormatError:
        theirs = []
    assert ours == theirs


def test_swesmith_applies_and_reverts_our_bug_as_we_do(tmp_path):
    """A row's `patch` is the bug: git applies it to the pristine files, and its reverse is the gold fix."""
    task = make_task()
    row = formats.to_swesmith(task)
    for path, text in {"victim/__init__.py": "", SOURCE: CALC, FILE: TESTS}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bug.diff").write_text(row["patch"])
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["apply", "bug.diff"]):
        subprocess.run([*git, *command], check=True)
    assert (tmp_path / SOURCE).read_text() == patches.apply_diff({SOURCE: CALC}, task.bug_patch)[SOURCE] != CALC
    subprocess.run([*git, "apply", "-R", "bug.diff"], check=True)
    assert (tmp_path / SOURCE).read_text() == CALC


def test_swesmith_grades_a_log_as_we_do(tmp_path):
    grading = pytest.importorskip("swesmith.harness.grading", reason="not installed: swesmith (with swebench 4)",
                                  exc_type=ImportError)
    task = make_task()
    names = (*task.FAIL_TO_PASS, *task.PASS_TO_PASS)
    for broken in (None, names[0], names[-1]):
        found = {name: "FAILED" if name == broken else "PASSED" for name in names}
        report = grading.get_eval_tests_report(found, formats.to_swesmith(task))
        assert (grading.get_resolution_status(report) == "RESOLVED_FULL") is (broken is None)


@pytest.fixture(scope="module")
def harbor_python(tmp_path_factory):
    """An interpreter of Python 3.12 that imports `harbor`: QCN_HARBOR_PYTHON, this one, or skipped."""
    for python in filter(None, (os.environ.get("QCN_HARBOR_PYTHON"), sys.executable)):
        done = subprocess.run([python, "-c", "import harbor"], capture_output=True, check=False)
        if done.returncode == 0:
            return python
    pytest.skip("harbor needs Python 3.12; set QCN_HARBOR_PYTHON to an interpreter that has it")


def test_harbor_reads_resources_as_we_do(harbor_python, tmp_path):
    script = ("import json, sys\nfrom harbor.models.task.config import TaskConfig\nfor text in json.load(sys.stdin):\n"
              "    found = TaskConfig.model_validate_toml(text).environment\n"
              "    print(json.dumps([found.memory_mb, found.storage_mb, found.cpus, found.docker_image]))\n")
    done = subprocess.run([harbor_python, "-W", "ignore", "-c", script], input=json.dumps(list(GOOD_TOMLS)), text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for line, wanted in zip(done.stdout.splitlines(), GOOD_TOMLS.values(), strict=True):
        assert all(value in (None, ours) for value, ours in zip(json.loads(line), wanted, strict=True)), line


def test_harbor_reads_our_folder(harbor_python, tmp_path):
    harbor.write_folder(tmp_path / "task", make_task(), {"victim/__init__.py": "", SOURCE: CALC, FILE: TESTS})
    script = ("import sys, pathlib\nfrom harbor.models.task.config import TaskConfig\n"
              "config = TaskConfig.model_validate_toml(pathlib.Path(sys.argv[1], 'task.toml').read_text())\n"
              "print(config.agent.timeout_sec, config.verifier.timeout_sec, config.environment.cpus, "
              "config.environment.memory_mb)\n"
              "from harbor.models.task.task import Task\ntask = Task(pathlib.Path(sys.argv[1]))\n"
              "print('clamp is wrong' in task.instruction, task.paths.test_path.name, task.paths.solve_path.name)\n")
    done = subprocess.run([harbor_python, "-c", script, str(tmp_path / "task")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.strip().splitlines()
    assert [float(value) for value in first.split()] == [
        harbor.AGENT_SECONDS, harbor.VERIFIER_SECONDS, harbor.CPUS, harbor.MEMORY_MB]
    assert second == "True test.sh solve.sh"
