"""Claim: weights are streamed; host memory is bounded by a few tensors, not by the model.

  python benchmarks/hub_stream.py --folder=/big/disk [--destination=memmap|jax] [--experts=320]
  python benchmarks/hub_stream.py --folder=/big/disk --processes=2 --experts=128

Writes a synthetic checkpoint of the 80B model's shapes with four layers (9.3 GB in bfloat16 with 320 experts a
layer) through `hub.save` from arrays that are computed on demand, reads it back through `hub.load` in a process of
its own into memory-mapped arrays (or JAX arrays), checks every value, and prints the peak of resident memory beyond
the destination. Needs twice the checkpoint's size on disk, and removes both afterwards. Exit status 1 where a value
differs or the peak exceeds 2.5 GB.

With --processes=N the second claim: no host holds the model. N processes of four emulated devices each, joined as a
pod's hosts are, load the checkpoint onto a mesh that splits every large array over all devices (each process's part of
the "device memory" is its own memory), check every value that they hold, and save it together; every byte that they
wrote is compared. Exit status 1 where one differs, or where a process's peak, loading or saving, exceeds what it held
before by more than 1.2 / N of the checkpoint.

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
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

from qcn_jax import files, hub, testing
from qcn_jax.config import MeshConfig, ModelConfig
from qcn_jax.hub import layout, reading, stored, writing
from qcn_jax.pipeline.train.layout import param_shardings
from qcn_jax.sharding import distributed
from qcn_jax.sharding.mesh import make_parallel

FOLDER = flags.DEFINE_string(
    "folder", "/tmp/hub_stream", "Where the checkpoint and the destination are put; made and removed."
)
DESTINATION = flags.DEFINE_enum("destination", "memmap", ["memmap", "jax"], "What is loaded into.")
EXPERTS = flags.DEFINE_integer("experts", 320, "Experts a layer (the published model has 512).")
PROCESSES = flags.DEFINE_integer("processes", 1, "Load and save by this many processes together.", lower_bound=1)
COORDINATOR = flags.DEFINE_string("coordinator", None, "Of a process that this program has started.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of a process that this program has started.")
DEVICES = 4  # of each process
LIMIT = 2.5e9
PART = 1.2  # of a process's even share of the checkpoint
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


def one_of_several(root: pathlib.Path) -> None:
    """One process of several: loads its part, checks it, saves; leaves root/<process>.json."""
    distributed.start(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
    config = hub.inspect(root / "checkpoint")
    parallel = make_parallel(MeshConfig())
    distributed.barrier("begin")  # what collectives need is there before anything is measured
    found = {}

    def measured(name: str, work: Callable[[], Any]) -> Any:
        sampler = Sampler(str(root))
        sampler.start()
        start = time.perf_counter()
        result = work()
        found[name] = {"seconds": time.perf_counter() - start}
        sampler.stop.set()
        sampler.join()
        found[name]["peak"] = sampler.peak
        return result

    measured("before", lambda: None)
    shardings = param_shardings(config, parallel)
    load = lambda: jax.block_until_ready(hub.load(root / "checkpoint", shardings=shardings))
    config, params = measured("load", load)
    found["held"] = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    expected = computed_tree(config)
    found["wrong"] = sum(jax.tree.leaves(jax.tree.map(count_wrong_shards, params, expected)))
    measured("save", lambda: hub.save(root / "saved", config, params))
    files.write_json(root / f"{PROCESS_ID.value}.json", found)


def count_wrong_shards(leaf: jax.Array, expected: Computed) -> int:
    """Elements that differ in this process's shards."""
    wrong = 0
    for shard in leaf.addressable_shards:
        first = tuple(part.indices(size)[0] for part, size in zip(shard.index, leaf.shape))
        wrong += count_wrong(shard.data, Moved(expected, first))
    return wrong


@dataclasses.dataclass(frozen=True)
class Moved:
    """A part of a Computed array, whose indices begin at `first`."""

    whole: Computed
    first: tuple[int, ...]

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """The values in a box."""
        return self.whole[tuple(slice(part.start + at, part.stop + at) for part, at in zip(box, self.first))]


def different_tensors(one: pathlib.Path, other: pathlib.Path) -> int:
    """How many tensors are not in both checkpoints, or with other bytes."""
    first, second = reading.Folder(one).table, reading.Folder(other).table

    def same(a: stored.Source, b: stored.Source) -> bool:
        pieces = [(row, min(row + 1024, a.shape[0])) for row in range(0, a.shape[0], 1024)]
        return a.shape == b.shape and all(a.rows(*piece).tobytes() == b.rows(*piece).tobytes() for piece in pieces)

    return len(set(first) ^ set(second)) + sum(not same(first[name], second[name]) for name in set(first) & set(second))


def several(root: pathlib.Path) -> bool:
    """Starts the processes, prints what they found; returns whether the claim holds."""
    command = [sys.executable, __file__, f"--folder={root}"]
    with testing.Hosts(command, PROCESSES.value, DEVICES, quick=False) as hosts:
        hosts.finish()
    found = [files.read_json(root / f"{number}.json") for number in range(PROCESSES.value)]
    size = sum(file.stat().st_size for file in (root / "checkpoint").glob("*.safetensors"))
    different = different_tensors(root / "checkpoint", root / "saved")
    print(f"checkpoint {size / 1e9:.2f} GB, {PROCESSES.value} processes of {DEVICES} devices; "
          f"{len(list((root / 'saved').glob('*.safetensors')))} files written, {different} tensors differ\n")
    heads = ("process", "before, GB", "holds, GB", "load s", "peak beyond, GB", "of all", "save s", "peak beyond, GB",
             "of all", "wrong values")
    print("  ".join(heads))
    limit, fine = PART / PROCESSES.value, different == 0
    for number, row in enumerate(found):
        before = row["before"]["peak"]
        beyond = [row[name]["peak"] - before for name in ("load", "save")]
        cells = (number, f"{before / 1e9:.2f}", f"{row['held'] / 1e9:.2f}", f"{row['load']['seconds']:.0f}",
                 f"{beyond[0] / 1e9:.2f}", f"{beyond[0] / size:.3f}", f"{row['save']['seconds']:.0f}",
                 f"{beyond[1] / 1e9:.2f}", f"{beyond[1] / size:.3f}", row["wrong"])
        print("  ".join(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)))
        fine &= max(beyond) <= limit * size and not row["wrong"]
    print(pod_arithmetic(max(row["before"]["peak"] for row in found), table_bytes(str(root / "checkpoint"))))
    return fine


def pod_arithmetic(before: int, per_tensor: float) -> str:
    """What a host and a chip of two pods hold of the published checkpoint."""
    size = 2 * sum(int(np.prod(shape, dtype=np.int64)) for shape in layout.leaf_shapes(PUBLISHED).values())
    count = sum(1 for _ in layout.tensors(PUBLISHED))
    table = count * per_tensor
    load = before + table + 2 * reading.PIECE_BYTES + reading.STAGED_BYTES
    save = before + table + 2 * writing.GATHERED_BYTES
    lines = [f"\nThe published checkpoint: {size / 1e9:.1f} GB. A host's memory, however many there are: loading "
             f"{load / 1e9:.2f} GB, saving {save / 1e9:.2f} GB\n(program {before / 1e9:.2f}, table of tensors "
             f"{table / 1e9:.2f}; two pieces of {reading.PIECE_BYTES >> 20} MiB and {reading.STAGED_BYTES >> 20} MiB "
             f"staged; two slabs of {writing.GATHERED_BYTES >> 20} MiB)."]
    for name, chips in (("v5p-128", 64), ("v6e-256", 256)):
        hosts = chips // DEVICES
        lines.append(f"  {name}: {hosts} hosts of {DEVICES} chips; a chip holds {size / chips / 1e9:.2f} GB and one slab, "
                     f"a host writes {size / hosts / 1e9:.1f} GB")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Writes, reads in a child process, reports."""
    del argv
    root = pathlib.Path(FOLDER.value).absolute()
    if PROCESS_ID.value is not None:
        one_of_several(root)
        return
    if root.exists():
        sys.exit(f"--folder={root}: exists; name a folder that this program may make and remove")
    source, target = root / "checkpoint", root / "destination"
    config = dataclasses.replace(PUBLISHED, num_hidden_layers=4, num_experts=EXPERTS.value, param_dtype="bfloat16")
    try:
        saved = write(source, config)
        if PROCESSES.value > 1:
            sys.exit(0 if several(root) else 1)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            loaded = child.submit(read, str(source), str(target), DESTINATION.value).result()
        report(source, config, saved, loaded)
        if loaded["wrong"] or max(loaded["peak"], saved["peak"]) > LIMIT:
            sys.exit(1)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    app.run(main)
