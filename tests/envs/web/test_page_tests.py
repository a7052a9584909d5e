"""Files of page tests: what is written is read back, and a fault is named by file, test and step."""

import json

import pytest
from envs.web import near_misses

from qcn_jax.envs.web import page_tests
from qcn_jax.envs.web.page_tests import Suite
from qcn_jax.errors import UserError


def test_written_is_read_back():
    suite = Suite(near_misses.TESTS, "site")
    assert page_tests.read("a.web.json", suite.to_text()) == suite


@pytest.mark.parametrize("step, words", [
    ({"clik": {"text": "a"}}, "step 1 has an unknown first key 'clik'"),
    ({"click": {"txt": "a"}}, "step 1 click: expected target"),
    ({"click": {"role": "button", "text": "a"}}, "step 1 click: expected target"),
    ({"type": "a"}, "step 1 type needs 'into'"),
    ({"text": {"css": "p"}, "is": 3}, "step 1 is: expected text"),
    ({"count": {"css": "p"}, "is": -1}, "step 1 is: expected number"),
    ({"see": {"css": "p"}, "isnt": 1}, "unknown key 'isnt'"),
])  # fmt: skip
def test_fault_of_a_step_is_named(step, words):
    text = json.dumps({"tests": [{"name": "one", "steps": [step]}]})
    with pytest.raises(UserError, match="a.web.json: test 1 .one.: ") as error:
        page_tests.read("a.web.json", text)
    assert words in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("{", "is not JSON"), ("[]", "a list `tests`"), ('{"tests": [], "site": "../x"}', "site must be"),
    ('{"tests": [{"name": "a", "steps": [], "width": 5}]}', "width must be 100 to 4000"),
    ('{"tests": [{"name": "a", "steps": []}, {"name": "a", "steps": []}]}', "two tests have the name 'a'"),
])  # fmt: skip
def test_fault_of_a_file_is_named(text, words):
    with pytest.raises(UserError) as error:
        page_tests.read("a.web.json", text)
    assert words in str(error.value)
