"""What a job sent: its output within bounds, and its records, which must be whole, in order and of tests that ran."""

import json

MAX_EVIDENCE = 20_000  # claims of one run
MAX_LISTED = 5000  # modules or files that a repository's first run tells of
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


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
    """(records, damaged): the run's records in order; damaged if a byte stands there that is none of them.

    The last one is incomplete where its writer was killed, at a time limit say.
    """
    found, damaged = [], False
    *lines, last = data.split(b"\n")
    for line in lines:
        if line:
            try:
                record = json.loads(line)
                if record.pop("key") != key or record.pop("n") != len(found):
                    raise ValueError
                found.append(record)
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                damaged = True
    begins = f'{{"key": "{key}", "n": {len(found)}, '.encode()
    cut = last[:len(begins)] == begins[:len(last)] and not any("finished" in record for record in found)
    return found, damaged or bool(last and not cut)


def _texts(value):
    return type(value) is list and len(value) <= MAX_LISTED and all(type(one) is str for one in value)


# What a record of each kind holds; whoever reads it later, on the host too, relies on that.
KINDS = {
    "start": lambda record: type(record["start"]) is str,
    "test": lambda record: (type(record["test"]) is str and record["outcome"] in OUTCOMES
                            and type(record["message"]) is str),
    "claim": lambda record: type(record["claim"]) is int and "value" in record,
    "finished": lambda record: type(record["finished"]) is int and _texts(record["tampered"]),
    "modules": lambda record: _texts(record["modules"]) and _texts(record["opened"]),
}  # fmt: skip


def _sound(record):
    """Whether a record is of a kind that the runner sends, with values of the right types."""
    kind = next((name for name in KINDS if name in record), None)
    try:
        return kind is not None and KINDS[kind](record)
    except (KeyError, TypeError):
        return False


def read(found, damaged):
    """(exit status that the runner announced or None, the reply's part that the records are)."""
    reply = {"outcomes": {}, "messages": {}, "tampered": ["records"] if damaged else [], "evidence": []}
    running, finished = "", None
    for record in found:
        if not _sound(record):
            reply["tampered"].append("records of no kind")
            break
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
