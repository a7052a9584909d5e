"""Generation engine: many conversations side by side, each with its own cache slot.

Axes: N slots, P prefill rows, C prefill chunk, M new tokens, V vocabulary. Everything compiled has one fixed
shape, whatever the conversations look like: one prefill of [P, C] tokens that is called as often as the
prompts need, one copy of cache rows, and one decoding loop over all N slots that runs inside the jitted
function until every active slot, or all but a few, has met a stop token or its limit. Prefill and decoding are
compiled once more each time the longest sequence outgrows the part of the cache that attention reads.

What a slot generates depends on its tokens, its seed and the weights, not on the other slots (but for rounding:
longer neighbours may make attention read more of the empty cache). Weights are an argument of the compiled
functions: on one device `engine.params = new` costs nothing, on a mesh one change of layout.

Over several devices every part of the placement has slots of its own, and prefill rows for them. Over several hosts the
engine is one program: every host has slots of its own and calls the same methods in the same order, with what concerns
its slots, be it nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.inference import shapes
from qcn_jax.inference.generation import Generation
from qcn_jax.inference.placement import Placement, acting
from qcn_jax.inference.programs import STOP_IDS, Programs
from qcn_jax.inference.sampling import History, Sampling, adjustments
from qcn_jax.layers.attention import can_read
from qcn_jax.model import Qwen3Next
from qcn_jax.sharding.parallel import Parallel

FIRST_KEY_LIMIT = 256  # attention reads this many cached tokens, or twice as many, and so on up to the capacity
UNROLL_BYTES = 1 << 30  # parameters up to this size are also kept layer by layer
_DRAWS = {"temperature": np.float32, "top_p": np.float32, "top_k": np.int32, "min_p": np.float32}


class Engine:
    """Continues up to `slots` token sequences of up to `max_length` tokens each.

    Usual course: `reset` slots, `extend` one with a prompt, `fork` it to the others of its group, `generate`,
    `extend` with what the environment answered, `generate` again.

    Attributes:
      slots: of this host; methods take their numbers.
      parts: how many parts of as many slots these are; only slots of one part can be copies of one another.
      snapshots: states that each part can save, which its own slots alone can be cut back to.
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

        Raises:
          ValueError: a size below 1.
          UserError: devices of one tensor group that belong to several hosts.
        """
        sizes = {"slots": slots, "max_length": max_length, "max_new_tokens": max_new_tokens,
                 "prefill_rows": prefill_rows, "prefill_chunk": prefill_chunk}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: {size}, must be at least 1")
        self.config = config
        if unrolled is None:  # on a mesh the engine holds weights of its own anyway
            unrolled = parallel is not None or sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= UNROLL_BYTES
        self._placement = place = Placement(None if parallel is None else acting(parallel, config))
        self._model = Qwen3Next(config, unrolled, place.parallel)
        self._own = -(-slots // place.parts)  # slots of a part
        self.parts, self.slots = place.mine, self._own * place.mine
        self.max_length, self._first_limit = max_length, key_limit
        self.max_new_tokens = max_new_tokens
        self._rows = min(-(-prefill_rows // place.parts), self._own)  # of a part
        self._row_counts = tuple(dict.fromkeys((*shapes.palette(self._rows, several_shapes), *[1] * several_shapes)))
        self._chunks = shapes.palette(min(prefill_chunk, max_length), several_shapes)
        self._stop = np.full(max(1, -(-len(stop_ids) // STOP_IDS)) * STOP_IDS, -1, np.int32)
        self._stop[: len(stop_ids)] = stop_ids
        self._lengths = np.zeros(self.slots, np.int64)
        self._fresh = np.ones(self.slots, bool)  # the slot's cache rows are to be cleared before their next use
        self._routes: list[list[np.ndarray]] = [[] for _ in range(self.slots)]  # by slot, in pieces [tokens, L, k]
        self.snapshots, self.with_routes = -(-snapshots // place.parts), with_routes
        self.programs = Programs(self._model, place, self._own, max_length, max_new_tokens, drawable, self.snapshots,
                                 with_routes)
        self._cache, self._logits = self.programs.empty()
        self._saved = self.programs.no_snapshots() if snapshots else None
        self._saved_lengths = np.zeros((self.parts, self.snapshots), np.int64)
        self.params = params

    def clear(self) -> None:
        """Empties all slots and allocates their caches anew: a call that failed may have left them torn, or taken."""
        self._cache = self._logits = self._saved = None
        self._cache, self._logits = self.programs.empty()
        self._saved = self.programs.no_snapshots() if self.snapshots else None
        self._saved_lengths[:] = 0
        self.reset(range(self.slots))

    def _take(self, params: Any) -> None:
        self._weights = self.programs.run("arrange", params)

    params = property(None, _take, doc="""The model's parameters, to be assigned: others of the same shapes act at once.

    They may be laid out in any way; the engine keeps them as it acts with them.
    """)

    def length(self, slot: int) -> int:
        """Tokens that `slot` holds."""
        return int(self._lengths[slot])

    def routes(self, slot: int) -> np.ndarray:
        """The experts [length, L, k] uint16 that every layer chose for the tokens of `slot` when they were given to it.

        Those of the prompt and of observations too. Of an engine made `with_routes`; empty where the slot is.
        """
        each = (self.config.num_hidden_layers, self.config.num_experts_per_tok)
        return np.concatenate([np.zeros((0, *each), np.uint16), *self._routes[slot]])

    def part(self, slot: int) -> int:
        """The part that `slot` is of."""
        return slot // self._own

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all hosts, which must all ask; on one host the values themselves."""
        return self._placement.most(*values)

    def compilations(self) -> int:
        """How many shapes have been compiled so far: one of copying, one of prefill and decoding per key limit."""
        return self.programs.compilations()

    def _check(self, slots: Iterable[int]) -> None:
        """Raises ValueError unless `slots` are different ones that there are."""
        seen = set()
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot}: there are slots 0 to {self.slots - 1}")
            if slot in seen:
                raise ValueError(f"slot {slot} is named twice")
            seen.add(slot)

    def reset(self, slots: Sequence[int]) -> None:
        """Empties slots; the clearing itself happens with their next prefill. Raises ValueError for unknown slots."""
        self._check(slots)
        self._lengths[list(slots)] = 0
        self._fresh[list(slots)] = True
        for slot in slots:
            self._routes[slot] = []

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
        begun = dict.fromkeys(tokens, 0)
        while True:
            left = {slot: len(tokens[slot]) - at for slot, at in begun.items() if at < len(tokens[slot])}
            order = sorted(left, key=lambda slot: (-left[slot], slot))
            mine = [[slot for slot in order if self.part(slot) == part] for part in range(self.parts)]
            shape = shapes.best([[left[slot] for slot in part] for part in mine], self._row_counts, self._chunks)
            going, rows, chunk = self.most(bool(left), *(shape if left else (0, 0)))
            if not going:
                return
            self._prefill([part[:rows] for part in mine], tokens, begun, rows, chunk)

    def _prefill(self, groups: Sequence[Sequence[int]], tokens: Mapping[int, Sequence[int]], begun: dict[int, int],
                 rows: int, chunk: int) -> None:
        """One prefill call, of up to `rows` slots of every part and `chunk` tokens of each, from `begun` on."""
        size, longest = (self.parts, rows), 0
        indices, fresh, lengths = np.full(size, self._own, np.int32), np.zeros(size, bool), np.zeros(size, np.int32)
        pieces = np.zeros((*size, chunk), np.int32)
        for part, group in enumerate(groups):
            for row, slot in enumerate(group):
                piece, place = tokens[slot][begun[slot] : begun[slot] + chunk], (part, row)
                indices[place], fresh[place], lengths[place] = slot % self._own, self._fresh[slot], len(piece)
                pieces[place][: len(piece)] = piece
                self._fresh[slot] = False
                self._lengths[slot] += len(piece)
                begun[slot] += len(piece)
                longest = max(longest, int(self._lengths[slot]))
        put = lambda array: self._placement.put(array.reshape(-1, *array.shape[2:]))
        self._cache, self._logits, made = self.programs.run(
            "prefill", self._weights, self._cache, self._logits, put(indices), put(fresh), put(pieces), put(lengths),
            key_limit=self._key_limit(*self.most(longest)), shape=(rows, chunk))
        if made:
            routes = self._placement.get(made["routes"]).reshape(*size, chunk, *made["routes"].shape[2:])
            for part, group in enumerate(groups):
                for row, slot in enumerate(group):
                    self._routes[slot].append(routes[part, row, : lengths[part, row]].copy())

    def _key_limit(self, longest: int) -> int:
        """How much of the cache attention must read for sequences of up to `longest` tokens."""
        if self.config.attention == "splash" and can_read(self.max_length):
            return self.max_length  # the kernel sees what each sequence holds
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
        source = np.arange(self.slots, dtype=np.int32)
        for origin, targets in copies.items():
            for target in targets:
                if self.part(target) != self.part(origin):
                    raise ValueError(f"slot {target} is not of the part that slot {origin} is of")
                source[target] = origin
        if not any(self.most(bool(source.size and (source != np.arange(self.slots)).any()))):
            return
        self._cache, self._logits = self.programs.run(
            "copy", self._cache, self._logits, self._placement.put(source % self._own))
        self._lengths, self._fresh = self._lengths[source], self._fresh[source]
        self._routes = [list(self._routes[origin]) for origin in source]

    def save(self, entries: Mapping[int, int]) -> None:
        """Keeps the states of slots (slot -> entry of its part's pool), for `restore`; an entry is overwritten.

        Raises:
          ValueError: an unknown slot, one without a token, an unknown entry, or one named twice.
        """
        self._check_entries(entries)
        if any(self._lengths[slot] == 0 for slot in entries):
            raise ValueError("save needs slots that hold tokens")
        for slots, rows in self._by_rows(entries):
            self._saved = self.programs.run("save", *self._saved, self._cache, self._logits, *slots, *rows)
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
        for slots, rows in self._by_rows(entries):
            self._cache, self._logits = self.programs.run(
                "restore", self._cache, self._logits, *self._saved, *slots, *rows)
        for slot, entry in entries.items():
            self._lengths[slot], self._fresh[slot] = self._saved_lengths[self.part(slot), entry], False
            self._routes[slot] = [self.routes(slot)[: self._lengths[slot]]] if self._routes[slot] else []

    def _check_entries(self, entries: Mapping[int, int], once: bool = True) -> None:
        self._check(entries)
        named = set()
        for slot, entry in entries.items():
            if not 0 <= entry < self.snapshots:
                raise ValueError(f"entry {entry}: there are {self.snapshots} of each part")
            if once and (self.part(slot), entry) in named:
                raise ValueError(f"entry {entry} is named twice")
            named.add((self.part(slot), entry))

    def _by_rows(self, entries: Mapping[int, int]) -> Iterator[tuple[list[Any], list[Any]]]:
        """Slots and entries in calls of P rows a part; rows that mean nothing have numbers beyond."""
        mine = [[pair for pair in entries.items() if self.part(pair[0]) == part] for part in range(self.parts)]
        (count,) = self.most(-(-max(map(len, mine)) // self._rows))
        for first in range(0, count * self._rows, self._rows):
            slots = np.full((self.parts, self._rows), self._own, np.int32)
            rows = np.full((self.parts, self._rows), self.snapshots, np.int32)
            for part, pairs in enumerate(mine):
                for row, (slot, entry) in enumerate(pairs[first : first + self._rows]):
                    slots[part, row], rows[part, row] = slot % self._own, entry
            yield [self._placement.put(slots.reshape(-1))], [self._placement.put(rows.reshape(-1))]

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
        chosen = np.asarray(slots, np.int64)
        if not 0 <= enough < max(1, len(chosen)):
            raise ValueError(f"enough: {enough}, must be at least 0 and less than the {len(chosen)} slots")
        if (self._lengths[chosen] == 0).any():
            raise ValueError("generate needs slots that hold a prompt")
        draws = [sampling] * len(chosen) if isinstance(sampling, Sampling) else list(sampling)
        wanted = self.max_new_tokens if max_new_tokens is None else np.asarray(max_new_tokens)
        limits = np.zeros(self.slots, np.int32)
        limits[chosen] = np.minimum(np.minimum(wanted, self.max_new_tokens), self.max_length - self._lengths[chosen])
        if histories is None and any(one.adjusts for one in draws):
            raise ValueError("histories: none, where sampling has penalties, biases or alternatives")
        draw = {}
        for name, dtype in _DRAWS.items():
            draw[name] = np.full(self.slots, getattr(Sampling(0.0), name), dtype)
            draw[name][chosen] = [getattr(one, name) for one in draws]
        streams = np.zeros(self.slots, np.uint32)
        streams[chosen] = np.asarray(seeds, np.uint64) & 0xFFFFFFFF
        anyone, longest = self.most(bool(limits.any()), int((self._lengths[chosen] + limits[chosen]).max(initial=0)))
        if not anyone:
            nothing = np.zeros((2, 0), np.float32)
            return [Generation([], *nothing, "length") for _ in slots]
        put = lambda arrays: {name: self._placement.put(array) for name, array in arrays.items()}
        adjust = () if histories is None else (put(self._adjustments(chosen, draws, histories)),)
        held = put({"streams": streams, "lengths": self._lengths.astype(np.int32), "limits": limits})
        self._cache, self._logits, made = self.programs.run(
            "decode_adjusted" if adjust else "decode", self._weights, self._cache, self._logits, *held.values(),
            np.int32(self._placement.total(enough)), put(draw), self._stop, *adjust, key_limit=self._key_limit(longest))
        made = {name: self._placement.get(array) for name, array in made.items()}
        self._lengths = self._lengths + made["counts"]
        for slot in chosen if "routes" in made else ():
            self._routes[slot].append(made["routes"][slot, : made["counts"][slot]].copy())
        return [Generation.of(made, slot, limits[slot], one, self._stop) for slot, one in zip(chosen, draws)]

    def _adjustments(self, chosen: np.ndarray, draws: Sequence[Sampling], histories: Sequence[History]
                     ) -> dict[str, np.ndarray]:
        """sampling.adjustments by slot; slots that are not chosen have none."""
        every, told = [Sampling()] * self.slots, [History((), ())] * self.slots
        for slot, draw, history in zip(chosen, draws, histories, strict=True):
            every[slot], told[slot] = draw, history
        return adjustments(every, told, self.config.vocab_size)
