"""Surveys: which tests wait for something else, and what samples make of them."""

import random

from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.synthesis import candidates, inject, sources, validate
from qcn_jax.envs.synthesis.survey import take_survey
from tests.envs.synthesis.small import write_files

CODE = "def {0}(x):\n    return x + 1\n"
TESTS = """import socket
import subprocess
import sys

from pkg import a, b


def test_quick():
    assert a.up(1) == 2


def test_process():
    assert subprocess.run([sys.executable, "-c", ""]).returncode == a.up(-1)


def test_server():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        assert b.more(5) == 6
"""


def test_a_sample_leaves_out_tests_that_wait(tmp_path):
    """They start a process or open a socket; where only such ones call a function, they show its defects."""
    write_files(tmp_path / "repo", {"pkg/__init__.py": "", "pkg/a.py": CODE.format("up"),
                                    "pkg/b.py": CODE.format("more"), "tests/test_pkg.py": TESTS})
    spec = sources.locate(str(tmp_path / "repo"))
    with make_provider("local", str(tmp_path / "state")) as provider:
        survey = take_survey(provider, spec)
    assert [name.split("::")[1] for name in survey.waiting] == ["test_process", "test_server"]
    made = {}
    for name, function in (("a", "up"), ("b", "more")):
        (injection,) = inject.candidates(CODE.format(function), f"pkg/{name}.py", ["change_arithmetic"])
        made[name] = candidates.make_candidate(injection, spec, survey, random.Random(0))
    assert [name.split("::")[1] for name in made["a"].tests] == ["test_quick"]
    assert [name.split("::")[1] for name in made["b"].tests] == ["test_server"]
    rest = [validate._rest(made["a"], validate.Options(pass_to_pass=count)) for count in (0, 2)]
    assert [[name.split("::")[1] for name in names] for names in rest] == [["test_process", "test_server"], []]
