"""The guard: what it blocks, what it lets pass, what it counts, and how far it sees through disguises."""

import base64
import re
import time

import pytest

from qcn_jax.agents import shell_reader
from qcn_jax.agents.guard import Guard, Rule

LINK = "https://github.com/a/b"


def packed(text: str) -> str:
    """As base64."""
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("command", [
    "git remote add upstream https://github.com/psf/requests && git fetch upstream", "git clone git@github.com:a/b.git",
    "curl -sL https://raw.githubusercontent.com/a/b/main/x.py", "wget gitlab.com/a/b/-/raw/x.py",
    "python -c \"import urllib.request as u; u.urlopen('https://pypi.org/x')\"", "pip download toolz==1.2.0",
    "git -C /testbed fetch origin", "git pull", "uv pip install toolz", "npm --silent i left-pad"])
def test_blocked(command):
    guard = Guard()
    rule = guard.check("bash", {"command": command})
    assert rule is not None and "blocked" in rule.message
    assert guard.counts == {"blocked": 1, f"blocked/{rule.name}": 1}


DISGUISED = {
    "quotes within words": ("git_remote", "g\"i\"t cl'on'e x"),
    "quoted words": ("git_remote", "'git' \"fetch\" origin"),
    "backslash": ("git_remote", "\\git pull"),
    "escapes": ("git_remote", "$'\\x67it' pull"),
    "options of git": ("git_remote", "git --no-pager -C /testbed -c a.b=c fetch origin"),
    "alias of git": ("git_remote", "git -c 'alias.st=!git fetch' st"),
    "options of pip": ("package_download", "pip --quiet install toolz"),
    "module": ("package_download", "python3 -m pip -q --proxy x download toolz==1.2"),
    "variable": ("git_remote", "G=git; $G clone x"),
    "variables in a link": ("repository_link", "u=git v=hub; curl ${u}${v}.com/a/b.patch"),
    "separator": ("git_remote", "git${IFS}fetch"),
    "base64 to a shell": ("git_remote", f"echo {packed('git pull')} | base64 -d | sh"),
    "base64 to eval": ("git_remote", f"eval \"$(echo {packed('git fetch x')} | base64 --decode)\""),
    "octal to bash -c": ("git_remote", "bash -lc \"$(printf '\\147it pull')\""),
    "device": ("network_device", "exec 3<>/dev/tcp/140.82.112.3/443; cat <&3"),
    "device read": ("network_device", "cat </dev/tcp/example.org/80"),
    "alias": ("git_remote", "shopt -s expand_aliases\nalias g=git\ng fetch"),
    "function": ("git_remote", "g() { git \"$@\"; }; g fetch"),
    "wrappers": ("git_remote", "/usr/bin/env -i A=1 timeout 5 nice -n 3 git pull"),
    "braces": ("git_remote", "{git,fetch,x}"),
    "here document": ("package_download", "sh <<EOF\npip install toolz\nEOF"),
    "xargs": ("git_remote", "echo fetch | xargs -I{} git {}"),
    "substitution": ("git_remote", "$(echo git) fetch"),
    "process substitution": ("git_remote", "bash <(echo git pull)"),
    "file": ("git_remote", "echo git pull > x.sh; chmod +x x.sh; ./x.sh"),
    "loop": ("git_remote", "for i in fetch pull; do git $i; done"),
    "pattern": ("git_remote", "/usr/bin/g?t pull"),
    "rotated": ("git_remote", "echo tvg chyy | tr a-z n-za-m | sh"),
    "reversed": ("git_remote", "echo hctef tig | rev | sh"),
    "arguments": ("git_remote", "set -- git fetch; \"$@\""),
    "base64 in Python": ("repository_link", "python -c \"exec(__import__('base64').b64decode('"
                         + packed(f"import requests as r; r.get('{LINK}')") + "'))\""),
}


@pytest.mark.parametrize("command", DISGUISED)
def test_disguises_are_seen_through(command):
    guard, (rule, text) = Guard(), DISGUISED[command]
    found = guard.check("bash", {"command": text})
    assert found is not None and found.name == rule
    assert guard.counts["blocked/" + rule] == 1


@pytest.mark.parametrize("command", [
    "$(cat word) clone x", "A=$(python make.py); $A", "X=$(head -c 3 README.md); $X fetch", "eval \"$(cat note)\"",
    "a=xgit; ${a:1} pull", "echo '", "f() { f; }; f", "(" * 5000, "x " * 30_000])
def test_what_cannot_be_read_is_counted(command):
    """None of these is refused: it cannot be told what they run without running them."""
    guard = Guard()
    assert guard.check("bash", {"command": command}) is None
    assert guard.counts == {"allowed": 1, "unseen": 1}


@pytest.mark.parametrize("arguments", [
    {"command": "python -m pytest tests/test_requests.py"}, {"command": "git diff && git log --oneline"},
    {"command": "grep -rn 'https://github.com' README.md"}, {"path": "socket.py", "old": "fetch(x)", "new": "download(y)"},
    {"command": "pip show wheel"}, {"command": "echo 'then pip install toolz' >> NOTES"}, {"command": "git fetch-x"},
    {"command": "cat > a.py <<'EOF'\nimport socket\nEOF\npython a.py | head -3"}, {"command": "sed -n '1,5p' \"a b.py\""},
    {"command": "for f in *.py; do wc -l \"$f\"; done"}, {"command": "python - <<'E'\nprint(1)\nE"}])
def test_allowed(arguments):
    guard = Guard()
    assert guard.check("bash", arguments) is None
    assert guard.counts == {"allowed": 1}


@pytest.mark.parametrize("command", [
    "A=aaaaaaaaaa; " + "A=$A$A; " * 40 + "$A", "f() { f; f; }; f", "{a,b}" * 2000, "`" * 5000, "$(" * 3000, "\ud800",
    "for a in 1 2 3 4 5 6 7 8; do " * 20 + ":" + "; done" * 20])
def test_reading_ends_soon(command):
    """Growth without bound, or depth, is given up, whatever it would have led to."""
    before = time.process_time()
    shell_reader.read(command)
    assert time.process_time() - before < 5


def test_link_and_word_in_different_arguments_count_together_and_calls_do_not():
    guard = Guard()
    assert guard.check("fetch", {"url": LINK}) is not None
    assert guard.check("view", {"url": LINK}) is None
    assert guard.check("fetch", {"name": "local"}) is None
    assert guard.counts == {"blocked": 1, "blocked/repository_link": 1, "allowed": 2}


def test_policy_can_be_extended():
    rule = Rule("secrets", (re.compile(r"/etc/shadow"),), "no")
    guard = Guard().extended(rule)
    assert guard.check("bash", {"command": "cat /etc/shadow"}) is rule and guard.counts["blocked/secrets"] == 1
    assert Guard().check("bash", {"command": "cat /etc/shadow"}) is None
