"""Builds pages whose suites say `"build": "vite"`: sources in, the files of a site out.

The sources are whoever's who wrote the patch. Vite runs in a copy of the sandbox that holds no tests and no links, in a
job that ends before the browser's begins: no network, nothing written, time, memory and output bounded. It is
configured in inside/build.mjs alone, and no code of the tree is run. What comes out are names and bytes, which the
driver serves from its memory.
"""

import base64
import dataclasses
import functools
import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qcn_jax.envs import names
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.web import runtime
from qcn_jax.envs.web.page_tests import Suite

if TYPE_CHECKING:
    from qcn_jax.envs.web.running import Call

SECONDS = 60.0  # of one build, which takes two; on a busy machine the sandbox's server gives more
HEAP_MB = 1024
MOST_FILES, MOST_BYTES = 400, 6_000_000  # of what is built; in base64 the server's largest reply is not much more
_LINE = re.compile(r"\s*\n.*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Built:
    """The files of a site by path, in base64, and what they are made of; or why there are none, in one line."""

    files: Mapping[str, str]
    fault: str = ""
    sources: tuple[str, ...] = ()

    def showing(self, pages: Sequence[str]) -> Mapping[str, str]:
        """The files; of a build that failed, pages that show why and say it to the console."""
        if not self.fault:
            return self.files
        words = f"the build fails: {self.fault}"
        said = json.dumps(words).replace("<", "\\u003c")
        page = f"<!doctype html><pre>{html.escape(words)}</pre><script>console.error({said})</script>"
        return {name: base64.b64encode(page.encode()).decode() for name in pages}


@functools.cache
def _script() -> str:
    return (pathlib.Path(__file__).parent / "inside" / "build.py").read_text()


def pages_of(suite: Suite) -> list[str]:
    """The pages that tests visit, as files of the site."""
    opened = [step["open"] for test in suite.tests for step in test.steps if "open" in step]
    found = [re.sub(r"[?#].*", "", name, flags=re.DOTALL) for name in (*(test.page for test in suite.tests), *opened)]
    return list(dict.fromkeys(f"{name}index.html" if name == "" or name.endswith("/") else name for name in found))


def build(call: "Call", suite: Suite, hidden: Sequence[str], pages: Sequence[str]) -> Built:
    """Builds the site of a suite.

    Args:
      call: runs a script in the sandbox.
      suite: tells the folder of the site.
      hidden: files of tests, which the build does not find.
      pages: of `pages_of`.

    Raises:
      SandboxError: the build cannot be started.
    """
    request = {"site": suite.site, "pages": list(pages), "modules": runtime.MODULES, "most": MOST_FILES,
               "bytes": MOST_BYTES}
    args = {"folder": runtime.FOLDER, "request": request, "heap_mb": HEAP_MB, "most": 2 * MOST_BYTES}
    reply = call(_script(), args, SECONDS, list(hidden))
    status, value = reply["status"], reply["value"] or {}
    if status == "error":
        raise SandboxError(f"the build cannot be started: {reply['error'][:300]}")
    if status != "ok":
        told = {"timeout": f"it does not end within {SECONDS:g} seconds", "out_of_memory": "it takes too much memory"}
        return Built({}, told.get(status, "it was killed"))
    if "ended" in value:
        return Built({}, f"it takes more than {HEAP_MB} MB of memory" if "out of memory" in reply["output"].lower() else
                     f"Vite ends with status {value['ended']}: {_last(reply['output'])}")
    if "fault" in value:
        return Built({}, _LINE.sub("", str(value["fault"]))[:400])
    files = value.get("files")
    if not isinstance(files, dict) or not all(isinstance(data, str) for data in files.values()):
        return Built({}, "Vite's answer cannot be read")
    for name in files:
        if fault := names.path_fault(name):
            return Built({}, f"{names.shown(name)} {fault}")
    return Built(files, sources=tuple(map(str, value.get("sources") or ())))


def _last(output: str) -> str:
    return next((line.strip()[:200] for line in reversed(output.splitlines()) if line.strip()), "no reason given")
