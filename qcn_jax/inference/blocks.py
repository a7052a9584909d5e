"""Which blocks of keys and values the sequences of a part hold: shared, copied on write, in host memory. No JAX.

A sequence holds as many blocks as its tokens fill, the last of them in part. Copies of a sequence share its blocks
until one of them writes into the last. All sequences have one budget of blocks on the device. Those that were used
longest ago give theirs up when it is short: to host memory, or (without `swaps`) altogether, and then they must be
given their tokens again.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

PREEMPTIONS = SWAP, RECOMPUTE = "swap", "recompute"  # what becomes of blocks that must make room
COUNTED = "swapped_out", "swapped_in", "copied", "dropped"


@dataclasses.dataclass(eq=False)
class Block:
    """Keys and values of some tokens: `index` on the device, or `data` in host memory; `users` sequences hold it."""

    index: int | None
    users: int = 1
    data: np.ndarray | None = None


@dataclasses.dataclass
class Moves:
    """What must be done, in this order: blocks to host memory, blocks from there, copies (from, to) on the device."""

    out: list[tuple[Block, int]] = dataclasses.field(default_factory=list)
    into: list[Block] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Blocks:
    """The blocks of one part's sequences, which are named by their slots.

    Attributes:
      dropped: slots whose keys and values are gone, and must be made again before the next use.
      counts: of blocks "swapped_out", "swapped_in" and "copied", and of sequences "dropped".
    """

    def __init__(self, count: int, size: int, swaps: bool) -> None:
        """`count` blocks of `size` tokens; `swaps`: what is given up goes to host memory."""
        self.count, self.size, self._swaps = count, size, swaps
        self._free = list(range(count))[::-1]
        self._held: dict[int, list[Block]] = {}  # by slot, the least recently used first
        self.dropped: set[int] = set()
        self.counts: collections.Counter[str] = collections.Counter()

    def pages(self, length: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-length // self.size)

    def table(self, slot: int, width: int) -> np.ndarray:
        """The first `width` blocks of a slot [width] int32, on the device; `count`, which is none, behind the last."""
        table = np.full(width, self.count, np.int32)
        indices = [block.index for block in self._held.get(slot, ())[:width]]
        table[: len(indices)] = indices
        return table

    def absent(self, slot: int) -> int:
        """Blocks of a slot that are not on the device."""
        return sum(block.index is None for block in self._held.get(slot, ()))

    def fitting(self, wanted: Mapping[int, tuple[int, int]], most: int) -> list[int]:
        """As many of the first slots of `wanted`, see `hold`, as can be on the device together, up to `most`."""
        chosen: dict[int, tuple[int, int]] = {}
        for slot, lengths in wanted.items():
            if len(chosen) == most or self._needs(chosen | {slot: lengths})[0] > self.count:
                break
            chosen[slot] = lengths
        return list(chosen)

    def _needs(self, wanted: Mapping[int, tuple[int, int]], beside: Iterable[int] = ()) -> tuple[int, int, set[Block]]:
        """Blocks for `wanted` and `beside` in all, those of them that are to be got, and those that are held."""
        kept = {block for slot in (*wanted, *beside) for block in self._held.get(slot, ())}
        users = {block: block.users for block in kept}
        fresh = 0
        for slot, (start, end) in wanted.items():
            held = self._held.get(slot, [])
            fresh += max(0, self.pages(end) - len(held))
            if self._writes_into(held, start, end) and users[held[start // self.size]] > 1:
                users[held[start // self.size]] -= 1
                fresh += 1
        return len(kept) + fresh, fresh + sum(block.index is None for block in kept), kept

    def _writes_into(self, held: Sequence[Block], start: int, end: int) -> bool:
        """Whether tokens from `start` on begin within a block that is held."""
        return start < end and start // self.size < len(held)

    def hold(self, wanted: Mapping[int, tuple[int, int]], beside: Collection[int] = ()) -> Moves:
        """Has slots on the device, with room of their own for tokens to come; together they must fit, see `fitting`.

        Args:
          wanted: slot -> tokens that it holds, and that it may hold in a moment.
          beside: further slots that nothing is to be taken from.
        """
        moves = Moves()
        _, lacking, kept = self._needs(wanted, beside)
        if lacking > len(self._free):
            self._give_up(lacking - len(self._free), kept, {*wanted, *beside}, moves)
        for slot in wanted:
            self._held[slot] = held = self._held.pop(slot, [])  # used last
            for block in held:
                if block.index is None:
                    block.index = self._free.pop()
                    moves.into.append(block)
        for slot, (start, end) in wanted.items():
            held, at = self._held[slot], start // self.size
            if self._writes_into(held, start, end) and held[at].users > 1:
                own = Block(self._free.pop())
                if start % self.size:
                    moves.copies.append((held[at].index, own.index))
                held[at].users -= 1
                held[at] = own
            held += [Block(self._free.pop()) for _ in range(self.pages(end) - len(held))]
        self.counts.update(swapped_out=len(moves.out), swapped_in=len(moves.into), copied=len(moves.copies))
        return moves

    def _give_up(self, lacking: int, kept: set[Block], spared: set[int], moves: Moves) -> None:
        """Frees so many blocks more, of those who were used longest ago, and of each the last ones first.

        Without swapping nothing is dropped that would free no block, because others hold all of its blocks, too.
        """
        enough, others = len(self._free) + lacking, [slot for slot in self._held if slot not in spared]
        while not self._swaps and len(self._free) < enough:
            slot = self._to_drop(others, kept)
            self._release(slot, 0)
            self.dropped.add(slot)
            self.counts["dropped"] += 1
        for block in (block for slot in others for block in reversed(self._held[slot])):
            if len(self._free) >= enough:
                return
            if block.index is not None and block not in kept:
                moves.out.append((block, block.index))
                self._free.append(block.index)
                block.index = None

    def _to_drop(self, others: Sequence[int], kept: set[Block]) -> int:
        """The first of `others` that frees a block by itself, else the first whose blocks are not all in `kept`."""
        frees = lambda slot: any(block.users == 1 for block in self._held[slot])
        chosen = [slot for slot in others if frees(slot)] or [slot for slot in others if set(self._held[slot]) - kept]
        return chosen[0]

    def share(self, source: int, target: int) -> None:
        """`target` holds what `source` holds, and counts as just used."""
        self.cut(target, 0)
        del self._held[target]  # its place in the order tells of another life
        self._held[target] = list(self._held.get(source, ()))
        for block in self._held[target]:
            block.users += 1
        if source in self.dropped:
            self.dropped.add(target)

    def cut(self, slot: int, length: int) -> None:
        """Gives up what a slot holds beyond `length` tokens."""
        self._release(slot, self.pages(length))
        if not length:
            self.dropped.discard(slot)

    def _release(self, slot: int, count: int) -> None:
        held = self._held.setdefault(slot, [])
        for block in held[count:]:
            block.users -= 1
            if not block.users and block.index is not None:
                self._free.append(block.index)
        del held[count:]
