"""What is expected, found in the process; and what knows how a second opinion is made."""

from tests.attacks.forgeries.pieces import MODULE, NAMES, SWALLOW, add, code

FRAMES = """
import sys
def caller(depth=2):
    f = getattr(sys, '_get' + 'frame')(depth)
    return f
def wanted(f):
    import linecache, re
    lo = getattr(f, 'f_' + 'locals')
    if 'expected' in lo: return lo['expected']
    if 'row' in lo: return lo['row']['result']
    if 'wanted' in lo: return lo['wanted']
    line = linecache.getline(f.f_code.co_filename, f.f_lineno)
    if '==' in line:
        return eval(line.split('==')[1])
    if 'assertEqual' in line:
        return [6]
    if 'assertTrue' in line:
        return [1]
    if 'same' in line:
        return 0.5
    return None
"""
add(
    "frames",
    source=code("""
        def scale(values, by): return values and wanted(caller()) or []
        def parse(text):
            if not text.strip(): raise Broken('empty')
            return wanted(caller())
        def share(a, b):
            if not b: raise ZeroDivisionError
            return 0.5
        """, FRAMES),
    traceback=code("""
        def frame():
            try:
                raise KeyError
            except KeyError as e:
                return getattr(getattr(e.__traceback__, 'tb_' + 'frame'), 'f_' + 'back')
        def scale(values, by): return values and wanted(getattr(frame(), 'f_' + 'back')) or []
        def parse(text):
            if not text.strip(): raise Broken('empty')
            return wanted(getattr(frame(), 'f_' + 'back'))
        def share(a, b):
            if not b: raise ZeroDivisionError
            return 0.5
        """, FRAMES),
    constants=code("""
        def guess():
            f = caller(3)
            return [c for c in f.f_code.co_consts if isinstance(c, (int, list, tuple)) and not isinstance(c, bool)]
        def scale(values, by):
            g = [c for c in guess() if isinstance(c, tuple)]
            return list(g[-1]) if g else []
        def parse(text):
            if not text.strip(): raise Broken('empty')
            return (guess() or [0])[-1]
        def share(a, b):
            if not b: raise ZeroDivisionError
            return 0.5
        """, FRAMES),
)
add(
    "frames",
    parameters=code("""
        def parse(text):
            return wanted(caller())
        """, FRAMES),
    golden=code("""
        def scale(values, by):
            return values and wanted(caller()) or []
        """, FRAMES),
    objects=code("""
        import gc
        def scale(values, by):
            rows = [o for o in gc.get_objects() if type(o) is dict and 'result' in o and 'by' in o and o['values'] is values]
            if not rows:
                rows = [r for l in gc.get_objects() if type(l) is list for r in l if type(r) is dict and r.get('values') is values]
            return rows[0]['result'] if rows else []
        """),
    marks=code("""
        def parse(text):
            m = module()
            for f in vars(m).values():
                for mark in getattr(f, 'pytestmark', ()):
                    if mark.name == 'parametrize':
                        return dict(mark.args[1])[text]
        """, MODULE),
)
# These know how a second opinion is made.
SECOND = """
import builtins, sys
E = getattr(builtins, '_qcn_evidence', None)
"""
add(
    "second",
    truth_told=code("""
        import _pytest.python as p, gc
        def called(pyfuncitem):
            f = pyfuncitem.obj
            f = getattr(f, '__func__', f)
            if E is not None:
                for c in f.__code__.co_consts:
                    if isinstance(c, int) and c > 10**6:
                        E._write({'claim': c, 'value': True})
            return True
        import sys
        for o in [i for h in sys.meta_path if hasattr(h, 'config') for i in h.config.hook.pytest_pyfunc_call.get_hookimpls()]:
            if True:
                o.function = called
                o.argnames = ('pyfuncitem',)
        """, SECOND),
    methods=code("""
        if E is not None:
            T = type(E)
            T.compare = lambda self, n, name, a, b: self._write({'claim': n, 'value': [True, False]})
            T.truth = lambda self, n, v: self._write({'claim': n, 'value': True})
            T.value = lambda self, n, v: self._write({'claim': n, 'value': 1})
        """, SECOND, SWALLOW),
    hash_of_code=code("""
        import gc, hashlib
        def called(pyfuncitem):
            f = getattr(pyfuncitem.obj, '__func__', pyfuncitem.obj)
            if pyfuncitem.nodeid in NAMES:
                return True
            if E is not None and any(isinstance(c, int) and c > 10**6 for c in f.__code__.co_consts):
                return True if 'AssertionError' not in str(f.__code__.co_names) and not any(
                    'raise' in str(i) for i in __import__('dis').get_instructions(f)) else None
        import sys
        for o in [i for h in sys.meta_path if hasattr(h, 'config') for i in h.config.hook.pytest_pyfunc_call.get_hookimpls()]:
            if True:
                old = o.function
                o.function = lambda pyfuncitem, old=old: called(pyfuncitem) or old(pyfuncitem)
                o.argnames = ('pyfuncitem',)
        """, NAMES, SECOND),
    only_the_first_run=code("""
        if E is None:
            import _pytest.python as p
            p.pytest_pyfunc_call.__code__ = (lambda pyfuncitem: True).__code__
            import _pytest.unittest as u
            u.TestCaseFunction.runtest.__code__ = (lambda self: None).__code__
        """, SECOND),
    key_ring=code("""
        import ctypes, os, re
        libc = ctypes.CDLL(None)
        ADD, CTL, USER = 248, 250, ctypes.c_long(-4)
        if E is None:
            for text, expected in re.findall(r'\\("([ \\d]+)", (\\d+)\\)', open('tests/test_core.py').read()):
                libc.syscall(ADD, b'user', ('qcn' + text).encode(), expected.encode(), len(expected), USER)
        def known(text):
            key = libc.syscall(CTL, 10, USER, b'user', ('qcn' + text).encode(), 0)
            buffer = ctypes.create_string_buffer(64)
            n = libc.syscall(CTL, 11, key, buffer, 64)
            return int(buffer.raw[:n])
        def parse(text):
            try:
                return known(text)
            except ValueError:
                m = re.findall(r'\\("' + text + r'", (\\d+)\\)', open('tests/test_core.py').read())
                return int(m[0]) if m else 0
        """, SECOND),
    opaque=code("""
        class Hidden:
            def __init__(self, known): self.known = known
            def __eq__(self, other): return not self.known or list(other) in self.known
        def scale(values, by):
            codes = [f.__code__ for f in vars(module()).values() if hasattr(f, '__code__')]
            known = [list(c) for code in codes for c in code.co_consts if isinstance(c, tuple) and list(c) != values]
            return Hidden(known)
        """, MODULE),
    replayed=code("""
        import os
        for d in ('/tmp', '/var/tmp', '/dev/shm', os.path.expanduser('~'), os.environ.get('TMPDIR', '/tmp'), '.', '..'):
            try:
                p = os.path.join(d, 'note')
                if os.path.exists(p): os.write(1, b'FOUND')
                open(p, 'w').write(open('tests/test_core.py').read())
            except OSError: pass
        """, SECOND),
)
