"""What happens in the fork that runs tests: pytest in process, outcomes to a pipe that only the server reads.

Every record carries the run's key and a running number, so that bytes which the tested code writes blindly
to open descriptors are noticed and void the run. Code under test shares this process; what it could still do
to pytest itself is looked for at the end (`tampered`), and cannot be excluded altogether.
"""

import _imp
import builtins
import importlib
import json
import linecache
import os
import pathlib
import re
import sys
import traceback
import types
import unittest

import _pytest.assertion.rewrite
import _pytest.config
import _pytest.fixtures
import _pytest.runner
import evidence
import pytest

MAX_MESSAGES = 20  # failures described per run; the others are listed by outcome alone
MAX_OPENED = 2000  # files that tests open, of one repository
MAX_MODULES = 2000  # modules that are imported beforehand for one
MAX_MESSAGE = 400  # characters of one description
# As in testpaths.py, which is not to be had here.
TEST_CODE = re.compile(r"(^|/)((unit|func|functional|integration|system|regression|acceptance|smoke)([_-]tests?|tests)"
                       r"/|tests?/|conftest\.py$|test_[^/]*\.py$|[^/]*_test\.py$|tests?\.py$)")
FIXED_ARGUMENTS = ("-q", "--tb=no", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_get_config, _ready_config = _pytest.config.get_config, None
_read_pyc = _pytest.assertion.rewrite._read_pyc
_collect_one_node = pytest.Session._collect_one_node
_check_for_wrapped_fixture = _pytest.fixtures.FixtureManager._check_for_wrapped_fixture


def preload() -> None:
    """Imports pytest's built-in plugins and fixes the one thing that cached test modules need.

    Cached assertion rewriting keeps the file name of the workspace it was made in; the interpreter corrects
    that for ordinary modules (`_fix_co_filename`) but pytest does not for its own.
    """
    for name in _pytest.config.default_plugins:
        importlib.import_module("_pytest." + name)

    def read_pyc(source, pyc, *rest):
        code = _read_pyc(source, pyc, *rest)
        if code is not None:
            _imp._fix_co_filename(code, str(source))
        return code

    _pytest.assertion.rewrite._read_pyc = read_pyc
    global _ready_config
    _ready_config = _get_config(list(FIXED_ARGUMENTS))
    _pytest.config.get_config = get_config
    # PYTEST_CURRENT_TEST would tell the code under test which answer is expected next.
    _pytest.runner._update_current_test_var = lambda item, when: None
    pytest.Session._collect_one_node = collect_one_node
    _pytest.fixtures.FixtureManager._check_for_wrapped_fixture = check_for_wrapped_fixture
    global _SNAPSHOT
    _SNAPSHOT = _snapshot()


def get_config(args=None, plugins=None, **options):
    """pytest's own `get_config`, except that the first call in a fork takes the one made before forking.

    Registering pytest's forty plugins is a fifth of a short run. A selection of plugins of the repository's own (-p)
    must be known before, so that such a run starts from nothing.
    """
    global _ready_config
    config, _ready_config = _ready_config, None
    if config is None or args is None or sum(word.startswith("-p") for word in args) != 1:
        return _get_config(args, plugins, **options)
    config.invocation_params = config.InvocationParams(args=args, plugins=plugins, dir=pathlib.Path.cwd())
    return config


def collect_one_node(session, node, handle_dupes=True):
    """pytest's own, which reads a folder again for each of its files that was named, in case one was named twice."""
    return _collect_one_node(session, node, handle_dupes or isinstance(node, pytest.Directory))


def check_for_wrapped_fixture(manager, name, value):
    """pytest's own, which looks for an attribute of everything in every module, where there may be such a one."""
    if isinstance(value, (staticmethod, classmethod)) or "__wrapped__" in getattr(value, "__dict__", ()):
        _check_for_wrapped_fixture(manager, name, value)


# Whose functions decide what a test sees and what becomes of it; a repository whose own first run replaces some of
# them may do so again (envs/tasks/grading.py).
WATCHED = frozenset({"_pytest", "pluggy", "unittest", "builtins", "os", "posixpath", "io", "json", "pathlib", "re",
                     "math", "operator", "functools", "collections", "codecs"})


def _namespaces():
    for name, module in list({**sys.modules, **_KEPT}.items()):
        if name.split(".")[0] in WATCHED and isinstance(module, types.ModuleType):
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    yield f"{name}.{key}", vars(value)
            yield name, vars(module)


def _code(value):
    """The code of a function, of a method of a class or of a property; None for others."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    return getattr(function, "__code__", None)


def _snapshot():
    kinds = (types.FunctionType, types.BuiltinFunctionType, type, classmethod, staticmethod, property)
    return {where: {key: (value, _code(value)) for key, value in list(names.items()) if isinstance(value, kinds)}
            for where, names in _namespaces()}


_KEPT = {}  # modules that pytest has and tests have no longer


def give_way(libraries):
    """Lets tests import libraries of pytest's that the repository itself is; pytest goes on with its own."""
    for name in list(sys.modules):
        if name.split(".")[0] in libraries:
            _KEPT[name] = sys.modules.pop(name)


_SNAPSHOT = {}
# pytest itself rebinds these while it runs.
_REBOUND = {"_pytest.pathlib.cleanup_numbered_dir", "builtins._", "builtins.__import__"}


def tampered():
    """Functions and classes of WATCHED modules that are no longer what they were at start."""
    found = []
    for where, names in _namespaces():
        for key, (value, code) in _SNAPSHOT.get(where, {}).items():
            now = names.get(key)
            if (now is not value or _code(now) is not code) and f"{where}.{key}" not in _REBOUND:
                found.append(f"{where}.{key}")
    return found[:20]


class Reporter:
    """The pytest plugin that selects tests and reports them."""

    def __init__(self, write, root, node_ids=None, ordered=False):
        self._write, self._root = write, os.path.join(root, "")
        self._rank = None if node_ids is None else {name: i for i, name in enumerate(node_ids)}
        self._ordered = ordered
        self._wanted, self._narrow = {}, {}  # names by the collector that has them, and whether it has all of these
        for name in node_ids or ():
            parts = name.partition("[")[0].split("::")
            for end in range(1, len(parts)):
                self._wanted.setdefault("::".join(parts[:end]), set()).add(parts[end])
        self._phases, self._seen, self._described, self._excused = {}, [], 0, set()
        self.outcomes, self.messages = {}, {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector, name, obj):
        """Makes nothing of functions and classes in which no wanted test is: most of a short run would be spent there.

        Where ids are not made of such names everything is collected.
        """
        wanted = self._wanted.get(collector.nodeid, ())
        if collector.nodeid not in self._narrow:
            scopes = getattr(collector.obj, "__mro__", (collector.obj,))
            self._narrow[collector.nodeid] = bool(wanted) and all(
                any(one in vars(scope) for scope in scopes) for one in wanted)
        return [] if self._narrow[collector.nodeid] and name not in wanted else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        if self._rank is None:
            return
        keep = [item for item in items if item.nodeid in self._rank]
        if self._ordered:
            keep.sort(key=lambda item: self._rank[item.nodeid])
        if len(keep) != len(items):
            wanted = set(map(id, keep))
            config.hook.pytest_deselected(items=[item for item in items if id(item) not in wanted])
        items[:] = keep

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector):
        """A module that ends the interpreter when it is imported is one that cannot be collected, not the end."""
        outcome = yield
        if outcome.excinfo is not None and issubclass(outcome.excinfo[0], SystemExit):
            words = f"SystemExit: {outcome.excinfo[1].code} at import"
            outcome.force_result(pytest.CollectReport(collector.nodeid, "failed", words, []))

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """No dots for what passes: each would be a write that wakes whoever reads it."""
        plain = type(report) is pytest.TestReport and report.when == "call" and not hasattr(report, "wasxfail")
        return ("passed", "", "") if plain and report.passed else None

    def pytest_collectreport(self, report):
        if report.failed:
            self._finish(report.nodeid, "error", str(report.longrepr).strip().splitlines()[-1:])

    def pytest_runtest_logstart(self, nodeid):
        self._seen = []
        self._write({"start": nodeid})

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        yield
        if call.excinfo is None:
            return
        if isinstance(call.excinfo.value, (pytest.skip.Exception, pytest.xfail.Exception, unittest.SkipTest)):
            if self._from_sources(call.excinfo.tb):
                self._excused.add(item.nodeid)
                self.messages[item.nodeid] = "skipped or excused by the code under test"
        elif self._described < MAX_MESSAGES:
            self.messages[item.nodeid] = self._describe(call.excinfo)

    def _from_sources(self, trace):
        """Whether a traceback passes through the repository's own code other than its tests."""
        while trace is not None:
            name = trace.tb_frame.f_code.co_filename
            if name.startswith(self._root) and not TEST_CODE.search(name[len(self._root):]):
                return True
            trace = trace.tb_next
        return False

    def pytest_runtest_logreport(self, report):
        expected = hasattr(report, "wasxfail")
        if report.nodeid in self._excused:
            outcome = "failed"
        elif report.skipped:
            outcome = "xfailed" if expected else "skipped"
        elif report.failed:
            outcome = "failed" if report.when == "call" else "error"
        else:
            outcome = "xpassed" if expected and report.when == "call" else "passed"
        self._seen.append(report.when)
        before = self._phases.get(report.nodeid, "passed")
        if outcome != "passed" and before not in ("failed", "error"):
            before = outcome
        self._phases[report.nodeid] = before
        if report.when == "teardown":
            outcome = self._phases.pop(report.nodeid)
            ends = [*self._seen[:1], *self._seen[-1:]]
            # Every subtest has a report of its own call.
            whole = ends == ["setup", "teardown"] and set(self._seen[1:-1]) == {"call"}
            self._finish(report.nodeid, outcome if whole or outcome != "passed" else "error", ())

    def _finish(self, node_id, outcome, lines):
        message = self.messages.pop(node_id, None) or " ".join(lines)[:MAX_MESSAGE]
        if outcome not in ("failed", "error"):
            message = ""
        if message:
            self._described += 1
            self.messages[node_id] = message
        self.outcomes[node_id] = outcome
        self._write({"test": node_id, "outcome": outcome, "message": message})

    def _describe(self, excinfo):
        try:
            return describe(excinfo.type, excinfo.value, excinfo.tb, self._root)
        except Exception as error:  # a hostile __str__ must not end the run
            return f"{excinfo.type.__name__} ({type(error).__name__} while describing it)"


def describe(kind, value, trace, root):
    """One line: exception, first line of its message, and the last source line inside `root`."""
    lines = "".join(traceback.format_exception_only(kind, value)).strip().splitlines()
    if issubclass(kind, SyntaxError):
        text = lines[-1] + (f" | {lines[0].strip()}" if len(lines) > 1 else "")
    else:
        text = lines[0] if lines else kind.__name__
    text = text[: MAX_MESSAGE // 2]
    place = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(root):
            place = (name, trace.tb_lineno)
        trace = trace.tb_next
    if place is not None:
        source = linecache.getline(*place).strip()
        text += f" | {place[0][len(root):]}:{place[1]}: {source}"
    return text[:MAX_MESSAGE]


def selected_files(root, node_ids):
    """The files of a selection that exist, each once (pytest gives up on a missing one).

    In the order in which pytest finds them in a whole run, whatever the selection's: a failing test that leaves
    something behind would otherwise break tests that a whole run has before it.
    """
    files = sorted({name.split("::")[0] for name in node_ids}, key=lambda name: name.split("/"))
    return [name for name in files if os.path.exists(os.path.join(root, name))]


def pytest_arguments(root, extra, files, fail_fast):
    """Command-line arguments of pytest; no files means whatever the repository's configuration says."""
    return [*FIXED_ARGUMENTS, "--rootdir", root, *extra, f"--maxfail={int(fail_fast)}", *files]  # 0: no limit


def run_tests(job, write):
    """Runs pytest as `job` says and returns its exit status; outcomes go through `write`."""
    root, node_ids = job["root"], job["node_ids"]
    files = [] if node_ids is None else selected_files(root, node_ids)
    if node_ids is not None and not files:
        write({"finished": int(pytest.ExitCode.NO_TESTS_COLLECTED), "tampered": []})
        return int(pytest.ExitCode.NO_TESTS_COLLECTED)
    reporter = Reporter(write, root, node_ids, ordered=job["fail_fast"])
    # With evidence some of the tests must fail.
    arguments = pytest_arguments(root, job["pytest_args"], files, job["fail_fast"] and not job["evidence"])
    if job["evidence"]:
        builtins._qcn_evidence = evidence.Evidence(write)
        if job["evidence"] == "blind":
            evidence.blind()
    status = int(pytest.main(arguments, plugins=[reporter]))
    write({"finished": status, "tampered": tampered()})
    return status


def run_python(job, write):
    """Runs a harness script of the host: defines `main(args)`, whose JSON value is the result."""
    root = job["root"]

    def run_pytest(node_ids=None, plugins=(), fail_fast=False):
        """pytest on a selection with further plugins; returns (status, outcomes, messages)."""
        reporter = Reporter(lambda record: None, root, node_ids, ordered=fail_fast)
        files = [] if node_ids is None else selected_files(root, node_ids)
        arguments = pytest_arguments(root, job["pytest_args"], files, fail_fast)
        status = int(pytest.main(arguments, plugins=[reporter, *plugins]))
        return status, reporter.outcomes, reporter.messages

    names = {"__name__": "harness", "ROOT": root, "run_pytest": run_pytest}
    try:
        exec(compile(job["script"], "<harness>", "exec"), names)
        value = names["main"](job["args"])
        write({"value": value})
        return 0
    except BaseException as error:
        write({"error": describe(type(error), error, error.__traceback__, os.path.join(root, "")),
               "traceback": traceback.format_exc()[-4000:]})
        return 1


def watch_opened(root):
    """The list into which files below `root` go that the tests' own code opens from now on."""
    prefix, found = os.path.join(root, ""), []

    def hook(event, arguments):
        if event != "open" or not isinstance(arguments[0], str) or len(found) >= MAX_OPENED:
            return
        path = os.path.abspath(arguments[0])
        if not path.startswith(prefix) or path.endswith((".py", ".pyc")) or not os.path.isfile(path):
            return
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(prefix):
                if TEST_CODE.search(name[len(prefix):]) and path[len(prefix):] not in found:
                    found.append(path[len(prefix):])
                return
            frame = frame.f_back

    sys.addaudithook(hook)
    return found


def warm(job, write):
    """Compiles the tree, runs all tests so that pytest caches its rewriting, reports what they imported."""
    import compileall
    import py_compile

    root = job["root"]
    before = set(sys.modules)
    compileall.compile_dir(root, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    sys.dont_write_bytecode = False
    opened = watch_opened(root)
    status = run_tests(job, write)
    trusted = tuple(os.path.join(path, "") for path in job["library"])
    modules = []
    for name in sorted(set(sys.modules) - before):
        spec = getattr(sys.modules[name], "__spec__", None)
        origin = getattr(spec, "origin", None) or ""
        if spec is not None and spec.name == name and (origin in ("built-in", "frozen") or origin.startswith(trusted)):
            modules.append(name)
    write({"modules": modules[:MAX_MODULES], "opened": opened})
    return status


def writer(descriptor, key):
    """The function that sends one record: JSON line with the key and a running number."""
    count = 0

    def write(record):
        nonlocal count
        line = json.dumps({"key": key, "n": count, **record}) + "\n"
        count += 1
        data = line.encode()
        while data:
            data = data[os.write(descriptor, data):]

    return write
