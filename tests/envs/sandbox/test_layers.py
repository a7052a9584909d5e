"""Image layers, their pruning, repositories with an environment of their own, spare containers, anonymous volumes."""

import base64
import contextlib
import dataclasses
import io
import time

import docker
import pytest

from qcn_jax.envs.sandbox import RepositorySpec, images, layers
from qcn_jax.envs.sandbox import docker as back_end
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.errors import UserError
from tests.sandboxes import BROKEN, CALC, FAILING, LIMITS, MARKER, PASSING, SOURCE, agent, make_provider, world  # noqa: F401

docker_only = pytest.mark.docker


@pytest.fixture(scope="module")
def client():
    return images.engine()


@pytest.fixture(scope="module")
def base(client):
    return images.runtime_image(client, images.base_image(client))


def run(client, image, command):
    """Output of a command in a throw-away container."""
    return client.containers.run(image, ["/bin/sh", "-c", command], network_mode="none", remove=True).decode()


@docker_only
def test_layers_are_named_by_content_shared_and_pruned(client, base, request):
    mark = str(time.time_ns())  # images of this test alone
    made = []

    def build(kind, parent, contents, steps=()):
        made.append(layers.layer(client, kind, parent, contents, steps, "/place"))
        return made[-1]

    def clean():
        for image in reversed(made):
            for tag in client.images.get(image).tags if layers._size(client, image) else ():
                client.images.remove(tag, force=True)

    request.addfinalizer(clean)
    repository = build("repository", base, {"a.txt": "a", "deep/b.bin": bytes(3_000_000), "mark": mark}, ("echo c > c.txt",))
    assert build("repository", base, {"a.txt": "a", "deep/b.bin": bytes(3_000_000), "mark": mark},
                 ("echo c > c.txt",)) == repository
    tasks = [build("task", repository, {"a.txt": f"task {number}", "c.txt": None}) for number in range(3)]
    assert len(set(tasks)) == 3
    assert run(client, tasks[1], "cat /place/a.txt; ls /place/deep /place") == "task 1/place:\na.txt\ndeep\nmark\n\n" \
        "/place/deep:\nb.bin\n"
    # Tasks of one repository share its layers on disk.
    lower = client.images.get(repository).attrs["RootFS"]["Layers"]
    assert all(client.images.get(task).attrs["RootFS"]["Layers"][:len(lower)] == lower for task in tasks)
    sizes = layers.usage(client)
    assert sizes[repository] >= 3_000_000 and all(sizes[task] < 100_000 for task in tasks)
    # The longest unused goes first; what is used by a container, by another image or was used lately stays.
    assert build("task", repository, {"a.txt": "task 0", "c.txt": None}) == tasks[0]  # used again
    here = {tag: image for image in made for tag in client.images.get(image).tags}
    others = sum(size for key, size in sizes.items() if key not in made)
    held = client.api.create_container(tasks[2], ["true"])["Id"]
    try:
        assert not set(layers.prune(client, 0, min_age=3600.0)) & set(here)
        budget = others + sum(size for key, size in layers.usage(client).items() if key in made) - 1
        order = []
        by_use = sorted((layers._used(client.images.get(task)), task) for task in tasks)
        assert [task for _, task in by_use] == [tasks[1], tasks[2], tasks[0]]
        for tag in _prune_only(client, made, budget, order):
            assert here[tag] == tasks[1]
        _prune_only(client, made, 0, order)
        assert [here[tag] for tag in order] == [tasks[1], tasks[0]]
    finally:
        back_end.remove(client, held)
    _prune_only(client, made, 0, order)
    assert [here[tag] for tag in order] == [tasks[1], tasks[0], tasks[2], repository]


def _prune_only(client, mine, budget, order):
    """`prune` as if there were no images but `mine` on this machine (others run here, too)."""
    real = layers._ours
    layers._ours = lambda one: [image for image in real(one) if image.id in mine]
    try:
        removed = layers.prune(client, budget, min_age=0.0)
    finally:
        layers._ours = real
    order += removed
    return removed


@docker_only
def test_failed_step_is_one_clear_line(client, base):
    with pytest.raises(images.SandboxError, match=r"cannot be built: .*no such package"):
        layers.layer(client, "repository", base, steps=("echo no such package; exit 3",))


@docker_only
def test_repository_with_an_environment_of_its_own(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "test_x.py").write_text("import answer_package\n\ndef test_x():\n    assert answer_package.x == 7\n")
    setup = ("d=$(python3 -c 'import site; print(site.getsitepackages()[0])'); mkdir -p $d; echo 'x = 7' > $d/answer_package.py",)
    spec = RepositorySpec("own==1", str(tmp_path / "repo"), setup=setup)
    plain = RepositorySpec("plain==1", str(tmp_path / "repo"))
    with make_provider("docker", tmp_path / "state") as provider:
        assert provider.prepare(spec).baseline.outcomes == {"test_x.py::test_x": "passed"}
        assert provider.prepare(plain).baseline.outcomes == {"test_x.py": "error"}
        with provider.create("own==1") as one, provider.create("plain==1") as two:
            assert one.run_tests().outcome == "passed" and two.run_tests().outcome == "failed"
            assert one._server is not two._server
    with LocalProvider(str(tmp_path / "local")) as provider, pytest.raises(UserError, match="own==1: image and setup need"):
        provider.prepare(spec)


# What builders leave: an installed copy of this version and of another, byte code, build results, caches, archives.
COPIES = """
p=$(python3 -c 'import site; print(site.getsitepackages()[0])'); from=%s
mkdir -p $p/victim $p/victim-1.2.3.dist-info /usr/share/victim build/lib/victim victim.egg-info /root/.cache/pip /opt/wheels /tmp/b
for d in $p/victim build/lib/victim victim.egg-info /usr/share/victim /tmp/b; do cp $from $d/calc.py; done
echo "# older" >> $p/victim/calc.py; touch $p/victim/__init__.py; echo 'x = 7' > $p/answer_package.py
cp $from /root/.cache/pip/x; cp $from /var/tmp/y
python3 -m compileall -q $p/victim /usr/share/victim build
python3 -c "import zipfile; zipfile.ZipFile('/opt/wheels/v.whl', 'w').writestr('victim/calc.py', open('$from').read())"
tar czf /opt/wheels/v.tar.gz -C /usr/share victim
"""
SEARCH = (f"grep -rlF {MARKER[:-2]}{MARKER[-2:]} / --exclude-dir=proc --exclude-dir=sys 2>/dev/null; find / -name "
          "'calc*.pyc' -o -name 'v.whl' -o -name 'v.tar.gz' 2>/dev/null | grep -v ^/proc; true")


@pytest.mark.parametrize("world", [pytest.param("docker", marks=docker_only)], indirect=True)
def test_setup_leaves_no_copy_of_the_repository(world, tmp_path):
    """Neither in sandboxes nor in images for other harnesses; an installed copy is the repository itself."""
    client = world.provider.client
    write = f"mkdir -p /w; cd /w; echo {base64.b64encode(CALC.encode()).decode()} | base64 -d > calc.py; "
    spec = dataclasses.replace(world.spec, name="installed", setup=(write + COPIES % "/w/calc.py",))
    with make_provider("docker", tmp_path / "state") as provider:
        assert provider.prepare(spec).baseline.passed(PASSING[:1])
        with provider.create("installed", {SOURCE: BROKEN}) as place:
            assert place.exec(SEARCH).output == ""
            assert place.exec("cd /; PYTHONPATH= python3 -c 'import victim.calc, answer_package as a; print(a.x, "
                              "victim.calc.clamp(5, 0, 10))'").output == "7 0\n"
    pristine = {"victim/__init__.py": "", SOURCE: CALC}
    base = images.debian_image(client, layers.HARNESS_PACKAGES)
    repository = layers.repository_image(client, base, pristine, (COPIES % "/testbed/victim/calc.py",), network=False)
    run(client, repository, f'found=$({SEARCH}); [ "$found" = /testbed/{SOURCE} ]')  # or raises


def test_snapshot_outlives_its_sandbox(world):
    with world.provider.create(world.spec.name, {SOURCE: BROKEN}) as place:
        place.write("victim/extra.py", "x = 1\n")
        place.exec("rm README.md")
        taken, changes = place.snapshot(), place.changes()
    with world.provider.restore(taken) as one, world.provider.restore(taken) as two:
        assert one.changes() == two.changes() == changes == {"README.md": None, "victim/extra.py": "x = 1\n"}
        one.write(SOURCE, CALC)
        assert one.run_tests(FAILING).passed(FAILING) and not two.run_tests(FAILING).passed(FAILING)
        assert "--- a/README.md" in two.diff() and SOURCE not in two.diff() and SOURCE in one.diff()


def test_spare_servers_wait_and_are_used_once(world):
    kind = world.provider.kind
    options = (world.provider.state_dir, LIMITS, "container")
    made = back_end.DockerProvider(*options, spares=2) if kind == "docker" else LocalProvider(*options, spares=2)
    with made as provider:
        provider.prepare(world.spec)
        provider.create(world.spec.name).destroy()  # from now on the provider knows what is wanted

        def ready(count):
            deadline = time.monotonic() + 300
            while provider._spares.waiting() < count and time.monotonic() < deadline:
                time.sleep(0.05)
            assert provider._spares.waiting() == count

        ready(2)
        with provider.create(world.spec.name) as one, provider.create(world.spec.name) as two:
            assert one._server is not two._server
            one.write("mine.txt", "1")
            assert two.exec("ls mine.txt").exit_code != 0
            assert one.run_tests(PASSING[:1]).passed(PASSING[:1])
        assert not one._server.alive() and not two._server.alive()  # used once
        ready(2)
        servers = [server for _, server in provider._spares._ready]
        assert all(server.alive() for server in servers)
        servers[0].close()  # one that died while it waited is not handed out
        with provider.create(world.spec.name) as three:
            assert three._server is not servers[0] and three.exec("echo x").output == "x\n"
    assert not any(server.alive() for server in servers)


@docker_only
def test_anonymous_volumes_go_with_their_container(client, base, tmp_path):
    image = layers.layer(client, "repository", images.base_image(client), {"x": "1"})
    with_volume = client.images.build(
        fileobj=io.BytesIO(f"FROM {image}\nVOLUME /data\n".encode()), rm=True)[0]
    before = {volume.name for volume in client.volumes.list()}
    try:
        with back_end.DockerProvider(str(tmp_path), LIMITS, "container", with_volume.id) as provider:
            server = provider._start(None)
            during = {volume.name for volume in client.volumes.list()} - before
            assert len(during) >= 1
            server.close()
            deadline = time.monotonic() + 300
            while during & {volume.name for volume in client.volumes.list()} and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not during & {volume.name for volume in client.volumes.list()}
            runtime = provider.image
    finally:
        for one in (runtime, with_volume.id):
            with contextlib.suppress(docker.errors.ImageNotFound):  # the first may have taken the second along
                client.images.remove(one, force=True)
