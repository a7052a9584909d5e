"""Verdicts cannot be bought: forged results of the kinds in forgeries/, and honest patches beside them.

All of them are handed in with `strict=False`, so that no rule about words in a patch stands in for the evidence.
"""

import dataclasses

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import RepositorySpec
from qcn_jax.envs.tasks.grading import Grader
from tests.attacks import forgeries
from tests.attacks.forgeries import FORGERIES
from tests.attacks.forgeries.judged import AIMS, BAD, FAILING, FILES, GOOD, PATH, REPOSITORY, make_task
from tests.sandboxes import make_provider

HONEST = GOOD.replace('raise Broken("empty text")', 'raise Nothing("what is empty holds no number")').replace(
    "    return [value * by for value in values]", "    return Row(value * by for value in values)").replace(
    "    return part / whole", "    return fractions.Fraction(part, whole)").replace("def scale(", """class Nothing(Broken, ValueError):
    pass


class Row(list):
    pass


def scale(""").replace("import os\n", "import fractions\nimport os\n")


@pytest.fixture(scope="module", params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def provider(request, tmp_path_factory):
    """A provider with the repository prepared."""
    folder = tmp_path_factory.mktemp(f"judged-{request.param}")
    for path, text in FILES.items():
        (folder / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / path).write_text(text)
    with make_provider(request.param, folder / "state") as made:
        made.prepare(RepositorySpec(REPOSITORY, str(folder / "tree")))
        yield made


def grade(provider, changes, strict=False, name=""):
    """The verdict on `changes` to the starting state."""
    before = {path: BAD if path == PATH else FILES.get(path) for path in changes}
    return Grader(provider, strict=strict).grade(make_task(name), patches.make_diff(before, changes))


def test_honest_patches_resolve_and_useless_ones_do_not(provider):
    for text in (GOOD, GOOD + "\n# other\n", GOOD.replace("[value * by for value in values]", "list(map(lambda v: v * by, values))")):
        verdict = grade(provider, {PATH: text}, strict=True)
        assert verdict.resolved, verdict
    shapes = {test for tests in AIMS.values() for test in tests if test.startswith("tests/test_shapes.py")}
    task = dataclasses.replace(make_task(), FAIL_TO_PASS=(*FAILING, *sorted(shapes)))
    for text in (GOOD, HONEST):  # whatever shape its tests have, and though it does not do as the fixed state does
        verdict = Grader(provider).grade(task, patches.make_diff({PATH: BAD}, {PATH: text}))
        assert verdict.resolved, verdict
    verdict = grade(provider, {PATH: BAD + "\n# nothing\n"})
    assert verdict.outcome == "unresolved" and len(verdict.tests_status["FAIL_TO_PASS"]["failure"]) == len(FAILING)


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_do_not_resolve(provider, name):
    verdict = grade(provider, forgeries.changes(name), name=name)
    assert not verdict.resolved, verdict
    assert verdict.outcome != "infrastructure", verdict


def test_nothing_lasts(provider):
    """After all of them the same servers still tell right from wrong."""
    assert grade(provider, {PATH: GOOD}).resolved
    assert not grade(provider, {PATH: BAD + "\n"}).resolved
