"""Runs inside a sandbox: which functions each test calls, and what the calls of one test gave.

Sent as text to Sandbox.run_python, which provides `ROOT` (the repository's folder) and `run_pytest`. All calls
are seen through sys.settrace; nothing of the repository is changed.
"""

import contextlib
import dis
import os
import random
import re
import reprlib
import signal
import sys
import threading
import time

import pytest
from _pytest.runner import runtestprotocol

ROOT: str
run_pytest = globals().get("run_pytest")  # given by the sandbox
tells_time = globals().get("tells_time")  # of clocks.py

MAX_CALLS = 1000  # recorded calls of one test
MAX_SECONDS = 1.0  # of processor time in recording one test; later calls are not recorded
PLAIN = (int, float, complex, bool, str, bytes, type(None), type, range, type(len), type(lambda: 0))
# What a test does that waits for other processes or for the network.
WAITING = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn", "socket.bind",
           "socket.connect", "time.sleep"}
LEAVING = {dis.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST", "YIELD_VALUE", "SEND") if name in dis.opmap}
IS_FUNCTION, IS_GENERATOR = 0x1, 0x20 | 0x80 | 0x200  # CO_OPTIMIZED; generator, coroutine, asynchronous generator
ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")
SCRATCH = re.compile(r"pytest-of-\w+/pytest-\d+")


def main(args):
    """`calls`: traces the whole suite; `check`: runs some tests and records what the calls of one of them gave."""
    return {"calls": trace_suite, "check": check}[args["mode"]](args)


def qualified(code):
    """Dotted name of a code object's function: without <locals>, and of the function around a comprehension."""
    parts = [part for part in code.co_qualname.split(".") if part != "<locals>"]
    while parts and parts[-1].startswith("<"):
        parts.pop()
    return ".".join(parts)


class Tracing:
    """Installs a trace function for the time of each test."""

    def __init__(self):
        self.seconds = {}

    profile = None

    def trace(self, frame, event, arg):
        raise NotImplementedError

    @contextlib.contextmanager
    def tracing(self, node_id):
        """Traces while the block runs, and keeps the processor seconds that it took."""
        started = time.process_time()
        threading.settrace(self.trace)
        sys.setprofile(self.profile)
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            threading.settrace(None)
            self.seconds[node_id] = round(time.process_time() - started, 4)


class Suite(Tracing):
    """Which of the repository's functions each test calls."""

    def __init__(self, seconds):
        super().__init__()
        self.called, self.deadline = {}, time.process_time() + seconds
        self.codes = set()
        self.current, self.waiting = None, set()
        sys.addaudithook(self.audit)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.codes, self.current = set(), item.nodeid
        self.called[item.nodeid] = self.codes
        with self.tracing(item.nodeid):
            yield
        self.current = None

    def audit(self, event, arguments):
        if event in WAITING and self.current is not None:
            self.waiting.add(self.current)

    def trace(self, frame, event, arg):
        self.codes.add(frame.f_code)

    @pytest.hookimpl
    def pytest_runtest_logfinish(self, nodeid):
        if time.process_time() > self.deadline:
            self.session.shouldstop = "time for tracing is over"

    @pytest.hookimpl
    def pytest_sessionstart(self, session):
        self.session = session


def trace_suite(args):
    """Outcomes of all tests, and by test the indices of the functions that it called."""
    suite = Suite(args["seconds"])
    _, outcomes, messages = run_pytest(None, plugins=[suite])
    prefix, index, functions, calls = os.path.join(ROOT, ""), {}, [], {}
    for node_id, codes in suite.called.items():
        found = set()
        for code in codes:
            name = qualified(code)
            if code.co_filename.startswith(prefix) and name and code.co_flags & IS_FUNCTION:
                key = (code.co_filename[len(prefix):], name)
                if key not in index:
                    index[key] = len(functions)
                    functions.append(key)
                found.add(index[key])
        calls[node_id] = sorted(found)
    return {"outcomes": outcomes, "messages": messages, "functions": functions, "calls": calls,
            "seconds": suite.seconds, "waiting": sorted(suite.waiting), "complete": len(outcomes) == len(calls)}


class Brief(reprlib.Repr):
    """Bounded, repeatable representations: no addresses, no paths of this workspace, sets sorted."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, 160, 200, 60
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 12
        home = os.path.dirname(ROOT)
        self.places = [os.path.join(ROOT, ""), os.path.join(home, "")]

    def text(self, value):
        """The representation, whatever the value's own __repr__ does."""
        try:
            text = self.repr(value)
        except Exception as error:
            text = f"<{type(value).__name__}: {type(error).__name__} in its __repr__>"
        return self.scrub(text)

    def scrub(self, text):
        """Takes addresses and folders of this workspace out of a text."""
        for place in self.places:
            text = text.replace(place, "")
        return SCRATCH.sub("pytest", ADDRESS.sub("0x", text))

    def repr_instance(self, value, level):
        kind = type(value)
        if isinstance(value, type) or callable(value) and hasattr(value, "__qualname__"):
            return value.__qualname__.replace("<locals>.", "")
        if kind.__repr__ is object.__repr__:
            fields = getattr(value, "__dict__", {})
            if level <= 0 or not fields:
                return f"{kind.__name__}({'...' if fields else ''})"
            shown = [f"{name}={self.repr1(item, level - 1)}" for name, item in list(fields.items())[:8]]
            return f"{kind.__name__}({', '.join(shown)})"
        return super().repr_instance(value, level)


class Recorder(Tracing):
    """Runs one of the session's tests again and records what each call of a repository function got and gave.

    The calls are kept in the order in which they ended. The test is the first of `observe` that failed (with
    `always`: the first of them); nothing is recorded where more than `too_many` tests failed.
    """

    def __init__(self, args):
        super().__init__()
        self.paths = {os.path.join(ROOT, path): path for path in args["sources"]}
        self.wanted, self.always, self.too_many = args["observe"], args["always"], args["too_many"]
        self.before = min(args["disturb"], 1)  # runs more than usual, which counters count
        self.brief, self.calls, self.open, self.busy, self.deadline = Brief(), [], {}, False, 0.0
        self.changeable = {}  # frame: [(name, value)] of the arguments that the call may change
        self.built = {}  # id of an object: how it was constructed
        self.failed, self.test, self.again = set(), None, "missing"
        self.parameters = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        if item.nodeid in self.wanted and hasattr(item, "callspec"):
            self.parameters[item.nodeid] = fresh(item.callspec.params)
        yield  # the first run of every test is not traced

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtestloop(self, session):
        yield
        items = {item.nodeid: item for item in session.items}
        names = [name for name in self.wanted if name in items and (self.always or name in self.failed)]
        if names and len(self.failed) <= self.too_many:
            self.test, item = names[0], items[names[0]]
            for _ in range(self.before):
                self.renew(item)
                runtestprotocol(item, log=False, nextitem=None)
            self.renew(item)
            self.failed, self.deadline = set(), time.process_time() + MAX_SECONDS
            with self.tracing(self.test):
                reports = runtestprotocol(item, log=False, nextitem=None)
            # Subtests report by themselves alone.
            self.again = "failed" if self.failed or any(report.failed for report in reports) else "passed"

    def renew(self, item):
        """Makes an item as it was before it ran: its fixtures are set up again, its parameters are what they were."""
        if item.nodeid in self.parameters:
            item.callspec.params.update(fresh(self.parameters[item.nodeid]))
        item._initrequest()

    def profile(self, frame, event, arg):
        if event == "c_call" and not self.busy and tells_time(arg):
            for call in self.open.values():
                call["dated"] = True

    def trace(self, frame, event, arg):
        code = frame.f_code
        if self.busy or event != "call" or code.co_filename not in self.paths:
            return None
        known = self.open.get(frame)
        if known is None:
            full = len(self.calls) + len(self.open) >= MAX_CALLS or time.process_time() > self.deadline
            if full or code.co_name.startswith("<") or not code.co_flags & IS_FUNCTION:
                return None
            self.open[frame] = self.describe(frame)
        frame.f_trace_lines = False
        return self.local

    def texts(self, items):
        """[(name, representation)]; the representations' own calls are not recorded."""
        self.busy = True
        try:
            return [(name, self.brief.text(value)) for name, value in items]
        finally:
            self.busy = False

    def describe(self, frame):
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        values = frame.f_locals
        items = [(name, values[name]) for name in code.co_varnames[:count] if name in values]
        self.changeable[frame] = [item for item in items if not isinstance(item[1], PLAIN)]
        call = {"path": self.paths[code.co_filename], "name": qualified(code), "args": self.texts(items),
                "result": [], "raised": "", "after": [], "kinds": kinds(code), "built": None,
                "local": "<locals>" in code.co_qualname}
        if items and items[0][0] == "self":
            call["built"] = self.construction(items[0][1], call)
        return call

    def construction(self, value, call):
        """[class, arguments by name, their kinds] with which an object was made, as far as that was seen."""
        kind = type(value).__qualname__
        if call["name"].endswith(".__init__"):
            self.built[id(value)] = [kind, call["args"][1:], call["kinds"][1:]]
        found = self.built.get(id(value))
        return found if found and found[0] == kind else None

    def local(self, frame, event, arg):
        call = self.open.get(frame)
        if call is None or self.busy:
            return self.local
        self.busy = True
        try:
            if event == "exception":
                kind, value = arg[0], arg[1]
                text = "" if value is None else str(value) if not isinstance(value, KeyError) else repr(value)[9:-1]
                call["raised"] = self.brief.scrub(f"{kind.__name__}: {text.strip()}" if text else kind.__name__)[:240]
        except Exception:
            call["raised"] = arg[0].__name__
        finally:
            self.busy = False
        if event == "return":
            self.returned(frame, call, arg)
        return self.local

    def returned(self, frame, call, value):
        code = frame.f_code
        orderly = code.co_code[frame.f_lasti] in LEAVING if frame.f_lasti >= 0 else False
        yielding = bool(code.co_flags & IS_GENERATOR)
        last = not yielding or not orderly or code.co_code[frame.f_lasti] not in (
            dis.opmap.get("YIELD_VALUE"), dis.opmap.get("SEND"))
        if orderly:
            call["raised"] = ""
            if (not yielding or not last) and len(call["result"]) < 20:
                call["result"].append(self.texts([("", value)])[0][1])
        if last:
            before = dict(call["args"])
            after = self.texts(self.changeable.pop(frame))
            call["after"] = [(name, text) for name, text in after if before.get(name) != text]
            self.close(frame, call)

    def close(self, frame, call):
        call["yields"] = bool(frame.f_code.co_flags & IS_GENERATOR)
        self.calls.append(call)
        del self.open[frame]

    def finish(self):
        """All calls, those of generators that were never exhausted last."""
        for frame, call in list(self.open.items()):
            self.close(frame, call)
        return self.calls


class ProcessorLimit:
    """Ends the session after so many seconds of processor time, however busy the machine is.

    Code that swallows the exception meets it again after every further half second.
    """

    def __init__(self, seconds):
        self.seconds, self.reached = seconds, False

    def __enter__(self):
        signal.signal(signal.SIGPROF, self.stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds, 0.5)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_PROF, 0)

    def stop(self, *_):
        self.reached = True
        raise pytest.exit.Exception("out of processor time")


def kinds(code):
    """How each argument is given: "-" by place, "=" by name alone, "*" and "#" where it holds several of these."""
    return "-" * code.co_argcount + "=" * code.co_kwonlyargcount + "*" * bool(code.co_flags & 4) + "#" * bool(
        code.co_flags & 8)


def fresh(value):
    """A copy of containers; what else they hold, whose identity may matter, is the same."""
    if type(value) in (list, tuple, set):
        return type(value)(map(fresh, value))
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    return bytearray(value) if type(value) is bytearray else value


def dated(call, days):
    """Whether a call asked for the time, or its texts tell the day on which it was recorded."""
    if call.get("dated"):
        return True
    texts = [call["raised"], *call["result"], *(text for _, text in (*call["args"], *call["after"]))]
    return any(day in text for text in texts for day in days)


def today():
    """The present day as programs write it, in local time and in UTC."""
    forms = ("%Y-%m-%d", "%Y/%m/%d", "%Y%m%d", "%d %b %Y", "%b %d %Y", "%b %d, %Y", "%m/%d/%Y", "%d.%m.%Y")
    days = (time.localtime(), time.gmtime())
    return {text for day in days for text in (
        *(time.strftime(form, day) for form in forms), f"{day.tm_year}, {day.tm_mon}, {day.tm_mday}")}


HELD = []  # what shifts addresses


def disturb(number):
    """Makes this process unlike the others: chance falls out otherwise, and objects lie at other addresses."""
    random.seed(number)
    HELD.extend(object() for _ in range(1009 * number))
    HELD.extend(bytearray(4099 * (size + 1)) for size in range(13 * number))


def check(args):
    """Runs `tests` and records one of them (see Recorder) where `observe` names any; `disturb` is 0 or a number."""
    disturb(args["disturb"])
    recorder = Recorder(args)
    with ProcessorLimit(args["seconds"]) as limit:
        _, outcomes, messages = run_pytest(args["tests"], plugins=[recorder] if args["observe"] else [])
    messages = {name: recorder.brief.scrub(text) for name, text in messages.items()}
    calls, days = recorder.finish(), today()
    for call in calls:
        call["dated"] = dated(call, days)
    return {"outcomes": outcomes, "messages": messages, "test": recorder.test, "again": recorder.again,
            "calls": calls, "cpu": round(time.process_time(), 4), "timeout": limit.reached}
