"""Reading real documents from a JSONL file, beside datasets.

    python benchmarks/readers.py --datasets=PYTHON [--counts=50000,100000]        PYTHON has datasets

Documents are the source files of this Python's standard library and of its installed packages, cut at line ends into
pieces of about CHARACTERS; nothing is tokenised. Two tasks, every side and size a process of its own:

  stream   every row of the file, one at a time
  store    the file into each side's own store on disk (data.texts.TextStore; datasets' Arrow cache), and then every
           document of it at random, as training does

`bytes a document` is the slope of the peak memory between the two sizes, mapped files apart; no filter is on (the index
of near duplicates alone would hold about 3 kB a document). Seconds are the processor's, of all threads.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from _measure import Measured
from absl import app, flags

from qcn_jax.config import FilterConfig, TextSource
from qcn_jax.pipeline.data import filters
from qcn_jax.pipeline.data.readers.files import FILES
from qcn_jax.pipeline.data.texts import Findings, TextStore

_DATASETS = flags.DEFINE_string("datasets", None, "an interpreter that has datasets")
_COUNTS = flags.DEFINE_list("counts", ["50000", "100000"], "documents")
_JOB = flags.DEFINE_bool("job", False, "for the processes that this one starts")

CHARACTERS = 2000


def documents() -> Iterator[dict[str, str]]:
    """Yields rows: pieces of source files in the order of their paths."""
    paths = sysconfig.get_paths()
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"])):
        for path in sorted(pathlib.Path(root).rglob("*.py")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            size = itertools.accumulate(map(len, lines))
            for number, group in itertools.groupby(zip(lines, size, strict=True), lambda pair: pair[1] // CHARACTERS):
                text = "".join(line for line, _ in group)
                if text.strip():
                    yield {"text": text, "repo": path.parent.name, "path": f"{path.name}:{number}", "language": "Python"}


def stream(job: dict) -> dict[str, float]:
    """Reads every row."""
    with Measured() as measured:
        read = FILES.read(None, TextSource(path=job["path"]), Findings())
        characters = sum(len(text.text) for text in read)
    return measured.result | {"characters": characters}


def store(job: dict) -> dict[str, float]:
    """Reads the file into a store, and the store at random."""
    with tempfile.TemporaryDirectory(dir=pathlib.Path(job["path"]).parent) as folder, Measured() as measured:
        findings = Findings()
        kept = filters.filtered(FILES.read(None, TextSource(path=job["path"]), findings), FilterConfig(), (), findings)
        texts = TextStore.write(pathlib.Path(folder), kept, findings.summary)
        begun = time.process_time()
        characters = sum(len(texts[index].text) for index in job["order"])
        reading = time.process_time() - begun
    return measured.result | {"characters": characters, "reading": reading}


def side_by_side() -> None:
    """Prints one row a task, size and side."""
    sides = {"ours": [sys.executable, __file__, "--job"],
             "datasets": [_DATASETS.value, str(pathlib.Path(__file__).with_name("_trl_side.py"))]}
    memory: dict[tuple[str, str], list[tuple[int, float]]] = {}
    print(f"{'task':<8}{'documents':>10}{'MB':>7}  {'side':<10}{'seconds':>9}{'of it at random':>17}{'documents/s':>13}"
          f"{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for count in map(int, _COUNTS.value):
            path, order = folder / f"{count}.jsonl", np.random.default_rng(0).permutation(count).tolist()
            with open(path, "w", encoding="utf-8") as file:
                written = sum(bool(file.write(json.dumps(row) + "\n")) for row in itertools.islice(documents(), count))
            if written < count:
                raise SystemExit(f"there are {written} documents on this machine, fewer than {count}")
            for task, (side, command) in itertools.product(("stream", "store"), sides.items()):
                (folder / "job.json").write_text(json.dumps({"do": task, "path": str(path), "order": order}))
                subprocess.run([*command, str(folder / "job.json"), str(folder / "result.json")], check=True)
                found = json.loads((folder / "result.json").read_text())
                memory.setdefault((task, side), []).append((count, found["bytes"]))
                reading = f"{found['reading']:.2f}" if "reading" in found else ""
                print(f"{task:<8}{count:>10,}{found['characters'] / 1e6:>7.0f}  {side:<10}{found['cpu']:>9.2f}{reading:>17}"
                      f"{count / found['cpu']:>13,.0f}{found['bytes'] / 1e6:>9.1f}", flush=True)
    for (task, side), found in memory.items():
        (few, least), (many, most) = found[0], found[-1]
        if many > few:
            print(f"{task}, {side}: {(most - least) / (many - few):.1f} bytes a document")


def main(arguments: list[str]) -> None:
    if _JOB.value:
        job = json.loads(pathlib.Path(arguments[1]).read_text())
        result = {"stream": stream, "store": store}[job["do"]](job)
        pathlib.Path(arguments[2]).write_text(json.dumps(result))
    else:
        side_by_side()


if __name__ == "__main__":
    flags.mark_flag_as_required("datasets") if "--job" not in sys.argv else None
    app.run(main)
