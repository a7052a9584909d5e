"""Sandboxes of both back ends: what they report, what they contain, what they leave behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import Limits, SandboxError
from tests.sandboxes import BROKEN, CALC, FAILING, FILE, PASSING, SOURCE, agent, make_provider, world  # noqa: F401


def test_outcomes_and_messages(agent):
    run = agent.run_tests()
    assert run.status == "ok" and run.exit_status == 1 and run.tampered == ()
    assert {run.outcomes[name] for name in FAILING} == {"failed"}
    assert [run.outcomes[name] for name in PASSING] == ["passed", "xfailed", "skipped", "passed"]
    assert len(run.outcomes) == 8
    message = run.messages[f"{FILE}::test_clamp_inside"]
    assert message == f"AssertionError: assert 0 == 5 | {FILE}:9: assert clamp(5, 0, 10) == 5"
    assert "DID NOT RAISE" in run.messages[FAILING[2]]


def test_baseline_of_prepared_repository(world):
    baseline = world.provider.prepared[world.spec.name].baseline
    assert sorted(baseline.outcomes) == sorted(FAILING + PASSING)
    assert all(baseline.outcomes[name] == "passed" for name in FAILING)


def test_selection_order_and_missing_tests(agent):
    wanted = [PASSING[0], f"{FILE}::no_such_test", "tests/none.py::test_x", PASSING[3]]
    run = agent.run_tests(wanted)
    assert run.outcomes == {PASSING[0]: "passed", PASSING[3]: "passed"} and run.passed([PASSING[0]])
    assert not run.passed(wanted)
    assert agent.run_tests(["tests/none.py::test_x"]).outcomes == {}
    run = agent.run_tests([PASSING[3], FAILING[1], PASSING[0]], fail_fast=True)
    assert run.outcomes == {PASSING[3]: "passed", FAILING[1]: "failed"}  # in the order asked for, up to the failure


def test_edits_take_effect_and_diff_applies(world, agent):
    assert not agent.run_tests(FAILING).passed(FAILING)
    agent.write(SOURCE, CALC)
    assert agent.run_tests(FAILING).passed(FAILING)
    assert agent.diff() == patches.make_diff({SOURCE: BROKEN}, {SOURCE: CALC})
    # Same size and within the same clock tick: stale byte code would hide the change.
    agent.write(SOURCE, CALC.replace("max(low,", "min(low,"))
    assert not agent.run_tests(FAILING).passed(FAILING)


def test_broken_source_is_a_collection_error(agent):
    agent.write(SOURCE, "def clamp(:\n")
    run = agent.run_tests(FAILING)
    assert run.outcomes == {FILE: "error"} and "SyntaxError" in run.messages[FILE]


def test_files(agent):
    agent.write("victim/new/deep.txt", "form\x0cfeed\r\nno newline")
    assert agent.read("victim/new/deep.txt") == "form\x0cfeed\r\nno newline" == agent.read("/testbed/victim/new/deep.txt")
    for path, error in (("none.py", FileNotFoundError), ("victim", IsADirectoryError), ("../../x", PermissionError),
                        ("/etc/passwd", PermissionError)):
        with pytest.raises(error):
            agent.read(path)
    with pytest.raises(OSError):
        agent.write("victim", "x")
    agent.exec("rm README.md; ln -s /etc/passwd link; mkfifo pipe; printf '\\0\\1' > binary; mkdir -p empty .git/hooks")
    assert agent.changes() == {"README.md": None, "victim/new/deep.txt": "form\x0cfeed\r\nno newline"}


def test_paths_are_the_same_in_every_sandbox(world):
    """Ids, and whatever else tests make of where they stand, hold in other sandboxes."""
    seen = []
    for _ in range(2):
        with world.provider.create(world.spec.name) as place:
            place.write("tests/test_here.py", "import os\n\nimport pytest\n\nHERE = os.path.realpath(__file__)\n\n\n"
                        "@pytest.mark.parametrize('path', [HERE, os.getcwd()])\ndef test_here(path):\n    pass\n")
            seen.append([sorted(place.run_tests().outcomes), place.run_python("def main(args):\n    return ROOT").value])
            copy = place.fork()
            seen.append([sorted(copy.run_tests().outcomes), copy.run_python("def main(args):\n    return ROOT").value])
            copy.destroy()
    assert all(one == seen[0] for one in seen) and sum("test_here[" in name for name in seen[0][0]) == 2


def test_fork_and_reset(agent):
    agent.write("victim/extra.py", "x = 1\n")
    agent.exec("rm README.md")
    with agent.fork() as copy:
        assert copy.changes() == agent.changes()
        agent.reset()
        assert agent.changes() == {} and agent.read("README.md") == "x\n"
        assert copy.read("victim/extra.py") == "x = 1\n"
        assert set(copy.changes()) == {"README.md", "victim/extra.py"}


def test_exec(agent):
    result = agent.exec("pwd; echo $GREETING; echo err >&2; exit 3", env={"GREETING": "hello"})
    assert (result.exit_code, result.timed_out, result.output) == (3, False, "/testbed\nhello\nerr\n")
    assert agent.exec("cd /testbed/victim && ls calc.py && python -c 'import victim, importlib.metadata as m;"
                      "print(m.version(\"victim\"))'").output == "calc.py\n1.2.3\n"
    assert agent.exec("python -m pytest -q tests 2>&1 | tail -1").output.startswith("4 failed, 2 passed, 1 skipped")


def test_commands_are_refused_where_nothing_holds_them(world, agent, monkeypatch):
    monkeypatch.setattr(world.provider, "commands_allowed", False)
    with pytest.raises(PermissionError, match="cannot isolate"):
        agent.exec("true")
    assert agent.run_tests(PASSING[:1]).passed(PASSING[:1])


def test_time_limit_is_enforced_inside(agent):
    started = time.monotonic()
    result = agent.exec("trap '' TERM INT HUP; sleep 600 & setsid sleep 600 & while :; do sleep 1; done", timeout=1.0)
    assert result.timed_out and result.exit_code == 137 and time.monotonic() - started < 300
    agent.write("victim/calc.py", "import time\ntime.sleep(600)\n")
    run = agent.run_tests(timeout=1.0)
    assert run.status == "timeout" and run.outcomes == {}
    assert agent.exec("ps aux 2>/dev/null | grep -c '[s]leep 60'; ls /proc | grep -c '^[0-9]'").output.split()[0] in "0"


def test_background_processes_die_with_the_call(agent):
    begun = agent.exec("(setsid sh -c 'echo $$ > /tmp/mine; mv /tmp/mine /tmp/pid; exec sleep 1234' >/dev/null 2>&1 &)\n"
                       "until test -e /tmp/pid; do sleep 0.05; done; grep -c sleep /proc/$(cat /tmp/pid)/cmdline")
    assert begun.output == "1\n"
    assert agent.exec("grep -q sleep /proc/$(cat /tmp/pid)/cmdline").exit_code != 0


def test_output_is_bounded_with_both_ends(agent):
    result = agent.exec("echo start; head -c 30000000 /dev/zero | tr '\\0' x; echo end", timeout=30)
    assert result.output.startswith("start\n") and result.output.endswith("end\n") and "left out" in result.output
    assert len(result.output) < 70_000


def test_identity_and_reach(agent, world):
    script = "id -u; id -G; grep -E '^Cap(Eff|Prm|Bnd)' /proc/self/status; grep NoNewPrivs /proc/self/status"
    lines = agent.exec(script).output.splitlines()
    if os.geteuid() == 0 or world.provider.kind == "docker":
        assert int(lines[0]) > 1_000_000 and lines[1] == lines[0]
    assert [int(line.split()[1], 16) for line in lines[2:4]] == [0, 0] and lines[-1].split()[1] == "1"
    for command in ("touch /usr/x", "touch /opt/qcn/x", "touch /x", "ls /work", "cat /proc/1/environ", "kill -9 1",
                    "su -c id", "mount -t tmpfs x /tmp", "chown 0 README.md", "mknod x c 1 3"):
        assert agent.exec(command).exit_code != 0, command
    assert agent.exec("hostname; cat /proc/net/dev").output.count(":") == 1  # the loopback device alone


def test_workspaces_cannot_see_each_other(world, agent):
    if os.geteuid() != 0 and world.provider.kind == "local":
        pytest.skip("without root all workspaces have one user")
    with world.provider.create(world.spec.name) as other:
        other.write("secret.txt", "s3cret")
        root = other.exec("readlink -f .").output.strip()
        place = other.exec("python -c 'import os; print(os.path.realpath(\".\"))'").output.strip()
        assert root == place == "/testbed"
        assert "s3cret" not in agent.exec("cat /work/*/repo/secret.txt /proc/*/cwd/secret.txt 2>&1; "
                                          "for i in $(seq 1 200); do cat /work/$i/repo/secret.txt; done 2>&1").output
        assert other.exec("id -u").output != agent.exec("id -u").output


def test_run_python(agent):
    script = textwrap.dedent("""
        def main(args):
            import sys
            seen = []
            class Plugin:
                def pytest_runtest_call(self, item):
                    seen.append(item.nodeid)
            status, outcomes, messages = run_pytest(args["ids"], plugins=[Plugin()])
            return [status, seen, outcomes, "victim.calc" in sys.modules, ROOT.endswith("repo")]
    """)
    result = agent.run_python(script, {"ids": [PASSING[0]]})
    assert result.status == "ok", result
    assert result.value == [0, [PASSING[0]], {PASSING[0]: "passed"}, True, True]
    failed = agent.run_python("def main(args):\n    return 1 / args\n", 0)
    assert failed.status == "error" and failed.error == "ZeroDivisionError: division by zero"
    assert agent.run_python("def main(args):\n    import time; time.sleep(600)", timeout=0.5).status == "timeout"
    assert agent.run_python("def main(args):\n    import os; os._exit(0)").status == "killed"


def test_memory_limit(agent):
    agent.write(SOURCE, "blocks = [bytearray(1 << 26) for _ in range(100)]\n")
    run = agent.run_tests()
    assert not run.passed(FAILING) and run.status in ("ok", "out_of_memory")
    assert "MemoryError" in str(run.messages) or run.status == "out_of_memory"
    assert agent.exec("echo alive").output == "alive\n"


def test_full_disk_is_one_workspaces_own_affair(world, agent):
    """What fills the space that workspaces share is cut back when the job ends; the others go on."""
    with world.provider.create(world.spec.name) as other:
        result = agent.exec("for i in $(seq 20); do head -c 15000000 /dev/zero > big$i; done 2>/dev/null; echo tried")
        assert "tried" in result.output and "disk full" in result.output
        other.write("large.txt", "x" * 1_500_000)
        assert other.run_tests(FAILING).passed(FAILING)
    assert agent.exec("echo x > small && cat small").output == "x\n"


def test_a_dead_server_is_an_infrastructure_failure_and_replaced(world, agent):
    if world.provider.kind == "docker":
        world.provider.client.api.kill(agent._server.stream.container)
    else:
        agent._server.stream.process.kill()
    _wait(lambda: not agent._server.alive())
    with pytest.raises(SandboxError):
        agent.run_tests()
    with world.provider.create(world.spec.name) as place:
        assert place.run_tests(FAILING).passed(FAILING)


def test_container_isolation_gives_each_sandbox_a_server(world, tmp_path):
    with make_provider(world.provider.kind, world.provider.state_dir, "container") as provider:
        provider.prepare(world.spec)
        first, second = provider.create(world.spec.name), provider.create(world.spec.name, role="grading")
        assert first._server is not second._server
        first.write("x.txt", "1")
        assert second.exec("ls /work/; cat x.txt").exit_code != 0
        first.destroy()
        assert not first._server.alive() and second.run_tests(FAILING).passed(FAILING)
        second.destroy()


def test_failed_creation_leaves_no_server(world, monkeypatch):
    with make_provider(world.provider.kind, world.provider.state_dir, "container", Limits(disk_mb=4)) as provider:
        provider.prepare(world.spec)
        started, real = [], provider._start
        monkeypatch.setattr(provider, "_start", lambda *given: started.append(real(*given)) or started[-1])
        with pytest.raises(OSError, match="cannot be made"):
            provider.create(world.spec.name, {"large.txt": "x" * 8_000_000})
        assert len(started) == 1 and not started[0].alive()


def test_threads_share_one_server_per_role(world, monkeypatch):
    with make_provider(world.provider.kind, world.provider.state_dir) as provider:
        provider.prepare(world.spec)
        started, real, runs = [], provider._start, []
        monkeypatch.setattr(provider, "_start", lambda *given: started.append(real(*given)) or started[-1])

        def work():
            with provider.create(world.spec.name) as place:
                runs.append(place.run_tests(PASSING[:1]).passed(PASSING[:1]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runs == [True] * 4 and len(started) == 1


HOST = """
import sys, time, pathlib
from tests.sandboxes import make_provider, RepositorySpec
provider = make_provider(sys.argv[1], pathlib.Path(sys.argv[2]))
spec = RepositorySpec("victim==1.2.3", sys.argv[3])
provider.prepare(spec)
place = provider.create(spec.name)
place.write("victim/calc.py", "import time\\ntime.sleep(1000)\\n")
print(place._server.facts["pid"], flush=True)
place.run_tests(timeout=900.0)
"""


def test_kill_of_the_host_leaves_nothing(world):
    """SIGKILL of the program in the middle of a test run: server, tests and container go with it."""
    host = subprocess.Popen([sys.executable, "-c", HOST, world.provider.kind, world.provider.state_dir,
                             world.spec.archive], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert int(host.stdout.readline()) > 0
    started = 1 if world.provider.kind == "docker" else 4  # the server, what it forks from, and the tests
    _wait(lambda: len(_footprint(world, host.pid)) >= started)
    before = _footprint(world, host.pid)
    os.kill(host.pid, signal.SIGKILL)
    host.wait()
    _wait(lambda: not _alive(world, before))


def _wait(holds) -> None:
    """Returns when a condition holds, however busy the machine is."""
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _footprint(world, host: int) -> list[str]:
    """Processes (local) or containers (docker) that a host process started."""
    if world.provider.kind == "docker":
        containers = world.provider.client.api.containers(all=True, filters={"label": ["qcn_jax.owner"]})
        return [c["Id"] for c in containers if c["Labels"]["qcn_jax.owner"].split("-")[0] == str(host)]
    return [pid for pid in filter(str.isdigit, os.listdir("/proc")) if int(pid) != host and _descends(int(pid), host)]


def _alive(world, found: list[str]) -> list[str]:
    if world.provider.kind == "docker":
        return [c["Id"] for c in world.provider.client.api.containers(all=True) if c["Id"] in found]
    return [pid for pid in found if os.path.exists(f"/proc/{pid}/exe") and _state(int(pid))[0] != "Z"]


def _state(pid: int) -> list[str]:
    """State and parent of a process, or nothing."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return ["Z", "0"]


def _descends(pid: int, host: int) -> bool:
    while pid > 1:
        pid = int(_state(pid)[1])
        if pid == host:
            return True
    return False


def test_a_selection_collects_what_is_wanted_and_items_of_other_names_are_found(agent):
    agent.write("tests/test_many.py", textwrap.dedent("""\
        class TestA:
            def test_one(self):
                pass

            def test_two(self):
                pass


        class TestB(TestA):
            pass


        def many():
            pass


        def test_seen(request):
            assert [item.name for item in request.session.items] == ["test_one", "test_seen"]
        """))
    wanted = ["tests/test_many.py::test_seen", "tests/test_many.py::TestB::test_one"]
    assert agent.run_tests(wanted).outcomes == dict.fromkeys(wanted, "passed")
    agent.write("tests/conftest.py", textwrap.dedent("""\
        import pytest


        def pytest_pycollect_makeitem(collector, name, obj):
            if name == "many":
                return [pytest.Function.from_parent(collector, name="test_made", callobj=obj)]
        """))
    made = "tests/test_many.py::test_made"
    assert agent.run_tests([made]).outcomes == {made: "passed"}
