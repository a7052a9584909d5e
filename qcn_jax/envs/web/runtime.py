"""What a browser in a sandbox needs beside the page: Playwright's driver with its Node, and fonts' configuration.

Playwright's Python package (extra `web`) carries both; Chromium is Debian's, of the machine for local sandboxes and of
an image layer for docker.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import tempfile

from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.repository import lock

CHROMIUM = "/usr/lib/chromium/chromium"  # Debian's program itself, behind its launcher
FOLDER = "/opt/qcn-web"  # where sandboxes have it
MODULES = "/opt/qcn-modules"  # and the modules that pages are built from
PACKAGES = ("chromium", "fonts-dejavu-core", "fonts-liberation", "libatomic1")  # Debian's, in the image
INSIDE = pathlib.Path(__file__).parent / "inside"
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts/truetype/dejavu</dir><dir>/usr/share/fonts/truetype/liberation</dir>
<cachedir prefix="xdg">fontconfig</cachedir>
<alias><family>sans-serif</family><prefer><family>DejaVu Sans</family></prefer></alias>
<alias><family>serif</family><prefer><family>DejaVu Serif</family></prefer></alias>
<alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""


def missing(kind: str = "local") -> str:
    """Why pages cannot be opened here in sandboxes of `kind` (local, docker); "" where they can."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed; pip install 'qcn_jax[web]'"
    if kind == "local" and not os.access(CHROMIUM, os.X_OK):
        return f"no Chromium at {CHROMIUM}; apt-get install chromium"
    return ""


INSTALL = ("mkdir -p /var/cache/apt/archives/partial /var/lib/apt/lists/partial /tmp && apt-get update -qq && "
           "apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-unsafe-io "
           f"{' '.join(PACKAGES)} && rm -rf /var/lib/apt/lists/*")


def check(kind: str) -> None:
    """Raises SandboxError where pages cannot be opened."""
    if reason := missing(kind):
        raise SandboxError(f"pages are tested in a browser: {reason}")


@functools.cache
def driver_folder() -> pathlib.Path:
    """The folder of Playwright's package that holds `node` and `package`."""
    spec = importlib.util.find_spec("playwright")
    assert spec is not None and spec.origin is not None  # `check` came before
    return pathlib.Path(spec.origin).parent / "driver"


@functools.cache
def digest() -> str:
    """A hash of everything in the folder."""
    found = hashlib.sha256(importlib.metadata.version("playwright").encode() + _FONTS.encode())
    for source in sorted(INSIDE.glob("*.mjs")):
        found.update(source.read_bytes())
    return found.hexdigest()[:12]


def folder(state_dir: str, kind: str) -> str:
    """The folder that sandboxes see as FOLDER; made once.

    Raises:
      SandboxError: something is missing.
    """
    check(kind)
    target = pathlib.Path(state_dir, "runtime", f"web-{digest()}")
    with lock(state_dir, "web"):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = pathlib.Path(tempfile.mkdtemp(dir=target.parent))
            os.chmod(temporary, 0o755)
            _link(driver_folder() / "node", temporary / "node")
            shutil.copytree(driver_folder() / "package", temporary / "playwright")
            for source in INSIDE.glob("*.mjs"):
                shutil.copyfile(source, temporary / source.name)
            (temporary / "fonts.conf").write_text(_FONTS)
            subprocess.run(["chmod", "-R", "a+rX", str(temporary)], check=True)
            os.rename(temporary, target)
    return str(target)


def views(state_dir: str, kind: str, modules: str) -> dict[str, str]:
    """Folders of this machine by where sandboxes with a browser see them.

    Raises:
      SandboxError: something is missing.
    """
    return {FOLDER: folder(state_dir, kind)} | ({MODULES: modules} if modules else {})


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """The same file under another name, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    target.chmod(0o755)
