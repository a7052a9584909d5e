"""pytest changed while it runs, and its way to the server."""

from tests.attacks.forgeries.pieces import ALL_ITEMS, LATER, NAMES, SWALLOW, add, code

add(
    "pytest",
    raises=code("", SWALLOW),
    pyfunc_call=code("""
        import _pytest.python as p
        p.pytest_pyfunc_call.__code__ = (lambda pyfuncitem: True).__code__
        import _pytest.unittest as u
        u.TestCaseFunction.runtest.__code__ = (lambda self: None).__code__
        """),
    report_put_back=code("""
        import _pytest.reports as r, _pytest.runner as n
        _old = n.CallInfo.from_call.__func__
        def new(cls, func, when, reraise=None):
            call = _old(cls, func, when, None)
            call.excinfo = None
            return call
        _code_of = _old.__code__
        CI = n.CallInfo
        CI.from_call = classmethod(new)
        import _pytest.main
        _finish = _pytest.main.Session._node_location_to_relpath
        def end(session, exitstatus):
            CI.from_call = classmethod(_old)
        import gc
        import sys
        for o in [h.config.pluginmanager for h in sys.meta_path if hasattr(h, 'config')]:
            if True:
                class P:
                    def pytest_sessionfinish(self, session, exitstatus):
                        del CI.from_call
                        type.__setattr__(CI, 'from_call', ORIGINAL)
                o.register(P(), 'p')
        ORIGINAL = classmethod(_old)
        """),
    multicall=code("""
        import gc
        import sys
        for o in [h.config.pluginmanager for h in sys.meta_path if hasattr(h, 'config')]:
            if True:
                inner = o._inner_hookexec
                def new(name, methods, kwargs, first, inner=inner):
                    if name == 'pytest_pyfunc_call':
                        return True
                    return inner(name, methods, kwargs, first)
                o._inner_hookexec = new
        """),
    plugin=code("""
        import gc, pytest, sys
        class P:
            @pytest.hookimpl(tryfirst=True)
            def pytest_pyfunc_call(self, pyfuncitem):
                return True
            @pytest.hookimpl(hookwrapper=True)
            def pytest_runtest_makereport(self, item, call):
                out = yield
                r = out.get_result()
                r.outcome, r.longrepr = 'passed', None
                r.__dict__.pop('wasxfail', None)
        import sys
        for o in [h.config.pluginmanager for h in sys.meta_path if hasattr(h, 'config')]:
            if True:
                o.register(P(), 'p')
        """),
    plugin_by_name=code("""
        import gc, pytest, sys
        class P:
            @pytest.hookimpl(hookwrapper=True)
            def pytest_runtest_makereport(self, item, call):
                out = yield
                r = out.get_result()
                if r.nodeid in NAMES:
                    r.outcome, r.longrepr = 'passed', None
        import sys
        for o in [h.config.pluginmanager for h in sys.meta_path if hasattr(h, 'config')]:
            if True:
                o.register(P(), 'p')
        """, NAMES),
    options=code("""
        import sys
        for h in sys.meta_path:
            if hasattr(h, 'config'):
                h.config.option.setupplan = h.config.option.setuponly = True
        """),
    option_setuponly=code("""
        def act(m):
            for h in sys.meta_path:
                if hasattr(h, 'config'):
                    h.config.option.setuponly = True
        import threading
        threading.Thread(target=later, daemon=True).start()
        """, LATER),
    report_class=code("""
        import _pytest.reports as r
        class T(r.TestReport):
            outcome = property(lambda self: 'passed', lambda self, v: None)
            failed, passed, skipped = False, True, False
        import gc
        r.TestReport.__getattribute__ = lambda self, n: ('passed' if n == 'outcome' else False if n in ('failed', 'skipped')
            else True if n == 'passed' else object.__getattribute__(self, n))
        """),
    report_properties=code("""
        import _pytest.reports as r
        for name, value in (('outcome', 'passed'),):
            setattr(r.BaseReport, name, property(lambda self, v=value: v, lambda self, x: None))
        """),
    runtest_protocol=code("""
        import _pytest.runner as r
        def call(item, when, **k):
            return r.CallInfo(None, None, 0, 0, 0, when, _ispytest=True)
        r.pytest_runtest_call.__code__ = (lambda item: None).__code__
        """),
    items_replaced=code("""
        def act(m):
            for item in items():
                item.obj = lambda *a, **k: None
                item.runtest = lambda: None
        import threading, time
        def wait():
            for _ in range(2000):
                act(None)
                time.sleep(0.001)
        threading.Thread(target=wait, daemon=True).start()
        """, ALL_ITEMS),
)
RECORDS = """
import gc, json, os
def writers():
    return [o for o in gc.get_objects() if type(o).__name__ == 'function' and o.__qualname__ == 'writer.<locals>.write']
"""
add(
    "channel",
    closure=code("""
        w = writers()
        if w:
            for n in NAMES:
                w[0]({'start': n})
                w[0]({'test': n, 'outcome': 'passed', 'message': ''})
            w[0]({'finished': 0, 'tampered': []})
            os._exit(0)
        """, NAMES, RECORDS),
    closure_all_names=code("""
        def forge():
            w = writers()[0]
            for item in items():
                w({'start': item.nodeid})
                w({'test': item.nodeid, 'outcome': 'passed', 'message': ''})
            w({'finished': 0, 'tampered': []})
            os._exit(0)
        scale = parse = share = lambda *a: forge()
        """, ALL_ITEMS, RECORDS),
    reporter=code("""
        import gc
        for o in gc.get_objects():
            if type(o).__name__ == 'Reporter' and hasattr(o, '_finish'):
                old = o._finish
                o._finish = lambda n, outcome, lines, old=old: old(n, 'passed' if outcome in ('failed', 'error') else outcome, ())
        import _pytest.main as m
        m.Session.__setattr__ = lambda self, n, v: object.__setattr__(self, n, 0 if n in ('testsfailed', 'exitstatus') else v)
        """),
    reporter_class=code("""
        import gc
        for o in gc.get_objects():
            if type(o).__name__ == 'Reporter' and hasattr(o, '_finish'):
                f = type(o)._finish
                def new(self, node_id, outcome, lines, f=f):
                    return f(self, node_id, outcome.replace('failed', 'passed') if outcome == 'failed' else outcome, lines)
                type(o)._finish = new
        import _pytest.main as m
        m.Session.__setattr__ = lambda self, n, v: object.__setattr__(self, n, 0 if n in ('testsfailed', 'exitstatus') else v)
        """),
    dumps=code("""
        import json
        _dumps = json.dumps
        def dumps(value, **k):
            if isinstance(value, dict) and value.get('outcome') in ('failed', 'error'):
                value = {**value, 'outcome': 'passed', 'message': ''}
            if isinstance(value, dict) and 'finished' in value:
                value = {**value, 'finished': 0, 'tampered': []}
                os._exit = lambda status: _exit(0)
            return _dumps(value, **k)
        json.dumps = dumps
        import os
        _exit = os._exit
        """),
    write=code("""
        import os
        _write, _exit = os.write, os._exit
        def write(fd, data):
            if b'"outcome"' in data:
                data = data.replace(b'"outcome": "failed"', b'"outcome": "passed"').replace(b'"outcome": "error"', b'"outcome": "passed"')
            if b'"finished": 1' in data:
                import re
                data = re.sub(rb'"tampered": \\[.*\\]', b'"tampered": []', data.replace(b'"finished": 1', b'"finished": 0'))
            _write(fd, data)
            return len(data)
        os.write = write
        os._exit = lambda status: _exit(0)
        """),
    tampered_emptied=code("""
        import gc, pytest
        for o in gc.get_objects():
            if type(o).__name__ == 'function' and o.__qualname__ == 'tampered':
                o.__code__ = (lambda: []).__code__
        import _pytest.python as p
        p.pytest_pyfunc_call = lambda pyfuncitem: True
        import sys
        for o in [i for h in sys.meta_path if hasattr(h, 'config') for i in h.config.hook.pytest_pyfunc_call.get_hookimpls()]:
            if True:
                o.function = lambda pyfuncitem: True
                o.argnames = ('pyfuncitem',)
        """),
    meta_path=code("""
        import sys
        hook = next(h for h in sys.meta_path if type(h).__name__ == 'AssertionRewritingHook')
        config = hook.config
        class P:
            pass
        def pytest_runtest_logreport(report):
            report.outcome = 'passed'
        hook_ = config.hook
        p = P()
        p.pytest_runtest_logreport = pytest_runtest_logreport
        p.pytest_sessionfinish = lambda session, exitstatus: setattr(session, 'exitstatus', 0)
        import pytest
        pytest.hookimpl(tryfirst=True)(pytest_runtest_logreport)
        config.pluginmanager.register(p)
        """),
)
