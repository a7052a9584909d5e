"""The guard: what it blocks, what it lets pass, what it counts."""

import re

import pytest

from qcn_jax.agents.guard import Guard, Rule


@pytest.mark.parametrize("command", [
    "git remote add upstream https://github.com/psf/requests && git fetch upstream", "git clone git@github.com:a/b.git",
    "curl -sL https://raw.githubusercontent.com/a/b/main/x.py", "wget gitlab.com/a/b/-/raw/x.py",
    "python -c \"import urllib.request as u; u.urlopen('https://pypi.org/x')\"", "pip download toolz==1.2.0",
    "git -C /testbed fetch origin", "git pull", "uv pip install toolz"])
def test_blocked(command):
    guard = Guard()
    message = guard.check("bash", {"command": command})
    assert message is not None and "blocked" in message
    assert guard.counts["blocked"] == 1 and guard.counts["allowed"] == 0


@pytest.mark.parametrize("arguments", [
    {"command": "python -m pytest tests/test_requests.py"}, {"command": "git diff && git log --oneline"},
    {"command": "grep -rn 'https://github.com' README.md"}, {"path": "socket.py", "old": "fetch(x)", "new": "download(y)"}])
def test_allowed(arguments):
    guard = Guard()
    assert guard.check("bash", arguments) is None
    assert guard.counts == {"allowed": 1}


def test_link_and_word_in_different_arguments_count_together_and_calls_do_not():
    guard = Guard()
    assert guard.check("fetch", {"url": "https://github.com/a/b"}) is not None
    assert guard.check("view", {"url": "https://github.com/a/b"}) is None
    assert guard.check("fetch", {"name": "local"}) is None
    assert guard.counts == {"blocked": 1, "blocked/repository_link": 1, "allowed": 2}


def test_policy_can_be_extended():
    rule = Rule("secrets", (re.compile(r"/etc/shadow"),), "no")
    guard = Guard().extended(rule)
    assert guard.check("bash", {"command": "cat /etc/shadow"}) == "no" and guard.counts["blocked/secrets"] == 1
    assert Guard().check("bash", {"command": "cat /etc/shadow"}) is None
