"""The local back end's isolation: namespaces and a root of its own, then the server takes this process's place.

Usage: enter.py BASE64_JSON. A new mount, network, process, IPC and host-name namespace; a root made of a size-limited
tmpfs with read-only views of the system's programs, the interpreter and the run time folder, and nothing else of
the machine. As root, tests run under user ids of their own; otherwise a user namespace is made first.
Exit status 97 with one line on standard error: this machine does not allow it.
"""

import base64
import contextlib
import ctypes
import fcntl
import glob
import json
import os
import shutil
import signal
import socket
import struct
import sys

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MS_NOATIME, MS_NODIRATIME, MS_RELATIME = 1024, 2048, 1 << 21
MNT_DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOT_ALLOWED = 97
_libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    """Raises OSError with errno where a system call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind=None, flags=0, data=None):
    """mount(2)."""
    def encode(text):
        return None if text is None else text.encode()
    check(_libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)),
          f"mount {target}")


def bind(source, target):
    """A read-only view of `source`; flags that the outer mount has must be kept inside a user namespace."""
    mount(source, target, None, MS_BIND | MS_REC)
    have, keep = os.statvfs(target).f_flag, 0
    for flag, wanted in ((2, MS_NOSUID), (4, MS_NODEV), (8, MS_NOEXEC), (1024, MS_NOATIME), (2048, MS_NODIRATIME),
                         (4096, MS_RELATIME)):
        keep |= wanted if have & flag else 0
    mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | keep)


def build_root(root, runtime, prefix, megabytes, views):
    """Fills `root` with what a sandbox may see; `views` are further folders, by where it sees them."""
    mount("qcn", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={megabytes}m,nr_inodes=200k,mode=755")
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink("/" + name):
            os.symlink(os.readlink("/" + name), f"{root}/{name}")
        elif os.path.isdir("/" + name):
            os.mkdir(f"{root}/{name}")
            bind("/" + name, f"{root}/{name}")
    places = ["/usr"] + ([] if prefix == "/usr" or prefix.startswith("/usr/") else [prefix])
    for place in places:
        os.makedirs(root + place, exist_ok=True)
        bind(place, root + place)
    os.makedirs(f"{root}/opt/qcn")
    bind(runtime, f"{root}/opt/qcn")
    for place, source in views.items():
        os.makedirs(root + place, exist_ok=True)
        bind(source, root + place)
    # Packages installed on the machine are not the sandbox's: a repaired copy of the repository may be among them.
    for pattern in (prefix + "/lib/python3*/site-packages", "/usr/lib/python3/dist-packages",
                    "/usr/lib/python3*/site-packages", "/usr/local/lib/python3*/*-packages"):
        for place in glob.glob(pattern):
            if os.path.isdir(root + place):
                mount("qcn", root + place, "tmpfs", MS_RDONLY | MS_NOSUID, "size=4k,mode=755")
    for name, mode in (("dev", 0o755), ("etc", 0o755), ("proc", 0o555), ("var", 0o755), ("work", 0o711),
                       (".old", 0o700)):
        os.mkdir(f"{root}/{name}")
        os.chmod(f"{root}/{name}", mode)
    for name in ("null", "zero", "full", "random", "urandom"):
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    # What several sandboxes would share leads to the one that is at work.
    for name, target in (("testbed", "/work/now/repo"), ("tmp", "/work/now/tmp"), ("var/tmp", "/work/now/var"),
                         ("dev/shm", "/work/now/shm"), ("dev/fd", "/proc/self/fd"), ("dev/stdin", "/proc/self/fd/0"),
                         ("dev/stdout", "/proc/self/fd/1"), ("dev/stderr", "/proc/self/fd/2")):
        os.symlink(target, f"{root}/{name}")
    for name, text in (("passwd", "root:x:0:0:root:/:/bin/sh\n"), ("group", "root:x:0:\n"),
                       ("hosts", "127.0.0.1 localhost\n"), ("nsswitch.conf", "hosts: files\n")):
        with open(f"{root}/etc/{name}", "w") as stream:
            stream.write(text)
    for name in ("ld.so.cache", "localtime", "mime.types"):
        if os.path.exists("/etc/" + name):
            shutil.copyfile("/etc/" + name, f"{root}/etc/{name}")
    if os.path.isdir("/etc/alternatives"):
        shutil.copytree("/etc/alternatives", f"{root}/etc/alternatives", symlinks=True)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def loopback_up():
    """The new network namespace has nothing but a loopback device; tests may use it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    # Otherwise a port stays taken for a minute after its connection was closed, also for the next workspace.
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/tcp_max_tw_buckets", "w") as stream:
        stream.write("0")


def isolate(settings):
    """Builds everything in the process that becomes the server."""
    root = os.path.join(settings["runtime"], "root")  # an empty folder to mount on; visible to this namespace only
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    build_root(root, settings["runtime"], settings["prefix"], settings["megabytes"],
               settings["views"])
    loopback_up()
    socket.sethostname("sandbox")
    os.chdir(root)
    check(_libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b".old"), "pivot_root")
    os.chdir("/")
    check(_libc.umount2(b"/.old", MNT_DETACH), "umount")
    os.rmdir("/.old")


def main():
    """Makes the namespaces, forks into the process namespace, and waits there for the end."""
    settings = json.loads(base64.b64decode(sys.argv[1]))
    uid, gid = os.geteuid(), os.getegid()
    try:
        check(_libc.unshare(NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET | (0 if uid == 0 else NEWUSER)), "unshare")
        if uid != 0:
            for name, text in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
                with open(f"/proc/self/{name}", "w") as stream:
                    stream.write(text)
    except (OSError, KeyError) as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_ALLOWED)
    pid = os.fork()
    if pid != 0:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(pid, 0)
        sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: the namespace dies with the process that waits
    try:
        isolate(settings)
    except (OSError, KeyError) as error:
        print(error, file=sys.stderr)
        os._exit(NOT_ALLOWED)
    python = "/opt/qcn/bin/python"
    os.execve(python, [python, "-B", "/opt/qcn/inside/server.py", settings["options"]],
              {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"})


if __name__ == "__main__":
    main()
