"""The same tasks and patches under our graders, the swebench package's harness, and Harbor's verifier.

  QCN_HARBOR_PYTHON=.../python python benchmarks/grader_agreement.py --tasks=runs/quick/tasks/heldout.jsonl --out=DIR

Ours are those of sandboxes, of images of SWE-bench's release 5, and of Harbor's folders. Of each task an image is made here (Debian's Python, the repository in its starting state), a row of SWE-bench's release 5
and a Harbor folder. Each is graded with its gold patch (in Harbor also its solve.sh), with none, and with two wrong ones: a
file that says nothing to the point, and a syntax error. A disagreement is printed, and makes the exit status 1. Without
QCN_HARBOR_PYTHON, an interpreter that has harbor, its part is left out. What a grader said stands in DIR/sides, and is not
asked again.
"""

import collections
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import tqdm
from absl import app, flags

from qcn_jax import files
from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import images, layers
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.tasks import formats, harbor, harbor_runs, swebench
from qcn_jax.envs.tasks.grading import starting_changes
from qcn_jax.envs.tasks.schema import read_tasks

_TASKS = flags.DEFINE_list("tasks", None, "files of tasks", required=True)
_OUT = flags.DEFINE_string("out", None, "folder for rows, folders and logs", required=True)
_COUNT = flags.DEFINE_integer("count", 20, "tasks")
_FOLDERS = flags.DEFINE_integer("folders", 10, "of them as Harbor folders")
KINDS = ("gold", "empty", "idle", "broken")


def made(task, pristine):
    """The patches of a task by kind."""
    start = {**pristine, **starting_changes(task, pristine)}
    path = patches.touched(task.patch)[0]
    change = lambda text: patches.make_diff({path: start[path]}, {path: text})
    return {"gold": task.patch, "empty": "", "idle": change(start[path] + "\n# nothing to the point\n"),
            "broken": change("def (:\n" + start[path])}


def ours(tasks, found, specs, out):
    """Whether each (task, kind) is resolved in sandboxes of this package, with PASS_TO_PASS as it stands."""
    arguments = {"kind": "docker", "isolation": "container", "state_dir": str(files.cache_folder("sandbox"))}
    with EnvPool(2, arguments, list(specs.values())) as pool:
        futures = {(name, kind): pool.grade(tasks[name], patch) for name, kinds in found.items() for kind, patch in kinds.items()}
        return {key: future.result().outcome for key, future in tqdm.tqdm(futures.items(), desc="sandboxes")}


def ours_in_images(rows, found, out):
    """The same in the tasks' images, by `qcn evaluate`'s reading of logs."""
    instances = {row["instance_id"]: swebench.Instance.from_row(row) for row in rows}
    outcomes = {}
    for kind in KINDS:
        verdicts = swebench.evaluate(instances, [(name, found[name][kind]) for name in instances], 2, out / "ours" / kind)
        outcomes |= {(name, kind): verdict.outcome for name, verdict in zip(instances, verdicts, strict=True)}
    return outcomes


def theirs(rows, found, out):
    """The same by the package's harness."""
    outcomes = {}
    for kind in KINDS:
        place = out / "swebench" / kind
        place.mkdir(parents=True, exist_ok=True)
        files.write_jsonl(place / "tasks.jsonl", rows)
        files.write_jsonl(place / "preds.jsonl", ({"instance_id": row["instance_id"], "model_name_or_path": "m",
                                                   "model_patch": found[row["instance_id"]][kind]} for row in rows))
        subprocess.run([sys.executable, "-m", "swebench.harness.run_evaluation", "-d", "tasks.jsonl", "-p", "preds.jsonl",
                        "-id", "t", "-t", "300", "--max_workers", "2"], cwd=place, check=True, stdout=subprocess.DEVNULL)
        report = files.read_json(place / "m.t.json")
        outcomes |= {(name, kind): field for row in rows for name in [row["instance_id"]]
                     for field in ("resolved", "unresolved", "empty_patch", "error") if name in report[f"{field}_ids"]}
    return outcomes


def write_folders(names, tasks, pristine, python_path, out):
    """Harbor's folders of tasks, and PYTHONPATH in their images."""
    written = {}
    for name in names:
        folder, path = out / "harbor" / name, python_path[tasks[name].repo]
        harbor.write_folder(folder, tasks[name], pristine[tasks[name].repo], path)
        written[name] = folder, ":".join(os.path.normpath(f"/testbed/{part}") for part in path.split(":"))
    return written


def ours_in_folders(client, written, found, image_of):
    """Outcomes of the folders' own tests by `qcn evaluate`; `solve` is the folder's own solution."""
    outcomes = {}
    for name, (folder, path) in tqdm.tqdm(written.items(), desc="folders"):
        lines = f"FROM {image_of[name]}\nENV PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1\nWORKDIR /testbed\n"
        tag = f"{image_of[name].split(':')[0]}:folder"
        client.images.build(fileobj=io.BytesIO(lines.encode()), tag=tag, rm=True)
        task = dataclasses.replace(harbor.folder_task(folder), image_name=tag)
        try:
            # A patch of the repository, as one of the container's files.
            placed = {kind: found[name][kind].replace(" a/", " a/testbed/").replace(" b/", " b/testbed/") for kind in KINDS}
            for kind, patch in (placed | {"solve": harbor_runs.solve(client, task)}).items():
                outcomes[name, kind] = harbor_runs.grade(client, task, patch, swebench.TIMEOUT).outcome
        finally:
            client.images.remove(tag, force=True)
    return outcomes


def harbors(written, found, image_of, out):
    """Outcomes by Harbor's own verifier."""
    job = [{"name": f"{name}/{kind}", "folder": str(folder), "image": image_of[name], "python_path": path,
            "patch": found[name].get(kind)} for name, (folder, path) in written.items() for kind in (*KINDS, "solve")]
    files.write_json(out / "harbor.json", job)
    done = subprocess.run([os.environ["QCN_HARBOR_PYTHON"], "-W", "ignore", str(pathlib.Path(__file__).with_name("_harbor_side.py")),
                           str(out / "harbor.json")], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {tuple(name.rsplit("/", 1)): "resolved" if value == 1 else "unresolved" if value == 0 else str(value)
            for name, value in found.items()}


def once(out, side, ask):
    """What a grader says of each (task, kind), asked once for a folder."""
    path = out / "sides" / f"{side}.json"
    if not path.exists():
        files.write_json(path, [[*key, outcome] for key, outcome in ask().items()])
    return {(name, kind): outcome for name, kind, outcome in files.read_json(path)}


def main(_):
    """Makes images, grades everywhere, counts."""
    out = pathlib.Path(_OUT.value).absolute()
    tasks = {task.instance_id: task for path in _TASKS.value for task in read_tasks(path)}
    tasks = dict(list(tasks.items())[:_COUNT.value])
    specs, missing = sources.of_tasks({task.repo for task in tasks.values()}, [pathlib.Path(path) for path in _TASKS.value])
    assert not missing, missing
    client, pristine, python_path = images.engine(), {}, {}
    base = images.debian_image(client, layers.HARNESS_PACKAGES)
    with LocalProvider(str(files.cache_folder("sandbox"))) as provider:
        for spec in specs.values():
            pristine[spec.name] = dict(provider.prepare(spec).files)
            python_path[spec.name] = "src:." if any(path.startswith("src/") for path in pristine[spec.name]) else "."
    rows, found, image_of = [], {}, {}
    for name, task in tqdm.tqdm(tasks.items(), desc="images"):
        repository = layers.repository_image(client, base, pristine[task.repo], network=False)
        tag = f"qcn-agree/{len(rows)}:1"
        client.images.get(layers.task_image(client, repository, starting_changes(task, pristine[task.repo]))).tag(tag[:-2], "1")
        rows.append(formats.to_swebench5(dataclasses.replace(task, image_name=tag)))
        found[name], image_of[name] = made(task, pristine[task.repo]), tag
    try:
        written = write_folders(list(tasks)[:_FOLDERS.value], tasks, pristine, python_path, out)
        sides = {"folders": once(out, "folders", lambda: ours_in_folders(client, written, found, image_of))}
        if os.environ.get("QCN_HARBOR_PYTHON"):
            sides["harbor"] = once(out, "harbor", lambda: harbors(written, found, image_of, out))
        sides |= {"images": once(out, "images", lambda: ours_in_images(rows, found, out)),
                  "swebench": once(out, "swebench", lambda: theirs(rows, found, out)),
                  "sandboxes": once(out, "sandboxes", lambda: ours(tasks, found, specs, out))}
    finally:
        for tag in image_of.values():
            client.images.remove(tag, force=True)
    table, apart = collections.Counter(), 0
    for name in tasks:
        for kind in (*KINDS, "solve"):
            said = {side: outcomes[name, kind] for side, outcomes in sides.items() if (name, kind) in outcomes}
            for side, outcome in said.items():
                table[kind, side, outcome == "resolved"] += 1
            if len({outcome == "resolved" for outcome in said.values()}) > 1:
                apart += 1
                print(f"{name}, {kind}: {said}")
    print(f"\n{len(tasks)} tasks of {len(specs)} repositories\n\n| patch | " + " | ".join(sides) + " |\n|---|" + "---|" * len(sides))
    for kind in (*KINDS, "solve"):
        cells = [f"{table[kind, side, True]} of {table[kind, side, True] + table[kind, side, False]}" for side in sides]
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"\nresolved, of all; verdicts apart: {apart}")
    raise SystemExit(1 if apart else 0)


if __name__ == "__main__":
    app.run(main)
