"""The engine's programs for a TPU topology: what acting takes of a chip, how many sequences fit, what a token moves."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from qcn_jax.compile import aot
from qcn_jax.compile.stages import StageStep, stage_step
from qcn_jax.config import ModelConfig, RunConfig, training_settings
from qcn_jax.errors import UserError
from qcn_jax.inference.memory import Budget
from qcn_jax.inference.placement import Placement, acting
from qcn_jax.inference.programs import Programs
from qcn_jax.layers.attention import init_attention_cache
from qcn_jax.layers.gated_delta_net import init_delta_net_cache
from qcn_jax.model import Qwen3Next, abstract_params
from qcn_jax.pipeline.train.layout import param_shardings
from qcn_jax.sharding.chips import CHIPS, HOP_SECONDS
from qcn_jax.sharding.parallel import Parallel

PROGRAMS = ("decode", "prefill", "arrange", "update")  # the last is the trainer's step, while episodes stay open
LENGTHS = (8192, 65_536, 262_144)  # tokens of sequences, whose number is said
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class SequenceBytes:
    """What one sequence holds, whatever device it is on: bytes a token, and of its recurrent states and windows."""

    token: int
    state: int

    @classmethod
    def of(cls, model: ModelConfig) -> "SequenceBytes":
        """Counts the caches of `model`'s layers."""
        full = model.num_hidden_layers // model.full_attention_interval
        size = lambda make: sum(math.prod(leaf.shape) * leaf.dtype.itemsize
                                for leaf in jax.tree.leaves(jax.eval_shape(make)))
        return cls(full * size(lambda: init_attention_cache(model, 1, 1)),
                   (model.num_hidden_layers - full) * size(lambda: init_delta_net_cache(model, 1)))


def compile_rollout(config: RunConfig, parallel: Parallel, topology: str, dump: str | None = None) -> dict[str, Any]:
    """Compiles decode, prefill, the change of layout and the update as stage `experts` runs them; JSON-ready.

    Args:
      config: its `experts.rollout` gives slots, lengths and prefill's shape.
      parallel: the mesh of the trainer, over devices of `topology`.
      dump: file that gets decode's compiled text.

    Raises:
      TooLarge, UserError: see aot.compile_program, and slots that the devices cannot share evenly.
    """
    model, settings = config.model, training_settings(config, "experts").rollout
    place = Placement(acting(parallel, model))
    if settings.slots % place.parts:
        raise UserError(f"--config.experts.rollout.slots: {settings.slots} do not divide by {place.parts} devices")
    own = settings.slots // place.parts
    network = Qwen3Next(model, unrolled=True, parallel=place.parallel)
    budget = Budget.of(place.parts, own, settings.max_length, settings.block_size or None, settings.num_blocks or None)
    programs = Programs(network, place, own, budget.blocks, budget.size, settings.max_new_tokens)
    lanes = min(own, -(-(settings.max_num_seqs or settings.slots) // place.parts))
    step = stage_step(config, "experts", parallel)
    found = {}
    for name in PROGRAMS:
        if name == "update":
            found[name] = aot.compile_program(aot.Program(step.function, step.arguments, step.kinds), topology)
            continue
        if name == "arrange":
            given = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                                 abstract_params(model), param_shardings(model, parallel))
            arguments, kinds, limit = (given,), {"trainer's weights": given}, None
        else:
            rows = -(-settings.prefill_rows // place.parts) if name == "prefill" else lanes
            arguments = programs.abstract(name, rows, budget.width, settings.prefill_chunk)
            kinds, limit = _kinds(arguments), settings.max_length
        program = aot.Program(programs.function(name, limit), arguments, kinds)
        found[name] = aot.compile_program(program, topology, dump if name == "decode" else None)
    return {"slots": settings.slots, "max_length": settings.max_length, "parts": place.parts, "programs": found,
            "prefill_tokens": -(-settings.prefill_rows // place.parts) * settings.prefill_chunk,  # of a part and call
            **_account(config, place, found, step, topology)}


def _kinds(arguments: tuple[Any, ...]) -> dict[str, Any]:
    params, cache, logits = arguments[:3]
    by_name: dict[str, list[Any]] = {"keys and values": [], "states": []}
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache.layers):
        by_name["keys and values" if path[-1].key in ("k", "v") else "states"].append(leaf)
    return {"weights": params, **by_name, "logits": logits}


def _beside(found: dict[str, Any], trainer: int) -> dict[str, int]:
    """Bytes of a device that are taken, sequences apart, while each program runs; `trainer`: what always lies there."""
    weights = found["decode"]["memory"]["arguments_by_kind"]["weights"]  # as the engine holds them, all the time
    taken = {}
    for name, program in found.items():
        memory = program["memory"]
        taken[name] = weights + (memory["total"] if name == "update" else trainer + sum(
            memory[part] for part in ("activations_and_temporaries", "outputs_not_aliased", "code")))
    return taken


def _account(
    config: RunConfig, place: Placement, found: dict[str, Any], step: StageStep, topology: str
) -> dict[str, Any]:
    """How many sequences stay open whichever program runs, and the time that memory and links take at least."""
    chip, each = CHIPS[aot.generation(topology)], SequenceBytes.of(config.model)
    state = {name: tree for name, tree in step.kinds.items() if name != "batch"}
    trainer, decode = sum(map(aot.bytes_per_device, state.values())), found["decode"]
    weights = decode["memory"]["arguments_by_kind"]["weights"]
    row = each.state + np.dtype(np.float32).itemsize * config.model.vocab_size
    beside = _beside(found, trainer)
    fit = {name: {length: max(0, int((chip.hbm - taken) // (row + each.token * length))) * place.parts
                  for length in LENGTHS} for name, taken in beside.items()}
    own = config.experts.rollout.slots // place.parts
    read = weights + own * (2 * each.state + each.token * config.experts.rollout.max_length)
    moved, count = sum(decode["collective_bytes"].values()), sum(decode["collective_count"].values())
    return {
        "bytes_per_token": each.token, "bytes_per_state": each.state, "trainer_bytes": trainer,
        "beside": beside, "sequences_by_program": fit,
        "sequences": {length: min(counts[length] for counts in fit.values()) for length in LENGTHS},
        "floor": {"bytes": read, "seconds": read / chip.bandwidth},
        "links": {"bytes": moved, "seconds": moved / chip.links, "count": count, "latency": count * HOP_SECONDS},
    }


def render(report: dict[str, Any]) -> list[str]:
    """The account as lines of text."""
    gib = lambda n: f"{n / _GIB:8.2f} GiB"
    lines = [f"{report['slots']} slots of {report['max_length']:,} tokens on {report['parts']} parts of the mesh; "
             f"{report['bytes_per_token']:,} bytes a token, {report['bytes_per_state'] / 1e6:.1f} MB of states"]
    for name, found in report["programs"].items():
        memory = found["memory"]
        lines += ["", f"{name}: HBM per device"]
        parts = memory["arguments_by_kind"] | {
            "temporaries": memory["activations_and_temporaries"], "outputs beside": memory["outputs_not_aliased"]}
        lines += [f"  {kind:<28}{gib(size)}" for kind, size in parts.items() if size]
        lines += [f"  {kind:<28}{moved / 1e9:8.3f} GB in {found['collective_count'][kind]:,} exchanges"
                  for kind, moved in sorted(found["collective_bytes"].items(), key=lambda item: -item[1])]
        cycles = {part: count for part, count in found["cycles_by_part"].items() if count}
        lines += [f"  estimated cycles: {sum(cycles.values()):,.0f} ("
                  + ", ".join(f"{part} {count:,.0f}" for part, count in cycles.items()) + ")"]
    floor, links = report["floor"], report["links"]
    lines += [
        "", f"trainer's state beside them{gib(report['trainer_bytes'])}",
        *(f"{int(length) // 1024}k sequences: {count:,} (" + ", ".join(
            f"{name} {counts[length]:,}" for name, counts in report["sequences_by_program"].items()) + ")"
          for length, count in report["sequences"].items()),
        f"a decode step reads at least {floor['bytes'] / 1e9:.2f} GB a device when all slots are full: "
        f"{1e3 * floor['seconds']:.1f} ms of HBM; its {links['count']:,} exchanges move {links['bytes'] / 1e9:.3f} GB: "
        f"{1e3 * links['seconds']:.2f} ms of links, and {1e3 * links['latency']:.2f} ms of a hop each: "
        f"{100 * (links['seconds'] + links['latency']) / floor['seconds']:.1f} % of the HBM's",
    ]
    return lines
