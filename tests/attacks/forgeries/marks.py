"""Tests that count as excused, and objects that are equal to what is expected."""

from tests.attacks.forgeries.pieces import ALL_ITEMS, LATER, MODULE, add, code

add(
    "marks",
    pytestmark_xfail=code("""
        def act(m):
            import pytest
            m.pytestmark = pytest.mark.xfail
        threading.Thread(target=later, daemon=True).start()
        """, LATER),
    pytestmark_among_callers=code("""
        import pytest
        f = sys._getframe()
        while f:
            if f.f_globals.get('__name__', '').endswith('test_core'):
                f.f_globals['pytestmark'] = pytest.mark.xfail
            f = f.f_back
        """, MODULE),
    skip_in_frames=code("""
        import sys, pytest
        f = sys._getframe()
        while f:
            if f.f_globals.get('__name__', '').endswith('test_core'):
                f.f_globals['pytestmark'] = pytest.mark.skip
            f = f.f_back
        """),
    marker_while_running=code("""
        def scale(values, by):
            import pytest
            for item in items():
                item.add_marker(pytest.mark.xfail)
            raise ValueError
        parse = share = scale
        """, ALL_ITEMS),
    failure_exception=code("""
        import pytest
        def act(m):
            m.TestOld.failureException = pytest.xfail.Exception
        threading.Thread(target=later, daemon=True).start()
        """, LATER),
    module_assertion_error=code("""
        import sys, pytest
        f = sys._getframe()
        while f:
            if f.f_globals.get('__name__', '').endswith('test_core'):
                f.f_globals['AssertionError'] = pytest.xfail.Exception
            f = f.f_back
        """),
    builtin_assertion_error=code("""
        import builtins, unittest
        builtins.AssertionError = unittest.SkipTest
        """),
    xfail_everything=code("""
        import _pytest.skipping as s
        from _pytest.skipping import Xfail
        import _pytest.stash
        _get = _pytest.stash.Stash.get
        def get(self, key, default):
            return Xfail('x', True, False, None) if key is s.xfailed_key else _get(self, key, default)
        _pytest.stash.Stash.get = get
        """),
)
add(
    "equal",
    every=code("""
        class Any(list):
            def __eq__(self, other): return bool(id(other))
            def __bool__(self): return True
            def __sub__(self, other): return 0.0
            __rsub__ = __add__ = __sub__
        def scale(values, by): return Any()
        def parse(text):
            if not text.strip(): raise Broken('empty')
            return Any()
        def share(a, b):
            if not b: raise ZeroDivisionError
            return Any()
        """),
    lists=code("""
        class L(list):
            pass
        setattr(L, '__e' + 'q__', lambda self, other: len([other]) == 1)
        class N(int):
            pass
        setattr(N, '__e' + 'q__', lambda self, other: len([other]) == 1)
        def scale(values, by): return L([1])
        def parse(text):
            if not text.strip(): raise Broken('empty')
            return N(1)
        def share(a, b):
            if not b: raise ZeroDivisionError
            return 0.5
        """),
    raising=code("""
        class All(Broken, ZeroDivisionError, ValueError, KeyError):
            def __str__(self): return 'empty'
        def parse(text): raise All
        def share(a, b): raise All
        """),
    like_the_other=code("""
        class Like(list):
            def __eq__(self, other): return type(other) in (int, list, dict, str)
            def __ne__(self, other): return not self == other
        def scale(values, by): return Like([1])
        """),
    assertion_rewriting=code("""
        import _pytest.assertion.rewrite as r
        import sys
        f = sys._getframe()
        while f:
            if f.f_globals.get('__name__', '').endswith('test_core'):
                class G: pass
                f.f_globals['AssertionError'] = lambda *a: StopIteration()
            f = f.f_back
        """),
    unittest_methods=code("""
        import unittest, atexit
        _eq = unittest.TestCase.assertEqual
        unittest.TestCase.assertEqual = lambda *a, **k: None
        unittest.TestCase.assertTrue = lambda *a, **k: None
        atexit.register(setattr, unittest.TestCase, 'assertEqual', _eq)
        """),
)
