"""Reading compiled HLO text: collectives with bytes, matrix FLOPs and estimated cycles, loop trip counts applied.

XLA's own `cost_analysis()` counts a loop body once, so the text is read instead: every computation gets the number of
times it runs (entry 1, a while body its trip count), and per-instruction figures are multiplied by it.
"""

import dataclasses
import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

Dimensions = Sequence[int]
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0,
}
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9](?:fn)?)?)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)')
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_INTEGER = re.compile(r"^(\d+)\)")
_NO_ESTIMATE = 2**63 - 1  # cycles of what a TPU's sparse cores do


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction: `shape` is the text of its result type, `rest` its operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> str:
        """Operand list, without the attributes behind the closing bracket."""
        depth = 1
        for i, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return self.rest[:i]
        return self.rest


@dataclasses.dataclass
class Summary:
    """What a program does in one run on one device.

    Attributes:
      collective_bytes, collective_count: by kind; bytes are of the collective's larger side.
      matmul_flops: of products that the compiler made.
      kernel_flops: that custom kernels state of themselves.
      silent_kernels: runs of kernels that state nothing, by name.
      cycles: estimated, by instruction (trip counts applied), where the compiler gives an estimate.
      origin: where in the traced program an instruction of `cycles` or a collective comes from.
      without_estimate: instructions run for which it says that it has none.
      unknown_loops: while loops whose trip count depends on data; they are counted once.
    """

    collective_bytes: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    collective_count: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    largest_collectives: list[tuple[float, str, int, str]] = dataclasses.field(default_factory=list)
    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    silent_kernels: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    cycles: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    origin: dict[str, str] = dataclasses.field(default_factory=dict)
    without_estimate: int = 0
    unknown_loops: int = 0

    def top_cycles(self, count: int = 20) -> list[tuple[str, float]]:
        """The `count` instructions with most estimated cycles (trip counts applied), largest first."""
        return sorted(self.cycles.items(), key=lambda item: -item[1])[:count]


def shape_bytes(text: str) -> list[float]:
    """Bytes of every array shape named in `text`, in order."""
    return [
        _BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in _SHAPE.findall(text) if kind in _BYTES
    ]


def _dimensions(text: str) -> list[list[int]]:
    return [[int(d) for d in dims.split(",") if d] for kind, dims in _SHAPE.findall(text) if kind in _BYTES]


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Splits HLO text into computations; returns the entry's name and instructions by computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(*found.groups()))
        elif line == "}":  # kernels' metadata spans lines, of which some begin with a brace
            current = None
    if not entry:
        raise ValueError("HLO text has no ENTRY computation")
    return entry, computations


def _trip_count(
    loop: Instruction, beside: Sequence[Instruction], computations: dict[str, list[Instruction]]
) -> int | None:
    """How often a while loop among the instructions `beside` runs; None where it depends on data.

    Back ends that keep no known trip count (TPU) still have the bound in the condition, as an integer constant
    that the counter, which goes up by 1 in what JAX makes, is compared with.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known.group(1))
    condition = computations.get(dict(_CALLED.findall(loop.rest)).get("condition", ""), [])
    inside = list(condition)
    for name in [called for i in inside for _, called in _CALLED.findall(i.rest)]:
        inside += computations.get(name, ())
    compares = [i for i in inside if i.opcode == "compare" and "direction=LT" in i.rest]
    bounds = [int(found.group(1)) for i in inside if i.opcode == "constant" and i.shape.startswith(("s32[]", "u32[]"))
              and (found := _INTEGER.match(i.rest))]
    if len(compares) != 1 or not bounds or max(bounds) <= 0:
        return None
    return max(bounds) - _first_count(loop, compares[0], condition, beside)


def _first_count(
    loop: Instruction, compare: Instruction, condition: Sequence[Instruction], beside: Sequence[Instruction]
) -> int:
    """Where a loop's counter begins: 0 unless the compiler has run the first iterations outside of it."""
    find = lambda instructions, name: next((i for i in instructions if i.name == name), None)
    operand = lambda instruction, i: (_OPERAND.findall(instruction.operands) + [""] * (i + 1))[i]
    counter = find(condition, operand(compare, 0))
    index = re.search(r"index=(\d+)", counter.rest) if counter else None
    carried = find(beside, operand(loop, 0))
    if index is None or carried is None or carried.opcode != "tuple":
        return 0
    first = find(beside, operand(carried, int(index.group(1))))
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = find(beside, operand(first, 0))
    found = _INTEGER.match(first.rest) if first is not None and first.opcode == "constant" else None
    return int(found.group(1)) if found else 0


def _calls(
    instruction: Instruction, beside: Sequence[Instruction], computations: dict[str, list[Instruction]]
) -> Iterator[tuple[str, int]]:
    """Computations that an instruction runs, with how often per execution."""
    if instruction.opcode in ("async-update", "async-done"):
        return  # counted at the start
    trips = (_trip_count(instruction, beside, computations) or 1) if instruction.opcode == "while" else 1
    for attribute, name in _CALLED.findall(instruction.rest):
        # tpu7x hands collectives to its sparse cores as `call-start`; elsewhere it is a reduction's scalar reducer.
        if attribute == "to_apply" and instruction.opcode not in ("call", "call-start"):
            continue
        yield name, trips
    for names in _BRANCHES.findall(instruction.rest):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def multiplicities(entry: str, computations: dict[str, list[Instruction]]) -> dict[str, int]:
    """How many times each computation runs in one execution of the entry."""
    result: dict[str, int] = defaultdict(int)
    calls = {name: [call for i in body for call in _calls(i, body, computations)]
             for name, body in computations.items()}

    def visit(name: str, times: int) -> None:
        result[name] += times
        for called, trips in calls.get(name, ()):
            visit(called, times * trips)

    visit(entry, 1)
    return dict(result)


def _matmul_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    output = _dimensions(instruction.shape)
    operands = [shapes.get(name, "") for name in re.findall(r"%([\w.\-]+)", instruction.operands)]
    inline = _dimensions(instruction.operands)
    sides = inline if len(inline) >= 2 else [d for text in operands for d in _dimensions(text)]
    if not output or len(sides) < 2:
        return 0.0
    if instruction.opcode == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.rest)
        dims = [int(d) for d in contracting.group(1).split(",") if d] if contracting else []
        return 2.0 * math.prod(output[0]) * math.prod(sides[0][d] for d in dims)
    return _convolution_flops(instruction.rest, output[0], sides[0], sides[1])


def _convolution_flops(attributes: str, output: Dimensions, left: Dimensions, kernel: Dimensions) -> float:
    """FLOPs of a convolution, products with padding and holes left out.

    A TPU's compiler writes batched products as convolutions over the batch whose windows meet one real element each.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        return 0.0
    read, kept, made = (dict(zip(names, sizes, strict=True)) for names, sizes in
                        zip(labels.groups(), (left, kernel, output), strict=True))
    window = re.search(r"window=\{([^}]*)\}", attributes)
    settings = dict(item.split("=") for item in window.group(1).split()) if window else {}
    setting = lambda name, i, default: settings[name].split("x")[i] if name in settings else default
    pairs = [
        _meetings(read[label], made[label], kept[label], int(setting("stride", i, 1)),
                  int(setting("pad", i, "0_0").split("_")[0]), int(setting("lhs_dilate", i, 1)),
                  int(setting("rhs_dilate", i, 1)))
        for i, label in enumerate(sorted(filter(str.isdigit, kept)))]
    # Of grouped features the kernel has one group's.
    return 2.0 * made["b"] * made["f"] * kept["i"] * math.prod(pairs)


@functools.cache
def _meetings(size: int, out: int, window: int, stride: int, pad: int, dilation: int, window_dilation: int) -> int:
    """Pairs of an output position and a window position that read a real element, along one dimension."""
    starts, last = stride * np.arange(out) - pad, (size - 1) * dilation
    places = (starts + window_dilation * i for i in range(window))  # a batch's windows are too many for one array
    return sum(int(np.sum((place >= 0) & (place <= last) & (place % dilation == 0))) for place in places)


def summarize(text: str) -> Summary:
    """Collectives, FLOPs and estimated cycles of one execution of the program in `text`."""
    entry, computations = parse(text)
    times = multiplicities(entry, computations)
    summary = Summary()
    for name, instructions in computations.items():
        count = times.get(name, 0)
        if not count:
            continue
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            if kind := _collective_kind(instruction, name):
                _add_collective(summary, instruction, kind, count, shapes)
            elif instruction.opcode in ("dot", "convolution"):
                summary.matmul_flops += count * _matmul_flops(instruction, shapes)
            elif instruction.opcode == "custom-call" and (flops := _KERNEL_FLOPS.search(instruction.rest)):
                summary.kernel_flops += count * float(flops.group(1))
            elif instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.rest:
                summary.silent_kernels[instruction.name.split(".")[0]] += count
            elif instruction.opcode == "while" and _trip_count(instruction, instructions, computations) is None:
                summary.unknown_loops += 1
            cycles = _CYCLES.search(instruction.rest)
            if cycles and int(cycles.group(1)) == _NO_ESTIMATE:
                summary.without_estimate += count
            elif cycles:
                summary.cycles[instruction.name] += count * float(cycles.group(1))
                summary.origin[instruction.name] = _origin(instruction)
    summary.largest_collectives = sorted(summary.largest_collectives, reverse=True)[:20]
    return summary


def _collective_kind(instruction: Instruction, computation: str) -> str | None:
    """The kind of an instruction that begins a collective."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    if "chain_id=" in instruction.rest and '"flag_start":"-1"' not in instruction.rest:
        return None  # fused with products, it goes in steps, each written as the whole; the first has no flags
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # and its slice, in one fusion
    return kind


def _origin(instruction: Instruction) -> str:
    found = _ORIGIN.search(instruction.rest)
    return found.group(1) if found else ""


def _add_collective(summary: Summary, instruction: Instruction, kind: str, count: int, shapes: dict[str, str]) -> None:
    inline = shape_bytes(instruction.operands)
    named = [sum(shape_bytes(shapes.get(name, ""))) for name in _OPERAND.findall(instruction.operands)]
    operands = inline or named
    if kind == "ragged-all-to-all":
        # Rows to send and the buffer they are written to, which is the result; then offsets and sizes. How much of
        # both is used depends on data.
        moved = count * max(operands[:2])
    else:
        # An asynchronous start's result tuple holds its operands too.
        started = sum(operands) if instruction.opcode.endswith("-start") else 0
        moved = count * max(sum(operands), sum(shape_bytes(instruction.shape)) - started)
    summary.collective_bytes[kind] += moved
    summary.collective_count[kind] += count
    summary.largest_collectives.append((moved, kind, count, _origin(instruction)))


def cycles_by_part(summary: Summary, parts: dict[str, str]) -> dict[str, float]:
    """Estimated cycles by part of the program.

    Args:
      summary: of the program.
      parts: name of a part: regular expression of the origins that belong to it; the first that matches counts,
        and "other" takes what none matches.
    """
    patterns = {name: re.compile(pattern) for name, pattern in parts.items()}
    result = dict.fromkeys((*parts, "other"), 0.0)
    for name, cycles in summary.cycles.items():
        found = next((part for part, p in patterns.items() if p.search(summary.origin.get(name, ""))), "other")
        result[found] += cycles
    return result


def to_json(summary: Summary) -> dict[str, object]:
    """A JSON-ready form of `summary`."""
    return json.loads(json.dumps({
        "collective_bytes": dict(summary.collective_bytes), "collective_count": dict(summary.collective_count),
        "largest_collectives": [
            {"bytes": moved, "kind": kind, "count": count, "origin": origin}
            for moved, kind, count, origin in summary.largest_collectives],
        "matmul_flops": summary.matmul_flops, "kernel_flops": summary.kernel_flops,
        "kernels_without_flops": dict(summary.silent_kernels),
        "data_dependent_loops": summary.unknown_loops, "without_cycle_estimate": summary.without_estimate,
        "top_cycles": [{"op": name, "cycles": cycles, "origin": summary.origin.get(name, "")}
                       for name, cycles in summary.top_cycles()],
    }))
