"""Messages between the processes of a sandbox, and the host's end of standard input."""

import json
import os
import select
import socket
import struct


def send(sock, message, descriptors=()):
    """One message for the nursery or a zygote, with descriptors."""
    body = json.dumps(message).encode()
    header = struct.pack(">I", len(body))
    if descriptors:
        socket.send_fds(sock, [header], list(descriptors))
    else:
        sock.sendall(header)
    sock.sendall(body)


def stdin_open():
    """False when the host has gone (the host sends nothing while it waits for a reply)."""
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    return all(not event & select.POLLHUP and not event & select.POLLIN for _, event in poll.poll(0))


def read_exactly(size):
    data = bytearray()
    while len(data) < size:
        part = os.read(0, min(1 << 20, size - len(data)))
        if not part:
            return None
        data += part
    return bytes(data)
