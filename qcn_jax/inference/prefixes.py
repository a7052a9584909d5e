"""Which of an engine's slots already hold the beginning of a prompt.

Attention's keys and values can be cut at any token, but the recurrent state of a hybrid model is one of its last token:
a sequence can be taken up where it ends, or where its state was saved. States are saved where a prompt ends, which is
where the same conversation's next turn, or another sample, begins; and where two prompts part, once a second one has
shown the place (the instructions and tools that all conversations of an agent share).

Nothing here computes: an index of token sequences, kept in step with the engine by the scheduler.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

LEAST = 64  # tokens that are worth taking up, or saving a state for: fewer are prefilled in one call anyway


@dataclasses.dataclass
class _Held:
    """A slot's tokens; its saved states by length, as entries of its part's pool; and when it was last used."""

    tokens: np.ndarray
    saved: dict[int, int] = dataclasses.field(default_factory=dict)
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Hit:
    """`length` tokens of a prompt that `source` holds; `entry` is their saved state, None where they are all it holds.

    `parted` is where prompt and slot part, if it is worth saving a state there: behind `length`, or 0.
    """

    source: int
    length: int
    entry: int | None
    parted: int = 0


class Prefixes:
    """The sequences that slots hold, and who may take them up."""

    def __init__(self, slots: int, parts: int, entries: int, least: int = LEAST) -> None:
        """Starts empty.

        Args:
          slots: numbered from 0; those of a part follow one another.
          parts: of the engine; slots and saved states of different parts have nothing to do with each other.
          entries: saved states of each part.
          least: see LEAST.
        """
        self._own, self._entries, self._least, self._clock = slots // parts, entries, least, 0
        self._held: dict[int, _Held] = {slot: _Held(np.zeros(0, np.int32)) for slot in range(slots)}
        # By part, entry -> the slot and length that it belongs to, least recently used first.
        self._owners: list[dict[int, tuple[int, int]]] = [{} for _ in range(parts)]

    def part(self, slot: int) -> int:
        """The part that `slot` is of."""
        return slot // self._own

    def clear(self) -> None:
        """Forgets everything, as when the engine was emptied or its weights were changed."""
        self.__init__(len(self._held), len(self._owners), self._entries, self._least)

    def find(self, tokens: Sequence[int], free: Iterable[int]) -> tuple[int, Hit | None]:
        """The slot among `free` that a prompt should go to, and what of it is there or in a slot of the same part.

        The slot that holds the prompt's beginning is taken itself where it ends with it; else it is spared, and its
        beginning copied into the least recently used slot.
        """
        prompt, best, free = np.asarray(tokens, np.int32), None, sorted(free, key=lambda slot: self._held[slot].used)
        reachable = {self.part(slot) for slot in free}
        parted = 0
        for slot, held in self._held.items():
            common = _common(held.tokens, prompt)
            if self.part(slot) not in reachable or common < self._least:
                continue
            parted = max(parted, common)
            whole = common == len(held.tokens) and slot in free
            length = common if whole else max((length for length in held.saved if length <= common), default=0)
            if length >= self._least and (best is None or (length, slot in free) > (best.length, best.source in free)):
                best = Hit(slot, length, None if whole else held.saved[length])
        if best is None:
            return free[0], Hit(-1, 0, None, parted) if self._least <= parted < len(prompt) else None
        best = dataclasses.replace(best, parted=parted if best.length + self._least <= parted < len(prompt) else 0)
        others = [slot for slot in free if self.part(slot) == self.part(best.source) and slot != best.source]
        keep = best.entry is not None and others
        return (others[0] if keep or best.source not in free else best.source), best

    def take(self, slot: int, tokens: Sequence[int], hit: Hit | None) -> None:
        """Notes that `slot` now holds the beginning `hit` of `tokens` and will hold the rest."""
        self._clock += 1
        held, length = self._held[slot], hit.length if hit is not None else 0
        if hit is None or hit.source != slot:
            for entry in held.saved.values():
                self._owners[self.part(slot)].pop(entry)
            held.saved = {}
        for at in [at for at in held.saved if at > length]:
            self._owners[self.part(slot)].pop(held.saved.pop(at))
        if hit is not None and hit.source >= 0:
            source = self._held[hit.source]
            source.used = self._clock
            if hit.entry is not None:
                owners = self._owners[self.part(slot)]
                owners[hit.entry] = owners.pop(hit.entry)  # used last
        held.tokens, held.used = np.asarray(tokens, np.int32), self._clock

    def extended(self, slot: int, tokens: Sequence[int]) -> None:
        """Notes what `slot` holds after its prompt and all that was generated."""
        self._held[slot].tokens = np.asarray(tokens, np.int32)

    def save(self, slot: int, length: int) -> int | None:
        """The entry to save `slot`'s state in, now that it holds `length` tokens; None where there is none to have."""
        held, owners = self._held[slot], self._owners[self.part(slot)]
        if not self._entries or length < self._least or length in held.saved:
            return None
        entry = next((entry for entry in range(self._entries) if entry not in owners), None)
        if entry is None:
            entry = next(iter(owners))
            owner, at = owners.pop(entry)
            del self._held[owner].saved[at]
        owners[entry] = slot, length
        held.saved[length] = entry
        return entry


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(a), len(b))
    unlike = np.flatnonzero(a[:size] != b[:size])
    return int(unlike[0]) if len(unlike) else size
