"""The server inside a sandbox: one request at a time on standard input, one reply on standard output.

A frame is two big-endian 32-bit lengths, a JSON document and raw bytes. The server owns the workspaces and the
verdicts' raw material; what is untrusted runs in forks of the zygote, a process of its own that never holds the
pristine tree. The end of standard input, also in the middle of a job, ends everything.
"""

import base64
import contextlib
import json
import os
import random
import secrets
import select
import signal
import socket
import struct
import sys
import time

import door
import filters
import folders
import results
import zygote
from accounting import exit_code, out_of_memory_kills, waited
from frames import read_exactly, send, stdin_open
from workspace import Refused, Tree, Workspace

SHARED = ("/tmp", "/var/tmp", "/dev/shm")  # of the machine, where the sandbox has no root of its own
MAX_RESULT = 16_000_000  # bytes of records from one run; a full suite of 50,000 tests stays below
STARVED = 4.0  # a job that others keep from running gets at most this many times its limit on top
KILL_GRACE = 15.0  # seconds until a killed job must be gone; then the server gives itself up


class Lost(Exception):
    """A job and the process it was forked from are gone; the workspaces are not."""


class Server:
    """Holds trees and workspaces and runs jobs through the zygote."""

    def __init__(self, options):
        self.limits, self.work = options["limits"], options["work"]
        self.separate = options["separate_users"] and os.geteuid() == 0
        # Whether this process is the first of a process namespace: `kill -1` by root must never reach the machine.
        self.contained = options["contained"] and os.getpid() == 1
        if os.geteuid() == 0 and not self.separate and not self.contained:
            raise SystemExit("refusing to run tests as root without users of their own or a process namespace")
        # Far above any real user's id and different for each server, because limits on processes count per id.
        self.uid_base = 1_900_000_000 + 4096 * random.SystemRandom().randrange(2**15)
        self.readable = options["readable"]  # None: no filters, because namespaces contain this process
        self.calls = options["calls"] if filters.known() else None
        self.door = options.get("door") is not None
        self.shared = () if options["own_root"] else SHARED
        self.trees, self.workspaces, self.free, self.users, self.made = {}, {}, [], 0, 0
        self.memory_kills = out_of_memory_kills()
        os.makedirs(self.work, exist_ok=True)
        os.chmod(self.work, 0o711)
        self.nursery, its = socket.socketpair()
        if os.fork() == 0:
            self.nursery.close()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            for descriptor in map(int, os.listdir("/proc/self/fd" if zygote.LINUX else "/dev/fd")):
                if descriptor > 2 and descriptor != its.fileno():
                    with contextlib.suppress(OSError):
                        os.close(descriptor)  # nothing of the server's may reach what is forked from here
            try:
                zygote.nursery(its)
            finally:
                os._exit(0)
        its.close()
        self.zygote = None
        self.new_zygote()

    # --- the zygote

    def new_zygote(self):
        """Takes a process to fork jobs from in place of the last one."""
        if self.zygote is not None:
            self.zygote.close()
        self.zygote, its = socket.socketpair()
        try:
            send(self.nursery, {"kind": "zygote"}, [its.fileno()])
            its.close()
            self.from_zygote()
            for tree in self.trees.values():
                self.preload(tree.settings)
        except (OSError, Lost) as error:
            raise SystemExit(f"the forking process is gone: {error}") from error

    def preload(self, settings):
        if settings["modules"]:
            self.to_zygote({"kind": "preload", "modules": settings["modules"]})
            self.from_zygote()

    def to_zygote(self, message, descriptors=()):
        try:
            send(self.zygote, message, descriptors)
        except OSError as error:
            raise Lost("the forking process is gone") from error

    def from_zygote(self):
        length = struct.unpack(">I", self._read(4))[0]
        return json.loads(self._read(length))

    def _read(self, size):
        data = b""
        while len(data) < size:
            part = self.zygote.recv(size - len(data))
            if not part:
                raise Lost("the forking process is gone")
            data += part
        return data

    def run(self, workspace, job, timeout):
        """Runs a job in a fork; returns (status, how it ended, output, records)."""
        with self.at_work(workspace):
            return self._run(workspace, job, timeout)

    @contextlib.contextmanager
    def at_work(self, workspace):
        """Puts a workspace in the place of the one at work, to which /testbed, /tmp, /var/tmp and /dev/shm lead.

        Paths that tests see, and may have in their ids, are then the same in every sandbox.
        """
        home, now = workspace.home, os.path.join(self.work, "now")
        if os.path.lexists(now):
            folders.erase(now)  # of a workspace that could not be put back
        os.rename(home, now)
        workspace.stand(now)
        try:
            yield
        finally:
            os.rename(now, home)
            workspace.stand(home)

    def _run(self, workspace, job, timeout):
        output_read, output_write = os.pipe()
        result_read, result_write = os.pipe()
        key = secrets.token_hex(8)
        job = {**job, "key": key, "uid": workspace.uid, "contained": self.contained, "calls": self.calls,
               "home": workspace.home, "readable": self.readable, "root": workspace.root,
               "env": self.environment(workspace, job), "sys_path": self.python_path(workspace),
               "libraries": workspace.tree.settings.get("libraries", ()),
               "limits": {**self.limits, "cpu": max(2, int(timeout * self.limits["cpus"]) + 1)}}
        output, result = results.Bounded(self.limits["output"]), bytearray()
        try:
            try:
                self.to_zygote(job, (output_write, result_write))
            finally:
                os.close(output_write)
                os.close(result_write)
            ended, timed_out = self._watch(output_read, output, result_read, result, timeout)
        except Lost:
            self.new_zygote()
            raise
        finally:
            os.close(output_read)
            os.close(result_read)
        text = output.text().replace(workspace.root, "/testbed").replace(workspace.home, "/workspace")
        self.bound_disk()
        if workspace.cut:
            text += f"\n[disk full: the {workspace.cut} largest files of this workspace were removed]\n"
            workspace.cut = 0
        return ended, timed_out, text, results.records(bytes(result), key)

    def bound_disk(self):
        """Keeps workspaces from taking what all share: where that is scarce, those are cut that hold most of it."""
        if not self.scarce():
            return
        share, names = self.limits["disk"] // 4, os.statvfs(self.work).f_files // 4 or sys.maxsize  # some count none
        held = []
        for number, (workspace, _) in self.workspaces.items():
            size, entries = folders.measure(workspace.home)
            held.append((max(size / share, entries / names), number))
        for part, number in sorted(held, reverse=True):
            if part <= 1 or not self.scarce():
                return
            self.workspaces[number][0].shrink(share, names, self.shared)

    def scarce(self):
        """Whether less than a quarter is left of the bytes or of the files that the work folder can hold."""
        space = os.statvfs(self.work)
        return space.f_bavail * 4 < space.f_blocks or space.f_favail * 4 < space.f_files

    def _watch(self, output_read, output, result_read, result, timeout):
        started = time.monotonic()
        deadline, longest = started + timeout, started + (1 + STARVED) * timeout
        pending, ended, timed_out, pid = {output_read, result_read}, None, False, None
        while ended is None or pending:
            left = 0.0 if ended is not None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([*pending, self.zygote, 0], [], [], left)
            if 0 in ready and not stdin_open():
                raise SystemExit("the host is gone")
            for descriptor in pending & set(ready):
                data = os.read(descriptor, 1 << 16)
                if not data:
                    pending.discard(descriptor)
                elif descriptor == output_read:
                    output.add(data)
                elif len(result) < MAX_RESULT:
                    result += data
            if self.zygote in ready:
                message = self.from_zygote()
                pid, ended = message.get("pid", pid), message if "status" in message else None
            if ended is not None and not ready:
                break  # all writers are dead; nothing more can come
            if ended is None and time.monotonic() >= deadline:
                if timed_out:
                    raise Lost("a killed job does not end")
                later = min(longest, started + timeout + waited(pid))
                if later > time.monotonic() + 0.05:
                    deadline = later
                    continue
                timed_out, deadline = True, time.monotonic() + KILL_GRACE
                self.to_zygote({"kind": "kill"})
        return ended, timed_out

    def python_path(self, workspace):
        paths = [os.path.normpath(os.path.join(workspace.home, path))
                 for path in workspace.tree.settings["python_path"]]
        return [*paths, door.packages(workspace.home)] if self.door else paths

    def environment(self, workspace, job):
        base = {"PATH": os.path.dirname(sys.executable) + ":/usr/local/bin:/usr/bin:/bin",
                "HOME": os.path.join(workspace.home, "home"), "TMPDIR": os.path.join(workspace.home, "tmp"),
                "USER": "agent", "LOGNAME": "agent", "SHELL": "/bin/sh", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
                "TZ": "UTC", "TERM": "dumb", "PWD": workspace.root,
                "PYTHONPATH": os.pathsep.join(self.python_path(workspace)), "PYTHONHASHSEED": "0",
                "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        if self.door:
            base |= door.environment(workspace.home, job["kind"] == "exec")
            base["PATH"] += os.pathsep + os.path.join(workspace.home, "home", ".local", "bin")
        return {**base, **workspace.tree.settings["environment"], **job.get("extra_env", {})}

    # --- requests

    def hello(self, request, payload):
        import pytest
        return {"python": ".".join(map(str, sys.version_info[:3])), "pytest": pytest.__version__,
                "separate_users": self.separate, "pid": os.getpid()}, b""

    def load(self, request, payload):
        self.trees[request["tree"]] = Tree(payload, request["settings"])
        self.preload(request["settings"])
        return {}, b""

    def create(self, request, payload):
        return {"workspace": self._create(self.trees[request["tree"]], request["overlay"], request.get("edits", {}),
                                          request.get("guarded", False))}, b""

    def _create(self, tree, overlay, edits, guarded):
        if not self.free:
            self.free, self.users = [self.users], self.users + 1
        number = self.free.pop()
        self.made += 1
        home = os.path.join(self.work, f"{self.made}")
        uid = self.uid_base + number if self.separate else None
        try:
            self.workspaces[self.made] = (Workspace(home, tree, overlay, edits, uid, guarded), number)
        except (OSError, ValueError, Refused) as error:  # ValueError: NUL or half a character in a path or text
            with contextlib.suppress(OSError):
                folders.erase(home)
            self.free.append(number)
            kind = getattr(error, "kind", type(error).__name__ if isinstance(error, OSError) else "NotADirectoryError")
            raise Refused(kind, f"workspace cannot be made: {str(error)[:300]}") from error
        return self.made

    def fork(self, request, payload):
        source = self.workspace(request)
        changed, _ = source.changes()
        edits = {path: None if data is None else data.decode("utf-8", "surrogateescape")
                 for path, data in changed.items()}
        edits |= dict.fromkeys(request.get("without", ()))
        return {"workspace": self._create(source.tree, source.overlay, edits, source.guarded)}, b""

    def reset(self, request, payload):
        workspace = self.workspace(request)
        workspace.remove(self.shared)
        workspace.make()
        return {}, b""

    def destroy(self, request, payload):
        workspace, number = self.workspaces.pop(request["workspace"])
        workspace.remove(self.shared)
        self.free.append(number)  # and not where that failed: the next user of the id would find what is left
        return {}, b""

    def workspace(self, request):
        return self.workspaces[request["workspace"]][0]

    def read(self, request, payload):
        return {}, self.workspace(request).read(request["path"])

    def write(self, request, payload):
        self.workspace(request).write(request["path"], payload)
        return {}, b""

    def changes(self, request, payload):
        changed, skipped = self.workspace(request).changes()
        return {"changed": {path: None if data is None else data.decode("utf-8", "surrogateescape")
                            for path, data in changed.items()}, "skipped": skipped}, b""

    def execute(self, request, payload):
        workspace = self.workspace(request)
        shell = next(path for path in ("/bin/bash", "/bin/sh") if os.path.exists(path))
        job = {"kind": "exec", "shell": shell, "command": request["command"], "extra_env": request["env"]}
        ended, timed_out, output, _ = self.run(workspace, job, request["timeout"])
        return {"exit_code": exit_code(ended["status"]), "timed_out": timed_out, "out_of_memory": self.memory_gone(
            ended, timed_out), "seconds": ended["seconds"], "output": output}, b""

    def tests(self, request, payload):
        workspace = self.workspace(request)
        job = {"kind": request.get("kind", "tests"), "node_ids": request["node_ids"],
               "fail_fast": request["fail_fast"], "evidence": request.get("evidence", False),
               "library": [p for p in sys.path if p and os.path.isdir(p)],
               "pytest_args": workspace.tree.settings["pytest_args"]}
        ended, timed_out, output, (found, damaged) = self.run(workspace, job, request["timeout"])
        finished, reply = results.read(found, damaged)
        if workspace.uid is None:  # nothing but this tells
            reply["tampered"] += workspace.altered()
        reply |= {"status": "ok", "seconds": ended["seconds"], "cpu": ended["cpu"], "output": output,
                  "exit_status": exit_code(ended["status"])}
        if timed_out:
            reply["status"] = "timeout"
        elif self.memory_gone(ended, timed_out) or any(m.startswith("MemoryError") for m in reply["messages"].values()):
            reply["status"] = "out_of_memory"
        elif finished is None or finished != reply["exit_status"]:
            reply["status"] = "killed"
        if job["kind"] == "warm":
            compiled = workspace.compiled()
            return {**reply, "compiled": {path: [len(data), mtime] for path, (data, mtime) in compiled.items()}}, \
                b"".join(data for data, _ in compiled.values())
        return reply, b""

    def python(self, request, payload):
        if request.get("without") is not None:
            copy, _ = self.fork(request, payload)
            try:
                return self.python({**request, **copy, "without": None}, payload)
            finally:
                self.destroy(copy, payload)
        workspace = self.workspace(request)
        job = {"kind": "python", "script": request["script"], "args": request["args"],
               "pytest_args": workspace.tree.settings["pytest_args"]}
        ended, timed_out, output, (found, damaged) = self.run(workspace, job, request["timeout"])
        status = "timeout" if timed_out else "out_of_memory" if self.memory_gone(ended, timed_out) else \
            "killed" if not found or damaged else "ok" if "value" in found[-1] else "error"
        last = found[-1] if found else {}
        return {"status": status, "value": last.get("value"), "error": last.get("error", ""), "output": output +
                last.get("traceback", ""), "seconds": ended["seconds"]}, b""

    def memory_gone(self, ended, timed_out):
        """Whether the kernel killed a process of the job for memory: its count rose since the job before."""
        before, self.memory_kills = self.memory_kills, out_of_memory_kills()
        return self.memory_kills > before and not timed_out and ended["status"] != 0


OPERATIONS = {name: getattr(Server, name) for name in (
    "hello", "load", "create", "fork", "reset", "destroy", "read", "write", "changes", "execute", "tests", "python")}


def serve():
    """Reads requests until standard input ends."""
    options = json.loads(base64.b64decode(sys.argv[1]))
    zygote.prctl(zygote.PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if os.geteuid() == 0 and options["separate_users"]:
        os.setgroups([])
    if options["own_root"] and not os.path.lexists("/dev/shm"):  # with docker; it is in memory and starts empty
        os.symlink("/work/now/shm", "/dev/shm")
    if options.get("door") is not None:
        door.offer(options["door"])
    server = Server(options)
    out = os.dup(1)
    os.dup2(2, 1)  # nothing but frames may reach the host's end
    try:
        answer(server, out)
    finally:
        folders.erase_contents(options["work"])


def answer(server, out):
    """The loop of requests and replies."""
    while True:
        header = read_exactly(8)
        if header is None:
            return
        length, extra = struct.unpack(">II", header)
        request, payload = read_exactly(length), read_exactly(extra)
        if request is None or payload is None:
            return
        request = json.loads(request)
        try:
            reply, data = OPERATIONS[request["op"]](server, request, payload)
        except Refused as error:
            reply, data = {"refused": error.kind, "message": str(error)}, b""
        except OSError as error:
            reply, data = {"refused": type(error).__name__, "message": error.strerror or str(error)}, b""
        except ValueError as error:  # NUL or half a character where a name must be
            reply, data = {"refused": "OSError", "message": str(error)[:300]}, b""
        except Exception as error:  # one sandbox's content must not end the others
            reply, data = {"failed": f"{type(error).__name__}: {error}"[:300]}, b""
        body = json.dumps(reply).encode()
        view = memoryview(struct.pack(">II", len(body), len(data)) + body + data)
        while view:
            view = view[os.write(out, view):]


if __name__ == "__main__":
    try:
        serve()
    except KeyboardInterrupt:
        pass
