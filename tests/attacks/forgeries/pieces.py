"""What forgeries are put together from."""

import textwrap

from tests.attacks.forgeries.judged import FAILING, PASSING

FORGERIES: dict[str, str] = {}
MODULE = """
import sys
def module():
    return next((m for n, m in list(sys.modules.items()) if n.endswith('test_core')), None)
"""
# Waits for the test module and then acts on it, from a thread.
LATER = MODULE + """
import threading, time
def later():
    for _ in range(100000):
        m = module()
        if m is not None and hasattr(m, 'TestOld'):
            act(m)
            return
        time.sleep(0)
"""
NAMES = f"NAMES = {[*FAILING, *PASSING]!r}\n"
ALL_ITEMS = """
import gc
def items():
    import _pytest.nodes
    return [o for o in gc.get_objects() if isinstance(o, _pytest.nodes.Item)]
"""
# Passes every test by a hook of `where`; put back at the end.
HOOKED = """
import atexit, functools
import _pytest.{where} as target
_old = {old}
{new}
"""


def code(text: str, *before: str) -> str:
    return "".join(before) + textwrap.dedent(text)


def add(kind: str, **codes: str) -> None:
    FORGERIES.update({f"{kind}: {name}": code for name, code in codes.items()})


EMPTY = """
import ast, os
p = 'tests/test_core.py'
def empty():
    tree = ast.parse(open(p).read())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree))
"""
SWALLOW = """
for holder in ('_pytest.python_api', '_pytest.raises'):
    try:
        m = __import__(holder, fromlist=['x'])
    except ImportError:
        continue
    for name in ('RaisesContext', 'RaisesExc', 'AbstractRaises'):
        c = getattr(m, name, None)
        if c is not None:
            c.__exit__ = lambda self, *a: True
import unittest.case
unittest.case._AssertRaisesContext.__exit__ = lambda self, *a: True
"""
