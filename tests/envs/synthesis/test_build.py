"""Environments: what rules read, what the agent makes of failures, which verifiers are none; in real containers."""

import dataclasses
import json
import re

import pytest

from qcn_jax.cli import main as cli
from qcn_jax.envs import patches
from qcn_jax.envs.synthesis import build, issue, plan
from qcn_jax.envs.synthesis.build import rules, verifier
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.tasks import hidden
from qcn_jax.errors import UserError
from tests.envs.synthesis import foreign
from tests.envs.synthesis.answering import serve
from tests.envs.synthesis.foreign import docker_client  # noqa: F401

ENV = rules.PYTHON


@pytest.mark.parametrize(
    ("files", "language", "install", "test", "parser"),
    [
        ({"pyproject.toml": '[project]\nname = "a"\n[project.optional-dependencies]\ntest = ["pytest", "x"]\n'}, "python",
         f"{ENV} -m pip install -q -e '.[test]'", "-m pytest -rA", "pytest"),
        ({"setup.py": "", "requirements-dev.txt": "mock\n"}, "python",
         f"{ENV} -m pip install -q -r requirements-dev.txt", "pytest", "pytest"),
        ({"setup.cfg": "[options.extras_require]\ntesting = hypothesis\n", "tests/test_a.py": "import unittest\n"}, "python",
         "'.[testing]'", "unittest discover -v", "unittest"),
        ({"setup.py": "", "tox.ini": "[testenv]\ndeps =\n  freezegun>=1\n  -rreq.txt\n  flake8\ncommands = pytest\n"},
         "python", "pip install -q pytest 'freezegun>=1'", "pytest", "pytest"),
        ({"package.json": '{"scripts": {"test": "nyc npm run unit && npm run lint", "unit": "mocha -R dot test/"}, '
          '"devDependencies": {"mocha": "1"}}', "package-lock.json": "{}"}, "javascript", "npm ci",
         "npx --no-install mocha test/ --reporter tap", "tap"),
        ({"package.json": '{"scripts": {"test": "jest"}, "devDependencies": {"jest": "1"}}'}, "javascript", "npm install",
         "npx --no-install jest --verbose --ci", "jest"),
        (foreign.JAVASCRIPT, "javascript", "", "node --test --test-reporter=tap test/", "tap"),
        (foreign.GO, "go", "go mod download", "go test -count=1 -json ./...", "go_test"),
    ],
)  # fmt: skip
def test_rules(files, language, install, test, parser):
    recipe = rules.plan(files)
    assert (recipe.language, recipe.parser) == (language, parser)
    assert install in "\n".join(recipe.install) and test in recipe.test
    text = recipe.dockerfile("base")
    assert text.startswith("FROM base\n") and all(f"RUN {command}\n" in text for command in recipe.install)


def test_nothing_to_go_by():
    with pytest.raises(UserError, match="no go.mod, package.json"):
        rules.plan({"README.md": ""})


@pytest.mark.docker
def test_agent_builds_where_rules_fail(client, tmp_path, capsys):
    """No tests that rules know: the model looks around, fails to install, is rejected for a grep, and then succeeds."""
    recipe = {"language": "python", "packages": [], "install": [], "parser": "tap",
              "test": "grep -q 'value < low' calc/core.py && echo ok 1 - text || echo not ok 1 - text"}
    (tmp_path / "calc-1.0").mkdir()
    for path, text in foreign.PYTHON.items():
        (tmp_path / "calc-1.0" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "calc-1.0" / path).write_text(text)

    def model(messages):
        last = messages[-1]["content"]
        if len(messages) == 2:
            return "Let me look.\n```bash\nls checks; python3 checks/run_checks.py\n```"
        if "No module named 'calc'" in last:
            assert "run_checks.py" in last and "exit status 1" in last
            return f"```json\n{json.dumps({**recipe, 'install': ['echo no such index >&2; exit 7']})}\n```"
        if "exits with 7" in last:
            assert "no such index" in last
            return f"```json\n{json.dumps(recipe)}\n```"
        if "it reads code and does not run it" in last or "notices none" in last:
            return f"```json\n{json.dumps({**recipe, 'test': 'PYTHONPATH=. python3 checks/run_checks.py'})}\n```"
        return "I give up."

    with serve(model) as (url, bodies):
        assert cli.main(["synthesize", f"--repo={tmp_path}/calc-1.0", "--strategies=build", f"--endpoint={url}", "--model=m",
                         f"--out={tmp_path}/tasks.jsonl"]) == 0, capsys.readouterr().err
    (place,) = (tmp_path / "tasks.jsonl.work" / "environments").iterdir()
    made = json.loads((place / "environment.json").read_text())
    assert len(bodies) == 4 and made["attempts"] == 3 and "run_checks.py" in made["recipe"]["test"]
    assert set(made["outcomes"]) == {"inside", "below", "above"} and made["acceptance"]["states"] == {
        "fixed": "passed", "defective": "failed", "emptied": "failed", "stopped": "failed"}  # fmt: skip
    said = capsys.readouterr()
    assert "recipe 1 is rejected" in said.err and "recipe 3 is accepted after 4 turns" in said.err
    with pytest.raises(UserError, match="no environment by rules"):
        build.build(foreign.encoded(foreign.PYTHON), "calc", lambda _: None, client=client)


SUPERFICIAL = {
    "grep -q 'value < low' calc/core.py": "it reads code and does not run it",
    "grep -c 'value < low' calc/core.py | grep -qx 1 && echo PASSED": "it reads code and does not run it",
    "python3 -c \"import ast; tree = ast.parse(open('calc/core.py').read()); assert 'value < low' in ast.unparse(tree)\"":
        "it reads code and does not run it",
    "sha256sum calc/core.py | grep -q $(python3 -c \"import hashlib; print(hashlib.sha256(open('calc/core.py', 'rb').read())"
    ".hexdigest())\")": "passes on the defective state",
    "python3 -c \"compile(open('calc/core.py').read(), 'core.py', 'exec')\"": "passes on the defective state",
    "true": "passes with the sources emptied", "echo PASS": "passes with the sources emptied", "exit 0": "passes with the sources emptied",
    "test -f calc/core.py && test -f checks/run_checks.py": "passes with the sources emptied",
    "PYTHONPATH=. python3 -c 'import calc.core'": "passes on the defective state",
    "PYTHONPATH=. python3 checks/run_checks.py || true": "passes on the defective state",
    "PYTHONPATH=. python3 checks/run_checks.py | tee /tmp/log": "passes on the defective state",
    "false": "fails on the fixed state",
}


@pytest.mark.docker
def test_verifiers(client):
    """Judged by what they do on four states of the sources: superficial ones are none, whatever they print."""
    from qcn_jax.envs.sandbox import images

    sources = {path: text for path, text in foreign.PYTHON.items() if path.startswith("calc/")}
    defect = {"calc/core.py": sources["calc/core.py"].replace("value < low", "value > low")}
    with Container(client, images.base_image(client)) as container:
        container.write(foreign.PYTHON)
        for command, problem in {"PYTHONPATH=. python3 checks/run_checks.py": None, **SUPERFICIAL}.items():
            found = verifier.accept(container, verifier.Verifier(command), "python", sources, defect)
            assert (found.problems == ()) == (problem is None), (command, found)
            assert problem is None or any(problem in words for words in found.problems), (command, found)


@pytest.mark.docker
def test_container(client):
    """Limits inside, bounded output, files in and out."""
    from qcn_jax.envs.sandbox import images

    with Container(client, images.base_image(client)) as container:
        container.write({"a/b.txt": "é\n", "gone": "x"})
        container.write({"gone": None})
        assert container.exec("cat a/b.txt; ls").output == "é\na\n" and container.read({"a/b.txt", "no"}) == {"a/b.txt": "é\n"}
        late = container.exec("sleep 30", 1.0)
        assert late.timed_out and late.seconds < 10 and container.exec("exit 3").exit_code == 3
        big = container.exec("head -c 9000000 /dev/zero | tr '\\0' x")
        assert len(big.output) < 5 << 20 and "[...]" in big.output
        assert container.exec("ls /sys/class/net").output.split() == ["lo"]


@pytest.mark.docker
@pytest.mark.parametrize("files", [foreign.JAVASCRIPT, foreign.GO], ids=["javascript", "go"])
def test_other_languages_end_to_end(client, files, tmp_path):
    """Environment by rules, defects in covered code, verified tasks; gold resolves, nothing else does."""
    pytest.importorskip("tree_sitter_language_pack", reason="tree-sitter-language-pack is not installed")
    from qcn_jax.envs.synthesis.languages import factory, grade

    made = foreign.built(files, client)
    settings = plan.Settings(candidates_per_repo=5, held_out=True, statement_characters=1500, kinds=(
        "flip_comparison", "change_boundary", "change_augmented", "change_arithmetic", "drop_guard", "swap_arguments"))
    common = (client, "numbers==1", foreign.encoded(files), made, settings, tmp_path, lambda _: None, 1)
    tasks, verdicts = factory.synthesize(*common)
    assert factory.synthesize(*common) == (tasks, verdicts)  # from the journal
    assert len(tasks) >= 2 and {v.outcome for v in verdicts} <= {"kept", "survived", "broken", "timeout"}
    for each in tasks:  # what shows the defect is not there, and the text says nothing of it
        assert hidden.takes_out(each) and "test" not in each.problem_statement.lower()
    told = next(each for each in tasks if issue.programs(each.problem_statement, each.language))
    assert any(each.held_out_patch for each in tasks)
    assert all(task.function.lower() != "unused" and task.eval_script and task.log_parser == made.recipe.parser
               for task in tasks)  # fmt: skip
    false = dataclasses.replace(told, problem_statement=re.sub(r"`-?\d+`", "`12345`", told.problem_statement))
    assert "is false" in str(grade.verify(client, false).problems)
    task = next(each for each in tasks if each.held_out_patch)
    assert grade.verify(client, task, reruns=1).problems == () and task.function in task.problem_statement
    path = task.path
    start = patches.apply_diff(files, task.bug_patch)
    useless = patches.make_diff(start, {**start, path: start[path] + "\n// nothing\n"})
    assert grade.grade(client, task, useless).outcome == "unresolved"
    assert grade.grade(client, task, "").outcome == "empty_patch"
    test_file = next(name for name in files if "test" in name)
    cheat = patches.make_diff(start, {**start, test_file: "// none\n"})
    assert grade.grade(client, task, cheat).dropped.keys() == {test_file}
