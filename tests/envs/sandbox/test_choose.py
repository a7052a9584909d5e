"""Which back end is chosen, what is said about it, and what a crashed run leaves for the next to remove."""

import fcntl
import os
import subprocess
import sys

import pytest

from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.sandbox.local import LocalProvider, build_runtime
from qcn_jax.errors import UserError


def test_auto_takes_local_where_no_engine_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with make_provider("auto", str(tmp_path / "state")) as provider:
        assert provider.kind == "local" and "no Docker engine answers" in provider.reason
        assert "\n" not in provider.reason + provider.describe()


@pytest.mark.parametrize("arguments, words", [
    (("docker",), "--config.sandbox=docker: no Docker engine answers"), (("podman",), "expected auto, docker or local")])
def test_what_is_demanded_and_missing_is_one_clear_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(UserError, match=words) as caught:
        make_provider(*arguments, state_dir=str(tmp_path / "state"))
    assert "\n" not in str(caught.value)


@pytest.mark.docker
def test_auto_takes_docker_where_an_engine_answers(tmp_path):
    with make_provider("auto", str(tmp_path)) as provider:
        assert provider.kind == "docker"
    with pytest.raises(UserError, match="cannot be pulled"):
        make_provider("docker", str(tmp_path), image="registry.invalid/none:1")


@pytest.mark.docker
def test_containers_of_dead_owners_are_removed_and_others_kept(tmp_path):
    from qcn_jax.envs.sandbox import docker as back_end
    from qcn_jax.envs.sandbox import images
    client = images.engine()
    image = images.runtime_image(client, images.base_image(client))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead_owner = back_end.owner(dead.pid) or f"{dead.pid}-1"
    dead.wait()

    def start(owner, host):
        made = client.api.create_container(image, ["sleep", "600"], labels={back_end.OWNER: owner, back_end.HOST: host})
        client.api.start(made["Id"])
        return made["Id"]

    here = back_end.host_identity()
    mine, other, left = start(back_end.owner(os.getpid()), here), start(dead_owner, "elsewhere"), start(dead_owner, here)
    try:
        assert back_end.remove_leftovers(client) >= 1
        alive = {container["Id"] for container in client.api.containers(all=True)}
        assert mine in alive and other in alive and left not in alive
    finally:
        for container in (mine, other, left):
            back_end.remove(client, container)


def test_work_folders_of_dead_servers_are_removed_and_others_kept(tmp_path):
    left, held = tmp_path / "work" / "server-a", tmp_path / "work" / "server-b"
    for folder in (left, held):
        (folder / "1" / "repo").mkdir(parents=True)
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        LocalProvider(str(tmp_path)).close()
        assert not left.exists() and held.exists()
    finally:
        os.close(descriptor)


def test_runtime_is_built_once(tmp_path):
    first = build_runtime(str(tmp_path))
    inode = os.stat(first).st_ino
    assert build_runtime(str(tmp_path)) == first and os.stat(first).st_ino == inode
    out = subprocess.run([f"{first}/bin/pytest", "--version"], capture_output=True, text=True, check=True)
    assert "pytest" in out.stdout


def test_nothing_is_run_as_root_without_walls(tmp_path):
    """A command like `kill -9 -1` run as root would end everything on the machine."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    try:
        provider = LocalProvider(str(tmp_path / "state"), containment="none")
    except UserError as error:
        assert "nothing is ever run as root" in str(error)
    else:  # the interpreter and the folder are readable by others: a user id of their own, then
        with provider:
            assert provider._options("w", provider._separate())["separate_users"]
