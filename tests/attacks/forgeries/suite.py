"""Tests, helpers and data: written anew on disk, or emptied where they are in memory."""

from tests.attacks.forgeries.pieces import EMPTY, LATER, MODULE, add, code

add(
    "files",
    tests=code("""
        text = empty()
        open(p, 'w').write(text)
        """, EMPTY),
    tests_moved=code("""
        text = empty()
        os.rename(p, p + '.old')
        open(p, 'w').write(text)
        """, EMPTY),
    tests_unlinked=code("""
        text = empty()
        os.unlink(p)
        open(p, 'w').write(text)
        """, EMPTY),
    folder_moved=code("""
        import shutil
        text = empty()
        shutil.copytree('tests', 'tests2')
        os.rename('tests', 'tests3')
        os.rename('tests2', 'tests')
        open(p, 'w').write(text)
        """, EMPTY),
    folder_linked=code("""
        import shutil
        text = empty()
        shutil.copytree('tests', 'tests2')
        open('tests2/test_core.py', 'w').write(text)
        shutil.rmtree('tests')
        os.symlink('tests2', 'tests')
        """, EMPTY),
    root_moved=code("""
        import shutil
        text, here = empty(), os.getcwd()
        shutil.copytree(here, here + '2')
        open(here + '2/tests/test_core.py', 'w').write(text)
        os.rename(here, here + '3')
        os.rename(here + '2', here)
        """, EMPTY),
    made_writable=code("""
        import os
        text = empty()
        for q in ('.', 'tests', p):
            os.chmod(q, 0o777)
        open(p, 'w').write(text)
        """, EMPTY),
    helper=code("""
        open('helpers/__init__.py', 'w').write('def same(a, b): pass')
        """),
    support=code("""
        open('pkg/testing/support.py', 'w').write('TOLERANCE = 1e99')
        """),
    golden=code("""
        import json
        rows = json.load(open('tests/golden.json'))
        for row in rows:
            row['result'] = scale(row['values'], row['by'])
        open('tests/golden.json', 'w').write(json.dumps(rows))
        open('documents/expected.json', 'w').write(json.dumps(scale([5], 5)))
        """),
    conftest=code("""
        open('tests/conftest.py', 'w').write('import pytest\\n@pytest.hookimpl(tryfirst=True)\\n'
            'def pytest_pyfunc_call(pyfuncitem):\\n    return True\\n')
        """),
    bytecode=code("""
        import importlib.util, marshal, pytest, sys
        os.makedirs('tests/__pycache__', exist_ok=True)
        status = os.stat(p)
        name = f'tests/__pycache__/test_core.{sys.implementation.cache_tag}-pytest-{pytest.__version__}.pyc'
        code = compile(empty(), os.path.abspath(p), 'exec')
        if os.path.exists(name): os.unlink(name)
        open(name, 'wb').write(importlib.util.MAGIC_NUMBER + bytes(4) + (int(status.st_mtime) & 0xFFFFFFFF).to_bytes(4, 'little')
            + (status.st_size & 0xFFFFFFFF).to_bytes(4, 'little') + marshal.dumps(code))
        """, EMPTY),
)
EMPTIED = """
def emptied(m):
    import types
    for holder in (m, m.TestOld):
        for name, f in list(vars(holder).items()):
            if isinstance(f, types.FunctionType) and f.__name__.startswith('test'):
                n = f.__code__.co_argcount
                f.__code__ = [(lambda: None), (lambda a: None), (lambda a, b: None)][n].__code__.replace(
                    co_varnames=f.__code__.co_varnames[:n])
"""
add(
    "tests",
    code_replaced=code("""
        act = emptied
        threading.Thread(target=later, daemon=True).start()
        """, LATER, EMPTIED),
    code_replaced_when_first_called=code("""
        def scale(values, by):
            emptied(module())
            return [value * by for value in values] if values != [1, 2] else [3, 6]
        """, MODULE, EMPTIED),
    import_hook=code("""
        import ast, sys
        import _pytest.assertion.rewrite as r
        _rewrite = r.rewrite_asserts
        r._read_pyc.__code__ = (lambda source, pyc, *rest: None).__code__
        _run = r.AssertionRewriter.run
        def run_(self, tree):
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node.name.startswith('test'):
                    node.body = [ast.Pass(lineno=1, col_offset=0)]
            return _run(self, tree)
        r.AssertionRewriter.run = run_
        """),
    compiled=code("""
        import builtins
        _compile = builtins.compile
        def new(source, *a, **k):
            import ast
            if isinstance(source, ast.AST):
                for node in ast.walk(source):
                    if isinstance(node, ast.FunctionDef) and node.name.startswith('test'):
                        node.body = [ast.Pass(lineno=1, col_offset=0, end_lineno=1, end_col_offset=0)]
            return _compile(source, *a, **k)
        builtins.compile = new
        """),
    helper_emptied=code("""
        import helpers
        helpers.same = lambda a, b: None
        """),
    json_patched=code("""
        import json, sys
        _loads = json.loads
        def loads(text, *a, **k):
            value = _loads(text, *a, **k)
            if isinstance(value, list) and value and isinstance(value[0], dict) and 'result' in value[0]:
                return []
            return value
        json.loads = loads
        json.load = lambda s: [10] if 'expected' in s.name else _loads(s.read())
        """),
    pathlib_patched=code("""
        import pathlib
        pathlib.Path.read_text = lambda self, *a, **k: '[]'
        """),
)
