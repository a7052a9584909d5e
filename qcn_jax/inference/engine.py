"""Generation engine: many conversations side by side, each with a slot of its own.

Axes: N slots, P prefill rows, D decoding lanes, C prefill chunk, M new tokens, V vocabulary. Everything compiled has
one fixed shape, whatever the conversations look like: one prefill of [P, C] tokens that is called as often as the
prompts need, one copy of states, and one decoding loop over D slots that runs inside the jitted
function until every active slot, or all but a few, has met a stop token or its limit. Prefill and decoding are
compiled once more each time the longest sequence outgrows the part of the cache that attention reads.

A slot has a row of recurrent states; its keys and values lie in blocks, of which all slots of a part have one budget: a
sequence costs what it holds, and copies share what they have in common. Slots may be more than lanes, as conversations
mostly wait for tools, and their tokens more than the budget: those that were used longest ago then go to host memory,
or are given up and prefilled again.

What a slot generates depends on its tokens, its seed and the weights, not on the other slots (but for rounding:
longer neighbours may make attention read more of the empty cache). Weights are an argument of the compiled
functions: on one device `engine.params = new` costs nothing, on a mesh one change of layout.

Over several devices every part of the placement has slots of its own, and prefill rows for them. Over several hosts the
engine is one program: every host has slots of its own and calls the same methods in the same order, with what concerns
its slots, be it nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.inference import shapes
from qcn_jax.inference.blocks import SWAP
from qcn_jax.inference.generation import Generation
from qcn_jax.inference.lanes import Lanes, Turn
from qcn_jax.inference.memory import Budget, Memory
from qcn_jax.inference.placement import Placement, acting
from qcn_jax.inference.programs import STOP_IDS, Programs
from qcn_jax.inference.sampling import History, Sampling
from qcn_jax.inference.slots import Slots
from qcn_jax.layers.attention import can_read
from qcn_jax.model import Qwen3Next
from qcn_jax.sharding.parallel import Parallel

FIRST_KEY_LIMIT = 256  # attention reads this many cached tokens, or twice as many, and so on up to the capacity
UNROLL_BYTES = 1 << 30  # parameters up to this size are also kept layer by layer


class Engine(Slots):
    """Continues up to `slots` token sequences of up to `max_length` tokens each.

    Usual course: `reset` slots, `extend` one with a prompt, `fork` it to the others of its group, `generate`,
    `extend` with what the environment answered, `generate` again.

    Attributes:
      with_routes: whether `routes` are kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        slots: int,
        max_length: int,
        max_new_tokens: int = 64,
        stop_ids: Sequence[int] = (),
        prefill_rows: int = 16,
        prefill_chunk: int = 64,
        unrolled: bool | None = None,
        drawable: np.ndarray | None = None,
        parallel: Parallel | None = None,
        snapshots: int = 0,
        with_routes: bool = False,
        several_shapes: bool = False,
        key_limit: int | None = None,
        max_num_seqs: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        preemption: str = SWAP,
    ) -> None:
        """Allocates the caches; nothing is compiled before the first use.

        Args:
          config: the model's configuration.
          params: its parameter tree.
          slots: N, sequences held at a time, over all hosts; rounded up to the same number on every device.
          max_length: tokens a slot can hold, prompt and answers together.
          max_new_tokens: M, the most that one `generate` call can give a slot.
          stop_ids: tokens that end a turn.
          prefill_rows: P, slots that one prefill call works on, over all hosts; rounded up likewise.
          prefill_chunk: C, tokens of each of them that it takes in.
          unrolled: compile every layer apart, which decodes faster (no copies of the weights and caches that a
            scan slices), compiles longer by the number of layers, and holds the weights twice. By default so
            for small models, and on a mesh.
          drawable: [V] bool, the ids that may be generated, e.g. those of the tokenizer; None for all.
          parallel: the mesh to act on, with any rules; None is one device.
          snapshots: states that can be saved, over all parts, rounded up likewise; each takes what a slot takes beside
            keys and values.
          with_routes: keep the experts of every token, see `routes`; of a model that has some.
          several_shapes: prefill may also take P / 4 or 1 slots, or C / 4 tokens, in a call, whichever wastes least;
            each of these is compiled when it is first wanted.
          key_limit: the least of a cache that attention reads, see FIRST_KEY_LIMIT, which is the default.
          max_num_seqs: D, slots that one call decodes, over all hosts, rounded up likewise; by default all. With
            `several_shapes` also fewer, see shapes.lanes, where those are enough.
          block_size: tokens of a block of keys and values; by default max_length, so that each slot has one.
          num_blocks: over all hosts, rounded up likewise; by default what all slots can fill.
          preemption: what becomes of the blocks of those that must make room: "swap" keeps them in host memory,
            "recompute" prefills their tokens again, with the weights of then.

        Raises:
          ValueError: a size below 1, or an unknown preemption.
          UserError: devices of one tensor group that belong to several hosts, or fewer blocks than a sequence may need.
        """
        sizes = {"slots": slots, "max_length": max_length, "max_new_tokens": max_new_tokens,
                 "prefill_rows": prefill_rows, "prefill_chunk": prefill_chunk,
                 "max_num_seqs": slots if max_num_seqs is None else max_num_seqs}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: {size}, must be at least 1")
        if unrolled is None:  # on a mesh the engine holds weights of its own anyway
            unrolled = parallel is not None or sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= UNROLL_BYTES
        self._placement = place = Placement(None if parallel is None else acting(parallel, config))
        self._model = Qwen3Next(config, unrolled, place.parallel)
        own = -(-slots // place.parts)
        self._budget = budget = Budget.of(place.parts, own, max_length, block_size, num_blocks, preemption)
        super().__init__(config, place.mine, own, -(-snapshots // place.parts), with_tokens=not budget.swaps)
        self.max_length, self._first_limit = max_length, key_limit
        self.max_new_tokens = max_new_tokens
        self._rows = min(-(-prefill_rows // place.parts), self._own)  # of a part
        self._lanes = min(-(-sizes["max_num_seqs"] // place.parts), self._own)
        self._row_counts = tuple(dict.fromkeys((*shapes.palette(self._rows, several_shapes), *[1] * several_shapes)))
        self._lane_counts = shapes.lanes(self._lanes, several_shapes, jax.default_backend() == "cpu")
        self._chunks = shapes.palette(min(prefill_chunk, max_length), several_shapes)
        self._stop = np.full(max(1, -(-len(stop_ids) // STOP_IDS)) * STOP_IDS, -1, np.int32)
        self._stop[: len(stop_ids)] = stop_ids
        self.with_routes, self._recomputed = with_routes, 0
        self._whole = config.attention == "splash" and can_read(budget.size)  # the kernel sees what each sequence holds
        self.programs = Programs(self._model, place, own, budget.blocks, budget.size, max_new_tokens, drawable,
                                 self.snapshots, with_routes)
        self._memory = Memory(self.programs, place, own, budget, self._rows, self.snapshots)
        self.params = params

    def clear(self) -> None:
        """Empties all slots and allocates their caches anew: a call that failed may have left them torn, or taken."""
        self._memory.clear()
        self._saved_lengths[:] = 0
        self.reset(range(self.slots))

    def _take(self, params: Any) -> None:
        self._weights = self.programs.run("arrange", params)

    params = property(None, _take, doc="""The model's parameters, to be assigned: others of the same shapes act at once.

    They may be laid out in any way; the engine keeps them as it acts with them.
    """)

    def counts(self) -> dict[str, int]:
        """What the budget of blocks has cost so far, on this host.

        Blocks swapped_out, swapped_in and copied (because several held them); sequences dropped, and recomputed_tokens.
        """
        return self._memory.counts() | {"recomputed_tokens": self._recomputed}

    def fitting(self, slots: Sequence[int], new: int) -> list[int]:
        """As many of the first slots of every part as can get `new` tokens at once: by lanes, and by blocks."""
        wanted = {slot: (self.length(slot), min(self.length(slot) + new, self.max_length)) for slot in slots}
        return [slot for group in self._memory.fitting(wanted, self._lanes) for slot in group]

    def has_room(self, lengths: Sequence[int], new: int) -> bool:
        """Whether sequences of such lengths that share nothing can get `new` tokens together, however parts divide."""
        pages = sum(-(-min(length + new, self.max_length) // self._budget.size) for length in lengths)
        return len(lengths) <= self._lanes * self.parts and pages <= self._budget.blocks * self.parts

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all hosts, which must all ask; on one host the values themselves."""
        return self._placement.most(*values)

    def compilations(self) -> int:
        """How many shapes have been compiled so far: one of copying, one of prefill and decoding per key limit."""
        return self.programs.compilations()

    def reset(self, slots: Sequence[int]) -> None:
        """Empties slots; the clearing itself happens with their next prefill. Raises ValueError for unknown slots."""
        self._check(slots)
        self._empty(slots)
        for slot in slots:
            self._memory.cut(slot, 0)

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Appends tokens to slots (slot -> tokens), in prefill calls of P slots by C tokens, or several shapes.

        Raises:
          ValueError: an unknown slot, or one that would hold more than `max_length` tokens; none is changed then.
        """
        self._check(tokens)
        for slot, added in tokens.items():
            if self._lengths[slot] + len(added) > self.max_length:
                raise ValueError(
                    f"slot {slot} holds {self._lengths[slot]} tokens; {len(added)} more exceed {self.max_length}"
                )
        left = {slot: list(added) for slot, added in tokens.items() if len(added)}
        while True:
            ends = {slot: (self.length(slot), self.length(slot) + len(added)) for slot, added in left.items()}
            groups = self._memory.fitting(ends, self.slots)
            (going,) = self.most(bool(left))
            if not going:
                return
            now = {slot: left.pop(slot) for group in groups for slot in group}
            self._fill(now, now)

    def _fill(self, tokens: dict[int, list[int]], beside: Collection[int]) -> None:
        """`extend` of slots that fit together and beside others; those that were dropped get what they held as well."""
        for slot in self._memory.dropped(tokens):
            tokens[slot] = self._tokens[slot] + tokens[slot]
            self._recomputed += len(self._tokens[slot])
            self._memory.cut(slot, 0)
            self._tokens[slot], self._lengths[slot], self._fresh[slot] = [], 0, True
        begun = dict.fromkeys(tokens, 0)
        while True:
            left = {slot: len(tokens[slot]) - at for slot, at in begun.items() if at < len(tokens[slot])}
            order = sorted(left, key=lambda slot: (-left[slot], slot))
            mine = [[slot for slot in order if self.part(slot) == part] for part in range(self.parts)]
            shape = shapes.best([[left[slot] for slot in part] for part in mine], self._row_counts, self._chunks)
            going, rows, chunk = self.most(bool(left), *(shape if left else (0, 0)))
            if not going:
                return
            self._prefill([part[:rows] for part in mine], tokens, begun, rows, chunk, beside)

    def _prefill(self, groups: Sequence[Sequence[int]], tokens: Mapping[int, Sequence[int]], begun: dict[int, int],
                 rows: int, chunk: int, beside: Collection[int]) -> None:
        """One prefill call, of up to `rows` slots of every part and `chunk` tokens of each, from `begun` on."""
        pieces = {slot: tokens[slot][begun[slot] : begun[slot] + chunk] for group in groups for slot in group}
        ends = {slot: (self.length(slot), self.length(slot) + len(piece)) for slot, piece in pieces.items()}
        memory, lanes, put = self._memory, Lanes(groups, rows), self._placement.put
        memory.hold(ends, beside)
        given = (lanes.integers({slot: slot % self._own for slot in pieces}, self._own),
                 lanes.integers({slot: self._fresh[slot] for slot in pieces}).astype(bool), lanes.pieces(pieces, chunk),
                 lanes.integers({slot: len(piece) for slot, piece in pieces.items()}), memory.tables(groups, rows))
        (longest,) = self.most(max((end for _, end in ends.values()), default=0))
        memory.cache, memory.logits, made = self.programs.run(
            "prefill", self._weights, memory.cache, memory.logits, *map(put, given),
            key_limit=self._key_limit(longest), shape=(rows, chunk))
        routes = self._placement.get(made["routes"]) if made else None
        for slot, piece in pieces.items():
            self._note(slot, piece)
            begun[slot] += len(piece)
            self._fresh[slot], self._lengths[slot] = False, ends[slot][1]
            if routes is not None:
                known = max(0, sum(map(len, self._routes[slot])) - ends[slot][0])  # where it was dropped
                self._routes[slot].append(routes[lanes.places[slot], known : len(piece)].copy())

    def _key_limit(self, longest: int) -> int:
        """How much of the cache attention must read for sequences of up to `longest` tokens."""
        if self._whole:
            return self.max_length
        limit = self._first_limit or FIRST_KEY_LIMIT
        while limit < longest:
            limit *= 2
        return min(limit, self.max_length)

    def fork(self, copies: Mapping[int, Sequence[int]]) -> None:
        """Makes slots copies of others (source -> targets), so that one prefill serves a whole group.

        Raises:
          ValueError: an unknown slot, a target named twice, or one of another part than its source.
        """
        self._check(copies)
        self._check(target for targets in copies.values() for target in targets)
        pairs = [(origin, target) for origin, targets in copies.items() for target in targets if target != origin]
        for origin, target in pairs:
            if self.part(target) != self.part(origin):
                raise ValueError(f"slot {target} is not of the part that slot {origin} is of")
        order: list[tuple[int, int]] = []
        while pairs:  # a slot that is copied and overwritten is copied first
            ready = [(origin, target) for origin, target in pairs
                     if not any(other == target for other, _ in pairs)]
            if not ready:
                raise ValueError(f"slots {', '.join(str(origin) for origin, _ in pairs)} are copied in a circle")
            order, pairs = order + ready, [pair for pair in pairs if pair not in ready]
        self._memory.copy(order)
        for origin, target in order:
            self._become(target, origin)

    def save(self, entries: Mapping[int, int]) -> None:
        """Keeps the states of slots (slot -> entry of its part's pool), for `restore`; an entry is overwritten.

        Raises:
          ValueError: an unknown slot, one without a token, an unknown entry, or one named twice.
        """
        self._check_entries(entries)
        if any(self._lengths[slot] == 0 for slot in entries):
            raise ValueError("save needs slots that hold tokens")
        self._memory.save(entries)
        for slot, entry in entries.items():
            self._saved_lengths[self.part(slot), entry] = self._lengths[slot]

    def restore(self, entries: Mapping[int, int]) -> None:
        """Cuts slots back to saved states (slot -> entry): of their tokens as many are left as the state had seen.

        Those must be the tokens that the state was saved behind: in the slot itself, or copied into it since by `fork`.

        Raises:
          ValueError: an unknown slot, an unknown or empty entry, or a slot that holds fewer tokens.
        """
        self._check_entries(entries, once=False)
        for slot, entry in entries.items():
            if not 0 < (length := self._saved_lengths[self.part(slot), entry]) <= self._lengths[slot]:
                raise ValueError(f"slot {slot} holds {self._lengths[slot]} tokens; entry {entry} is of {length}")
        self._memory.restore(entries)
        for slot, entry in entries.items():
            self._cut(slot, int(self._saved_lengths[self.part(slot), entry]))
            self._memory.cut(slot, self.length(slot))

    def generate(
        self,
        slots: Sequence[int],
        *,
        seeds: Sequence[int],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        max_new_tokens: int | Sequence[int] | None = None,
        enough: int = 0,
        histories: Sequence[History] | None = None,
    ) -> list[Generation]:
        """Generates one turn for each of `slots`, which must hold at least one token.

        Args:
          slots: which slots; the others stay as they are.
          seeds: one random stream a slot; the same seed may serve a conversation's every turn, because the
            stream counts positions.
          sampling: how to draw, for all or one each.
          max_new_tokens: at most this many, for all or one each; never past a slot's `max_length`.
          enough: stop once no more than this many slots are still generating, so that a few long turns do not
            keep all others waiting. Less than the number of slots.
          histories: what each slot holds, for draws that adjust logits by it; on several hosts all give them, or none.

        Returns:
          One Generation a slot, in the order of `slots`. All their tokens, a stop token included, are in the
          slot afterwards.

        Raises:
          ValueError: an unknown slot, one named twice or without a token, `enough` out of range, or a draw that needs
            `histories` and has none.
          UserError: the model's logits are not finite.
        """
        self._check(slots)
        if not 0 <= enough < max(1, len(slots)):
            raise ValueError(f"enough: {enough}, must be at least 0 and less than the {len(slots)} slots")
        if any(not self._lengths[slot] for slot in slots):
            raise ValueError("generate needs slots that hold a prompt")
        draws = [sampling] * len(slots) if isinstance(sampling, Sampling) else sampling
        if histories is None and any(one.adjusts for one in draws):
            raise ValueError("histories: none, where sampling has penalties, biases or alternatives")
        wanted = np.broadcast_to(self.max_new_tokens if max_new_tokens is None else max_new_tokens, len(slots))
        turns = {
            slot: Turn(int(seed), draw, min(int(most), self.max_new_tokens, self.max_length - self.length(slot)), told)
            for slot, seed, draw, most, told in zip(
                slots, seeds, draws, wanted, [None] * len(slots) if histories is None else histories, strict=True)}
        left, made = self._memory.there_first(slot for slot in slots if turns[slot].limit), {}
        while True:
            ends = {slot: (self.length(slot), self.length(slot) + turns[slot].limit) for slot in left}
            groups = self._memory.fitting(ends, self._lanes)
            wave = {slot: ends[slot] for group in groups for slot in sorted(group)}
            dropped = self._memory.dropped(wave)
            going, lanes, again = self.most(bool(left), max(map(len, groups)), bool(dropped))
            if not going:
                break
            if again:
                self._fill({slot: [] for slot in dropped}, wave)
            left = [slot for slot in left if slot not in wave]
            made |= self._decode(wave, min(count for count in self._lane_counts if count >= lanes), turns,
                                 enough * len(wave) // max(1, len(slots)), histories is not None)
        nothing = {"counts": 0, "tokens": np.zeros(0, np.int32), "logprobs": np.zeros((2, 0), np.float32)}
        return [Generation.of(made.get(slot, nothing), turns[slot].limit, turns[slot].draw, self._stop)
                for slot in slots]

    def _decode(self, wave: Mapping[int, tuple[int, int]], size: int, turns: Mapping[int, Turn], enough: int,
                adjusts: bool) -> dict[int, dict[str, np.ndarray]]:
        """One call of decoding, of `size` lanes a part, for slots that fit: what Programs.run made, by slot."""
        groups = [[slot for slot in wave if self.part(slot) == part] for part in range(self.parts)]
        memory = self._memory
        memory.hold(wave)
        lanes = Lanes(groups, size)
        put = lambda arrays: {name: self._placement.put(array) for name, array in arrays.items()}
        held = put({
            "indices": lanes.integers({slot: slot % self._own for slot in wave}, self._own),
            "tables": memory.tables(groups, size), "streams": lanes.streams(turns),
            "lengths": lanes.integers({slot: start for slot, (start, _) in wave.items()}),
            "limits": lanes.integers({slot: turns[slot].limit for slot in wave})})
        adjust = (put(lanes.adjustments(turns, self.config.vocab_size)),) if adjusts else ()
        (longest,) = self.most(max((end for _, end in wave.values()), default=0))
        memory.cache, memory.logits, found = self.programs.run(
            "decode_adjusted" if adjust else "decode", self._weights, memory.cache, memory.logits, *held.values(),
            np.int32(self._placement.total(enough)), put(lanes.draws(turns)), self._stop, *adjust,
            key_limit=self._key_limit(longest), shape=(size,))
        found = {name: self._placement.get(array) for name, array in found.items()}
        made = {slot: {name: array[place] for name, array in found.items()} for slot, place in lanes.places.items()}
        for slot, one in made.items():
            self._lengths[slot] += one["counts"]
            memory.cut(slot, self.length(slot))
            self._note(slot, one["tokens"][: one["counts"]].tolist())
            if "routes" in one:
                self._routes[slot].append(one["routes"][: one["counts"]].copy())
        return made
