"""Forks what is untrusted: a warm process with pytest imported and no secrets in its memory.

The server sends a job and the descriptors for its output and result; the zygote forks, and the child gives up
every privilege before it runs anything. When the child ends, whatever it left behind is killed: as the reaper
of its descendants the zygote sees every orphan, whichever session or process group it moved to.
"""

import array
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import types

import filters
import runner

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER, PR_CAPBSET_DROP = 1, 4, 38, 36, 24
LINUX = sys.platform == "linux"
_NEVER_PRELOADED = {"antigravity", "this", "__main__", "test", "idlelib", "turtle"}
PRELOAD_SECONDS = 10.0  # for the modules of one repository; all others' requests wait
SHARED_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option, value=0):
    """prctl(2) where there is one."""
    return _libc.prctl(option, value, 0, 0, 0) if LINUX else 0


def drop_capabilities():
    """Gives up every capability of this thread (needed where uid 0 of a user namespace runs the tests)."""
    for capability in range(64):
        if prctl(PR_CAPBSET_DROP, capability) != 0:
            break
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    _libc.capset(ctypes.create_string_buffer(header), ctypes.create_string_buffer(24))


def receive(sock):
    """One job: a header with the body's length and descriptors, then the JSON body; None at the end."""
    data, ancillary, _, _ = sock.recvmsg(4, socket.CMSG_SPACE(8 * array.array("i").itemsize))
    if not data:
        return None, []
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    while len(data) < 4:
        data += sock.recv(4 - len(data))
    length, body = struct.unpack(">I", data)[0], b""
    while len(body) < length:
        part = sock.recv(min(1 << 20, length - len(body)))
        if not part:
            return None, list(descriptors)
        body += part
    return json.loads(body), list(descriptors)


def children():
    """Direct children of this process."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as stream:
            return [int(pid) for pid in stream.read().split()]
    except OSError:
        return None


def sweep(uid, group):
    """Kills every descendant (and every process of `uid`, when it is a workspace's own); returns how many died."""
    killed, started = 0, time.monotonic()
    while True:
        alive = children()
        if alive is None:  # no /proc: the process group is all that can be reached
            try:
                os.killpg(group, signal.SIGKILL)
            except OSError:
                pass
            alive = []
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        reaped = reap()
        killed += len(reaped)
        if not alive or time.monotonic() - started > 10:
            return killed
        if killed > 8 and uid is not None:
            _kill_uid(uid)  # something forks faster than one by one: kill them all at once
        time.sleep(0.0005)


def _kill_uid(uid):
    if uid == 0:
        return  # kill(-1) as root would reach every process of the machine
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            if os.getresuid() == (uid, uid, uid):
                os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def reap():
    """(pid, status, usage) of every child that has ended."""
    ended = []
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status, usage))


def confine(job):
    """In the child: limits, then identity; afterwards nothing can be regained."""
    limits = job["limits"]

    def limit(name, value):
        number = getattr(resource, name, None)
        if number is not None and value is not None:
            _, hard = resource.getrlimit(number)
            value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
            resource.setrlimit(number, (value, value))

    limit("RLIMIT_AS", limits["memory"])
    limit("RLIMIT_DATA", limits.get("data"))
    limit("RLIMIT_FSIZE", limits["file"])
    limit("RLIMIT_NPROC", limits["processes"])
    limit("RLIMIT_CPU", limits["cpu"])
    limit("RLIMIT_NOFILE", 1024)
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_MSGQUEUE", 0)  # POSIX queues outlive their makers, and all sandboxes of a server would find them
    if LINUX:
        try:
            with open("/proc/self/oom_score_adj", "w") as stream:
                stream.write("1000")  # when memory runs out this dies first, never the server
        except OSError:
            pass
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    elif os.geteuid() == 0:
        if not job["contained"]:
            raise PermissionError("refusing to run anything as root outside a namespace")
        drop_capabilities()
    if job["readable"] is not None:
        filters.confine_files(job["readable"], [job["home"], *SHARED_DEVICES])
    if job["calls"] is not None:
        filters.confine_calls(**job["calls"])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)  # siblings of the same user may not trace it or open its descriptors


def child(job, output, result, close):
    """In the fork: becomes the job; never returns."""
    status = 70
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        for descriptor in close:
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(null)
        os.close(output)
        os.umask(0o022)
        confine(job)
        os.chdir(job["root"])
        os.environ.clear()
        os.environ.update(job["env"])
        if job["kind"] == "exec":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, a shell's children must not
            os.execve(job["shell"], [job["shell"], "-c", job["command"]], job["env"])
        status = python_child(job, result)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            pass
        os._exit(status & 0xFF)


def python_child(job, result):
    """Runs one of the runner's functions as if this were a fresh interpreter in the workspace."""
    # The program's own folder is no place for the tested code to import from.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [*job["sys_path"], *(path for path in sys.path if path and os.path.abspath(path) != here)]
    for name in ("accounting", "door", "evidence", "filters", "folders", "frames", "results", "runner", "server",
                 "workspace", "zygote"):
        sys.modules.pop(name, None)
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["pytest"]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    sys.dont_write_bytecode = True
    runner.give_way(job["libraries"])
    write = runner.writer(result, job["key"])
    return {"tests": runner.run_tests, "python": runner.run_python, "warm": runner.warm}[job["kind"]](job, write)


def nursery(sock):
    """Makes a zygote for each socket that arrives on `sock`; the one before and all it left behind are killed.

    A zygote can be lost (a job that cannot be ended, memory); the server's workspaces then go on with the next. This
    process is forked before the server holds any tree, and so holds none either.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    runner.preload()
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors = receive(sock)
        sweep(None, 0)
        if message is None:
            return
        if os.fork() == 0:
            sock.close()
            try:
                Zygote(socket.socket(fileno=descriptors[0])).serve()
            finally:
                os._exit(0)
        os.close(descriptors[0])


class Zygote:
    """The forking loop, one job at a time; ends when the server's end of the socket closes."""

    def __init__(self, sock):
        self.sock, self.running, self.job, self.started = sock, None, None, 0.0
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_write, False)
        os.set_blocking(self.wake_read, False)

    def serve(self):
        """Runs until the server goes away."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        self.send({"ready": True})
        while True:
            ready, _, _ = select.select([self.sock, self.wake_read], [], [])
            if self.wake_read in ready:
                try:
                    os.read(self.wake_read, 4096)
                except BlockingIOError:
                    pass
                self.collect()
            if self.sock in ready and not self.handle():
                sweep(None, 0)
                return

    def send(self, message):
        body = json.dumps(message).encode()
        self.sock.sendall(struct.pack(">I", len(body)) + body)

    def handle(self):
        job, descriptors = receive(self.sock)
        if job is None:
            return False
        if job["kind"] == "kill":
            if self.running is not None:
                try:
                    os.kill(self.running, signal.SIGKILL)
                except OSError:
                    pass
        elif job["kind"] == "preload":
            end = time.monotonic() + PRELOAD_SECONDS
            for name in job["modules"]:  # as the repository's own run says, and so whatever it likes
                parts = name.split(".")
                if time.monotonic() > end:
                    break
                if parts[0] not in _NEVER_PRELOADED and parts[-1] != "__main__":
                    try:
                        importlib.import_module(name)
                    except BaseException:
                        pass  # only a saving: the tests will import it, or not, themselves
            gc.collect()
            gc.freeze()
            self.send({"ready": True})
        else:
            self.fork(job, descriptors)
        return True

    def fork(self, job, descriptors):
        output, result = descriptors
        self.job, self.started = job, time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(job, output, result, [self.sock.fileno(), self.wake_read, self.wake_write])
        for descriptor in descriptors:
            os.close(descriptor)
        self.running = pid
        self.send({"pid": pid})

    def collect(self):
        for pid, status, usage in reap():
            if pid == self.running:
                seconds = time.monotonic() - self.started
                left = sweep(self.job["uid"], pid)
                self.running = None
                self.send({"status": status, "seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime,
                           "peak": usage.ru_maxrss, "left": left})
