"""What a job sent: its output within bounds, and its records, which must be whole, in order and of tests that ran."""

import json

MAX_EVIDENCE = 20_000  # claims of one run


class Bounded:
    """Keeps the first and last half of `limit` bytes of a stream."""

    def __init__(self, limit):
        self.half, self.head, self.tail, self.total = limit // 2, b"", b"", 0

    def add(self, data):
        self.total += len(data)
        room = self.half - len(self.head)
        self.head += data[:room] if room > 0 else b""
        rest = data[max(room, 0):]
        if rest:
            self.tail = (self.tail + rest)[-self.half:]

    def text(self):
        dropped = self.total - len(self.head) - len(self.tail)
        middle = f"\n[... {dropped} bytes left out ...]\n".encode() if dropped else b""
        return (self.head + middle + self.tail).decode("utf-8", "replace")


def records(data, key):
    """(records, damaged): the run's records in order; damaged if a byte stands there that is none of them."""
    found, damaged = [], False
    for line in data.split(b"\n"):
        if line:
            try:
                record = json.loads(line)
                if record.pop("key") != key or record.pop("n") != len(found):
                    raise ValueError
                found.append(record)
            except (ValueError, KeyError, AttributeError, TypeError):
                damaged = True
    return found, damaged


def read(found, damaged):
    """(exit status that the runner announced or None, the reply's part that the records are)."""
    reply = {"outcomes": {}, "messages": {}, "tampered": ["records"] if damaged else [], "evidence": []}
    running, finished = "", None
    for record in found:
        if finished is not None and "modules" not in record:
            reply["tampered"].append("records after the end")
            break
        if "start" in record:
            running = record["start"]
        elif "test" in record:
            # A test that never started can only be a file, or a test whose file could not be read.
            if record["test"] != running and record["outcome"] != "error":
                reply["tampered"].append("records out of order")
            reply["outcomes"][record["test"]] = record["outcome"]
            if record["message"]:
                reply["messages"][record["test"]] = record["message"]
        elif "claim" in record:
            if len(reply["evidence"]) < MAX_EVIDENCE:
                reply["evidence"].append([running, record["claim"], record["value"]])
        elif "finished" in record:
            finished = record["finished"]
            reply["tampered"] += record["tampered"]
        elif "modules" in record:
            reply |= {"modules": record["modules"], "opened": record["opened"]}
    return finished, reply
