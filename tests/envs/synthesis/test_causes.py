"""Repositories whose settings, texts or needs are odd give tasks all the same, or one line that names the cause."""

import concurrent.futures
import dataclasses

import pytest

from qcn_jax.envs.sandbox import RepositorySpec, make_provider, pytest_options
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.synthesis import causes, plan, sources, synthesize
from qcn_jax.envs.synthesis.survey import take_survey
from qcn_jax.envs.testpaths import is_doctest
from qcn_jax.errors import UserError
from tests.envs.synthesis.small import SOURCE, TESTS, write_repository

EXAMPLE = '''

def twice(value):
    """Doubles.

    >>> twice(2)
    4
    """
    return 2 * value
'''


@pytest.fixture(scope="module")
def provider(tmp_path_factory):
    with make_provider("local", str(tmp_path_factory.mktemp("state"))) as made:
        yield made


def test_settings_that_cannot_be_followed_cost_no_test(provider, tmp_path):
    """-x beside a failing test, options of plugins that are not here, doctests of sources, a test that ends Python."""
    root = write_repository(tmp_path)
    (root / "numbers_pkg/core.py").write_text(SOURCE + EXAMPLE)
    (root / "tests/test_core.py").write_text(TESTS + "\n\ndef test_twice():\n    from numbers_pkg.core import twice\n    assert twice(3) == 6\n")
    (root / "tests/test_aaa.py").write_text("import sys\nsys.exit('not here')\n")
    (root / "tests/test_aab.py").write_text("def test_fails():\n    assert 0\n")
    (root / "setup.cfg").write_text("[tool:pytest]\naddopts = -x --doctest-modules --cov=numbers_pkg -n4 --strict-config\n"
                                    "asyncio_mode = auto\nrequired_plugins = pytest-cov\n")
    spec = sources.locate(str(root))
    survey = take_survey(provider, spec)
    assert (len(survey.tests), survey.failing) == (10, 3) and not any(map(is_doctest, survey.tests))
    assert survey.note == "pytest's options without --cov=numbers_pkg -n4 --strict-config"
    schedule = plan.Plan(plan.Settings())
    assert schedule.add(spec, survey, {"numbers_pkg/core.py": SOURCE + EXAMPLE}) > 20


def test_tests_in_a_file_that_pytest_does_not_collect_by_itself(provider, tmp_path):
    """In src/tests.py, as unittest finds them: roman 5.2."""
    root = write_repository(tmp_path)
    (root / "tests/test_core.py").rename(root / "numbers_pkg/tests.py")
    survey = take_survey(provider, sources.locate(str(root)))
    assert len(survey.tests) == 9 and all(name.startswith("numbers_pkg/tests.py::") for name in survey.tests)
    assert survey.note == "tests in files called test.py or tests.py"


def test_what_is_missing_is_named_with_the_option_that_brings_it(provider, tmp_path):
    root = write_repository(tmp_path, "conftest_pkg")
    (root / "tests/conftest.py").write_text("import answer_package.deep\n")
    with pytest.raises(UserError) as failure:
        take_survey(provider, sources.locate(str(root)))
    assert "answer_package is not installed" in str(failure.value) and "--setup='pip install answer_package'" in str(failure.value)
    root = write_repository(tmp_path, "elsewhere_pkg")
    (root / "code").mkdir()
    (root / "numbers_pkg").rename(root / "code" / "numbers_pkg")
    spec = sources.locate(str(root))
    with pytest.raises(UserError, match="numbers_pkg cannot be imported, which is in code: --python_path=code may help"):
        take_survey(provider, spec)
    assert len(take_survey(provider, dataclasses.replace(spec, python_path=("code", "."))).tests) == 9


class Here:
    """A pool whose one worker is this process."""

    def __init__(self, provider):
        self.provider = provider

    def register(self, specs):
        pass

    def submit(self, function, *arguments, **_):
        future = concurrent.futures.Future()
        future.set_result(function(self.provider, *arguments))
        return future


def test_a_repository_without_tasks_ends_with_the_reason(provider, tmp_path):
    root = write_repository(tmp_path, "latin_pkg")
    (root / "numbers_pkg/core.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n" + SOURCE.encode())
    spec, lines = sources.locate(str(root)), []
    made = synthesize.synthesize(Here(provider), [spec], plan.Settings(), tmp_path / "work", lines.append)
    reason = "latin_pkg: no candidate: what its tests call is not written in UTF-8 (numbers_pkg/core.py)"
    assert lines[-1] == reason and made.skipped == {"latin_pkg": reason} and made.tasks == [] and made.repositories == [spec]


@pytest.mark.parametrize("files, output, args, without", [
    ({"pytest.ini": "[pytest]\naddopts = --cov=a -q\n"}, "error: unrecognized arguments: --cov=a", "addopts=-q", "--cov=a"),
    ({"pyproject.toml": "[tool.pytest.ini_options]\naddopts = ['-q', '--import-mode=importlib', '--timeout', '3']\n"},
     "x: error: unrecognized arguments: --timeout", "addopts=-q --import-mode=importlib 3", "--timeout"),
    ({"tox.ini": "[pytest]\naddopts = -p nice.plugin -pno:x\n"}, 'Error importing plugin "nice.plugin": no', "addopts=-pno:x", "-p nice.plugin"),
    ({"setup.cfg": "[tool:pytest]\naddopts = --strict-config -ra\n"}, "Unknown config option: x", "addopts=-ra", "--strict-config"),
    ({"pytest.ini": "[pytest]\nrequired_plugins = pytest-cov\n"}, "Missing required plugins: pytest-cov", "addopts=", "demands"),
    ({"pytest.ini": "nonsense"}, "error", "addopts=", "demands"),
    ({}, "INTERNALERROR> pytest.PytestConfigWarning: Unknown config option: asyncio_mode", "addopts=", "asyncio_mode")])
def test_options_that_pytest_refuses_are_left_out(files, output, args, without):
    found, words = pytest_options.milder(files, output)
    assert found[1] == args and without in words and pytest_options.milder(files, output, last=True)[0][0] == "-c"
    assert pytest_options.is_refused({}, 3 if "Warning" in output else 4, output) and not pytest_options.is_refused({"a": "passed"}, 4, output)


@pytest.mark.parametrize("run, failures, files, words", [
    ({"status": "timeout"}, [], [], "its tests end in timeout of 300 s"),
    ({"output": "mainloop caught unexpected SystemExit!\n"}, [], ["tests/test_a.py"], "mainloop caught unexpected SystemExit!"),
    ({"output": "ERROR: usage: x\nx: error: unrecognized arguments: --cov\n"}, [], [], "x: error: unrecognized arguments: --cov"),
    ({"output": "E   ModuleNotFoundError: No module named 'yaml.x'\n"}, [], [], "yaml is not installed: "),
    ({}, ["No module named 'tests.helpers'"], ["tests/test_a.py"], "tests.helpers, which its tests import, is not in it"),
    ({}, ["fixture 'mocker' not found"], [], "pytest-mock is not installed"),
    ({}, ["AssertionError"], [], "AssertionError"), ({}, [], ["pkg/a.py"], "it holds no tests"),
    ({}, [], ["tests/test_a.py"], "no tests were found")])
def test_causes(run, failures, files, words):
    baseline = TestRun(**{"status": "ok", "outcomes": {}, "messages": {}, "seconds": 1.0, "output": "", "exit_status": 5, **run})
    assert causes.of_no_passing_test(files, baseline, failures).startswith(words)


def test_causes_of_no_candidate():
    def cause(called, files, texts=()):
        return causes.of_no_candidate(called, files, dict.fromkeys(texts, ""))

    assert "pluggy that pytest itself runs with" in cause([], ["src/pluggy/__init__.py"])
    assert "--python_path" in cause(["tests/test_a.py"], ["a.py"]) and "not written in UTF-8 (a.py)" in cause(["a.py"], ["a.py"])
    assert "nothing to change in what its tests call (b.py)" in cause(["a.py", "b.py"], ["a.py", "b.py"], ["b.py"])


@pytest.mark.parametrize("node, expected", [
    ("pkg/a.py::pkg.a", True), ("src/pkg/a.py::pkg.a.C.f", True), ("pkg/__init__.py::pkg.f", True), ("a.py::a.f", True),
    ("tests/test_a.py::test_a", False), ("checks.py::check_it", False), ("README.md::README.md", False), ("pkg/a.py::pkg.ab", False)])
def test_doctests_of_sources(node, expected):
    assert is_doctest(node) is expected


def test_search_paths_are_found(tmp_path):
    from qcn_jax.envs.sandbox import repository

    for folder, files, wanted in (("a", ("lib/x/__init__.py",), ["repo/lib", "repo"]), ("b", ("lib/__init__.py", "lib/a.py"), ["repo"]),
                                  ("c", ("python/x.py", "src/y.py"), ["repo/src", "repo/python", "repo"]), ("d", ("lib/x.js",), ["repo"])):
        for path in files:
            (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / path).write_text("")
        spec = RepositorySpec(folder, str(tmp_path / folder))
        assert repository.settings(spec, repository.unpack(spec))["python_path"] == [*wanted, "meta"]
