"""Isolation for a user who may make no namespaces: Landlock for files and signals, seccomp for the network.

Both need no privilege, hold for all descendants and cannot be taken back. Linux 5.13 or newer, x86-64 or AArch64.
"""

import ctypes
import os
import struct

# Bits of a path rule (linux/landlock.h); the versions of the interface added some.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # newer: all sixteen
_FILE_ONLY = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_SCOPE_SOCKETS_AND_SIGNALS = 3
# The numbers of system calls by processor, and of its audit architecture.
_CALLS = {
    "x86_64": {"architecture": 0xC000003E, "socket": 41, "socketpair": 53, "kill": 62, "clone": 56, "clone3": 435,
               "keyctl": 250, "add_key": 248, "request_key": 249, "shmget": 29, "semget": 64, "msgget": 68,
               "unshare": 272, "setns": 308, "io_uring_setup": 425, "bpf": 321, "userfaultfd": 323,
               "memfd_create": 319, "memfd_secret": 447, "ptrace": 101, "process_vm_readv": 310,
               "process_vm_writev": 311, "pidfd_getfd": 438, "prlimit64": 302, "setpriority": 141,
               "sched_setaffinity": 203, "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314,
               "ioprio_set": 251},
    "aarch64": {"architecture": 0xC00000B7, "socket": 198, "socketpair": 199, "kill": 129, "clone": 220, "clone3": 435,
                "keyctl": 219, "add_key": 217, "request_key": 218, "shmget": 194, "semget": 190, "msgget": 186,
                "unshare": 97, "setns": 268, "io_uring_setup": 425, "bpf": 280, "userfaultfd": 282,
                "memfd_create": 279, "memfd_secret": 447, "ptrace": 117, "process_vm_readv": 270,
                "process_vm_writev": 271, "pidfd_getfd": 438, "prlimit64": 261, "setpriority": 140,
                "sched_setaffinity": 122, "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274,
                "ioprio_set": 30},
}
# What makes objects that outlive their process and that other users' processes find: key rings, System V.
OUTLIVING = ("keyctl", "add_key", "request_key", "shmget", "semget", "msgget")
# What makes namespaces, in which a process could mount, and what else no test needs of the kernel.
KERNEL = ("unshare", "setns", "io_uring_setup", "bpf", "userfaultfd")
UNCOUNTED = ("memfd_create", "memfd_secret")  # files in memory that no process's own limit counts
TRACING = ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd")
# Calls that act on another process of the same user, and which argument names it; 0 is the caller itself.
ON_OTHERS = {"prlimit64": 0, "setpriority": 1, "sched_setaffinity": 0, "sched_setscheduler": 0, "sched_setparam": 0,
             "sched_setattr": 0, "ioprio_set": 1}
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
SCOPES = 6  # the version of Landlock from which signals stay among the confined
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _MISSING = 0x7FFF0000, 0x00050000 | 13, 0x00050000 | 38  # EACCES, ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version():
    """The kernel's Landlock interface version; 0 where there is none or this processor is not known here."""
    if os.uname().sysname != "Linux" or os.uname().machine not in _CALLS:
        return 0
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def confine_files(readable, writable):
    """Allows reading and executing below `readable`, everything below `writable`, and nothing else."""
    version = landlock_version()
    if version < 1:
        raise OSError("Landlock is not available")
    handled = _ALL.get(version, (1 << 16) - 1)
    attributes = struct.pack("QQQ", handled, 0, _SCOPE_SOCKETS_AND_SIGNALS)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for paths, rights in ((readable, EXECUTE | READ_FILE | READ_DIR), (writable, handled)):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH)
            except OSError:
                continue
            allowed = rights & handled if os.path.isdir(path) else rights & handled & _FILE_ONLY
            rule = struct.pack("=Qi", allowed, descriptor)
            failed = _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
            os.close(descriptor)
            if failed:
                raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
    if _libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


def program(counted, alone, offline):
    """A seccomp filter as (code, jump if true, jump if false, value) steps.

    Args:
      counted: a control group counts all memory, files without a name included.
      alone: other users' processes are out of reach; otherwise also what acts on processes of this user is refused.
      offline: a network namespace keeps sockets in; otherwise only connected pairs are to be had.
    """
    calls = _CALLS[os.uname().machine]
    refused = [*OUTLIVING, *KERNEL, *(() if counted else UNCOUNTED), *(() if alone else TRACING),
               *(() if offline else ("socket",))]
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, calls["architecture"]), (_RETURN, 0, 0, _REFUSE),
            (_LOAD, 0, 0, _NUMBER),
            (_JUMP_GREATER, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE),  # the x32 numbers of x86-64
            # The C library then takes clone, whose flags can be seen here.
            (_JUMP_EQUAL, 0, 1, calls["clone3"]), (_RETURN, 0, 0, _MISSING),
            *_where(calls["clone"], 0, (_JUMP_ANY, NEW_NAMESPACES), _REFUSE, _ALLOW)]
    for name in refused:
        code += [(_JUMP_EQUAL, 0, 1, calls[name]), (_RETURN, 0, 0, _REFUSE)]
    if not alone:
        code += _where(calls["kill"], 0, (_JUMP_EQUAL, 0xFFFFFFFF), _REFUSE, _ALLOW)
        for name, argument in ON_OTHERS.items():
            code += _where(calls[name], argument, (_JUMP_EQUAL, 0), _ALLOW, _REFUSE)
    if not offline:  # a pair of datagram sockets could still send elsewhere, by path
        code += _where(calls["socketpair"], 1, (_JUMP_EQUAL, 1), _ALLOW, _REFUSE, mask=15)
    return [*code, (_RETURN, 0, 0, _ALLOW)]


def _where(number, argument, test, then, otherwise, mask=None):
    """Steps that answer the call `number` by a test of (the lower half of) an argument."""
    masked = [] if mask is None else [(_AND, 0, 0, mask)]
    return [(_JUMP_EQUAL, 0, 4 + len(masked), number), (_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *masked,
            (test[0], 0, 1, test[1]), (_RETURN, 0, 0, then), (_RETURN, 0, 0, otherwise)]


def known():
    """Whether system calls can be refused on this machine."""
    return os.uname().sysname == "Linux" and os.uname().machine in _CALLS


def confine_calls(counted, alone, offline):
    """Installs `program` for this process and what it starts; PR_SET_NO_NEW_PRIVS must be set."""
    instructions = b"".join(struct.pack("HBBI", *step) for step in program(counted, alone, offline))
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    header = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(buffer))
    if _libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")
