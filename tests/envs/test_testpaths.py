"""Which files are tests: one answer for defects, patches, mined changes and documents."""

import pytest

from qcn_jax.envs.testpaths import is_test_path


@pytest.mark.parametrize("path", [
    "test_a.py", "pkg/a_test.py", "pkg/a_tests.py", "tests.py", "Test.py", "conftest.py", "sub/conftest.py",
    "tests/data/golden.json", "pkg/testing/helpers.py", "Tests/a.txt", "_tests/x.py", "testsuite/x.py", "test_data.csv",
    "unittests/helpers.py", "pkg/unit_tests/helpers.py", "functional-tests/a.txt", "test_suite/x.py", "integrationtests/a.js",
    "a/b_test.go", "src/__tests__/a.js", "src/a.test.ts", "src/a.spec.mjs", "test.js", "testdata/x.go", "spec/a.cjs",
])  # fmt: skip
def test_these_are(path):
    assert is_test_path(path)


@pytest.mark.parametrize("path", [
    "", "pkg/a.py", "pkg/latest.py", "contest.py", "attest/a.py", "spec/a.py", "fixtures/a.py", "pkg/spec.py", "setup.py",
    "unittest/case.py", "latests/a.py", "systems/a.py", "src/_pytest/x.py", "contests/a.py",
    "a/testing.go", "src/spec.js", "src/testable.js", "main.go", "docs/testing.md",
])  # fmt: skip
def test_these_are_not(path):
    assert not is_test_path(path)
