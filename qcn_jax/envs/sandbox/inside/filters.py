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
# Audit architecture, and numbers of: socket, kill, and what is refused outright.
_CALLS = {
    "x86_64": (0xC000003E, 41, 62, {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272,
                                    "io_uring_setup": 425, "keyctl": 250, "add_key": 248, "pidfd_getfd": 438}),
    "aarch64": (0xC00000B7, 198, 129, {"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "unshare": 97,
                                       "io_uring_setup": 425, "keyctl": 219, "add_key": 217, "pidfd_getfd": 438}),
}
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 13  # EACCES
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
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


def program():
    """The seccomp filter: only Unix sockets, no signal to everyone, none of the refused calls."""
    architecture, socket, kill, refused = _CALLS[os.uname().machine]
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE),
            (_LOAD, 0, 0, _NUMBER),
            (_JUMP_GREATER, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE)]  # the x32 numbers of x86-64
    for number in refused.values():
        code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    code += [(_JUMP_EQUAL, 0, 4, socket), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_JUMP_EQUAL, 0, 1, 1),  # AF_UNIX
             (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    code += [(_JUMP_EQUAL, 0, 4, kill), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_JUMP_EQUAL, 0, 1, 0xFFFFFFFF),
             (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return code


def confine_keys():
    """Keeps a process from key rings, which outlive its sandbox and which no namespace separates, where they can be."""
    if os.uname().sysname != "Linux" or os.uname().machine not in _CALLS:
        return
    architecture, _, _, refused = _CALLS[os.uname().machine]
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE),
            (_LOAD, 0, 0, _NUMBER), (_JUMP_GREATER, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE)]
    for name in ("keyctl", "add_key"):
        code += [(_JUMP_EQUAL, 0, 1, refused[name]), (_RETURN, 0, 0, _REFUSE)]
    try:
        confine_calls([*code, (_RETURN, 0, 0, _ALLOW)])
    except OSError:
        pass  # a kernel without seccomp


def confine_calls(code=None):
    """Installs `program`, or `code`, for this process and what it starts; PR_SET_NO_NEW_PRIVS must be set."""
    instructions = b"".join(struct.pack("HBBI", *step) for step in code or program())
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    header = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(buffer))
    if _libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")
