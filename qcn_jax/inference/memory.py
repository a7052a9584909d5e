"""What an engine's slots hold on its devices: states, one row a slot, and keys and values, in blocks by one budget.

Every method that moves something is called by all hosts, with what concerns their own slots.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcn_jax.errors import UserError
from qcn_jax.inference.blocks import COUNTED, PREEMPTIONS, SWAP, Blocks, Moves
from qcn_jax.inference.placement import Placement
from qcn_jax.inference.programs import Programs

MOVED_TOKENS = 1024  # of a part, that one call moves at most; whole blocks


@dataclasses.dataclass(frozen=True)
class Budget:
    """Keys and values of a part: `blocks` of `size` tokens; `width` of the longest sequence; `swaps`: see Blocks."""

    blocks: int
    size: int
    width: int
    swaps: bool

    @classmethod
    def of(cls, parts: int, slots: int, max_length: int, block_size: int | None, num_blocks: int | None,
           preemption: str = SWAP) -> "Budget":
        """From an engine's arguments, `num_blocks` of all parts; `slots` are those of a part.

        Raises:
          ValueError: a size below 1, or an unknown preemption.
          UserError: fewer blocks than a sequence may need.
        """
        size = max_length if block_size is None else min(block_size, max_length)
        if size < 1:
            raise ValueError(f"block_size: {size}, must be at least 1")
        if preemption not in PREEMPTIONS:
            raise ValueError(f"preemption: {preemption!r}, must be {' or '.join(PREEMPTIONS)}")
        width = -(-max_length // size)
        blocks = slots * width if num_blocks is None else -(-num_blocks // parts)
        if blocks < (least := min(slots * width, width + 1)):  # one of which is being copied
            raise UserError(f"num_blocks: {num_blocks}, {blocks} of {size} tokens on each device; allowed: at least "
                            f"{least * parts}, for a sequence of {max_length} tokens and a copy of its last block")
        return cls(blocks, size, width, preemption == SWAP)


class Memory:
    """Caches and saved states of all slots.

    Attributes:
      cache, logits: see Programs.
    """

    def __init__(self, programs: Programs, placement: Placement, slots: int, budget: Budget, rows: int,
                 snapshots: int) -> None:
        """Allocates.

        Args:
          programs, placement: the engine's.
          slots: of a part.
          budget: see Budget.
          rows: of a part, whose states one call copies.
          snapshots: states that a part can save.
        """
        self._programs, self._placement, self._own, self._rows = programs, placement, slots, rows
        self._budget, self._snapshots = budget, snapshots
        self._moved = max(1, min(budget.blocks, MOVED_TOKENS // budget.size))
        self.clear()

    def clear(self) -> None:
        """Empties everything and allocates it anew."""
        self.cache = self.logits = self._saved = None
        self.cache, self.logits = self._programs.empty()
        self._saved = self._programs.no_snapshots() if self._snapshots else None
        self._parts = [Blocks(self._budget.blocks, self._budget.size, self._budget.swaps)
                       for _ in range(self._placement.mine)]

    def _of(self, slot: int) -> Blocks:
        return self._parts[slot // self._own]

    def counts(self) -> dict[str, int]:
        """How often what happened, see Blocks.counts."""
        total = collections.Counter(dict.fromkeys(COUNTED, 0))
        for part in self._parts:
            total.update(part.counts)
        return dict(total)

    def cut(self, slot: int, length: int) -> None:
        """Gives up what a slot holds beyond `length` tokens."""
        self._of(slot).cut(slot, length)

    def dropped(self, slots: Iterable[int]) -> list[int]:
        """Those whose keys and values must be made again."""
        return [slot for slot in slots if slot in self._of(slot).dropped]

    def there_first(self, slots: Iterable[int]) -> list[int]:
        """Slots, those first of which most is on the device."""
        return sorted(slots, key=lambda slot: (slot in self._of(slot).dropped, self._of(slot).absent(slot), slot))

    def fitting(self, wanted: Mapping[int, tuple[int, int]], most: int) -> list[list[int]]:
        """Of every part as many of its first slots of `wanted` as fit, up to `most`; see Blocks.fitting."""
        return [blocks.fitting({slot: lengths for slot, lengths in wanted.items() if slot // self._own == part}, most)
                for part, blocks in enumerate(self._parts)]

    def tables(self, groups: Sequence[Sequence[int]], rows: int) -> np.ndarray:
        """The blocks [parts * rows, W] of every part's slots, and of none behind them."""
        width = self._budget.width
        tables = np.full((len(self._parts) * rows, width), self._budget.blocks, np.int32)
        for part, group in enumerate(groups):
            for row, slot in enumerate(group, part * rows):
                tables[row] = self._of(slot).table(slot, width)
        return tables

    def hold(self, wanted: Mapping[int, tuple[int, int]], beside: Collection[int] = ()) -> None:
        """Has slots on the device, with room for what comes; see Blocks.hold."""
        mine = lambda part, slots: [slot for slot in slots if slot // self._own == part]
        moves = [blocks.hold({slot: wanted[slot] for slot in mine(part, wanted)}, mine(part, beside))
                 for part, blocks in enumerate(self._parts)]
        longest = lambda kind: -(-max(len(getattr(one, kind)) for one in moves) // self._moved)
        out, into, copies = self._placement.most(*map(longest, ("out", "into", "copies")))
        for call in range(out):
            self._swap_out(moves, call * self._moved)
        for call in range(into):
            self._swap_in(moves, call * self._moved)
        for call in range(copies):
            pairs = [one.copies[call * self._moved : (call + 1) * self._moved] for one in moves]
            self.cache = self._programs.run("copy_blocks", self.cache, *self._padded(pairs, self._moved, 2))

    def _swap_out(self, moves: Sequence[Moves], first: int) -> None:
        those = [one.out[first : first + self._moved] for one in moves]
        indices = self._padded([[(index,) for _, index in part] for part in those], self._moved, 1)
        data = self._placement.get(self._programs.run("read_blocks", self.cache, *indices))
        data = data.reshape(len(moves), self._moved, *data.shape[1:])
        for part, blocks in enumerate(those):
            for row, (block, _) in enumerate(blocks):
                block.data = data[part, row].copy()

    def _swap_in(self, moves: Sequence[Moves], first: int) -> None:
        those = [one.into[first : first + self._moved] for one in moves]
        indices = self._padded([[(block.index,) for block in part] for part in those], self._moved, 1)
        shape, dtype = self._programs.block
        data = np.zeros((len(moves), self._moved, *shape), dtype)
        for part, blocks in enumerate(those):
            for row, block in enumerate(blocks):
                data[part, row], block.data = block.data, None
        data = self._placement.put(data.reshape(-1, *shape))
        self.cache = self._programs.run("write_blocks", self.cache, *indices, data)

    def _padded(self, groups: Sequence[Sequence[tuple[int, ...]]], rows: int, width: int) -> list[Any]:
        """`width` arrays [parts * rows] of what every part's tuples have; rows behind them are beyond everything."""
        arrays = np.full((width, len(groups), rows), np.iinfo(np.int32).max, np.int32)
        for part, group in enumerate(groups):
            for row, values in enumerate(group):
                arrays[:, part, row] = values
        return [self._placement.put(array.reshape(-1)) for array in arrays]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Makes slots copies of others (from, to), whose blocks they share."""
        for source, target in pairs:
            self._of(source).share(source, target)
        for pair in self._by_rows({target: source % self._own for source, target in pairs}):
            self.cache, self.logits = self._programs.run("copy", self.cache, self.logits, *reversed(pair))

    def save(self, entries: Mapping[int, int]) -> None:
        """Keeps the states of slots (slot -> entry of its part's pool)."""
        for pair in self._by_rows(entries):
            self._saved = self._programs.run("save", *self._saved, self.cache, self.logits, *pair)

    def restore(self, entries: Mapping[int, int]) -> None:
        """Gives slots (slot -> entry) the states that were saved."""
        for pair in self._by_rows(entries):
            self.cache, self.logits = self._programs.run(
                "restore", self.cache, self.logits, *self._saved, *pair)

    def _by_rows(self, numbers: Mapping[int, int]) -> Iterator[list[Any]]:
        """Slots of their part, and their numbers, in calls of P rows a part."""
        mine = [[(slot % self._own, number) for slot, number in numbers.items() if slot // self._own == part]
                for part in range(len(self._parts))]
        (calls,) = self._placement.most(-(-max(map(len, mine)) // self._rows))
        for first in range(0, calls * self._rows, self._rows):
            yield self._padded([group[first : first + self._rows] for group in mine], self._rows, 2)
