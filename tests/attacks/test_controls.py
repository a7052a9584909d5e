"""Each defence taken away, and its attack succeeds: tests/attacks would notice.

Host-side defences are replaced in place; those inside the sandbox are edited in a copy of its programs, from which a
provider of the local back end is then started. Without the edit the same attack fails (the first half of each test).
"""

import dataclasses
import shutil
import socket
import time

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import RepositorySpec, local
from qcn_jax.envs.tasks import permissions, verdicts
from qcn_jax.envs.tasks.grading import Grader
from tests.sandboxes import BROKEN, FILE, LIMITS, SOURCE, TESTS, make_task, write_repository

HOOK = ("import pytest\n@pytest.hookimpl(hookwrapper=True)\ndef pytest_runtest_makereport(item, call):\n    out = yield\n"
        "    report = out.get_result()\n    report.outcome = report.outcome.replace('failed', 'passed')\n")
WEAK = TESTS.replace("== 5", "!= None").replace("== 0\n", "!= None\n").replace("pytest.raises(ValueError)", "pytest.raises(Exception)"
                                                                              ).replace("clamp(value, 10, 0)", "1 / 0")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return str(write_repository(tmp_path_factory.mktemp("controls") / "victim"))


def start(archive, folder):
    """A local provider with namespaces and the repository prepared."""
    provider = local.LocalProvider(str(folder), LIMITS)
    if provider.containment != "namespaces":
        provider.close()
        pytest.skip(f"no namespaces on this machine: {provider.reason}")
    provider.prepare(RepositorySpec("victim==1.2.3", archive))
    return provider


@pytest.fixture(scope="module")
def whole(archive, tmp_path_factory):
    """A provider with all defences."""
    with start(archive, tmp_path_factory.mktemp("whole")) as provider:
        yield provider


@pytest.fixture
def edited(archive, tmp_path, monkeypatch):
    """A function that starts a provider whose programs inside are edited: {file: (text, in its place)}."""
    made = []

    def provider(edits):
        inside = tmp_path / "inside"
        shutil.copytree(local.INSIDE, inside, ignore=shutil.ignore_patterns("__pycache__"))
        for name, (old, new) in edits.items():
            text = (inside / name).read_text()
            assert old in text, (name, old)
            (inside / name).write_text(text.replace(old, new))
        monkeypatch.setattr(local, "INSIDE", inside)
        name = f"edited{time.time_ns()}"
        monkeypatch.setattr(local, "inside_digest", lambda *_: name)
        made.append(start(archive, tmp_path / "state"))
        return made[-1]

    yield provider
    for one in made:
        one.close()


@pytest.fixture
def alone(monkeypatch):
    """A function that takes second opinions away, so that one defence is looked at by itself."""
    return lambda: monkeypatch.setattr(Grader, "_second", lambda self, given, verdict, run: verdict)


def resolves(provider, changes, strict=True):
    """Whether a patch that makes `changes` counts as resolving."""
    known = {SOURCE: BROKEN}
    before = {path: known.get(path, provider.files("victim==1.2.3").get(path)) for path in changes}
    return Grader(provider, strict=strict).grade(make_task(), patches.make_diff(before, changes)).resolved


@pytest.mark.parametrize("changes", [
    {SOURCE: BROKEN + "#\n", FILE: WEAK}, {SOURCE: BROKEN + "#\n", "tests/conftest.py": HOOK},
    {SOURCE: BROKEN + "#\n", "pytest.ini": "[pytest]\naddopts = -p evil\n", "evil.py": HOOK}],
    ids=["08_weak_tests", "10_conftest", "11_pytest_ini"])
def test_paths_that_steer_tests(whole, monkeypatch, alone, changes):
    alone()
    assert not resolves(whole, changes, strict=False)
    monkeypatch.setattr(permissions, "refusal", lambda *_: "")
    assert resolves(whole, changes, strict=False)


@pytest.mark.parametrize("source", [
    "class Any:\n    def __eq__(self, other): return True\ndef clamp(value, low, high):\n    if low > high: raise ValueError\n"
    "    return Any()\ndef mean(v): v = list(v); return sum(v) / len(v)\n",
    "import linecache, sys\ndef clamp(value, low, high):\n    if low > high: raise ValueError\n    f = sys._getframe(1)\n"
    "    return eval(linecache.getline(f.f_code.co_filename, f.f_lineno).split('==')[1])\n"
    "def mean(v): v = list(v); return sum(v) / len(v)\n"], ids=["22_always_equal", "23_frames"])
def test_forbidden_lines(whole, alone, source):
    assert not resolves(whole, {SOURCE: source}, strict=False)
    alone()
    assert not resolves(whole, {SOURCE: source})
    assert resolves(whole, {SOURCE: source}, strict=False)


def test_22_patched_reports_without_the_look_at_pytest(whole, edited, alone):
    alone()
    source = BROKEN + ("\nfrom _pytest.reports import TestReport\nold = TestReport.from_item_and_call\ndef new(item, call):\n"
                       "    call.excinfo = None\n    return old(item, call)\nTestReport.from_item_and_call = new\n")
    # The expected failure of the suite would pass, too, and so tell: leave it out.
    assert not resolves(whole, {SOURCE: source}, strict=False)
    open_provider = edited({"runner.py": ("def tampered():\n", "def tampered():\n    return []\n\n\ndef _unused():\n")})
    task = dataclasses.replace(make_task(), PASS_TO_PASS=(f"{FILE}::test_mean",))
    patch = patches.make_diff({SOURCE: BROKEN}, {SOURCE: source})
    assert not Grader(whole, strict=False).grade(task, patch).resolved
    assert Grader(open_provider, strict=False).grade(task, patch).resolved


def test_24_current_test_without_its_removal(whole, edited, alone):
    alone()  # there tests have other names
    source = ("import os\ndef clamp(value, low, high):\n    if low > high: raise ValueError\n"
              "    return 5 if 'inside' in os.environ['PYTEST_CURRENT_TEST'] else 0\ndef mean(v): v = list(v); return sum(v) / len(v)\n")
    assert not resolves(whole, {SOURCE: source}, strict=False)
    assert resolves(edited({"runner.py": ("    _pytest.runner._update_current_test_var = lambda item, when: None\n", "")}),
                    {SOURCE: source}, strict=False)


def test_24_replaced_tests_without_the_second_opinion(whole, alone):
    source = BROKEN + """
def clamp(value, low, high):
    import sys
    for name, module in list(sys.modules.items()):
        if name.endswith("test_calc"):
            for test in vars(module).values():
                if getattr(test, "__name__", "").startswith("test_clamp"):
                    test.__code__ = (lambda value: None).__code__ if test.__code__.co_argcount else (lambda: None).__code__
    return 5 if low <= high else None
"""
    task = dataclasses.replace(make_task(), FAIL_TO_PASS=(f"{FILE}::test_clamp_inside", f"{FILE}::test_clamp_below"),
                               PASS_TO_PASS=(f"{FILE}::test_mean",))
    patch = patches.make_diff({SOURCE: BROKEN}, {SOURCE: source})
    verdict = Grader(whole, strict=False).grade(task, patch)
    assert verdict.outcome == "suspected_exploit" and any("second opinion" in words for words in verdict.caught)
    alone()
    assert Grader(whole, strict=False).grade(task, patch).resolved


def test_08_tests_of_the_same_owner(whole):
    """Where tested code owns the tests' files, it rewrites those that are loaded after it."""
    source = BROKEN + "open('tests/test_calc.py', 'a').write('\\n' * 2)\n"
    with whole.create("victim==1.2.3", {SOURCE: source}, role="grading") as place:
        run = place.run_tests([f"{FILE}::test_mean"])
        assert "PermissionError" in str(run.messages) and place.read(FILE) == TESTS
    with whole.create("victim==1.2.3", {SOURCE: source}) as place:
        assert place.run_tests([f"{FILE}::test_mean"]).passed([f"{FILE}::test_mean"]) and place.read(FILE) != TESTS


def test_17_results_without_the_exit_status():
    """A run whose results all pass but whose process ended otherwise."""
    from qcn_jax.envs.sandbox.base import TestRun
    task = make_task()
    good = dict.fromkeys((*task.FAIL_TO_PASS, *task.PASS_TO_PASS), "passed")
    assert not verdicts.judge(task, TestRun("ok", good, {}, 0.0, "", 1)).resolved
    assert verdicts.judge(task, TestRun("ok", good, {}, 0.0, "", 0)).resolved


def test_03_04_28_network_without_its_namespace(whole, edited):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        probe = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 2); print('CONNECTED')"

        def reached(provider):
            with provider.create("victim==1.2.3") as place:
                return "CONNECTED" in place.exec(f'python -c "{probe}"', 10).output

        assert not reached(whole)
        # The machine's own network then, without touching its loopback device.
        assert reached(edited({"enter.py": (" | NEWNET | (0", " | (0")}))


def test_30_one_place_for_all(whole, edited):
    def leaks(provider):
        with provider.create("victim==1.2.3") as first:
            first.exec("echo s3cret > /tmp/note; chmod 644 /tmp/note")
        with provider.create("victim==1.2.3") as second:
            return "s3cret" in second.exec("cat /tmp/note").output

    assert not leaks(whole)
    assert leaks(edited({"enter.py": ('"/work/now/tmp"', '"/work"'),
                         "server.py": ("os.chmod(self.work, 0o711)", "os.chmod(self.work, 0o1777)")}))


def test_06_07_fix_in_the_tree_without_the_cleaning(archive, whole, tmp_path, monkeypatch):
    """Build results and byte code of a careless checkout reach the agent if nothing drops them."""
    find = "grep -rl repaired-4c1f0e7d . | sort"

    def found(provider):
        with provider.create("victim==1.2.3", {SOURCE: BROKEN}) as place:
            return place.exec(find).output.split()

    assert found(whole) == []
    from qcn_jax.envs.sandbox import repository
    monkeypatch.setattr(repository, "DROPPED_NAMES", frozenset())
    monkeypatch.setattr(repository, "DROPPED_ENDINGS", ())
    with start(archive, tmp_path / "careless") as careless:
        assert {"./build/lib/victim/calc.py", "./victim/calc.py.orig"} <= set(found(careless))


def test_19_background_process_without_the_reaping(whole, edited):
    def lives(provider):
        """Whether a process that a call left behind is there in the next one."""
        with provider.create("victim==1.2.3") as place:
            place.exec("(setsid sh -c 'echo $$ > /tmp/mine; mv /tmp/mine /tmp/pid; exec sleep 1234' >/dev/null 2>&1 &)\n"
                       "until test -e /tmp/pid; do sleep 0.05; done")
            return place.exec("grep -q sleep /proc/$(cat /tmp/pid)/cmdline").exit_code == 0

    assert not lives(whole)
    assert lives(edited({"zygote.py": ("    killed, started = 0, time.monotonic()\n", "    return 0\n")}))
