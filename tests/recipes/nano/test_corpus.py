"""The demonstration's texts: what is in them, what must never be."""

import pathlib
import sys

import pytest

from qcn_jax.recipes.nano import corpus


def test_stdlib_is_read_from_this_python_without_packages_and_tests():
    modules = dict(corpus.stdlib_modules())
    assert len(modules) > 300 and "json/decoder.py" in modules and "textwrap.py" in modules
    assert "class JSONDecoder" in modules["json/decoder.py"]
    for path in modules:
        parts = set(pathlib.PurePosixPath(path).parts)
        assert not parts & {"site-packages", "dist-packages", "test", "tests", "ensurepip"}, path
    heldout = {"boltons", "tabulate", "inflection", "isodate", "xmltodict"}
    assert not heldout & {part.removesuffix(".py") for path in modules for part in path.split("/")}
    assert "parse.py" not in modules and "schema.py" not in modules  # urllib/parse.py is another one
    # Packages installed next to pytest lie below the standard library's folder.
    installed = pathlib.Path(pytest.__file__).read_text()
    assert installed not in modules.values()
    assert list(modules) == sorted(modules) and sys.version_info >= (3, 11)
