"""Harbor's task folders of others: acted on in images of their Dockerfiles, graded by their own tests, checked before."""

import functools
import http.server
import ipaddress
import json
import threading
import zipfile

import pytest

from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.cli import main as cli
from qcn_jax.config import DistillConfig, ExpertsConfig, RunConfig, TasksConfig
from qcn_jax.envs.tasks import harbor, harbor_runs
from qcn_jax.pipeline import run
from qcn_jax.pipeline.context import Shared, StageContext
from tests.agents import playing

# By what the scripted models tell tasks by: solution, something else that an agent may do, and the tests.
TASKS = {
    "count": ("python3 -c \"print(sum(map(int, open('numbers').read().split())))\" > /app/sum", "echo 4 > sum",
              '[ "$(cat sum)" = 6 ] && [ ! -e /tests/cheat ] && echo 1 > /logs/verifier/reward.txt'),
    # What no text diff keeps: bytes, a link, an executable bit, a file that is gone, a repository's own files.
    "short": (r"printf '\377\000\001' > raw; ln -s raw link; printf '#!/bin/sh\necho here' > /usr/local/bin/say; "
              "chmod +x /usr/local/bin/say; rm -r /opt/old; mkdir -p deep/.git; echo ref > deep/.git/HEAD; echo x >> 'gr\u00fcn 1'",
              "printf x > raw; echo 1 > /logs/verifier/reward.txt; touch /tests/cheat",
              r'[ "$(readlink link)" = raw ] && [ "$(od -An -tx1 link)" = " ff 00 01" ] && [ "$(say)" = here ] && '
              "[ ! -e /opt/old ] && [ -e deep/.git/HEAD ] && [ $(wc -l < 'gr\u00fcn 1') = 2 ]; "
              'echo "{\\"reward\\": $(($? == 0))}" > /logs/verifier/reward.json')}
DOCKERFILE = """FROM {base}
RUN mkdir -p /app /opt/old/deeper && echo 1 2 3 > /app/numbers && echo x > /opt/old/deeper/file && echo y > '/app/gr\u00fcn 1'
WORKDIR /app
"""


def write(folder, name, image):
    solution, _, tests = TASKS[name]
    for path, text in {"task.toml": f"[task]\nname = 'made/{name}'\n[environment]\nmemory = '512M'\n[verifier]\ntimeout_sec = 60\n",
                       "instruction.md": f"Mend {name}.\n", "environment/Dockerfile": DOCKERFILE.format(base=image),
                       "tests/test.sh": f"#!/bin/bash\n{tests}\n", "solution/solve.sh": f"#!/bin/bash\n{solution}\n"}.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text)


@pytest.fixture(name="folders")
def _folders(tmp_path):
    """A folder of two tasks."""
    from qcn_jax.envs.sandbox import images

    client = images.engine()
    client.images.get(images.debian_image(client)).tag("qcn-test/base", "1")
    for name in TASKS:
        write(tmp_path / "tasks", name, "qcn-test/base:1")
    built = harbor.read_task(tmp_path / "tasks/count").image_name  # of one Dockerfile, as the other's is
    yield tmp_path / "tasks"
    for name in (built, "qcn-test/base:1"):
        if client.images.list(name):
            client.images.remove(name, force=True)


def script(model, name, turn, failures):
    commands = {"gold": TASKS[name][0], "wrong": TASKS[name][1], "empty": "cat /testbed/numbers; pwd; ls /tests /solution"}
    return playing.Said(playing.block(commands[model]) if turn == 0 else playing.SUBMIT)


@pytest.mark.docker
def test_agents_act_in_folders_and_their_own_tests_decide(folders, tmp_path, capsys):
    out = tmp_path / "out"
    with playing.serve(script) as (url, _, _):
        command = ["evaluate", f"--tasks={folders}", f"--endpoint={url}", *(f"--model={name}" for name in ("gold", "wrong", "empty")),
                   f"--out={out}", "--max_turns=3", "--workers=1", "--parallel=2"]
        assert cli.main(command) == 0, capsys.readouterr().err
        found = {name: json.loads((out / f"{number}_{name}/summary.json").read_text())
                 for number, name in enumerate(("gold", "wrong", "empty"), 1)}
        assert {name: (one["resolved"], one["unresolved"]) for name, one in found.items()} == {
            "gold": (2, 0), "wrong": (0, 2), "empty": (0, 2)}
        assert cli.main(["collect", f"--tasks={folders}/count", f"--endpoint={url}", "--model=gold", f"--out={tmp_path}/chats.jsonl",
                         "--max_turns=3", "--workers=1", "--invalid=keep"]) == 0
        assert "kept 1 of 1 episodes" in capsys.readouterr().out
    said = json.loads((out / "3_empty/trajectories/made__count/0.traj.json").read_text())["messages"][3]["content"]
    assert "1 2 3\n/app\n" in said and "cannot access '/solution'" in said  # nor is anything in /tests
    rows = {row["instance_id"]: row["model_patch"]
            for row in map(json.loads, (out / "1_gold/preds.jsonl").read_text().splitlines())}
    assert rows["made__count"].endswith("+++ b/app/sum\n@@ -0,0 +1 @@\n+6\n") and "GIT binary patch" in rows["made__short"]
    (reports,) = json.loads((out / "1_gold/made__short/report.json").read_text()).values()
    assert reports["resolved"] and reports["tests_status"]["FAIL_TO_PASS"]["success"] == ["tests/test.sh"]
    # The same patches, brought by somebody as predictions; one that is none; and what is the verifier's.
    cheat = "diff --git a/tests/cheat b/tests/cheat\nnew file mode 100644\n--- /dev/null\n+++ b/tests/cheat\n@@ -0,0 +1 @@\n+x\n"
    (tmp_path / "preds.jsonl").write_text("".join(json.dumps(
        {"instance_id": name, "model_name_or_path": "m", "model_patch": patch}) + "\n" for name, patch in
        {"made__count": cheat + rows["made__count"], "made__short": "nothing"}.items()))
    assert cli.main(["evaluate", f"--tasks={folders}", f"--predictions={tmp_path}/preds.jsonl", f"--out={tmp_path}/graded"]) == 0
    summary = json.loads((tmp_path / "graded/summary.json").read_text())
    assert (summary["resolved"], summary["unresolved"]) == (1, 1)
    assert json.loads((tmp_path / "graded/made__count/report.json").read_text())["made__count"]["dropped"] == {
        "tests/cheat": "is in /tests, which is not the agent's"}


@pytest.mark.docker
def test_folders_that_are_not_what_they_say_are_named(folders, capsys):
    (folders / "count/solution/solve.sh").write_text("#!/bin/bash\necho 5 > sum\n")
    (folders / "short/tests/test.sh").write_text("#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n")
    (folders / "third").mkdir()
    (folders / "third/task.toml").write_text("")
    assert cli.main(["verify", f"--tasks={folders}", "--workers=1"]) == 1
    printed = capsys.readouterr().out
    assert "made__count: its solution gives unresolved (the tests left no reward" in printed and "--verifier_network" in printed
    assert "made__short: without a patch it gives resolved" in printed and "third: is no Harbor task" in printed


@pytest.fixture(name="index")
def _index(tmp_path):
    """The address, for containers that have a network, of a server with a package that checks sums."""
    from qcn_jax.envs.sandbox import images

    config = images.engine().networks.get("bridge").attrs["IPAM"]["Config"][0]
    here = config.get("Gateway") or str(ipaddress.ip_network(config["Subnet"])[1])  # not all engines name it
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index/checker-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("checker.py", "print(int(open('/app/sum').read()) == 6)")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "index")
    with http.server.ThreadingHTTPServer((here, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{here}:{server.server_port}"
        server.shutdown()


@pytest.mark.docker
def test_tests_that_download_get_the_network_and_agents_do_not(folders, index, tmp_path, capsys):
    """As Terminal-Bench's, which fetch what they run with: invalid without the flag, and what they say with it."""
    fetch = f"python3 -c \"from urllib.request import urlretrieve as get; get('{index}/checker-1.0-py3-none-any.whl', '/tmp/checker.whl')\""
    (folders / "count/tests/test.sh").write_text(
        f"#!/bin/bash\n{fetch} && [ $(PYTHONPATH=/tmp/checker.whl python3 -m checker) = True ] && echo 1 > /logs/verifier/reward.txt\n")
    command = [f"--tasks={folders}/count", "--workers=1"]
    assert cli.main(["verify", *command]) == 1
    assert "made__count: its solution gives unresolved" in capsys.readouterr().out
    assert cli.main(["verify", *command, "--verifier_network"]) == 0, capsys.readouterr()

    def play(model, name, turn, failures):
        work = TASKS["count"][0] if model == "gold" else "echo 7 > sum"
        reach = f"(exec 3<>/dev/tcp/{index.removeprefix('http://').replace(':', '/')}) && echo reached"
        return playing.Said([playing.block(reach), playing.block(work), playing.SUBMIT][turn])

    with playing.serve(play) as (url, _, _):
        assert cli.main(["evaluate", *command, f"--endpoint={url}", "--model=gold", "--model=wrong", f"--out={tmp_path}/out",
                         "--max_turns=3", "--invalid=keep", "--verifier_network"]) == 0, capsys.readouterr().err
    for number, (name, resolved) in enumerate({"gold": 1, "wrong": 0}.items(), 1):
        place = tmp_path / f"out/{number}_{name}"
        said = json.loads((place / "trajectories/made__count/0.traj.json").read_text())["messages"][3]["content"]
        assert "This call was blocked" in said  # and whoever has another way finds no network, as everywhere
        assert json.loads((place / "summary.json").read_text())["resolved"] == resolved


@pytest.mark.docker
def test_stages_act_in_folders(folders, tmp_path):
    """Checked by stage tasks, then played as a policy would, from what the stage has written."""
    given = TasksConfig(data=str(folders), heldout=0, verify=0)
    config = RunConfig(sandbox="local", workers=1, tasks=given, experts=ExpertsConfig(scaffold="mini_swe_agent", names=("swe",)),
                       distill=DistillConfig(scaffold="mini_swe_agent"))
    assert run.run(config, tmp_path / "run", ("tasks",))["tasks"]["given"]["train"]["in_images"] == 2
    shared = Shared(config, tmp_path / "run")
    context = StageContext(config, tmp_path / "run", "experts", shared)
    task, services = context.tasks("train")[0], context.services()
    episode = services.episode(task, SCAFFOLDS.resolve("mini_swe_agent", ""), 3)
    try:
        assert not episode.step(playing.block(TASKS["count"][0])).done and episode.step(playing.SUBMIT).done
        assert services.grade(task, episode.result().patch).resolved and not services.grade(task, "").resolved
    finally:
        episode.executor.close()
        shared.close()


@pytest.mark.docker
def test_a_patch_cannot_leave_its_container(folders, tmp_path):
    from qcn_jax.envs.sandbox import images

    client, task = images.engine(), harbor.read_task(folders / "count")
    (tmp_path / "secret").write_text("6\n")
    link = f"diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+{tmp_path}\n\\ No newline at end of file\n"
    for patch in (f"{link}diff --git a/l/made b/l/made\nnew file mode 100644\n--- /dev/null\n+++ b/l/made\n@@ -0,0 +1 @@\n+x\n",
                  "--- a/../../made\n+++ b/../../made\n@@ -0,0 +1 @@\n+x\n",
                  f"diff --git a{tmp_path}/secret b/app/sum\nsimilarity index 100%\ncopy from {tmp_path}/secret\ncopy to app/sum\n"):
        assert harbor_runs.grade(client, task, patch, 60).outcome == "patch_failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "tasks"]
