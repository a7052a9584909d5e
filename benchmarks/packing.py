"""What packing costs: by method on real texts, and beside trl's packing on many synthetic lengths.

    python benchmarks/packing.py [--length=4096]                             the form of the report's Table 13
    python benchmarks/packing.py --trl=PYTHON [--counts=1e5,1e6,1e7]         side by side; PYTHON has trl and datasets

By method: documents are the files of this machine's standard library, as bytes (one byte a token), so that the figures
depend on no tokenizer.

Side by side: documents of log-normal lengths, a sixteenth of a row on average and none longer than one, are written
once in each side's own store (data.loader's, an Arrow file) and read from there. `in order`: packing alone fills rows
with them, window by window with each side's defaults: data.loader's 64 rows, and the thousand documents of trl's
pack_dataset("bfd_split"). `shuffled`: as training reads them, ours by data.loader.batches, the other by datasets' shuffle
before it; at most SHUFFLED documents. `all at once`: ours plans one window of all, from their lengths alone. Every side
and size is a process of its own; `bytes a document` is the slope of its peak memory between the two largest sizes, mapped
files apart. Seconds are the processor's.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from _measure import Measured
from absl import app, flags

from qcn_jax.pipeline.data import loader, packing
from qcn_jax.recipes.nano import corpus

_LENGTH = flags.DEFINE_integer("length", 4096, "tokens of a row, by method")
_TRL = flags.DEFINE_string("trl", None, "an interpreter that has trl and datasets")
_COUNTS = flags.DEFINE_list("counts", ["1e5", "1e6", "1e7"], "documents, side by side")
_JOB = flags.DEFINE_string("job", None, "for the processes that this one starts")

ROW, MEAN = 256, 16  # tokens, side by side: ten million documents have to fit on a disk twice
CHUNK = 1 << 20  # documents written at a time
SHUFFLED = 1_000_000  # of more, the other side would take hours


def by_method() -> None:
    """Prints one row a method: fragmentation, padding, and the seconds of planning and filling."""
    length = _LENGTH.value
    documents = [{"tokens": np.frombuffer(text.encode(), np.uint8)} for _, text in corpus.stdlib_modules()]
    order = np.random.default_rng(0).permutation(len(documents))  # files come shuffled, as in training
    documents = [documents[i] for i in order]
    lengths = [len(document["tokens"]) for document in documents]
    print(f"{len(documents)} documents, {sum(lengths):,} tokens, {np.mean(np.asarray(lengths) > length):.0%} longer than "
          f"a row of {length}")
    print(f"{'method':<24}{'rows':>8}{'fragmentation %':>17}{'padding %':>11}{'dropped':>9}{'seconds':>9}")
    cases = [(method, overlong) for method in packing.METHODS for overlong in packing.OVERLONG
             if method == "best_fit" or overlong == "split"]
    for method, overlong in cases:
        begin = time.process_time()
        planned = packing.plan(lengths, length, method, overlong)
        packing.fill(packing.Documents.of(documents), planned, length)
        seconds = time.process_time() - begin
        found = packing.statistics(lengths, length, planned)
        print(f"{f'{method}, {overlong}':<24}{planned.rows:>8}{found.fragmentation:>17.2f}{found.padding:>11.2f}"
              f"{found.dropped:>9}{seconds:>9.2f}")


def lengths_of(count: int) -> np.ndarray:
    """Log-normal lengths [count], between 1 and ROW, with a mean of about MEAN."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(MEAN) - 0.5, 1.0, count), 1, ROW).astype(np.int32)


def write(folder: pathlib.Path, lengths: np.ndarray) -> None:
    """Writes documents of these lengths as a TokenStore and as an Arrow file of `input_ids`."""
    import pyarrow

    tokens, offsets = int(lengths.sum()), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    offsets.tofile(folder / "offsets.bin")
    schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32()))])
    with open(folder / "tokens.bin", "wb") as ours, pyarrow.OSFile(str(folder / "documents.arrow"), "wb") as theirs, \
            pyarrow.ipc.new_stream(theirs, schema) as stream:
        for begin in range(0, len(lengths), CHUNK):
            part = offsets[begin:begin + CHUNK + 1]
            values = np.arange(part[0], part[-1], dtype=np.int32)
            values.tofile(ours)
            rows = pyarrow.ListArray.from_arrays(pyarrow.array((part - part[0]).astype(np.int32)), values)
            for at in range(0, len(rows), 1000):  # as datasets writes them
                stream.write_batch(pyarrow.record_batch([rows[at:at + 1000]], schema=schema))
    (folder / "store.json").write_text(json.dumps(
        {"dtypes": {"tokens": "int32"}, "single": [], "documents": len(lengths), "tokens": tokens}))


def ours(folder: pathlib.Path) -> dict[str, float]:
    """Reads the store in its order and packs it, a window of data.loader at a time."""
    store = loader.TokenStore(folder)
    window = round(loader.WINDOW_ROWS * ROW / (store.tokens / len(store)))
    rows = 0
    with Measured() as measured:
        for begin in range(0, len(store), window):
            documents = store.several(np.arange(begin, min(begin + window, len(store))))
            rows += len(packing.fill(documents, packing.plan(documents.lengths, ROW), ROW)["tokens"])
    return measured.result | {"rows": rows}


def at_once(folder: pathlib.Path) -> dict[str, float]:
    """Plans all documents as one window."""
    lengths = np.diff(np.fromfile(folder / "offsets.bin", np.int64))
    with Measured() as measured:
        rows = packing.plan(lengths, ROW).rows
    return measured.result | {"rows": rows}


def shuffled(folder: pathlib.Path) -> dict[str, float]:
    """Takes batches from data.loader until every document was read once, on average."""
    store = loader.TokenStore(folder)
    rows = 0
    with Measured() as measured:
        batches = loader.batches([loader.Source("documents", store, 1.0)], rows=64, length=ROW, seed=0)
        while rows * ROW < store.tokens:
            rows += len(next(batches)["tokens"])
    return measured.result | {"rows": rows}


def side_by_side() -> None:
    """Prints one row a size, task and side."""
    here, there = [sys.executable, __file__], [_TRL.value, str(pathlib.Path(__file__).with_name("_trl_side.py"))]
    sides = {"in order, ours": [*here, "--job=ours"], "in order, trl": there, "shuffled, ours": [*here, "--job=shuffled"],
             "shuffled, trl": there, "all at once, ours": [*here, "--job=at_once"]}
    memory: dict[str, list[tuple[int, float]]] = {side: [] for side in sides}
    print(f"rows of {ROW} tokens\n{'documents':>12}  {'side':<20}{'seconds':>9}{'documents/s':>13}{'padding %':>11}"
          f"{'peak MB':>9}")
    for count in (int(float(value)) for value in _COUNTS.value):
        with tempfile.TemporaryDirectory() as name:
            folder, lengths = pathlib.Path(name), lengths_of(count)
            write(folder, lengths)
            for side, command in sides.items():
                is_shuffled = side.startswith("shuffled")
                if is_shuffled and count > SHUFFLED:
                    continue
                job = {"do": "pack", "folder": name, "length": ROW, "shuffled": is_shuffled}
                (folder / "job.json").write_text(json.dumps(job))
                subprocess.run([*command, str(folder / "job.json"), str(folder / "result.json")], check=True)
                found = json.loads((folder / "result.json").read_text())
                memory[side].append((count, found["bytes"]))
                # Batches of a stream end when all documents were read on average: their padding is that in order.
                padding = "" if side == "shuffled, ours" else f"{100 * (1 - lengths.sum() / (found['rows'] * ROW)):.3f}"
                print(f"{count:>12,}  {side:<20}{found['cpu']:>9.2f}{count / found['cpu']:>13,.0f}{padding:>11}"
                      f"{found['bytes'] / 1e6:>9.1f}", flush=True)
    for side, found in memory.items():
        if len(found) > 1:
            (few, least), (many, most) = found[-2:]
            print(f"{side}: {(most - least) / (many - few):.1f} bytes a document")


def main(arguments: list[str]) -> None:
    if _JOB.value:
        job, result = map(pathlib.Path, arguments[1:])
        folder = pathlib.Path(json.loads(job.read_text())["folder"])
        result.write_text(json.dumps({"ours": ours, "shuffled": shuffled, "at_once": at_once}[_JOB.value](folder)))
    elif _TRL.value:
        side_by_side()
    else:
        by_method()


if __name__ == "__main__":
    app.run(main)
