"""Builds a page's sources inside a sandbox, in a job of its own; `main` is called by the sandbox's server."""

import json
import os
import resource
import subprocess


def main(args):
    """Returns {"files": {name: base64}} or {"fault": words} as build.mjs says, {"ended": status} where it does not."""
    folder, request = args["folder"], {**args["request"], "tree": ROOT}  # noqa: F821 (the server gives it)
    command = [f"{folder}/node", "--no-warnings", "--permission", f"--max-old-space-size={args['heap_mb']}",
               *(f"--allow-fs-read={place}" for place in (folder, request["modules"], ROOT)),  # noqa: F821
               "--allow-addons", "--allow-child-process", f"{folder}/build.mjs"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing is written but to pipes
    resource.setrlimit(resource.RLIMIT_DATA, 2 * (2 * args["heap_mb"] << 20,))  # of Node, and of esbuild
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "NODE_ENV": "production"}, cwd=ROOT)  # noqa: F821
    with process.stdin as stream:
        stream.write(json.dumps(request).encode())
    said = process.stdout.read(args["most"] + 1)
    if len(said) > args["most"]:
        process.kill()
    status = process.wait()
    try:
        return {"ended": status} if status or len(said) > args["most"] else json.loads(said)
    except ValueError:
        return {"ended": status}
