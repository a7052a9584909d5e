"""What one sandbox does to the others of its server: ends it, slows it, reads from it, leaves things behind.

Each attack runs with a neighbour alive on the same server; afterwards the neighbour's files are there and it works.
"""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from qcn_jax.envs.sandbox.base import SandboxError
from qcn_jax.envs.sandbox.inside import accounting
from tests.sandboxes import BROKEN, PASSING, SOURCE, agent, world  # noqa: F401

DEEP = ("import os\nos.chdir(%r)\nfor _ in range(20_000):\n    os.mkdir('d')\n    os.chdir('d')\n"
        "open('end', 'w').close()\n")
HALF = "\ud800"  # half a character: no file name and no UTF-8 text


@pytest.fixture
def neighbour(world, agent):
    """Another sandbox on the server of `agent`; after the test it stands as it stood."""
    with world.provider.create(world.spec.name) as place:
        place.write("mine.txt", "mine")
        assert place._server is agent._server
        yield place
        assert place.read("mine.txt") == "mine" and place.run_tests(PASSING[:1]).passed(PASSING[:1])
        assert place.changes() == {"mine.txt": "mine"}


@pytest.mark.parametrize("folder", [".", "/tmp"])
def test_20000_nested_folders(agent, neighbour, folder):
    result = agent.exec(f"cd {folder} && python -c \"{DEEP % '.'}\"", timeout=60)
    assert result.exit_code == 0, result
    assert agent.changes() == {}
    if folder == "/tmp":
        agent.destroy()
    else:
        agent.reset()
        assert agent.exec("ls -A | grep -x d").output == ""


@pytest.mark.parametrize("command", [
    "mkdir s; chmod 1777 s; mkdir s/t; touch s/x s/t/y; chmod 0 s/t; chmod 1000 s", "chmod 0 . ..", "rm -rf ../repo ../home ../tmp",
    "cd ..; rm -rf repo; ln -s /proc/self repo", "cd ..; rm -rf repo; mkfifo repo", "cd ..; chmod 0 tmp home; rm -rf repo; touch repo",
    "python -c \"import os; os.rename('../repo', '../tmp/repo'); os.symlink('/', '../repo')\"",
    "python -c \"import os; [open(b'\\xff%d' % i, 'w') for i in range(999)]; os.mkfifo('p'); os.mkdir('a' * 255)\""])
def test_folders_that_resist(agent, neighbour, command):
    agent.exec(command)
    for call in (agent.changes, lambda: agent.read("x"), lambda: agent.write("x/y", ""), lambda: agent.run_tests(PASSING[:1], timeout=1),
                 agent.diff, agent.fork):
        try:
            call()
        except OSError:
            pass  # its own affair
    agent.reset()
    assert agent.run_tests(PASSING[:1]).passed(PASSING[:1]) and agent.read(SOURCE) == BROKEN
    agent.exec(command)
    agent.destroy()


@pytest.mark.parametrize("path", ["a\0b", HALF, f"a/{HALF}/b", "x" * 300, "d/" * 20_000 + "x", SOURCE + "/x", "", ".", "victim"])
def test_paths_that_are_none(agent, neighbour, path):
    for call in (lambda: agent.read(path), lambda: agent.write(path, "x")):
        with pytest.raises(OSError):
            call()
    assert agent.run_tests([path, f"{path}::x", PASSING[0]], timeout=5).outcomes.get(PASSING[0], "passed") == "passed"
    assert agent.read(SOURCE) == BROKEN


def test_texts_that_are_none(agent, neighbour):
    with pytest.raises(OSError):
        agent.write("x.txt", HALF)
    for command, env in (("a\0b", None), (HALF, None), ("true", {"A": "\0"}), ("true", {"A=B": "x"}), ("true", {"": HALF}),
                         ("true", {"A": 5}), ("x" * 3_000_000, None)):
        assert agent.exec(command, env=env).exit_code in (0, 70)
    assert agent.exec("echo alive").output == "alive\n"


@pytest.mark.parametrize("overlay", [
    {"a\0b": "x"}, {HALF: "x"}, {"x": HALF}, {"x" * 300: "x"}, {"d/" * 20_000 + "x": "x"}, {"a": "x", "a/b": "x"}, {"": "x"},
    {"../../x": "x"}, {"victim/../../../x": "x"}, {"../repo": "x"}, {".": "x"}, {SOURCE: 5}, {"d/" * 1500 + "x": "x", SOURCE: HALF}],
    ids=lambda overlay: next(iter(overlay))[:12].encode("unicode_escape").decode())
def test_overlays_that_are_none(world, agent, neighbour, overlay):
    with pytest.raises(OSError):
        world.provider.create(world.spec.name, overlay)
    assert agent.exec("ls -d /work/x /x").exit_code != 0
    with world.provider.create(world.spec.name) as place:  # the same server has room for another
        assert place._server is agent._server and place.run_tests(PASSING[:1]).passed(PASSING[:1])


def test_changes_are_bounded(agent, neighbour):
    """What is told about changes fits the server's memory, however large they are."""
    agent.exec("python -c \"import os\nfor n in range(9): open(f'f{n}', 'w').write('x' * 1_900_000)\"")
    assert sum(map(len, agent.changes().values())) <= 8_000_000


LINKS = ("/proc/self/timerslack_ns", "/proc/self/maps", "/proc/self/environ", "/proc/self/cmdline", "/proc/self/fd/0",
         "/proc/thread-self/comm", "/proc/self/coredump_filter", "/proc/self/oom_score_adj", "/proc/1/cmdline", "/dev/stdin")


@pytest.mark.parametrize("how", ["link", "chain", "folder", "root", "long way", "testbed"])
def test_links_into_the_servers_proc(agent, neighbour, how):
    """The server reads and writes nothing of its own for an agent, whichever way a link leads."""
    for number, target in enumerate(LINKS):
        folder, name = target.rsplit("/", 1)
        path = f"l{number}"
        link = {"link": f"ln -s {target} {path}", "chain": f"ln -s {target} a{number}; ln -s a{number} {path}",
                "folder": f"ln -s {folder} {path}", "root": f"cd ..; mv repo tmp/r{number}; ln -s {folder} repo",
                "long way": f"mkdir -p m{number}; ln -s ../../../../../../..{target} m{number}/x; ln -s m{number}/x {path}",
                "testbed": f"ln -s /testbed/../../../..{target} {path}"}[how]
        path = {"folder": f"{path}/{name}", "root": name}.get(how, path)
        assert agent.exec(link).exit_code == 0
        with pytest.raises(OSError):
            agent.read(path)
        with pytest.raises(OSError):
            agent.write(path, "777")
        assert path not in agent.changes()
        if how == "root":
            agent.reset()


def test_links_inside_the_repository_are_followed(agent):
    agent.exec("ln -s calc.py victim/alias.py; ln -s victim package; ln -s /testbed/victim absolute; ln -s loop loop")
    for path in ("victim/alias.py", "package/calc.py", "absolute/../package/alias.py", "/testbed/absolute/calc.py"):
        assert agent.read(path) == BROKEN
    agent.write("package/new/x.py", "x = 1\n")
    assert agent.read("victim/new/x.py") == "x = 1\n"
    for path in ("loop", "loop/x"):
        with pytest.raises(OSError):
            agent.read(path)


def test_a_slow_clock_is_nobodys(agent, neighbour):
    agent.exec("ln -s /proc/self/timerslack_ns slack; ln -s /proc/self/timens_offsets offsets")
    for path, text in (("slack", "600000000000"), ("offsets", "monotonic 100000 0")):
        with pytest.raises(OSError):
            agent.write(path, text)
    started = time.monotonic()
    assert neighbour.exec("while :; do :; done", timeout=0.5).timed_out
    assert time.monotonic() - started < 300


LEAVE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for place in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock", "/run", "/var/lock", "/dev", "/var/cache", "/opt", "/"):
    try:
        with open(place + "/note-5ecre7", "w") as stream: stream.write("5ecre7")
        os.chmod(place + "/note-5ecre7", 0o777)
    except OSError: pass
libc.shmget(0x5ecf, 4096, 0o1666); libc.semget(0x5ecf, 1, 0o1666); libc.msgget(0x5ecf, 0o1666)
made = libc.shmget(0x5ed0, 4096, 0o1666)
if made >= 0:
    data = ctypes.create_string_buffer(256)
    libc.shmctl(made, 2, data)  # IPC_STAT; then away from its owner, to the neighbour
    ctypes.c_uint32.from_buffer(data, 4).value = %d
    libc.shmctl(made, 1, data)
libc.mq_open(b"/note-5ecre7", os.O_CREAT | os.O_RDWR, 0o666, None)
libc.shm_open(b"/posix-5ecre7", os.O_CREAT | os.O_RDWR, 0o666); libc.sem_open(b"/sema5ecre7", os.O_CREAT, 0o666, 1)
libc.syscall(248, b"user", b"5ecre7", b"5ecre7", 6, -5)  # add_key to the user session's ring
"""
FIND = ("for d in /tmp /var/tmp /dev/shm /dev/mqueue /run /var/lock /run/lock /dev /var/cache /opt /; do ls -A $d; "
        "cat $d/note-5ecre7; done 2>/dev/null | grep 5ecre7; cat /proc/sysvipc/* | grep -v key; python -c \"import ctypes, os\n"
        "libc = ctypes.CDLL(None)\nprint([f for f in (libc.mq_open(b'/note-5ecre7', os.O_RDWR), libc.shmget(0x5ecf, 4096, 0), "
        "libc.shmget(0x5ed0, 4096, 0), libc.semget(0x5ecf, 1, 0), libc.msgget(0x5ecf, 0), libc.shm_open(b'/posix-5ecre7', 2, 0), "
        "libc.syscall(249, b'user', b'5ecre7', None, 0)) if f >= 0])\"")


def test_live_sandboxes_share_no_place(world, agent, neighbour):
    other = int(neighbour.exec("id -u").output)
    agent.write("leave.py", LEAVE % other)
    assert agent.exec("python leave.py").exit_code == 0
    assert neighbour.exec(FIND).output == "[]\n"
    for place in ("/tmp", "/var/tmp", "/dev/shm"):  # each has its own, which lasts as long as the sandbox
        assert agent.exec(f"cat {place}/note-5ecre7").output == "5ecre7", place
        assert neighbour.exec(f"echo other > {place}/note-5ecre7 && cat {place}/note-5ecre7").output == "other\n"
    assert agent.exec("cat /tmp/note-5ecre7 /dev/shm/note-5ecre7").output == "5ecre7" * 2
    agent.destroy()
    with world.provider.create(world.spec.name) as next_one:
        assert next_one.exec(FIND).output == "[]\n"


def test_private_places_work(agent):
    """What honest tests do with them: pools, locks, shared memory, temporary files."""
    result = agent.exec("python -c \"import multiprocessing as m, tempfile, os\n"
                        "from multiprocessing.shared_memory import SharedMemory\n"
                        "lock = m.Lock(); memory = SharedMemory(create=True, size=64); memory.unlink()\n"
                        "assert m.Pool(2).map(abs, [-1, 2]) == [1, 2]\n"
                        "with tempfile.TemporaryDirectory(dir='/tmp') as d: open(d + '/x', 'w').close()\n"
                        "print(oct(os.stat('/tmp').st_mode), oct(os.stat('/var/tmp').st_mode), oct(os.stat('/dev/shm').st_mode))\"")
    assert result.output.split() == ["0o41777"] * 3, result


def test_scratch_is_part_of_the_disk(world, agent, neighbour):
    """All that an agent writes counts once against the bound of disk, wherever it lies, and does not stay at others' cost."""
    agent.exec("for d in /tmp /dev/shm /var/tmp .; do for n in 1 2 3 4 5 6; do head -c 16000000 /dev/zero > $d/f$n; done; done 2>&1")
    left = agent.exec("cat /tmp/f* /dev/shm/f* /var/tmp/f* f* | wc -c").output
    assert int(left.split()[-1]) <= world.provider.limits.disk_mb << 20
    neighbour.exec("head -c 15000000 /dev/zero > /tmp/x && rm /tmp/x && echo room")
    result = neighbour.exec("head -c 15000000 /dev/zero > /tmp/x && rm /tmp/x && echo room")
    assert result.output == "room\n"


MEMORY = {
    "memfd": "import os\nheld = []\nwhile True:\n    held.append(os.memfd_create('x'))\n    for _ in range(15):\n"
             "        os.write(held[-1], bytes(1_000_000))\n    print(len(held) * 15, flush=True)\n",
    "private tmpfs": "import subprocess\nsubprocess.run(['unshare', '-Urm', 'sh', '-c', 'mount -t tmpfs x /mnt || "
                     "mount -t tmpfs x /proc; cd /mnt; df . | grep -q tmpfs || cd /proc; for n in $(seq 80); do head -c 15000000 "
                     "/dev/zero > f$n || break; echo $((n * 15)); done'])\n",
    "System V": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\nfor n in range(80):\n"
                "    made = libc.shmget(0, 15_000_000, 0o1600)\n    if made < 0: break\n"
                "    place = libc.shmat(made, None, 0)\n    ctypes.memset(place, 1, 15_000_000)\n"
                "    libc.shmdt(ctypes.c_void_p(place))\n    print(n * 15, flush=True)\n"}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_that_no_process_maps(world, agent, neighbour, kind):
    """Files in memory are refused, or bounded like other memory."""
    agent.write("fill.py", MEMORY[kind])
    lines = agent.exec("python fill.py 2>/dev/null", timeout=20).output.split()
    bound = world.provider.limits.memory_mb + world.provider.limits.disk_mb + 300
    assert int(lines[-1] if lines and lines[-1].isdigit() else 0) <= bound, lines[-3:]


def test_names_are_part_of_the_disk(agent, neighbour):
    """Empty files take no space, and yet the places for them, which all share."""
    agent.exec("python -c \"import os\nos.mkdir('many')\nos.chdir('many')\nfor n in range(250_000): os.symlink('x', str(n))\"", timeout=120)
    assert neighbour.exec("touch /tmp/one new && rm /tmp/one new && echo room").output == "room\n"


def test_one_that_holds_much_makes_room(agent, neighbour):
    """Who holds more than his share gives it up where it is scarce, not who comes later."""
    agent.exec("for n in 1 2 3 4; do head -c 16000000 /dev/zero > f$n; done")
    neighbour.exec("for n in 1 2 3; do head -c 11000000 /dev/zero > f$n; done")
    assert neighbour.exec("ls f*; rm f*").output.split() == ["f1", "f2", "f3"]
    assert agent.exec("ls victim/calc.py f* | wc -l").output < "5\n"


def lineage(world, agent):  # noqa: F811
    """The first process of the agent's server, its child, and so on."""
    if os.geteuid() != 0:
        pytest.skip("only root may reach into a container, and into what may not be traced")
    found = [agent._server.stream.process.pid if world.provider.kind == "local" else world.provider.client.api.inspect_container(
        agent._server.stream.container)["State"]["Pid"]]
    while below := pathlib.Path(f"/proc/{found[-1]}/task/{found[-1]}/children").read_text().split():
        found.append(int(below[0]))
    return found


def bytes_read(world, agent):  # noqa: F811
    """What the agent's server has read so far."""
    return sum(int(pathlib.Path(f"/proc/{pid}/io").read_text().split()[1]) for pid in lineage(world, agent))


def test_files_of_holes(world, agent, neighbour):  # noqa: F811
    """Looking for changes reads no more than could be changes."""
    agent.exec("python -c \"import os\nos.mkdir('h')\nfor n in range(20_000): open(f'h/{n}', 'w').truncate(2_000_000)\"", timeout=60)
    before = bytes_read(world, agent)
    assert agent.changes() == {}
    assert bytes_read(world, agent) - before < 1 << 30


def test_edits_in_mapped_memory_are_seen(agent):
    agent.exec("python -c \"import mmap\nwith open('victim/calc.py', 'r+b') as f, mmap.mmap(f.fileno(), 0) as m: m[3:8] = b'Other'\"")
    assert agent.read(SOURCE).startswith('\"\"\"Other') and list(agent.changes()) == [SOURCE]


def test_ports_are_free_again(agent, neighbour):
    """A server's port stays taken for a minute where the server closed a connection first."""
    agent.exec("python -c \"import socket\ns = socket.create_server(('127.0.0.1', 8765))\nc = socket.create_connection(('127.0.0.1', 8765))\n"
               "a, _ = s.accept()\na.close()\nc.close()\"")
    script = "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 8765))\nprint('free')"
    assert neighbour.exec(f'python -c "{script}"').output == "free\n"


HYDRA = """
import ctypes, os, signal, time
prctl = ctypes.CDLL(None).prctl
prctl(36, 1, 0, 0, 0)  # a reaper of its own, so that orphans come to it
def head():
    os.setsid()
    for n in range(1, 32):
        try: signal.signal(n, signal.SIG_IGN)
        except OSError: pass
    while True:
        parent = os.getppid()
        try:
            if os.fork() == 0: os.setsid()
        except OSError: pass
        end = time.time() + 0.02
        while time.time() < end and os.getppid() == parent: pass
for _ in range(4):
    if os.fork() == 0: head()
"""


def test_what_grows_again_ends(agent, neighbour):
    """Processes that start each other anew as they die are gone when their job is, and the server goes on."""
    agent.write("hydra.py", HYDRA)
    agent.exec("python hydra.py; sleep 0.3", timeout=3)
    mine = agent.exec("id -u").output.strip()
    assert neighbour.exec(f"for p in /proc/[0-9]*; do stat -c %u $p; done 2>/dev/null | grep -c {mine}; true").output == "0\n"


def test_who_keeps_himself_waiting_gets_no_more_time():
    """Only what others take is added to a limit, not what a job's own processes take from each other."""
    script = ("import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nfor _ in range(15):\n    if os.fork() == 0: break\n"
              "else:\n    print('ready', flush=True)\nwhile True: pass\n")

    def times(pid):
        """(seconds that a process ran, seconds that it stood ready)."""
        return [int(field) / 1e9 for field in pathlib.Path(f"/proc/{pid}/schedstat").read_text().split()[:2]]

    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as job:
        try:
            assert job.stdout.read(5) == b"ready"
            pids = [job.pid, *pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
            while sum(times(pid)[0] for pid in pids) < 2.0:
                time.sleep(0.05)
            waited, after = accounting.waited(job.pid), list(map(times, pids))
            assert waited < max(stood for _, stood in after) - 1.0 + max(ran for ran, _ in after)
        finally:
            os.killpg(job.pid, signal.SIGKILL)


def test_a_lost_forking_process_is_replaced(world, agent, neighbour):
    """The process that jobs are forked from may die in the middle of one; what lives in the workspaces stays."""
    resting = lineage(world, agent)
    agent.write("x.txt", "1")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        running = threads.submit(agent.exec, "sleep 60", 60.0)
        while len(lineage(world, agent)) == len(resting):
            time.sleep(0.05)
        os.kill(resting[-1], signal.SIGKILL)
        with pytest.raises(SandboxError, match="forking process is gone"):
            running.result()
    assert agent.exec("cat x.txt").output == "1"
