"""Repositories to make tasks from, and those of given tasks: sdists from PyPI, local archives, local folders.

Downloads come from the index that pip is set to (over its JSON interface, where nothing of the distribution is run;
where that does not answer, through pip, which asks the distribution for its metadata), are kept in a cache and checked
by SHA-256.
"""

import functools
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence

from qcn_jax import files
from qcn_jax.envs import names as names_of_rows
from qcn_jax.envs.problems import schema as problems
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis.pages import catalog
from qcn_jax.errors import UserError

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+)(?:#sha256=([0-9a-f]{64}))?")
_ARCHIVES = (".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz")
_DOWNLOAD_SECONDS = 300.0
_INDEX_SECONDS = 30.0  # without a byte, after which pip is tried
_DEFAULT_INDEX = "https://pypi.org/simple"


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file; raises UserError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def is_requirement(name: str) -> bool:
    """Whether a name is a requirement `name==version`."""
    return _REQUIREMENT.fullmatch(name) is not None


def locate(source: str, cache: pathlib.Path | None = None, as_path: bool = True) -> RepositorySpec:
    """Finds a repository: a requirement `name==version`, a path to an sdist, a folder, or a template of pages.

    Args:
      source: what the user named; a requirement may end with #sha256= and the hash, and is trusted on first download
        without.
      cache: folder of downloads.
      as_path: whether it may be a path.

    Raises:
      UserError: neither a requirement nor an existing path, no network, or a wrong hash; names `source`.
    """
    path = pathlib.Path(source)
    if as_path and (files.is_dir(path) or (files.is_file(path) and source.endswith(_ARCHIVES))):
        name = path.resolve().name
        for suffix in _ARCHIVES:
            name = name.removesuffix(suffix)
        pinned = re.fullmatch(r"(.+)-(\d[^-]*)", name)
        digest = "" if path.is_dir() else sha256(path)
        name = f"{pinned[1]}=={pinned[2]}" if pinned and "@" not in name else name
        # Tasks, archives and journals are called after it.
        return RepositorySpec(names_of_rows.file_stem(name), str(path.resolve()), digest)
    if source.startswith("pages:"):
        archive = catalog.write(source, (cache or files.cache_folder("sources")) / "pages")
        return RepositorySpec(source, str(archive), sha256(archive))
    asked = _REQUIREMENT.fullmatch(source)
    if not asked:
        raise UserError(f"--repo: {source!r} is neither a folder, an sdist ({', '.join(_ARCHIVES)}) nor name==version, "
                        "which may be followed by #sha256= and 64 hexadecimal digits")
    archive = download(asked[1], asked[2], cache or files.cache_folder("sources"))
    return RepositorySpec(asked[1], str(archive), sha256(archive))


def distinct(specs: Iterable[RepositorySpec], flag: str = "--repo") -> dict[str, RepositorySpec]:
    """Repositories by name, one that is given twice once; raises UserError where two have the same name."""
    found: dict[str, RepositorySpec] = {}
    for spec in specs:
        known = found.setdefault(spec.name, spec)
        if known.archive != spec.archive and not (spec.sha256 and known.sha256 == spec.sha256):
            raise UserError(f"{flag}: {known.archive} and {spec.archive} are both called {spec.name}; rename one, or "
                            "give each in a call of its own")
    return found


def of_tasks(names: Iterable[str], beside: Iterable[pathlib.Path], given: Sequence[str] = (), flag: str = "--repo"
             ) -> tuple[dict[str, RepositorySpec], dict[str, str]]:
    """Finds the repositories that tasks name: given ones, starting states beside the tasks' files, or downloaded ones.

    Args:
      names: as the tasks have them, which may only be requirements where they are neither given nor there.
      beside: the tasks' files.
      given: what `locate` takes.
      flag: that gave them, for messages.

    Returns:
      Specs by name, all of `given` among them; and by name why one is not among them.

    Raises:
      UserError: a given one is no repository.
    """
    places, hashes, kept = sorted(set(beside)), {}, []
    for path in places:
        described = path.with_name("repositories.json")  # where qcn run leaves them
        hashes |= {row["name"]: row["sha256"] for row in files.read_json(described)} if described.exists() else {}
    names = sorted(set(names))
    for name in names:  # where qcn synthesize leaves what has no place of its own
        archives = [pathlib.Path(f"{path}.work", "archives", f"{name}.tar.gz") for path in places]
        if not names_of_rows.path_fault(f"{name}.tar.gz"):
            kept += [str(path) for path in archives if path.exists()][:1]
    found, missing = {spec.name: spec for spec in map(locate, kept)} | distinct(map(locate, given), flag), {}
    for name in names:
        if name in found:
            continue
        if name == problems.REPOSITORY:
            found[name] = problems.spec()
            continue
        try:
            if not is_requirement(name) and not catalog.is_name(name):  # names of rows never become paths
                raise UserError(f"field repo: {names_of_rows.shown(name)} is not name==version and not given by {flag}")
            found[name] = locate(f"{name}#sha256={hashes[name]}" if hashes.get(name) else name, as_path=False)
        except UserError as error:
            missing[name] = str(error)
    return found, missing


def download(requirement: str, expected: str | None, cache: pathlib.Path) -> pathlib.Path:
    """Returns the cached sdist of `name==version`; downloads it where it is missing or damaged.

    Raises:
      UserError: no network, no such release, or a hash other than `expected`; names the requirement.
    """
    folder = cache / requirement.replace("==", "-")
    for archive in _archives(folder):
        recorded = archive.with_name(f"{archive.name}.sha256")  # of the file as it came
        if sha256(archive) == (expected or (recorded.read_text() if recorded.exists() else sha256(archive))):
            return archive
        archive.unlink()  # damaged by a full disk or an older crash; fetched again below
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
            arriving = pathlib.Path(temporary)
            archive = _index_download(requirement, arriving) or _pip_download(requirement, arriving)
            found = sha256(archive)
            if expected is not None and found != expected:
                raise UserError(
                    f"{requirement}: the downloaded {archive.name} has SHA-256 {found}, expected {expected}")
            (folder / f"{archive.name}.sha256").write_text(found)
            return pathlib.Path(shutil.move(archive, folder / archive.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _archives(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.glob("*") if path.name.endswith(_ARCHIVES))


def _index() -> str:
    """The package index of pip's settings; "" where they forbid any."""
    return _index_of(tuple(sorted(item for item in os.environ.items() if item[0].startswith("PIP_"))))


@functools.cache
def _index_of(variables: tuple[tuple[str, str], ...]) -> str:
    """`_index` under these environment variables, which are this process's."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    try:
        settings = subprocess.run(command, capture_output=True, text=True, timeout=_INDEX_SECONDS, check=False).stdout
    except subprocess.TimeoutExpired:
        settings = ""
    if re.search(r"^[\w:]+\.no-index='(1|true|yes|on)'", settings, re.MULTILINE | re.IGNORECASE):
        return ""
    found = dict(re.findall(r"^([\w:]+)\.index-url='([^']+)'", settings, re.MULTILINE))
    return next((found[scope] for scope in (":env:", "download", "global") if scope in found), _DEFAULT_INDEX)


def _index_download(requirement: str, folder: pathlib.Path) -> pathlib.Path | None:
    """The sdist from the index's JSON interface (PEP 691); None where that does not give it, for whatever reason."""
    index = _index()
    if not index:
        return None
    name, version = requirement.split("==")
    project = _normalized(name)
    address = f"{index.rstrip('/')}/{project}/"
    request = urllib.request.Request(address, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(request, timeout=_INDEX_SECONDS) as answer:
            listed = json.load(answer)["files"]
        for file in listed:
            stem = next((file["filename"].removesuffix(end) for end in _ARCHIVES if file["filename"].endswith(end)), "")
            if _normalized(stem) == f"{project}-{_normalized(version)}":
                archive = folder / pathlib.PurePosixPath(file["filename"]).name
                with urllib.request.urlopen(urllib.parse.urljoin(address, file["url"]), timeout=_INDEX_SECONDS) as body:
                    archive.write_bytes(body.read())
                return archive
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    return None


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pip_download(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    name = requirement.split("==")[0]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
               "--retries", "2", "--no-binary", name, "--dest", str(folder), requirement]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{requirement}: download took longer than {_DOWNLOAD_SECONDS:.0f} s; check the network") from None
    archives = _archives(folder)
    if result.returncode == 0 and archives:
        return archives[0]
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = lines[-1].removeprefix("ERROR:").strip() if lines else f"pip exited with status {result.returncode}"
    unreachable = "from versions: none" in result.stderr or "Connection" in result.stderr or "resolve" in result.stderr
    hint = " (no network or no package index reachable)" if unreachable else ""
    raise UserError(f"{requirement}: cannot be downloaded: {reason}{hint}")
