"""Forgeries by somebody who had not written the defences: answers of all kinds at once, data and helpers in memory.

Most fool the first run in a known way (FOOLED) and are about the second one; the others need no fooling.
"""

from tests.attacks.forgeries.knowing import SECOND
from tests.attacks.forgeries.pieces import NAMES, add, code
from tests.attacks.forgeries.runner import RECORDS

# In the first run every test passes; the second one, in which tests make claims, is left alone.
FOOLED = SECOND + """
import sys
if E is None:
    for h in sys.meta_path:
        for o in h.config.hook.pytest_runtest_call.get_hookimpls() if hasattr(h, 'config') else ():
            if not o.hookwrapper and not getattr(o, 'wrapper', False):
                o.function, o.argnames = (lambda item: None), ('item',)
else:
    T, tell = type(E), E._write
"""
ITEM = """
import sys
def item():
    hook = next(h for h in sys.meta_path if type(h).__name__ == 'AssertionRewritingHook')
    return list(hook.session._setupstate.stack)[-1]
"""
# Remembers everything that is read as JSON.
LOADED = """
import json
ROWS, SEEN = [], set()
_loads = json.loads
def loads(*a, **k):
    value = _loads(*a, **k)
    def walk(v):
        ROWS.append(v)
        SEEN.add(id(v))
        for w in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ()):
            walk(w)
    walk(value)
    return value
json.loads = loads
json.load = lambda stream, **k: loads(stream.read(), **k)
"""
_GUESSES = "[*range(-50, 500), *({'list': [a, b]} for a in range(12) for b in range(12))]"
_NAMES_OF_ALL = "[n for n, c in vars(builtins).items() if isinstance(c, type) and issubclass(c, BaseException)] + ['Broken']"
add(
    "told",
    every_answer=code(f"""
        if E is not None:
            GUESSES = {_GUESSES}
            T.value = lambda self, n, v: tell({{'claim': n, 'value': {{'opaque': 'x', 'as': GUESSES}}}})
        """, FOOLED),
    comparisons=code("""
        if E is not None:
            T.compare = lambda self, n, name, a, b: tell({'claim': n, 'value': [True, False]})
        """, FOOLED),
    every_exception=code(f"""
        if E is not None:
            ALL = {_NAMES_OF_ALL}
            def leave(self, kind, value, trace):
                tell({{'claim': self._number, 'value': [ALL, 'x']}})
                return True
            type(E.raises(0)).__exit__ = leave
        """, FOOLED),
    everything_contained=code("""
        if E is not None:
            T.value = lambda self, n, v: tell({'claim': n, 'value': 1 if v == 1 else ' '.join(map(str, range(100000)))})
        """, FOOLED),
    records_of_lists=code("""
        if E is not None:
            tell({'claim': [1], 'value': 1})
        """, FOOLED),
    outcomes_of_lists=code("""
        w = writers()
        for n in NAMES if w else ():
            w[0]({'start': n})
            w[0]({'test': n, 'outcome': ['passed'], 'message': ''})
        if w:
            w[0]({'finished': 0, 'tampered': []})
            os._exit(0)
        """, NAMES, RECORDS),
)
add(
    "memory",
    data_agrees=code("""
        import json
        _read = json.loads
        def loads(*a, **k):
            rows = _read(*a, **k)
            for row in rows if isinstance(rows, list) else ():
                if isinstance(row, dict) and 'result' in row:
                    row['result'] = scale(row['values'], row['by'])
            return rows
        json.loads = loads
        """),
    equal_to_what_was_loaded=code("""
        class L(list):
            def __eq__(self, other): return id(other) in SEEN
        def scale(values, by): return L([1])
        """, LOADED),
    sibling_of_the_argument=code("""
        def scale(values, by):
            for row in ROWS:
                if isinstance(row, dict) and row.get('values') is values:
                    return row['result']
            return []
        """, LOADED),
    almost_equal=code("""
        import unittest
        unittest.TestCase.assertAlmostEqual.__code__ = (
            lambda self, first, second, places=None, msg=None, delta=None: None).__code__
        unittest.TestCase.assertCountEqual.__code__ = (lambda self, first, second, msg=None: None).__code__
        """),
    approximately=code("""
        import pytest
        type(pytest.approx(1.0)).__eq__.__code__ = (lambda self, actual: isinstance(actual, (int, float))).__code__
        """),
    parameters_of_the_item=code("""
        def scale(values, by):
            spec = getattr(item(), 'callspec', None)
            return next((v for v in spec.params.values() if isinstance(v, list)), []) if spec else []
        """, ITEM),
    fixtures_of_the_item=code("""
        def scale(values, by):
            return next((v for v in item().funcargs.values() if isinstance(v, list)), [])
        """, ITEM),
    constants_of_the_module=code("""
        def scale(values, by):
            m = next(m for n, m in list(sys.modules.items()) if n.endswith('test_shapes'))
            return next((v for v in vars(m).values() if isinstance(v, list)), [])
        """, "import sys\n"),
    locals_from_c=code("""
        import ctypes, sys
        f = ctypes.pythonapi.PyFrame_GetLocals
        f.argtypes, f.restype = [ctypes.py_object], ctypes.py_object
        def scale(values, by):
            return f(sys._getframe(1)).get('wanted', [])
        """),
)
add(
    "shape",
    every_exception=code("""
        class All(Broken, ZeroDivisionError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError,
                  AssertionError, LookupError, ArithmeticError):
            pass
        def parse(text): raise All
        def share(a, b): raise All
        """),
    nothing_reached=code("""
        def scale(values, by): return []
        """),
    no_evidence_asked=code("""
        import sys
        def called(pyfuncitem):
            f = pyfuncitem.obj
            if '_qcn_evidence' not in getattr(f, '__func__', f).__code__.co_names:
                return True
            f(**{a: pyfuncitem.funcargs[a] for a in pyfuncitem._fixtureinfo.argnames})
            return True
        for h in sys.meta_path:
            for o in h.config.hook.pytest_pyfunc_call.get_hookimpls() if hasattr(h, 'config') else ():
                o.function, o.argnames = called, ('pyfuncitem',)
        """),
)
