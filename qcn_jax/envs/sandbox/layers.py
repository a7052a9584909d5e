"""Image layers above the base: a repository with what it needs, and on it a task's starting state.

An image is named by a hash of its parent, its files and its steps, so that equal ones are built once, and all tasks of
a repository share its layers. Every use renews the image's tag; `prune` removes the longest unused ones until the rest
fits a budget of disk space.
"""

import datetime
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import docker
import docker.errors

from qcn_jax.envs.sandbox import images, local, repository
from qcn_jax.envs.sandbox.channel import SandboxError

KINDS = ("runtime", "repository", "task")  # what may be pruned; bases stay
MIN_AGE = 3600.0  # seconds since its last use for which an image is safe from pruning: another process may want it now
MIN_COPY = 40  # bytes below which equal content does not make a file a copy
# What images of repositories stand on where other harnesses are to run them.
HARNESS_PACKAGES = ("python3", "python-is-python3", "python3-pytest", "git")
# One commit, no remotes, no tags, no reflog, no dangling objects: nothing in the history gives the fix away.
CUT_HISTORY = ("rm -rf .git && git init -q . && git config core.logAllRefUpdates false && git add -A -f"
               " && git -c user.name=task -c user.email=task@localhost -c commit.gpgsign=false"
               " -c core.hooksPath=/dev/null commit -q --no-verify -m start && git reflog expire --expire=now --all")


def layer(client: docker.DockerClient, kind: str, parent: str, contents: Mapping[str, bytes | str | None] | None = None,
          steps: Sequence[str] = (), folder: str = "/", network: bool = False) -> str:
    """The id of the image `parent` with files and the effect of commands on top; built if it is not here.

    Args:
      client: of the engine.
      kind: repository or task, for its name and its label.
      parent: id of the image below.
      contents: files below `folder` by path; None deletes one.
      steps: shell commands, run as root in `folder`.
      folder: where the files go.
      network: whether the steps reach the network.

    Raises:
      SandboxError: the image cannot be built; the message holds the last line of the failed step.
    """
    contents = {path: text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
                for path, text in (contents or {}).items()}
    digest = hashlib.sha256(json.dumps([parent, folder, list(steps), network]).encode())
    for path, data in sorted(contents.items()):
        digest.update(json.dumps([path, None if data is None else len(data)]).encode() + (data or b""))
    name = f"qcn-{kind}:{digest.hexdigest()[:20]}"
    found = use(client, name)
    if found:
        return found
    gone = [path for path, data in contents.items() if data is None]
    labels = f"LABEL {images.LABEL}={kind} {images.PARENT}={parent}"
    lines = [f"FROM {parent}", labels, "USER root", f"WORKDIR {folder}"]
    if gone:
        lines.append(f"RUN {json.dumps(['rm', '-f', '--', *gone])}")
    if len(gone) < len(contents):
        lines.append("COPY files/ ./")
    if network and steps:
        lines.append(f"RUN mkdir -p {images.APT_FOLDERS}")
    lines += [f"RUN {json.dumps(['/bin/sh', '-ec', step])}" for step in steps]
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        _add(archive, "Dockerfile", "\n".join(lines).encode())
        for path, data in sorted(contents.items()):
            if data is not None:
                _add(archive, f"files/{path}", data)
    context.seek(0)
    try:
        image, _ = client.images.build(fileobj=context, custom_context=True, tag=name, rm=True, forcerm=True,
                                       network_mode="default" if network else "none")
    except docker.errors.BuildError as error:
        said = [line["stream"].strip() for line in error.build_log if line.get("stream", "").strip()]
        said = [line for line in said if not line.startswith(("Step ", "--->", "Removing intermediate"))]
        raise SandboxError(f"image {name} cannot be built: {error.msg} ({said[-1] if said else ''})"[:600]) from error
    except (docker.errors.DockerException, OSError, TypeError) as error:
        raise SandboxError(f"image {name} cannot be built: {str(error).splitlines()[0][:300]}") from error
    return image.id


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    archive.addfile(info, io.BytesIO(data))


def repository_image(client: docker.DockerClient, base: str, files: Mapping[str, bytes | str],
                     setup: Sequence[str] = (), network: bool = True) -> str:
    """The image of a repository at /testbed as other harnesses expect it: files, installed by `setup`, one commit."""
    if not setup:
        return layer(client, "repository", base, files, (CUT_HISTORY,), "/testbed", network)
    installed = layer(client, "repository", base, files, setup, "/testbed", network)
    members = {path: text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
               for path, text in files.items()}
    return scrubbed(client, installed, members, ["src", "."], f"cd /testbed && {CUT_HISTORY}")


def scrubbed(client: docker.DockerClient, image: str, files: Mapping[str, bytes], roots: Sequence[str],
             then: str = "") -> str:
    """The id of `image`, in which a set-up has run, without other copies of the repository's files (inside/scrub.py).

    Args:
      client: of the engine.
      image: has the repository at /testbed, or will have.
      files: of the repository, by path.
      roots: folders below the repository that modules are imported from.
      then: a shell command to run afterwards.
    """
    modules = {os.path.relpath(path, root): path for root in reversed(roots) for path in files
               if path.endswith(".py") and (root == "." or path.startswith(root + "/"))}
    table = {"root": "/testbed", "dropped": sorted(repository.DROPPED_NAMES - {".git"}), "modules": modules,
             "sizes": sorted({len(data) for data in files.values()}),
             "files": {hashlib.sha256(data).hexdigest(): path for path, data in sorted(files.items())
                       if len(data) >= MIN_COPY}}
    contents = {"scrub.py": (local.INSIDE / "scrub.py").read_bytes(), "table.json": json.dumps(table)}
    steps = ["python3 scrub.py table.json", "cd / && rm -rf /opt/qcn-scrub", *([then] if then else [])]
    return layer(client, "repository", image, contents, (" && ".join(steps),), "/opt/qcn-scrub")


def task_image(client: docker.DockerClient, repository: str, changes: Mapping[str, str | None]) -> str:
    """The image of a task's starting state: the repository's with `changes` on top, again as its only commit."""
    return layer(client, "task", repository, changes, (CUT_HISTORY,), "/testbed")


def use(client: docker.DockerClient, name: str) -> str | None:
    """The id of the image `name`, whose time of last use is set to now; None where there is none."""
    try:
        image = client.images.get(name)
        image.tag(*name.rsplit(":", 1))
        return image.id
    except docker.errors.NotFound:
        return None


def usage(client: docker.DockerClient) -> dict[str, int]:
    """Bytes that each image of ours takes beyond its parent, by id; shared layers count once."""
    ours = {image.id: image for image in _ours(client)}
    sizes = {}
    for key, image in ours.items():
        parent = image.labels.get(images.PARENT, "")
        below = ours[parent].attrs["Size"] if parent in ours else _size(client, parent)
        sizes[key] = max(0, image.attrs["Size"] - below)
    return sizes


def prune(client: docker.DockerClient, budget: int, min_age: float = MIN_AGE) -> list[str]:
    """Removes the longest unused of our images above the base until the rest takes at most `budget` bytes.

    Images that a container or another image stands on stay, and so do those used in the last `min_age` seconds.

    Returns:
      Names of what was removed.
    """
    removed: list[str] = []
    ours = {image.id: image for image in _ours(client)}
    sizes, now = usage(client), time.time()
    busy = {container["ImageID"] for container in client.api.containers(all=True)}
    while sum(sizes.values()) > budget:
        parents = {image.labels.get(images.PARENT) for image in ours.values()}
        leaves = [image for key, image in ours.items() if key not in parents | busy and now - _used(image) >= min_age]
        if not leaves:
            break
        oldest = min(leaves, key=_used)
        try:
            for tag in oldest.tags:
                client.images.remove(tag)
            removed += oldest.tags
        except docker.errors.APIError:
            busy.add(oldest.id)  # somebody has just started to use it
            continue
        del ours[oldest.id], sizes[oldest.id]
    return removed


def _ours(client: docker.DockerClient) -> list[Any]:
    try:
        found = client.images.list(filters={"label": images.LABEL})
    except docker.errors.NotFound:  # one went away while it was being listed
        return _ours(client)
    return [image for image in found if image.labels.get(images.LABEL) in KINDS and image.tags]


def _size(client: docker.DockerClient, image: str) -> int:
    try:
        return client.images.get(image).attrs["Size"] if image else 0
    except docker.errors.NotFound:
        return 0


def _used(image: Any) -> float:
    """When an image was last used, in seconds since the epoch."""
    text = image.attrs["Metadata"]["LastTagTime"]
    whole, _, rest = text.partition(".")
    zone = "+00:00" if "Z" in rest or not rest else rest[-6:]
    moment = datetime.datetime.fromisoformat(whole.rstrip("Z") + zone).timestamp()
    return moment + float("0." + "".join(character for character in rest.split("+")[0].split("-")[0]
                                         if character.isdigit()) if rest else 0.0)
