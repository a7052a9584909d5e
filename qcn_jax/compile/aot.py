"""Ahead-of-time compilation for a TPU topology that is not here, and what the compiler says about the program.

libtpu compiles for any generation on a machine without a TPU. What comes back is memory, collectives, FLOPs and the
compiler's own per-op estimates; never a time: overlap and interconnect are not in it.
"""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qcn_jax import files
from qcn_jax.compile import hlo
from qcn_jax.errors import UserError
from qcn_jax.sharding.chips import CHIPS

GIB = 2**30
# What libtpu wants to know of the machine that it would run on; any values do, as nothing runs.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5p-128", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Parts of the model by where instructions come from; the first that matches counts.
PARTS = {
    "head and loss": r"over_vocabulary",
    "optimizer": r"/optimizer/",
    "delta rule": r"delta_rule|/_group/|_run_chunks|unit_lower_inverse",
    "delta net": r"linear_attn",
    "attention": r"self_attn",
    "moe": r"/mlp/|dispatch",
}


class TooLarge(UserError):
    """The program does not fit the chip's memory.

    used, limit: bytes of HBM that it would take and that there are; None where the compiler does not say.
    """

    def __init__(self, line: str, used: float | None = None, limit: float | None = None) -> None:
        super().__init__(line)
        self.used, self.limit = used, limit


def generation(topology: str) -> str:
    """The chip generation in a topology's name, e.g. v5p of v5p:4x4x4.

    Raises:
      UserError: an unknown generation or a name of another form.
    """
    name = topology.split(":")[0]
    if name not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)*", topology):
        raise UserError(f"--topology={topology}: is not GENERATION:AxBxC with a generation of {', '.join(CHIPS)}, e.g. "
                        "v5p:4x4x4 or v5e:16x16")
    return name


def topology_devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of `slices` slices of a topology, to be put into a mesh and compiled for.

    Raises:
      UserError: libtpu is missing or does not know the topology.
    """
    from jax.experimental import topologies

    generation(topology)
    if libtpu_version() is None:
        raise UserError("libtpu is not installed; pip install 'qcn_jax[compile]'")
    options = {"num_slices": slices} if slices > 1 else {}
    bounds = topology.split(":")[1].split("x")
    if all(bound == "1" for bound in bounds):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # jaxlib raises several kinds
        line = str(error).splitlines()[0][:200]
        raise UserError(f"--topology={topology}: libtpu does not accept it: {line}") from error


def libtpu_version() -> str | None:
    """Version of the installed libtpu; None where there is none."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def bytes_per_device(tree: Any) -> int:
    """Bytes that a device holds in HBM of ShapeDtypeStructs with shardings (without the compiler's padding)."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        on_host = (leaf.sharding.memory_kind or "").endswith("host")
        return 0 if on_host else leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile: a jitted function, its abstract arguments, and the same by kind."""

    function: Any
    arguments: tuple[Any, ...]
    kinds: Mapping[str, Any]


def compile_program(program: Program, topology: str, dump: str | None = None) -> dict[str, Any]:
    """Compiles `program`, whose arguments lie on devices of `topology`; returns what is known of it, JSON-ready.

    Args:
      dump: file that gets the compiled program's text.

    Raises:
      TooLarge: the compiler says that it does not fit.
      UserError: the compiler refuses it for another reason.
    """
    begin = time.perf_counter()
    lowered = program.function.trace(*program.arguments).lower(lowering_platforms=("tpu",))
    traced, busy = time.perf_counter(), time.process_time()
    try:
        compiled, text = compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(str(error)) from error
    seconds, busy = time.perf_counter() - traced, time.process_time() - busy
    if dump:
        files.write_text(dump, text)
    summary = hlo.summarize(text)
    return {
        "memory": _memory(compiled.memory_analysis(), program.kinds, topology),
        **hlo.to_json(summary),
        "cycles_by_part": hlo.cycles_by_part(summary, PARTS),
        "seconds": {"trace_and_lower": round(traced - begin, 1), "compile": round(seconds, 1),
                    "compile_cpu": round(busy, 1)},  # of all threads: other work on the machine does not show
        "versions": {"jax": jax.__version__, "libtpu": libtpu_version()},
    }


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The program compiled for TPU, and its text as generated.

    The compiler writes the text to a file: as_text() of the newest libtpu (0.0.52) fails for large programs.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={
            "xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "^$"})
        (path,) = pathlib.Path(folder).glob("*.after_codegen.txt")
        return compiled, path.read_text(encoding="utf-8")


def _memory(stats: Any, kinds: Mapping[str, Any], topology: str) -> dict[str, Any]:
    """Bytes per device: arguments by kind, what the step needs besides, and the chip's."""
    limit = CHIPS[generation(topology)].hbm
    arguments = {name: bytes_per_device(tree) for name, tree in kinds.items()}
    device = stats.argument_size_in_bytes
    # Outputs that do not take the place of donated arguments.
    outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    total = device + stats.temp_size_in_bytes + outputs + stats.generated_code_size_in_bytes
    return {
        "arguments_by_kind": arguments, "padding": max(0, device - sum(arguments.values())), "arguments": device,
        "activations_and_temporaries": stats.temp_size_in_bytes, "outputs_not_aliased": outputs,
        "code": stats.generated_code_size_in_bytes, "host": stats.host_argument_size_in_bytes,
        "total": total, "hbm": limit, "fits": total <= limit,
    }


def _refusal(message: str) -> UserError:
    """The compiler's message as one line; sizes where it is about memory."""
    line = " ".join(message.split())
    found = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", line)
    if found:
        unit = {"K": 2**10, "M": 2**20, "G": GIB}
        used, limit = (float(found.group(i)) * unit[found.group(i + 1)] for i in (1, 3))
        return TooLarge(f"needs {used / GIB:.1f} GiB of HBM per device, there are {limit / GIB:.1f}", used, limit)
    if "RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower():
        return TooLarge(line[:400])
    return UserError(f"the compiler refuses the program: {line[:400]}")


def worker_environment() -> dict[str, str]:
    """The environment of a process that compiles: its own, as libtpu reads it once and may abort on large programs."""
    return {**os.environ, **ENVIRONMENT}
