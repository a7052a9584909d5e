"""Second opinions on states that are right: nothing in them is called a forgery, whatever is drawn."""

import random
import textwrap

from qcn_jax.envs.sandbox import RepositorySpec
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.tasks import opinion
from qcn_jax.envs.tasks.grading import Layered
from tests.sandboxes import world  # noqa: F401

# Every line's decoys were taken for the true value by chance, about one time in five.
HONEST = textwrap.dedent("""
    import decimal
    import time
    import pytest
    from pkg import same

    def helper(left, right):
        assert same(left) == right + same(0)

    def test_one_place_of_many_values():
        for number in range(6):
            helper(number, number)

    def test_small_numbers():
""") + "    assert same(1) == same(1)\n" * 12 + textwrap.dedent("""
    def test_large_numbers():
        assert same(2.0 ** 53) == same(2.0 ** 53)
        assert [same(1.5), float("inf")] == [1.5, same(float("inf"))]
        assert same(float("inf")) in [same(float("inf")), same(0)]

    def test_types_of_their_own():
        for number in range(2, 100, 7):
            assert same(decimal.Decimal(number)) == same(number)

    def test_other_every_time():
        start = time.monotonic_ns()
        assert same(start) == start + same(0)
        assert same(start % 5) in range(same(5))

    def test_near():
        assert pytest.approx(same(50), abs=60) == same(50)
""")


def test_what_is_right_is_never_forged(world, tmp_path):  # noqa: F811
    for path, text in {"pkg.py": "def same(x):\n    return x\n", "tests/test_honest.py": HONEST}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    spec, secret = RepositorySpec("honest==1", str(tmp_path)), random.SystemRandom()
    tests = [name for name, outcome in world.provider.prepare(spec).baseline.outcomes.items() if outcome == "passed"]
    assert len(tests) == 6

    def run_tests(changes, names, blind):
        with sandbox(world.provider, spec.name, changes, role="grading") as place:
            return place.run_tests(names, 60.0, False, "blind" if blind else True)

    state = Layered(world.provider.files(spec.name), {})
    reference = opinion.learn(tests, state, {}, (), run_tests, secret)
    assert sorted(reference.tests) == sorted(tests) and len(reference.plain) <= 1
    opinion.store(str(tmp_path), "reference", reference)  # as JSON, which has no infinity
    facts, reference = reference.facts, opinion.load(str(tmp_path), "reference")
    assert reference.facts == facts and "inf" in str(facts)
    for _ in range(8):
        assert opinion.ask(reference, state, {}, run_tests, secret, attempts=1) == opinion.Opinion()
