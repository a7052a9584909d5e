"""Claim: weights are streamed; host memory is bounded by a few tensors, not by the model.

  python benchmarks/hub_stream.py --folder=/big/disk [--destination=memmap|jax] [--experts=320]

Writes a synthetic checkpoint of the 80B model's shapes with four layers (9.3 GB in bfloat16 with 320 experts a
layer) through `hub.save` from arrays that are computed on demand, reads it back through `hub.load` in a process of
its own into memory-mapped arrays (or JAX arrays), checks every value, and prints the peak of resident memory beyond
the destination. Needs twice the checkpoint's size on disk, and removes both afterwards. Exit status 1 where a value
differs or the peak exceeds 2.5 GB.

How it is measured: a thread samples the process's anonymous resident memory every 10 ms, and every 2 s (walking the
page tables costs time) the resident pages of all mapped files but the destination's; the peaks are added. For JAX
arrays, which are anonymous memory, the destination's bytes are taken off. CPU seconds say what a machine with other
work on it would need when idle.
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import pathlib
import shutil
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

from qcn_jax import hub
from qcn_jax.config import ModelConfig
from qcn_jax.hub import layout, reading

FOLDER = flags.DEFINE_string(
    "folder", "/tmp/hub_stream", "Where the checkpoint and the destination are put; made and removed."
)
DESTINATION = flags.DEFINE_enum("destination", "memmap", ["memmap", "jax"], "What is loaded into.")
EXPERTS = flags.DEFINE_integer("experts", 320, "Experts a layer (the published model has 512).")
LIMIT = 2.5e9
PUBLISHED = ModelConfig()


@dataclasses.dataclass(frozen=True)
class Computed:
    """An array that exists only as a rule: bit pattern from position, never NaN or infinite."""

    shape: tuple[int, ...]
    seed: int
    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """The values in a box."""
        bits = np.full((1,) * len(self.shape), self.seed * 7919 % 65_536, np.uint16)
        for axis, part in enumerate(box):
            line = (np.arange(part.start, part.stop, dtype=np.uint32) * (40_503 - 6_100 * axis)).astype(np.uint16)
            bits = bits + line.reshape([-1 if i == axis else 1 for i in range(len(self.shape))])
        return (bits & np.uint16(0xBF7F)).view(self.dtype)


def computed_tree(config: ModelConfig) -> dict:
    """The parameter tree of `config` as Computed arrays."""
    tree: dict = {}
    for seed, (path, shape) in enumerate(layout.leaf_shapes(config).items()):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = Computed(shape, seed)
    return tree


class Sampler(threading.Thread):
    """Peaks of this process's anonymous memory, and of its resident pages of files that are not under `ignored`."""

    def __init__(self, ignored: str):
        """Starts nothing yet."""
        super().__init__(daemon=True)
        self.ignored, self.anonymous, self.mapped, self.stop = ignored, 0, 0, threading.Event()

    @property
    def peak(self) -> int:
        """The sum of both peaks, in bytes."""
        return self.anonymous + self.mapped

    def sample(self, with_files: bool) -> None:
        """Looks once."""
        with open("/proc/self/status", encoding="utf-8") as stream:
            found = {line.split()[0]: line.split()[1] for line in stream if line.startswith("Rss")}
        self.anonymous = max(self.anonymous, 1024 * (int(found["RssAnon:"]) + int(found["RssShmem:"])))
        if not with_files:
            return
        total, counted = 0, True
        with open("/proc/self/smaps", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("Rss:"):
                    total += int(line.split()[1]) * 1024 * counted
                elif "-" in line.split(" ", 1)[0]:
                    counted = "/" in line and self.ignored not in line
        self.mapped = max(self.mapped, total)

    def run(self) -> None:
        """Samples until `stop` is set."""
        for tick in itertools.count():
            self.sample(with_files=tick % 200 == 0)
            if self.stop.wait(0.01):
                return


def read(source: str, target: str, destination: str) -> dict:
    """In a process of its own: loads, measures, checks every value."""
    pathlib.Path(target).mkdir(parents=True)
    sampler = Sampler(target)
    sampler.sample(with_files=True)
    before = sampler.peak
    sampler.start()

    def allocate(path: layout.Path, shape: layout.Shape, dtype: np.dtype) -> np.ndarray:
        return np.memmap(f"{target}/{'.'.join(path)}", dtype, "w+", shape=shape)

    start, used = time.perf_counter(), time.process_time()
    config, params = hub.load(source, allocate=allocate if destination == "memmap" else None)
    jax.block_until_ready(params)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    sampler.stop.set()
    sampler.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = sampler.peak - (size if destination == "jax" else 0)
    wrong = sum(
        jax.tree.leaves(
            jax.tree.map(count_wrong, params, computed_tree(config), is_leaf=lambda x: isinstance(x, Computed))
        )
    )
    return {"bytes": size, "before": before, "peak": peak, "seconds": seconds, "cpu": used, "wrong": wrong}


def count_wrong(leaf: jax.Array | np.ndarray, expected: Computed) -> int:
    """Elements that differ, looked at a slice of the first two axes at a time."""
    leaf, wrong = np.asarray(leaf), 0
    step = max(1, (32 << 20) // max(1, leaf[(slice(0, 1),) * (leaf.ndim > 0)].nbytes))
    for start in range(0, leaf.shape[0], step):
        for second in range(0, leaf.shape[1] if leaf.ndim > 2 else 1):
            box = [slice(0, size) for size in leaf.shape]
            box[0] = slice(start, min(start + step, leaf.shape[0]))
            if leaf.ndim > 2:
                box[1] = slice(second, second + 1)
            part = np.ascontiguousarray(leaf[tuple(box)])
            wrong += int((part.view(np.uint16) != expected[tuple(box)].view(np.uint16)).sum())
    return wrong


def arithmetic(per_tensor: float, rate: float, before: int) -> str:
    """What the same code holds in memory for the published checkpoint."""
    count = sum(1 for _ in layout.tensors(PUBLISHED))
    size = 2 * sum(int(np.prod(shape, dtype=np.int64)) for shape in layout.leaf_shapes(PUBLISHED).values())
    pieces = 2 * reading.PIECE_BYTES
    total = before + pieces + reading.STAGED_BYTES + count * per_tensor
    return (
        f"\nThe published checkpoint: {size / 1e9:.1f} GB, {count:,} tensors, none mapped.\n"
        f"  program and libraries            {before / 1e9:6.2f} GB\n"
        f"  one piece and its transposed copy {pieces / 1e9:5.2f} GB   (2 x PIECE_BYTES, whatever the tensor's size)\n"
        f"  staging of arrays sent whole     {reading.STAGED_BYTES / 1e9:6.2f} GB   (JAX destination only)\n"
        f"  table of tensors                 {count * per_tensor / 1e9:6.2f} GB   ({per_tensor:,.0f} bytes each)\n"
        f"  sum                              {total / 1e9:6.2f} GB\n"
        f"  CPU time at the rate above       {size / rate / 60:6.1f} min"
    )


def table_bytes(source: str) -> float:
    """Bytes of the table of tensors, per tensor."""
    import tracemalloc

    tracemalloc.start()
    leaves = reading._resolve(reading.inspect(source), reading.Folder(source))
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / sum(map(len, leaves.values()))


def write(source: pathlib.Path, config: ModelConfig) -> dict:
    """Saves the computed arrays and measures."""
    sampler = Sampler(str(source))
    sampler.start()
    start, used = time.perf_counter(), time.process_time()
    hub.save(source, config, computed_tree(config))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    sampler.stop.set()
    sampler.join()
    return {"seconds": seconds, "cpu": used, "peak": sampler.peak}


def report(source: pathlib.Path, config: ModelConfig, saved: dict, loaded: dict) -> None:
    """Prints the table and the arithmetic."""
    on_disk = sum(file.stat().st_size for file in source.iterdir())
    shards = len(list(source.glob("*.safetensors")))
    count = sum(1 for _ in layout.tensors(config))
    print(f"on disk {on_disk / 1e9:.2f} GB, {shards} files, {count:,} tensors; loaded into {DESTINATION.value}\n")
    heads = ("", "GB", "seconds", "CPU s", "GB/CPU s", "peak beyond arrays, GB", "wrong values")
    print("".join(f"{head:>{max(10, len(head) + 2)}}" for head in heads))
    for name, row in (("save", saved), ("load", loaded)):
        size = loaded["bytes"] / 1e9
        cells = (name, f"{size:.2f}", f"{row['seconds']:.1f}", f"{row['cpu']:.1f}", f"{size / row['cpu']:.2f}",
                 f"{row['peak'] / 1e9:.2f}", str(row.get("wrong", "")))
        print("".join(f"{cell:>{max(10, len(head) + 2)}}" for cell, head in zip(cells, heads, strict=True)))
    print(arithmetic(table_bytes(str(source)), loaded["bytes"] / loaded["cpu"], loaded["before"]))


def main(argv: list[str]) -> None:
    """Writes, reads in a child process, reports."""
    del argv
    root = pathlib.Path(FOLDER.value).absolute()
    if root.exists():
        sys.exit(f"--folder={root}: exists; name a folder that this program may make and remove")
    source, target = root / "checkpoint", root / "destination"
    config = dataclasses.replace(PUBLISHED, num_hidden_layers=4, num_experts=EXPERTS.value, param_dtype="bfloat16")
    try:
        saved = write(source, config)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            loaded = child.submit(read, str(source), str(target), DESTINATION.value).result()
        report(source, config, saved, loaded)
        if loaded["wrong"] or max(loaded["peak"], saved["peak"]) > LIMIT:
            sys.exit(1)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    app.run(main)
