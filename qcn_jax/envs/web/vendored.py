"""Modules that pages are built from: React and Vite, installed once by npm from a lock file, or a folder of the user's.

npm runs outside of any sandbox and without the packages' scripts; sandboxes see the folder read-only.
"""

import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from qcn_jax import files
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.repository import lock
from qcn_jax.envs.web import runtime
from qcn_jax.errors import UserError

MANIFEST = pathlib.Path(__file__).parent / "inside" / "modules"  # package.json and its lock file
VITES = ("6", "7")  # major versions whose modules read files as Node lets them (8 reads by itself)
NODE = 24  # of Playwright's package, which runs Vite: from here on `--permission` bounds what is read
NPM_SECONDS = 900.0


def missing(named: str = "") -> str:
    """Why pages cannot be built here; "" where they can, the modules being installed now if they were not."""
    if reason := runtime.missing("docker"):
        return reason
    try:
        folder(named)
    except SandboxError as error:
        return str(error)
    return ""


def check(folder: str, flag: str) -> None:
    """Raises UserError, which names the flag, where a folder does not hold what pages are built with."""
    if fault := _fault(pathlib.Path(folder)):
        raise UserError(f"{flag}={folder}: {fault}")


def folder(named: str) -> str:
    """The folder with `node_modules`: the one that is named, or ours, which npm installs the first time.

    Raises:
      SandboxError: it does not hold what pages are built with; there is no npm, or it reaches no registry.
    """
    if fault := _node_fault():
        raise SandboxError(fault)
    if named:
        if fault := _fault(pathlib.Path(named)):
            raise SandboxError(f"--modules={named}: {fault}")
        return os.path.abspath(named)
    target = _installed()
    with lock(str(target.parent), "modules"):
        if not target.exists():
            if shutil.which("npm") is None:
                raise SandboxError("pages are built from modules that npm installs, and there is no npm; --modules "
                                   "names a folder that has them")
            _install(target)
    return str(target)


def at_hand(named: str) -> str:
    """That folder where it is there already, otherwise ""."""
    return os.path.abspath(named) if named else str(_installed()) * _installed().exists()


def digest(named: str) -> str:
    """Names the versions of what pages are built from."""
    if not named:
        return _installed().name
    place = pathlib.Path(named, "node_modules")
    found = [(path.relative_to(place).as_posix(), path.read_bytes()) for path in sorted(
        [*place.glob("*/package.json"), *place.glob("@*/*/package.json")])]
    return hashlib.sha256(repr((str(place), found)).encode()).hexdigest()[:12]


def _installed() -> pathlib.Path:
    facts = b"".join((MANIFEST / name).read_bytes() for name in ("package.json", "package-lock.json"))
    return files.cache_folder("web") / f"modules-{hashlib.sha256(facts).hexdigest()[:12]}"


def _install(target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".npm-") as temporary:
        made = pathlib.Path(temporary, "modules")
        made.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(MANIFEST / name, made / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            done = subprocess.run(command, cwd=made, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  timeout=NPM_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxError(f"npm cannot install the modules that pages are built from: {error}") from error
        if done.returncode:
            words = " ".join(re.sub(r"(?m)^npm (?:ERR!|error) ?", "", done.stderr).split())[:200]
            raise SandboxError(f"npm cannot install the modules that pages are built from ({words}); --modules names a "
                               "folder that has them")
        subprocess.run(["chmod", "-R", "a+rX", str(made)], check=True)
        os.rename(made, target)


def _fault(place: pathlib.Path) -> str:
    """What keeps a folder from being one that pages are built from."""
    for name in ("vite", "react", "react-dom"):
        if not files.is_file(place / "node_modules" / name / "package.json"):
            return f"holds no node_modules/{name}"
    version = str(files.read_json(place / "node_modules" / "vite" / "package.json").get("version"))
    return "" if version.split(".")[0] in VITES else f"holds Vite {version}; allowed: {' and '.join(VITES)}"


@functools.cache
def _node_fault() -> str:
    node = runtime.driver_folder() / "node"
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(said.removeprefix("v").split(".")[0]) >= NODE:
        return ""
    return f"pages are built by Playwright's Node, which is {said}, older than {NODE}; pip install -U playwright"
