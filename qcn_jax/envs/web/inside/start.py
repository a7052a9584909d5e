"""Starts the driver inside a sandbox and collects what it says; `main` is called by the sandbox's server."""

import json
import os
import subprocess


def main(args):
    """Returns the rows that the driver wrote, and its exit status; what it says to people is the job's output."""
    read, write = os.pipe()
    folder = args["folder"]
    command = [f"{folder}/node", f"{folder}/driver.mjs", f"{folder}/playwright", str(write)]
    environment = {**os.environ, "FONTCONFIG_FILE": f"{folder}/fonts.conf", "XDG_CACHE_HOME": os.environ["HOME"]}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(write,), env=environment,
                               cwd=os.environ["TMPDIR"])
    os.close(write)
    with process.stdin as stream:
        stream.write(json.dumps({**args["request"], "root": ROOT}).encode())  # noqa: F821 (the server gives it)
    with os.fdopen(read, "rb") as stream:
        rows = [json.loads(line) for line in stream.read().splitlines()]
    return {"rows": rows, "status": process.wait()}
