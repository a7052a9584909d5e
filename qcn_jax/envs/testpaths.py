"""Which files of a repository are tests, or support tests, by the habits of each language."""

import pathlib
import re

# "unittest" alone is a module of the standard library.
_FOLDER = re.compile(r"_?tests?|testing|test_?suites?|"
                     r"(?:unit|func|functional|integration|system|regression|acceptance|smoke)(?:[_-]tests?|tests)")
_OTHER_FOLDER = re.compile(rf"{_FOLDER.pattern}|__tests__|testdata|__mocks__|spec|fixtures")  # of JavaScript and Go
_OTHER_ENDINGS = frozenset({".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".go"})
_PYTHON = re.compile(r"test_.*|.*_tests?\.py|tests?\.py|conftest\.py")
_OTHER = re.compile(r".*_test\.go|.*\.(test|spec)\.[a-z]+|tests?\.[a-z]+")


def is_doctest(node_id: str) -> bool:
    """Tells whether a pytest id is that of an example in a source's docstring, whose file is no test then."""
    path, _, name = node_id.partition("::")
    parts = path.removesuffix(".py").split("/")
    modules = {".".join(parts[start:]).removesuffix(".__init__") for start in range(len(parts))}
    return path.endswith(".py") and not is_test_path(path) and any(
        name == module or name.startswith(f"{module}.") for module in modules)


def is_test_path(path: str) -> bool:
    """Tells whether the file at `path`, relative to its repository and with "/" between folders, is a test.

    Defects are never put into such files, patches of agents may not touch them, and changes to them belong to a mined
    task's test patch.
    """
    *folders, name = [part.lower() for part in pathlib.PurePosixPath(path).parts] or [""]
    other = pathlib.PurePosixPath(name).suffix in _OTHER_ENDINGS
    if any((_OTHER_FOLDER if other else _FOLDER).fullmatch(folder) for folder in folders):
        return True
    return bool((_OTHER if other else _PYTHON).fullmatch(name))
