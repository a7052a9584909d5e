"""Which files of a repository are tests, or support tests, by the habits of each language."""

import pathlib
import re

FOLDERS = frozenset({"test", "tests", "testing", "_tests", "testsuite"})
_OTHER_FOLDERS = FOLDERS | {"__tests__", "testdata", "__mocks__", "spec", "fixtures"}  # of JavaScript and Go
_OTHER_ENDINGS = frozenset({".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".go"})
_PYTHON = re.compile(r"test_.*|.*_tests?\.py|tests?\.py|conftest\.py")
_OTHER = re.compile(r".*_test\.go|.*\.(test|spec)\.[a-z]+|tests?\.[a-z]+")


def is_test_path(path: str) -> bool:
    """Tells whether the file at `path`, relative to its repository and with "/" between folders, is a test.

    Defects are never put into such files, patches of agents may not touch them, and changes to them belong to a mined
    task's test patch.
    """
    *folders, name = [part.lower() for part in pathlib.PurePosixPath(path).parts] or [""]
    other = pathlib.PurePosixPath(name).suffix in _OTHER_ENDINGS
    if (_OTHER_FOLDERS if other else FOLDERS) & set(folders):
        return True
    return bool((_OTHER if other else _PYTHON).fullmatch(name))
