"""What one call of prefill or decoding is given, by lane: a slot has one, and lanes without a slot do nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcn_jax.inference.sampling import History, Sampling, adjustments

_DRAWS = {"temperature": np.float32, "top_p": np.float32, "top_k": np.int32, "min_p": np.float32}


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a slot is to generate: `limit` tokens at most, drawn from the stream of `seed`; `history` may be unknown."""

    seed: int
    draw: Sampling
    limit: int
    history: History | None = None


class Lanes:
    """Lanes of a host's parts.

    Attributes:
      places: slot -> its lane, numbered over all parts.
    """

    def __init__(self, groups: Sequence[Sequence[int]], size: int) -> None:
        """`groups`: of every part its slots, up to `size`."""
        self.places = {slot: part * size + row for part, group in enumerate(groups) for row, slot in enumerate(group)}
        self._count = len(groups) * size

    def _array(self, values: Mapping[int, Any], empty: Any, dtype: Any) -> np.ndarray:
        array = np.full(self._count, empty, dtype)
        for slot, place in self.places.items():
            array[place] = values[slot]
        return array

    def integers(self, values: Mapping[int, int], empty: int = 0) -> np.ndarray:
        """Values of slots, by lane."""
        return self._array(values, empty, np.int32)

    def pieces(self, pieces: Mapping[int, Sequence[int]], length: int) -> np.ndarray:
        """Tokens of slots [lanes, length], padded on the right."""
        array = np.zeros((self._count, length), np.int32)
        for slot, place in self.places.items():
            array[place, : len(pieces[slot])] = pieces[slot]
        return array

    def streams(self, turns: Mapping[int, Turn]) -> np.ndarray:
        """Random streams, by lane."""
        return self._array({slot: turns[slot].seed & 0xFFFFFFFF for slot in self.places}, 0, np.uint32)

    def draws(self, turns: Mapping[int, Turn]) -> dict[str, np.ndarray]:
        """How to draw, by lane; see sampling.sample."""
        return {name: self._array({slot: getattr(turns[slot].draw, name) for slot in self.places},
                                  getattr(Sampling(0.0), name), dtype) for name, dtype in _DRAWS.items()}

    def adjustments(self, turns: Mapping[int, Turn], vocabulary: int) -> dict[str, np.ndarray]:
        """sampling.adjustments, by lane; lanes without a slot have none."""
        every, told = [Sampling()] * self._count, [History((), ())] * self._count
        for slot, place in self.places.items():
            every[place], told[place] = turns[slot].draw, turns[slot].history
        return adjustments(every, told, vocabulary)
