"""The test configuration itself: demanded things that are missing fail, others skip."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests import conftest
from tests.conftest import ROOT

TEST = "import pytest\n\n@pytest.mark.docker\ndef test_needs_docker():\n    pass\n\ndef test_plain():\n    pass\n"


@pytest.fixture(name="pytest_run")
def _pytest_run(tmp_path):
    """Runs pytest on a copy of the configuration and two tests, where no Docker engine answers."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests/conftest.py")
    shutil.copy(ROOT / "pytest.ini", tmp_path)
    pathlib.Path(tmp_path, "tests/test_x.py").write_text(TEST)

    def run(*arguments, **environment):
        return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], cwd=tmp_path,
                              text=True, capture_output=True, check=False, timeout=120,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "DOCKER_HOST": f"unix://{tmp_path}/none.sock", **environment})

    return run


def test_missing_docker_skips_with_a_reason(pytest_run):
    done = pytest_run(QCN_REQUIRE="")
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout, done.stdout
    assert "no Docker engine answers" in done.stdout


def test_missing_docker_fails_where_it_is_demanded(pytest_run):
    done = pytest_run(QCN_REQUIRE="docker,torch")
    assert done.returncode == 1 and "QCN_REQUIRE demands docker" in done.stdout, done.stdout


def test_unknown_demands_are_refused(pytest_run):
    done = pytest_run(QCN_REQUIRE="dokcer")
    assert done.returncode != 0 and "unknown dokcer" in done.stdout + done.stderr


def test_workers_take_whole_files_and_the_longest_first(pytest_run, tmp_path):
    for name in (*(f"test_{letter}.py" for letter in "abcd"), *conftest.LONGEST[:2]):
        file = tmp_path / "tests" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("import pytest\n@pytest.mark.parametrize('n', range(9))\ndef test_it(n): pass\n")
    done = pytest_run("-n", "2", "-vv", QCN_REQUIRE="")
    lines = re.findall(r"^\[(gw\d)\].* tests/(\S+)::test_it", done.stdout, re.MULTILINE)
    workers = {name: {worker for worker, other in lines if other == name} for _, name in lines}
    assert len(lines) == 6 * 9 and all(len(found) == 1 for found in workers.values()), done.stdout
    for found in ("gw0", "gw1"):
        assert next(name for worker, name in lines if worker == found) in conftest.LONGEST
    assert all((ROOT / "tests" / name).is_file() for name in conftest.LONGEST)
