"""Every command in docs/ runs: the shell blocks of a page in order, its Python blocks as programs, on a quick run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from qcn_jax.testing.processes import QUICK_FLAGS
from tests.conftest import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [path for path in DOCS if re.search(r"^```(bash|python)$", path.read_text(), re.MULTILINE)]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT = 1500  # seconds of one block, on a machine that does other things as well


def run(folder: pathlib.Path, kind: str, text: str) -> str:
    """Runs one block in `folder`, where `qcn`, `python` and configs/ are; returns what it printed."""
    binaries = folder / ".bin"
    binaries.mkdir(exist_ok=True)
    for name, arguments in (("qcn", "-m qcn_jax"), ("python", "")):
        script = binaries / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        script.chmod(0o755)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    as_a_reader = os.environ["XLA_FLAGS"].replace(QUICK_FLAGS, "").strip()  # whose programs are optimised
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "XLA_FLAGS": as_a_reader}
    (folder / "block.py").write_text(text)
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "block.py"]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=TIMEOUT,
                          check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_works(tmp_path):
    """One test, so that runs/quick, which run.md's first command makes, is made once."""
    first, *_ = BLOCK.findall((ROOT / "docs/run.md").read_text())
    assert "--config=configs/nano.py:quick --workdir=runs/quick" in first[1]
    for page in sorted(PAGES, key=lambda path: path.stem != "run"):
        for kind, text in BLOCK.findall(page.read_text()):
            run(tmp_path, kind, text)


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)  # what is code is no link
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_listed():
    index = (ROOT / "docs/README.md").read_text()
    assert {path.name for path in DOCS} - {"README.md"} == set(re.findall(r"\]\(([a-z]+\.md)\)", index))
