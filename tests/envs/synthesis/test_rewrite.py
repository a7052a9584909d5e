"""Model-driven defects and statements, against an endpoint that answers over HTTP."""

import pytest

from qcn_jax.chat import endpoint
from qcn_jax.envs.synthesis import statement
from qcn_jax.envs.synthesis.inject import rewrite
from qcn_jax.errors import UserError
from tests.envs.synthesis.answering import serve
from tests.envs.synthesis.small import SOURCE

PATH = "numbers_pkg/core.py"


def model(messages):
    """A careless programmer: turns `<` around, forgets the empty stack, cannot write countdown at all."""
    text = messages[-1]["content"].rsplit("```python\n", 1)[1].rsplit("```", 1)[0]
    if "def countdown" in text:
        return "I cannot do that."
    if "def mean" in text:
        return "```python\ndef average(values):\n    return 0\n```"  # another name
    if "def pop" in text and "..." in text:
        return f"Sure.\n```python\n{text.replace('...', 'return self.items.pop()')}```\nDone."
    return f"```python\n{text.replace('value < low', 'value > low')}```"


def test_candidates(tmp_path):
    """Only usable answers count, patches are minimal, and a second run asks nothing."""
    with serve(model) as (url, bodies):
        asked = endpoint.Endpoint(url, "m", cache=str(tmp_path))
        found = rewrite.candidates(SOURCE, PATH, asked, seed=3)
        count = len(bodies)
        assert rewrite.candidates(SOURCE, PATH, asked, seed=3) == found and len(bodies) == count
    assert bodies[0]["path"] == "/v1/chat/completions" and bodies[0]["seed"] == 3 and bodies[0]["temperature"] == 0
    by_kind = {(i.kind, i.qualname): i for i in found}
    assert set(by_kind) == {(rewrite.MODIFY, "clamp"), *((rewrite.REWRITE, name) for name in (
        "clamp", "Stack.push", "Stack.pop"))}  # fmt: skip
    clamp = by_kind[rewrite.MODIFY, "clamp"]
    assert (clamp.old, clamp.new) == ("    if value < low:\n", "    if value > low:\n")
    pop = by_kind[rewrite.REWRITE, "Stack.pop"]
    assert pop.after_source == SOURCE.replace(
        '        if not self.items:\n            raise IndexError("empty stack")\n        return self.items.pop(index)',
        "        return self.items.pop()")
    assert rewrite.candidates(SOURCE, "tests/test_core.py", asked) == []


def test_endpoint_errors(tmp_path, monkeypatch):
    """Refusals end at once, passing failures are tried again, what cannot be reached is named; the key is sent."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("MY_KEY", "secret")
    statuses = [503, 429, "fine"]
    with serve(lambda _: statuses.pop(0)) as (url, bodies):
        assert endpoint.Endpoint(url, "m", "MY_KEY").ask([{"role": "user", "content": "?"}]) == "fine"
        assert len(bodies) == 3 and bodies[0]["authorization"] == "Bearer secret"
    with serve(lambda _: 400) as (url, bodies):
        with pytest.raises(UserError, match="answers 400"):
            endpoint.Endpoint(url, "m").ask([{"role": "user", "content": "?"}])
        assert len(bodies) == 1
    with pytest.raises(UserError, match="cannot be reached"):
        endpoint.Endpoint(url, "m").ask([{"role": "user", "content": "?"}])


FACTS = "`clamp(5, 0, 10)` in core.py returned 10; expected 5."
GOLD = ("--- a/core.py\n+++ b/core.py\n@@ -1,2 +1,2 @@\n def clamp(value, low, high):\n-    if value >= low:\n"
        "+    if value > high:\n")


@pytest.mark.parametrize(
    ("answer", "used"),
    [
        ("clamp() cuts values that are inside the bounds: clamp(5, 0, 10) gives 10 and should give 5.", True),
        ("clamp() is wrong, it should say `if value > high:`. For 5 it gave 10, not 5.", False),  # the fix
        ("Something is wrong somewhere.", False),  # names no function
        ("", False),
    ],
)
def test_statement_from_an_endpoint(answer, used):
    """A model words the facts; an answer that tells the fix or leaves the function out is not used."""
    with serve(lambda _: answer) as (url, _):
        text = statement.worded(FACTS, "clamp", GOLD, endpoint.Endpoint(url, "m"))
    assert text == (answer if used else FACTS)
