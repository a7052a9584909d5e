"""Images for the docker back end: a base with Python, and on it pytest and our programs. Each is built once.

A base comes from the user, from a registry, or, where none can be reached, from Debian's package mirror through
debootstrap. Images are named by a hash of what went into them.
"""

import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Sequence

import docker
import docker.errors

from qcn_jax.envs import names
from qcn_jax.envs.sandbox import local
from qcn_jax.envs.sandbox.channel import SandboxError

REGISTRY_BASE = "python:3.11-slim-bookworm"
SUITE = "bookworm"  # Debian 12: Python 3.11
MIRROR = "http://deb.debian.org/debian"
PACKAGES = ("python3",)
# Documentation, package lists and caches: nothing in a sandbox needs them.
TRIMMED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists",
           "var/cache/debconf", "var/log")
# What a trimmed or slim image lacks of the folders that apt writes to.
APT_FOLDERS = "/var/log/apt /var/cache/apt/archives/partial /var/lib/apt/lists/partial"
LABEL, PARENT = "qcn_jax.image", "qcn_jax.parent"


def engine(timeout: float = 60.0) -> docker.DockerClient:
    """A client of the Docker engine that the environment names.

    Raises:
      SandboxError: no engine answers; the message says why in one line.
    """
    try:
        client = docker.from_env(timeout=timeout)
        client.ping()
        return client
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"no Docker engine answers ({_first_line(error)})") from error


def base_image(client: docker.DockerClient, wanted: str = "") -> str:
    """The id of the base image: `wanted` (local or pulled), else a pulled or self-made Debian with Python 3.11.

    Raises:
      SandboxError: none can be had; the message says what was tried.
    """
    if wanted:
        if fault := names.image_fault(wanted):
            raise SandboxError(f"image {names.shown(wanted)} {fault}")
        return _local(client, wanted) or _pull(client, wanted)
    found = _local(client, _debian_name(PACKAGES)) or _local(client, REGISTRY_BASE)
    if found:
        return found
    return debian_image(client) if _can_bootstrap() else _pull(client, REGISTRY_BASE)


def _debian_name(packages: Sequence[str]) -> str:
    return f"qcn-base:{hashlib.sha256(repr((SUITE, tuple(packages), TRIMMED)).encode()).hexdigest()[:12]}"


def _can_bootstrap() -> bool:
    return shutil.which("debootstrap") is not None and os.geteuid() == 0


def debian_image(client: docker.DockerClient, packages: Sequence[str] = PACKAGES) -> str:
    """The id of a minimal Debian with `packages`, made here from Debian's mirror, without any registry.

    Raises:
      SandboxError: debootstrap is missing, this is not root, or the mirror is not reached.
    """
    name = _debian_name(packages)
    found = _local(client, name)
    if found:
        return found
    if not _can_bootstrap():
        raise SandboxError("a Debian image needs debootstrap and root")
    return _debootstrap(client, name, packages)


def runtime_image(client: docker.DockerClient, base: str, distributions: tuple[str, ...] = local.DISTRIBUTIONS,
                  system_packages: bool = False) -> str:
    """The id of `base` with `distributions` in a virtual environment and the server's programs, at /opt/qcn.

    With `system_packages` tests can also import what is installed in the base's own Python.
    """
    parts = base + local.inside_digest(distributions) + ("+system" if system_packages else "")
    name = f"qcn-runtime:{hashlib.sha256(parts.encode()).hexdigest()[:12]}"
    found = _local(client, name)
    if found:
        return found
    dockerfile = "\n".join([
        f"FROM {base}", f"LABEL {LABEL}=runtime {PARENT}={base}", "USER root",
        f"RUN python3 -m venv --without-pip{' --system-site-packages' * system_packages} /opt/qcn"
        " && mkdir -p /work /testbed && rmdir /testbed && ln -s /work/now/repo /testbed",
        "COPY packages /tmp/packages", "COPY inside /opt/qcn/inside", "COPY scripts /opt/qcn/bin",
        "RUN mv /tmp/packages/* $(echo /opt/qcn/lib/python3*/site-packages)/"
        " && chmod -R go+rX /opt/qcn && /opt/qcn/bin/python -m compileall -q /opt/qcn /usr/lib/python3.11 || true",
        "RUN rm -rf /tmp /var/tmp && ln -s /work/now/tmp /tmp && ln -s /work/now/var /var/tmp",
        "ENTRYPOINT []", "CMD []"])
    with tempfile.TemporaryDirectory() as folder:
        local.copy_packages(pathlib.Path(folder, "packages"), distributions)
        shutil.copytree(local.INSIDE, pathlib.Path(folder, "inside"), ignore=shutil.ignore_patterns("__pycache__"))
        pathlib.Path(folder, "scripts").mkdir()
        local.write_scripts(pathlib.Path(folder, "scripts"), distributions)
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as archive:
            info = tarfile.TarInfo("Dockerfile")
            info.size = len(dockerfile.encode())
            archive.addfile(info, io.BytesIO(dockerfile.encode()))
            archive.add(folder, ".", filter=_reproducible)
    context.seek(0)
    try:
        image, _ = client.images.build(fileobj=context, custom_context=True, tag=name, rm=True, forcerm=True,
                                       network_mode="none")
    except (docker.errors.DockerException, TypeError) as error:
        raise SandboxError(f"image {name} cannot be built: {_first_line(error)}") from error
    return image.id


def _reproducible(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return None if "__pycache__" in info.name else info


def _local(client: docker.DockerClient, name: str) -> str | None:
    try:
        return client.images.get(name).id
    except docker.errors.ImageNotFound:
        return None


def _pull(client: docker.DockerClient, name: str) -> str:
    try:
        return client.images.pull(name).id
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"image {name} is not here and cannot be pulled ({_first_line(error)})") from error


def _debootstrap(client: docker.DockerClient, name: str, packages: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="qcn-debootstrap-") as folder:
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, folder, MIRROR]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            words = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise SandboxError(f"debootstrap failed ({' '.join(words)})")
        for place in TRIMMED:
            shutil.rmtree(os.path.join(folder, place), ignore_errors=True)
        # Imported under a name of its own first: two builders at once must not meet half an image.
        temporary = f"qcn-base:building-{uuid.uuid4().hex[:12]}"
        archive = subprocess.Popen(["tar", "-C", folder, "--one-file-system", "-c", "."], stdout=subprocess.PIPE)
        try:
            client.api.import_image_from_stream(archive.stdout, repository=temporary.split(":")[0],
                                                tag=temporary.split(":")[1])
        finally:
            archive.stdout.close()
            if archive.wait() != 0:
                raise SandboxError("the new base image's archive could not be written")
        image = client.images.get(temporary)
        image.tag(*name.split(":"))
        client.images.remove(temporary, noprune=True)
        return image.id


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


