"""README says what is there: its verbs exist, its commands are the ones that CI runs, its flags are known."""

import re
import subprocess

import pytest

from qcn_jax.cli import main as cli
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
THERE, MISSING = README.split("## What is not there yet")
COMMANDS = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)


def test_two_commands_do_all_the_set_up():
    job, tests = COMMANDS
    for command in COMMANDS:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
    assert job.endswith(".venv/bin/qcn run --config=configs/nano.py --workdir=runs/nano")
    assert (ROOT / "configs/nano.py").is_file()
    assert ".venv/bin/pytest" in tests and "[test]" in tests


def test_ci_runs_the_test_command():
    found = re.search(r"command=\$\((grep .*) README\.md\)", (ROOT / ".ci/run").read_text()).group(1)
    done = subprocess.run(f"{found} README.md", shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == COMMANDS[1]
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"`qcn ([a-z]+)", THERE))))
def test_verbs_and_their_flags_exist(verb, capsys):
    assert verb in cli.available_verbs()
    assert cli.main([verb, "--help"]) == 0
    known = set(re.findall(r"^  --(\w+)$", capsys.readouterr().out, re.MULTILINE))
    for line in re.findall(rf"`qcn {verb}( [^`]*)?`", THERE):
        named = {flag for flag in re.findall(r"--(\w+)", line)}
        assert named <= known, f"qcn {verb} has no {named - known}"


def test_what_is_said_to_be_missing_is_missing():
    assert not set(re.findall(r"`qcn ([a-z]+)", MISSING)) & set(cli.available_verbs())
