"""What the host knows of an engine's slots: how many tokens each holds, which experts they had, where it can be cut.

Nothing here computes; an engine keeps it in step with its devices.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qcn_jax.config import ModelConfig


class Slots:
    """Slots that hold token sequences.

    Attributes:
      slots: of this host; methods take their numbers.
      parts: how many parts of as many slots these are; only slots of one part can be copies of one another.
      snapshots: states that each part can save, which its own slots alone can be cut back to.
    """

    def __init__(self, config: ModelConfig, parts: int, own: int, snapshots: int, with_tokens: bool) -> None:
        """All are empty.

        Args:
          config: the model's.
          parts: see above.
          own: slots of a part.
          snapshots: see above.
          with_tokens: also keep which tokens slots hold.
        """
        self.config, self.parts, self.slots, self.snapshots = config, parts, own * parts, snapshots
        self._own, self._with_tokens = own, with_tokens
        self._lengths = np.zeros(self.slots, np.int64)
        self._fresh = np.ones(self.slots, bool)  # the slot's states are to be cleared before their next use
        self._routes: list[list[np.ndarray]] = [[] for _ in range(self.slots)]  # by slot, in pieces [tokens, L, k]
        self._tokens: list[list[int]] = [[] for _ in range(self.slots)]
        self._saved_lengths = np.zeros((parts, snapshots), np.int64)

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

    def _empty(self, slots: Iterable[int]) -> None:
        """Forgets what slots hold."""
        for slot in slots:
            self._lengths[slot], self._fresh[slot] = 0, True
            self._routes[slot], self._tokens[slot] = [], []

    def _become(self, target: int, origin: int) -> None:
        """A slot holds what another does."""
        self._lengths[target], self._fresh[target] = self._lengths[origin], self._fresh[origin]
        self._routes[target], self._tokens[target] = list(self._routes[origin]), list(self._tokens[origin])

    def _cut(self, slot: int, length: int) -> None:
        """A slot holds the first `length` of its tokens."""
        self._lengths[slot], self._fresh[slot] = length, False
        del self._tokens[slot][length:]
        self._routes[slot] = [self.routes(slot)[:length]] if self._routes[slot] else []

    def _note(self, slot: int, tokens: Sequence[int]) -> None:
        """Tokens were added to a slot."""
        if self._with_tokens:
            self._tokens[slot] += tokens

    def _check(self, slots: Iterable[int]) -> None:
        """Raises ValueError unless `slots` are different ones that there are."""
        seen = set()
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot}: there are slots 0 to {self.slots - 1}")
            if slot in seen:
                raise ValueError(f"slot {slot} is named twice")
            seen.add(slot)

    def _check_entries(self, entries: Mapping[int, int], once: bool = True) -> None:
        self._check(entries)
        named = set()
        for slot, entry in entries.items():
            if not 0 <= entry < self.snapshots:
                raise ValueError(f"entry {entry}: there are {self.snapshots} of each part")
            if once and (self.part(slot), entry) in named:
                raise ValueError(f"entry {entry} is named twice")
            named.add((self.part(slot), entry))
